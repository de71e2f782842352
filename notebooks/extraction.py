"""Extract features of photos in one process for each GPU, for 01_extract_features."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import storyteller_utils as st


class _FeatureFiles:
    """The features of all photos, written in place, row by row, by any number of processes.

    out    the stage's folder; until `close`, the files are in its hidden folder .partial
    views  their names without suffix
    shape  (N, R, D)
    key    hash of everything that a row depends on; files with another key are replaced

    A batch is done once its line is in the journal, which is written after its rows: a killed
    process loses only the batch it was working on. `Run.finish` removes .partial.
    """

    HEADER = 128  # bytes: numpy pads its header to a multiple of 64, and this one takes 80 to 110

    def __init__(self, out: Path, views: Sequence[str], shape: tuple[int, ...], key: str):
        self.out, self.views, self.shape, self.key = out, views, shape, key
        self.row_bytes = 2 * math.prod(shape[1:])
        self.journal = out / ".partial/journal.jsonl"

    def path(self, view: str) -> Path:
        return self.journal.with_name(f"{view}.npy")

    def begin(self) -> None:
        """Keep an earlier run's files if the key is the same, or make new ones. In one process."""
        lines = _read_lines(self.journal)
        size = self.HEADER + self.shape[0] * self.row_bytes
        paths = [self.path(view) for view in self.views]
        if self.facts():  # they were complete, and have been moved
            paths = [self.out / path.name for path in paths]
            size -= self.facts()["skipped"] * self.row_bytes
        whole = all(path.is_file() and path.stat().st_size == size for path in paths)
        if whole and lines and lines[0] == {"key": self.key}:
            return
        paths = [self.path(view) for view in self.views]
        shutil.rmtree(self.journal.parent, ignore_errors=True)
        with st.writing(self.journal.parent):
            self.journal.parent.mkdir(parents=True)
            for path in paths:
                np.lib.format.open_memmap(path, "w+", np.float16, self.shape)
            self._append({"key": self.key})

    def facts(self) -> dict:
        """Return the facts that were given to `close`; {} before."""
        lines = _read_lines(self.journal)
        return lines[-1].get("facts", {}) if lines else {}

    def done(self) -> dict[int, list]:
        """Return the batches that are written: first row -> the notes on each of its photos."""
        return {line["row"]: line["notes"] for line in _read_lines(self.journal) if "row" in line}

    def write(self, row: int, features: dict[str, np.ndarray], notes: list) -> None:
        """Write a batch, (B, R, D) for each view, from `row` on."""
        with st.writing(self.journal.parent):
            for view, rows in features.items():
                with open(self.path(view), "rb+") as file:
                    file.seek(self.HEADER + row * self.row_bytes)
                    file.write(rows.tobytes())
            self._append({"row": row, "notes": notes})

    def close(self, names: Sequence[str], **facts) -> None:
        """Write images.csv and skipped.csv, and put the features into place. In one process.

        Raises ArtifactError when more than 1 % of the photos, and more than one, are unreadable.
        """
        notes = [note for _, batch in sorted(self.done().items()) for note in batch]
        bad = [row for row, (_, _, problem) in enumerate(notes) if problem]
        st.write_csv(
            self.out / "skipped.csv", ["image", "reason"], [(names[i], notes[i][2]) for i in bad]
        )
        if len(bad) > max(1, len(names) / 100) or len(bad) == len(names):
            raise st.ArtifactError(
                f"{len(bad)} of {len(names)} photos cannot be read, more than 1 %. The first is "
                f"{names[bad[0]]}: {notes[bad[0]][2]}. Repair or remove those listed in "
                f"{self.out / 'skipped.csv'}."
            )
        order = self._close_up(bad)
        rows = [(row, names[i], *notes[i][:2]) for row, i in enumerate(order)]
        st.write_csv(self.out / "images.csv", ["row", "image", "bytes", "sha256"], rows)
        for view in reversed(self.views):
            with st.writing(self.path(view)), open(self.path(view), "rb+") as file:
                os.fsync(file.fileno())
                about = {"descr": "<f2", "fortran_order": False}
                np.lib.format.write_array_header_1_0(
                    file, {**about, "shape": (len(order), *self.shape[1:])}
                )
                file.truncate(self.HEADER + len(order) * self.row_bytes)
            os.replace(self.path(view), self.out / f"{view}.npy")
        self._append({"facts": facts | {"photos": len(order), "skipped": len(bad)}})

    def _close_up(self, bad: Sequence[int]) -> list[int]:
        """Move the last readable photos' rows into the gaps. Returns the photo of each row.

        At most one in a hundred is moved, and moving them again does no harm.
        """
        count = self.shape[0] - len(bad)
        gaps = [row for row in bad if row < count]
        movers = sorted(set(range(count, self.shape[0])) - set(bad))
        order = np.arange(count)
        order[gaps] = movers
        for view in self.views:
            features = np.load(self.path(view), mmap_mode="r+")
            features[gaps] = features[movers]
        return order.tolist()

    def _append(self, line: dict) -> None:
        # A single write, which the system appends as a whole whatever other processes write. The
        # line break comes first, in case the previous line was cut off by a kill.
        with open(self.journal, "ab", buffering=0) as file:
            file.write(b"\n" + json.dumps(line).encode())


