"""Run all five notebooks at Flickr30k's full size and measure how long they print nothing.

31,783 small synthetic photos and 158,915 captions as long as Flickr30k's go through one epoch: what
`make rehearsal` does, in under 20 minutes on two cores. It prints a table of each stage's seconds,
longest silence, memory and disk, and exits 1 if more than 20 seconds pass without output.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in (".", "notebooks", "tests/bench")]
from material import random_captions  # noqa: E402

import storyteller_utils as st  # noqa: E402

PHOTOS, SILENCE = 31_783, 20
PARAMETERS = {
    # Small photos: what grows with their number is rehearsed, not the network.
    "01_extract_features": {"backbone": "efficientnet_lite0", "photo_size": 64, "batch_size": 256},
    "03_train_dual_t4": {"epochs": 1},
}


@dataclass
class Took:
    """What one stage cost: seconds, the longest time without output, bytes of memory and disk.

    after  the last line before the longest time without output
    """

    stage: str
    seconds: float = 0.0
    silent: float = 0.0
    after: str = ""
    memory: int = 0
    disk: int = 0

    def row(self) -> str:
        """Return the stage's row of the table."""
        gigabytes = [f"{size / 1e9:.2f}" for size in (self.memory, self.disk)]
        warning = f"**too long**, after {self.after[:60]!r}" if self.silent > SILENCE else ""
        cells = [self.stage, f"{self.seconds:.0f}", f"{self.silent:.0f}", *gigabytes, warning]
        return f"| {' | '.join(cells)} |"


def draw_dataset(folder: Path, photos: int) -> None:
    """Write a dataset in Flickr's layout: photos of 64 x 48 pixels, all different, and captions."""
    (folder / "Images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"{i:07d}.jpg" for i in range(photos)]
    for name in tqdm(names, desc="photos", unit="photo", mininterval=5):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48)).save(folder / "Images" / name, quality=80)
    captions = random_captions(5 * photos, seed=0)
    rows = [(names[i // 5], " ".join(words)) for i, words in enumerate(captions)]
    st.write_csv(folder / "captions.txt", ["image", "caption"], rows)


def watch(process: psutil.Process, out: Path, took: Took) -> None:
    """Record the peak memory of a process and its children, and the size of its results."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        memory = 0
        for each in [process, *process.children(recursive=True)]:
            try:
                memory += each.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        took.memory = max(took.memory, memory)
        sizes = (p.stat().st_size for p in out.rglob("*") if p.is_file())
        try:
            took.disk = max(took.disk, sum(sizes))
        except FileNotFoundError:  # a temporary file that has just been renamed
            continue
        time.sleep(0.5)


def run_stage(stage: str, folder: Path, dataset: Path) -> Took:
    """Run a stage's notebook by papermill in `folder`, its output passed on as it comes."""
    given = dict(PARAMETERS.get(stage, {}))
    if stage != "05_deploy":
        given["dataset_dir"] = str(dataset)
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    notebook = str(ROOT / f"notebooks/{stage}.ipynb")
    papermill = str(Path(sys.executable).with_name("papermill"))
    command = [papermill, notebook, str(folder / f"{stage}.ipynb"), *words]
    took, began = Took(stage), time.monotonic()
    process = subprocess.Popen(
        [*command, "--log-output", "--no-progress-bar", "--execution-timeout", "3600"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    watched = (psutil.Process(process.pid), folder / "outputs" / stage, took)
    threading.Thread(target=watch, args=watched, daemon=True).start()
    spoke, last = began, ""
    while chunk := os.read(process.stdout.fileno(), 65536):
        now = time.monotonic()
        if now - spoke > took.silent:
            took.silent, took.after = now - spoke, last
        said = [line for line in chunk.decode(errors="replace").splitlines() if line.strip()]
        spoke, last = now, (said or [last])[-1]
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
    if process.wait():
        sys.exit(f"{stage} ended with status {process.returncode}")
    took.seconds = time.monotonic() - began
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=PHOTOS, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("storyteller_utils.py", "space", "notebooks"):
            (folder / part).symlink_to(ROOT / part)
        draw_dataset(folder / "flickr30k", arguments.photos)
        rows = [run_stage(stage, folder, folder / "flickr30k") for stage in st.STAGES]
    print("\n| stage | seconds | longest silence, s | memory, GB | disk, GB | |")
    print("|---|---|---|---|---|---|")
    print(*(row.row() for row in rows), sep="\n")
    sys.exit(any(row.silent > SILENCE for row in rows))


if __name__ == "__main__":
    main()
