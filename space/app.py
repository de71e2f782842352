"""The web page of Neural Storyteller: a photo in, its caption out."""

import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "0")  # read when gradio is imported
try:
    from spaces import GPU  # exists on ZeroGPU, where it must be imported before torch
except ImportError:

    def GPU(task):
        return task


import gradio as gr

HERE = Path(__file__).resolve().parent
# The module: beside this file in a Space, one level up in the repository.
sys.path += [str(HERE), str(HERE.parent)]
import attention  # noqa: E402
import storyteller_utils as st  # noqa: E402

MODEL = Path(os.environ.get("MODEL") or HERE / "model")
STORYTELLER = st.Storyteller.from_pretrained(MODEL)
TRAINED_ON, PREPROCESSING = STORYTELLER.config["dataset"], STORYTELLER.config["preprocessing"]
MAX_PHOTOS, MAX_WORDS_CHARS, MAX_CHARS = 50, 100, 1000
# Examples of what its training photos show; page.js lists them too.
LEARNED = {"bicycle.jpg", "dog.jpg", "egret.jpg", "photographer.jpg", "runner.jpg"}
EXAMPLES = sorted(
    (str(p) for p in (HERE / "examples").iterdir() if p.suffix in (".jpg", ".png")),
    key=lambda path: (Path(path).name not in LEARNED, path),
)
# Loads now what the first visitor would wait for.
attention.attention_page(EXAMPLES[0], STORYTELLER.caption(EXAMPLES[0])[0])
CARD = (MODEL / "README.md").read_text(encoding="utf-8") if (MODEL / "README.md").is_file() else ""
COLUMNS = ["photo", "caption", "score", "confidence", "problem"]
WAITING = "*The caption will appear here.*"
UNSURE = 0.3  # confidence below which a caption is a guess; page.js has it too

# Kaggle has gradio 5.49, the Space 6: theme, css and hiding moved in between.
NEW = int(gr.__version__.split(".")[0]) >= 6
HIDDEN = {"api_visibility": "private"} if NEW else {"api_name": False}
FONT = ["system-ui", "sans-serif"]  # gradio's own would come from Google
THEME = gr.themes.Default(primary_hue="amber", neutral_hue="stone", font=FONT, font_mono=FONT)
THEME.set(  # readable on amber
    button_primary_text_color="*neutral_900", button_primary_text_color_dark="*neutral_900"
)
STYLE = {"theme": THEME, "css_paths": HERE / "style.css"}
LAUNCH = {
    "max_file_size": "15mb",
    "ssr_mode": False,
    "share": os.environ.get("GRADIO_SHARE", "").lower() == "true",  # on Kaggle gradio always would
    **(STYLE if NEW else {}),
}


@GPU
def caption_many(photos, options):
    """Caption eight photos at a time, on the GPU that ZeroGPU lends for this, else on the CPU."""
    storyteller = STORYTELLER
    if os.environ.get("SPACES_ZERO_GPU"):
        storyteller = st.Storyteller.from_pretrained(MODEL, "cuda")
    for start in range(0, len(photos), 8):
        yield storyteller.caption_each(photos[start : start + 8], **options)


def how_sure(confidence: float | None) -> str:
    """Return a confidence in words, as a bar and as a number; "" for None."""
    if confidence is None:
        return ""
    words = "A guess" if confidence < UNSURE else "Probably" if confidence < 0.8 else "Sure"
    bar = round(10 * confidence)
    said = f"{words} {'▰' * bar}{'▱' * (10 - bar)} {confidence:.2f}"
    return " · " + said.replace(" ", "\N{NO-BREAK SPACE}")  # a phone breaks the line before it


def other_captions(caption: st.Caption | None) -> str:
    """Return a guess's other captions as Markdown; "" if it is no guess or has none."""
    if caption is None or caption.confidence is None or caption.confidence >= UNSURE:
        return ""
    others = [f"- {text}" for text, _ in caption.alternatives[1:]]
    return "\n".join(["I am not sure. It could also be:\n", *others]) if others else ""


