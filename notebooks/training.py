"""Train a captioner in one process for each GPU, for 03_train_dual_t4."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import shutil
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import storyteller_utils as st

SAMPLES = 5  # captions that self-critical training draws per photo
SELF_CRITICAL_RATE = 4e-5  # its learning rate
SELF_CRITICAL_EMA_DECAY = 0.98  # its epochs are short
CHECKPOINT_SECONDS = 300  # a killed run loses at most this much
KAGGLE_HOURS = 11  # of the 12 that a session lasts there


def _gather(value) -> list:
    """Return every process's value, in the order of their ranks."""
    if "WORLD_SIZE" not in os.environ:
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


class Progress:
    """The contents of last.pt: everything that the next step of a run depends on.

    began     tells runs apart (`set_status`)
    key       hash of its settings and data
    epoch     number of finished epochs
    step      finished batches of the next epoch
    updates   optimizer steps so far
    phase     "likelihood" or "self_critical"
    sums      of this epoch so far: "tokens" and "seconds" of all processes, the rest of this one
    history   a dict for each epoch
    examples  [epoch, photo, caption] of a few validation photos
    best      score, epoch and weights of the best epoch
    ema       the captioner with averaged weights, for generation; without averaging, the model
    moments   mean and deviation (D,) by which the captioner standardises features
    """

    PARTS = ("model", "ema", "optimizer", "scaler")
    OWN = ("began", "key", "moments")  # facts about this run, whatever it resumes from

    def __init__(self, model: st.Captioner, recipe: dict, half: bool, began: float, key: str):
        self.began = began
        self.key = key
        self.phase = "likelihood"
        self.epoch = 0
        self.updates = 0
        self.history: list[dict] = []
        self.examples: list[list] = []
        self.best = {"score": -math.inf, "epoch": 0, "weights": {}}
        self.model = self.ema = model
        self.moments = model.mean.cpu(), model.deviation.cpu()
        if recipe["ema_decay"]:
            self.ema = copy.deepcopy(model).eval()
        parameters, decay = model.parameters(), recipe["weight_decay"]
        # Fused: a single kernel updates all parameters.
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=decay, fused=True)
        # In float16 small gradients would underflow: the loss is scaled up, and they down again.
        self.scaler = torch.amp.GradScaler(model.mean.device.type, enabled=half)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Reset the counters of an epoch."""
        self.step = 0
        names = ("likelihood", "reward", "captions", "tokens", "seconds")
        self.sums = dict.fromkeys(names, 0.0)  # likelihood becomes a tensor: () float64

    def totals(self) -> dict[str, float]:
        """Return this epoch's sums over all processes."""
        every = _gather({name: float(value) for name, value in self.sums.items()})
        own = {name: self.sums[name] for name in ("tokens", "seconds")}
        return {name: sum(one[name] for one in every) for name in self.sums} | own

    def save(self, path: Path, totals: dict[str, float]) -> None:
        """Write tensors, numbers and strings only, so that reading it runs no code."""
        state = vars(self) | {"sums": totals}
        state |= {name: getattr(self, name).state_dict() for name in self.PARTS}
        with st.replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)

    def load(self, state: dict, rank: int) -> None:
        """Restore what `save` wrote, except what is this run's own."""
        for name, value in state.items():
            if name in self.OWN:
                continue
            if name not in self.PARTS:  # numbers, lists and the best weights
                setattr(self, name, value)
            elif value:  # a scaler that scales nothing has no state
                # DataParallel puts "module." before every name.
                value = {key.removeprefix("module."): part for key, part in value.items()}
                getattr(self, name).load_state_dict(value)
        if rank:  # the sums over all processes now belong to the first one
            self.sums |= {"likelihood": 0.0, "reward": 0.0, "captions": 0.0}


class Examples(NamedTuple):
    """A process's share of a training step.

    features  (B, R, D)
    words     (B, T)  ids from <start> to <end>, padded
    weights   (B,)    of the captions in the loss; None: 1
    tokens            predicted in this step by all processes
    """

    features: Tensor
    words: Tensor
    weights: Tensor | None
    tokens: int


