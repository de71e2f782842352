"""Compare each step with how published notebooks do it, on this machine and the same data: `make bench`.

    python tests/bench/bench.py [--only NAME ...] [--quick]

Prints one table, writes outputs/bench/bench.json and bench.png, exits 1 when a target is missed. README.md says what is
measured and how. A result that differs from the baseline's is an error, not a missed target.
"""
import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as `st.launch` does for its workers
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import baselines  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import storyteller_utils as st  # noqa: E402

VOCABULARY, FLICKR_PHOTOS, FLICKR_TRAINED, FLICKR_TOLD = 7_689, 31_783, 25_426, 3_179
DEVICE = st.default_device()
DTYPE, REASON = st.precision_here(DEVICE)

@dataclass(frozen=True)
class Sizes:
    """How much work each side gets: enough for a stable rate of each, so the slower side gets less."""
    rounds: int = 5
    photos: int = 128  # drawn
    extracted: int = 256
    plain_photos: int = 96
    batches: int = 16  # of 64 captions, a round
    plain_batches: int = 2
    told: int = 64
    plain_told: int = 8
    scored: int = 1000
    memory: tuple[int, int] = (200, 2000)
    growth: tuple[int, ...] = (1, 4, 16)
    base: dict = None  # the work at 1x

FULL = Sizes(base={"photos": 32, "batches": 8, "told": 64, "scored": 250})
QUICK = Sizes(1, 4, 4, 4, 1, 1, 2, 1, 8, (2, 4), (1, 2), {"photos": 2, "batches": 1, "told": 1, "scored": 4})

# Measuring

def seconds(call) -> float:
    began = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began

def interleave(rounds: int, *calls) -> list[float]:
    """Run each call once to warm up, then all in turn, round after round. Returns the median seconds of each."""
    for call in calls:
        call()
    return [statistics.median(times) for times in zip(*([seconds(call) for call in calls] for _ in range(rounds)))]

def row(name: str, unit: str, ours: float, baseline=None, limit=None, target: str = "") -> dict:
    """Make a row of the table; `target` is a condition on its fields. Whatever the unit, a ratio above 1 is faster."""
    times = (lambda a, b: a / b) if unit.endswith("/s") else (lambda a, b: b / a)
    return {"name": name, "ours": ours, "baseline": baseline, "limit": limit, "unit": unit,
            "ratio": times(ours, baseline) if baseline else None, "of_limit": times(ours, limit) if limit else None,
            "target": target}

def met(one: dict) -> bool:
    return not one["target"] or eval(one["target"], {}, one)

def growth(name: str, unit: str, work, base: int, sizes: Sizes, flickr: int, plain_ms: float) -> list[dict]:
    """Time `work(n)` at 1x, 4x and 16x of `base`: a unit may cost at most 15 % more, and what that means for Flickr30k."""
    counts = [base * times for times in sizes.growth]
    took = interleave(min(sizes.rounds, 3), *[functools.partial(work, count) for count in counts])
    each = [1000 * s / count for s, count in zip(took, counts)]
    grown = [row(f"{name}, {times}x the work", f"ms/{unit}", one, each[0], target=f"ratio >= {1 / 1.15:.2f}")
             for times, one in zip(sizes.growth[1:], each[1:])]
    return [*grown, row(f"{name}, Flickr30k (predicted)", "min", each[-1] * flickr / 60e3, plain_ms * flickr / 60e3)]

def products(shapes: list[tuple[int, int, int]], dtype: torch.dtype, gradients: bool = False):
    """Return a call that does nothing but matrix products (rows, inner, columns), with both their gradients if wanted."""
    most, widths = max(rows for rows, _, _ in shapes), {n for shape in shapes for n in shape[1:]}
    left = {n: torch.randn(most, n, dtype=dtype, device=DEVICE) for n in widths}
    weights = {shape[1:]: torch.randn(*shape[:0:-1], dtype=dtype, device=DEVICE) for shape in shapes}

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

# Material: drawn photos, random networks, random captions

