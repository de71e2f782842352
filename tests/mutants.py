"""Plant one bug of one line at a time and see that the fast tests catch it: what `make mutants` does.

Ends with "caught N of 20"; exit 1 below 19. Two at a time, each in a copy of the project, with the tests marked `fast`.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENOUGH = 19
# What a reader would call it, the line's own text (which occurs once in the module), and what it becomes.
MUTANTS = [
    ("captions score as if a word longer", "ended / length**length_preference], 1)", "ended / (length + 1)**length_preference], 1)"),
    ("a photo is done at its first caption", "done = (pool_scores[:, -1] >=", "done = (pool_scores[:, 0] >="),
    ("beams of other photos go on", "torch.arange(len(alive), device=parent.device)[:, None] * beams)",
     "torch.arange(len(alive), device=parent.device)[:, None] * 0)"),
    ("<unk> may be told", "masked_fill(word < 4, -torch.inf)", "masked_fill(word < 3, -torch.inf)"),
    ("the temperature is upside down", "(logits / temperature).softmax(-1)", "(logits * temperature).softmax(-1)"),
    ("padding is learned from", "real, output, kind = words[:, 1:] != PAD,", "real, output, kind = words[:, 1:] >= PAD,"),
    ("label smoothing pushes the wrong way", "scores -= smoothing / len(weight)", "scores += smoothing / len(weight)"),
    ("attention is shared out over photos", "[..., 0].float().softmax(-1)", "[..., 0].float().softmax(0)"),
    ("the Transformer sees the next word", "device=x.device).triu(1)", "device=x.device).triu(2)"),
    ("features are not centred", "return (features - self.mean) / self.deviation", "return features / self.deviation"),
    ("the grid is read in columns", "grid = grid.flatten(2).transpose(1, 2)", "grid = grid.transpose(2, 3).flatten(2).transpose(1, 2)"),
    ("turned photos stay turned", "image = ImageOps.exif_transpose(image)", "image = image.copy()"),
    ("some test photos are trained on", 'for split, part in (("train", train), ("val", val), ("test", test))',
     'for split, part in (("val", val), ("test", test), ("train", [*train, *test[:9]]))'),
    ("rare words are lost", "if n >= min_count)", "if n > min_count)"),
    ("each slice of a batch sees the first photos", "self._forward(self.model, features[part], words[part]",
     "self._forward(self.model, features[:len(part)], words[part]"),
    ("samples are compared across photos", "(rewards - rewards.mean(1, keepdims=True))", "(rewards - rewards.mean())"),
    ("dropout differs in a resumed run", "torch.manual_seed((self.settings.seed * 1_000_003 + step) * 64 + self.rank)",
     "torch.manual_seed((self.settings.seed * 1_000_003 + int(self.at['seconds'] * 1e9)) * 64 + self.rank)"),
    ("CIDEr-D takes five references for granted", "minlength=len(size)) / size", "minlength=len(size)) / 5"),
    ("the longer of two close references counts", "key=lambda n: (abs(n - totals[0]), n))]", "key=lambda n: (abs(n - totals[0]), -n))]"),
    ("what another edition was built on is taken", 'b.manifest["edition"]) != b.manifest["edition"]',
     'b.manifest["edition"]) == ""'),
]


def fast_tests(module: str) -> tuple[bool, float, str]:
    """Run the fast tests on this text of the module. Returns whether they passed, the seconds, and their last line."""
    with tempfile.TemporaryDirectory() as folder:
        copy, began = Path(folder) / "project", time.monotonic()
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "outputs", "__pycache__"))
        (copy / "storyteller_utils.py").write_text(module, encoding="utf-8")
        run = subprocess.run([sys.executable, "-m", "pytest", "tests", "-m", "fast", "-x", "-q", "-p", "no:cacheprovider"],
                             cwd=copy, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))] or run.stdout.splitlines()[-1:]
        return run.returncode == 0, time.monotonic() - began, " ".join(lines)[:150]


def main() -> None:
    source = (ROOT / "storyteller_utils.py").read_text(encoding="utf-8")
    for name, old, _ in MUTANTS:
        if source.count(old) != 1:
            sys.exit(f"{name}: {old!r} occurs {source.count(old)} times in the module, it must be once")
    well, seconds, last = fast_tests(source)
    print(f"without a bug: {last} ({seconds:.0f} s with the copy)", flush=True)
    if not well:
        sys.exit("The fast tests fail without a bug.")
    caught = 0
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda mutant: fast_tests(source.replace(*mutant[1:])), MUTANTS)
        for (name, *_), (passed, seconds, last) in zip(MUTANTS, runs, strict=True):
            caught += not passed
            print(f"{'MISSED' if passed else 'caught'} after {seconds:.0f} s: {name}: {last}", flush=True)
    print(f"caught {caught} of {len(MUTANTS)}")
    sys.exit(caught < ENOUGH)


if __name__ == "__main__":
    main()
