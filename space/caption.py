"""Caption photos from the command line: single ones, folders or shards.

    python storyteller_utils.py caption photo.jpg
    python storyteller_utils.py caption photos/ --out captions.jsonl
    python storyteller_utils.py caption "shards/shard-{00000..00099}.tar" --out captions.parquet
    find . -name "*.jpg" -print0 | python storyteller_utils.py caption - --to csv --out captions.csv
    python storyteller_utils.py caption s3://bucket/photos --out s3://bucket/captions --ray auto

Every photo gets a row: {"file_name", "text", "score"}, or {"file_name", "error"} if it cannot be
captioned. file_name is relative to the output's folder if the photo is in it, so that a
metadata.jsonl beside the photos loads as a Hugging Face image folder. Rows are written as they
come. To resume an interrupted run, repeat the command: it skips photos that have a caption and
retries those that failed. OUT.meta.json records the captioner and the options; an output written
with others is refused, unless --overwrite replaces it. With --ray, many machines share the work
(caption_ray.py).
"""

import argparse
import codecs
import contextlib
import csv
import dataclasses
import glob
import io
import itertools
import json
import os
import queue
import re
import sys
import tarfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
import torch  # noqa: E402
from caption_xmp import is_captioned, sidecar, write_sidecar  # noqa: E402

import storyteller_utils as st  # noqa: E402

FORMATS = ("jsonl", "csv", "parquet", "txt")


# Photos ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photo:
    """A photo to caption.

    name    its file_name in the output
    source  its path, its bytes, or a function that reads these from a shard
    error   why there is no photo, if there is none
    """

    name: str
    source: Path | bytes | Callable[[], bytes] | None = None
    error: str = ""


def find_photos(inputs: Iterable[str], folder: Path | None = None) -> Iterator[Photo]:
    """Yield the photos of files, folders, globs, lists (LIST.txt, "-") and shards, in order.

    folder  of the output: photos in it are named relative to it, others by their full path. None:
            photos are named as they are given
    """
    for path in find_files(inputs):
        if path.suffix.lower() == ".tar":
            yield from _shard(path, name_photo(path, folder))
        else:
            yield Photo(name_photo(path, folder), path)


def name_photo(path: Path, folder: Path | None) -> str:
    """Return a photo's file_name: relative to the output's folder if it lies in it."""
    if folder is None:
        return str(path)
    path = Path(os.path.abspath(path))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def find_files(inputs: Iterable[str]) -> Iterator[Path]:
    """Yield the files that files, folders, globs, lists and numbered names stand for, in order."""
    return itertools.chain.from_iterable(map(_paths, inputs))


def numbered_names(given: str) -> list[str]:
    """Return the names that "shard-{00..99}.tar" stands for; [] for a name without such a range."""
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", given)
    if not numbers:
        return []
    first, last = numbers.groups()
    filled = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [given.replace(numbers[0], number, 1) for number in filled]


def is_photo(name: str) -> bool:
    """Return whether a name is that of a photo, and not of a hidden file."""
    path = Path(name)
    return path.suffix.lower() in st.PHOTO_SUFFIXES and not path.name.startswith(".")


def _paths(given: str) -> Iterator[Path]:
    path = Path(given)
    if given == "-":
        yield from _listed(sys.stdin.buffer, Path())
    elif path.is_dir():
        yield from _walk(path)
    elif path.suffix == ".txt" and path.is_file():
        if _is_beside_photo(path):  # its captions, which photos/* brings along
            return
        with open(path, "rb") as file:
            yield from _listed(file, path.parent)
    elif path.exists():
        yield path
    elif numbered := numbered_names(given):
        yield from find_files(numbered)
    elif glob.has_magic(given):
        # Sorted, so that a second run meets the photos in the same order.
        matches = sorted(glob.iglob(given, recursive=True))
        if not matches:
            raise ValueError(f"No file matches {given}.")
        for match in matches:
            yield from _paths(match)
    else:
        yield path  # it does not exist: its row says so


