"""The web page of Neural Storyteller: a photo in, one sentence about it out. The work is in storyteller_utils.py."""

import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")  # read when gradio is imported
try:
    from spaces import GPU  # there on ZeroGPU, where it must come before torch
except ImportError:

    def GPU(task):
        return task


import gradio as gr

HERE = Path(__file__).resolve().parent
sys.path += [
    str(HERE),
    str(HERE.parent),
]  # the module: beside this file in a Space, one level up in the repository
import storyteller_utils as st

MODEL = Path(os.environ.get("MODEL") or HERE / "model")
TELLER = st.Storyteller.from_pretrained(MODEL)
LEARNED, SQUASH, MAX_PHOTOS = TELLER.config["dataset"], TELLER.config["preprocessing"], 50
EXAMPLES = sorted(
    str(path) for path in (HERE / "examples").iterdir() if path.suffix in (".jpg", ".png")
)
st.attention_page(
    EXAMPLES[0], TELLER.caption(EXAMPLES[0])[0]
)  # loads now what the first visitor would wait for
CARD = (MODEL / "README.md").read_text(encoding="utf-8") if (MODEL / "README.md").is_file() else ""
COLUMNS, WAITING = ["photo", "caption", "score", "problem"], "*Its story will stand here.*"
NEW = (
    int(gr.__version__.split(".")[0]) >= 6
)  # Kaggle has 5.49, the Space 6: theme, css and hiding moved in between
HIDDEN = {"api_visibility": "private"} if NEW else {"api_name": False}
FONT = ["system-ui", "sans-serif"]  # gradio's own would come from Google
THEME = gr.themes.Default(primary_hue="amber", neutral_hue="stone", font=FONT, font_mono=FONT)
THEME.set(
    button_primary_text_color="*neutral_900", button_primary_text_color_dark="*neutral_900"
)  # readable on amber
LOOK = {"theme": THEME, "css_paths": HERE / "style.css"}
LAUNCH = {
    "max_file_size": "15mb",
    "ssr_mode": False,
    **(LOOK if NEW else {}),
    "share": os.environ.get("GRADIO_SHARE", "").lower() == "true",
}  # gradio would publish by itself on Kaggle


@GPU
def attempt_many(photos, options):
    """Caption eight photos at a time, on the GPU that ZeroGPU lends to this function, elsewhere on the CPU."""
    teller = (
        st.Storyteller.from_pretrained(MODEL, "cuda")
        if os.environ.get("SPACES_ZERO_GPU")
        else TELLER
    )
    for start in range(0, len(photos), 8):
        yield teller.caption_each(photos[start : start + 8], **options)


def caption(photo, method, beam_width, length_preference, temperature, seed=None):
    """Caption one photo: the caption, the best captions with their scores, and the time it took."""
    if not photo:
        raise gr.Error("Please choose a photo first.", print_exception=False)
    began = time.perf_counter()
    (told,) = TELLER.caption_each(
        [photo],
        method=method,
        beam_width=int(beam_width),
        length_preference=length_preference,
        temperature=temperature,
        seed=random.getrandbits(31) if seed is None else int(seed),
    )
    if isinstance(told, str):
        raise gr.Error(told, print_exception=False)
    rows = [[text, round(score, 3)] for text, score in told.alternatives]
    return told.text, rows, f"Told in {time.perf_counter() - began:.2f} s", told


def caption_if_any(photo, *options):
    return caption(photo, *options) if photo else (WAITING, [], "", None)


def batch(photos, method, beam_width, progress=gr.Progress()):
    """Caption up to 50 photos: a table and a CSV file with one row a photo."""
    if not photos or len(photos) > MAX_PHOTOS:
        raise gr.Error(
            f"Please choose 1 to {MAX_PHOTOS} photos; these are {len(photos or [])}.",
            print_exception=False,
        )
    rows = []
    for told in attempt_many(photos, {"method": method, "beam_width": int(beam_width)}):
        for photo, one in zip(photos[len(rows) :], told):
            found = ["", "", one] if isinstance(one, str) else [one.text, round(one.score, 3), ""]
            rows.append([Path(photo).name, *found])
        progress((len(rows), len(photos)), unit="photos")
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # gradio serves a copy of its own, which delete_cache removes
        st.write_csv(Path(folder) / "captions.csv", COLUMNS, rows)
        yield rows, str(Path(folder) / "captions.csv")


