"""The static Space: the exported graphs, the page in a real browser, and what reaches the Hub."""

import base64
import csv
import hashlib
import re
import shutil
import struct
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import digests, listing, on_disk
from local_hub import private
from PIL import Image

import publish
import storyteller_utils as st
from support import CHROMIUM_FLAGS

for package in publish.EXPORT_PACKAGES:
    pytest.importorskip(package)
ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_thisTokenMustShowUpNowhere"
EXAMPLES = ROOT / "space/examples"
CAT, COFFEE = EXAMPLES / "cat.jpg", EXAMPLES / "coffee.jpg"
COMPARED = 20 + len(list(EXAMPLES.glob("*.jpg")))  # photos by an export: twenty drawn ones too
WORDS = "a brown dog runs on the grass two men sit in snow red bird flies over blue water 's"
SIDE = 96  # small, for speed: a grid of 3 x 3 that is pooled to 7 x 7


@pytest.fixture(scope="session")
def export():
    """The module that publish.py imports."""
    sys.path.append(str(ROOT / "space/browser"))
    import export

    return export


def save_captioner(
    folder: Path, tiny_model: Path, decoder: str, regions: int, sizes: dict, seed: int = 1
) -> Path:
    """Save a captioner of random weights that generates another caption for each photo."""
    config = st.read_json(tiny_model / "config.json")
    vocab = st.Vocab([*st.SPECIAL, *sorted(set(WORDS.split()))])
    width = config["width"]
    torch.manual_seed(seed)
    moments = (torch.zeros(width), torch.ones(width))
    captioner = st.Captioner(decoder, width, len(vocab), moments, **sizes)
    for parameter in captioner.parameters():
        parameter.data.mul_(2)
    config |= {"decoder": decoder, "sizes": sizes, "regions": regions, "photo_size": SIDE}
    st.Storyteller(config, vocab, captioner).save_pretrained(folder)
    return folder


# The graphs


@pytest.mark.parametrize(
    ("decoder", "regions", "sizes"),
    [
        ("attention", 49, {"embedding": 16, "hidden": 32, "attention": 16}),
        ("transformer", 49, {"hidden": 32, "layers": 2, "heads": 2, "regions": 49}),
    ],
)
def test_decoders_that_see_the_grid_give_the_modules_captions_as_onnx(
    export, tiny_model, tmp_path, capsys, decoder, regions, sizes
):
    model = save_captioner(tmp_path / "model", tiny_model, decoder, regions, sizes)
    export.export(model, tmp_path / "out", photos=EXAMPLES)  # compares captions
    assert f"for {COMPARED} of {COMPARED} photos" in capsys.readouterr().out
    assert listing(tmp_path / "out") == ["README.md", "captioner.json", "encoder.onnx", "step.onnx"]


LSTM = {"decoder": "lstm", "regions": 1, "sizes": {"embedding": 16, "hidden": 32}}


@pytest.fixture(scope="module")
def lstm(tiny_model, tmp_path_factory):
    return save_captioner(tmp_path_factory.mktemp("lstm") / "model", tiny_model, **LSTM)


@pytest.fixture(scope="module")
def lstm_graphs(export, lstm, tmp_path_factory):
    """Graphs of that captioner, whose tracing takes seconds, and the description of its state."""
    folder, storyteller = tmp_path_factory.mktemp("graphs"), st.Storyteller.from_pretrained(lstm)
    backbone = export.fresh_backbone(lstm, storyteller.config)
    return folder, export.write_graphs(storyteller, backbone, folder)


@pytest.fixture
def traced(export, lstm_graphs, monkeypatch):
    """Whatever is exported gets these graphs."""
    folder, state = lstm_graphs

    def write_graphs(storyteller, backbone, out):
        shutil.copytree(folder, out, dirs_exist_ok=True)
        return state

    monkeypatch.setattr(export, "write_graphs", write_graphs)


@pytest.mark.usefixtures("traced")
def test_an_lstm_does_so_too_and_in_8_bits_its_graphs_are_half_as_large(
    export, lstm, tmp_path, capsys
):
    sizes, equal = {}, {}
    for precision in ("float16", "int8"):
        out = export.export(lstm, tmp_path / precision, precision == "int8", EXAMPLES)
        assert st.read_json(out / "captioner.json")["precision"] == precision
        sizes[precision] = sum(path.stat().st_size for path in out.glob("*.onnx"))
        equal[precision] = int(
            re.search(rf"(\d+) of {COMPARED} photos", capsys.readouterr().out)[1]
        )
    # EfficientNet-Lite0 has 3.4 million weights in its convolutions; torch 2.6 writes 4.04 MB.
    assert sizes["int8"] < 4_100_000 < 6_000_000 < sizes["float16"] < 8_000_000
    # Scores differ in the third digit, which says nothing about the captions.
    assert equal["float16"] == COMPARED and equal["int8"] >= 5


