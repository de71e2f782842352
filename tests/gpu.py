"""Check what only a CUDA GPU can show: what `make gpu` does, in about 8 minutes at most.

It runs the tests that need a GPU; 01, 03 (original and best; float32, bfloat16, and float16 with
GradScaler as on a T4; stopped and resumed; two processes on one GPU) and 04 on 1,000 drawn photos,
beside the CPU's numbers; and a part of the benchmarks. The report is outputs/gpu/report.md. With
--cpu, the steps run on the CPU in float16, on few photos, to check the script itself.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
import torch  # noqa: E402

import storyteller_utils as st  # noqa: E402
from sample import draw_dataset  # noqa: E402

LIMIT = 480  # seconds; steps that would begin in the last minute are left out, as reported
EXTRACT, VOCAB, TRAIN, EVALUATE, _ = st.STAGES
LITE = {"backbone": "efficientnet_lite0"}  # its weights come from a package


@dataclass(frozen=True)
class Step:
    """Stages to run with these parameters; `cpu`: on the CPU, for comparison."""

    name: str
    stages: dict[str, dict] = field(default_factory=dict)
    cpu: bool = False


def steps(usual: dict, cpu: bool) -> list[Step]:
    """List the steps, the most important first, with `usual` parameters of 03.

    cpu  without a GPU: only float16, which is what differs there
    """
    original = {"batch_size": 32, **usual}
    best = {"recipe": "best", "self_critical": 1, **original}
    precisions = ["float16"] if cpu else ["float16", "bfloat16", "float32"]
    compared = [] if cpu else [original | {"precision": "float32"}]
    return [
        Step("features and vocabulary", {EXTRACT: LITE | {"regions": 49}, VOCAB: {"min_count": 2}}),
        *(
            Step(f"original, {precision}", {TRAIN: original | {"precision": precision}})
            for precision in precisions
        ),
        *(Step("original, float32, CPU", {TRAIN: parameters}, cpu=True) for parameters in compared),
        Step(
            "original, two processes on one GPU",
            {TRAIN: original | {"precision": "float16", "torchrun": "--nproc-per-node=2"}},
        ),
        Step("best, float16, stopped", {TRAIN: best | {"precision": "float16", "max_hours": 1e-6}}),
        Step("best, float16, resumed", {TRAIN: best | {"precision": "float16"}}),
        Step("evaluation", {EVALUATE: {}}),
    ]


def run_stage(folder: Path, stage: str, parameters: dict, cpu: bool) -> None:
    """Run a notebook by papermill in `folder`; SystemExit with the end of its log if it fails."""
    given = {"dataset_dir": "dataset", **parameters}
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    notebook = str(ROOT / f"notebooks/{stage}.ipynb")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "papermill", notebook, f"{stage}.ipynb"),
            *("--log-output", "--no-progress-bar", *words),
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{stage} failed:\n{done.stderr[-4000:]}")


def last_epoch(folder: Path) -> list[str]:
    """Return epochs, losses, CIDEr-D and captions a second of 03's last epoch, if there is one."""
    path = folder / "outputs" / TRAIN / "history.csv"
    if not path.is_file():
        return [""] * 5
    line = st.read_table(path).iloc[-1]
    names = ("epoch", "train_loss", "val_loss", "val_cider", "captions_per_second")
    return [str(line[name]) for name in names]


def run_steps(folder: Path, listed: list[Step], began: float) -> list[list[str]]:
    """Run the listed steps. Returns rows of the report's table."""
    rows = []
    for step in listed:
        if time.monotonic() - began > LIMIT - 60:
            rows.append([step.name, "left out: no time", *[""] * 5])
            continue
        started = time.monotonic()
        if TRAIN in step.stages and "resumed" not in step.name:
            shutil.rmtree(folder / "outputs" / TRAIN, ignore_errors=True)
        for stage, parameters in step.stages.items():
            run_stage(folder, stage, parameters, step.cpu)
        numbers = last_epoch(folder) if TRAIN in step.stages else [""] * 5
        rows.append([step.name, f"{time.monotonic() - started:.0f}", *numbers])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def command_output(*command: str, seconds: float) -> str:
    """Run a command of the project for at most `seconds`. Returns the end of what it printed."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return (done.stdout + done.stderr)[-6000:]


def report(card: str, rows: list[list[str]], extra: dict[str, str]) -> str:
    """Write the report as Markdown."""
    heads = [
        "step",
        "seconds",
        "epoch",
        "training loss",
        "validation loss",
        "CIDEr-D",
        "captions/s",
    ]
    lines = [f"# {card}, torch {torch.__version__}", "", f"| {' | '.join(heads)} |"]
    lines.append("|---" * len(heads) + "|")
    lines += [f"| {' | '.join(row)} |" for row in rows]
    for title, text in extra.items():
        lines += ["", f"## {title}", "", "```", text.strip(), "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="in float16 on the CPU, smaller")
    parser.add_argument("--photos", type=int, default=0, help="default: 1,000, with --cpu 20")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.cpu:
        sys.exit("There is no CUDA GPU here. With --cpu the steps run in float16 on the CPU.")
    began, out = time.monotonic(), Path("outputs/gpu").resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    photos = arguments.photos or (20 if arguments.cpu else 1000)
    draw_dataset(out / "dataset", photos=photos)
    card = "CPU" if arguments.cpu else torch.cuda.get_device_name()
    # Without hardware for it, float16 runs at 8 captions a second.
    usual = {"epochs": 1, "max_caption_length": 5} if arguments.cpu else {"epochs": 6}
    rows = run_steps(out, steps(usual, arguments.cpu), began)
    extra = {}
    if not arguments.cpu:
        tests = ("-m", "pytest", "tests/test_gpu.py", "-q", "-rs")
        extra["Tests that need a GPU"] = command_output(*tests, seconds=120)
        remaining = max(30, LIMIT - (time.monotonic() - began))
        bench = ("tests/bench/bench.py", "--only", "training", "beam", "attention")
        extra["Benchmarks"] = command_output(*bench, seconds=remaining)
    (out / "report.md").write_text(report(card, rows, extra), encoding="utf-8")
    shutil.rmtree(out / "dataset")
    print(f"{out / 'report.md'} holds the report ({time.monotonic() - began:.0f} s).")


if __name__ == "__main__":
    main()
