"""The benchmarks' data: drawn photos, random networks and captions as long as Flickr30k's."""

import functools
from pathlib import Path

import baselines
import numpy as np
import torch
from torch import nn

import sample
import storyteller_utils as st
import training
from support import parameters

VOCABULARY = 7_689
DEVICE = st.default_device()
DTYPE, REASON = st.choose_precision(DEVICE)


class Material:
    """What several comparisons need, each made on first use, below a temporary folder."""

    def __init__(self, folder: Path, photos: int):
        self.folder, self.count = folder, photos

    @functools.cached_property
    def photos(self) -> list[Path]:
        drawn = sample.draw_dataset(self.folder / "photos", self.count, size=(500, 375), quality=95)
        return sorted((drawn / "Images").iterdir())

    def some(self, count: int) -> list[Path]:
        return [self.photos[i % len(self.photos)] for i in range(count)]

    @functools.cached_property
    def weights(self) -> str:
        """A random ResNet50 that tells photos apart: BatchNorm set on four of them, branches of
        weight 1/4.

        With torchvision's own random weights, all features are alike; without the 1/4, rounding
        grows from block to block as it does in no trained network.
        """
        torch.manual_seed(0)
        network = baselines.models.resnet50().train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
            if hasattr(module, "bn3"):
                nn.init.constant_(module.bn3.weight, 0.25)
        with torch.no_grad():
            photos = baselines.Photos(self.photos, baselines.transform())
            network(torch.stack([photos[i][0] for i in range(4)]))
        torch.save(network.state_dict(), self.folder / "resnet50.pth")
        return str(self.folder / "resnet50.pth")

    def storyteller(self, backbone: str, weights: str = "") -> Path:
        """Save a captioner of random words on that backbone. Returns its folder."""
        loaded = st.load_backbone(backbone, weights).prepare(DEVICE, DTYPE)
        photos = torch.stack([st.preprocess(st.open_photo(path)) for path in self.some(8)])
        features = loaded(photos, 1)[:, 0]
        captioner = random_captioner(
            "lstm", loaded.width, (features.mean(0), features.std(0) + 0.1)
        )
        config = {
            "decoder": "lstm",
            "sizes": {},
            "width": loaded.width,
            "regions": 1,
            "backbone": backbone,
            "backbone_sha256": loaded.sha256,
            "preprocessing": "squash",
            "precision": "auto",
            "recipe": "original",
            "dataset": {"name": "nothing", "sample": True},
            "training": {"photos": 0, "epochs": 0, "best_epoch": 0, "val_cider": 0.0},
            "feature_mean": captioner.mean.tolist(),
            "feature_deviation": captioner.deviation.tolist(),
        }
        storyteller = st.Storyteller(config, st.Vocab(st.SPECIAL + words()), captioner)
        storyteller._backbone = loaded
        storyteller.save_pretrained(self.folder / backbone)
        return self.folder / backbone

    def trainer(self, precision: str, photos: int) -> training.Trainer:
        """Write results like those of 01 and 02, with random features and captions.

        Returns 03's trainer on them, without dropout.
        """
        folder = self.folder / "training"
        if not folder.exists():
            folder.mkdir()
            rng, names = np.random.default_rng(0), [f"{i}.jpg" for i in range(photos)]
            features = rng.standard_normal((photos, 1, 2048), dtype=np.float32)
            np.save(folder / "features.npy", features.astype(np.float16))
            captions = [" ".join(caption) for caption in random_captions(5 * photos, 0)]
            st.write_csv(folder / "images.csv", ["row", "image"], enumerate(names))
            st.write_csv(folder / "skipped.csv", ["image", "reason"], [])
            st.write_csv(
                folder / "captions.csv",
                ["image", "split", "tokens"],
                [
                    (names[i // 5], "val" if i < 10 else "train", caption)
                    for i, caption in enumerate(captions)
                ],
            )
            st.Vocab(st.SPECIAL + words()).save(folder / "vocab.json")
        settings = parameters("03_train_dual_t4", dropout=0, label_smoothing=0, precision=precision)
        reads = dict.fromkeys(st.STAGES["03_train_dual_t4"], str(folder))
        return training.Trainer(
            {"settings": settings, "out": str(folder), "reads": reads, "editions": {}}
        )


def words() -> list[str]:
    return [f"w{i}" for i in range(VOCABULARY - len(st.SPECIAL))]


def random_captions(count: int, seed: int) -> list[list[str]]:
    """Draw captions as Flickr30k's: mean 12.2 words, one in twenty over 22, common words first."""
    rng, known = np.random.default_rng(seed), words()
    lengths = np.exp(rng.normal(2.417, 0.41, count)).round().clip(3, 48).astype(int)
    chance = 1 / (np.arange(len(known)) + 2.7)
    drawn = rng.choice(len(known), lengths.sum(), p=chance / chance.sum())
    return [[known[i] for i in part] for part in np.split(drawn, lengths.cumsum()[:-1])]


@torch.no_grad()
def random_captioner(decoder: str, width: int, moments=None) -> st.Captioner:
    """Make a captioner of random weights that ends its captions after about 12 words.

    Its first hidden unit is a clock, which makes <end> likelier from word to word; the output is
    scaled up, so that words differ in probability as a trained captioner's do.
    """
    torch.manual_seed(0)
    captioner = st.Captioner(
        decoder, width, VOCABULARY, moments or (torch.zeros(width), torch.ones(width))
    ).eval()
    d, hidden = captioner.decoder, 512
    gates = {name.removesuffix("_l0"): weight for name, weight in d.lstm.named_parameters()}
    # All gates open: the cell grows by 0.05 a word.
    for gate, opening in enumerate((10, 10, 0.05, 10)):
        for weight in gates.values():
            weight[gate * hidden] = 0
        gates["bias_ih"][gate * hidden] = opening
    if d.pooled:
        clocks = [(d.encoder, 0)]
    else:
        clocks = [(d.init_state, 0), (d.init_state, hidden), (d.join[1], 0)]
    for layer, unit in clocks:
        layer.weight[unit] = layer.bias[unit] = 0
    if not d.pooled:
        d.join[1].weight[0, 0] = 1
    d.output.weight.mul_(40 if d.pooled else 15)[:, 0] = 0
    d.output.weight[st.END, 0], d.output.bias[st.END] = (30, -7) if d.pooled else (40, -8)
    return captioner.requires_grad_(False).to(DEVICE)
