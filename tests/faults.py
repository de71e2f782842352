"""Disturb every stage and check that nothing is lost: what `make faults` does.

test_faults.py does a few of each kind. A stage is its notebook's cells, run as a program on 40
drawn photos and forked from a process that has already imported their modules, as the imports would
take longer than the cells. After each fault, the stage is run again (after damage to its results,
the next stage): either the result equals the undisturbed one's, or one message names the file and
says what to do. Moments and bytes are drawn from a seed.
"""

import collections
import contextlib
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat

# Before torch: workers and programs get one thread each.
os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "tests")]
import sample  # noqa: E402
import storyteller_utils as st  # noqa: E402
from support import FORKS  # noqa: E402

SEED, PHOTOS, KILLS = 13, 40, 20
SETTINGS = {
    "01_extract_features": "dataset_dir='dataset'; backbone='efficientnet_lite0'; batch_size=4",
    "02_vocab": "min_count = 1; dataset_dir = 'dataset'",
    "03_train_dual_t4": "epochs = 3; dataset_dir = 'dataset'",
    "04_evaluate": "dataset_dir = 'dataset'",
    "05_deploy": "",
}
SLOW = 180


@dataclass
class Outcome:
    """What came of a fault.

    The "same" result as undisturbed, "refused" with a message, or "lost"; `output` shows it.
    """

    kind: str
    stage: str
    what: str
    came: str
    output: str = ""


def program(stage: str) -> str:
    """Return a stage's notebook as a program, with this test's settings after its own."""
    cells = nbformat.read(ROOT / f"notebooks/{stage}.ipynb", 4).cells
    code = [
        (cell.source, cell.metadata.get("tags", [])) for cell in cells if cell.cell_type == "code"
    ]
    return "display = print\n" + "\n\n".join(
        source + f"\n{SETTINGS[stage]}" * ("parameters" in tags) for source, tags in code
    )


def counts(folder: Path, stage: str) -> dict:
    """Return the files by which a finished stage is compared, without the timings in them."""
    out, found = folder / "outputs" / stage, {}
    for path in sorted(
        p
        for p in out.rglob("*")
        if p.is_file() and p.name not in ("manifest.json", "last.pt", "scores.md")
    ):
        value = path.read_bytes()
        if path.name == "history.csv":
            value = st.read_table(path).drop(columns=["seconds", "captions_per_second"]).to_csv()
        elif path.name == "scores.json":
            value = st.read_json(path)
            for row in value["rows"].values():
                row.pop("seconds a photo", None)
        found[path.relative_to(out).as_posix()] = value
    return found


def be_program(folder: Path, stage: str, environment: dict[str, str], written) -> None:
    """Run a stage's cells as a program in `folder` would, its output going into a pipe."""
    os.setsid()
    os.chdir(folder)
    os.environ |= environment
    for stream in (1, 2):
        os.dup2(written.fileno(), stream)
    written.close()
    sys.stdout.reconfigure(line_buffering=True)
    runpy.run_path(f"{stage}.py", run_name="__main__")


def read(pipe, until: bytes = b"") -> Iterator[bytes]:
    """Yield what comes out of a pipe, to its end or until a byte; TimeoutError if too slow."""
    ends = time.monotonic() + SLOW
    while pipe.poll(max(0, ends - time.monotonic())):
        block = os.read(pipe.fileno(), 1 if until else 65_536)
        yield block
        if block in (b"", until):
            return
    raise TimeoutError(f"no end after {SLOW} s")


