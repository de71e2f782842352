"""Export a captioner as ONNX, for a page that captions photos in the visitor's browser.

    python space/browser/export.py MODEL OUT [--int8]

OUT gets encoder.onnx (pixels to the decoder's state after <start>), step.onnx (one word for all
beams), captioner.json (vocabulary, defaults of decoding, names of the state) and README.md (the
model card). The captions are compared with the captioner's own before this ends.
"""

import argparse
import contextlib
import dataclasses
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1]))  # the module, in the repository and on Kaggle
import storyteller_utils as st  # noqa: E402

PACKAGES = "onnx onnxscript onnxruntime"
OPSET = 18
LARGE = 4096  # numbers of a tensor from which on 16 or 8 bits pay for another node of the graph
BEAMS, WORDS = 5, 2  # sizes for tracing: an axis of size 1 would be taken for a constant
CHECKED_CROPS = 20
TOLERANCE = 1e-3  # of scores: the graphs add in another order than torch does
EXAMPLES = HERE.parent / "examples"


class Encoder(nn.Module):
    """Map pixels (1, 3, side, side), uint8, to the non-empty tensors of the first state."""

    def __init__(self, backbone: nn.Module, storyteller: st.Storyteller, side: int):
        super().__init__()
        regions = storyteller.config["regions"]
        self.network, self.captioner, self.regions = (
            backbone.network,
            storyteller.captioner,
            regions,
        )
        self.known = storyteller.known  # (64, D), None for a captioner that was not calibrated
        # Not "mean": torch 2.6 gives a node that name too.
        self.register_buffer("level_mean", backbone.mean.clone())
        self.register_buffer("level_deviation", backbone.deviation.clone())
        with torch.no_grad():
            grid = self.network(torch.zeros(1, 3, side, side))  # (1, D, height, width)
        rows = round(regions**0.5) if regions > 1 else grid.shape[2]
        self.register_buffer("pooling", pooling_matrix(grid.shape[2], rows))

    def forward(self, photo: Tensor) -> tuple[Tensor, ...]:
        levels = (photo.float() - self.level_mean) / self.level_deviation  # (1, 3, side, side)
        grid = self.network(levels)  # (1, D, n, n)
        grid = self.pooling @ grid @ self.pooling.T  # (1, D, m, m)
        features = grid.flatten(2).transpose(1, 2)  # (1, R, D)
        if self.regions == 1:
            features = features.mean(1, keepdim=True)
        features = features.half().float()  # as 01 stores them
        state = self.captioner.start(features)
        caption = [state.caption[name] for name in caption_names(state)]
        begun = [tensor for tensor in caption if tensor.numel()]
        return *begun, *state.photo.values(), *self.novelty(features)

    def novelty(self, features: Tensor) -> list[Tensor]:
        """Return the share of a photo's mean features in which no training photos vary, (1,)."""
        if self.known is None:
            return []
        vectors = self.captioner.standardise(features.mean(1))  # (1, D)
        inside = vectors @ self.known.T  # (1, 64)
        return [1 - inside.square().sum(1) / vectors.square().sum(1).clamp(min=1e-9)]


