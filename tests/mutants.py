"""Plant one bug at a time and see that the fast tests catch it: what `make mutants` does.

A bug is a change of a function's syntax tree, so that neither layout nor comments matter to it.
Ends with "caught N of 20"; exit 1 below 19. Two at a time, each in a copy of the project, with the
tests marked `fast`.
"""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENOUGH = 19


@dataclass(frozen=True)
class Mutant:
    """A bug in one function: an expression (or a statement) that becomes another."""

    name: str
    function: str  # "Class.method", or a function's name
    old: str
    new: str
    file: str = "storyteller_utils.py"

    def plant(self) -> str:
        """Return the file's text with the bug; ValueError unless it fits in exactly one place."""
        tree = ast.parse((ROOT / self.file).read_text(encoding="utf-8"))
        body = _definition(tree, self.function)
        before, after = _parse(self.old), _parse(self.new)
        swap = _Swap(ast.dump(before), after)
        swap.visit(body)
        if swap.count != 1:
            raise ValueError(f"{self.name}: {self.old!r} is {swap.count} times in {self.function}")
        return ast.unparse(ast.fix_missing_locations(tree))


class _Swap(ast.NodeTransformer):
    def __init__(self, old: str, new: ast.AST):
        self.old, self.new, self.count = old, new, 0

    def visit(self, node: ast.AST) -> ast.AST:
        # Whether a name is read or written is no part of how an expression looks.
        if ast.dump(node) == self.old:
            self.count += 1
            return self.new
        return self.generic_visit(node)


def _parse(text: str) -> ast.AST:
    statement = ast.parse(text).body[0]
    return statement.value if isinstance(statement, ast.Expr) else statement


def _definition(tree: ast.Module, name: str) -> ast.AST:
    scope: ast.AST = tree
    for part in name.split("."):
        inner = [n for n in ast.iter_child_nodes(scope) if getattr(n, "name", None) == part]
        if len(inner) != 1:
            raise ValueError(f"the module has {len(inner)} definitions of {name}")
        scope = inner[0]
    return scope


MUTANTS = [
    Mutant(
        "a photo is done at its first caption",
        "beam_search",
        "beams.ended_scores[:, -1]",
        "beams.ended_scores[:, 0]",
    ),
    Mutant(
        "beams of other photos go on",
        "_Beams.reorder",
        "torch.arange(len(parent), device=parent.device)[:, None] * self.ids.shape[1]",
        "torch.arange(len(parent), device=parent.device)[:, None] * 0",
    ),
    Mutant(
        "<unk> may be generated",
        "_Constraints.forbid",
        "[PAD, START, UNK, *self.never]",
        "[PAD, START, *self.never]",
    ),
    Mutant(
        "the temperature is upside down",
        "sample_captions",
        "logits / decoding.temperature",
        "logits * decoding.temperature",
    ),
    Mutant(
        "it is as sure of photos like none it knows",
        "Storyteller.confidence",
        "familiar * np.interp(scores, fit['scores'], fit['shares'])",
        "np.interp(scores, fit['scores'], fit['shares'])",
    ),
    Mutant(
        "padding is learned from", "Captioner.forward", "words[:, 1:] != PAD", "words[:, 1:] >= PAD"
    ),
    Mutant(
        "label smoothing is forgotten",
        "Captioner.forward",
        "nn.functional.cross_entropy(logits, target, reduction='none',"
        " label_smoothing=label_smoothing)",
        "nn.functional.cross_entropy(logits, target, reduction='none')",
    ),
    Mutant(
        "attention is shared out over photos",
        "AttentionLSTM.attend",
        "scores.float().softmax(-1)",
        "scores.float().softmax(0)",
    ),
    Mutant(
        "the Transformer sees the next word",
        "_TransformerLayer.attend",
        "torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)",
        "torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(2)",
    ),
    Mutant("features are not centred", "Captioner.standardise", "features - self.mean", "features"),
    Mutant(
        "the grid is read in columns",
        "Backbone.forward",
        "grid.flatten(2)",
        "grid.transpose(2, 3).flatten(2)",
    ),
    Mutant("turned photos stay turned", "_upright", "image.getexif().get(0x0112, 1)", "1"),
    Mutant(
        "some test photos are trained on",
        "_random_splits",
        "(('train', train), ('val', val), ('test', test))",
        "(('val', val), ('test', test), ('train', [*train, *test[:9]]))",
        "notebooks/caption_files.py",
    ),
    Mutant("rare words are lost", "Vocab.build", "n >= min_count", "n > min_count"),
    Mutant(
        "each slice of a batch sees the first photos",
        "Trainer.train_step",
        "features[part]",
        "features[:len(part)]",
        file="notebooks/training.py",
    ),
    Mutant(
        "samples are compared across photos",
        "SelfCritical.draw",
        "rewards.mean(1, keepdims=True)",
        "rewards.mean()",
        file="notebooks/training.py",
    ),
    Mutant(
        "dropout differs in a resumed run",
        "Trainer.train_step",
        "self.settings.seed * 1_000_003 + number",
        "self.settings.seed * 1_000_003 + int(sums['seconds'] * 1e9)",
        file="notebooks/training.py",
    ),
    Mutant(
        "CIDEr-D takes five references for granted",
        "CiderD._score",
        "10 / 4 * total / len(references)",
        "10 / 4 * total / 5",
    ),
    Mutant(
        "the longer of two close references counts",
        "_bleu_row",
        "abs(n - totals[0]), n",
        "abs(n - totals[0]), -n",
    ),
    Mutant(
        "what another edition was built on is taken",
        "Run.read",
        "a.manifest['reads'].get(b.stage, b.manifest['edition']) != b.manifest['edition']",
        "a.manifest['reads'].get(b.stage, b.manifest['edition']) == ''",
    ),
]


def fast_tests(changed: dict[str, str]) -> tuple[bool, float, str]:
    """Run the fast tests on a copy in which files {path: text} are changed.

    Returns whether they passed, the seconds, and the failures.
    """
    tests = ["tests", "-m", "fast", "-x", "-q", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        copy, began = Path(folder) / "project", time.monotonic()
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "outputs", "__pycache__"))
        for name, text in changed.items():
            (copy / name).write_text(text, encoding="utf-8")
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *tests],
            cwd=copy,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    lines = run.stdout.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    return run.returncode == 0, time.monotonic() - began, " ".join(failures)[:150]


def main() -> None:
    planted = [{mutant.file: mutant.plant()} for mutant in MUTANTS]
    well, seconds, last = fast_tests({})
    print(f"without a bug: {last} ({seconds:.0f} s with the copy)", flush=True)
    if not well:
        sys.exit("The fast tests fail without a bug.")
    caught = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, (passed, seconds, last) in zip(
            MUTANTS, pool.map(fast_tests, planted), strict=True
        ):
            caught += not passed
            print(
                f"{'MISSED' if passed else 'caught'} after {seconds:.0f} s: {mutant.name}: {last}",
                flush=True,
            )
    print(f"caught {caught} of {len(MUTANTS)}")
    sys.exit(caught < ENOUGH)


if __name__ == "__main__":
    main()
