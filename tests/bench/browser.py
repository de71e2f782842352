"""Measure the static Space: how long one photo takes in a browser, and what 8 bits cost.

    python tests/bench/browser.py seconds [--photos N]
    python tests/bench/browser.py int8 FLICKR8K [--photos N]

`seconds` opens the page in Chromium, which has one core, and captions photos one after the other
with one thread, as on a host without headers: the first one, and the median of N after a round of
the examples, in which the browser compiles the runtime on the same core. `int8` captions the first
N photos of FLICKR8K/val.txt with both exports, and compares the captions with each other and, by
CIDEr-D, with people's.
"""

import argparse
import csv
import os
import shutil
import statistics
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in (".", "tests", "space", "space/browser")]

import numpy as np  # noqa: E402

import export  # noqa: E402
import publish  # noqa: E402
import storyteller_utils as st  # noqa: E402
from support import CHROMIUM_FLAGS  # noqa: E402

MODEL = ROOT / "space/model"


# One photo


def seconds_of_photos(page, count: int) -> list[list[float]]:
    """Return the seconds of captions in an open page: of each example, then of `count` photos."""
    return page.evaluate(
        """async count => {
          const m = await import('./captioner.js');
          const captioner = await m.load(new URL('model/', location.href));
          const names = captioner.examples;
          const seconds = [];
          for (let i = 0; i < names.length + count; i++) {
            const name = names[i % names.length];
            const blob = await (await fetch(`examples/${name}`)).blob();
            seconds.push((await m.caption(captioner, blob)).seconds);
          }
          return [seconds.slice(0, names.length), seconds.slice(names.length)];
        }""",
        count,
    )


def measure_seconds(count: int) -> None:
    """Print the median of the seconds that photos take in Chromium, on one core."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        space = publish.build_static_space(MODEL, Path(folder) / "static")
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # Chromium inherits it
        server = publish.make_server(space)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with sync_playwright() as driver:
            chromium = driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS
            )
            page = chromium.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            page.locator("#loading").wait_for(state="hidden")
            (first, *_), seconds = seconds_of_photos(page, count)
            chromium.close()
        server.shutdown()
        server.server_close()
    print(
        f"one photo: {statistics.median(seconds):.3f} s, the median of {count} "
        f"({min(seconds):.3f} to {max(seconds):.3f}; the very first {first:.3f}; "
        f"load {os.getloadavg()[0]:.1f})"
    )


# 8 bits


def captions_of(folder: Path, photos: list[Path], config: dict) -> list[list[str]]:
    """Caption photos with an export in `folder`, by its graphs alone; words of each."""
    captioner, about = export.OnnxCaptioner(folder), st.read_json(folder / "captioner.json")
    captions = []
    for photo in photos:
        levels = st.open_photo(photo)
        pixels = st.preprocess(levels, config["preprocessing"], about["side"])[None]
        ((best, *_),) = st.beam_search(captioner, pixels)  # one photo at a time
        captions.append([about["words"][i] for i in best.ids if i != st.END])
    return captions


def read_references(dataset: Path, names: list[str]) -> list[list[list[str]]]:
    """Return people's captions of photos as words: a list for each of `names`."""
    captions = {name: [] for name in names}
    with open(dataset / "captions.txt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["image"] in captions:
                captions[row["image"]].append(st.tokenize(row["caption"]))
    return list(captions.values())


def compare_int8(dataset: Path, count: int) -> None:
    """Print how many captions 8 bits change, and the CIDEr-D of both exports."""
    names = (dataset / "val.txt").read_text(encoding="utf-8").split()
    references = read_references(dataset, names)
    photos = [dataset / "Images" / name for name in names[:count]]
    scorer = st.CiderD(references[:count], references)
    config = st.read_json(MODEL / "config.json")
    found, sizes = {}, {}
    for precision in ("float32", "int8"):
        with tempfile.TemporaryDirectory() as folder:
            export.export(MODEL, folder, precision == "int8")
            sizes[precision] = sum(p.stat().st_size for p in Path(folder).glob("*.onnx"))
            found[precision] = captions_of(Path(folder), photos, config)
    for precision, captions in found.items():
        scores = scorer.score(captions)  # (N,)
        size = sizes[precision] / 1e6
        print(f"{precision}: CIDEr-D {scores.mean():.3f}, {size:.1f} MB of graphs")
    apart = scorer.score(found["int8"]) - scorer.score(found["float32"])  # (N,)
    rows = np.random.default_rng(0).integers(0, count, (10_000, count))
    low, high = np.quantile(apart[rows].mean(1), [0.025, 0.975])
    equal = sum(a == b for a, b in zip(*found.values(), strict=True))
    print(f"the same caption for {equal} of {count} photos")
    print(f"CIDEr-D of int8 - float32: {apart.mean():+.3f} [{low:+.3f}, {high:+.3f}]")


def main(argv: list[str] | None = None) -> None:
    """Run one of the two measurements from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    measures = parser.add_subparsers(dest="measure", required=True)
    seconds = measures.add_parser("seconds", help="of one photo in Chromium, on one core")
    seconds.add_argument("--photos", type=int, default=16)
    int8 = measures.add_parser("int8", help="its captions against those of float32")
    int8.add_argument(
        "dataset", type=Path, metavar="FLICKR8K", help="Images/, captions.txt, val.txt"
    )
    int8.add_argument("--photos", type=int, default=200)
    given = parser.parse_args(argv)
    if given.measure == "seconds":
        measure_seconds(given.photos)
    else:
        compare_int8(given.dataset, given.photos)


if __name__ == "__main__":
    main()
