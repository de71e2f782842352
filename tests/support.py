"""Run stages in tests as their notebooks do, or the notebooks themselves."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat

import storyteller_utils as st

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


PAPERMILL = [
    Path(sys.executable).with_name("papermill"),
    "--no-progress-bar",
    "--execution-timeout",
    "600",
]


@cache
def _cell(stage: str) -> str:
    notebook = nbformat.read(ROOT / f"notebooks/{stage}.ipynb", as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    return cell.source


def parameters(stage: str, **changes) -> dict:
    """Return a stage's parameters as its notebook's cell has them, but for `changes`."""
    values: dict = {}
    exec(_cell(stage), values)
    values = {name: value for name, value in values.items() if not name.startswith("__")}
    if unknown := changes.keys() - values.keys():
        raise ValueError(f"{stage} has no parameter {', '.join(sorted(unknown))}")
    return values | changes


def begin_stage(stage: str, **changes) -> st.Run:
    """Start a stage with its notebook's parameters, but for `changes`."""
    return st.start(stage, parameters(stage, **changes))


def copy_project(folder):
    """Copy what the notebooks need into an empty folder, as a user has it."""
    for name in ("notebooks", "space"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "storyteller_utils.py", folder)


def papermill(folder, stage, **parameters):
    """Run a stage's notebook in a copied project; AssertionError with the end of its log."""
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    notebook = f"notebooks/{stage}.ipynb"
    done = subprocess.run(
        [*PAPERMILL, notebook, notebook, *given], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
