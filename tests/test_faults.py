"""A few of the faults of faults.py, of each kind; `make faults` tries hundreds."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from faults import Ground, can_mount

import storyteller_utils as st

FEW = {
    "kill-03": ("kill", "03_train_dual_t4"),
    "two-02": ("two", "02_vocab"),
    "leftover-01": ("leftover", "01_extract_features"),
    "full-02": ("full", "02_vocab"),
    "read-only-02": ("read_only", "02_vocab"),
    "damaged-01": ("damaged", "01_extract_features", "features.npy"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every fault's outcome, two of them being tried at a time."""
    ground, mount = Ground(tmp_path_factory.mktemp("ground"), list(st.STAGES)[:3]), can_mount()
    with ThreadPoolExecutor(2) as pool:
        return {
            name: pool.submit(getattr(ground, kind), *where, random.Random(name)).result
            for name, (kind, *where) in FEW.items()
            if mount or kind not in ("full", "read_only")
        }


@pytest.mark.parametrize("name", FEW)
def test_a_disturbed_stage_ends_like_an_undisturbed_one_or_says_what_to_do(outcomes, name):
    if name not in outcomes:
        pytest.skip("this user may not mount a small disk")
    outcome = outcomes[name]()
    assert outcome.came != "lost", f"{outcome.what}: {outcome.output[-3000:]}"
