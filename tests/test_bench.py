"""The bench: every comparison runs, and every result equals the baseline's. Never how fast."""

import json
import subprocess
import sys

from conftest import ROOT

FIELDS = ["name", "ours", "baseline", "limit", "unit", "ratio", "of_limit", "target"]


def test_every_comparison_runs_and_gives_the_same_result_as_its_baseline(here):
    bench = [sys.executable, ROOT / "tests/bench/bench.py", "--quick"]
    run = subprocess.run(bench, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode in (0, 1) and "Error" not in run.stderr, run.stderr[-2000:]
    rows = json.loads((here / "outputs/bench/bench.json").read_text())
    assert all(list(row) == FIELDS for row in rows)
    names = " ".join(row["name"] for row in rows)
    for step in (
        "extraction",
        "decode",
        "training",
        "beam",
        "attention",
        "greedy",
        "resnet50",
        "lite0",
        "CIDEr-D",
        "import",
        "first caption",
        "memory",
        "Flickr30k",
    ):
        assert step in names, f"no row about {step}"
    for row in rows:
        assert row["ours"] > 0 and row["name"] in run.stdout
    assert (here / "outputs/bench/bench.png").read_bytes()[:4] == b"\x89PNG"