def caption(
    photo,
    method,
    beam_width,
    length_preference,
    temperature,
    seed=None,
    start="",
    must="",
    never="",
    max_chars=0,
):
    """Caption one photo. Returns its caption, the best ones with scores, time and confidence."""
    if not photo:
        raise gr.Error("Please choose a photo first.", print_exception=False)
    words = {"start": start or "", "must": must or "", "never": never or ""}
    for name, text in words.items():
        if len(text) > MAX_WORDS_CHARS:
            long = f"{name} has {len(text)} characters; the limit is {MAX_WORDS_CHARS}."
            raise gr.Error(long, print_exception=False)
    began = time.perf_counter()
    (result,) = STORYTELLER.caption_each(
        [photo],
        method=method,
        beam_width=int(beam_width),
        length_preference=length_preference,
        temperature=temperature,
        seed=random.getrandbits(31) if seed is None else int(seed),
        **words,
        max_chars=int(max_chars or 0),
    )
    if isinstance(result, str):
        raise gr.Error(result, print_exception=False)
    rows = [[text, round(score, 3)] for text, score in result.alternatives]
    took = f"Captioned in {time.perf_counter() - began:.2f} s{how_sure(result.confidence)}"
    return result.text, rows, took, result


def caption_if_any(photo, *options):
    return caption(photo, *options) if photo else (WAITING, [], "", None)


def show_details(photo, result):
    page = result and attention.attention_page(photo, result, PREPROCESSING)
    return other_captions(result), page


def batch(photos, method, beam_width, progress=gr.Progress()):  # noqa: B008, how gradio has it
    """Caption up to 50 photos: a table and a CSV file with one row per photo."""
    if not photos or len(photos) > MAX_PHOTOS:
        chosen = f"Please choose 1 to {MAX_PHOTOS} photos; you chose {len(photos or [])}."
        raise gr.Error(chosen, print_exception=False)
    rows = []
    for results in caption_many(photos, {"method": method, "beam_width": int(beam_width)}):
        for result in results:
            name = Path(photos[len(rows)]).name
            if isinstance(result, str):
                rows.append([name, "", "", "", result])
            else:
                sure = "" if result.confidence is None else round(result.confidence, 2)
                rows.append([name, result.text, round(result.score, 3), sure, ""])
        progress((len(rows), len(photos)), unit="photos")
    # Gradio serves a copy of its own, which delete_cache removes.
    with tempfile.TemporaryDirectory() as folder:
        st.write_csv(Path(folder) / "captions.csv", COLUMNS, rows)
        yield rows, str(Path(folder) / "captions.csv")


def controls():
    choices = [("Beam search", "beam"), ("Greedy", "greedy"), ("Sampling", "sample")]
    return (
        gr.Radio(choices, value=st.Decoding.method, label="Decoding"),
        gr.Slider(
            1,
            10,
            st.Decoding.beam_width,
            step=1,
            label="Beam width",
            info="captions kept at each step",
        ),
    )


def more_controls():
    """Return the controls for a caption's beginning, words and length."""
    asked = {
        "It begins with": "two dogs",
        "It has these words": "grass",
        "It has none of these": "man woman boy girl",
    }
    texts = [
        gr.Textbox("", label=label, placeholder=example, max_length=MAX_WORDS_CHARS)
        for label, example in asked.items()
    ]
    most = gr.Number(
        0,
        precision=0,
        minimum=0,
        maximum=MAX_CHARS,
        label="Maximum characters",
        info="125 for alt text; 0 for no limit",
    )
    return [*texts, most]


def example_groups() -> list[tuple[str, list[str]]]:
    """Return the labels of the example photos, with the photos under each."""
    learned = [path for path in EXAMPLES if Path(path).name in LEARNED]
    others = [path for path in EXAMPLES if path not in learned]
    return [
        ("Or take what it has learned: people, dogs, sport, water", learned),
        ("or what it has not: it guesses", others),
    ]