def _read_lines(path: Path) -> list[dict]:
    """Read JSON lines, without those that are cut off; [] where there is no such file."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def _read_batch(
    paths: Sequence[Path], how: str, side: int
) -> tuple[Tensor, list[tuple[int, str, str]]]:
    """Decode photos into (B, 3, side, side), uint8; an unreadable photo stays black.

    Returns also, for each, its number of bytes, their sha256, and what is wrong with it.
    """
    photos = torch.zeros(len(paths), 3, side, side, dtype=torch.uint8)
    notes = []
    for i, path in enumerate(paths):
        data, problem = b"", ""
        try:
            data = path.read_bytes()
            photos[i] = st.preprocess(st.open_photo(data), how, side)
        except (ValueError, OSError) as error:
            problem = " ".join(str(error).split())
        notes.append((len(data), hashlib.sha256(data).hexdigest(), problem))
    return photos, notes


def read_photos(
    batches: Iterable[Sequence[Path]], how: str = "squash", side: int = st.PHOTO_SIZE
) -> Iterator[tuple[Tensor, list[tuple[int, str, str]]]]:
    """Decode batches of photos in order, in threads that run a few batches ahead.

    Yields for each batch the photos (B, 3, side, side), uint8, black if unreadable, and for each
    photo its number of bytes, their sha256, and what is wrong with it.
    """
    workers = max(2, min(8, os.cpu_count() or 2))
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for paths in batches:
            waiting.append(pool.submit(_read_batch, paths, how, side))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def extract_worker(job: dict) -> None:
    """Extract the features of a run's photos as one of its processes; started by `Run.launch`."""
    settings, out, device = (
        st.ExtractSettings(**job["settings"]),
        Path(job["out"]),
        st.default_device(),
    )
    dataset = st.Dataset.open(Path(job["dataset"]))
    rank, world = st.join_processes(device)
    names = dataset.some(settings.max_photos)
    paths = [dataset.photos[name] for name in names]
    dtype, reason = st.choose_precision(device, settings.precision)
    backbone = st.load_backbone(settings.backbone, settings.backbone_weights).prepare(device, dtype)
    views = {"features": False}  # name -> mirrored
    if settings.flips:
        views["features_flip"] = True
    shape = (len(names), *_shape_of_a_photo(backbone, settings))
    key = [names, _versions(paths), shape, backbone.sha256, str(dtype), list(views)]
    key += [settings.preprocessing, settings.photo_size, settings.batch_size]
    files = _FeatureFiles(out, list(views), shape, st.sha256(key))
    if rank == 0:
        files.begin()
    if world > 1:
        torch.distributed.barrier()
    if files.facts():  # from a run that ended before it wrote its manifest
        return
    # A batch with an unreadable photo is read again: a network drive may have been unavailable.
    done = {row for row, notes in files.done().items() if not any(note[2] for note in notes)}
    size = settings.batch_size
    todo = [row for row in range(rank * size, len(names), world * size) if row not in done]
    if rank == 0:
        before = f", {len(done)} batches done before" if done else ""
        print(f"{backbone.name} on {world} x {device.type}, {reason}{before}", file=sys.stderr)
    batches = read_photos(
        [paths[row : row + size] for row in todo], settings.preprocessing, settings.photo_size
    )
    total = sum(len(paths[row : row + size]) for row in todo)
    with st.progress(total=total, unit="photo", disable=rank > 0) as bar:
        for row, (photos, notes) in zip(todo, batches, strict=True):
            features = {}
            for view, mirrored in views.items():
                seen = backbone(photos.flip(-1) if mirrored else photos, settings.regions)
                features[view] = seen.half().cpu().numpy()  # (B, R, D)
            files.write(row, features, notes)
            bar.update(len(notes))
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        for name in ("backbone.safetensors", "features_flip.npy"):
            (out / name).unlink(missing_ok=True)  # an earlier run's
        if backbone.name not in st.BACKBONES_FROM_PIP:
            backbone.save(out / "backbone.safetensors")
        about = {"backbone": backbone.name, "backbone_sha256": backbone.sha256}
        about["precision"] = str(dtype)
        files.close(names, **about, regions=shape[1], width=shape[2])


def _versions(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Return each file's size and time, which reveal a photo that was replaced."""
    stats = [path.stat() if path.exists() else path.lstat() for path in paths]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _shape_of_a_photo(backbone: st.Backbone, settings: st.ExtractSettings) -> tuple[int, ...]:
    """Return (R, D), measured on a blank photo; ValueError if the backbone refuses that size."""
    side = settings.photo_size
    blank = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    try:
        return tuple(backbone(blank, settings.regions).shape[1:])
    except Exception as error:  # each family raises its own
        raise ValueError(
            f"photo_size is {side}, which {backbone.name} does not take: {str(error)[:200]}"
        ) from None


def extract(run: st.Run) -> dict:
    """Extract the features of a run's photos, on all GPUs or the CPU, resuming a stopped run.

    Returns the facts for `run.finish`. `run.out` holds features.npy, images.csv, which names each
    row's photo, and skipped.csv; with flips=True also features_flip.npy, of the mirrored photos.
    """
    # Until this is done, an earlier run's files are still there.
    st.set_status(run.out, stopped={"reason": "it was stopped"})
    run.launch("extract")
    st.set_status(run.out, stopped={})
    return _read_lines(run.out / ".partial/journal.jsonl")[-1]["facts"]