class Likelihood:
    """The objective of the first phase: the likelihood of people's captions."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.captions = trainer.batches["train"]
        self.label_smoothing = trainer.recipe["label_smoothing"]

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return an epoch's batches of caption indices."""
        return self.captions.epoch(self.trainer.settings.seed, epoch)

    def learning_rate(self, updates: int) -> float:
        """Return a step's learning rate: linear warm-up, then a cosine down to a hundredth."""
        recipe = self.trainer.recipe
        total = len(self.captions) * recipe["epochs"]
        warm = max(1, int(total * recipe["warmup"]))  # Adam's first steps know no variance yet
        if updates < warm:
            return recipe["learning_rate"] * (updates + 1) / warm
        cosine = math.cos(math.pi * (updates - warm) / (total - warm))
        return recipe["learning_rate"] * (0.01 + 0.99 * 0.5 * (1 + cosine))

    def ema_decay(self, updates: int) -> float:
        """Return the share of the averaged weights that a step keeps."""
        # Early averages forget faster, or the random initial weights would last for an epoch.
        return min(self.trainer.recipe["ema_decay"], (1 + updates) / (10 + updates))

    def draw(self, batch: np.ndarray, mine: np.ndarray, share: float) -> Examples:
        """Return this process's examples of a step.

        batch  indices of the captions of all processes
        mine   (B,)  those of this process
        share  1, or 0 where `mine` only keeps the process in step with the others
        """
        trainer = self.trainer
        words = self.captions.words(mine)  # (B, T)
        sided = torch.isin(words, trainer.sides).any(1)  # (B,)
        features = trainer.photos(self.captions.rows[mine], sided)  # (B, R, D)
        trainer.progress.sums["captions"] += share * len(mine)
        tokens = int(self.captions.lengths[batch].sum()) - len(batch)  # <start> is not predicted
        return Examples(features, words.to(trainer.device), None, tokens)


class SelfCritical:
    """The objective of the second phase: the CIDEr-D of the captioner's own samples.

    Rennie et al., 2017, with the mean reward of a photo's other samples as the baseline. <end>
    counts as a word in the reward, or captions would learn to stop at "in front of a".
    """

    label_smoothing = 0.0

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.references = trainer.data.references["train"]

    @cached_property
    def reward(self) -> st.CiderD:
        """CIDEr-D against the training captions, <end> included."""
        end = [st.SPECIAL[st.END]]
        return st.CiderD([[words + end for words in group] for group in self.references])

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return an epoch's batches: a third of all photos, with twice the usual captions each."""
        # It overfits quickly, so validation has to come more often than after all photos.
        order = np.random.default_rng((self.trainer.settings.seed, epoch))
        order = order.permutation(len(self.references))[: math.ceil(len(self.references) / 3)]
        size = 2 * self.trainer.recipe["batch_size"]
        return np.array_split(order, math.ceil(len(order) * SAMPLES / size))

    def learning_rate(self, updates: int) -> float:
        """Return the same small rate for every step."""
        return SELF_CRITICAL_RATE

    def ema_decay(self, updates: int) -> float:
        """Return the share of the averaged weights that every step keeps."""
        return SELF_CRITICAL_EMA_DECAY

    def draw(self, batch: np.ndarray, mine: np.ndarray, share: float) -> Examples:
        """Draw S captions of each photo of `mine`; a photo's advantages sum to 0."""
        trainer = self.trainer
        groups = [self.references[photo] for photo in mine]
        sides = [any({"left", "right"} & set(words) for words in group) for group in groups]
        sided = torch.tensor(sides)  # (B,)
        rows = trainer.data.rows["train"][mine]
        features = trainer.photos(rows, sided)  # (B, R, D)
        sampled = self._sample(features)
        vocab = trainer.data.vocab
        captions = [vocab.decode(ids) + [st.SPECIAL[st.END]] * (st.END in ids) for ids in sampled]
        rewards = self.reward.score(captions, np.repeat(mine, SAMPLES)).reshape(
            -1, SAMPLES
        )  # (B, S)
        # Against the mean of the other samples: S / (S - 1) times the distance to the mean of all.
        advantages = (rewards - rewards.mean(1, keepdims=True)) * (SAMPLES / (SAMPLES - 1))
        trainer.progress.sums["reward"] += share * float(rewards.sum())
        trainer.progress.sums["captions"] += share * rewards.size
        words = [torch.tensor([st.START, *ids]) for ids in sampled]
        words = nn.utils.rnn.pad_sequence(words, True, st.PAD).to(trainer.device)  # (B*S, T)
        tokens = sum(_gather(sum(map(len, sampled)) * int(share)))
        weights = torch.from_numpy(advantages.ravel()).float().to(trainer.device)  # (B*S,)
        return Examples(features.repeat_interleave(SAMPLES, 0), words, weights, tokens)

    def _sample(self, features: Tensor) -> list[list[int]]:
        """Draw S captions of each photo (B, R, D).

        Returns the ids of B*S captions, those of a photo next to each other.
        """
        trainer = self.trainer
        # An empty caption may be drawn too: the captioner learns that it earns nothing.
        decoding = st.Decoding(
            "sample", captions=SAMPLES, min_length=0, seed=int(torch.randint(2**31, ()))
        )
        trainer.captioner.eval()  # without dropout, as when it generates captions
        with trainer.autocast():
            drawn = st.sample_captions(trainer.captioner, features, decoding)
        trainer.captioner.train()
        return [hypothesis.ids for samples in drawn for hypothesis in samples]


