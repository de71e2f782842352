"""Compare each step with published notebooks, on this machine and the same data: `make bench`.

    python tests/bench/bench.py [--only NAME ...] [--quick]

Prints one table, writes outputs/bench/bench.json and bench.png, exits 1 when a target is missed.
README.md says what is measured and how. A result that differs from the baseline's is an error, not
a missed target.
"""

import argparse
import functools
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Before torch, as `Run.launch` sets it for its workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "notebooks"),
    str(ROOT / "tests"),
    str(Path(__file__).resolve().parent),
]

import baselines  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from material import (  # noqa: E402
    DEVICE,
    DTYPE,
    REASON,
    VOCABULARY,
    Material,
    random_captioner,
    random_captions,
)

import storyteller_utils as st  # noqa: E402
from extraction import read_photos  # noqa: E402
from support import parameters  # noqa: E402

FLICKR_PHOTOS = 31_783
FLICKR_TRAINED = 25_426  # of them to train on
FLICKR_TESTED = 3_179
HALF = torch.float32 != DTYPE
# Beam search as published notebooks do it.
PLAIN = {"length_preference": 0.7, "no_repeat": 0}


@dataclass(frozen=True)
class Sizes:
    """How much work each side does in a round: the slower side does less."""

    rounds: int = 5
    photos: int = 128  # drawn
    extracted: int = 160
    plain_extracted: int = 96
    batches: int = 16  # of 64 captions
    plain_batches: int = 2
    captioned: int = 64
    plain_captioned: int = 8
    scored: int = 1000
    memory: tuple[int, int] = (200, 2000)
    growth: tuple[int, ...] = (1, 4, 16)
    # At 1x: photos, batches, photos captioned, photos scored.
    base: tuple[int, int, int, int] = (32, 4, 64, 250)


QUICK = Sizes(1, 4, 4, 4, 1, 1, 2, 1, 8, (2, 4), (1, 2), (2, 1, 1, 4))

# Measuring


def seconds(call) -> float:
    began = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interleave(rounds: int, *calls, warm_up: int | None = None) -> list[float]:
    """Run all calls (or the first `warm_up`) once untimed, then all in turn, round after round.

    Returns the median seconds of each.
    """
    for call in calls[:warm_up]:
        call()
    return [
        statistics.median(times)
        for times in zip(*([seconds(call) for call in calls] for _ in range(rounds)), strict=True)
    ]


def row(name: str, unit: str, ours: float, baseline=None, limit=None, target: str = "") -> dict:
    """Make a row of the table.

    `target` is a condition on its fields. Whatever the unit, a ratio above 1 is faster.
    """
    times = (lambda a, b: a / b) if unit.endswith("/s") else (lambda a, b: b / a)
    return {
        "name": name,
        "ours": ours,
        "baseline": baseline,
        "limit": limit,
        "unit": unit,
        "ratio": times(ours, baseline) if baseline else None,
        "of_limit": times(ours, limit) if limit else None,
        "target": target,
    }


def met(one: dict) -> bool:
    return not one["target"] or eval(one["target"], {}, one)


def growth(
    name: str,
    unit: str,
    work,
    base: int,
    sizes: Sizes,
    flickr: int,
    plain: float,
    most: float = 1.15,
) -> list[dict]:
    """Time `work(n)` at 1x, 4x and 16x of `base`, and predict the time for Flickr30k.

    flickr  how many units Flickr30k has
    plain   the baseline's seconds per unit
    most    what a unit at 16x may cost, in units at 1x
    """
    counts = [base * times for times in sizes.growth]
    took = interleave(
        min(sizes.rounds, 3), *[functools.partial(work, count) for count in counts], warm_up=1
    )
    each = [1000 * s / count for s, count in zip(took, counts, strict=True)]
    grown = [
        row(
            f"{name}, {times}x the work",
            f"ms/{unit}",
            one,
            each[0],
            target=f"ratio >= {1 / most:.2f}",
        )
        for times, one in zip(sizes.growth[1:], each[1:], strict=True)
    ]
    return [
        *grown,
        row(f"{name}, Flickr30k (predicted)", "min", each[-1] * flickr / 60e3, plain * flickr / 60),
    ]


