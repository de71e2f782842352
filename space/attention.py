"""Show the attention weights of each word of a caption on its photo: as a picture, and as HTML."""

import base64
import html
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

import storyteller_utils as st

NO_ATTENTION = "This captioner reads the whole photo at once: it has no attention weights to show."


def attention_veil(weights: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return one word's attention as a picture to lay over the photo.

    weights  (7, 7)  of one word, of any sum
    size             width and height in pixels

    The picture is RGBA: clear where the weights are high, dark elsewhere.
    """
    level = (weights - weights.min()) / max(np.ptp(weights), 1e-9)
    heat = Image.fromarray((255 * level).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    # High weights glow yellow (255, 170, 40); low ones are dark, by a curve that keeps the middle
    # visible.
    glow = [
        heat.point([round(end * value / 255) for value in range(256)]) for end in (255, 170, 40)
    ]
    darkness = heat.point([round(170 * (1 - value / 255) ** 1.2) for value in range(256)])
    return Image.merge("RGBA", (*glow, darkness))


def seen_photo(image, preprocessing: str, side: int) -> Image.Image:
    """Return the part of a photo that a captioner reads, at most `side` pixels long."""
    photo = st.open_photo(image)
    if preprocessing != "squash":  # squashing keeps all of the photo
        photo = st.preprocess(photo, preprocessing)
    view = Image.fromarray(photo.permute(1, 2, 0).numpy())
    view.thumbnail((side, side))
    return view


def show_attention(image, caption: st.Caption, preprocessing: str = "squash"):
    """Draw the photo once per word, bright where the decoder's attention was.

    image          a path, PIL image or array
    caption        of a decoder with attention; ValueError for others
    preprocessing  as in the captioner's config

    Returns a matplotlib Figure.
    """
    if caption.attention is None:
        raise ValueError(NO_ATTENTION)
    view = seen_photo(image, preprocessing, 320)
    columns = min(6, len(caption.words))
    rows = math.ceil(len(caption.words) / columns)
    # Inches, 0.3 of them for the word; a photo taller than 4 times its width is drawn narrower.
    height = (1.9 * min(view.height / view.width, 4) + 0.3) * rows
    figure, axes = st.new_figure(1.9 * columns, height, rows, columns)
    for axis in np.ravel(axes):
        axis.axis("off")
    for axis, word, weights in zip(np.ravel(axes), caption.words, caption.attention, strict=False):
        axis.imshow(np.asarray(view))
        axis.imshow(np.asarray(attention_veil(weights, view.size)))
        axis.set_title(word, fontsize=11)
    return figure


def attention_page(image, caption: st.Caption, preprocessing: str = "squash") -> str:
    """Return `show_attention` as HTML: the words are buttons that show their attention weights.

    It needs no script (the buttons are radio buttons) and fetches nothing; style.css lays it out.
    For a decoder without attention it is a sentence that says so.
    """
    if caption.attention is None:
        return f"<p class='note'>{NO_ATTENTION}</p>"
    view = seen_photo(image, preprocessing, 640)
    # For the veils: a browser smooths what it enlarges.
    small = (max(1, view.width // 4), max(1, view.height // 4))
    first = _sharpest_word(caption)
    words, veils, rules = [], [], []
    for i, (word, weights) in enumerate(zip(caption.words, caption.attention, strict=True)):
        checked = " checked" if i == first else ""
        words.append(f"<label><input type='radio' name='word'{checked}>{html.escape(word)}</label>")
        veil = _data_url(attention_veil(weights, small).save, "png")
        veils.append(f"<img class='veil' alt='' src='{veil}'>")
        rules.append(_rule(f"label:nth-child({i + 1})", f".veil:nth-child({i + 2})"))
    strip = _data_url(show_attention(image, caption, preprocessing).savefig, "jpeg")
    return (
        f"<style>{''.join(rules)}</style><figure class='attention'>"
        "<figcaption>Point at a word to see its attention on the photo.</figcaption>"
        f"<div class='words'>{''.join(words)}</div>"
        f"<div class='stage'><img alt='The photo' src='{_data_url(view.save, 'jpeg')}'>"
        f"{''.join(veils)}</div>"
        f"<a class='strip' download='neural-storyteller.jpg' href='{strip}'>"
        "Download all words as one picture</a></figure>"
    )


def _sharpest_word(caption: st.Caption) -> int:
    """Return the word to show first: with the sharpest attention, and long enough for a thing."""
    return max(
        range(len(caption.words)),
        key=lambda i: (len(caption.words[i]) > 2, caption.attention[i].max()),
    )


def _data_url(write: Callable, kind: str) -> str:
    buffer = io.BytesIO()
    write(buffer, format=kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _rule(label: str, veil: str) -> str:
    """Return the CSS by which a word under the pointer, else the chosen one, shows its veil."""
    return (
        f".attention:has({label}:hover) {veil}, "
        f".attention:not(:has(label:hover)):has({label} :checked) {veil} {{opacity: 1}}\n"
    )
