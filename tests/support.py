"""Run stages in tests as their notebooks do, or the notebooks themselves."""

import multiprocessing
import shutil
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import nbformat

import storyteller_utils as st

ROOT = Path(__file__).resolve().parents[1]
# Processes that begin with torch imported, which takes longer than what most of them do.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["IPython", "matplotlib.figure", "nbformat", "nltk", "pandas", "torch", "torch._dynamo"]
)
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@cache
def _cells(stage: str) -> list[str]:
    """Return the code of a notebook's cells; the first has the parameters."""
    notebook = nbformat.read(ROOT / f"notebooks/{stage}.ipynb", as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def parameters(stage: str, **changes) -> dict:
    """Return a stage's parameters as its notebook's cell has them, but for `changes`."""
    values: dict = {}
    exec(_cells(stage)[0], values)
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


def run_notebook(folder, stage, **parameters):
    """Run a stage's notebook in a copied project, in a kernel of its own."""
    import papermill  # here, as few need it

    notebook = str(folder / f"notebooks/{stage}.ipynb")
    options = {"progress_bar": False, "execution_timeout": 600, "cwd": str(folder)}
    papermill.execute_notebook(notebook, notebook, parameters, **options)


def run_cells(stage, **changes):
    """Do what a notebook's cells do, in the working folder; it takes no kernel and no worker.

    What the cells would show is made, but not rendered.
    """
    variables = parameters(stage, **changes) | {"display": lambda shown: None}
    with patch.object(sys, "path", [*sys.path]), patch.object(st.Run, "launch", _work):
        for cell in _cells(stage)[1:]:
            exec(cell, variables)


def _work(run, command):
    import extraction  # here, as few need them
    import training

    if command == "extract":
        extraction.extract_worker(run.job())
    else:
        training.Trainer(run.job()).run()
