"""The caption command: inputs, rows, resuming after a kill, constraints, sidecars."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from types import SimpleNamespace
from xml.dom import minidom

import pytest
import torch
from PIL import Image

import storyteller_utils as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "space"))
import caption as command  # noqa: E402
import caption_xmp  # noqa: E402

fast = pytest.mark.fast


class Stub:
    """A captioner that says how bright a photo is; its "weights" are a file of its own."""

    def __init__(self, folder: Path, name: str = "one"):
        self.folder, self.config, self.batches = folder, {"regions": 1, "width": 1}, []
        self.backbone = None
        (folder / "model.safetensors").write_text(name)

    def load(self, source):
        return st.open_photo(source).float().mean().round()[None]

    def extract(self, photos):
        self.batches.append(len(photos))
        return photos

    def caption_features(self, features, attention=True, **options):
        texts = [f"Brightness {int(value)}, of course." for value in features[:, 0]]
        return [
            st.Caption(text, -0.5, text.split(), [(text, -0.5), (text.upper(), -0.7)])
            for text in texts
        ]


@pytest.fixture
def stub(tmp_path_factory, monkeypatch):
    storyteller = Stub(tmp_path_factory.mktemp("stub"))
    monkeypatch.setattr(command, "load_captioners", lambda model, options: [storyteller])
    return storyteller


def save(path: Path, brightness: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (brightness,) * 3).save(path)
    return path


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Seven photos in two folders, one of them broken, and hidden files."""
    folder = tmp_path / "photos"
    for i, name in enumerate(["a.png", "b.png", "c.png", "sub/d.png", "sub/e.png", "z.png"]):
        save(folder / name, 10 * i)
    (folder / "sub/broken.jpg").write_bytes(b"no photo")
    save(folder / ".hidden.png", 99)
    save(folder / ".hidden/x.png", 99)
    (folder / "notes.md").write_text("no photo either")
    monkeypatch.chdir(tmp_path)
    return folder


NAMES = ["a.png", "b.png", "c.png", "sub/broken.jpg", "sub/d.png", "sub/e.png", "z.png"]


def run(*arguments) -> int:
    """Run the command; return its exit status."""
    with pytest.raises(SystemExit) as end:
        command.main([str(argument) for argument in arguments])
    if isinstance(end.value.code, str):
        raise ValueError(end.value.code)
    return end.value.code


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Inputs ------------------------------------------------------------------------------------------


def found(*inputs, folder=None):
    return [photo.name for photo in command.find_photos(map(str, inputs), folder)]


@fast
def test_folders_globs_lists_and_files_give_their_photos_in_order(photos, monkeypatch):
    assert found("photos", folder=photos) == NAMES
    assert found("photos/*.png") == [f"photos/{x}.png" for x in "abcz"]
    assert found("photos/**/*.png") == [
        *(f"photos/{x}.png" for x in "abc"),
        *(f"photos/sub/{x}.png" for x in "de"),
        "photos/z.png",
    ]
    (photos / "list").write_text("not a photo that list.txt would be the caption of")
    (photos / "list.txt").write_text("b.png\r\n\nsub/d.png\nphotos/a.png\nnone.png\n")
    listed = ["photos/b.png", "photos/sub/d.png", "photos/a.png", "none.png"]
    assert found("photos/list.txt") == listed
    for end in (b"\n", b"\0"):
        piped = io.TextIOWrapper(io.BytesIO(end.join(map(str.encode, listed)) + end))
        monkeypatch.setattr(sys, "stdin", piped)
        assert found("-") == listed
    assert found("photos/a.png", "none.png") == ["photos/a.png", "none.png"]
    with pytest.raises(ValueError, match=r"No file matches photos/\*.gif"):
        found("photos/*.gif")


@fast
def test_a_list_may_come_from_windows_and_may_hold_what_is_no_path(photos, stub):
    long = "x" * 300
    (photos / "list.txt").write_bytes(f"\ufeffb.png\r\n{long}\r\n".encode())
    assert found("photos/list.txt") == ["photos/b.png", long]
    assert run("photos/list.txt", "--out", "captions.jsonl") == 1
    good, bad = rows(Path("captions.jsonl"))
    assert good["file_name"] == "photos/b.png" and "cannot be read" in bad["error"]
    assert run("photos/list.txt", "--to", "txt") == 1 and (photos / "b.txt").exists()


