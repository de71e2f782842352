"""The page in a real browser: Debian's Chromium, driven by playwright."""

import csv
import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from conftest import look_around

from support import CHROMIUM_FLAGS

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="Chromium is not installed: apt-get install chromium"
)
expect = playwright.expect
CAT, COFFEE = (ROOT / "space/examples" / name for name in ("cat.jpg", "coffee.jpg"))
SHOTS = ROOT / "outputs" / "screenshots"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def attentive(app):
    """The page shows attention weights, which the tiny captioner does not have."""
    real = app.STORYTELLER.caption
    app.STORYTELLER.caption = lambda photos, **options: [
        dataclasses.replace(caption, attention=look_around(caption.words))
        for caption in real(photos, **options)
    ]
    yield app
    app.STORYTELLER.caption = real


@pytest.fixture
def open_page(browser, address, attentive):
    """Open the page at a width; at the end nothing may have gone wrong in its console."""
    opened, errors = [], []

    def note(message):
        # Pages of gradio ask the internet for a script for frames, and its 5.49 for the progress of
        # "undefined".
        if message.type == "error" and not re.search(
            r"cdnjs|upload_progress|ERR_NAME_NOT_RESOLVED|^Response ",
            f"{message.text} {message.location}",
        ):
            errors.append(message.text)

    def opener(width=1280, height=900, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address, wait_until="domcontentloaded")
        page.get_by_role("button", name="Caption this photo").wait_for(timeout=30_000)
        opened.append(page)
        return page

    opener.errors = errors
    yield opener
    for page in opened:
        page.close()
    assert not errors


def give(page, *paths):
    files = "input[type=file][multiple]" if len(paths) > 1 else "input[type=file]"
    page.locator(files).first.set_input_files([str(path) for path in paths])


def caption_of(page):
    return page.locator("#caption p:not(:has(em))")


def see(page, text):
    page.get_by_text(re.compile(text)).first.wait_for(timeout=15_000)


def test_a_photo_gets_the_caption_that_the_api_and_the_module_give(open_page, client, app):
    from gradio_client import handle_file

    page = open_page()
    give(page, CAT)
    expect(caption_of(page)).to_have_text(app.STORYTELLER.caption(CAT)[0].text, timeout=15_000)
    assert (
        caption_of(page).inner_text()
        == client.predict(handle_file(str(CAT)), api_name="/caption")[0]
    )
    assert page.locator("#caption").get_attribute("aria-live") == "polite"
    see(page, r"Captioned in \d")


def test_an_example_is_captioned_at_a_click_and_the_cross_clears_it(open_page, app):
    page = open_page()
    page.locator("#examples button, #examples .gallery-item").first.click()
    expect(caption_of(page)).to_have_text(
        app.STORYTELLER.caption(app.EXAMPLES[0])[0].text, timeout=15_000
    )
    page.get_by_label(re.compile("Clear|Remove")).first.click()
    expect(page.locator("#caption em")).to_be_visible(timeout=15_000)


def test_another_decoding_gives_another_caption(open_page, app):
    page = open_page()
    give(page, CAT)
    caption_of(page).wait_for(timeout=15_000)
    # Gradio 6, and 5.
    rows = page.locator("#best [role=row]:has([role=gridcell]), #best tr[slot=tbody]")
    expect(rows).to_have_count(
        len(app.STORYTELLER.caption(CAT, beam_width=5)[0].alternatives), timeout=15_000
    )
    page.get_by_text("Decoding").first.click()
    page.get_by_label("Greedy").first.check()
    expect(rows).to_have_count(1, timeout=15_000)


@pytest.mark.parametrize("confidence", [0.1, 0.9])
def test_a_guess_shows_the_other_captions_above_its_details(
    open_page, app, monkeypatch, confidence
):
    real = app.STORYTELLER.caption
    monkeypatch.setattr(
        app.STORYTELLER,
        "caption",
        lambda photos, **options: [
            dataclasses.replace(caption, confidence=confidence)
            for caption in real(photos, **options)
        ],
    )
    page = open_page()
    give(page, CAT)
    page.locator(".attention .strip").wait_for(timeout=15_000)
    others = page.locator("#others")
    if confidence > 0.3:
        expect(others).to_be_hidden()
        return
    expect(others).to_contain_text("I am not sure. It could also be:")
    texts = [text for text, _ in real([CAT])[0].alternatives[1:]]
    expect(others.locator("li")).to_have_text(texts)
    assert bottom(others) <= page.locator(".attention").bounding_box()["y"]


