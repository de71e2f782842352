"""The web page of Neural Storyteller: a photo in, one sentence about it out. The work is in storyteller_utils.py."""
import base64
import csv
import io
import os
import random
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")  # read when gradio is imported
try:
    from spaces import GPU  # there on ZeroGPU, where it must come before torch
except ImportError:
    def GPU(task): return task
import gradio as gr

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the module: beside this file in a Space, one level up in the repository
import storyteller_utils as st

MODEL = Path(os.environ.get("MODEL") or HERE / "model")
TELLER = st.Storyteller.from_pretrained(MODEL)
LEARNED, SQUASH = TELLER.config["dataset"], TELLER.config["preprocessing"]
EXAMPLES = sorted(str(path) for path in (HERE / "examples").iterdir() if path.suffix in (".jpg", ".png"))
COLUMNS, MAX_PHOTOS = ["photo", "caption", "score", "problem"], 50
NEW = int(gr.__version__.split(".")[0]) >= 6  # Kaggle has 5.49, the Space 6: theme, css and hiding moved in between
HIDDEN = {"api_visibility": "private"} if NEW else {"api_name": False}
FONT = ["system-ui", "sans-serif"]  # gradio's own would be fetched from Google
LOOK = {"theme": gr.themes.Default(primary_hue="amber", neutral_hue="stone", font=FONT, font_mono=FONT),
        "css_paths": HERE / "style.css"}
TELLER.tell(EXAMPLES[:1])  # loads all there is to load now, not under the first visitor's eyes
SHARE = os.environ.get("GRADIO_SHARE", "").lower() == "true"  # gradio would share by itself on Kaggle
LAUNCH = {"max_file_size": "15mb", "ssr_mode": False, "share": SHARE, **(LOOK if NEW else {})}
WAITING = "*Its story will stand here.*"
LIMITS = """## What it gets wrong
It was taught by people describing strangers' photos. It guesses at gender and age, is often wrong about counts, colours
and rare things, and says confidently what usually goes with what it sees. Do not use it to judge people.
Photos are read in this program's memory, kept for at most an hour and sent nowhere else.\n\n"""


def explain(error, photo):
    """Say what went wrong in a sentence for visitors: no path, and no detail of what nobody foresaw."""
    if isinstance(error, (ValueError, st.ArtifactError)):
        return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\]\S*[/\\]", "", str(error).replace(str(photo), Path(photo).name))
    traceback.print_exception(error)  # for the log of the Space
    return f"{Path(photo).name} could not be captioned."


def attempt(teller, photos, options):
    """Caption photos together, or each by itself where one fails. Returns a Telling or an error message for each."""
    try:
        return teller.tell(photos, **options)
    except Exception as error:  # one visitor's odd file must not end the page for the others
        return [explain(error, photos[0])] if len(photos) == 1 else [attempt(teller, [p], options)[0] for p in photos]


@GPU
def attempt_many(photos, options):
    """Caption many photos, eight at a time, on the GPU that ZeroGPU lends to this function, elsewhere on the CPU."""
    teller = st.Storyteller.from_pretrained(MODEL, "cuda") if os.environ.get("SPACES_ZERO_GPU") else TELLER
    for start in range(0, len(photos), 8):
        yield attempt(teller, photos[start:start + 8], options)


def caption(photo, method, beam_width, length_preference, temperature, seed=None):
    """Caption one photo: the caption, the best captions with their scores, and the time it took."""
    if not photo:
        raise gr.Error("Please choose a photo first.", print_exception=False)
    began = time.perf_counter()
    told = attempt(TELLER, [photo], {
        "method": method, "beam_width": int(beam_width), "length_preference": length_preference,
        "temperature": temperature, "seed": random.getrandbits(31) if seed is None else int(seed)})[0]
    if isinstance(told, str):
        raise gr.Error(told, print_exception=False)
    rows = [[text, round(score, 3)] for text, score in told.alternatives]
    return told.caption, rows, f"Told in {time.perf_counter() - began:.2f} s", told


def caption_if_any(photo, *options):
    return caption(photo, *options) if photo else (WAITING, [], "", None)


def show_gaze(photo, told):
    return st.attention_page(photo, told, SQUASH) if told else ""


def link_strip(photo, told):
    if told is None or told.attention is None:
        return ""
    st.show_attention(photo, told, SQUASH).savefig(picture := io.BytesIO(), format="jpeg", dpi=110)
    address = f"data:image/jpeg;base64,{base64.b64encode(picture.getvalue()).decode()}"
    return f"<a class='strip' download='neural-storyteller.jpg' href='{address}'>Download all words as one picture</a>"


