"""The drawn sample: small scenes with five captions each, used if no dataset is given.

    python notebooks/sample.py FOLDER [--photos 800] [--seed 13]

A scene puts one to three subjects of one kind into a place at a time of day; its captions name
what was drawn.
"""

import argparse
import csv
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageOps
from tqdm import tqdm

GRID = 35  # sprites are drawn on a square of this side, (0, 0) at its upper left corner


class Shape(NamedTuple):
    """A part of a sprite; "body" is the subject's own colour, "shade" darker, "shine" lighter."""

    kind: str
    tone: str
    points: tuple[int, ...]  # x, y, x, y, ...


class Subject(NamedTuple):
    noun: str
    colours: tuple[str, ...]
    places: tuple[str, ...]
    verbs: tuple[str, ...]  # regular ones: -s and -ing


class Strokes(NamedTuple):
    """The short lines that give the ground its texture, as fractions of the picture's size."""

    dx: float
    dy: float
    tone: str


class Place(NamedTuple):
    horizon: str  # the strip along it
    ground: str
    foreground: str
    backdrop: tuple[str, ...]  # sprites that stand behind, and how tall they are
    backdrop_height: float
    strokes: Strokes
    names: tuple[str, str]


class Time(NamedTuple):
    zenith: str  # the sky's colours
    skyline: str
    light: str  # on everything
    hanging: tuple[str, ...]  # sprites in the sky, and how low they hang
    hanging_foot: float
    names: tuple[str, str]


class Scene(NamedTuple):
    cast: list[str]  # the subjects, then what stands beside them
    colour: str
    place: Place
    time: Time
    verb: str


def oval(tone: str, *points: int) -> Shape:
    return Shape("oval", tone, points)


def box(tone: str, *points: int) -> Shape:
    return Shape("box", tone, points)


def polygon(tone: str, *points: int) -> Shape:
    return Shape("polygon", tone, points)