@pytest.mark.usefixtures("traced")
def test_graphs_that_caption_otherwise_are_refused(export, tiny_model, tmp_path):
    other = save_captioner(tmp_path / "model", tiny_model, **LSTM, seed=2)
    with pytest.raises(st.ArtifactError, match=r"other captions than .* Do not publish"):
        export.export(other, tmp_path / "out", photos=EXAMPLES)


@pytest.mark.fast
def test_a_backbone_that_cannot_run_in_a_browser_is_refused_with_a_sentence(export):
    with pytest.raises(st.ArtifactError, match=r"timm/resnet18 cannot be exported.*resnet50"):
        export.refuse({"backbone": "timm/resnet18"})


@pytest.mark.fast
@pytest.mark.parametrize(("size", "pooled"), [(10, 7), (7, 7), (3, 7), (8, 7), (10, 10)])
def test_the_pooling_matrix_averages_as_torch_does(export, size, pooled):
    grid = torch.rand(1, 4, size, size)
    matrix = export.pooling_matrix(size, pooled)
    expected = torch.nn.functional.adaptive_avg_pool2d(grid, pooled)
    assert torch.allclose(matrix @ grid @ matrix.T, expected, atol=1e-6)


@pytest.mark.fast
def test_packed_weights_are_exact_in_16_bits_and_near_in_8(export):
    random = np.random.default_rng(0)
    own = random.normal(size=(64, 8, 3, 3)).astype(np.float16)
    factors = random.uniform(0.1, 3, size=(64, 1, 1, 1)).astype(np.float32)
    folded = own * factors
    small, result = export.pack(folded, own, int8=False)
    assert small.dtype == np.float16 and np.allclose(small * result, folded, rtol=1e-6)
    exact = own.astype(np.float32)
    small, none = export.pack(exact, None, int8=False)
    assert none is None and np.array_equal(small.astype(np.float32), exact)
    small, result = export.pack(folded, None, int8=True)
    assert small.dtype == np.int8 and np.abs(small * result - folded).max() < 0.01 * folded.max()
    # What neither form holds exactly stays as it is.
    assert export.pack(random.normal(size=(64, 72)).astype(np.float32), own, int8=False) is None


# The folder and the Hub


@pytest.fixture(scope="session")
def static(tmp_path_factory):
    """The static Space of the captioner in the repository."""
    return publish.build_static_space(ROOT / "space/model", tmp_path_factory.mktemp("x") / "static")


def test_a_static_space_holds_what_belongs_to_it_and_little_of_it(static):
    examples = [f"examples/{p.name}" for p in (ROOT / "space/examples").iterdir()]
    model = [f"model/{name}" for name in publish.BROWSER_MODEL_FILES]
    assert listing(static) == sorted([*publish.BROWSER_FILES, *examples, *model])
    assert sum((static / name).stat().st_size for name in listing(static)) < 25_000_000


def test_the_runtime_is_the_pinned_one():
    import gzip
    import hashlib

    runtime = ROOT / "space/browser/runtime"
    pinned = (runtime / "README.md").read_text(encoding="utf-8")
    for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        packed = runtime / f"{name}.gz"
        data = gzip.decompress(packed.read_bytes()) if packed.is_file() else None
        digest = hashlib.sha256(data or (runtime / name).read_bytes()).hexdigest()
        assert f"`{digest}`" in pinned
    assert "MIT License" in (runtime / "LICENSE").read_text()
    version = re.search(r"onnxruntime-web (\d+\.\d+\.\d+)", pinned)[1]
    script = (ROOT / "space/browser/captioner.js").read_text(encoding="utf-8")
    assert f"?v={version}" in script
    size = (runtime / "ort-wasm-simd-threaded.wasm.gz").stat().st_size
    assert f"{size:_}" in script


