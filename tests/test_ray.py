"""`caption --ray`: the same rows as one process, each photo once, whatever is killed in between.

A real Ray of two nodes on this machine, and local object stores. `make test-ray` installs what
they need.
"""

import collections
import contextlib
import io
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

pytest.importorskip("ray.data", reason="needs Ray: make test-ray")
pytest.importorskip("moto.server", reason="needs moto: make test-ray")

import pyarrow.dataset
import pyarrow.parquet as pq

import storyteller_utils as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "space"))
import caption_ray  # noqa: E402
from caption_fetch import Place, read_photo  # noqa: E402

COUNT = 400
SHARED = ROOT.parent / "shared/flickr8k/Images"
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # two nodes that never met
    "RAY_worker_niceness": "0",  # 15, else; beside other work, starting would take minutes
    "RAY_USAGE_STATS_ENABLED": "0",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "OMP_NUM_THREADS": "1",
}
# The command, with captioners that take their time and die of some photos.
DRIVER = """
import os, signal, sys, time
sys.path[:0] = [{space!r}, {root!r}]
import caption, caption_ray

class Faulty(caption_ray.Captions):
    def caption(self, rows):
        assert os.environ["MALLOC_ARENA_MAX"] == "1"  # a layer's memory is kept
        time.sleep({pause} * len(rows))
        if any(row["data"] == b"FATAL" for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().caption(rows)

caption_ray.Captions = Faulty
caption.main(sys.argv[1:])
"""


def start(*arguments, pause: float = 0.0) -> subprocess.Popen:
    """Start the command with --beam 1: the search is tested elsewhere."""
    script = DRIVER.format(space=str(ROOT / "space"), root=str(ROOT), pause=pause)
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments), "--beam", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments) -> tuple[int, str]:
    """Run the command to its end; return its exit status and its last line."""
    process = start(*arguments)
    said, _ = process.communicate(timeout=400)
    assert said.strip(), process.returncode
    return process.returncode, said.strip().splitlines()[-1]


def rows(out: Path | str, files=None) -> list[dict]:
    return (
        pyarrow.dataset.dataset(str(out), filesystem=files, format="parquet").to_table().to_pylist()
    )


def texts(table: list[dict]) -> dict[str, str]:
    """Return the captions by photo; no photo may have two rows."""
    assert max(collections.Counter(row["file_name"] for row in table).values()) == 1
    return {Path(row["file_name"]).name: row["text"] for row in table}


def wait_for(condition, process: subprocess.Popen, seconds: float = 300):
    """Return what `condition` returns as soon as it is true; the command must still run then."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    return value


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.parquet"))


def actors_of(node) -> list[psutil.Process]:
    """Return the captioners among a node's processes."""
    raylet = node.all_processes["raylet"][0].process.pid
    return [
        process
        for process in psutil.Process(raylet).children(recursive=True)
        if process.cmdline()[:1] and "MapWorker" in process.cmdline()[0]
    ]