class Step(nn.Module):
    """Map a word of each caption (K,) and the state, flat, to the logits and the next state."""

    def __init__(self, captioner: nn.Module, state: st.State):
        super().__init__()
        self.captioner = captioner
        self.photo, self.caption = list(state.photo), caption_names(state)

    def forward(self, words: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        caption = dict(zip(self.caption, tensors, strict=False))
        photo = dict(zip(self.photo, tensors[len(caption) :], strict=True))
        logits, state = self.captioner.step(words, st.State(photo, caption))
        after = [state.caption[name] for name in self.caption]
        weights = [state.caption["weights"]] if "weights" in state.caption else []
        return logits, *after, *weights


def caption_names(state: st.State) -> list[str]:
    """List the tensors of the captions that the next step reads: all but the attention weights."""
    return [name for name in state.caption if name != "weights"]


def pooling_matrix(size: int, pooled: int) -> Tensor:
    """Return the (pooled, size) matrix that averages one axis as `adaptive_avg_pool2d` does."""
    matrix = torch.zeros(pooled, size)
    for row in range(pooled):
        first, last = row * size // pooled, -(-(row + 1) * size // pooled)
        matrix[row, first:last] = 1 / (last - first)
    return matrix


def describe_state(state: st.State) -> dict:
    """Name the tensors of a state before the first word, as the graphs have them.

    caption  those that each caption has a row of
    empty    {name: shape} of those among them that hold nothing yet and grow with every word
    photo    those of the photo
    weights  whether a step also gives the attention weights
    """
    caption = {f"caption_{n}".replace(" ", "_"): state.caption[n] for n in caption_names(state)}
    return {
        "caption": list(caption),
        "empty": {name: list(t.shape) for name, t in caption.items() if not t.numel()},
        "photo": [f"photo_{name}".replace(" ", "_") for name in state.photo],
        "weights": "weights" in state.caption,
    }


# Writing the graphs


def trace(module: nn.Module, inputs: tuple, path: Path, names: tuple, axes=None) -> None:
    """Write `module` to `path` as ONNX; names: those of inputs and outputs."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        torch.onnx.export(
            module.eval(),
            inputs,
            path,
            input_names=names[0],
            output_names=names[1],
            dynamic_shapes=axes,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@torch.no_grad()
def write_graphs(storyteller: st.Storyteller, backbone: nn.Module, out: Path) -> dict:
    """Write encoder.onnx and step.onnx in float32. Returns the description of the state."""
    captioner, config = storyteller.captioner, storyteller.config
    side = config.get("photo_size", st.PHOTO_SIZE)
    photo = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    state = captioner.start(torch.zeros(1, config["regions"], config["width"]))
    names = describe_state(state)
    starts = [name for name in names["caption"] if name not in names["empty"]]
    encoder = Encoder(backbone, storyteller, side)
    novelty = [] if storyteller.known is None else ["novelty"]
    outputs = [*starts, *names["photo"], *novelty]
    trace(encoder, (photo,), out / "encoder.onnx", (["photo"], outputs))

    tensors, axes = example_state(names, state)
    weights = ["weights"] if names["weights"] else []
    trace(
        Step(captioner, state),
        (torch.ones(BEAMS, dtype=torch.long), *tensors),
        out / "step.onnx",
        (
            ["words", *names["caption"], *names["photo"]],
            ["logits", *(f"next_{name}" for name in names["caption"]), *weights],
        ),
        ({0: axes[0][0]}, tuple(axes)),
    )
    return names


def example_state(names: dict, state: st.State) -> tuple[list[Tensor], list[dict | None]]:
    """Return tensors of a state in the middle of a caption, and for each the axes that vary."""
    beams = torch.export.Dim("beams", min=1, max=64)
    length = torch.export.Dim("length", min=0, max=1000)
    tensors, axes = [], []
    for name, own in zip(names["caption"], caption_names(state), strict=True):
        sizes = [BEAMS, *state.caption[own].shape[1:]]
        varies = {0: beams}
        if name in names["empty"]:
            growing = sizes.index(0)
            sizes[growing] = WORDS
            varies[growing] = length
        tensors.append(torch.zeros(sizes))
        axes.append(varies)
    return [*tensors, *state.photo.values()], [*axes, *[None] * len(state.photo)]


def shrink(path: Path, own: dict[str, np.ndarray], int8: bool) -> None:
    """Store a graph's large weights in 16 bits without loss, or in 8 with; sessions unpack them.

    own  the backbone's weights in float16: its convolutions are these times a factor a channel
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    kept, unpacked, names = [], [], {}
    for initializer in graph.initializer:
        name, array = initializer.name, numpy_helper.to_array(initializer)
        twin = names.setdefault((array.shape, array.dtype.str, array.tobytes()), name)
        if array.size >= LARGE and twin != name:  # tied weights: the words' vectors
            unpacked.append(helper.make_node("Identity", [twin], [name]))
            continue
        packed = pack(array, own.get(name.removeprefix("network.")), int8)
        if packed is None:
            kept.append(initializer)
            continue
        small, factors = packed
        kept.append(numpy_helper.from_array(small, f"{name}_small"))
        wide = name if factors is None else f"{name}_wide"
        unpacked.append(helper.make_node("Cast", [f"{name}_small"], [wide], to=TensorProto.FLOAT))
        if factors is not None:
            kept.append(numpy_helper.from_array(factors, f"{name}_factors"))
            unpacked.append(helper.make_node("Mul", [wide, f"{name}_factors"], [name]))
    nodes = [*unpacked, *graph.node]
    del graph.initializer[:], graph.node[:], graph.value_info[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def pack(array: np.ndarray, own: np.ndarray | None, int8: bool):
    """Return (float16 or int8 numbers, float32 factors or None); None for what stays as it is."""
    if array.dtype != np.float32 or array.size < LARGE:
        return None
    if int8:
        rows = array.reshape(len(array), -1)
        factors = np.maximum(np.abs(rows).max(1), 1e-12) / 127
        small = np.rint(rows / factors[:, None]).astype(np.int8).reshape(array.shape)
        return small, factors.astype(np.float32).reshape(-1, *[1] * (array.ndim - 1))
    if np.array_equal(array.astype(np.float16).astype(np.float32), array):
        return array.astype(np.float16), None
    if own is None or own.shape != array.shape:
        return None
    # A convolution with its BatchNorm folded in: its own weights times one factor a channel.
    rows, own_rows = array.reshape(len(array), -1), own.reshape(len(own), -1).astype(np.float32)
    largest = np.abs(own_rows).argmax(1)[:, None]
    at_largest = np.take_along_axis(own_rows, largest, 1)
    divisor = np.where(at_largest == 0, 1, at_largest)
    factors = (np.take_along_axis(rows, largest, 1) / divisor).astype(np.float32)  # (D, 1)
    if not np.allclose(own_rows * factors, rows, rtol=1e-5, atol=1e-9):
        return None
    return own, factors.reshape(-1, *[1] * (array.ndim - 1))


# Checking


class OnnxCaptioner:
    """The two graphs behind the interface of `Captioner`, for `beam_search` and one photo."""

    def __init__(self, folder: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.encoder, self.next = (
            onnxruntime.InferenceSession(
                folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
            )
            for name in ("encoder", "step")
        )
        self.names = st.read_json(folder / "captioner.json")["state"]

    def start(self, photo: Tensor) -> st.State:
        """Encode one photo (1, 3, side, side), uint8."""
        outputs = self._run(self.encoder, {"photo": photo})
        caption = {name: torch.zeros(shape) for name, shape in self.names["empty"].items()}
        caption |= {name: outputs[name] for name in self.names["caption"] if name in outputs}
        return st.State({name: outputs[name] for name in self.names["photo"]}, caption)

    def step(self, words: Tensor, state: st.State) -> tuple[Tensor, st.State]:
        """Read one word for each caption (K,)."""
        caption = {name: state.caption[name] for name in self.names["caption"]}
        outputs = self._run(self.next, {"words": words, **caption, **state.photo})
        logits = outputs.pop("logits")
        after = {name.removeprefix("next_"): tensor for name, tensor in outputs.items()}
        return logits, st.State(state.photo, after)

    @staticmethod
    def _run(session, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        names = [output.name for output in session.get_outputs()]
        return {name: torch.from_numpy(a) for name, a in zip(names, outputs, strict=True)}


def photo_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))


def check_photos(folder: Path) -> list[np.ndarray]:
    """Return photos to compare captions on: those in `folder`, and twenty crops of them."""
    paths = photo_files(folder)
    if not paths:
        raise st.ArtifactError(f"{folder} holds no photos to compare captions on.")
    photos = [st.open_photo(path).permute(1, 2, 0).numpy() for path in paths]  # (height, width, 3)
    random = np.random.default_rng(0)
    crops = []
    for i in range(CHECKED_CROPS):
        photo = photos[i % len(photos)]
        height, width = (int(size * random.uniform(0.4, 0.9)) for size in photo.shape[:2])
        top = random.integers(0, photo.shape[0] - height + 1)
        left = random.integers(0, photo.shape[1] - width + 1)
        crops.append(photo[top : top + height, left : left + width])
    return photos + crops


def count_equal(storyteller: st.Storyteller, folder: Path, photos: list, int8: bool) -> int:
    """Count the photos whose captions are the same in ONNX Runtime and in the module.

    int8  only the best caption counts; else all of them, and their scores
    """
    onnx_captioner = OnnxCaptioner(folder)
    how, side = storyteller.config["preprocessing"], storyteller.config.get("photo_size", 224)
    equal = 0
    for photo in photos:
        pixels = st.preprocess(st.open_photo(photo), how, side)[None]  # (1, 3, side, side)
        (ours,) = st.beam_search(onnx_captioner, pixels)
        (theirs,) = st.beam_search(storyteller.captioner, storyteller.extract([photo]))
        if int8:
            equal += ours[0].ids == theirs[0].ids
            continue
        same_words = [h.ids for h in ours] == [h.ids for h in theirs]
        apart = max(abs(a.score - b.score) for a, b in zip(ours, theirs, strict=False))
        equal += same_words and apart < TOLERANCE
    return equal


# The whole


def export(model: Path | str, out: Path | str, int8: bool = False, photos: Path = EXAMPLES) -> Path:
    """Export the captioner in the folder `model` to the folder `out`, and check it.

    int8    store weights in 8 bits: half the size, as good captions (CIDEr-D), others for a quarter
    photos  a folder of photos to compare captions on

    Returns `out`. ArtifactError for a captioner that cannot be exported, or whose captions differ.
    """
    out = Path(out)
    storyteller = st.Storyteller.from_pretrained(model)
    config = storyteller.config
    refuse(config)
    config["precision"] = "float32"  # as a browser computes
    backbone = fresh_backbone(Path(model), config)
    own = {name: t.numpy() for name, t in backbone.weights.items() if t.ndim == 4}
    out.mkdir(parents=True, exist_ok=True)
    names = write_graphs(storyteller, backbone, out)
    for graph, weights in (("encoder", own), ("step", {})):
        shrink(out / f"{graph}.onnx", weights, int8)
    about = describe(storyteller, names, out) | {
        "precision": "int8" if int8 else "float16",
        "examples": [path.name for path in photo_files(photos)],
    }
    st.write_json(out / "captioner.json", about)
    st.write_text(out / "README.md", st.Storyteller.model_card(config))
    chosen = check_photos(photos)
    equal = count_equal(storyteller, out, chosen, int8)
    if not int8 and equal < len(chosen):
        raise st.ArtifactError(
            f"The exported captioner gives other captions than {model} for {len(chosen) - equal} "
            f"of {len(chosen)} photos. Do not publish {out}; try other versions of {PACKAGES}."
        )
    print(f"the same captions as {model} for {equal} of {len(chosen)} photos")
    return out


def refuse(config: dict) -> None:
    """Raise ArtifactError for a captioner that cannot run in a browser."""
    if config["backbone"] not in st.BACKBONES:
        raise st.ArtifactError(
            f"The backbone {config['backbone']} cannot be exported for the browser; "
            f"{', '.join(st.BACKBONES)} can. Train a captioner on one of these."
        )


def fresh_backbone(model: Path, config: dict) -> nn.Module:
    """Load a captioner's backbone in float32, whatever precision the captioner computes in."""
    own = model / "backbone.safetensors"
    return st.load_backbone(config["backbone"], str(own) if own.is_file() else "")


def describe(storyteller: st.Storyteller, names: dict, out: Path) -> dict:
    """Collect the page's data besides the graphs in `out`."""
    config = storyteller.config
    graphs = {name: out / f"{name}.onnx" for name in ("encoder", "step")}
    facts = ("decoder", "backbone", "vocabulary", "scores", "scored_on")
    return {
        "words": storyteller.vocab.words,
        "sentences": sentence_rules(storyteller.vocab),
        "language": config.get("language", "en"),
        "side": config.get("photo_size", st.PHOTO_SIZE),
        "preprocessing": config["preprocessing"],
        "state": names,
        "decoding": decoding_defaults(),
        "calibration": None if storyteller.known is None else config["calibration"],
        "dataset": config["dataset"] | {"photos": config["training"]["photos"]},
        "facts": {name: config[name] for name in facts if name in config},
        "bytes": {name: path.stat().st_size for name, path in graphs.items()},
        # In the graphs' addresses: a browser may keep them for as long as these do not change.
        "version": st.sha256([st.sha256(path) for path in graphs.values()])[:12],
    }


def sentence_rules(vocab: st.Vocab) -> dict:
    """Collect the rules of `Vocab.sentence`, for its copy in captioner.js."""
    return {
        "forms": vocab.forms,
        "joined": st.JOINED.pattern,
        "brackets": st.BRACKETS,
        "han": st.HAN,
        "unspaced": st.UNSPACED,
    }


def decoding_defaults() -> dict:
    names = ("beam_width", "length_preference", "no_repeat", "min_length", "max_length")
    defaults = dataclasses.asdict(st.Decoding())
    return {name: defaults[name] for name in names}


def main(argv: list[str] | None = None) -> None:
    """Export a captioner from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a captioner's folder")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--int8", action="store_true", help="half the size, some other captions")
    arguments = parser.parse_args(argv)
    try:
        export(arguments.model, arguments.out, arguments.int8)
    except ImportError as error:
        sys.exit(f"export.py: {error}. It needs: pip install {PACKAGES}")
    except (st.ArtifactError, ValueError) as error:
        sys.exit(f"export.py: {error}")


if __name__ == "__main__":
    main()