class Trainer:
    """Train a captioner, as one of any number of equal processes; only rank 0 writes files.

    A step is a pure function of weights, seed and its number, which seeds dropout: a run resumed
    from last.pt does what an uninterrupted one does, bit for bit on a CPU.
    """

    def __init__(self, job: dict):
        self.settings = st.TrainSettings(**job["settings"])
        self.recipe = self.settings.resolved()
        self.out = Path(job["out"])
        self.device = st.default_device()
        self.rank, self.world = st.join_processes(self.device)
        self.extracted, self.prepared = (
            Path(job["reads"][s]) for s in st.STAGES["03_train_dual_t4"]
        )
        self.precision, reason = st.choose_precision(self.device, self.settings.precision)
        usual = (torch.float32, st.choose_precision(self.device)[0])
        if self.device.type == "cpu" and self.precision not in usual:
            # oneDNN has a half-precision LSTM only for processors that support it in hardware.
            torch.backends.mkldnn.set_flags(False)
        self._say(f"{self.world} x {self.device.type}, {reason}")
        self._read_data()
        self._build(job)
        self.objectives = {"likelihood": Likelihood(self), "self_critical": SelfCritical(self)}
        hours = self.settings.max_hours
        if hours is None:
            hours = KAGGLE_HOURS if st.kaggle_input() else math.inf
        self.deadline = time.monotonic() + 3600 * hours
        self.saved = time.monotonic()
        self.stop = ""  # a reason to stop after the current step

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _read_data(self) -> None:
        self._say("reading captions and features")
        self.data = st.CaptionData.load(self.extracted, self.prepared)
        self._choose_val_photos()
        pooled = st.DECODERS[self.recipe["decoder"]].pooled
        flipped = self.extracted / "features_flip.npy"
        mirrored = self.recipe["flips"] and flipped.is_file()
        copies = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (1 + mirrored)
        self.features = st.Features(self.extracted / "features.npy", pooled, self.device, copies)
        self.flipped = st.Features(flipped, pooled, self.device, copies) if mirrored else None
        # A mirrored photo has on its left what its captions call right.
        ids = self.data.vocab.ids
        sides = [ids[word] for word in ("left", "right") if word in ids]
        self.sides = torch.tensor(sides, dtype=torch.long)  # (2,) or fewer
        size, longest = self.recipe["batch_size"], self.recipe["max_caption_length"]
        self.batches = {s: self.data.batches(s, size, longest) for s in ("train", "val")}

    def _choose_val_photos(self) -> None:
        """Keep at most `val_photos` validation photos, and check that CIDEr-D can rank epochs."""
        data, wanted = self.data, self.settings.val_photos
        have = len(data.of("val")[0])
        if 0 < wanted < have:
            chosen = np.arange(wanted) * have // wanted  # spread over all, the same in every epoch
            data.rows["val"] = data.rows["val"][chosen]
            data.names["val"] = [data.names["val"][i] for i in chosen]
            data.references["val"] = [data.references["val"][i] for i in chosen]
            self._say(f"{wanted} of {have} validation photos choose the epoch (val_photos)")
        references = data.references["val"]
        self.cider = st.CiderD(references)
        self.select_by = self.settings.select_by
        # n-grams that all photos' captions have weigh nothing: with one photo, that is all of them.
        if not self.cider.score([group[0] for group in references]).any():
            self.select_by = "loss"
            self.recipe["self_critical"] = 0
            self._say(
                f"CIDEr-D is 0 for any captions of these {len(references)} validation photos: "
                "the validation loss chooses the epoch, and there are no self-critical ones."
            )

    def _build(self, job: dict) -> None:
        """Build the captioner, its optimizer and its distributed wrapper."""
        # Another GPU's precision, or less memory per step, does not make it another run.
        others = st.LOCATIONS | {"accumulate"}
        decided = {name: value for name, value in job["settings"].items() if name not in others}
        key = st.sha256([self.recipe, decided, job["editions"]])
        moments = self._moments(key)  # (D,) each
        torch.manual_seed(self.settings.seed)
        self.captioner = st.Captioner(
            self.recipe["decoder"],
            self.features.width,
            len(self.data.vocab),
            moments,
            dropout=self.recipe["dropout"],
            **self.recipe["sizes"],
        ).to(self.device)
        half = self.precision == torch.float16
        self.progress = Progress(self.captioner, self.recipe, half, job.get("began", 0), key)
        self.model = self.captioner
        if self.world > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.captioner, device_ids=ids)

    def _moments(self, key: str) -> tuple[Tensor, Tensor]:
        """Return the features' mean and deviation (D,), the same in all processes.

        Only rank 0 finds them, in a checkpoint of the run `key` or from the features, which takes
        up to a minute for large grids. An error is raised in every process.
        """
        found: list = [None]
        if self.rank == 0:
            try:
                found = [self._kept_moments(key) or self._measure_moments()]
            except st.ArtifactError as error:
                found = [error]
        if self.world > 1:
            torch.distributed.broadcast_object_list(found)
        if isinstance(found[0], st.ArtifactError):
            raise found[0]
        return found[0]

    def _kept_moments(self, key: str) -> tuple[Tensor, Tensor] | None:
        """Return the moments in the first checkpoint of the run `key` that has them, or None."""
        for path, _ in self.checkpoints():
            # It may be broken, which `load` will report, or older than the moments in checkpoints.
            with contextlib.suppress(Exception):
                # Mapped: little of the file is read.
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if state["key"] == key:
                    mean, deviation = state["moments"]
                    return mean.clone(), deviation.clone()
        return None

    def _measure_moments(self) -> tuple[Tensor, Tensor]:
        self._say("measuring the features' mean and deviation")
        mean, deviation = self.features.moments(self.data.rows["train"])  # (D,) each
        if not deviation.gt(1e-3).any():
            raise st.ArtifactError(
                "All training photos have the same features: nothing can be learned from them. "
                "Look at the photos, then run 01_extract_features.ipynb again."
            )
        if not self.settings.standardise:
            return torch.zeros_like(mean), torch.ones_like(deviation)
        return mean, deviation

    def autocast(self):
        """Return a context that computes in this run's precision."""
        half = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=half)

    def photos(self, rows: np.ndarray, sided: Tensor) -> Tensor:
        """Return features of training photos (B, R, D), a random half of them mirrored.

        rows   (B,)  of the features
        sided  (B,)  whether the captions name a side, in which case the photo is not mirrored
        """
        features = self.features[rows]  # (B, R, D)
        if self.flipped:
            mirrored = (torch.rand(len(rows)) < 0.5) & ~sided  # (B,)
            features[mirrored.to(self.device)] = self.flipped[rows[mirrored.numpy()]]
        return features

    # One step

    @property
    def objective(self) -> Likelihood | SelfCritical:
        """The objective of the current phase."""
        return self.objectives[self.progress.phase]

    def train_step(self, batch: np.ndarray, number: int) -> None:
        """Update the weights by the gradient of the mean loss over a batch's tokens.

        batch   the captions or photos of all processes
        number  of the step: seeds dropout

        The gradient is summed over `accumulate` slices, which saves memory and changes no result.
        """
        sums, objective = self.progress.sums, self.objective
        mine, share = batch[self.rank :: self.world], 1.0
        if not len(mine):  # DistributedDataParallel waits for every process, this one too
            mine, share = batch[:1], 0.0
        # Dropout differs between processes, but not when a step is repeated.
        torch.manual_seed((self.settings.seed * 1_000_003 + number) * 64 + self.rank)
        # (B, R, D), (B, T), (B,) or None; the loss is a mean over the tokens of all processes.
        features, words, weights, tokens = objective.draw(batch, mine, share)
        slices = np.array_split(np.arange(len(words)), min(self.settings.accumulate, len(words)))
        for i, part in enumerate(slices):
            between = self.world > 1 and i + 1 < len(slices)  # gradients are exchanged once
            with self.model.no_sync() if between else contextlib.nullcontext():
                with self.autocast():  # sums over the part's tokens, () each
                    loss, likelihood = self.model(
                        features[part],  # (B / slices, R, D)
                        words[part],  # (B / slices, T)
                        objective.label_smoothing,
                        None if weights is None else weights[part],
                    )
                # DistributedDataParallel averages the processes' gradients: this makes it a sum.
                self.progress.scaler.scale(loss * (share * self.world / tokens)).backward()
            # Kept as a tensor: a number would have to wait for the GPU.
            sums["likelihood"] += likelihood.double() * share
        sums["tokens"] += tokens
        self._update()

    def _update(self) -> None:
        """Take an optimizer step, and update the averaged weights."""
        progress, scaler = self.progress, self.progress.scaler
        progress.optimizer.param_groups[0]["lr"] = self.objective.learning_rate(progress.updates)
        scaler.unscale_(progress.optimizer)  # or the norm below would be that of scaled gradients
        nn.utils.clip_grad_norm_(self.captioner.parameters(), self.recipe["clip"])
        scale = scaler.get_scale()
        scaler.step(progress.optimizer)
        scaler.update()
        progress.optimizer.zero_grad(set_to_none=True)  # frees the gradients
        # If float16 overflowed, the scaler skipped the step: schedule and averages wait too.
        if scaler.get_scale() < scale:
            return
        if progress.ema is not self.captioner:  # the recipe averages weights
            kept = self.objective.ema_decay(progress.updates)
            # Buffers are constants: only parameters are averaged, all in one call.
            mean, now = ([p.data for p in m.parameters()] for m in (progress.ema, self.captioner))
            torch._foreach_lerp_(mean, now, 1 - kept)
        progress.updates += 1

    # One epoch

    def train_epoch(self) -> bool:
        """Train the rest of the current epoch, with a checkpoint every few minutes.

        Returns False if it stopped before the end of the epoch. Raises ArtifactError when the loss
        is not finite.
        """
        at = self.progress
        self.model.train()  # dropout on
        # The same batches in every process, which takes its share of each.
        batches = self.objective.batches(at.epoch)
        bar = st.progress(
            batches[at.step :],
            initial=at.step,
            total=len(batches),
            desc=f"epoch {at.epoch + 1}",
            unit="batch",
            leave=False,
            disable=self.rank > 0,
        )
        clock = time.monotonic()
        for batch in bar:
            # The number is unique in the run, so that no two steps have the same dropout.
            self.train_step(batch, at.epoch * len(batches) + at.step)
            at.step += 1
            now = time.monotonic()
            at.sums["seconds"] += now - clock
            clock = now
            if self._pause():
                return False
        likelihood = float(at.sums["likelihood"])  # a NaN stays in a sum: once an epoch is enough
        if not math.isfinite(likelihood):
            raise st.ArtifactError(
                f"The loss became {likelihood} in epoch {at.epoch + 1}. Try learning_rate="
                f"{self.recipe['learning_rate'] / 3:.1g}, or precision='float32'."
            )
        return True

    def _pause(self) -> bool:
        """Save a checkpoint if one is due, and return whether to stop.

        All processes decide the same, after the same step.
        """
        # Agreeing takes a message between processes, so not after every step.
        if self.world > 1 and self.progress.step % 10:
            return False
        now = time.monotonic()
        late = now > self.deadline
        wishes = _gather([bool(self.stop) or late, now - self.saved > CHECKPOINT_SECONDS])
        stop, due = (any(wish) for wish in zip(*wishes, strict=True))
        if stop or due:
            self.save()
        if stop and not self.stop:
            self.stop = "max_hours have passed" if late else "another process was asked to stop"
        return stop

    @torch.inference_mode()
    def validate(self) -> tuple[float, list[list[str]]]:
        """Return the validation loss per token, and the words of beam search's captions."""
        captions, model = self.batches["val"], self.progress.ema.eval()  # dropout off
        likelihood = torch.zeros((), dtype=torch.float64, device=self.device)
        batches = captions.epoch(0, 0, shuffle=False)[self.rank :: self.world]
        quiet = {"leave": False, "delay": 5, "disable": self.rank > 0}
        for batch in st.progress(batches, desc="validation loss", unit="batch", **quiet):
            features = self.features[captions.rows[batch]]  # (B, R, D)
            with self.autocast():
                # The likelihood alone: with label smoothing, recipes' losses would not compare.
                likelihood += model(features, captions.words(batch).to(self.device))[1]
        total = sum(_gather(float(likelihood)))
        # Every process captions every world-th photo.
        mine = self.data.rows["val"][self.rank :: self.world]
        hypotheses = st.generate(model, self.features, mine, progress=self.rank == 0)
        # Interleaved again, in the order of the photos.
        generated: list = [None] * len(self.data.rows["val"])
        for rank, part in enumerate(_gather([found[0].ids for found in hypotheses])):
            generated[rank :: self.world] = part
        tokens = int(captions.lengths.sum()) - len(captions.lengths)  # <start> is not predicted
        return total / tokens, [self.data.vocab.decode(ids) for ids in generated]

    def finish_epoch(self) -> None:
        """Validate, extend the history, and keep the weights if they are the best so far."""
        at = self.progress
        loss, captions = self.validate()
        # CIDEr-D of the captions that users would get, not of teacher forcing.
        cider = float(self.cider.score(captions).mean())
        sums = at.totals()
        critical = at.phase == "self_critical"
        reward = round(sums["reward"] / sums["captions"], 5) if critical else None
        line = {
            "epoch": at.epoch + 1,
            "train_loss": round(sums["likelihood"] / sums["tokens"], 5),
            "val_loss": round(loss, 5),
            "val_cider": round(cider, 5),
            "reward": reward,
            "seconds": round(sums["seconds"], 1),
            "captions_per_second": round(sums["captions"] / max(sums["seconds"], 1e-9)),
            "val_photos": len(captions),
        }
        at.history.append(line)
        for name, words in zip(self.data.names["val"][:5], captions[:5], strict=True):
            at.examples.append([at.epoch + 1, name, self.data.vocab.sentence(words)])
        score = cider if self.select_by == "cider" else -loss
        if score > at.best["score"]:
            state = at.ema.state_dict()  # copied, as training goes on in the same tensors
            weights = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
            at.best = {"score": score, "epoch": at.epoch + 1, "weights": weights}
        at.epoch += 1
        at.begin_epoch()
        self.save()  # a killed run repeats no finished epoch
        # Of its own samples, the negative log-likelihood is the entropy of what it generates.
        learned = f"reward {reward:.3f}, entropy" if critical else "loss"
        self._say(
            f"epoch {at.epoch}: {learned} {line['train_loss']:.3f}, validation loss {loss:.3f}, "
            f"CIDEr-D {cider:.3f}, {line['captions_per_second']:,} captions/s"
        )

    # All epochs

    def run(self) -> None:
        """Train all epochs, from a checkpoint if there is one, and write the best captioner.

        A run that stops early (`stop`, `max_hours`) says so in status.json.
        """
        self.resume()
        if self.world > 1:
            torch.distributed.barrier()
        if self.rank == 0 and not self.progress.history:
            # What an earlier run left must not pass for this one's.
            shutil.rmtree(self.out / "model", ignore_errors=True)
            for name in ("history.csv", "examples.csv"):
                (self.out / name).unlink(missing_ok=True)
        while (more := self.wanted()) and self.train_epoch():
            self.finish_epoch()
        if self.rank == 0:
            if self.progress.history:
                self.write()
            at, epochs = self.progress, self.recipe["epochs"] + self.recipe["self_critical"]
            place = {"epoch": at.epoch, "step": at.step, "epochs": epochs, "reason": self.stop}
            st.set_status(self.out, stopped=place if more else {})
        if self.world > 1:
            torch.distributed.barrier()

    def wanted(self) -> bool:
        """Return whether to train another epoch; begin the self-critical phase when it is due.

        A phase ends after its epochs, or when the last `patience` of them brought no improvement;
        the self-critical one also ends when the captions lose their variety.
        """
        at, patience = self.progress, self.recipe["patience"]
        tired = bool(at.history) and at.epoch - at.best["epoch"] >= patience
        if at.phase == "likelihood":
            if at.epoch < self.recipe["epochs"] and not tired:
                return True
            if self.recipe["self_critical"]:
                self.begin_self_critical()
            return at.phase == "self_critical"
        entropies = [line["train_loss"] for line in at.history if line["reward"] is not None]
        if not entropies:
            return True
        collapsed = entropies[-1] < entropies[0] / 3  # the same caption whatever is drawn
        tired = tired and len(entropies) >= patience  # epochs of the first phase do not count
        return len(entropies) < self.recipe["self_critical"] and not tired and not collapsed

    def begin_self_critical(self) -> None:
        """Begin the self-critical phase, from the best weights."""
        for model in (self.captioner, self.progress.ema):
            model.load_state_dict(self.progress.best["weights"])  # averaged, if the recipe does so
        self.progress.optimizer.state.clear()  # moments of the other objective's gradients
        self.progress.phase = "self_critical"

    def write(self) -> None:
        """Write history.csv, examples.csv, and the best captioner so far into model/."""
        at = self.progress
        rows = [list(line.values()) for line in at.history]
        st.write_csv(self.out / "history.csv", list(at.history[0]), rows)
        st.write_csv(self.out / "examples.csv", ["epoch", "image", "caption"], at.examples)
        # The weights of the last step are in last.pt, and may be overwritten here.
        self.captioner.load_state_dict(at.best["weights"])
        storyteller = st.Storyteller(
            self.config(), self.data.vocab, self.captioner.cpu(), self.extracted
        )
        storyteller.save_pretrained(self.out / "model")

    def config(self) -> dict:
        """Return the captioner's config.json: how to build it, and what it was trained on."""
        extracted = st.read_json(self.extracted / "manifest.json")
        prepared = st.read_json(self.prepared / "manifest.json")
        best, recipe = self.progress.history[self.progress.best["epoch"] - 1], dict(self.recipe)
        stages = [extracted["settings"], prepared["settings"], dataclasses.asdict(self.settings)]
        # Paths on this machine are private, and of no use to others.
        stages = [{k: v for k, v in s.items() if k not in st.LOCATIONS} for s in stages]
        facts, chosen = extracted["facts"], extracted["settings"]
        mean, deviation = self.captioner.mean.tolist(), self.captioner.deviation.tolist()
        return {
            "decoder": recipe.pop("decoder"),
            "sizes": recipe.pop("sizes"),
            **{n: facts[n] for n in ("backbone", "backbone_sha256", "regions", "width")},
            **{n: chosen[n] for n in ("preprocessing", "photo_size", "precision")},
            "language": prepared["settings"].get("language", "en"),
            "dataset": extracted["dataset"],
            "recipe": self.settings.recipe,
            "settings": dict(zip(st.STAGES, stages, strict=False)),
            "training": {
                **recipe,
                **{n: best[n] for n in ("val_loss", "val_cider", "val_photos")},
                "seed": self.settings.seed,
                "photos": len(self.data.rows["train"]),
                "best_epoch": best["epoch"],
                "select_by": self.select_by,
            },
            # Seven digits are all that float32 has.
            "feature_mean": [float(f"{x:.7g}") for x in mean],
            "feature_deviation": [float(f"{x:.7g}") for x in deviation],
        }

    # Checkpoints

    def save(self) -> None:
        """Write last.pt."""
        totals = self.progress.totals()
        self.saved = time.monotonic()
        if self.rank == 0:
            self.progress.save(self.out / "last.pt", totals)

    def checkpoints(self) -> list[tuple[Path, bool]]:
        """List the checkpoints to try, in order, each with whether it may be of another run.

        This folder's last.pt, then `resume_from`, which alone may be of another run; without
        either, on Kaggle, that of an attached run that stopped.
        """
        asked, own = self.settings.resume_from, self.out / "last.pt"
        found = [(own, False)] if own.is_file() else []
        if asked:
            return [*found, (self._asked_checkpoint(Path(asked)), True)]
        if found:
            return found
        folders = st.Artifact.attached(self.out.name, "status.json")
        if len(folders) > 1:
            raise st.ArtifactError(
                f"{len(folders)} unfinished runs of {self.out.name} are attached; remove all but "
                "one from this notebook's inputs:\n  " + "\n  ".join(sorted(map(str, folders)))
            )
        return [(f / "last.pt", False) for f in folders if (f / "last.pt").is_file()]

    def _asked_checkpoint(self, path: Path) -> Path:
        """Return the file that `resume_from` names: itself, or the last.pt in that folder."""
        if path.is_file():
            return path
        found = [*path.glob("last.pt")] or sorted(path.rglob("last.pt"))
        if len(found) != 1:
            raise st.ArtifactError(
                f"resume_from {path} holds {len(found)} checkpoints (last.pt); name one of them."
            )
        return found[0]

    def resume(self) -> None:
        """Load the first of `checkpoints()` that fits; ArtifactError if the processes' differ."""
        for path, asked in self.checkpoints():
            if self.load(path, asked):
                break
        at = self.progress
        # On several machines, each reads its own copy of outputs/.
        places = _gather((at.epoch, at.step, at.phase))
        if len(set(places)) > 1:
            raise st.ArtifactError(
                f"The machines have different checkpoints (epoch, step, phase: {places}). Copy "
                "outputs/ of the first to the others again."
            )

    def load(self, path: Path, asked: bool) -> bool:
        """Load a checkpoint, that of another run only if `asked`. Returns whether it was loaded."""
        at = self.progress
        self._say(f"reading {path}")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            # If the run that wrote last.pt has been finished since, this is a new run.
            finished = path == self.out / "last.pt" and state["began"] != at.began
            if not asked and (finished or state["key"] != at.key):
                if not finished:
                    self._say(f"{path} is of a run with other settings or data, and is not used")
                return False
            at.load(state, self.rank)
        except Exception as error:  # zipfile, unpickler and load_state_dict each have their own
            raise st.ArtifactError(
                f"{path} is not a checkpoint of this model and data: {str(error)[:300]}\n"
                + ("Set resume_from to another one." if asked else "Delete it to start again.")
            ) from None
        self._say(f"resuming after {at.epoch} epochs and {at.step} steps")
        return True