def _is_beside_photo(path: Path) -> bool:
    """Return whether a text file is named after a photo, as --to txt does: dog.txt, dog.jpg.txt."""
    suffixes = [s for suffix in st.PHOTO_SUFFIXES for s in (suffix, suffix.upper())]
    named = [path.with_suffix(suffix) for suffix in suffixes]
    named += [path.with_suffix("")] * is_photo(path.stem)
    return any(photo.is_file() for photo in named)


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the photos in a folder and its subfolders, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if e.name[0] != "."), key=lambda entry: entry.name)
    except OSError:
        yield folder  # it may not be read: its row says so
        return
    for entry in visible:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif is_photo(entry.name):
            yield Path(entry.path)


def _listed(file, folder: Path) -> Iterator[Path]:
    """Yield the paths in a file, one per line or ended by NUL, in `folder` if only found there."""
    rest = b""
    end = None
    for block in iter(lambda: file.read1(1 << 16), b""):
        end = end or (b"\0" if b"\0" in block else b"\n" if b"\n" in block else None)
        *lines, rest = (rest + block).split(end or b"\n")
        for line in lines:
            yield from _existing(line, folder)
    yield from _existing(rest, folder)


def _existing(line: bytes, folder: Path) -> Iterator[Path]:
    # Windows ends lines with \r\n, and may begin a text with a byte order mark.
    text = os.fsdecode(line.rstrip(b"\r").removeprefix(codecs.BOM_UTF8))
    if text:
        path = Path(text)
        beside = folder / path
        # Not Path.exists, which raises for a line that is too long to be a path.
        yield beside if os.path.exists(beside) and not os.path.exists(path) else path


def _shard(path: Path, name: str) -> Iterator[Photo]:
    """Yield the photos of a tar file, each to be read before the next one is requested."""
    try:
        with tarfile.open(path) as tar:
            for member in photo_members(tar):
                yield Photo(f"{name}/{member.name}", tar.extractfile(member).read)
    except (OSError, EOFError, tarfile.TarError) as error:
        yield Photo(name, error=f"{path.name} cannot be read: {error}")


def photo_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the photos in an open tar file."""
    while member := tar.next():
        tar.members = []  # it would keep every member that it has seen
        if member.isfile() and is_photo(member.name):
            yield member


# Captioning --------------------------------------------------------------------------------------


def ahead(function, items: Iterable, threads: int, depth: int) -> Iterator:
    """Yield function(item) for each item, in order; threads are up to `depth` items ahead."""
    waiting: deque = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def load(photo: Photo, storyteller) -> torch.Tensor | str:
    """Decode a photo for the backbone, (3, S, S), or return what is wrong with it."""
    if photo.error:
        return photo.error
    try:
        return storyteller.load(photo.source)
    except ValueError as error:
        return " ".join(str(error).split())
    except Exception as error:
        return f"{photo.name} cannot be read: {type(error).__name__}"


def caption_batch(storyteller, photos: list[torch.Tensor], options: dict) -> list:
    """Caption decoded photos (3, S, S); an unforeseen error costs one photo, not its batch."""
    if not photos:
        return []
    try:
        features = storyteller.extract(torch.stack(photos))  # (B, R, D)
        return storyteller.caption_features(features, attention=False, **options)
    except Exception as error:
        if len(photos) > 1:
            return [c for photo in photos for c in caption_batch(storyteller, [photo], options)]
        return [f"could not be captioned: {type(error).__name__}: {error}"[:300]]


def make_row(name: str, caption, captions: int = 1) -> dict:
    """Return a photo's row; `caption` is a Caption or, where there is none, the reason."""
    if isinstance(caption, str):
        return {"file_name": name, "error": caption}
    row = {"file_name": name, "text": caption.text, "score": round(caption.score, 5)}
    if caption.confidence is not None:
        row["confidence"] = round(caption.confidence, 4)
    if captions > 1:
        best = caption.alternatives[:captions]
        row["captions"] = [text for text, _ in best]
        row["scores"] = [round(score, 5) for _, score in best]
    return row