TONES = {
    "black": "#222",
    "white": "#fff",
    "red": "#dc1e1e",
    "blue": "#1e50e6",
    "yellow": "#ffd61e",
    "brown": "#925426",
    "skin": "#f0be96",
    "wood": "#7a4c2a",
    "gold": "#ffd03c",
    "leaf": "#3e913e",
    "fir": "#286a3c",
    "glass": "#b0daf2",
    "jeans": "#304c96",
    "grey": "#778",
    "rose": "#e05060",
}
SPRITES = {
    "man": (
        box("jeans", 13, 20, 17, 34),
        box("jeans", 18, 20, 22, 34),
        polygon("body", 14, 10, 8, 19, 11, 21, 14, 13),
        polygon("body", 21, 10, 27, 19, 24, 21, 21, 13),
        oval("skin", 8, 19, 11, 22),
        oval("skin", 24, 19, 27, 22),
        box("body", 12, 10, 23, 22),
        oval("skin", 13, 2, 22, 11),
        polygon("wood", 13, 7, 22, 7, 21, 11, 15, 11),
        box("wood", 14, 0, 22, 4),
        box("wood", 11, 3, 24, 4),
        oval("black", 15, 5, 17, 6),
        oval("black", 19, 5, 20, 6),
    ),
    "girl": (
        oval("wood", 10, 0, 25, 17),
        box("skin", 14, 26, 17, 34),
        box("skin", 19, 26, 21, 34),
        polygon("skin", 16, 13, 6, 19, 8, 22, 17, 17),
        polygon("skin", 19, 13, 29, 19, 28, 22, 18, 17),
        polygon("body", 15, 11, 21, 11, 28, 28, 7, 28),
        oval("skin", 13, 2, 23, 12),
        oval("black", 15, 6, 16, 8),
        oval("black", 19, 6, 21, 8),
        box("rose", 16, 10, 19, 10),
        box("black", 13, 34, 17, 35),
        box("black", 18, 34, 22, 35),
    ),
    "horse": (
        polygon("shade", 6, 14, 2, 16, 0, 28, 4, 26, 7, 19),
        box("shade", 9, 20, 11, 35),
        box("shade", 21, 20, 23, 35),
        oval("body", 4, 12, 25, 23),
        box("body", 5, 18, 8, 35),
        box("body", 23, 18, 25, 35),
        oval("black", 28, 6, 29, 7),
        polygon("body", 18, 15, 23, 4, 29, 6, 25, 21),
        polygon("body", 23, 4, 25, 1, 27, 3, 29, 3, 35, 11, 33, 14, 26, 11),
        polygon("black", 17, 16, 22, 2, 25, 1, 21, 16),
    ),
    "cat": (
        polygon("body", 23, 35, 32, 33, 35, 26, 33, 20, 30, 20, 31, 27, 29, 30, 23, 30),
        oval("body", 9, 16, 26, 35),
        oval("shine", 13, 21, 22, 35),
        polygon("body", 9, 11, 8, 0, 17, 5),
        polygon("body", 27, 11, 27, 0, 19, 5),
        oval("body", 8, 3, 27, 19),
        oval("gold", 12, 8, 16, 12),
        oval("gold", 19, 8, 23, 12),
        oval("black", 13, 8, 15, 12),
        oval("black", 21, 8, 22, 12),
        polygon("rose", 16, 13, 19, 13, 18, 15),
    ),
    "dog": (
        polygon("body", 1, 11, 3, 9, 9, 16, 7, 20),
        box("shade", 8, 21, 11, 35),
        box("shade", 22, 21, 25, 35),
        oval("body", 4, 13, 27, 25),
        box("body", 5, 20, 8, 35),
        box("body", 19, 20, 22, 35),
        oval("body", 20, 4, 32, 18),
        oval("shine", 27, 10, 35, 16),
        oval("black", 33, 10, 35, 13),
        oval("shade", 19, 5, 24, 18),
        oval("black", 27, 8, 29, 10),
        oval("rose", 29, 15, 32, 19),
    ),
    "sun": (oval("gold", 7, 7, 28, 28),),
    "car": (
        polygon("body", 0, 21, 6, 18, 11, 10, 25, 10, 30, 18, 35, 21, 35, 29, 0, 29),
        polygon("glass", 9, 18, 12, 12, 17, 12, 17, 18),
        polygon("glass", 18, 18, 18, 12, 24, 12, 27, 18),
        box("shade", 0, 26, 35, 29),
        oval("black", 4, 24, 13, 33),
        oval("black", 23, 24, 31, 33),
        oval("white", 6, 27, 10, 31),
        oval("white", 25, 27, 29, 31),
        oval("gold", 33, 21, 35, 24),
    ),
    "palm": (
        polygon("wood", 14, 35, 17, 35, 19, 14, 18, 14),
        polygon("leaf", 18, 14, 5, 12, 1, 20, 10, 16),
        polygon("leaf", 18, 14, 32, 11, 35, 19, 26, 16),
        polygon("leaf", 18, 14, 8, 4, 2, 8, 12, 9),
        polygon("leaf", 18, 14, 28, 3, 34, 6, 25, 8),
    ),
    "ball": (
        oval("white", 11, 18, 28, 35),
        polygon("rose", 19, 26, 19, 18, 24, 18, 28, 23),
        polygon("jeans", 19, 26, 28, 30, 22, 35, 18, 35),
        polygon("gold", 19, 26, 11, 29, 11, 23, 13, 21),
    ),
    "duck": (
        polygon("body", 4, 24, 0, 15, 11, 20),
        box("body", 22, 13, 28, 25),
        oval("body", 3, 18, 29, 33),
        oval("body", 21, 6, 32, 18),
        polygon("gold", 31, 11, 35, 13, 30, 15),
        oval("shade", 8, 20, 22, 29),
        oval("black", 27, 9, 29, 11),
    ),
    "peak": (
        polygon("grey", 18, 0, 35, 35, 0, 35),
        polygon("shade", 18, 0, 18, 8, 15, 18, 10, 35, 0, 35),
        polygon("white", 18, 0, 23, 11, 20, 9, 18, 13, 15, 10, 12, 11),
    ),
    "balloon": (
        polygon("wood", 12, 23, 23, 23, 19, 31, 16, 31),
        oval("body", 4, 0, 31, 25),
        polygon("body", 6, 18, 30, 18, 22, 28, 13, 28),
        oval("shine", 11, 0, 25, 26),
        oval("body", 15, 0, 21, 27),
        box("wood", 14, 30, 21, 35),
    ),
    "tower": (
        box("grey", 5, 0, 30, 35),
        box("gold", 8, 4, 13, 7),
        box("gold", 21, 4, 26, 7),
        box("gold", 8, 11, 13, 15),
        box("gold", 21, 19, 26, 23),
    ),
    "bird": (
        polygon("shade", 16, 18, 14, 2, 23, 16),
        polygon("shade", 11, 18, 1, 14, 2, 23),
        oval("body", 8, 14, 28, 23),
        oval("body", 23, 11, 31, 19),
        polygon("gold", 30, 14, 35, 16, 30, 17),
        polygon("shine", 12, 19, 4, 4, 12, 6, 23, 19),
    ),
    "stars": (
        oval("white", 2, 4, 3, 4),
        oval("white", 9, 25, 10, 26),
        oval("white", 16, 11, 17, 12),
        oval("white", 21, 31, 22, 32),
        oval("white", 25, 2, 27, 2),
        oval("white", 31, 19, 32, 21),
    ),
    "boat": (
        box("wood", 17, 0, 18, 25),
        polygon("white", 19, 1, 19, 23, 33, 23),
        polygon("body", 16, 4, 16, 23, 5, 23),
        polygon("body", 1, 25, 34, 25, 28, 33, 7, 33),
        polygon("shade", 3, 27, 33, 27, 28, 33, 7, 33),
    ),
    "house": (
        box("wood", 25, 2, 28, 12),
        box("body", 4, 15, 31, 35),
        polygon("wood", 18, 1, 35, 16, 1, 16),
        box("gold", 7, 19, 13, 25),
        box("gold", 22, 19, 28, 25),
        box("black", 15, 23, 20, 35),
    ),
    "fir": (
        box("wood", 16, 30, 19, 35),
        polygon("fir", 18, 14, 32, 31, 4, 31),
        polygon("fir", 18, 6, 29, 21, 6, 21),
        polygon("fir", 18, 0, 26, 12, 9, 12),
        polygon("white", 18, 0, 22, 7, 18, 5, 13, 7),
    ),
    "tree": (
        box("wood", 15, 21, 20, 35),
        oval("leaf", 1, 9, 21, 25),
        oval("leaf", 14, 9, 34, 25),
        oval("leaf", 6, 1, 29, 21),
        oval("fir", 9, 3, 21, 13),
    ),
    "cloud": (
        oval("white", 0, 16, 16, 26),
        oval("white", 8, 9, 26, 26),
        oval("white", 19, 15, 35, 26),
    ),
    "moon": (
        oval("white", 7, 7, 28, 28),
        oval("grey", 12, 13, 17, 18),
        oval("grey", 19, 19, 23, 23),
    ),
    "tent": (
        polygon("body", 18, 3, 35, 35, 1, 35),
        polygon("black", 18, 14, 23, 35, 13, 35),
    ),
    "hill": (
        oval("fir", 0, 18, 35, 35),
        box("fir", 0, 27, 35, 35),
    ),
}
FUR = ("brown", "black", "white")
DYE = ("red", "blue", "yellow")
LAND = ("field", "beach", "snow", "street", "forest")
SUBJECTS = (
    Subject("dog", FUR, LAND, ("stand", "jump")),
    Subject("cat", FUR, LAND, ("stand", "jump")),
    Subject("horse", FUR, LAND, ("stand", "jump")),
    Subject("girl", DYE, LAND, ("stand", "jump")),
    Subject("man", DYE, LAND, ("stand", "jump")),
    Subject("house", DYE, LAND, ("stand",)),
    Subject("tent", DYE, LAND, ("stand",)),
    Subject("car", DYE, ("street", "snow", "beach"), ("wait",)),
    Subject("boat", DYE, ("lake",), ("sail",)),
    Subject("duck", FUR, ("lake",), ("float",)),
    Subject("bird", DYE, (*LAND, "lake"), ("soar",)),
    Subject("balloon", DYE, (*LAND, "lake"), ("soar",)),
)
PLACES = {
    "field": Place(
        horizon="#88c860",
        ground="#74be4c",
        foreground="#5a963a",
        backdrop=("hill",) * 4,
        backdrop_height=0.24,
        strokes=Strokes(0.002, -0.03, "fir"),
        names=("on the grass", "in a green field"),
    ),
    "beach": Place(
        horizon="#2e8cc8",
        ground="#eed496",
        foreground="#beaa78",
        backdrop=("palm",) * 2,
        backdrop_height=0.38,
        strokes=Strokes(0.006, 0.002, "wood"),
        names=("on the beach", "on the sand"),
    ),
    "snow": Place(
        horizon="#d6e2f2",
        ground="#f4f8fc",
        foreground="#bcc4d2",
        backdrop=("fir",) * 6,
        backdrop_height=0.34,
        strokes=Strokes(0.006, 0.008, "white"),
        names=("in the snow", "on a snowy hill"),
    ),
    "street": Place(
        horizon="#b0aca8",
        ground="#68686e",
        foreground="#4e4e56",
        backdrop=("tower",) * 8,
        backdrop_height=0.42,
        strokes=Strokes(0.06, 0.003, "grey"),
        names=("on the street", "in the city"),
    ),
    "forest": Place(
        horizon="#385c32",
        ground="#54783a",
        foreground="#42602e",
        backdrop=("tree",) * 8,
        backdrop_height=0.42,
        strokes=Strokes(0.012, 0.006, "wood"),
        names=("in the forest", "in the woods"),
    ),
    "lake": Place(
        horizon="#549654",
        ground="#3c82c4",
        foreground="#30689e",
        backdrop=("peak",) * 5,
        backdrop_height=0.3,
        strokes=Strokes(0.06, 0.003, "glass"),
        names=("on the lake", "on the water"),
    ),
}
TIMES = (
    Time(
        zenith="#3c8cec",
        skyline="#dcf0fc",
        light="#ffffff",
        hanging=("sun", "cloud", "cloud", "cloud"),
        hanging_foot=0.65,
        names=("on a sunny day", "under a blue sky"),
    ),
    Time(
        zenith="#6048be",
        skyline="#ffb45c",
        light="#ffd4b0",
        hanging=("sun", "cloud", "cloud", "cloud"),
        hanging_foot=1,
        names=("at sunset", "under an orange sky"),
    ),
    Time(
        zenith="#080a28",
        skyline="#465496",
        light="#a6b0ee",
        hanging=("moon", "stars", "stars", "stars"),
        hanging_foot=0.65,
        names=("at night", "under the moon"),
    ),
)
WORDINGS = (
    "{who} {be} {verb}ing {where} {when}.",
    "{who} {does} {where} {when}.",
    "{when}, {who} {does} {where}.",
    "{who} {verb}ing {where}{by}.",
    "there {be} {who}{by} {where}.",
    "{they} {does} {where}{by}.",
    "{where}, {they} {be} {verb}ing{by}.",
)