def products(shapes: list[tuple[int, int, int]], dtype: torch.dtype, gradients: bool = False):
    """Return a call of matrix products (rows, inner, columns), with both gradients if asked."""
    most, widths = max(rows for rows, _, _ in shapes), {n for shape in shapes for n in shape[1:]}
    left = {n: torch.randn(most, n, dtype=dtype, device=DEVICE) for n in widths}
    weights = {
        shape[1:]: torch.randn(*shape[:0:-1], dtype=dtype, device=DEVICE) for shape in shapes
    }

    def call():
        for rows, inner, columns in shapes:
            x, weight = left[inner][:rows], weights[inner, columns]
            torch.nn.functional.linear(x, weight)
            if gradients:
                passed = left[columns][:rows]
                passed @ weight, passed.T @ x

    return call


def same(what: str, ok) -> None:
    if not ok:
        raise AssertionError(f"{what}: the result differs from the baseline's")


def fresh_process(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'notebooks'}"},
    ).stdout


# Comparisons: each yields rows


def extraction(m: Material, s: Sizes):
    """Photos to features: decoding, resizing, ResNet50."""
    how, network = baselines.transform(), baselines.resnet50(m.weights).to(DEVICE)
    backbone = st.load_backbone("resnet50", m.weights).prepare(DEVICE, DTYPE)
    ready = torch.stack(
        [st.preprocess(st.open_photo(path)) for path in m.some(min(32, s.extracted))]
    )

    def ours(count):  # what 01 does between its files
        paths = m.some(count)
        batches = read_photos(paths[i : i + 32] for i in range(0, count, 32))
        return torch.cat([backbone(photos, 1).half().cpu() for photos, _ in batches])[:, 0].float()

    def theirs():
        return baselines.extract(network, m.some(s.plain_extracted), DEVICE, how)

    plain = theirs()
    rows = torch.from_numpy(np.stack([plain[str(path)] for path in m.some(len(plain))]))
    alike = torch.cosine_similarity(ours(len(plain)), rows)
    same(f"features, cosine {alike.min():.5f}", alike.min() >= 0.999)
    took = interleave(
        s.rounds,
        lambda: ours(s.extracted),
        theirs,
        lambda: [backbone(ready, 1) for _ in range(0, s.extracted, len(ready))],
    )
    yield row(
        "feature extraction",
        "photos/s",
        s.extracted / took[0],
        s.plain_extracted / took[1],
        s.extracted / took[2],
        f"ratio >= {3 if HALF else 1.5} and of_limit >= 0.9",
    )
    yield from growth(
        "feature extraction",
        "photo",
        ours,
        s.base[0],
        s,
        FLICKR_PHOTOS,
        took[1] / s.plain_extracted,
    )