class Material:
    """What several comparisons need, each made when first asked for, below a temporary folder."""

    def __init__(self, folder: Path, sizes: Sizes):
        self.folder, self.sizes = folder, sizes

    @functools.cached_property
    def photos(self) -> list[Path]:
        drawn = st.draw_sample_dataset(self.folder / "photos", self.sizes.photos, size=(500, 375), quality=95)
        return sorted((drawn / "Images").iterdir())

    def some(self, count: int) -> list[Path]:
        return [self.photos[i % len(self.photos)] for i in range(count)]

    @functools.cached_property
    def weights(self) -> str:
        """A random ResNet50 that tells photos apart: branches of weight 1/4, as trained ones nearly are, and BatchNorm set."""
        torch.manual_seed(0)
        network = baselines.models.resnet50().train()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
            if hasattr(module, "bn3"):
                torch.nn.init.constant_(module.bn3.weight, 0.25)
        with torch.no_grad():
            network(torch.stack([baselines.Photos(self.photos, baselines.transform())[i][0] for i in range(4)]))
        torch.save(network.state_dict(), self.folder / "resnet50.pth")
        return str(self.folder / "resnet50.pth")

    def teller(self, backbone: str, weights: str = "") -> Path:
        """Save a captioner of random words on that backbone. Returns its folder."""
        loaded = st.load_backbone(backbone, weights)
        features = loaded.prepare(DEVICE, DTYPE)(st._load_batch(self.some(8), "squash")[0], 1)[:, 0]
        captioner = random_captioner("lstm", loaded.width, (features.mean(0), features.std(0) + 0.1))
        config = {
            "decoder": "lstm", "sizes": {}, "vocabulary": VOCABULARY, "backbone": backbone, "backbone_sha256": loaded.sha256,
            "regions": 1, "width": loaded.width, "preprocessing": "squash", "precision": "auto", "recipe": "original",
            "dataset": {"name": "nothing", "sample": True},
            "training": {"photos": 0, "epochs": 0, "best_epoch": 0, "val_cider": 0.0},
            "feature_mean": captioner.mean.tolist(), "feature_deviation": captioner.deviation.tolist()}
        teller = st.Storyteller(config, st.Vocab(st.SPECIAL + words()), captioner)
        teller._backbone = loaded
        teller.save_pretrained(self.folder / backbone)
        return self.folder / backbone

def words() -> list[str]:
    return [f"w{i}" for i in range(VOCABULARY - 4)]

def random_captions(count: int, seed: int) -> list[list[str]]:
    """Draw captions as long as Flickr30k's (mean 12.2 words, 5 % above 22), their words as unequally frequent as in texts."""
    rng, known = np.random.default_rng(seed), words()
    lengths = np.exp(rng.normal(2.417, 0.41, count)).round().clip(3, 48).astype(int)
    chance = 1 / (np.arange(len(known)) + 2.7)
    drawn = rng.choice(len(known), lengths.sum(), p=chance / chance.sum())
    return [[known[i] for i in part] for part in np.split(drawn, lengths.cumsum()[:-1])]

@torch.no_grad()
def random_captioner(decoder: str, width: int, moments=None) -> st.Captioner:
    """Make a captioner of random weights that ends its captions after about 12 words.

    Its first hidden unit is a clock, which makes <end> likelier from word to word; the output is scaled up, so that words
    differ in probability as a trained captioner's do.
    """
    torch.manual_seed(0)
    captioner = st.Captioner(decoder, width, VOCABULARY, moments or (torch.zeros(width), torch.ones(width))).eval()
    d, hidden = captioner.decoder, 512
    gates = {name.removesuffix("_l0"): weight for name, weight in d.lstm.named_parameters()}
    for gate, opening in enumerate((10, 10, 0.05, 10)):  # input and forget gate open: the cell grows by 0.05 a word
        for weight in gates.values():
            weight[gate * hidden] = 0
        gates["bias_ih"][gate * hidden] = opening
    first = [(d.encoder, 0)] if d.pooled else [(d.begin, 0), (d.begin, hidden), (d.join[1], 0)]
    for layer, unit in first:
        layer.weight[unit] = layer.bias[unit] = 0
    if not d.pooled:
        d.join[1].weight[0, 0] = 1
    d.output.weight.mul_(40 if d.pooled else 15)[:, 0] = 0
    d.output.weight[st.END, 0], d.output.bias[st.END] = (30, -7) if d.pooled else (40, -8)
    return captioner.requires_grad_(False).to(DEVICE)

# Comparisons: each yields rows