class Ground:
    """The dataset, every stage's undisturbed result, and how long each took."""

    def __init__(self, folder: Path, stages: Iterable[str] = st.STAGES):
        self.folder, self.seconds = folder, {}
        sample.draw_dataset(folder / "dataset", photos=PHOTOS, seed=SEED)
        self.furnish(folder)
        for stage in stages:
            status, output, self.seconds[stage] = self.run(folder, stage)
            if status:
                raise RuntimeError(f"{stage} fails undisturbed:\n{output}")
        self.expected = {stage: counts(folder, stage) for stage in stages}

    def furnish(self, folder: Path) -> None:
        for name, target in {
            "storyteller_utils.py": ROOT / "storyteller_utils.py",
            "space": ROOT / "space",
            "notebooks": ROOT / "notebooks",
            "dataset": self.folder / "dataset",
        }.items():
            if not (folder / name).exists():
                (folder / name).symlink_to(target)
        for stage in st.STAGES:
            (folder / f"{stage}.py").write_text(program(stage))

    @contextlib.contextmanager
    def copy(self, *stages: str):
        """Yield a new folder that holds the results of these stages."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            self.furnish(folder)
            (folder / "outputs").mkdir()
            for stage in stages:
                shutil.copytree(self.folder / "outputs" / stage, folder / "outputs" / stage)
            yield folder

    def run(
        self, folder: Path, stage: str, after: float | None = None, only_notebook: bool = False
    ) -> tuple[int, str, float]:
        """Run a stage's cells. Returns status, output and seconds.

        after          seconds of work until SIGKILL; None: no kill
        only_notebook  spare its worker
        """
        environment = {
            "PYTHONUNBUFFERED": "1",
            "STORYTELLER_KAGGLE_INPUT": str(folder / "no-kaggle"),
            "TMPDIR": str(self.folder),
        }
        received, written = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=be_program, args=(folder, stage, environment, written))
        process.start()
        written.close()
        try:
            # `start` prints the first line, once the imports are done.
            output, began = b"".join(read(received, until=b"\n")), time.monotonic()
            if after is not None:
                process.join(after)
                (os.kill if only_notebook else os.killpg)(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it had already ended
        try:
            output += b"".join(read(received))
        finally:
            if not only_notebook:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return process.exitcode, output.decode(errors="replace"), time.monotonic() - began

    def judge(self, folder: Path, stage: str, names: str = "") -> tuple[str, str]:
        """Run a stage after a fault.

        Returns "same", "refused" (by a message that has `names`) or "lost", and its output.
        """
        status, output, _ = self.run(folder, stage)
        if status == 0:
            return "same" if counts(folder, stage) == self.expected[stage] else "lost", output
        said = output.rsplit("ArtifactError: ", 1)[1:]
        return "refused" if said and "gain" in said[0] and re.search(
            names, said[0]
        ) else "lost", output

    # The kinds of faults

    def kill(self, stage: str, rng: random.Random) -> Outcome:
        """SIGKILL at a random moment, then run the stage again."""
        after, only_notebook = rng.uniform(0, self.seconds[stage]), rng.random() < 0.5
        with self.copy(*st.STAGES[stage]) as folder:
            self.run(folder, stage, after, only_notebook)
            what = f"SIGKILL after {after:.2f} s" + " (its worker lives on)" * only_notebook
            if (folder / "outputs" / stage / "manifest.json").is_file() and counts(
                folder, stage
            ) != self.expected[stage]:
                return Outcome("kill", stage, what, "lost", "half-written, but taken for finished")
            came, output = self.judge(folder, stage)
            return Outcome("kill", stage, what, came if came == "same" else "lost", output)

    def leftover(self, stage: str, rng: random.Random) -> Outcome:
        """SIGKILL, then damage to a file that the killed run left.

        After a message, a run without that file must succeed.
        """
        with self.copy(*st.STAGES[stage]) as folder:
            self.run(folder, stage, rng.uniform(0.2, 0.9) * self.seconds[stage])
            left = [
                p
                for p in sorted((folder / "outputs" / stage).rglob("*"))
                if p.is_file() and p.name != "manifest.json"
            ]
            if not left:
                return Outcome("leftover", stage, "nothing was left", self.judge(folder, stage)[0])
            path = rng.choice(left)
            damage(path, rng)
            came, output = self.judge(folder, stage, re.escape(path.name))
            if came == "refused":
                path.unlink(missing_ok=True)
                again, more = self.judge(folder, stage)
                came, output = came if again == "same" else "lost", output + more
            return Outcome("leftover", stage, f"{path.name} damaged", came, output)

    def full(self, stage: str, rng: random.Random) -> Outcome:
        """Let the disk have room for a part of what the stage writes, then make room."""
        share = rng.uniform(0, 1.2)
        needed = sum(
            p.stat().st_size for p in (self.folder / "outputs" / stage).rglob("*") if p.is_file()
        )
        with (
            self.copy(*st.STAGES[stage]) as folder,
            disk(folder / "outputs" / stage, int(share * needed)) as remount,
        ):
            came, output = self.judge(folder, stage, r"outputs/.*No space left")
            if came != "lost":
                remount("size=1g")
                again, more = self.judge(folder, stage)
                came, output = came if again == "same" else "lost", output + more
            return Outcome("full disk", stage, f"room for {share:.0%}", came, output)

    def read_only(self, stage: str, rng: random.Random) -> Outcome:
        """Let the stage's folder be read-only, then writable."""
        with (
            self.copy(*st.STAGES[stage]) as folder,
            disk(folder / "outputs" / stage, 2**30) as remount,
        ):
            remount("ro")
            came, output = self.judge(folder, stage, r"outputs/.*Read-only")
            remount("rw")
            again, more = self.judge(folder, stage)
            return Outcome(
                "read-only",
                stage,
                "",
                came if (came, again) == ("refused", "same") else "lost",
                output + more,
            )

    def damaged(self, stage: str, name: str, rng: random.Random) -> Outcome:
        """Truncate a file of a finished stage, or flip a bit of it.

        Then run the first stage that reads it.
        """
        reader = next(later for later, reads in st.STAGES.items() if stage in reads)
        with self.copy(*st.STAGES[reader]) as folder:
            what = damage(folder / "outputs" / stage / name, rng)
            came, output = self.judge(folder, reader, f"{re.escape(name)}[^$]*{stage}.ipynb")
            return Outcome("damage", stage, f"{name} {what}", came, output)

    def two(self, stage: str, rng: random.Random) -> Outcome:
        """Run a stage twice at once in one folder: the second is refused, or both succeed."""
        with self.copy(*st.STAGES[stage]) as folder, ThreadPoolExecutor(2) as pool:
            runs = list(pool.map(lambda _: self.run(folder, stage), range(2)))
            refused = [
                output for status, output, _ in runs if status and "Another run is using" in output
            ]
            well = (
                len(refused) + sum(status == 0 for status, _, _ in runs) == 2 and len(refused) < 2
            )
            same = counts(folder, stage) == self.expected[stage]
            return Outcome(
                "two at once",
                stage,
                f"{len(refused)} refused",
                "same" if well and same else "lost",
                runs[0][1] + runs[1][1],
            )


