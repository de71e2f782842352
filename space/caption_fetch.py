"""Fetch photos' bytes on the machines of a cluster, before they are captioned.

Many processes per machine do this, so torch is not imported: that would take each of them seconds.
"""

import functools
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray
from pyarrow import fs


@dataclass(frozen=True)
class Place:
    """A file or folder, here or in a bucket.

    root  "" for this machine's files, or scheme://bucket?options
    path  as pyarrow's file system expects it: bucket/key, or an absolute path
    """

    root: str
    path: str

    @classmethod
    def of(cls, given: str | Path) -> "Place":
        """Return the place of a path or of scheme://bucket/key?options.

        gs://anonymous@bucket is one that anyone may read; ValueError for a key before the @, which
        would be written into the manifest.
        """
        scheme, mark, rest = str(given).partition("://")
        if not mark:
            return cls("", os.path.abspath(given))
        path, mark, options = rest.partition("?")
        bucket, slash, key = path.partition("/")
        user, _, name = bucket.rpartition("@")
        if user not in ("", "anonymous"):
            raise ValueError(
                f"A key in an address ends up in logs: leave it out of {scheme}://...@{name} and "
                "set it as the store's own tools read it (AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS)."
            )
        root = f"{scheme}://{bucket}{mark}{options}"
        return cls(root, (name + slash + key).rstrip("/"))

    @property
    def files(self) -> fs.FileSystem:
        return file_system(self.root)

    def at(self, path: str) -> "Place":
        return Place(self.root, path)

    def __str__(self) -> str:
        return f"{self.root.partition('://')[0]}://{self.path}" if self.root else self.path


@functools.cache
def file_system(root: str) -> fs.FileSystem:
    """Open a root's file system; ValueError if it cannot be opened."""
    if not root:
        return fs.LocalFileSystem()
    try:
        return fs.FileSystem.from_uri(root)[0]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{root} cannot be opened: {error}") from None


def fetch(batch: pa.Table) -> pa.Table:
    """Read photos' bytes; one that cannot be read gets an error in its row, not an exception."""
    with ThreadPoolExecutor(16) as pool:  # object stores answer slowly, but many at a time
        fetched = list(pool.map(read_photo, batch.to_pylist()))
    return pa.table(
        {
            "file_name": batch["file_name"],
            "data": pa.array([data for data, _ in fetched], pa.large_binary()),
            "error": pa.array([error for _, error in fetched], pa.string()),
        }
    )


def read_photo(row: dict, tries: int = 3) -> tuple[bytes, str]:
    """Return the bytes of a photo of the manifest, or none and the reason."""
    if row["error"]:
        return b"", row["error"]
    try:
        with file_system(row["root"]).open_input_file(row["path"]) as file:
            if row["size"] < 0:
                return file.read(), ""
            return file.read_at(row["size"], row["offset"]), ""
    except FileNotFoundError:
        return b"", f"{row['file_name']} does not exist."
    except Exception as error:
        if tries > 1:  # an overloaded bucket recovers
            time.sleep(4 ** (3 - tries))
            return read_photo(row, tries - 1)
        return b"", f"{row['file_name']} cannot be fetched: {type(error).__name__}"


@ray.remote(num_cpus=0, max_restarts=10, max_task_retries=10)
class Tries:
    """Count what was begun and did not end: this identifies photos that crash their process."""

    def __init__(self):
        self.begun: Counter = Counter()

    def begin(self, what: str) -> int:
        """Return how often this was begun before without an end."""
        self.begun[what] += 1
        return self.begun[what] - 1

    def end(self, what: str) -> None:
        self.begun.pop(what, None)
