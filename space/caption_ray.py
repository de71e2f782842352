"""Caption photos on many machines: `caption --ray [ADDRESS]`, by Ray Data.

    python storyteller_utils.py caption photos/ --out captions --ray
    python storyteller_utils.py caption s3://bucket/photos --out s3://bucket/captions --ray auto
    python storyteller_utils.py caption "gs://b/{000..999}.tar" --out gs://b/captions --ray auto

The rows are the same as on one machine, in Parquet files in the folder --out. ADDRESS is that of a
cluster (HOST:PORT, or auto for the one that this machine belongs to); without it, the cores and
GPUs of this machine are the cluster. A cluster's machines must share the folders or buckets and
have this project's packages installed.

The photos are listed in a manifest, tasks fetch them, and a pool of actors, one per GPU or core,
captions them. To resume, whatever ended the run, repeat the command: it also retries photos that
failed. OUT/.job holds the manifest, the checkpoint, and the captioner and options of the rows.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import caption as command
import torch
from filelock import FileLock, Timeout

import storyteller_utils as st

# Before ray is imported: otherwise it reports usage statistics, and warns of what is intended.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset
    import pyarrow.parquet as pq
    import ray
    import ray.data
    from caption_fetch import Place, Tries, fetch
    from pyarrow import fs
    from ray.data.checkpoint import CheckpointConfig
except ImportError:
    raise st.ArtifactError("--ray needs a package: pip install 'ray[data]>=2.60'") from None

SPARE = 2  # cores for tasks that read, filter, fetch and write: without them, everything hangs
BLOCK = 256  # photos that are written and checkpointed together, at most
MEMORY = 3 << 29  # bytes an actor takes with its captioner, on a CPU
# How often an actor that dies is restarted, and its batch retried. A photo that crashes its process
# takes two tries.
RESTARTS, RETRIES = 200, 32
MANIFEST = pa.schema(
    {
        "file_name": pa.string(),
        "root": pa.string(),  # of its file system, "" for this machine's
        "path": pa.string(),  # of the photo, or of the shard that holds it
        "offset": pa.int64(),  # of its bytes in there
        "size": pa.int64(),  # -1: the whole file
        "error": pa.string(),
    }
)
ROWS = command.parquet_schema()


# The manifest ------------------------------------------------------------------------------------


def list_photos(inputs: Iterable[str], folder: Path | None) -> Iterator[dict]:
    """Yield the manifest's rows: where each photo is, including those in shards."""

    def listed(source: tuple[Place, str]) -> list[dict]:
        place, name = source
        if place.path.lower().endswith(".tar"):
            return list(_members(place, name))
        return [_entry(name, place)]

    # Many shards at a time: each takes many small reads, and a bucket answers them slowly.
    sources = _sources(inputs, folder)
    return itertools.chain.from_iterable(command.ahead(listed, sources, threads=16, depth=64))


def _sources(inputs: Iterable[str], folder: Path | None) -> Iterator[tuple[Place, str]]:
    """Yield photos and shards with their names."""
    for given in inputs:
        if "://" in given:
            yield from _remote(given)
            continue
        for path in command.find_files([given]):
            # A list may name objects, and `Path` takes two slashes for one.
            uri = re.sub(r"^(\w+):/(?!/)", r"\1://", str(path))
            if "://" in uri:
                yield from _remote(uri)
            else:
                place = Place.of(path)
                yield place, command.name_photo(path, folder) if folder else place.path


def _remote(uri: str) -> Iterator[tuple[Place, str]]:
    """Yield the photos and shards of scheme://bucket/object, /folder or /numbered-{00..99}."""
    if numbered := command.numbered_names(uri):
        for each in numbered:
            yield from _remote(each)
        return
    place = Place.of(uri)
    if _is_source(place.path):
        yield place, str(place)
        return
    try:
        found = place.files.get_file_info(fs.FileSelector(place.path, recursive=True))
    except OSError as error:
        raise st.ArtifactError(f"{uri} cannot be listed: {error}") from None
    for info in sorted(found, key=lambda info: info.path):
        if info.type == fs.FileType.File and _is_source(info.path):
            yield place.at(info.path), str(place.at(info.path))