def caption_loaded(
    storyteller, photos: list[Photo], loaded: list, options: dict, captions: int = 1
) -> list[dict]:
    """Return the rows of photos, given what `load` returned for each."""
    good = [item for item in loaded if not isinstance(item, str)]
    made = iter(caption_batch(storyteller, good, options))
    results = [item if isinstance(item, str) else next(made) for item in loaded]
    return [
        make_row(photo.name, result, captions)
        for photo, result in zip(photos, results, strict=True)
    ]


def caption_photos(
    photos: Iterable[Photo],
    storytellers: list,
    options: dict,
    captions: int = 1,
    batch: int = 64,
    workers: int = 4,
) -> Iterator[list[tuple[Photo, dict]]]:
    """Yield batches of photos and their rows, in order.

    storytellers  one per device; each captions a batch at a time while `workers` threads decode the
                  photos of the next ones
    """
    idle: queue.SimpleQueue = queue.SimpleQueue()
    for storyteller in storytellers:
        idle.put(storyteller)

    def read(photos):
        for photo in photos:
            if callable(photo.source):  # in this thread: a shard is read from start to end
                try:
                    photo = dataclasses.replace(photo, source=photo.source())
                except Exception as error:  # of tarfile, and of what a shard is compressed with
                    photo = Photo(photo.name, error=f"{photo.name} cannot be read: {error}")
            yield photo

    def decode(photo):
        loaded = load(photo, storytellers[0])
        if isinstance(photo.source, bytes):  # its pixels are enough from here on
            photo = dataclasses.replace(photo, source=None)
        return photo, loaded

    def work(pairs):
        photos, loaded = zip(*pairs, strict=True)
        storyteller = idle.get()
        try:
            rows = caption_loaded(storyteller, photos, loaded, options, captions)
        finally:
            idle.put(storyteller)
        return list(zip(photos, rows, strict=True))

    decoded = ahead(decode, read(photos), workers, 2 * batch)
    batches = iter(lambda: list(itertools.islice(decoded, batch)), [])
    yield from ahead(work, batches, len(storytellers), len(storytellers))


# Outputs -----------------------------------------------------------------------------------------