@pytest.fixture(scope="module", autouse=True)
def settings():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def cluster(settings):
    """Two nodes with room for two captioners."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=2, object_store_memory=200 << 20)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """400 photos: of Flickr8k where it is, else drawn."""
    folder = tmp_path_factory.mktemp("many") / "photos"
    folder.mkdir()
    for i in range(COUNT):
        if not SHARED.is_dir():
            image = Image.linear_gradient("L").rotate(i).resize((64 + i % 7, 48))
            Image.merge("RGB", [image, image.rotate(3 * i), image.rotate(7 * i)]).save(
                folder / f"{i:04}.jpg"
            )
    if SHARED.is_dir():
        for i, path in enumerate(sorted(SHARED.iterdir())[:COUNT]):
            (folder / f"{i:04}.jpg").symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def expected(photos, settings) -> dict[str, str]:
    """What one process says."""
    out = photos.parent / "expected.parquet"
    assert run(photos, "--out", out)[0] == 0
    return texts(pq.read_table(out).to_pylist())


# Nothing twice, nothing lost ---------------------------------------------------------------------


def test_a_killed_captioner_and_photos_that_kill_it_cost_no_other_photo(
    cluster, photos, expected, tmp_path
):
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / "fatal.jpg").write_bytes(b"FATAL")
    (folder / "fatal_too.jpg").write_bytes(b"FATAL")
    (tmp_path / "empty.tar").write_bytes(b"")
    out = tmp_path / "out"
    process = start(
        photos, folder, folder / "missing.jpg", tmp_path / "empty.tar", "--out", out,
        "--ray", cluster.address, pause=0.02,
    )  # fmt: skip
    wait_for(lambda: shards(out), process)
    captioners = [c for node in cluster.list_all_nodes() for c in actors_of(node)]
    captioners[0].kill()
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 1 and "5 of all failed" in said, said
    table = rows(out)
    errors = {Path(row["file_name"]).name: row["error"] for row in table if row["error"]}
    assert errors.keys() == {
        "broken.jpg", "fatal.jpg", "fatal_too.jpg", "missing.jpg", "empty.tar",
    }  # fmt: skip
    assert "crashed the process twice" in errors["fatal.jpg"]
    assert "does not exist" in errors["missing.jpg"]
    found = texts(table)
    assert {name: found[name] for name in expected} == expected and len(found) == COUNT + 5


def test_a_lost_node_costs_no_photo(cluster, photos, expected, tmp_path):
    out = tmp_path / "out"
    process = start(photos, "--out", out, "--ray", cluster.address, pause=0.02)
    wait_for(lambda: shards(out), process)
    (lost,) = cluster.worker_nodes
    assert actors_of(lost)
    cluster.remove_node(lost, allow_graceful=False)
    said, _ = process.communicate(timeout=400)
    cluster.add_node(num_cpus=2, object_store_memory=200 << 20)
    assert process.returncode == 0, said
    assert texts(rows(out)) == expected


def test_a_killed_command_goes_on_and_a_finished_one_adds_nothing(
    cluster, photos, expected, tmp_path
):
    out = tmp_path / "out"
    command = (photos, "--out", out, "--ray", cluster.address)
    process = start(*command, pause=0.05)
    wait_for(lambda: len(shards(out)) > 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(rows(out))
    assert 0 < before < COUNT
    status, said = run(*command)
    assert status == 0 and texts(rows(out)) == expected
    written = shards(out)
    began = time.monotonic()
    status, said = run(*command)
    assert status == 0 and said.startswith(f"0 photos done, {COUNT} before, 0 of all failed")
    assert shards(out) == written
    print(f"a finished job again: {time.monotonic() - began:.0f} s")
    status, said = run(*command, "--max-chars", "60")
    assert status == 1 and "other options (max_chars differ)" in said
    assert shards(out) == written


# One process's rows ------------------------------------------------------------------------------


def test_rows_are_those_of_one_process_on_this_machine(photos, tmp_path, monkeypatch):
    """Names, scores, errors, several captions; photos in folders and in shards."""
    monkeypatch.chdir(tmp_path)
    names = [f"{i:04}.jpg" for i in range(40)]
    Path("photos/deep").mkdir(parents=True)
    for i, name in enumerate(names[:20]):
        target = Path("photos/deep" if i % 2 else "photos") / name
        target.write_bytes((photos / name).read_bytes())
    Path("photos/broken.jpg").write_bytes(b"no photo")
    with tarfile.open("shard-00.tar", "w", dereference=True) as tar:
        for name in names[20:]:
            tar.add(photos / name, f"inside/{name}")
        tar.add("photos/broken.jpg", "broken.jpg")
    with tarfile.open("shard-01.tar", "w"):
        pass
    inputs = ("photos", "shard-{00..02}.tar", "--captions", "3")
    one = run(*inputs, "--out", "one.parquet")
    many = run(*inputs, "--out", "many", "--ray")
    assert one[0] == many[0] == 1
    by_name = {}
    for row in pq.read_table("one.parquet").to_pylist():
        by_name[row["file_name"]] = row
    found = {row["file_name"]: row for row in rows("many")}
    assert found.keys() == by_name.keys() and len(found) == 43
    for name, row in by_name.items():
        assert found[name] | {"error": ""} == row | {"error": ""}
        assert bool(found[name]["error"]) == bool(row["error"])
    assert pyarrow.dataset.dataset("many", format="parquet").schema == caption_ray.ROWS


# Object storage ----------------------------------------------------------------------------------


@contextlib.contextmanager
def amazon():
    """Serve a local S3 with an empty bucket; yield its URI and its options."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = (
        f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    )
    try:
        Place.of(f"s3://bucket{options}").files.create_dir("bucket")
        yield "s3://bucket", options
    finally:
        server.stop()