@fast
def test_a_folder_that_may_not_be_read_costs_no_other_photo(photos, stub, monkeypatch):
    def scandir(folder, real=os.scandir):
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert run("photos", "--out", photos / "metadata.jsonl") == 1
    written = {row["file_name"]: row for row in rows(photos / "metadata.jsonl")}
    assert written.keys() == {"a.png", "b.png", "c.png", "sub", "z.png"}
    assert "sub cannot be read" in written["sub"]["error"]


@fast
def test_photos_are_named_relative_to_the_output_where_they_lie_in_its_folder(photos, tmp_path):
    save(tmp_path / "elsewhere/f.png", 1)
    assert found("photos/a.png", folder=photos) == ["a.png"]
    assert found("elsewhere", folder=photos) == [str(tmp_path / "elsewhere/f.png")]


@fast
def test_shards_are_read_as_webdatasets_are(photos, stub):
    for number in (0, 1):
        with tarfile.open(f"shard-0{number}.tar", "w") as tar:
            for name in ("a.png", "sub/d.png", "sub/broken.jpg", ".hidden.png", "notes.md"):
                tar.add(photos / name, name if name[0] == "." else f"{number}{name}")
    data = Path("shard-01.tar").read_bytes()
    Path("shard-02.tar").write_bytes(data[:700])
    status = run("shard-{00..03}.tar", "--out", "captions.jsonl")
    written = {row["file_name"]: row for row in rows(Path("captions.jsonl"))}
    assert status == 1 and len(written) == 8
    assert written["shard-00.tar/0a.png"]["text"] == "Brightness 0, of course."
    assert written["shard-01.tar/1sub/d.png"]["text"] == "Brightness 30, of course."
    assert "cannot be read" in written["shard-00.tar/0sub/broken.jpg"]["error"]
    assert "shard-02.tar cannot be read" in written["shard-02.tar"]["error"]
    assert "shard-03.tar cannot be read" in written["shard-03.tar"]["error"]