def batch(photos, method, beam_width, progress=gr.Progress()):
    """Caption up to 50 photos: a table and a CSV file with one row a photo."""
    if not photos or len(photos) > MAX_PHOTOS:
        raise gr.Error(f"Please choose 1 to {MAX_PHOTOS} photos; these are {len(photos or [])}.", print_exception=False)
    rows = []
    for told in attempt_many(photos, {"method": method, "beam_width": int(beam_width)}):
        for photo, one in zip(photos[len(rows):], told):
            found = ["", "", one] if isinstance(one, str) else [one.caption, round(one.score, 3), ""]
            rows.append([Path(photo).name, *found])
        progress((len(rows), len(photos)), unit="photos")
    with tempfile.TemporaryDirectory() as folder:  # gradio serves a copy of its own, which delete_cache removes
        path = Path(folder) / "captions.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
        yield rows, str(path)


def about():
    card = MODEL / "README.md"
    return LIMITS + re.sub(r"\A---\n.*?\n---\n", "", card.read_text("utf-8") if card.is_file() else "", flags=re.S)


def controls():
    choices = [("Beam search", "beam"), ("Greedy", "greedy"), ("Sampling", "sample")]
    return (gr.Radio(choices, value="beam", label="How it chooses words"),
            gr.Slider(1, 10, 5, step=1, label="Beam width", info="sentences it weighs up at once"))


with gr.Blocks(title="Neural Storyteller", delete_cache=(600, 3600), analytics_enabled=False,
               **({} if NEW else LOOK)) as demo:
    gr.Markdown("# Neural Storyteller\nShow it a photo, and it tells in one sentence what it sees. " + (
        "**This one learned from drawings only: it will be wrong about photos.**" if LEARNED["sample"] else
        f"It learned from {TELLER.config['training']['photos']:,} photos of {LEARNED['name']}."), elem_id="title")
    looked = gr.State(time_to_live=3600)
    with gr.Tab("One photo"), gr.Row():
        with gr.Column(elem_id="left"):
            photo = gr.Image(type="filepath", sources=["upload", "webcam", "clipboard"], label="Photo", height=340)
            photo.preprocess = lambda image: image and image.path  # as sent: gradio would re-encode what it opens
            button = gr.Button("Tell the story", variant="primary")
            gr.Examples(EXAMPLES, photo, label="Or take one of these", elem_id="examples")
            with gr.Accordion("How it searches", open=False, elem_id="how"):
                method, width = controls()
                length = gr.Slider(0, 2, st.LENGTH_PREFERENCE, step=0.1, label="Length preference", info="beam search: more is longer")
                heat = gr.Slider(0.1, 2, 1, step=0.1, label="Temperature", info="sampling: more is bolder")
                seed = gr.Number(None, precision=0, label="Seed", info="sampling: empty for another story each time")
        with gr.Column():
            story, took = gr.Markdown(WAITING, elem_id="story"), gr.Markdown(elem_id="took")
            gaze, strip = gr.HTML(), gr.HTML()
            table = gr.Dataframe(headers=["The best captions", "Score"], datatype=["str", "number"], wrap=True,
                                 interactive=False, column_widths=["78%", "22%"], elem_id="best")
    with gr.Tab("Several photos"):
        photos = gr.File(file_count="multiple", file_types=["image"], label=f"Up to {MAX_PHOTOS} photos")
        how = controls()
        many = gr.Button("Tell all the stories", variant="primary")
        sheet = gr.Dataframe(headers=COLUMNS, wrap=True, interactive=False, label="Captions", elem_id="sheet")
        saved = gr.File(label="The same as CSV")
    with gr.Tab("About"):
        gr.Markdown(about())
    asked, told = [photo, method, width, length, heat, seed], [story, table, took, looked]
    changes = [photo.change, method.input, width.release, length.release, heat.release]
    for event in (button.click(caption, asked, told, api_name="caption"),
                  gr.on(changes, caption_if_any, asked, told, trigger_mode="always_last", **HIDDEN)):
        event.then(show_gaze, [photo, looked], gaze, **HIDDEN).then(link_strip, [photo, looked], strip, **HIDDEN)
    many.click(batch, [photos, *how], [sheet, saved], api_name="batch")
    # A screen reader speaks what changes inside a live region that was there before the change.
    demo.load(None, js="() => document.getElementById('story').setAttribute('aria-live', 'polite')")
demo.queue(max_size=20, default_concurrency_limit=1)

if __name__ == "__main__":
    demo.launch(**LAUNCH)