@contextlib.contextmanager
def google():
    """Serve a local Google Cloud Storage with an empty bucket; yield its URI and its options."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def answers() -> bool:
        with socket.socket() as one:
            return not one.connect_ex(("127.0.0.1", port))

    # In a process of its own: pyarrow keeps Python's lock while it reads from this store.
    command = Path(sys.executable).with_name("gcp-storage-emulator")
    options = ("--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=bucket")
    server = subprocess.Popen([command, "start", *options], stderr=subprocess.DEVNULL)
    try:
        wait_for(answers, server, 30)
        yield "gs://anonymous@bucket", f"?endpoint_override=127.0.0.1:{port}&scheme=http"
    finally:
        server.kill()


@pytest.mark.parametrize("store", [amazon, google])
def test_photos_shards_rows_and_checkpoint_may_lie_in_a_bucket(store, photos, expected, tmp_path):
    with store() as (uri, options):
        caption_a_bucket(uri, options, photos, expected, tmp_path)


def caption_a_bucket(uri: str, options: str, photos, expected, tmp_path):
    files = Place.of(uri + options).files
    plain = uri.replace("anonymous@", "")

    def put(key: str, data: bytes) -> None:
        with files.open_output_stream(f"bucket/{key}") as file:
            file.write(data)

    names = sorted(expected)[:48]
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
        for name in names[24:]:
            member = tarfile.TarInfo(name)
            member.size = (photos / name).stat().st_size
            with open(photos / name, "rb") as file:
                tar.addfile(member, file)
    for name in names[:24]:
        put(f"photos/some where/{name}", (photos / name).read_bytes())
    put("photos/broken.jpg", b"no photo")
    put("photos/notes.txt", b"no photo either")
    put("shards/00.tar", tar_bytes.getvalue())
    put("shards/01.tar", b"")
    listed = tmp_path / "list.txt"
    listed.write_text(f"{uri}/photos/missing.jpg{options}\n")
    command = (
        f"{uri}/photos{options}", f"{uri}/shards/{{00..01}}.tar{options}", listed,
        "--out", f"{uri}/out{options}", "--ray",
    )  # fmt: skip
    status, said = run(*command)
    assert status == 1 and said.startswith("51 photos done, 0 before, 3 of all failed"), said
    table = rows("bucket/out", files)
    found = texts(table)
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    where = {Path(row["file_name"]).name: row["file_name"] for row in table}
    assert where[names[0]] == f"{plain}/photos/some where/{names[0]}"
    assert where[names[30]] == f"{plain}/shards/00.tar/{names[30]}"
    errors = {row["file_name"] for row in table if row["error"]}
    assert errors == {
        f"{plain}/photos/broken.jpg", f"{plain}/photos/missing.jpg", f"{plain}/shards/01.tar"
    }  # fmt: skip
    for name in ("new.jpg", "missing.jpg"):
        put(f"photos/{name}", (photos / names[0]).read_bytes())
    status, said = run(*command)
    assert said.startswith("4 photos done, 48 before, 2 of all failed"), said
    found = texts(rows("bucket/out", files))
    assert found["new.jpg"] == found["missing.jpg"] == expected[names[0]] and len(found) == 52


def test_a_bucket_that_does_not_answer_is_an_error_of_the_photo():
    place = Place.of("s3://bucket/a.jpg?endpoint_override=127.0.0.1:9&scheme=http&region=x")
    row = {"file_name": "a.jpg", "root": place.root, "path": place.path, "size": -1, "error": ""}
    data, error = read_photo(row, tries=1)
    assert data == b"" and error.startswith("a.jpg cannot be fetched")


def test_a_key_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match=r"s3://\.\.\.@bucket and set it") as refused:
        Place.of("s3://AKIA:secret@bucket/photos")
    assert "AKIA" not in str(refused.value) and "secret@" not in str(refused.value)
    assert Place.of("gs://anonymous@bucket/a@b.jpg?scheme=http") == Place(
        "gs://anonymous@bucket?scheme=http", "bucket/a@b.jpg"
    )


# Before anything starts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "most", "expected"),
    [
        ([{"CPU": 6, "memory": 8 << 30}], 2, (2, 1.0, 0)),
        ([{"CPU": 64, "memory": 3 << 30}], None, (2, 1.0, 0)),
        ([{"CPU": 4, "GPU": 1, "memory": 1 << 30}], None, (1, 1.0, 1)),
        ([{"CPU": 4, "GPU": 1, "memory": 8 << 30}] * 8, None, (8, 1.0, 1)),
        ([{"CPU": 2, "memory": 8 << 30}] * 2, None, (2, 0.1, 0)),
    ],
)
def test_captioners_leave_cores_for_what_feeds_them(nodes, most, expected):
    assert caption_ray.room(nodes, most) == caption_ray.Pool(*expected)


@pytest.mark.parametrize("machines", [2, 3, 8, 100])
@pytest.mark.parametrize("cores", [2, 4, 64])
def test_after_the_loss_of_a_node_there_still_are_cores_for_the_rest(machines, cores):
    pool = caption_ray.room([{"CPU": cores, "memory": 512 << 30}] * machines)
    assert pool.actors == machines * cores - 2
    assert pool.actors * pool.cpus <= (machines - 1) * cores - 1


def test_a_cluster_without_room_is_refused_before_it_waits_for_ever():
    with pytest.raises(ValueError, match=r"has 2 cores .* needs 3 cores"):
        caption_ray.room([{"CPU": 2, "memory": 8 << 30}])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ray"], "--out FOLDER"),
        (["--ray", "--out", "x.csv", "--to", "csv"], "Parquet into a folder"),
        (["--out", "x", "--ray", "--xmp"], "no files beside"),
        (["--out", "x", "--ray", "photos"], "not HOST:PORT"),
        (["--out", "a.jpg", "--ray"], "a.jpg is a file"),
        (["--out", "nowhere", "--ray", "127.0.0.1:9"], "no Ray cluster at 127.0.0.1:9"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path, monkeypatch, more, message):
    import caption

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.jpg")
    with pytest.raises(SystemExit, match=message):
        caption.main(["a.jpg", *more])
    assert "nowhere" in more or not list(tmp_path.glob("x*"))


def test_failures_are_forgotten_before_a_second_try_and_captions_are_not(tmp_path):
    job = caption_ray.Job(Place.of(tmp_path / "out"), 64, 1)
    checkpoint = Path(job.inside("checkpoint").path)
    checkpoint.mkdir(parents=True)
    for i, errors in enumerate([[None, "bad"], ["bad", "bad"], [None, None]]):
        names = [f"{i}a.jpg", f"{i}b.jpg"]
        table = caption_ray.pa.Table.from_pylist(
            [{"file_name": n, "error": e} for n, e in zip(names, errors, strict=True)],
            caption_ray.ROWS,
        )
        pq.write_table(table, tmp_path / f"out/{i}.parquet")
        pq.write_table(table.select(["file_name"]), checkpoint / f"{i}.parquet")
    (tmp_path / "out/3.parquet").write_bytes(b"half written")
    for _ in range(2):
        caption_ray.forget_failures(job)
        (tmp_path / "out/3.parquet").unlink(missing_ok=True)
        for folder in (tmp_path / "out", checkpoint):
            assert [row["file_name"] for row in rows(folder)] == ["0a.jpg", "2a.jpg", "2b.jpg"]
            assert [path.name for path in shards(folder)] == ["0.parquet", "2.parquet"]


def test_a_folder_with_other_parquet_files_is_not_touched(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    table = caption_ray.ROWS.empty_table().to_pandas()
    table.loc[0, "file_name"] = "mine.jpg"
    pq.write_table(caption_ray.pa.Table.from_pandas(table, caption_ray.ROWS), out / "mine.parquet")
    job = caption_ray.Job(Place.of(out), 64, 1)
    with (
        pytest.raises(st.ArtifactError, match="written by another captioner"),
        caption_ray.claim(job, {"captioner": "x"}, overwrite=False),
    ):
        pass
    assert shards(out) == [out / "mine.parquet"]
    (out / "notes.txt").write_text("mine")
    with caption_ray.claim(job, {"captioner": "x"}, overwrite=True):
        assert not shards(out) and (out / "notes.txt").exists()
        with (
            pytest.raises(st.ArtifactError, match="Another process is writing"),
            caption_ray.claim(job, {"captioner": "x"}, overwrite=True),
        ):
            pass
    with caption_ray.claim(job, {"captioner": "x"}, overwrite=False):
        pass