@fast
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_shard_that_ends_within_a_photo_costs_no_other_one(tmp_path, stub, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        noise = torch.randint(256, (60, 60, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(name)
    for shard in ("0.tar", "1.tar"):
        with tarfile.open(shard, mode) as tar:
            tar.add("a.png")
            tar.add("b.png")
    Path("0.tar").write_bytes(Path("0.tar").read_bytes()[:15_000])
    assert run("0.tar", "1.tar", "--out", "captions.jsonl") == 1
    written = {row["file_name"]: row for row in rows(Path("captions.jsonl"))}
    good = {name for name, row in written.items() if "text" in row}
    assert good == {"0.tar/a.png", "1.tar/a.png", "1.tar/b.png"}
    assert "0.tar/b.png cannot be read" in written["0.tar/b.png"]["error"]


# Rows --------------------------------------------------------------------------------------------


@fast
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_every_photo_has_a_row_and_a_failure_is_the_exit_status(photos, stub, capsys, batch):
    assert run(photos, "--out", photos / "metadata.jsonl", "--batch", batch) == 1
    written = rows(photos / "metadata.jsonl")
    assert [row["file_name"] for row in written] == NAMES
    assert written[1] == {"file_name": "b.png", "text": "Brightness 10, of course.", "score": -0.5}
    assert written[3].keys() == {"file_name", "error"}
    assert max(stub.batches) == min(batch, 6)
    out, err = capsys.readouterr()
    assert out == "" and "6 photos captioned, 0 skipped, 1 failed" in err
    (photos / "sub/broken.jpg").unlink()
    assert run(photos, "--out", photos / "metadata.jsonl", "--overwrite") == 0


@fast
def test_a_second_run_skips_captions_and_tries_failures_again(photos, stub, capsys):
    out = photos / "metadata.jsonl"
    assert run(photos, "--out", out) == 1
    first = rows(out)
    save(photos / "sub/broken.jpg", 77)
    save(photos / "new.png", 120)
    stub.batches.clear()
    assert run(photos, "--out", out) == 0
    assert sum(stub.batches) == 2
    assert rows(out)[:6] == [row for row in first if "text" in row]
    assert {row["file_name"] for row in rows(out)} == {*NAMES, "new.png"}
    assert "2 photos captioned, 6 skipped, 0 failed" in capsys.readouterr().err
    stub.batches.clear()
    assert run(photos, "--out", out, "--overwrite") == 0
    assert sum(stub.batches) == 8 and len(rows(out)) == 8


@fast
def test_another_captioners_output_is_refused(photos, stub, tmp_path):
    out = tmp_path / "captions.jsonl"
    run(photos, "--out", out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=r"other options \(beam_width differ\)"):
        run(photos, "--out", out, "--beam", 3)
    with pytest.raises(ValueError, match=r"other options \(captions differ\)"):
        run(photos, "--out", out, "--captions", 2)
    (stub.folder / "model.safetensors").write_text("another one")
    with pytest.raises(ValueError, match=r"another captioner .* \(captioner differ\)"):
        run(photos, "--out", out)
    assert out.read_bytes() == before
    run(photos, "--out", out, "--overwrite")
    out.with_name("captions.jsonl.meta.json").unlink()
    with pytest.raises(ValueError, match="was written by another"):
        run(photos, "--out", out)


@fast
def test_a_note_that_is_half_written_is_refused_and_may_be_overwritten(photos, stub, tmp_path):
    out = tmp_path / "captions.jsonl"
    run(photos / "a.png", "--out", out)
    out.with_name("captions.jsonl.meta.json").write_text('{"capti')
    with pytest.raises(ValueError, match="was written by another"):
        run(photos / "a.png", "--out", out)
    assert run(photos / "a.png", "--out", out, "--overwrite") == 0


@fast
@pytest.mark.parametrize("given", ["none-*.png", "empty", "fotos"])
def test_nothing_is_overwritten_where_there_are_no_photos(photos, stub, given):
    Path("empty").mkdir()
    run(photos / "a.png", "--out", "captions.jsonl")
    before = Path("captions.jsonl").read_bytes()
    with pytest.raises(ValueError, match="No "):
        run(given, "--out", "captions.jsonl", "--overwrite")
    assert Path("captions.jsonl").read_bytes() == before


@fast
def test_a_file_that_is_no_output_is_not_touched(photos, stub, tmp_path):
    out = tmp_path / "captions.jsonl"
    run(photos, "--out", out)
    out.write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match="a line that this command did not write"):
        run(photos, "--out", out)
    assert out.read_text() == '{"mine": 1}\n'


@fast
def test_csv_is_read_back_whatever_the_names_hold(photos, stub, tmp_path):
    names = ['with "quotes", commas.png', "two\nlines.png", "two\rlines.png", "ümläut.png"]
    for name in names:
        save(photos / name, 5)
    out = photos / "captions.csv"
    assert run(photos, "--out", out, "--captions", 2) == 1
    with open(out, newline="") as file:
        table = {row["file_name"]: row for row in csv.DictReader(file)}
    assert table.keys() == {*NAMES, *names}
    assert table[names[1]]["text"] == "Brightness 5, of course."
    assert json.loads(table["a.png"]["captions"])[1] == "BRIGHTNESS 0, OF COURSE."
    out.write_bytes(out.read_bytes()[:-40])
    stub.batches.clear()
    run(photos, "--out", out, "--captions", 2)
    with open(out, newline="") as file:
        again = [row["file_name"] for row in csv.DictReader(file)]
    assert sorted(again) == sorted(table) and sum(stub.batches) in (1, 2)


@fast
def test_parquet_grows_over_runs(photos, stub, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "captions.parquet"
    run(photos / "sub", "--out", out)
    assert pq.read_table(out).num_rows == 3
    run(photos, "--out", out)
    table = pq.read_table(out).to_pylist()
    assert sorted(row["file_name"] for row in table) == [f"photos/{name}" for name in NAMES]
    assert sum(row["error"] is not None for row in table) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "captions.parquet",
        "captions.parquet.meta.json",
        "photos",
    ]


@fast
def test_text_files_stand_beside_the_photos_and_none_is_replaced(photos, stub, capsys):
    save(photos / "a.jpg", 200)
    (photos / "b.txt").write_text("by a person")
    assert run(photos, "--to", "txt") == 1
    assert (photos / "a.txt").read_text() == "Brightness 200, of course.\n"
    assert (photos / "sub/d.txt").read_text() == "Brightness 30, of course.\n"
    assert (photos / "b.txt").read_text() == "by a person"
    assert "a.txt belongs to another photo; add --full-name" in capsys.readouterr().err
    assert run(photos, "--to", "txt", "--full-name", "--captions", 2) == 1
    assert (photos / "a.png.txt").read_text().splitlines() == [
        "Brightness 0, of course.",
        "BRIGHTNESS 0, OF COURSE.",
    ]
    # They are no lists where a pattern brings them along.
    assert found("photos/[a-b]*") == ["photos/a.jpg", "photos/a.png", "photos/b.png"]


@fast
def test_a_folder_for_the_output_is_made_if_its_name_says_that_it_is_one(photos, stub):
    assert run(photos / "a.png", "--out", "new/folder/") == 0
    assert rows(Path("new/folder/metadata.jsonl"))[0]["file_name"] == str(photos / "a.png")


@fast
def test_one_photo_on_a_terminal_prints_its_caption_and_nothing_else(
    photos, stub, capsys, monkeypatch
):
    assert run(photos / "b.png") == 0
    assert json.loads(capsys.readouterr().out)["text"] == "Brightness 10, of course."
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run(photos / "b.png") == 0
    assert capsys.readouterr() == ("Brightness 10, of course.\n", "")
    assert run(photos / "sub/broken.jpg") == 1
    out, err = capsys.readouterr()
    assert out == "" and "broken.jpg cannot be read" in err


@fast
def test_no_photos_and_wrong_options_are_one_sentence(photos, stub, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No photos in"):
        run(tmp_path / "empty")
    with pytest.raises(ValueError, match="top_p is 7"):
        run(photos, "--top-p", 7)
    with pytest.raises(ValueError, match="needs --out FILE"):
        run(photos, "--to", "parquet")
    with pytest.raises(ValueError, match="--to txt writes a file beside each photo"):
        run(photos, "--out", tmp_path / "captions.txt")
    assert not list(photos.rglob("*.txt"))


@fast
@pytest.mark.parametrize("option", ["--batch", "--workers", "--beam", "--captions"])
def test_none_at_a_time_is_refused(photos, stub, capsys, option):
    assert run(photos, option, 0) == 2
    assert "invalid positive value: '0'" in capsys.readouterr().err


@fast
def test_many_machines_and_buckets_need_ray_and_say_so(photos, stub, monkeypatch):
    with pytest.raises(ValueError, match=r"s3://, gs://.* with --ray"):
        run("s3://bucket/photos")
    with pytest.raises(ValueError, match="with --ray"):
        run(photos, "--out", "gs://bucket/captions")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "caption_ray", raising=False)
    with pytest.raises(ValueError, match=r"--ray needs a package: pip install 'ray\[data\]"):
        run(photos, "--out", "captions", "--ray")


@fast
def test_an_unforeseen_error_costs_one_photo(photos, stub):
    whole = stub.extract

    def extract(features):
        if 20 in features[:, 0]:
            raise RuntimeError("out of memory")
        return whole(features)

    stub.extract = extract
    assert run(photos, "--out", photos / "metadata.jsonl") == 1
    errors = {row["file_name"] for row in rows(photos / "metadata.jsonl") if "error" in row}
    assert errors == {"c.png", "sub/broken.jpg"}


@fast
def test_memory_does_not_grow_with_the_number_of_photos(tmp_path, stub):
    import tracemalloc

    photo = save(tmp_path / "photo.png", 5)
    peaks = []
    for count in (100, 2000):
        names = [command.Photo(f"{i}.png", photo) for i in range(1)]
        stream = (command.Photo(f"{i}.png", photo) for i in range(count))
        tracemalloc.start()
        batches = command.caption_photos(stream, [stub], {}, batch=16, workers=2)
        assert sum(len(pairs) for pairs in batches) == count and names
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 50_000


KILLS = """
import os, random, signal, sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
from test_caption_command import Stub, command
from pathlib import Path

stub = Stub(Path({stub!r}))
slow = stub.extract
stub.extract = lambda photos: time.sleep(0.004) or slow(photos)
command.load_captioners = lambda model, options: [stub]
chance = random.Random(5)
kills = 0
while True:
    child = os.fork()
    if not child:
        sys.stderr = open({stub!r} + "/err", "w")
        command.main([{photos!r}, "--out", {out!r}, "--batch", "2", "--workers", "2"])
    if kills == 20:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        break
    # Some while it begins, most after it has written for a while.
    size = os.path.getsize({out!r}) if os.path.exists({out!r}) else 0
    more = chance.randrange(2000) if kills % 4 else 0
    while more and not (os.path.exists({out!r}) and os.path.getsize({out!r}) > size + more):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.02 if more else 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    kills += 1
"""


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.csv"])
def test_killed_at_twenty_moments_it_still_ends_with_each_photo_once(tmp_path, name):
    (tmp_path / "stub").mkdir()
    for i in range(600):
        save(tmp_path / "photos" / f"{i:04}.png", i % 250)
    out = tmp_path / "photos" / name
    script = textwrap.dedent(KILLS).format(
        tests=str(ROOT / "tests"),
        root=str(ROOT),
        stub=str(tmp_path / "stub"),
        photos=str(tmp_path / "photos"),
        out=str(out),
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "0\n", done.stderr
    with open(out, newline="") as file:
        written = list(csv.DictReader(file)) if name.endswith("csv") else rows(out)
    assert sorted(row["file_name"] for row in written) == [f"{i:04}.png" for i in range(600)]
    for row in written:
        brightness = int(row["file_name"][:4]) % 250
        assert row["text"] == f"Brightness {brightness}, of course."


@fast
@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_half_written_last_row_is_mended(photos, stub, cut):
    out = photos / "metadata.jsonl"
    run(photos, "--out", out)
    out.write_bytes(out.read_bytes()[:-cut])
    run(photos, "--out", out)
    assert sorted(row["file_name"] for row in rows(out)) == NAMES


@fast
def test_rows_are_whole_where_the_disk_takes_them_in_parts(tmp_path):
    output = command.JsonLines(tmp_path / "captions.jsonl")
    output.begin()
    whole = output.file.write
    output.file = SimpleNamespace(write=lambda data: whole(data[:7]))
    output.write([(None, {"file_name": name, "text": "A dog."}) for name in "ab"])
    assert [row["file_name"] for row in rows(output.path)] == ["a", "b"]

    def full(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    output.file = SimpleNamespace(write=full)
    with pytest.raises(st.ArtifactError, match=r"captions.jsonl cannot be written: No space left"):
        output.write([(None, {"file_name": "c", "text": "A dog."})])


@fast
def test_a_place_that_cannot_be_written_is_one_sentence(photos, stub):
    with pytest.raises(ValueError, match=r"storyteller: .*a\.png"):
        run(photos, "--out", photos / "a.png" / "captions.jsonl")


# Sidecars ----------------------------------------------------------------------------------------

PERSONS = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4"
 xmlns:dc="http://purl.org/dc/elements/1.1/">{}
<dc:subject><rdf:Bag><rdf:li>beach</rdf:li></rdf:Bag></dc:subject></rdf:Description>
</rdf:RDF></x:xmpmeta><?xpacket end="w"?>
"""
DESCRIBED = (
    '<dc:description><rdf:Alt><rdf:li xml:lang="x-default">Our holiday</rdf:li></rdf:Alt>'
    "</dc:description>"
)


def text_of(path: Path, prefix: str, name: str) -> str:
    (element,) = minidom.parse(str(path)).getElementsByTagNameNS(caption_xmp.XMP[prefix], name)
    return "".join(element.itertext()) if hasattr(element, "itertext") else element.toxml()


@fast
def test_sidecars_hold_description_and_alt_text_and_keep_all_else(photos, stub):
    (photos / "a.png.xmp").write_text(PERSONS.format(""))
    (photos / "b.png.xmp").write_text(PERSONS.format(DESCRIBED))
    (photos / "c.png.xmp").write_text("<broken")
    pixels = (photos / "a.png").read_bytes()
    out = photos / "metadata.jsonl"
    assert run(photos, "--out", out, "--xmp") == 1
    assert (photos / "a.png").read_bytes() == pixels
    for name, brightness in (("a.png", 0), ("sub/d.png", 30)):
        sidecar = photos / f"{name}.xmp"
        for prefix, tag in caption_xmp.DESCRIPTIONS:
            assert f">Brightness {brightness}, of course.<" in text_of(sidecar, prefix, tag)
        assert 'photoshop:CaptionWriter="Neural Storyteller (machine)"' in sidecar.read_text()
        assert "Date" not in sidecar.read_text()
    kept = (photos / "a.png.xmp").read_text()
    assert 'xmp:Rating="4"' in kept and "beach" in kept and "xpacket end" in kept
    assert (photos / "b.png.xmp").read_text() == PERSONS.format(DESCRIBED)
    errors = {row["file_name"]: row.get("error") for row in rows(out)}
    assert "c.png.xmp is no XMP sidecar" in errors["c.png"]
    assert (
        run(photos / "b.png", "--out", out, "--xmp", "--replace-descriptions", "--overwrite") == 0
    )
    assert "Our holiday" not in (photos / "b.png.xmp").read_text()
    assert "beach" in (photos / "b.png.xmp").read_text()


@fast
def test_a_machines_description_is_replaced_and_a_later_xmp_run_adds_what_is_missing(photos, stub):
    path = save(photos / "a.png", 50)
    assert caption_xmp.write_sidecar(path, "An old caption <&>.")
    assert caption_xmp.write_sidecar(path, "A new caption <&>.")
    written = caption_xmp.sidecar(path).read_text()
    corrected = written.replace('x-default">A new caption', 'x-default">My new caption')
    caption_xmp.sidecar(path).write_text(corrected)
    assert corrected != written and not caption_xmp.write_sidecar(path, "A third caption.")
    assert caption_xmp.sidecar(path).read_text() == corrected
    caption_xmp.sidecar(path).write_text(written)
    text = caption_xmp.sidecar(path).read_text()
    assert "old" not in text and text.count("A new caption &lt;&amp;&gt;.") == 3
    out = photos / "metadata.jsonl"
    run(photos, "--out", out)
    stub.batches.clear()
    run(photos, "--out", out, "--xmp")
    assert stub.batches == [] or sum(stub.batches) == 0
    assert caption_xmp.is_captioned(photos / "sub/d.png")
    assert not caption_xmp.sidecar(photos / "sub/broken.jpg").exists()


# With a captioner --------------------------------------------------------------------------------


def test_page_command_storyteller_and_evaluation_give_the_same_captions(app, tiny_model, tmp_path):
    photos = sorted((ROOT / "space/examples").glob("*.jpg"))[:3]
    out = tmp_path / "captions.jsonl"
    assert run(*photos, "--out", out, "--model", tiny_model, "--batch", 1) == 0
    by_command = [row["text"] for row in rows(out)]
    storyteller = st.Storyteller.from_pretrained(tiny_model)
    by_call = [storyteller.caption(photo)[0].text for photo in photos]
    default = st.Decoding()
    by_page = [
        app.caption(str(photo), "beam", default.beam_width, default.length_preference, 1)[0]
        for photo in photos
    ]
    features = torch.cat([storyteller.extract([photo]) for photo in photos])
    searched = st.generate(storyteller.captioner, features, range(len(photos)))
    by_evaluation = [
        st.detokenize(storyteller.vocab.decode(hypotheses[0].ids)) for hypotheses in searched
    ]
    assert by_command == by_call == by_page == by_evaluation
    assert all(by_call)


def test_constraints_reach_the_search(tiny_model, tmp_path):
    photo, out = ROOT / "space/examples/cat.jpg", tmp_path / "captions.jsonl"
    options = ["--start", "two dogs", "--must", "snow", "--never", "grass", "--max-chars", "40"]
    with pytest.raises(ValueError, match="does not know dogs"):
        run(photo, "--model", tiny_model, "--out", out, *options)
    options[1] = "two men"
    assert run(photo, "--model", tiny_model, "--out", out, *options, "--captions", 3) == 0
    (row,) = rows(out)
    assert len(row["captions"]) == 3 and row["captions"][0] == row["text"]
    for text in row["captions"]:
        assert text.startswith("Two men") and "snow" in text and "grass" not in text
        assert len(text) <= 40
    sampled = ["--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--captions", 4]
    run(photo, "--model", tiny_model, "--out", out, *sampled, "--overwrite")
    assert len(set(rows(out)[0]["captions"])) > 1


def test_the_module_starts_the_command_and_says_where_it_is_missing(tiny_model, tmp_path):
    photo = ROOT / "space/examples/cat.jpg"
    module = ROOT / "storyteller_utils.py"
    arguments = ["caption", str(photo), "--model", str(tiny_model)]
    done = subprocess.run(
        [sys.executable, str(module), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and json.loads(done.stdout)["file_name"] == str(photo)
    alone = tmp_path / "storyteller_utils.py"
    alone.write_bytes(module.read_bytes())
    done = subprocess.run([sys.executable, str(alone), *arguments], capture_output=True, text=True)
    assert done.returncode == 1 and "no caption.py" in done.stderr and not done.stdout


def test_metadata_loads_as_an_image_folder(photos, stub, tmp_path):
    datasets = pytest.importorskip("datasets")
    (photos / "sub/broken.jpg").unlink()
    assert run(photos, "--out", photos) == 0
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(photos), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(loaded["text"]) == sorted(row["text"] for row in rows(photos / "metadata.jsonl"))