def test_a_static_push_brings_every_byte_and_replaces_a_gradio_space(hub, static, capsys):
    theirs = {"app.py": b"", "storyteller_utils.py": b"", "notes.md": b"", "model/vocab.json": b""}
    hub.repos["space", "me/storyteller"] = {"files": theirs, "private": True}
    hub.failures = {"create": [(402, "pay")]}
    publish.push_space(static, "me/storyteller", token=TOKEN)
    files = hub.repos["space", "me/storyteller"]["files"]
    assert files.pop("notes.md") == b""
    assert digests(files) == on_disk(static)
    hub.failures = {}
    pushed = publish.push_space(static, "me/new", token=TOKEN, wait=True)
    repo = hub.repos["space", "me/new"]
    assert repo["sdk"] == "static" and private(repo) and digests(repo["files"]) == on_disk(static)
    assert pushed["hardware"] == "the visitor's browser" and TOKEN not in capsys.readouterr().out


def test_where_gradio_costs_money_the_static_space_is_named_and_pushed_only_when_asked(
    hub, static, tiny_model, tmp_path, capsys
):
    space = publish.build_space(tiny_model, tmp_path / "space")
    paid = (402, "hosting Gradio Spaces on free cpu-basic requires a PRO subscription")
    push = partial(publish.push_kind, space=space, static=static, token=TOKEN)
    hub.failures = {"create": [paid], "create zero-a10g": [paid]}
    assert push("gradio", repo_id="me/a")["address"] is None and not hub.repos
    assert "Every account may have a static Space for free" in capsys.readouterr().out
    hub.failures = {"create": [paid], "create zero-a10g": [paid]}
    assert push("both", repo_id="me/a")["address"]
    assert hub.repos["space", "me/a"]["sdk"] == "static"
    assert push("both", repo_id="me/b")["hardware"] == "cpu-basic"
    assert hub.repos["space", "me/b"]["sdk"] == "gradio"
    assert push("static", repo_id="me/c")["hardware"] == "the visitor's browser"
    with pytest.raises(st.ArtifactError, match="no static Space to push"):
        publish.push_kind("static", space, None, "me/d", token=TOKEN)


def test_what_a_static_space_lacks_is_said_in_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publish, "EXPORT_PACKAGES", ("onnx", "absent_onnxscript"))
    assert publish.build_static_if_possible(ROOT / "space/model", tmp_path / "static") is None
    assert "pip install onnx absent_onnxscript" in capsys.readouterr().out
    monkeypatch.setattr(publish, "HERE", tmp_path)
    inputs = tmp_path / "input"
    inputs.mkdir()
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(inputs))
    assert publish.build_static_if_possible(ROOT / "space/model", tmp_path / "static") is None
    assert "add the repository's folder space/browser as a dataset" in capsys.readouterr().out
    attached = inputs / "datasets/me/browser-files/browser"
    shutil.copytree(ROOT / "space/browser", attached)
    assert publish.find_browser() == attached


def test_a_full_disk_is_an_error_and_leaves_no_half_of_a_static_space_unsaid(
    export, tmp_path, monkeypatch
):
    def fill(_):
        raise st.ArtifactError("static.zip cannot be written: No space left on device.")

    monkeypatch.setattr(export, "export", lambda *_: None)
    page = {"index.html": ROOT / "space/browser/index.html"}
    monkeypatch.setattr(publish, "static_files", lambda *_: page)
    monkeypatch.setattr(publish, "zip_space", fill)
    with pytest.raises(st.ArtifactError, match="No space left"):
        publish.build_static_if_possible(ROOT / "space/model", tmp_path / "static")


def test_on_kaggle_one_sentence_says_what_to_install_and_what_to_attach(
    tmp_path, monkeypatch, capsys
):
    real = publish.importlib.util.find_spec
    hidden = ("onnx", "onnxscript")
    monkeypatch.setattr(
        publish.importlib.util,
        "find_spec",
        lambda name, *given: None if name in hidden else real(name, *given),
    )
    monkeypatch.setattr(publish, "HERE", tmp_path)
    inputs = tmp_path / "input"
    inputs.mkdir()
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(inputs))
    build = partial(publish.build_static_if_possible, ROOT / "space/model", tmp_path / "static")
    assert build() is None
    said = capsys.readouterr().out
    assert said.startswith("No static Space: onnx, onnxscript must be installed first")
    for part in ("%pip install onnx onnxscript onnxruntime", "internet on", "--find-links"):
        assert part in said
    assert said.endswith("add the repository's folder space/browser as a dataset.\n")
    assert ". " not in said and said.count("\n") == 1
    shutil.copytree(ROOT / "space/browser", inputs / "files/browser")
    assert build() is None
    assert "as a dataset.\n" not in capsys.readouterr().out