GRADIENT = Image.linear_gradient("L").crop((0, 0, 1, 256))  # black to white, downwards
DARKER = [255 - value // 3 for value in range(256)]


def choose_scene(rng: random.Random) -> tuple[Scene, list[str]]:
    """Choose what is drawn, and write five captions of it."""
    subject = rng.choice(SUBJECTS)
    # A choice of one keeps the sequence of random numbers, and so every photo of a seed, the same.
    noun = rng.choice((subject.noun,))
    colour = rng.choice(subject.colours)
    place = PLACES[rng.choice(subject.places)]
    verb = rng.choice(subject.verbs)
    time = rng.choice(TIMES)
    count = rng.randint(1, 3)
    beside = ""
    if count < 3 and "lake" not in subject.places:
        beside = rng.choice(("", "tree", "ball"))
    scene = Scene([noun] * count + beside.split(), colour, place, time, verb)
    return scene, write_captions(rng, scene, count, beside)


def write_captions(rng: random.Random, scene: Scene, count: int, beside: str) -> list[str]:
    noun, verb = scene.cast[0], scene.verb
    if count == 1:
        they, does, be = f"a {noun}", f"{verb}s", "is"
    else:
        plural = "men" if noun == "man" else f"{noun}s"
        they, does, be = f"{('two', 'three')[count - 2]} {plural}", verb, "are"
    if noun in ("girl", "man"):
        who = f"{they} in {scene.colour}"
    else:
        who = they.replace(" ", f" {scene.colour} ")
    by = f" next to a {beside}" if beside else ""
    captions = []
    for wording in rng.sample(WORDINGS, 5):
        where = rng.choice(scene.place.names)
        when = rng.choice(scene.time.names)
        if verb == "soar":
            where = "over" + where[where.index(" ") :]
        caption = wording.format(
            who=who, they=they, be=be, does=does, verb=verb, where=where, when=when, by=by
        )
        captions.append(caption.capitalize())
    return captions


def stamp(canvas, name: str, x: float, foot: float, tall: float, colour: str = "", tilt: int = 0):
    """Draw a sprite that stands at (x, foot), with an outline where it has a colour of its own."""
    size = (int(tall), int(tall))
    body = ImageColor.getrgb(TONES[colour or "white"])
    shade = tuple(int(0.7 * value) for value in body)
    shine = tuple(128 + value // 2 for value in body)
    tones = TONES | {"body": body, "shade": shade, "shine": shine}
    layer = Image.new("RGBA", size)
    pen = ImageDraw.Draw(layer)
    for shape in SPRITES[name]:
        draw = {"oval": pen.ellipse, "box": pen.rectangle, "polygon": pen.polygon}[shape.kind]
        draw([point * tall / GRID for point in shape.points], tones[shape.tone])
    # Light falls from above.
    fade = GRADIENT.resize((1, size[1])).point(DARKER).resize(size)
    light = Image.merge("RGBA", (fade, fade, fade, Image.new("L", size, 255)))
    layer = ImageChops.multiply(layer, light).rotate(tilt)
    box = layer.getbbox()  # pasting takes as long for what is transparent
    layer, left, top = layer.crop(box), int(x - tall / 2) + box[0], int(foot - tall) + box[1]
    if colour:
        line = max(1, canvas.height // 240)
        for dx, dy in ((-line, 0), (line, 0), (0, -line), (0, line)):
            canvas.paste(TONES["black"], (left + dx, top + dy), layer)
    canvas.paste(layer, (left, top), layer)


def paint_sky_and_ground(canvas, scene: Scene, horizon: int, shore: int) -> None:
    place, time = scene.place, scene.time
    bands = (
        (time.zenith, time.skyline, 0, horizon),
        (place.ground, place.foreground, shore, canvas.height),
    )
    for upper, lower, above, below in bands:
        fade = ImageOps.colorize(GRADIENT, upper, lower)
        band = fade.resize((canvas.width, below - above), Image.Resampling.NEAREST)
        canvas.paste(band, (0, above))


def paint_row(rng: random.Random, canvas, names: list[str], base: float, height: float) -> None:
    """Stamp sprites side by side, their feet near `base`, at uneven distances and sizes."""
    for i, name in enumerate(names):
        x = (i + rng.uniform(0.2, 0.8)) / len(names) * canvas.width
        y = rng.uniform(0.9, 1.1) * base
        stamp(canvas, name, x, y, rng.uniform(0.8, 1.2) * height * canvas.height)


def paint_cast(rng: random.Random, canvas, pen, scene: Scene) -> None:
    height, count = canvas.height, len(scene.cast)
    tall = {1: 0.66, 2: 0.6, 3: 0.45}[count] * height
    for i, name in enumerate(scene.cast):
        x = (i + 0.5 + rng.uniform(-0.2, 0.2) / count) / count * canvas.width
        foot = rng.uniform(0.86, 0.94) * height
        lift, tilt = 0.0, 0
        if name == scene.cast[0] and scene.verb == "soar":
            lift = 0.22
        elif name == scene.cast[0] and scene.verb == "jump":
            lift, tilt = 0.14, 18
        shadow = (x - 0.4 * tall, foot - 0.05 * tall, x + 0.4 * tall, foot + 0.05 * tall)
        pen.ellipse(shadow, (0, 0, 30, 80))
        stamp(canvas, name, x, foot - lift * height, tall, scene.colour, tilt)


def paint_scene(rng: random.Random, scene: Scene, size: tuple[int, int]):
    """Paint a scene. Returns a picture of `size` (width, height)."""
    # Painted twice as large and shrunk at the end, for smooth edges.
    width, height = 2 * size[0], 2 * size[1]
    canvas = Image.new("RGB", (width, height), scene.place.horizon)
    horizon = int((0.7 if scene.verb == "soar" else 0.48) * height)
    shore = horizon + height // 10
    paint_sky_and_ground(canvas, scene, horizon, shore)
    place, time = scene.place, scene.time
    hanging = rng.sample(time.hanging, len(time.hanging))
    paint_row(rng, canvas, hanging, time.hanging_foot * horizon, 0.22)
    paint_row(rng, canvas, place.backdrop, 1.1 * horizon, place.backdrop_height)
    pen = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(90):
        x, y = rng.random() * width, rng.uniform(shore, height)
        end = (x + place.strokes.dx * width, y + place.strokes.dy * height)
        pen.line((x, y, *end), TONES[place.strokes.tone], height // 200)
    paint_cast(rng, canvas, pen, scene)
    return ImageChops.multiply(canvas.reduce(2), Image.new("RGB", size, time.light))


def draw_dataset(
    folder: Path | str,
    photos: int = 800,
    seed: int = 13,
    size: tuple[int, int] = (320, 240),
    quality: int = 90,
) -> Path:
    """Draw a dataset in Flickr's layout: `Images/` and `captions.txt`, five captions a photo.

    photos   int     how many; the same seed gives the same bytes, whatever their number
    size     (w, h)  of a photo, in pixels
    quality  int     of its JPEG file

    Returns the folder, which appears once all is drawn. Raises FileExistsError if it exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: delete it to draw the sample again.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as unfinished:
        drawn = Path(unfinished) / folder.name
        (drawn / "Images").mkdir(parents=True)
        rows = [("image", "caption")]
        for i in tqdm(range(photos), desc="drawing", unit="scene", mininterval=1):
            rng = random.Random(f"{seed}/{i}")
            scene, captions = choose_scene(rng)
            name = f"scene_{i + 1:04d}.jpg"
            paint_scene(rng, scene, size).save(drawn / "Images" / name, quality=quality)
            rows += [(name, caption) for caption in captions]
        with open(drawn / "captions.txt", "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        drawn.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the sample dataset.")
    parser.add_argument("folder", type=Path, help="folder to make; must not exist")
    parser.add_argument("--photos", type=int, default=800, help="how many (default: 800)")
    parser.add_argument("--seed", type=int, default=13, help="of the drawings (default: 13)")
    given = parser.parse_args()
    try:
        draw_dataset(given.folder, given.photos, given.seed)
    except OSError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