def damage(path: Path, rng: random.Random) -> str:
    """Cut a file short or flip one of its bits. Returns which."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5 or not data:
        path.write_bytes(data[: rng.randrange(len(data))] if data else b"?")
        return "cut short"
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "with a bit flipped"


def can_mount() -> bool:
    """Return whether this user may mount a small disk."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
            ).returncode
            == 0
        )
        return mounted and subprocess.run(["umount", folder]).returncode == 0


@contextlib.contextmanager
def disk(folder: Path, size: int):
    """Mount a disk of `size` bytes at `folder`.

    Yields a function that remounts it with options such as "size=1g" or "ro".
    """
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(folder)], check=True
    )
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> None:
    """Try every fault, two at a time, and end with a table; exit 1 if anything was lost."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        ground, began = Ground(Path(folder)), time.monotonic()
        trials = [
            (kind, (stage,))
            for stage in st.STAGES
            for kind in [ground.kill] * KILLS
            + [ground.two]
            + [ground.leftover] * 4 * (stage in ("01_extract_features", "03_train_dual_t4"))
        ]
        if can_mount():
            trials += [
                (kind, (stage,))
                for stage in st.STAGES
                for kind in [ground.full] * 4 + [ground.read_only]
            ]
        else:
            print("This user may not mount disks: full and read-only ones are not tried.")
        trials += [
            (ground.damaged, (stage, name))
            for stage in list(st.STAGES)[:-1]
            for name in ["manifest.json", *ground.expected[stage]]
            for _ in range(2)
        ]
        tried = [
            pool.submit(kind, *where, random.Random(f"{SEED}/{i}"))
            for i, (kind, where) in enumerate(trials)
        ]
        table = collections.Counter()
        for i, future in enumerate(tried, 1):
            outcome = future.result()
            table[outcome.kind, outcome.came] += 1
            print(
                f"{i}/{len(tried)} {outcome.stage}: {outcome.kind} {outcome.what}: {outcome.came}",
                flush=True,
            )
            if outcome.came == "lost":
                print(outcome.output[-3000:])
    print(
        f"\n{time.monotonic() - began:.0f} s\n\n"
        "| fault | tried | same result | refused by a message | lost |\n|---|---|---|---|---|"
    )
    for kind in dict.fromkeys(kind for kind, _ in table):
        ends = [table[kind, came] for came in ("same", "refused", "lost")]
        print(f"| {kind} |", " | ".join(map(str, [sum(ends), *ends])), "|")
    sys.exit(any(came == "lost" for _, came in table))


if __name__ == "__main__":
    main()