def extraction(m: Material):
    """Photos to features: decoding, resizing, ResNet50."""
    s, how = m.sizes, baselines.transform()
    network, backbone = baselines.resnet50(m.weights).to(DEVICE), st.load_backbone("resnet50", m.weights).prepare(DEVICE, DTYPE)
    ready = st._load_batch(m.some(32), "squash")[0]

    def ours(count):  # what `st.extract_worker` does between its files
        paths = m.some(count)
        batches = [paths[i:i + 32] for i in range(0, count, 32)]
        return torch.cat([backbone(photos, 1).half().cpu() for photos, _ in st._ahead(lambda b: st._load_batch(b, "squash"), batches)])

    plain = baselines.extract(network, m.some(s.plain_photos), DEVICE, how)
    alike = torch.cosine_similarity(ours(s.plain_photos)[:, 0].float(), torch.from_numpy(np.stack(list(plain.values()))))
    same(f"features, cosine {alike.min():.5f}", alike.min() >= 0.999)
    took = interleave(s.rounds, lambda: ours(s.extracted), lambda: baselines.extract(network, m.some(s.plain_photos), DEVICE, how),
                      lambda: [backbone(ready, 1) for _ in range(0, s.extracted, 32)])
    least = 3 if DTYPE == torch.bfloat16 else 1.5
    yield row("feature extraction", "photos/s", s.extracted / took[0], s.plain_photos / took[1],
              math.ceil(s.extracted / 32) * 32 / took[2], f"ratio >= {least} and of_limit >= 0.9")
    yield from growth("feature extraction", "photo", ours, s.base["photos"], s, FLICKR_PHOTOS, 1000 * took[1] / s.plain_photos)

def decoding(m: Material):
    """One core: a JPEG file to what the network takes."""
    from torchvision.io import ImageReadMode, decode_jpeg
    s, how, torch_threads = m.sizes, baselines.transform(), torch.get_num_threads()
    paths, squash = m.photos, baselines.transforms.Resize((224, 224))
    files = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]

    def ours(count):
        return [st.preprocess(st.open_photo(path)) for path in m.some(count)]

    levels = [np.asarray(squash(baselines.Image.open(path).convert("RGB"))) for path in paths]
    apart = np.mean([np.abs(a.permute(1, 2, 0).numpy().astype(int) - b).mean() for a, b in zip(ours(len(paths)), levels)])
    same(f"pixels, {apart:.2f} levels apart", apart <= 2)
    torch.set_num_threads(1)
    took = interleave(s.rounds, lambda: ours(len(paths)), lambda: [item for item in map(baselines.Photos(paths, how).__getitem__,
                      range(len(paths)))], lambda: [decode_jpeg(data, ImageReadMode.RGB) for data in files])
    yield row("decode + resize, one core", "photos/s", *(len(paths) / one for one in took), "ratio >= 1.8")
    yield from growth("decode + resize", "photo", ours, s.base["photos"], s, FLICKR_PHOTOS, 1000 * took[1] / len(paths))
    torch.set_num_threads(torch_threads)