def _is_source(path: str) -> bool:
    return command.is_photo(path) or path.lower().endswith(".tar")


def _members(place: Place, name: str) -> Iterator[dict]:
    """Yield the photos of a shard by their byte ranges, so that each is fetched on its own."""
    try:
        with (
            place.files.open_input_file(place.path) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in command.photo_members(tar):
                inside = f"{name}/{member.name}"
                yield _entry(inside, place, member.offset_data, member.size)
    except (OSError, EOFError, tarfile.TarError) as error:
        error = f"{Path(place.path).name} cannot be read: {error}"
        yield _entry(name, place, error=error)


def _entry(name: str, place: Place, offset: int = 0, size: int = -1, error: str = "") -> dict:
    values = (name, place.root, place.path, offset, size, error)
    return dict(zip(MANIFEST.names, values, strict=True))


def write_manifest(rows: Iterable[dict], place: Place) -> set[int]:
    """Write a manifest, each name once. Returns the hashes of the names."""
    names: set[int] = set()

    def new(row: dict) -> bool:
        before = len(names)
        names.add(hash(row["file_name"]))
        return len(names) > before

    rows = filter(new, rows)
    place.files.create_dir(os.path.dirname(place.path))
    with pq.ParquetWriter(place.path, MANIFEST, filesystem=place.files) as writer:
        while group := list(itertools.islice(rows, 10_000)):
            writer.write_table(pa.Table.from_pylist(group, MANIFEST))
    return names


# What the cluster does ---------------------------------------------------------------------------


class Captions:
    """Decode and caption fetched photos, on the GPU or the core of this actor."""

    def __init__(self, model: str, options: dict, captions: int, job: "Job", tries):
        torch.set_num_threads(1)
        self.job, self.tries = job, tries
        start = ray.get_runtime_context().get_actor_id()
        if ray.get(tries.begin.remote(start)) == 3:
            raise st.ArtifactError("Loading the captioner crashed its process three times.")
        (self.storyteller, *_) = command.load_captioners(model, options)
        ray.get(tries.end.remote(start))
        self.options, self.captions = options, captions

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        if not rows:
            return ROWS.empty_table()
        whole = f"{len(rows)} from {rows[0]['file_name']}"
        if ray.get(self.tries.begin.remote(whole)):
            made = [self.alone(row) for row in rows]
        else:
            made = self.caption(rows)
        ray.get(self.tries.end.remote(whole))
        return pa.Table.from_pylist(made, ROWS)

    def alone(self, row: dict) -> dict:
        """Caption a photo of a batch that crashed its process, unless this photo did so."""
        if ray.get(self.tries.begin.remote(row["file_name"])):
            error = "could not be captioned: it crashed the process twice"
            return {"file_name": row["file_name"], "error": error}
        (made,) = self.caption([row])
        ray.get(self.tries.end.remote(row["file_name"]))
        return made

    def caption(self, rows: list[dict]) -> list[dict]:
        """Return the rows of fetched photos, made as `caption` makes them in one process."""
        photos = (command.Photo(row["file_name"], row["data"], row["error"]) for row in rows)
        batches = command.caption_photos(
            photos,
            [self.storyteller],
            self.options,
            self.captions,
            self.job.batch,
            self.job.workers,
        )
        return [row for pairs in batches for _, row in pairs]


# The job -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What the cluster is to do.

    out      the folder of the Parquet files
    batch    photos that are captioned at a time
    workers  threads of an actor that decode photos
    """

    out: Place
    batch: int
    workers: int

    def inside(self, name: str) -> Place:
        """Return a place in OUT/.job, which readers of the folder skip."""
        return self.out.at(f"{self.out.path}/.job/{name}")


def run(arguments: argparse.Namespace) -> int:
    """Caption on a cluster. Returns how many photos failed."""
    check_arguments(arguments)
    options = command.options_of(arguments)
    storyteller = st.Storyteller.from_pretrained(arguments.model)
    job = Job(Place.of(arguments.out), arguments.batch, arguments.workers)
    meta = {"captioner": command.fingerprint(storyteller), "captions": arguments.captions}
    with claim(job, options | meta, arguments.overwrite):
        folder = None if job.out.root else Path(job.out.path).parent
        manifest = job.inside("manifest.parquet")
        names = write_manifest(list_photos(arguments.photos, folder), manifest)
        if not names:
            raise st.ArtifactError(f"No photos in {', '.join(arguments.photos)}.")
        before = Written.read(job.out, strict=False)
        if before.failed:
            forget_failures(job)
            before = Written.read(job.out, strict=False)
        began = time.monotonic()
        if names - before.names:
            run_on_cluster(arguments, options, job, len(names))
        written = Written.read(job.out)
        report(written, before, time.monotonic() - began)
        written.check(names, job.out)
    return written.failed


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for arguments that do not go with --ray."""
    if not arguments.out or arguments.to not in (None, "parquet"):
        raise ValueError("--ray writes Parquet into a folder: --out FOLDER.")
    if arguments.xmp or arguments.full_name:
        raise ValueError("--ray writes no files beside the photos.")
    if not re.fullmatch(r"local|auto|[\w.-]+:\d+", arguments.ray):
        raise ValueError(f"--ray {arguments.ray}: this is not HOST:PORT. Put --ray last.")


@contextlib.contextmanager
def claim(job: Job, meta: dict, overwrite: bool) -> Iterator[None]:
    """Claim an output for this command, and check what wrote it.

    Raises ArtifactError for another captioner or other options, unless `overwrite`.
    """
    files, note = job.out.files, job.inside("meta.json").path
    if files.get_file_info(job.out.path).type == fs.FileType.File:
        raise st.ArtifactError(f"{job.out} is a file; --ray writes a folder of Parquet files.")
    files.create_dir(os.path.dirname(note))
    with _lock(job):
        if overwrite:
            clear(job)
        before = {}
        if files.get_file_info(note).type == fs.FileType.File:
            with files.open_input_file(note) as file:
                before = json.loads(file.read())
        meta = json.loads(json.dumps(meta))  # tuples as the lists that they become
        if before or Written.read(job.out, strict=False).names:
            command.check_meta(str(job.out), before, meta)
        with files.open_output_stream(note) as file:
            file.write(json.dumps(meta, ensure_ascii=False, indent=1).encode())
        yield


def clear(job: Job) -> None:
    """Delete the rows of an output and their records in .job; any other file stays."""
    files = job.out.files
    for info in files.get_file_info(fs.FileSelector(job.out.path)):
        if info.type == fs.FileType.File and info.path.endswith(".parquet"):
            files.delete_file(info.path)
    files.delete_dir_contents(job.inside("checkpoint").path, missing_dir_ok=True)
    if files.get_file_info(job.inside("meta.json").path).type == fs.FileType.File:
        files.delete_file(job.inside("meta.json").path)


@contextlib.contextmanager
def _lock(job: Job) -> Iterator[None]:
    """Keep a second command out of the same folder; buckets have no locks."""
    if job.out.root:
        yield
        return
    lock = FileLock(job.inside("lock").path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise st.ArtifactError(f"Another process is writing {job.out}.") from None
    try:
        yield
    finally:
        lock.release()


def run_on_cluster(arguments: argparse.Namespace, options: dict, job: Job, count: int) -> None:
    """Start or join a cluster and caption what the checkpoint does not have."""
    with tempfile.TemporaryDirectory() as folder:
        local = arguments.ray == "local"
        model = working_folder(arguments.model, Path(folder), local)
        connect(arguments.ray, folder)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            pool = room(nodes, os.cpu_count() if local else None)
            if not pool.gpus:
                job = dataclasses.replace(job, workers=1)
            # A small job in small blocks, so that every actor has some.
            block = min(BLOCK, max(16, count // (4 * pool.actors)))
            captions = read_manifest(job, block).map_batches(
                Captions,
                fn_constructor_args=(model, options, arguments.captions, job, Tries.remote()),
                batch_format="pyarrow",
                batch_size=block,
                num_cpus=pool.cpus,
                num_gpus=pool.gpus or None,
                compute=ray.data.ActorPoolStrategy(size=pool.actors),
                max_restarts=RESTARTS,
                max_task_retries=RETRIES,
            )
            captions.write_parquet(job.out.path, filesystem=job.out.files)
        except KeyboardInterrupt:
            raise st.ArtifactError("Stopped; repeat the command to resume.") from None
        except ray.exceptions.RayError as error:
            *_, last = str(error).strip().splitlines()
            raise st.ArtifactError(
                f"The cluster gave up: {last[:300]} Repeat the command to resume."
            ) from error
        finally:
            ray.shutdown()


def working_folder(model: str, folder: Path, local: bool) -> str:
    """Copy what the machines need into a folder. Returns the captioner's name there."""
    here = Path(__file__).resolve().parent
    sources = [
        here / f"{name}.py" for name in ("caption", "caption_fetch", "caption_ray", "caption_xmp")
    ]
    for path in [*sources, Path(st.__file__)]:
        shutil.copy(path, folder / path.name)
    if not Path(model).is_dir():
        return model  # on the Hub
    if local:
        return os.path.abspath(model)
    shutil.copytree(model, folder / "model")
    return "model"


def connect(address: str, folder: str) -> None:
    """Join a cluster, or start one on this machine, whose processes find modules in `folder`."""
    # Ray's threads begin before a network asks malloc to keep its memory: set from the start, they
    # have no heaps of their own, which end at 64 MB and would return a layer's memory each time.
    environment = {"working_dir": folder, "env_vars": {"MALLOC_ARENA_MAX": "1"}}
    options = {"address": address, "runtime_env": environment, "log_to_driver": False}
    if address == "local":
        # More cores than there are, since the spare ones mostly wait for disks and buckets.
        options |= {"num_cpus": (os.cpu_count() or 1) + 2 * SPARE, "include_dashboard": False}
    try:
        if ":" in address:  # Ray would try for ten minutes or more
            host, port = address.split(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(logging_level="ERROR", **options)
    except (OSError, RuntimeError) as error:
        raise st.ArtifactError(
            f"There is no Ray cluster at {address}, or it needs RAY_AUTH_MODE=token: {error}"
        ) from None


@dataclass(frozen=True)
class Pool:
    """How many actors a cluster has room for, and the cores and GPUs that each asks for."""

    actors: int
    cpus: float
    gpus: int


def room(nodes: list[dict[str, float]], most: int | None = None) -> Pool:
    """Choose the actors for a cluster whose nodes have these resources, `most` at most.

    Raises ValueError if there is no room: Ray would wait forever, without a message.
    """
    cores = [int(node.get("CPU", 0)) for node in nodes]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    memory = sum(node.get("memory", 0) for node in nodes)
    actors = min(sum(cores) - SPARE, most or sum(cores), gpus or int(memory / MEMORY))
    if actors < 1:
        raise ValueError(
            f"The Ray cluster has {sum(cores)} cores and {memory / 2**30:.1f} GiB; captioning "
            f"needs {SPARE + 1} cores and {MEMORY / 2**30} GiB."
        )
    # When a node is lost, its actors start again on the others: they must not take all cores there.
    lost = max(cores) if len(cores) > 1 else 0
    share = (sum(cores) - lost - SPARE) / actors
    return Pool(actors, max(0.1, min(1.0, round(share - 0.05, 1))), min(gpus, 1))


def read_manifest(job: Job, block: int) -> "ray.data.Dataset":
    """Return the photos that have no row yet, fetched, in blocks."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # It announces another way to limit restarts, which 2.60 does not have yet.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    context.checkpoint_config = CheckpointConfig(
        id_column="file_name",
        checkpoint_path=job.inside("checkpoint").path,
        override_filesystem=job.out.files,
        # Otherwise, repeating a finished command would write every row again.
        delete_checkpoint_on_success=False,
    )
    # From a file, since Ray skips finished photos only when it reads; in blocks, since it
    # checkpoints whole blocks, and a million paths fit into one.
    photos = ray.data.read_parquet(job.inside("manifest.parquet").path, filesystem=job.out.files)
    photos = photos.repartition(target_num_rows_per_block=block)
    # Not as many cores as an actor has, or Ray fuses both, and fetching waits for captioning.
    return photos.map_batches(fetch, batch_format="pyarrow", batch_size=None, num_cpus=0.45)


@dataclass(frozen=True)
class Written:
    """What an output holds: the hashes of its photos' names, its rows, and those with errors."""

    names: set[int]
    rows: int
    failed: int

    @classmethod
    def read(cls, out: Place, strict: bool = True) -> "Written":
        """Read an output; unless `strict`, a file that a killed process left is skipped."""
        names: set[int] = set()
        rows = failed = 0
        data = open_rows(out, ROWS, strict)
        for batch in data.to_batches(columns=["file_name", "error"]):
            names.update(map(hash, batch["file_name"].to_pylist()))
            rows += len(batch)
            failed += len(batch) - batch["error"].null_count
        return cls(names, rows, failed)

    def check(self, names: set[int], out: Place) -> None:
        """Raise ArtifactError unless every photo has a row, and none has two."""
        if missing := len(names - self.names):
            raise st.ArtifactError(
                f"{missing:,} photos have no row in {out}. Repeat the command to resume; all "
                "machines must share the folder."
            )
        if self.rows > len(self.names):
            raise st.ArtifactError(f"{self.rows - len(self.names):,} rows in {out} are duplicates.")


def open_rows(place: Place, schema: pa.Schema, strict: bool = True) -> pyarrow.dataset.Dataset:
    """Open the Parquet files in a folder, except, unless `strict`, broken ones."""
    listed = place.files.get_file_info(fs.FileSelector(place.path, allow_not_found=True))
    return pyarrow.dataset.dataset(
        [info.path for info in listed if info.path.endswith(".parquet")],
        schema=schema,
        format="parquet",
        filesystem=place.files,
        exclude_invalid_files=not strict,
    )


def forget_failures(job: Job) -> None:
    """Remove the rows with errors, so that their photos are tried again."""
    files = job.out.files
    data = open_rows(job.out, ROWS, strict=False)
    failed = data.to_table(columns=["file_name"], filter=pc.field("error").is_valid())["file_name"]

    def forget(path: str) -> None:
        table = pq.read_table(path, filesystem=files)
        kept = table.filter(pc.invert(pc.is_in(table["file_name"], failed)))
        if not len(kept):
            files.delete_file(path)
        elif len(kept) < len(table):
            temporary = job.inside(f"kept-{os.path.basename(path)}").path
            pq.write_table(kept, temporary, filesystem=files)
            files.move(temporary, path)

    checkpoint = open_rows(job.inside("checkpoint"), ROWS.empty_table().select([0]).schema, False)
    # The checkpoint first: after a kill in between, the rows are found and removed again. The other
    # way round, photos without a row would count as done.
    for dataset in (checkpoint, data):
        for _ in command.ahead(forget, dataset.files, threads=16, depth=64):
            pass


def report(written: Written, before: Written, seconds: float) -> None:
    """Print how many photos there are now, and how fast they came."""
    new = written.rows - before.rows
    print(
        f"{new:,} photos done, {before.rows:,} before, {written.failed:,} of all failed: "
        f"{new / max(seconds, 0.01):.1f} per second",
        file=sys.stderr,
    )