def controls():
    choices = [("Beam search", "beam"), ("Greedy", "greedy"), ("Sampling", "sample")]
    return (
        gr.Radio(choices, value="beam", label="How it chooses words"),
        gr.Slider(1, 10, 5, step=1, label="Beam width", info="sentences it weighs up at once"),
    )


with gr.Blocks(
    title="Neural Storyteller",
    delete_cache=(120, 1200),
    analytics_enabled=False,
    **({} if NEW else LOOK),
) as demo:
    gr.Markdown(
        "# Neural Storyteller\nShow it a photo, and it tells in one sentence what it sees. "
        + (
            "**This one learned from drawings only: it will be wrong about photos.**"
            if LEARNED["sample"]
            else f"It learned from {TELLER.config['training']['photos']:,} photos of {LEARNED['name']}."
        ),
        elem_id="title",
    )
    looked = gr.State(time_to_live=3600)
    with gr.Tab("One photo"), gr.Row():
        with gr.Column(elem_id="left"):
            photo = gr.Image(
                type="filepath",
                sources=["upload", "webcam", "clipboard"],
                label="Photo",
                height=320,
            )
            photo.preprocess = lambda image: (
                image and image.path
            )  # as sent: gradio would re-encode what it opens
            button = gr.Button("Tell the story", variant="primary")
            gr.Examples(EXAMPLES, photo, label="Or take one of these", elem_id="examples")
            with gr.Accordion("How it searches", open=False, elem_id="how"):
                method, width = controls()
                length = gr.Slider(
                    0,
                    2,
                    st.LENGTH_PREFERENCE,
                    step=0.1,
                    label="Length preference",
                    info="beam search: more is longer",
                )
                heat = gr.Slider(
                    0.1, 2, 1, step=0.1, label="Temperature", info="sampling: more is bolder"
                )
                seed = gr.Number(
                    None,
                    precision=0,
                    label="Seed",
                    info="sampling: empty for another story each time",
                )
        with gr.Column(elem_id="right"):
            story, took = gr.Markdown(WAITING, elem_id="story"), gr.Markdown(elem_id="took")
            gaze = gr.HTML(padding=False)
            best = gr.Dataframe(
                headers=["The best captions", "Score"],
                datatype=["str", "number"],
                wrap=True,
                interactive=False,
                column_widths=["78%", "22%"],
                elem_id="best",
            )
    with gr.Tab("Several photos"):
        photos = gr.File(
            file_count="multiple", file_types=["image"], label=f"Up to {MAX_PHOTOS} photos"
        )
        how = controls()
        many = gr.Button("Tell all the stories", variant="primary")
        sheet = gr.Dataframe(headers=COLUMNS, wrap=True, interactive=False, label="Captions")
        saved = gr.File(label="The same as CSV", height=100)
    with gr.Tab("About"):
        gr.Markdown(
            re.sub(r"\A---\n.*?\n---\n", "", CARD, flags=re.S) + "\n\n"
            "Photos sent to this page stay here, for about twenty minutes at most, and are passed on to nobody."
        )
    asked, told = [photo, method, width, length, heat, seed], [story, best, took, looked]
    changes = [photo.change, method.input, width.release, length.release, heat.release]
    for event in (
        button.click(caption, asked, told, api_name="caption"),
        gr.on(changes, caption_if_any, asked, told, trigger_mode="always_last", **HIDDEN),
    ):
        event.then(
            lambda photo, one: one and st.attention_page(photo, one, SQUASH),
            [photo, looked],
            gaze,
            **HIDDEN,
        )
    many.click(batch, [photos, *how], [sheet, saved], api_name="batch")
    # A screen reader speaks what changes inside a live region that was there before the change.
    demo.load(None, js="() => document.getElementById('story').setAttribute('aria-live', 'polite')")
demo.queue(max_size=20, default_concurrency_limit=1)

if __name__ == "__main__":
    demo.launch(**LAUNCH)