def decoding(m: Material, s: Sizes):
    """One core: a JPEG file to what the network takes."""
    photos, squash = (
        baselines.Photos(m.photos, baselines.transform()),
        baselines.transforms.Resize((224, 224)),
    )
    files = [path.read_bytes() for path in m.photos]

    def ours(count):
        return [st.preprocess(st.open_photo(path)) for path in m.some(count)]

    levels = [
        np.asarray(squash(baselines.Image.open(path).convert("RGB"))).astype(int)
        for path in m.photos
    ]
    apart = np.mean(
        [
            np.abs(a.permute(1, 2, 0).numpy() - b).mean()
            for a, b in zip(ours(len(levels)), levels, strict=True)
        ]
    )
    same(f"pixels, {apart:.2f} levels apart", apart <= 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    took = interleave(
        s.rounds,
        lambda: ours(len(files)),
        lambda: [photos[i] for i in range(len(files))],
        lambda: [baselines.Image.open(io.BytesIO(data)).load() for data in files],
    )
    yield row(
        "decode + resize, one core", "photos/s", *(len(files) / one for one in took), "ratio >= 1.2"
    )
    yield from growth(
        "decode + resize", "photo", ours, s.base[0], s, FLICKR_PHOTOS, took[1] / len(files)
    )
    torch.set_num_threads(threads)


def check_losses(model, pairs, batch, exact, trainer) -> None:
    """Compare the loss of both trainers on a batch with the baseline's on the same captions."""
    with torch.no_grad():
        features, ids = (
            torch.stack(part).to(DEVICE) for part in zip(*(pairs[i] for i in batch), strict=True)
        )
        loss = float(baselines.loss(model, features, ids))
    for one, within in ((exact, 1e-5), (trainer, 0.01 if HALF else 1e-5)):
        examples = one.objective.draw(batch, batch, 1.0)
        with torch.no_grad(), one.autocast():
            likelihood = one.captioner(examples.features, examples.words)[1]
        own = float(likelihood) / examples.tokens
        same(f"loss {own:.6f}, not {loss:.6f}", abs(own - loss) <= within * loss)


def training_products(data, batch) -> list[tuple[int, int, int]]:
    """List the matrix products that a batch of 64 captions needs at least."""
    tokens, longest = int(data.lengths[batch].sum()) - 64, int(data.lengths[batch].max()) - 1
    once = [(64, 2048, 512), (tokens, 256, 2048), (tokens, 512, VOCABULARY)]
    return once + [(64, 512, 2048)] * longest


def training(m: Material, s: Sizes):
    """The original's model: batches, forward, backward, clipping, Adam."""
    photos = 2 + math.ceil(64 * max(s.batches, s.base[1] * s.growth[-1]) / 5)
    trainer, exact = (
        m.trainer(str(DTYPE).removeprefix("torch."), photos),
        m.trainer("float32", photos),
    )
    data, model = trainer.batches["train"], baselines.Pooled(2048, VOCABULARY).to(DEVICE)
    exact.captioner.load_state_dict(trainer.captioner.state_dict())
    model.load_state_dict(trainer.captioner.decoder.state_dict())
    standard = dict(
        enumerate(trainer.captioner.standardise(trainer.features[np.arange(photos)])[:, 0].cpu())
    )
    pairs = baselines.Pairs(
        standard, data.rows, [part.tolist() for part in np.split(data.flat, data.starts[1:-1])]
    )
    loader, optimizer = (
        baselines.DataLoader(pairs, 64, shuffle=True),
        torch.optim.Adam(model.parameters(), 0.001),
    )
    batches = sorted(
        (b for b in data.epoch(13, 0) if len(b) == 64), key=lambda b: data.lengths[b].sum()
    )

    def some(count):  # short and long ones in proportion
        return [batches[int(i)] for i in (np.arange(count) + 0.5) * len(batches) / count]

    def ours(count):
        for step, batch in enumerate(some(count)):
            trainer.train_step(batch, step)

    def theirs():
        for _, (features, ids) in zip(range(s.plain_batches), loader, strict=False):
            baselines.train_step(model, optimizer, features.to(DEVICE), ids.to(DEVICE))

    check_losses(model, pairs, some(1)[0], exact, trainer)
    shapes = [shape for batch in some(s.batches) for shape in training_products(data, batch)]
    took = interleave(
        s.rounds, lambda: ours(s.batches), theirs, products(shapes, DTYPE, gradients=True)
    )
    yield row(
        "training, the original's model",
        "captions/s",
        *(
            64 * n / one
            for n, one in zip((s.batches, s.plain_batches, s.batches), took, strict=True)
        ),
        f"ratio >= {5.5 if HALF else 4}",
    )
    yield from growth(
        "training",
        "batch",
        ours,
        s.base[1],
        s,
        15 * FLICKR_TRAINED * 5 // 64,
        took[1] / s.plain_batches,
    )


def search(s: Sizes, name: str, decoder: str, width: int, plain_search, target: str):
    """Compare searches on ready features: ours in batches, theirs photo by photo, same weights."""
    captioner = random_captioner(decoder, 2048)
    pooled, plain = captioner.decoder.pooled, baselines.Attention(captioner.decoder)
    if pooled:
        plain = baselines.Pooled(2048, VOCABULARY).to(DEVICE)
        plain.load_state_dict(captioner.decoder.state_dict())
    count = s.captioned * 5 // width
    most = max(count, s.base[2] * s.growth[-1] if pooled else 0)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(s.captioned, 1 if pooled else 49, 2048, generator=generator).to(DEVICE)
    rows = np.arange(most) % s.captioned

    decoding = st.Decoding(beam_width=width, min_length=0, **PLAIN)

    def ours(count):
        return [found[0].ids for found in st.generate(captioner, features, rows[:count], decoding)]

    def theirs():
        return [
            plain_search(plain, one.mean(1) if pooled else one)
            for one in features[: s.plain_captioned].split(1)
        ]

    same(f"{name}, captions", ours(s.captioned)[: s.plain_captioned] == theirs())
    limit = products(step_shapes(captioner, features[rows[:count]], width), torch.float32)
    took = interleave(s.rounds, lambda: ours(count), theirs, limit)
    yield row(
        name, "photos/s", count / took[0], s.plain_captioned / took[1], count / took[2], target
    )
    if pooled:
        yield from growth(
            name, "photo", ours, s.base[2], s, FLICKR_TESTED, took[1] / s.plain_captioned
        )


def step_shapes(
    captioner: st.Captioner, features: torch.Tensor, width: int
) -> list[tuple[int, int, int]]:
    """List the matrix products (the LSTM's, the output's) that searching these photos takes."""
    rows, step, d = [], captioner.step, captioner.decoder
    captioner.step = lambda words, state: rows.append(len(words)) or step(words, state)
    st.beam_search(captioner, features, st.Decoding(beam_width=width, min_length=0, **PLAIN))
    del captioner.step
    once = ("encoder", "begin", "key", "embedding", "output")
    weights = [
        d.output.weight,
        *(p for name, p in d.named_parameters() if p.ndim == 2 and not name.startswith(once)),
    ]
    return [(count, *weight.shape[::-1]) for count in rows for weight in weights]


def beam(m: Material, s: Sizes):
    """Beam search of width 5, the original's model."""
    return search(s, "beam search, width 5", "lstm", 5, baselines.beam_search, "ratio >= 20")


def attention(m: Material, s: Sizes):
    """Beam search of width 5, the decoder that attends to the grid."""
    return search(
        s, "beam search, width 5, attention", "attention", 5, baselines.beam_search, "ratio >= 8"
    )


def greedy(m: Material, s: Sizes):
    """Greedy search, the original's model."""
    return search(s, "greedy search", "lstm", 1, baselines.greedy, "ratio >= 15")


def photo(m: Material, s: Sizes):
    """One photo, from its file to its caption, after loading."""
    lite0 = baselines.efficientnet_lite0(), baselines.transform((127 / 255,) * 3, (128 / 255,) * 3)
    yield one_photo(
        m,
        s,
        "resnet50",
        m.weights,
        baselines.resnet50(m.weights),
        baselines.transform(),
        150,
        0.999,
    )
    # In bfloat16, EfficientNet-Lite0 is 0.993 of itself in float32 on drawings, 0.999 on photos.
    yield one_photo(m, s, "efficientnet_lite0", "", *lite0, 80, 0.99)


def command(m: Material, s: Sizes):
    """The caption command, from files to rows, against its backbone and search on ready photos."""
    sys.path.append(str(ROOT / "space"))
    import caption

    storyteller = st.Storyteller.from_pretrained(m.storyteller("efficientnet_lite0", ""), DEVICE)
    paths = m.some(2 * s.captioned)
    ready = torch.stack([storyteller.load(path) for path in paths])  # (N, 3, S, S)
    rows = caption.JsonLines(m.folder / "captions.jsonl")

    def ours():
        rows.begin()
        photos = (caption.Photo(path.name, path) for path in paths)
        for pairs in caption.caption_photos(photos, [storyteller], {}):
            rows.write(pairs)
        rows.finish()
        rows.path.unlink()

    def theirs():
        for part in ready.split(64):
            storyteller.caption_features(storyteller.extract(part), attention=False)

    took = interleave(s.rounds, ours, theirs)
    speeds = (len(paths) / seconds for seconds in took)
    yield row("caption command", "photos/s", *speeds, target="ratio >= 0.9")


def one_photo(
    m: Material, s: Sizes, backbone: str, weights: str, network, how, most: int, least: float
) -> dict:
    storyteller, network = (
        st.Storyteller.from_pretrained(m.storyteller(backbone, weights), DEVICE),
        network.to(DEVICE),
    )
    path, ready = m.photos[0], st.preprocess(st.open_photo(m.photos[0]))[None]
    plain = baselines.Pooled(storyteller.backbone.width, VOCABULARY).to(DEVICE)
    plain.load_state_dict(storyteller.captioner.decoder.state_dict())

    @torch.no_grad()
    def features():
        return network(how(baselines.Image.open(path).convert("RGB"))[None].to(DEVICE))

    def caption(features):
        return storyteller.vocab.decode(
            baselines.beam_search(plain, storyteller.captioner.standardise(features))
        )

    own = storyteller.extract([path])[:, 0]
    alike = float(torch.cosine_similarity(own, features()))
    same(f"features of {backbone}, cosine {alike:.5f}", alike >= least)
    same(f"caption on {backbone}", storyteller.caption(path, **PLAIN)[0].words == caption(own))
    took = interleave(
        2 * s.rounds + 1,
        lambda: storyteller.caption(path, **PLAIN),
        lambda: caption(features()),
        lambda: storyteller.backbone(ready, 1),
    )
    return row(f"one photo, {backbone}", "ms", *(1000 * one for one in took), f"ours <= {most}")


def cider(m: Material, s: Sizes):
    """CIDEr-D, with five references a photo."""
    from pycocoevalcap.cider.cider import Cider

    most = max(s.scored, s.base[3] * s.growth[-1])
    drawn = random_captions(6 * most, 1)
    references = [drawn[6 * i : 6 * i + 5] for i in range(most)]
    captions = [group[0][:6] + drawn[6 * i + 5][:6] for i, group in enumerate(references)]

    def theirs():
        texts = {
            i: [" ".join(words) for words in group]
            for i, group in enumerate(references[: s.scored])
        }
        return Cider().compute_score(
            texts, {i: [" ".join(words)] for i, words in enumerate(captions[: s.scored])}
        )[1]

    def ours(count):
        return st.CiderD(references[:count]).score(captions[:count])

    same("CIDEr-D", np.abs(ours(s.scored) - theirs()).max() <= 1e-6)
    took = interleave(s.rounds, lambda: ours(s.scored), theirs)
    yield row(
        f"CIDEr-D of {s.scored:,} x 5", "ms", *(1000 * one for one in took), target="ratio >= 3"
    )
    # The n-grams of more photos fit into no cache: each look-up of one takes longer.
    plain = took[1] / s.scored
    yield from growth("CIDEr-D", "photo", ours, s.base[3], s, FLICKR_TESTED, plain, most=1.6)


def start(m: Material, s: Sizes):
    """A fresh process up to its first caption."""
    code = (
        "import sys, time\n"
        "t = [time.perf_counter()]\n"
        "mark = lambda: t.append(time.perf_counter())\n"
        "import torch, numpy; mark()\nimport storyteller_utils as st; mark()\n"
        "st.Storyteller.from_pretrained(sys.argv[1]).caption(sys.argv[2]); mark()\nprint(*t)"
    )
    arguments = str(m.storyteller("resnet50", m.weights)), str(m.photos[0])
    marks = [
        np.diff([float(mark) for mark in fresh_process(code, *arguments).split()])
        for _ in range(s.rounds)
    ]
    bare, own, caption = np.median(marks, axis=0).tolist()
    yield row("import of the module", "s", bare + own, limit=bare, target="ours - limit <= 0.3")
    total = bare + own + caption
    yield row("first caption of a process", "s", total, limit=bare, target="ours - limit <= 4")


def memory(m: Material, s: Sizes):
    """Extraction's peak memory, each in a fresh process.

    It does not grow with the number of photos.
    """
    # Not ru_maxrss: a process inherits it from the one that started it.
    code = (
        "import extraction, json, sys\n"
        "extraction.extract_worker(json.loads(sys.argv[1]))\n"
        "status = open('/proc/self/status')\n"
        "print(next(line.split()[1] for line in status if line.startswith('VmHWM')))"
    )
    peaks, settings = [], parameters("01_extract_features", backbone="efficientnet_lite0")
    for count in s.memory:
        folder = m.folder / f"{count} photos"
        folder.mkdir()
        for i, path in enumerate(m.some(count)):
            os.link(path, folder / f"{i}.jpg")
        (folder / "captions.txt").write_text("image,caption\n0.jpg,a photo\n")
        job = {
            "settings": settings,
            "out": str(m.folder / f"{count} features"),
            "dataset": str(folder),
        }
        peaks.append(int(fresh_process(code, json.dumps(job)).split()[-1]) / 1024)
    yield row(
        f"extraction's memory, {s.memory[1]:,} photos against {s.memory[0]:,}",
        "MiB",
        *peaks[::-1],
        target="ratio >= 0.9",
    )


COMPARISONS = {
    one.__name__: one
    for one in (
        extraction,
        decoding,
        training,
        beam,
        attention,
        greedy,
        photo,
        command,
        cider,
        start,
        memory,
    )
}

# Showing


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [
        "CPU"
    ]
    gpu = f", {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else ""
    load = os.getloadavg()[0]
    return f"{len(names)} x {names[0]}{gpu}, torch {torch.__version__}, {REASON}, load {load:.1f}"


def table(rows: list[dict]) -> str:
    def number(value, after=""):
        return (
            ""
            if value is None
            else f"{value:,.0f}{after}"
            if value >= 100
            else f"{value:.3g}{after}"
        )

    lines = [
        "| step | ours | notebooks | faster | limit | of it | target | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [
            r["name"],
            f"{number(r['ours'])} {r['unit']}",
            number(r["baseline"]),
            number(r["ratio"], "x"),
            number(r["limit"]),
            number(r["of_limit"]),
            r["target"],
            "" if met(r) else "**missed**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def chart(rows: list[dict]):
    """Draw how many times faster each step is. Returns a matplotlib Figure."""
    from matplotlib.figure import Figure

    shown = [
        r for r in rows[::-1] if r["baseline"] and not re.search("work|memory|Flickr", r["name"])
    ]
    figure = Figure(figsize=(8, 1 + 0.35 * len(shown)), layout="constrained")
    axis, colours = figure.subplots(), ["#55a868" if met(r) else "#c44e52" for r in shown]
    bars = axis.barh([r["name"] for r in shown], [r["ratio"] for r in shown], color=colours)
    axis.bar_label(bars, [f"{r['ratio']:.1f}x" for r in shown], padding=3)
    axis.axvline(1, color="#888888", linewidth=1)  # the notebooks themselves
    axis.set(
        xscale="log",
        xlabel="times as fast as published notebooks, on this machine (red: target missed)",
    )
    axis.set_xticks(ticks := [1, 2, 5, 10, 20, 50], ticks)
    axis.xaxis.minorticks_off()
    axis.margins(x=0.15)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=COMPARISONS,
        default=list(COMPARISONS),
        metavar="NAME",
        help=", ".join(COMPARISONS),
    )
    parser.add_argument(
        "--quick", action="store_true", help="a little of everything, to see that it runs"
    )
    arguments = parser.parse_args()
    out, sizes, rows, began = (
        st.OUTPUTS / "bench",
        QUICK if arguments.quick else Sizes(),
        [],
        time.time(),
    )
    with tempfile.TemporaryDirectory() as folder:
        material = Material(Path(folder), sizes.photos)
        for name in arguments.only:
            print(
                f"[{time.time() - began:3.0f} s] {name}: {COMPARISONS[name].__doc__}",
                file=sys.stderr,
                flush=True,
            )
            rows += COMPARISONS[name](material, sizes)
    out.mkdir(parents=True, exist_ok=True)
    st.write_json(out / "bench.json", rows)
    st.save_figure(chart(rows), out / "bench.png")
    print(f"{machine()}, {time.time() - began:.0f} s\n\n{table(rows)}")
    sys.exit(not all(map(met, rows)))


if __name__ == "__main__":
    main()
