"""Thirty-two visitors at once, for a minute: `make load`; test_space.py does it for seconds.

Ends with a table of waiting times, and with exit 1 if there was an error other than the queue's own
"full", a caption that a single visitor would not get, or memory that grew by more than a tenth
between the first and the last ten seconds; a first crowd, of twenty seconds, is not counted.
"""

import collections
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VISITORS, SECONDS = 32, 60


def storm(
    address: str, photos: list[Path], seconds: float, pid: int, visitors: int = VISITORS
) -> dict:
    """Let visitors ask for captions of these photos for so long, each as soon as it was answered.

    Returns "waits" (seconds, of those answered), "busy" (how often the queue was full), "errors"
    (others), "captions" {photo name: those given}, "memory" (of process `pid`, in MiB, ten times a
    second).
    """
    from gradio_client import Client, handle_file

    results = {
        "waits": [],
        "busy": 0,
        "errors": [],
        "captions": collections.defaultdict(set),
        "memory": [],
    }
    begin, until = threading.Barrier(visitors + 1), [0.0]

    def visit(number: int) -> None:
        client = Client(address, verbose=False, download_files=False)
        begin.wait()
        while time.monotonic() < until[0]:
            photo, began = photos[number % len(photos)], time.monotonic()
            try:
                results["captions"][photo.name].add(
                    client.predict(handle_file(str(photo)), api_name="/caption")[0]
                )
                results["waits"].append(time.monotonic() - began)
            except Exception as error:  # whatever a visitor gets to see
                if "full" in str(error).lower():
                    results["busy"] += 1
                    time.sleep(0.2)
                else:
                    results["errors"].append(f"{type(error).__name__}: {error}")
            number += 1

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(visitors)]
    for thread in threads:
        thread.start()
    until[0] = time.monotonic() + 3600
    begin.wait()
    until[0] = time.monotonic() + seconds
    while time.monotonic() < until[0]:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        results["memory"].append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    return results


@contextlib.contextmanager
def page(folder: Path):
    """Serve space/ in a process of its own. Yields its address and the process."""
    from gradio_client import Client

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    app = subprocess.Popen(
        [sys.executable, "app.py"], cwd=ROOT / "space", env=environment, stdout=subprocess.DEVNULL
    )
    address, until = f"http://127.0.0.1:{port}/", time.monotonic() + 120
    try:
        while True:
            try:
                Client(address, verbose=False)
                break
            except Exception:  # not yet
                if app.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.3)
        yield address, app
    finally:
        app.kill()
        app.wait()


def main() -> None:
    from gradio_client import Client, handle_file

    photos = sorted(p for p in (ROOT / "space/examples").iterdir() if p.suffix == ".jpg")
    with tempfile.TemporaryDirectory() as uploads, page(Path(uploads)) as (address, app):
        client = Client(address, verbose=False, download_files=False)
        alone, single = {}, []
        for photo in photos * 3:
            began = time.monotonic()
            alone[photo.name] = {client.predict(handle_file(str(photo)), api_name="/caption")[0]}
            single.append(time.monotonic() - began)
        # The first crowd fills the server's threads and caches, once.
        storm(address, photos, 20, app.pid)
        results = storm(address, photos, SECONDS, app.pid)
        sizes = [p.stat().st_size for p in Path(uploads).rglob("*") if p.is_file()]
    first, last = (
        statistics.mean(results["memory"][:100]),
        statistics.mean(results["memory"][-100:]),
    )
    waits = sorted(results["waits"])
    print(
        f"{len(waits)} captions for {VISITORS} visitors in {SECONDS} s; "
        f'{results["busy"]} times "the queue is full"; {len(results["errors"])} other errors; '
        f"{len(sizes)} files of {sum(sizes) / 2**20:.1f} MiB on disk"
    )
    print(f"memory: {first:.0f} MiB in the first ten seconds, {last:.0f} in the last")
    print("| seconds until the caption | median | 90 % | 99 % | longest |\n|---|---|---|---|---|")
    for name, times in (("one visitor", sorted(single)), (f"{VISITORS} visitors", waits)):
        print(
            f"| {name} |",
            " | ".join(
                f"{times[min(int(share * len(times)), len(times) - 1)]:.2f}"
                for share in (0.5, 0.9, 0.99, 1)
            ),
            "|",
        )
    print(*collections.Counter(results["errors"]).most_common(5), sep="\n")
    sys.exit(bool(results["errors"]) or dict(results["captions"]) != alone or last > 1.1 * first)


if __name__ == "__main__":
    main()