class JsonLines:
    """Rows in a file, one JSON object per line."""

    suffix = ".jsonl"
    header = b""

    def __init__(self, path: Path):
        self.path = path
        self.file: io.BufferedWriter | None = None

    def encode(self, row: dict) -> bytes:
        try:
            return (json.dumps(row, ensure_ascii=False) + "\n").encode()
        except UnicodeEncodeError:  # a file name that is not UTF-8
            return (json.dumps(row) + "\n").encode()

    def decode(self, record: bytes) -> dict:
        return json.loads(record)

    def records(self) -> Iterator[bytes]:
        """Yield the complete records, without one that a killed run left half written."""
        with open(self.path, "rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line

    def begin(self) -> set[int]:
        """Open for appending; return the hashes of the names of photos with captions.

        Rows with errors are removed, since their photos are retried.
        """
        done: set[int] = set()
        with st.replacing(self.path) as temporary, open(temporary, "wb") as file:
            file.write(self.header)
            if self.path.exists():
                for record in self.records():
                    if record == self.header:
                        continue
                    row = self._row(record)
                    if not row.get("error") and hash(row["file_name"]) not in done:
                        done.add(hash(row["file_name"]))
                        file.write(record)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # until `finish`
        return done

    def _row(self, record: bytes) -> dict:
        try:
            row = self.decode(record)
            row["file_name"]
            return row
        except (ValueError, KeyError, TypeError):
            raise st.ArtifactError(
                f"{self.path} holds a line that this command did not write: {record[:60]!r}. Name "
                "another output, or add --overwrite."
            ) from None

    def rows(self) -> Iterator[dict]:
        return (self._row(record) for record in self.records() if record != self.header)

    def has(self, photo: Photo) -> bool:
        """Return whether a photo has a caption that `begin` cannot know of."""
        return False

    def write(self, pairs: list[tuple[Photo, dict]]) -> None:
        # In as few writes as possible, so that a killed process seldom leaves half a row.
        data = b"".join(self.encode(row) for _, row in pairs)
        with st.writing(self.path):
            while data:  # a disk that is nearly full takes a part, and says so only the next time
                data = data[self.file.write(data) :]

    def finish(self) -> None:
        self.file.close()


class Csv(JsonLines):
    """Rows as comma-separated values; lists are stored as JSON."""

    suffix = ".csv"
    columns = ("file_name", "text", "score", "confidence", "captions", "scores", "error")

    def __init__(self, path: Path, captions: int = 1):
        super().__init__(path)
        if captions == 1:
            self.columns = ("file_name", "text", "score", "confidence", "error")
        self.header = (",".join(self.columns) + "\n").encode()

    def encode(self, row: dict) -> bytes:
        text = io.StringIO()
        cells = [row.get(column, "") for column in self.columns]
        cells = [json.dumps(c, ensure_ascii=False) if isinstance(c, list) else c for c in cells]
        csv.writer(text).writerow(cells)  # its own line end, or it would not quote a \r in a name
        return (text.getvalue()[:-2] + "\n").encode("utf-8", "surrogateescape")

    def decode(self, record: bytes) -> dict:
        text = io.StringIO(record.decode("utf-8", "surrogateescape"), newline="")
        (cells,) = csv.reader(text)
        return dict(zip(self.columns, cells, strict=True))

    def records(self) -> Iterator[bytes]:
        # A line break inside quotes does not end a row: there, the number of quotes so far is odd.
        record = b""
        for line in super().records():
            record += line
            if record.count(b'"') % 2 == 0:
                yield record
                record = b""


def parquet_schema():
    """Return the columns of rows in Parquet; those that a row lacks are null."""
    import pyarrow as pa

    strings = pa.list_(pa.string())
    fields = {"file_name": pa.string(), "text": pa.string(), "score": pa.float64()}
    fields |= {"confidence": pa.float64()}
    fields |= {"captions": strings, "scores": pa.list_(pa.float64()), "error": pa.string()}
    return pa.schema(list(fields.items()))


class Parquet(JsonLines):
    """Rows as Parquet, which cannot be appended to: they are JSON lines until `finish`."""

    suffix = ".parquet"

    def __init__(self, path: Path):
        try:
            import pyarrow.parquet  # noqa: F401  # before an hour's work, not after it
        except ImportError:
            raise st.ArtifactError("--to parquet needs a package: pip install pyarrow") from None
        super().__init__(path.with_name(path.name + ".part.jsonl"))
        self.target = path

    def begin(self) -> set[int]:
        import pyarrow.parquet as pq

        if self.target.exists() and not self.path.exists():
            with st.replacing(self.path) as temporary, open(temporary, "wb") as file:
                for group in pq.ParquetFile(self.target).iter_batches():
                    for row in group.to_pylist():
                        file.write(self.encode({k: v for k, v in row.items() if v is not None}))
        return super().begin()

    def finish(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().finish()
        schema = parquet_schema()
        rows = self.rows()
        with st.replacing(self.target) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            while group := list(itertools.islice(rows, 10_000)):
                writer.write_table(pa.Table.from_pylist(group, schema))
        self.path.unlink()


class TextFiles(JsonLines):
    """A text file beside each photo, with one caption per line."""

    def __init__(self, full_name: bool, overwrite: bool):
        self.full_name, self.overwrite = full_name, overwrite
        self.owners: dict[int, int] = {}  # hashes, as millions of names would take too much memory

    def of(self, photo: Photo) -> Path:
        path = Path(photo.source)
        return path.with_name((path.name if self.full_name else path.stem) + ".txt")

    def begin(self) -> set[int]:
        return set()

    def check(self, photo: Photo) -> Photo:
        """Refuse a photo without a place for its file, and the second of two with the same one."""
        if not isinstance(photo.source, Path):
            return Photo(
                photo.name, error=photo.error or "a photo in a shard has no place for .txt"
            )
        path, name = self.of(photo), hash(photo.name)
        if self.owners.setdefault(hash(path), name) == name:
            return photo
        return Photo(photo.name, error=f"{path.name} belongs to another photo; add --full-name")

    def has(self, photo: Photo) -> bool:
        return not photo.error and not self.overwrite and os.path.exists(self.of(photo))

    def write(self, pairs: list[tuple[Photo, dict]]) -> None:
        for photo, row in pairs:
            if "error" in row:
                print(f"{photo.name}: {row['error']}", file=sys.stderr)
            else:
                texts = row.get("captions", [row["text"]])
                st.write_text(self.of(photo), "\n".join(texts) + "\n")

    def finish(self) -> None:
        pass


class Lines(JsonLines):
    """Rows on standard output."""

    def __init__(self, rows: JsonLines | None):
        self.format = rows  # None: the texts alone

    def begin(self) -> set[int]:
        self.file = sys.stdout
        if self.format and self.format.header:
            sys.stdout.write(self.format.header.decode())
        return set()

    def write(self, pairs: list[tuple[Photo, dict]]) -> None:
        for _, row in pairs:
            if self.format:
                sys.stdout.write(self.format.encode(row).decode("utf-8", "backslashreplace"))
            elif "error" in row:
                print(f"{row['file_name']}: {row['error']}", file=sys.stderr)
            else:
                print("\n".join(row.get("captions", [row["text"]])))
        sys.stdout.flush()

    def finish(self) -> None:
        pass


# The command -------------------------------------------------------------------------------------


def fingerprint(storyteller) -> str:
    """Return a hash of what defines a captioner: weights, words, backbone and preprocessing."""
    names = ("vocabulary_sha256", "backbone_sha256", "preprocessing", "photo_size", "regions")
    facts = {name: storyteller.config.get(name) for name in names}
    return st.sha256(facts | {"weights": st.sha256(storyteller.folder / "model.safetensors")})


@contextlib.contextmanager
def claim(path: Path, meta: dict, overwrite: bool) -> Iterator[None]:
    """Claim an output for this command, and check what wrote it.

    OUT.meta.json records the captioner and the options, and is locked meanwhile.

    Raises ArtifactError for another captioner or other options, unless `overwrite`.
    """
    note = path.with_name(path.name + ".meta.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    exists = path.exists() or path.with_name(path.name + ".part.jsonl").exists()
    with open(note, "a+", encoding="utf-8") as file:
        with contextlib.suppress(ImportError):  # without fcntl, there is no such lock
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise st.ArtifactError(f"Another process is writing {path}.") from None
        file.seek(0)
        before = {}
        with contextlib.suppress(ValueError):  # one that is half written says nothing
            before = json.loads(file.read())
        meta = json.loads(json.dumps(meta))  # tuples as the lists that they become
        if exists and not overwrite:
            check_meta(path, before, meta)
        if overwrite:
            for old in (path, path.with_name(path.name + ".part.jsonl")):
                old.unlink(missing_ok=True)
        if before != meta:
            file.truncate(0)
            file.write(json.dumps(meta, ensure_ascii=False, indent=1) + "\n")
            file.flush()
        yield


def check_meta(path: Path | str, before: dict, meta: dict) -> None:
    """Raise ArtifactError if an output's rows come from another captioner or other options."""
    if before != meta:
        names = [name for name in meta if before.get(name) != meta[name]]
        raise st.ArtifactError(
            f"{path} was written by another captioner or with other options ({', '.join(names)} "
            "differ). Name another output, or add --overwrite."
        )


def positive(text: str) -> int:
    """Return a number above 0."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="storyteller_utils.py caption",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTO|FOLDER|GLOB|LIST.txt|SHARDS.tar|-")
    add(
        "--model",
        default=str(st.Storyteller.default_folder()),
        help="folder or Hub id (default: %(default)s)",
    )
    add("--to", choices=FORMATS, help="default: by the suffix of --out, else jsonl")
    add("--out", metavar="FILE|FOLDER", help="default: standard output")
    add("--overwrite", action="store_true", help="replace captions written before")
    add("--full-name", action="store_true", help="--to txt: photo.jpg.txt, not photo.txt")
    add("--xmp", action="store_true", help="also write photo.jpg.xmp, for photo managers")
    add("--replace-descriptions", action="store_true", help="--xmp: people's descriptions too")
    add("--batch", type=positive, default=64, help="photos at a time (default: %(default)s)")
    add(
        "--workers",
        type=positive,
        default=min(8, (os.cpu_count() or 2) + 1),
        help="decoding threads",
    )
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help="on many machines, with Ray")
    default = st.Decoding()
    add("--beam", type=positive, default=default.beam_width, help="width (default: %(default)s)")
    add("--captions", type=positive, default=1, help="how many per photo: the N best, or N samples")
    add("--top-p", type=float, help="sample among the likeliest words of this total probability")
    add("--temperature", type=float, help="sample; below 1: likely words become likelier")
    add("--seed", type=int, help="sample; the same seed, photos and --batch give the same captions")
    add("--start", default="", help="how every caption begins: 'two dogs'")
    add("--must", action="append", default=[], metavar="WORD", help="every caption has this word")
    add("--never", action="append", default=[], metavar="WORD", help="no caption has this word")
    add("--max-chars", type=int, default=0, help="longest caption; 125 for alt text")
    return parser.parse_args(argv)


def options_of(arguments: argparse.Namespace) -> dict:
    """Return the fields of `Decoding` that the arguments stand for."""
    sampling = {
        name: getattr(arguments, name)
        for name in ("top_p", "temperature", "seed")
        if getattr(arguments, name) is not None
    }
    options = {
        "beam_width": max(arguments.beam, arguments.captions),
        "start": arguments.start,
        "must": " ".join(arguments.must),
        "never": " ".join(arguments.never),
        "max_chars": arguments.max_chars,
    }
    if sampling:
        options |= {"method": "sample", "captions": arguments.captions, **sampling}
    return dataclasses.asdict(st.Decoding(**options))


def open_output(arguments: argparse.Namespace):
    """Return the output that the arguments name, and its folder (None on standard output)."""
    out, kind = arguments.out and Path(arguments.out), arguments.to
    if out and not kind and out.suffix[1:] in FORMATS:
        kind = out.suffix[1:]
    kind = kind or "jsonl"
    if kind == "txt":
        if out:
            raise ValueError("--to txt writes a file beside each photo: it goes without --out.")
        return TextFiles(arguments.full_name, arguments.overwrite), None
    if out is None:
        if kind == "parquet":
            raise ValueError("--to parquet needs --out FILE.")
        single = len(arguments.photos) == 1 and Path(arguments.photos[0]).is_file()
        suffix = Path(arguments.photos[0]).suffix.lower()
        plain = single and suffix not in (".txt", ".tar") and sys.stdout.isatty()
        rows = Csv(Path(), arguments.captions) if kind == "csv" else JsonLines(Path())
        return Lines(None if plain and not arguments.to else rows), None
    if arguments.out.endswith(os.sep):  # a folder, also if there is none yet
        out.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        out = out / f"metadata.{kind}"
    out = Path(os.path.abspath(out))
    output = {"jsonl": JsonLines, "csv": Csv, "parquet": Parquet}[kind](
        out, *([arguments.captions] if kind == "csv" else [])
    )
    return output, out.parent


def load_captioners(model: str, options: dict) -> list:
    """Load a captioner for each GPU, or for the CPU; ValueError for options that do not suit it."""
    count = torch.cuda.device_count()
    devices = [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    storytellers = [st.Storyteller.from_pretrained(model, device) for device in devices]
    config = storytellers[0].config
    blank = torch.zeros(1, config["regions"], config["width"])  # (1, R, D)
    for storyteller in storytellers:
        storyteller.backbone  # noqa: B018  # loads it before threads use it
        storyteller.caption_features(blank, **options)
    return storytellers


def run(arguments: argparse.Namespace) -> int:
    """Caption on this machine. Returns how many photos failed."""
    options = options_of(arguments)
    # Before --overwrite deletes anything; standard input can be read only once.
    if "-" not in arguments.photos:
        files = find_files(arguments.photos)
        if not any(os.path.exists(file) or not arguments.overwrite for file in files):
            raise st.ArtifactError(f"No photos in {', '.join(arguments.photos)}.")
    storytellers = load_captioners(arguments.model, options)
    # Last, as a search's options say 1 of its captions however many of them are written.
    meta = {"captioner": fingerprint(storytellers[0]), **options, "captions": arguments.captions}
    output, folder = open_output(arguments)
    claimed = claim(output.path, meta, arguments.overwrite) if folder else contextlib.nullcontext()
    with claimed:
        return caption_into(output, folder, arguments, storytellers, options)


def caption_into(
    output, folder: Path | None, arguments: argparse.Namespace, storytellers: list, options: dict
) -> int:
    """Write the rows that an output does not have yet. Returns how many photos failed."""
    done = output.begin()
    if arguments.xmp and folder:
        complete_sidecars(output, folder)
    counts = Counter(done=0, failed=0, skipped=0)

    def todo():
        for photo in find_photos(arguments.photos, folder):
            if isinstance(output, TextFiles):
                photo = output.check(photo)
            captioned = arguments.xmp and not folder and not arguments.overwrite
            captioned = captioned and isinstance(photo.source, Path) and is_captioned(photo.source)
            if captioned or hash(photo.name) in done or output.has(photo):
                counts["skipped"] += 1
                continue
            done.add(hash(photo.name))
            yield photo

    began = time.monotonic()
    batches = caption_photos(
        todo(), storytellers, options, arguments.captions, arguments.batch, arguments.workers
    )
    plain = isinstance(output, Lines) and output.format is None
    with bar(arguments, plain) as progress, contextlib.closing(batches):
        try:
            for pairs in batches:
                for photo, row in pairs:
                    if arguments.xmp:
                        write_xmp(photo, row, arguments.replace_descriptions)
                    counts["failed" if "error" in row else "done"] += 1
                output.write(pairs)
                progress.update(len(pairs))
        except KeyboardInterrupt:
            counts["failed"] += 1
            print("Stopped; repeat the command to resume.", file=sys.stderr)
    output.finish()
    if not plain:
        seconds = max(time.monotonic() - began, 0.01)
        print(
            f"{counts['done']:,} photos captioned, {counts['skipped']:,} skipped, "
            f"{counts['failed']:,} failed: {counts['done'] / seconds:.1f} per second",
            file=sys.stderr,
        )
    if not sum(counts.values()):
        raise st.ArtifactError(f"No photos in {', '.join(arguments.photos)}.")
    return counts["failed"]


def write_xmp(photo: Photo, row: dict, replace: bool) -> None:
    """Write a photo's sidecar before its row, so that no row stands without one."""
    if "error" in row:
        return
    try:
        if not isinstance(photo.source, Path):
            raise ValueError("a photo in a shard has no place for a sidecar")
        write_sidecar(photo.source, row["text"], replace)
    except ValueError as error:
        row["error"] = str(error)


def complete_sidecars(output: JsonLines, folder: Path) -> None:
    """Write the sidecars of photos that were captioned before without --xmp."""
    for row in output.rows():
        photo = folder / row["file_name"]
        if photo.is_file() and not sidecar(photo).exists():
            write_sidecar(photo, row["text"])


def bar(arguments: argparse.Namespace, plain: bool):
    """Return a progress bar on standard error, without a total if the inputs cannot be listed."""
    total = None
    if not plain and not any(given == "-" or ".tar" in given for given in arguments.photos):
        total = sum(1 for _ in find_photos(arguments.photos))
    return st.progress(total=total, unit="photo", disable=plain)


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit status 1 if a photo failed, with a message if it could not start."""
    arguments = parse(argv)
    try:
        if arguments.ray:
            import caption_ray

            failed = caption_ray.run(arguments)
        elif any("://" in str(place) for place in [*arguments.photos, arguments.out]):
            raise ValueError("Object storage (s3://, gs://) is read and written with --ray.")
        else:
            failed = run(arguments)
    except (st.ArtifactError, ValueError) as error:
        sys.exit(f"storyteller: {error}")
    except BrokenPipeError:  # head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        failed = 1
    except OSError as error:  # a place that cannot be written
        sys.exit(f"storyteller: {error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