def test_the_front_matter_is_what_the_hub_reads():
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "space/browser/README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert all(name.startswith("cross-origin-") for name in head["custom_headers"])
    assert head["sdk"] == "static" and (ROOT / "space/browser" / head["app_file"]).is_file()
    assert 0 < len(head["short_description"]) <= 60


# The page


CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed: apt-get install chromium"
)
expect = playwright.expect
SHOTS = ROOT / "outputs" / "screenshots"
FLAGS = [
    *CHROMIUM_FLAGS,
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
SECONDS = 60_000  # milliseconds that anything may take on a busy machine


@pytest.fixture(scope="module")
def served(static):
    server = publish.make_server(static)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def errors():
    """What was said in a page's console, or asked of another server."""
    return []


@pytest.fixture(scope="module")
def opened(chromium, served, errors):
    """The page, which takes seconds to open."""

    def note(request):
        if not request.url.startswith((served, "data:", "blob:")):
            errors.append(f"a request to {request.url}")

    context = chromium.new_context()
    page = context.new_page()
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    context.on("request", note)
    page.goto(served)
    page.locator("#examples button").first.wait_for(timeout=SECONDS)
    yield page
    context.close()


@pytest.fixture
def page(opened, errors):
    """The page as the test before left it, without its caption; at the end there is no error."""
    errors.clear()
    opened.locator("#caption").evaluate("caption => caption.textContent = ''")
    yield opened
    assert not errors


@pytest.fixture(scope="module")
def storyteller():
    storyteller = st.Storyteller.from_pretrained(ROOT / "space/model")
    storyteller.config["precision"] = "float32"  # as the browser computes
    return storyteller


def give(page, *paths):
    page.locator("#files").set_input_files([str(path) for path in paths])


def see_caption(page, text):
    expect(page.locator("#caption")).to_have_text(text, timeout=SECONDS)


def see_alternatives(page):
    return page.locator("#others td:first-child").all_inner_texts()


def in_page(page, code, *given):
    """Run code with the page's own captioner.js as `m`, its captioner as `c` and what is given."""
    return page.evaluate(
        """async ([code, ...given]) => {
          const m = await import('./captioner.js');
          self.loaded ??= m.load(new URL('model/', location.href));
          const run = Object.getPrototypeOf(async () => {}).constructor;
          return run('m', 'c', 'given', code)(m, await self.loaded, given);
        }""",
        [code, *given],
    )


@needs_browser
def test_the_browser_gives_the_modules_captions_and_alternatives(page, storyteller):
    photos = sorted(ROOT.glob("space/examples/*.jpg"))
    shared = ROOT.parent / "shared/flickr8k/Images"
    photos += sorted(shared.iterdir())[:5] if shared.is_dir() else []
    for photo in photos:
        caption = storyteller.caption(photo)[0]
        give(page, photo)
        see_caption(page, caption.text)
        assert see_alternatives(page) == [text for text, _ in caption.alternatives]
        words = page.locator("#words label").all_inner_texts()
        assert words == caption.words
        expect(page.locator("#note")).to_have_text(
            re.compile(r"in \d+\.\d\d s on this device · .*\s▰*▱*\s\d\.\d\d")
        )


@needs_browser
def test_the_examples_say_what_it_has_learned_and_what_not(page, storyteller):
    groups = page.locator("#examples > div")
    expect(groups.nth(0)).to_contain_text("What it has learned")
    expect(groups.nth(1)).to_contain_text("What it has not: it guesses")
    assert groups.count() == 2
    alts = groups.nth(0).locator("img").evaluate_all("all => all.map(image => image.alt)")
    seen = {
        "bicycle": "bicycle",
        "dog": "brown and black dog",
        "egret": "white bird",
        "photographer": "camera",
        "runner": "jumping",
    }
    assert alts == [f"Example: {name}" for name in seen]
    for name, words in seen.items():
        caption = storyteller.caption(EXAMPLES / f"{name}.jpg")[0]
        assert words in caption.text and caption.confidence >= 0.3


@needs_browser
def test_a_photo_takes_well_under_a_second_on_a_quiet_machine(page):
    sys.path.append(str(ROOT / "tests/bench"))
    import browser

    # On a busy one it takes longer: the best of the examples, and a bound ten times as high.
    assert min(browser.seconds_of_photos(page, 0)[0]) < 3


@needs_browser
def test_with_the_spaces_headers_it_uses_threads_and_captions_the_same(
    chromium, static, storyteller
):
    yaml = pytest.importorskip("yaml")
    head = yaml.safe_load((static / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    server = publish.make_server(static, headers=head["custom_headers"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = chromium.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    assert page.evaluate("crossOriginIsolated")
    give(page, COFFEE)
    see_caption(page, storyteller.caption(COFFEE)[0].text)
    page.close()
    server.shutdown()
    server.server_close()


@needs_browser
@pytest.mark.parametrize(
    "decoding",
    [
        {"method": "greedy"},
        {"beam_width": 3},
        {"beam_width": 10, "length_preference": 0.0},
        {"min_length": 14, "no_repeat": 3},
        {"max_length": 4},
        {"no_repeat": 0, "length_preference": 2.0},
    ],
)
def test_every_decoding_is_the_modules(page, storyteller, decoding):
    # Of a photo as it has learned from: the confidence in others is 0, whatever the score.
    caption = storyteller.caption(COFFEE.with_name("bicycle.jpg"), **decoding)[0]
    assert caption.confidence > 0
    code = """const blob = await (await fetch('examples/bicycle.jpg')).blob();
    const r = await m.caption(c, blob, given[0]);
    return {...r, attention: r.attention.map(weights => [...weights])};"""
    result = in_page(page, code, decoding)
    assert [a["text"] for a in result["alternatives"]] == [text for text, _ in caption.alternatives]
    scores = [a["score"] for a in result["alternatives"]]
    assert scores == pytest.approx([score for _, score in caption.alternatives], abs=1e-3)
    assert result["confidence"] == pytest.approx(caption.confidence, abs=1e-3)
    expected = caption.attention.reshape(len(caption.words), -1)
    assert np.allclose(result["attention"], expected, atol=1e-3)


@needs_browser
def test_pixels_are_resized_to_the_bit_as_the_module_does(page, tmp_path):
    random = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 700), (700, 5), (333, 500), (64, 64), (1200, 801)):
        photo = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(photo).save(tmp_path / "photo.png")
        encoded = base64.b64encode((tmp_path / "photo.png").read_bytes()).decode()
        for how in ("squash", "crop"):
            code = """const bytes = Uint8Array.from(atob(given[0]), x => x.charCodeAt(0));
            const how = {side: 224, preprocessing: given[1]};
            const pixels = await m.pixels(new Blob([bytes]), how);
            return [...new Uint8Array(await crypto.subtle.digest('SHA-256', pixels))];"""
            result = in_page(page, code, encoded, how)
            expected = st.preprocess(torch.from_numpy(photo).permute(2, 0, 1), how, 224)
            digest = hashlib.sha256(expected.contiguous().numpy()).digest()
            assert bytes(result) == digest, (height, width, how)


@needs_browser
def test_words_are_written_as_the_module_writes_them(page, export, shared):
    lines = (shared / "flickr8k/captions.txt").read_text(encoding="utf-8").splitlines()[1:2001]
    captions = [st.tokenize(line.split(",", 1)[1]) for line in lines]
    captions += [
        "a -lrb- b -rrb- c",
        "constructor !",
        "gon na do n't",
        "\u4e00 \u4e8c",
        "$ 5 is 50 %",
    ]
    captions = [words.split() if isinstance(words, str) else words for words in captions]
    vocab = st.Vocab([*st.SPECIAL, "hund"], forms={"hund": "Hund"})
    captions.append(["ein", "hund"])
    rules = export.sentence_rules(vocab)
    result = in_page(page, "return given[0].map(w => m.sentence(w, given[1]))", captions, rules)
    assert result == [vocab.sentence(words) for words in captions]


@needs_browser
def test_a_word_shows_its_attention_by_pointer_and_by_keyboard(page):
    give(page, COFFEE)
    words = page.locator("#words label")
    words.first.wait_for(timeout=SECONDS)
    veil = "document.getElementById('veil').toDataURL()"
    words.nth(1).click()
    page.mouse.move(0, 0)
    second = page.evaluate(veil)
    page.keyboard.press("ArrowRight")  # radio buttons
    third = page.evaluate(veil)
    assert second != third
    words.nth(1).hover()
    assert page.evaluate(veil) == second
    page.mouse.move(0, 0)
    assert page.evaluate(veil) == third


@needs_browser
def test_a_guess_shows_the_other_captions_above_its_details(page, storyteller):
    unsure = page.locator("#unsure")
    for name in ("cat.jpg", "photographer.jpg", "cat.jpg"):
        photo = ROOT / "space/examples" / name
        caption = storyteller.caption(photo)[0]
        give(page, photo)
        see_caption(page, caption.text)
        if caption.confidence >= 0.3:
            expect(unsure).to_be_hidden()
            continue
        expect(unsure).to_contain_text("I am not sure. It could also be:")
        expect(unsure.locator("li")).to_have_text([text for text, _ in caption.alternatives[1:]])
        box = unsure.bounding_box()
        assert box["y"] + box["height"] <= page.locator("#words").bounding_box()["y"]


@needs_browser
def test_several_photos_give_a_table_and_a_csv_and_go_on_past_a_broken_one(
    page, storyteller, tmp_path
):
    (tmp_path / 'no "photo", really.jpg').write_bytes(CAT.read_bytes()[:200])
    give(page, CAT, tmp_path / 'no "photo", really.jpg', COFFEE)
    expect(page.locator("#count")).to_have_text("3 of 3 photos captioned", timeout=SECONDS)
    with page.expect_download() as download:
        page.locator("#csv").click()
    with open(download.value.path(), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    captions = [caption.text for caption in storyteller.caption([CAT, COFFEE])]
    assert [row["caption"] for row in rows] == [captions[0], "", captions[1]]
    assert rows[1]["photo"] == 'no "photo", really.jpg' and "not a photo" in rows[1]["problem"]
    page.locator("#several td button", has_text="coffee").click()
    see_caption(page, captions[1])
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#several")).to_be_hidden()


@needs_browser
def test_a_photo_can_be_pasted_and_dropped(page, storyteller):
    send = """async ([name, kind]) => {
      const blob = await (await fetch(`examples/${name}`)).blob();
      const data = new DataTransfer();
      data.items.add(new File([blob], name, {type: 'image/jpeg'}));
      const event = kind === 'paste'
        ? new ClipboardEvent('paste', {clipboardData: data, bubbles: true})
        : new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
      document.body.dispatchEvent(event);
    }"""
    page.evaluate(send, ["cat.jpg", "paste"])
    see_caption(page, storyteller.caption(CAT)[0].text)
    page.evaluate(send, ["coffee.jpg", "drop"])
    see_caption(page, storyteller.caption(COFFEE)[0].text)


@needs_browser
def test_a_broken_file_a_huge_photo_and_a_bomb_are_said_and_the_page_lives_on(
    page, storyteller, tmp_path
):
    (tmp_path / "notes.jpg").write_text("not a photo")
    Image.new("RGB", (1, 1)).save(tmp_path / "bomb.png")
    data = bytearray((tmp_path / "bomb.png").read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    (tmp_path / "bomb.png").write_bytes(data)
    for name in ("notes.jpg", "bomb.png"):
        give(page, tmp_path / name)
        see_caption(page, re.compile(rf"{name} is not a photo that this browser can read\."))
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    large = Image.fromarray(noise).resize((6000, 4500))
    large.save(tmp_path / "large.png", compress_level=1)
    give(page, tmp_path / "large.png")
    see_caption(page, storyteller.caption(tmp_path / "large.png")[0].text)


@needs_browser
def test_it_works_without_a_network_once_loaded(page, errors, storyteller):
    page.wait_for_function(
        "navigator.serviceWorker.ready.then(() => caches.open('storyteller'))"
        ".then(cache => cache.keys()).then(keys => keys.length === 3)",
        timeout=SECONDS,
    )
    page.context.set_offline(True)
    page.reload()
    expect(page.locator("#loading")).to_be_hidden(timeout=SECONDS)
    give(page, CAT)
    see_caption(page, storyteller.caption(CAT)[0].text)
    page.context.set_offline(False)
    # The examples' own pictures need the network.
    errors[:] = [error for error in errors if "Failed to load resource" not in error]


@needs_browser
@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("wide", 1280, "light"), ("phone", 390, "light"), ("dark", 1280, "dark")],
)
def test_it_fits_the_screen_and_names_its_controls(page, name, width, scheme):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    give(page, CAT, COFFEE)
    expect(page.locator("#count")).to_have_text("2 of 2 photos captioned", timeout=SECONDS)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"static_{name}.png", full_page=True)
    assert page.locator("#caption").get_attribute("aria-live") == "polite"
    for label in ("Choose photos", "Method", "Beam width", "Length preference"):
        expect(page.get_by_label(label)).to_be_attached()
    page.get_by_role("button", name="Clear").click()