def introduction():
    if TRAINED_ON["sample"]:
        trained = "**Trained on drawings only: it will be wrong about photos.**"
    else:
        photos = STORYTELLER.config["training"]["photos"]
        trained = f"Trained on {photos:,} photos of {TRAINED_ON['name']}."
    return f"# Neural Storyteller\nOne photo in, one sentence out: its caption. {trained}"


def about():
    card = re.sub(r"\A---\n.*?\n---\n", "", CARD, flags=re.S)  # without its front matter
    return (
        f"{card}\n\nPhotos sent to this page are deleted within about twenty minutes, and are "
        "passed on to nobody."
    )


class Page(gr.Blocks):
    def validate_inputs(self, block_fn, inputs):
        """Fill in defaults of the last arguments that a call omits: curl's from before "More".

        Gradio does so only for its own client.
        """
        inputs += [block.value for block in block_fn.inputs[len(inputs) :]]
        super().validate_inputs(block_fn, inputs)


with Page(
    title="Neural Storyteller",
    delete_cache=(120, 1200),
    analytics_enabled=False,
    **({} if NEW else STYLE),
) as demo:
    gr.Markdown(introduction(), elem_id="title")
    captioned = gr.State(time_to_live=3600)
    with gr.Tab("One photo"), gr.Row():
        with gr.Column(elem_id="left"):
            photo = gr.Image(
                type="filepath",
                sources=["upload", "webcam", "clipboard"],
                label="Photo",
                height=320,
            )
            # The file as it was uploaded: gradio would encode it again.
            photo.preprocess = lambda image: image and image.path
            button = gr.Button("Caption this photo", variant="primary")
            with gr.Column(elem_id="examples"):
                for label, part in example_groups():
                    gr.Examples(part, photo, label=label)
            with gr.Accordion("Decoding", open=False, elem_id="decoding"):
                method, width = controls()
                length = gr.Slider(
                    0,
                    2,
                    st.Decoding.length_preference,
                    step=0.1,
                    label="Length preference",
                    info="beam search: higher values give longer captions",
                )
                heat = gr.Slider(
                    0.1,
                    2,
                    st.Decoding.temperature,
                    step=0.1,
                    label="Temperature",
                    info="sampling: higher values give more varied captions",
                )
                seed = gr.Number(
                    None,
                    precision=0,
                    label="Seed",
                    info="sampling: leave empty for a new caption each time",
                )
            with gr.Accordion("More", open=False, elem_id="more"):
                steering = more_controls()
        with gr.Column(elem_id="right"):
            text, took = gr.Markdown(WAITING, elem_id="caption"), gr.Markdown(elem_id="took")
            others = gr.Markdown(elem_id="others")
            weights = gr.HTML(padding=False, elem_id="weights")
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
        decoding = controls()
        many = gr.Button("Caption all photos", variant="primary")
        sheet = gr.Dataframe(headers=COLUMNS, wrap=True, interactive=False, label="Captions")
        saved = gr.File(label="Captions as CSV", height=100)
    with gr.Tab("About"):
        gr.Markdown(about())
    asked = [photo, method, width, length, heat, seed, *steering]
    shown = [text, best, took, captioned]
    changes = [photo.change, method.input, width.release, length.release, heat.release]
    changes += [control.submit for control in steering]
    for event in (
        button.click(caption, asked, shown, api_name="caption"),
        gr.on(changes, caption_if_any, asked, shown, trigger_mode="always_last", **HIDDEN),
    ):
        event.then(show_details, [photo, captioned], [others, weights], **HIDDEN)
    many.click(batch, [photos, *decoding], [sheet, saved], api_name="batch")
    # A screen reader announces changes inside a live region that existed before the change.
    speak = "id => document.getElementById(id).setAttribute('aria-live', 'polite')"
    demo.load(None, js=f"() => ['caption', 'others'].forEach({speak})")
demo.queue(max_size=20, default_concurrency_limit=1)

if __name__ == "__main__":
    demo.launch(**LAUNCH)