def make_trainer(m: Material, precision: str, photos: int) -> st.Trainer:
    """Lay out what 01 and 02 leave, with random features and captions, and make the trainer of 03 on them."""
    folder = m.folder / "training"
    if not folder.exists():
        folder.mkdir()
        rng, names = np.random.default_rng(0), [f"{i}.jpg" for i in range(photos)]
        np.save(folder / "features.npy", rng.standard_normal((photos, 1, 2048), dtype=np.float32).astype(np.float16))
        st.write_csv(folder / "images.csv", ["row", "image"], enumerate(names))
        st.write_csv(folder / "skipped.csv", ["image", "reason"], [])
        captions = [" ".join(caption) for caption in random_captions(5 * photos, 0)]
        st.write_csv(folder / "captions.csv", ["image", "split", "caption"],
                     [(names[i // 5], "val" if i < 10 else "train", caption) for i, caption in enumerate(captions)])
        st.Vocab(st.SPECIAL + words()).save(folder / "vocab.json")
    settings = st.TrainSettings(dropout=-1, label_smoothing=-1, precision=precision)  # -1: without
    reads = dict.fromkeys(st.STAGES["03_train_dual_t4"], str(folder))
    return st.Trainer({"settings": asdict(settings), "out": str(folder), "reads": reads, "editions": {}})

def training(m: Material):
    """The original's model: batches, forward, backward, clipping, Adam."""
    s = m.sizes
    photos = 2 + math.ceil(64 * max(s.batches, s.base["batches"] * s.growth[-1]) / 5)
    trainer, exact = make_trainer(m, str(DTYPE).removeprefix("torch."), photos), make_trainer(m, "float32", photos)
    data, decoder = trainer.batches["train"], trainer.captioner.decoder
    exact.captioner.load_state_dict(trainer.captioner.state_dict())
    model = baselines.Pooled(2048, VOCABULARY).to(DEVICE)
    model.load_state_dict(decoder.state_dict())
    standard = {i: f for i, f in enumerate(trainer.captioner.standardise(trainer.features[np.arange(photos)])[:, 0].cpu())}
    captions = [part.tolist() for part in np.split(data.flat, data.starts[1:-1])]
    pairs = baselines.Pairs(standard, data.rows, captions)
    loader, optimizer = baselines.DataLoader(pairs, 64, shuffle=True), torch.optim.Adam(model.parameters(), 0.001)
    batches = sorted((batch for batch in data.epoch(13, 0) if len(batch) == 64), key=lambda batch: data.lengths[batch].sum())

    def some(count):  # short and long ones in the proportion that there is
        return [batches[int(i)] for i in (np.arange(count) + 0.5) * len(batches) / count]

    middle = some(1)[0]
    loss = baselines.F.cross_entropy(*[part.flatten(0, 1) for part in notebook_pass(model, pairs, middle)], ignore_index=st.PAD)
    for one, within in ((exact, 1e-5), (trainer, 1e-5 if DTYPE == torch.float32 else 0.01)):
        own = float(one._loss("train", middle, one.captioner, 0.0)[1]) / (data.lengths[middle].sum() - 64)
        same(f"loss {own:.6f}, not {float(loss):.6f}", abs(own - loss) <= within * loss)

    def ours(count):
        for step, batch in enumerate(some(count)):
            trainer.train_step(batch, step)

    def plain():
        for _, (features, ids) in zip(range(s.plain_batches), loader):
            baselines.train_step(model, optimizer, features.to(DEVICE), ids.to(DEVICE))

    shapes = []
    for batch in some(s.batches):
        tokens, longest = int(data.lengths[batch].sum()) - 64, int(data.lengths[batch].max()) - 1
        shapes += [(64, 2048, 512), (tokens, 256, 2048), (tokens, 512, VOCABULARY), *[(64, 512, 2048)] * longest]
    took = interleave(s.rounds, lambda: ours(s.batches), plain, products(shapes, trainer.precision, gradients=True))
    yield row("training, the original's model", "captions/s", 64 * s.batches / took[0], 64 * s.plain_batches / took[1],
              64 * s.batches / took[2], f"ratio >= {6 if DTYPE == torch.bfloat16 else 4}")
    yield from growth("15 epochs of training", "batch", ours, s.base["batches"], s, 15 * math.ceil(FLICKR_TRAINED * 5 / 64),
                      1000 * took[1] / s.plain_batches)

def notebook_pass(model, pairs, batch):
    """Run a batch through the notebooks' model. Returns logits (B, 49, V) and the words they should have told."""
    features, ids = (torch.stack(part).to(DEVICE) for part in zip(*(pairs[i] for i in batch)))
    with torch.no_grad():
        return model(features, ids[:, :-1]), ids[:, 1:]

def search(m: Material, name: str, decoder: str, width: int, plain_search, target: str):
    """Search on features that are there: ours in batches, theirs photo by photo."""
    s, captioner = m.sizes, random_captioner(decoder, 2048)
    own = captioner.decoder
    if plain := own.pooled:
        plain = baselines.Pooled(2048, VOCABULARY).to(DEVICE)
        plain.load_state_dict(own.state_dict())
    most = max(s.told, s.base["told"] * s.growth[-1] if own.pooled else 0)
    features = torch.randn(min(most, 256), 1 if own.pooled else 49, 2048, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows = np.arange(most) % len(features)

    def ours(count):
        return [found[0].ids for found in st.tell_all(captioner, features, rows[:count], beam_width=width)]

    def theirs():
        return [plain_search(plain or baselines.Attention(own), one.mean(1) if own.pooled else one)
                for one in features[:s.plain_told].split(1)]

    same(f"{name}: captions", ours(s.told)[:s.plain_told] == theirs())
    took = interleave(s.rounds, lambda: ours(s.told), theirs, products(step_shapes(captioner, features[:s.told], width), torch.float32))
    yield row(name, "photos/s", s.told / took[0], s.plain_told / took[1], s.told / took[2], target)
    if own.pooled:
        yield from growth(name, "photo", ours, s.base["told"], s, FLICKR_TOLD, 1000 * took[1] / s.plain_told)

def step_shapes(captioner: st.Captioner, features: torch.Tensor, width: int) -> list[tuple[int, int, int]]:
    """List the products with the LSTM's and the output's weights that searching these photos takes."""
    rows, step, d = [], captioner.step, captioner.decoder
    captioner.step = lambda words, state: rows.append(len(words)) or step(words, state)
    st.beam_search(captioner, features, width)
    del captioner.step
    once = ("encoder", "begin", "key", "embedding", "output")
    weights = [d.output.weight, *(p for name, p in d.named_parameters() if p.ndim == 2 and not name.startswith(once))]
    return [(count, *weight.shape[::-1]) for count in rows for weight in weights]

def beam(m: Material):
    """Beam search of width 5, the original's model."""
    yield from search(m, "beam search, width 5", "lstm", 5, baselines.beam_search, "ratio >= 20")

def attention(m: Material):
    """Beam search of width 5, the decoder that looks at the grid."""
    yield from search(m, "beam search, width 5, attention", "attention", 5, baselines.beam_search, "ratio >= 8")

def greedy(m: Material):
    """Greedy search, the original's model."""
    yield from search(m, "greedy search", "lstm", 1, baselines.greedy, "ratio >= 15")

def photo(m: Material):
    """One photo, from its file to its caption, after loading."""
    for backbone, weights, most in (("resnet50", m.weights, 150), ("efficientnet_lite0", "", 80)):
        teller = st.Storyteller.from_pretrained(m.teller(backbone, weights), DEVICE)
        levels = (127 / 255,) * 3, (128 / 255,) * 3
        how = baselines.transform(*([] if weights else levels))
        network = (baselines.resnet50(weights) if weights else baselines.efficientnet_lite0()).to(DEVICE)
        plain = baselines.Pooled(teller.backbone.width, VOCABULARY).to(DEVICE)
        plain.load_state_dict(teller.captioner.decoder.state_dict())
        path, ready = m.photos[0], st.preprocess(st.open_photo(m.photos[0]))[None]

        @torch.no_grad()
        def features():
            return network(how(baselines.Image.open(path).convert("RGB"))[None].to(DEVICE))

        def theirs(features):
            return teller.vocab.decode(baselines.beam_search(plain, teller.captioner.standardise(features)))

        own = teller.extract([path])[:, 0]
        same(f"features of {backbone}", torch.cosine_similarity(own, features()).min() >= (0.999 if weights else 0.99))
        same(f"caption on {backbone}", teller.tell(path)[0].words == theirs(own))
        took = interleave(2 * m.sizes.rounds + 1, lambda: teller.tell(path), lambda: theirs(features()),
                          lambda: teller.backbone(ready, 1))
        yield row(f"one photo, {backbone}", "ms", *(1000 * one for one in took), f"ours <= {most}")

def cider(m: Material):
    """CIDEr-D of 1,000 captions against five references each."""
    from pycocoevalcap.cider.cider import Cider
    s, most = m.sizes, max(m.sizes.scored, m.sizes.base["scored"] * m.sizes.growth[-1])
    drawn = random_captions(6 * most, 1)
    references = [drawn[6 * i:6 * i + 5] for i in range(most)]
    told = [group[0][:6] + drawn[6 * i + 5][:6] for i, group in enumerate(references)]

    def theirs():
        texts = {i: [" ".join(words) for words in group] for i, group in enumerate(references[:s.scored])}
        return Cider().compute_score(texts, {i: [" ".join(words)] for i, words in enumerate(told[:s.scored])})[1]

    def ours(count):
        return st.CiderD(references[:count]).score(told[:count])

    same("CIDEr-D", np.abs(ours(s.scored) - theirs()).max() <= 1e-6)
    took = interleave(s.rounds, lambda: ours(s.scored), theirs)
    yield row(f"CIDEr-D of {s.scored:,} x 5", "ms", *(1000 * one for one in took), target="ratio >= 3")
    yield from growth("CIDEr-D", "photo", ours, s.base["scored"], s, FLICKR_TOLD, 1000 * took[1] / s.scored)

def start(m: Material):
    """Import and load, each in a fresh process."""
    code = ("import sys, time; t = [time.perf_counter()]; mark = lambda: t.append(time.perf_counter())\n"
            "import torch, numpy; mark()\nimport storyteller_utils as st; mark()\n"
            "st.Storyteller.from_pretrained(sys.argv[1]).backbone; mark()\nprint(*t)")
    folder, marks = str(m.teller("resnet50", m.weights)), []
    for _ in range(m.sizes.rounds):
        marks.append(np.diff([float(mark) for mark in fresh_process(code, folder).split()]))
    bare, own, load = np.median(marks, axis=0).tolist()
    yield row("import of the module", "s", bare + own, limit=bare, target="ours - limit <= 0.3")
    yield row("load of a captioner", "s", load, target="ours <= 1")

def memory(m: Material):
    """Extraction's peak memory, each in a fresh process: it does not grow with the number of photos."""
    # Not ru_maxrss: a process begins with that of the one that started it.
    code = ("import json, sys\nimport storyteller_utils as st\nst.extract_worker(json.loads(sys.argv[1]))\n"
            "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])")
    peaks = []
    for count in m.sizes.memory:
        folder = m.folder / f"{count} photos"
        folder.mkdir()
        for i, path in enumerate(m.some(count)):
            os.link(path, folder / f"{i}.jpg")
        (folder / "captions.txt").write_text("image,caption\n0.jpg,a photo\n")
        settings = asdict(st.ExtractSettings(backbone="efficientnet_lite0"))
        job = {"settings": settings, "out": str(m.folder / f"{count} features"), "dataset": str(folder)}
        peaks.append(int(fresh_process(code, json.dumps(job)).split()[-1]) / 1024)
    yield row("extraction's peak memory, {1:,} photos instead of {0:,}".format(*m.sizes.memory), "MiB", peaks[1], peaks[0],
              target=f"ratio >= {1 / 1.1:.2f}")

def fresh_process(code: str, argument: str) -> str:
    return subprocess.run([sys.executable, "-c", code, argument], check=True, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout

COMPARISONS = {one.__name__: one for one in (extraction, decoding, training, beam, attention, greedy, photo, cider, start, memory)}

# Showing

def machine() -> str:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] or ["CPU"]
    gpu = f", {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else ""
    return f"{len(names)} x {names[0]}{gpu}, torch {torch.__version__}, {REASON}, load {os.getloadavg()[0]:.1f}"

def table(rows: list[dict]) -> str:
    def number(value, after=""):
        return "" if value is None else f"{value:,.0f}{after}" if value >= 100 else f"{value:.3g}{after}"
    lines = [f"| {r['name']} | {number(r['ours'])} {r['unit']} | {number(r['baseline'])} | {number(r['ratio'], 'x')} | "
             f"{number(r['limit'])} | {number(r['of_limit'])} | {r['target']} | {'' if met(r) else '**missed**'} |" for r in rows]
    return "\n".join(["| step | ours | notebooks | faster | limit | of it | target | |", "|---|---|---|---|---|---|---|---|", *lines])

def chart(rows: list[dict]):
    """Draw how many times faster each step is. Returns a matplotlib Figure."""
    shown = [r for r in rows if r["ratio"] and "work" not in r["name"] and "memory" not in r["name"]][::-1]
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 1 + 0.32 * len(shown)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh([r["name"] for r in shown], [r["ratio"] for r in shown], color=["#55a868" if met(r) else "#c44e52" for r in shown])
    axis.bar_label(bars, [f"{r['ratio']:.1f}x" for r in shown], padding=3)
    axis.set(xscale="log", xlabel="times faster than published notebooks do it, on this machine")
    return figure

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument("--quick", action="store_true", help="a little of everything: shows that it runs, not how fast")
    arguments = parser.parse_args()
    out, rows, began = st.OUTPUTS / "bench", [], time.time()
    with tempfile.TemporaryDirectory() as folder:
        material = Material(Path(folder), QUICK if arguments.quick else FULL)
        for name in arguments.only:
            print(f"[{time.time() - began:4.0f} s] {name}: {COMPARISONS[name].__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
            rows += COMPARISONS[name](material)
    out.mkdir(parents=True, exist_ok=True)
    st.write_json(out / "bench.json", rows)
    st.save_figure(chart(rows), out / "bench.png")
    print(f"{machine()}, {time.time() - began:.0f} s\n\n{table(rows)}")
    sys.exit(not all(map(met, rows)))

if __name__ == "__main__":
    main()