def bottom(locator):
    box = locator.bounding_box()
    return box["y"] + box["height"]


def test_the_closed_part_holds_the_words_that_a_caption_must_have(open_page):
    page = open_page()
    words = page.get_by_label("It has these words")
    expect(words).to_be_hidden()
    page.get_by_text("More", exact=True).click()
    give(page, CAT)
    caption_of(page).wait_for(timeout=15_000)
    words.fill("snow")
    words.press("Enter")
    expect(caption_of(page)).to_contain_text("snow", timeout=15_000)
    words.fill("zebra")
    words.press("Enter")
    see(page, "The captioner does not know zebra")


def test_a_word_shows_its_attention_on_the_photo(open_page):
    page = open_page()
    give(page, COFFEE)
    page.locator(".attention .strip").wait_for(timeout=15_000)
    words = page.locator(".attention label")
    assert words.count() > 1, "the tiny captioner must generate more than one word for this test"
    for i in range(2):
        words.nth(i).click()
        page.mouse.move(0, 0)
        shown = [page.locator(".attention .veil").nth(j) for j in range(words.count())]
        expect(shown[i]).to_have_css("opacity", "1")
        expect(shown[1 - i]).to_have_css("opacity", "0")
    page.keyboard.press("ArrowRight")  # radio buttons: the keyboard does it too
    expect(page.locator(".attention .veil").nth(2 % words.count())).to_have_css("opacity", "1")
    with page.expect_download() as download:
        page.locator(".attention .strip").click()
    assert Path(download.value.path()).read_bytes()[:2] == b"\xff\xd8"  # a JPEG


def test_several_photos_give_a_csv(open_page, app):
    page = open_page()
    page.get_by_role("tab", name="Several photos").click()
    give(page, CAT, COFFEE)
    see(page, "coffee")
    page.get_by_role("button", name="Caption all photos").click()
    with page.expect_download(timeout=20_000) as download:
        page.get_by_role("link", name=re.compile(r"\d B")).click(timeout=20_000)
    with open(download.value.path(), newline="", encoding="utf-8") as file:
        assert [row["caption"] for row in csv.DictReader(file)] == [
            t.text for t in app.STORYTELLER.caption([CAT, COFFEE])
        ]


def test_what_cannot_be_captioned_is_said_and_the_page_lives_on(open_page, tmp_path):
    from test_space import write_bomb

    page = open_page()
    page.get_by_role("button", name="Caption this photo").click()
    see(page, "Please choose a photo first")
    (tmp_path / "notes.jpg").write_text("not a photo")
    write_bomb(tmp_path / "bomb.png")
    (tmp_path / "large.jpg").write_bytes(bytes(16_000_000))
    for name, says in (
        ("notes.jpg", "notes.jpg cannot be read"),
        ("bomb.png", "pixels"),
        ("large.jpg", "exceeds? the maximum allowed size"),
    ):
        give(page, tmp_path / name)
        see(page, says)
        page.reload(wait_until="domcontentloaded")
        page.get_by_role("button", name="Caption this photo").wait_for(timeout=30_000)
    give(page, CAT)
    caption_of(page).wait_for(timeout=15_000)
    # A refused upload and what a reload cut short do show in the console, as what they are.
    known = "413|Failed to load resource|AbortError|Connection errored"
    open_page.errors[:] = [error for error in open_page.errors if not re.search(known, error)]


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("wide", 1280, "light"), ("phone", 390, "light"), ("dark", 1280, "dark")],
)
def test_it_fits_the_screen(open_page, name, width, scheme):
    page = open_page(width, scheme=scheme)
    give(page, CAT)
    page.locator(".attention .strip").wait_for(timeout=15_000)
    for tab in ("One photo", "Several photos", "About"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{name}_{tab.split()[0].lower()}.png", full_page=True)
