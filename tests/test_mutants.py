"""The bugs of mutants.py still apply to the current code."""

import mutants
import pytest


# Not marked fast: in a copy with a bug, that one cannot be planted again.
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_every_bug_can_be_planted(mutant):
    assert mutant.plant() != (mutants.ROOT / mutant.file).read_text(encoding="utf-8")


def test_there_are_twenty_bugs_of_different_kinds():
    assert len({(mutant.function, mutant.new) for mutant in mutants.MUTANTS}) == 20