def train_worker(job: dict) -> None:
    """Train a run's captioner as one of its processes; started by `Run.launch`."""
    import signal

    try:
        trainer = Trainer(job)

        def ask(number, _):
            trainer.stop = f"asked to stop ({signal.Signals(number).name})"

        # The ways in which people, schedulers, torchrun and `launch` ask a process to end.
        signal.signal(signal.SIGTERM, ask)
        signal.signal(signal.SIGINT, ask)
        trainer.run()
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        settings, recipe = job["settings"], st.TrainSettings(**job["settings"]).resolved()
        raise st.ArtifactError(
            f"Out of memory at batch_size={recipe['batch_size']}: try accumulate="
            f"{2 * settings['accumulate']} (same result in less memory), then batch_size="
            f"{max(1, recipe['batch_size'] // 2)}, then max_caption_length="
            f"{min(25, recipe['max_caption_length'] // 2)}."
        ) from None


def train(run: st.Run):
    """Train a run's captioner on the results of 01 and 02, on all GPUs or on the CPU.

    Returns the history as a pandas DataFrame, one row per epoch; `run.out` holds model/, last.pt,
    history.csv and examples.csv. If training stops early, these cover the epochs so far, and a
    printed sentence says how to resume; before the end of the first one there is only last.pt.
    """
    import pandas as pd

    extracted, prepared = (run.reads[stage] for stage in st.STAGES["03_train_dual_t4"])
    # Verified once here, and not by each worker process.
    for name in ("images.csv", "skipped.csv", "features.npy", "features_flip.npy"):
        if name in extracted:
            extracted / name
    for name in ("captions.csv", "vocab.json"):
        prepared / name
    run.launch("train")
    if stopped := run.stopped():
        print(
            f"Training stopped after {stopped['epoch']} of {stopped['epochs']} epochs and "
            f"{stopped['step']} steps: {stopped['reason']}. Run this notebook again, with the same "
            "settings: it resumes there. On Kaggle, first add the output of this version as "
            "an input of the notebook."
        )
    path = run.out / "history.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def calibrate(run: st.Run, storyteller: st.Storyteller) -> np.ndarray:
    """Fit a captioner's confidence on the validation photos, and save it in `run.out`/model.

    Measures which CIDEr-D goes with which score, as a share of what people reach: each photo's
    first caption against its others. Returns the confidence of each validation photo's caption.
    """
    extracted, prepared = (run.reads[stage] for stage in st.STAGES["03_train_dual_t4"])
    data = st.CaptionData.load(extracted.folder, prepared.folder)
    features = st.Features(extracted / "features.npy", storyteller.pooled, storyteller.device)
    photos, references = data.of("val")
    hypotheses = st.generate(storyteller.captioner, features, photos, progress=True)
    found = [best for best, *_ in hypotheses]
    scores = np.array([hypothesis.score for hypothesis in found])  # (N,)
    words = [storyteller.vocab.decode(hypothesis.ids) for hypothesis in found]
    others = st.CiderD([group[1:] or group for group in references])
    people = others.score([group[0] for group in references]).mean() or 1  # they may have no word
    shares = st.CiderD(references).score(words) / people  # (N,)
    train, vectors = (features.vectors(rows) for rows in (data.rows["train"], photos))  # (N, D)
    storyteller.calibrate(scores, shares, vectors, train)
    storyteller.save_pretrained(run.out / "model")
    return np.array(storyteller.confidence(scores, vectors))


def loss_curves(history, model: Path):
    """Draw losses and CIDEr-D over the epochs of `train`'s history, with a dot at the kept one.

    model  its folder, whose config.json says which epoch was kept and by what it was chosen

    Returns a matplotlib Figure.
    """
    kept = st.read_json(model / "config.json")["training"]
    figure, (left, right) = st.new_figure(9, 3, 1, 2)
    left.plot(history["epoch"], history["train_loss"], label="training (with dropout)")
    left.plot(history["epoch"], history["val_loss"], label="validation", color="C1")
    left.set(xlabel="epoch", ylabel="negative log-likelihood a token")
    left.legend()
    right.plot(history["epoch"], history["val_cider"], color="#55a868")
    right.set(xlabel="epoch", ylabel="CIDEr-D, validation", ylim=(0, None))
    best = history[history["epoch"] == kept["best_epoch"]]  # a row
    if kept["select_by"] == "loss":
        left.plot(best["epoch"], best["val_loss"], "o", color="C1")
    else:
        right.plot(best["epoch"], best["val_cider"], "o", color="#55a868")
    return figure
