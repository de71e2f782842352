"""The notebooks on other datasets: other scripts, real photos."""

import contextlib
import json
import shutil

import pandas as pd
import pytest
from PIL import Image

import storyteller_utils as st
from support import copy_project, run_cells

SQUARES = {
    "zh": ("一个{}色的方块在{}边", {"red": "红", "blue": "蓝"}, {"left": "左", "right": "右"}),
    "ar": (
        "مربع {} على {}",
        {"red": "أحمر", "blue": "أزرق"},
        {"left": "اليسار", "right": "اليمين"},
    ),
}


def draw_squares(folder, language):
    """Forty photos of a red or blue square at the left or right, each with two captions."""
    sentence, colours, sides = SQUARES[language]
    rows = ["image,caption"]
    for i in range(40):
        colour, side = list(colours)[i % 2], list(sides)[i // 2 % 2]
        photo = Image.new("RGB", (96, 64), "white")
        photo.paste(
            colour, (8 + 48 * (side == "right"), 12 + i % 5, 40 + 48 * (side == "right"), 44)
        )
        photo.save(folder / f"{i:02}.png")
        said = sentence.format(colours[colour], sides[side])
        rows += [f"{i:02}.png,{said}", f"{i:02}.png,{said}"]
    (folder / "captions.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def seen_squares(tmp_path_factory):
    """A folder in which 01 has seen the squares: what is said of them changes no feature."""
    folder = tmp_path_factory.mktemp("squares")
    (folder / "squares").mkdir()
    draw_squares(folder / "squares", "zh")
    copy_project(folder)
    with contextlib.chdir(folder):
        run_cells("01_extract_features", dataset_dir="squares", backbone="efficientnet_lite0")
    return folder


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # few machines have Chinese ones
@pytest.mark.parametrize("language", list(SQUARES))
def test_captions_in_other_scripts_go_through_all_notebooks(
    language, seen_squares, tmp_path, monkeypatch
):
    shutil.copytree(seen_squares, tmp_path, dirs_exist_ok=True)
    draw_squares(tmp_path / "squares", language)
    monkeypatch.chdir(tmp_path)
    given = {"dataset_dir": "squares"}
    run_cells("02_vocab", **given, language=language, min_count=1)
    run_cells("03_train_dual_t4", **given, epochs=30, batch_size=16)
    run_cells("04_evaluate", **given, split="val")
    outputs = tmp_path / "outputs"
    sentence, colours, sides = SQUARES[language]
    people = {
        st.detokenize(st.tokenize(sentence.format(colour, side), language))
        for colour in colours.values()
        for side in sides.values()
    }
    told = pd.read_csv(outputs / "04_evaluate/captions.csv")
    assert set(told["beam"]) <= people and (told["CIDEr-D"] > 0).any()
    assert all(text.endswith("\u3002") and " " not in text for text in people) == (language == "zh")
    model = outputs / "03_train_dual_t4/model"
    config = json.loads((model / "config.json").read_text())
    assert config["language"] == language and set(config["calibration"])
    assert f"\nlanguage: {language}\n" in (model / "README.md").read_text(encoding="utf-8")
    scores = json.loads((outputs / "04_evaluate/scores.json").read_text())
    assert {"no WordNet" in row["METEOR label"] for row in scores["rows"].values()} == {True}


def test_a_captioner_of_real_photos_beats_the_constant_caption(here, shared):
    """Two hundred photos of Flickr8k, three epochs.

    Far from good, but it looks at the photo.
    """
    photos = {"dataset_dir": str(shared / "flickr8k"), "max_photos": 200}
    small = {"epochs": 3, "batch_size": 16, "learning_rate": 0.002}
    run_cells("01_extract_features", backbone="efficientnet_lite0", **photos)
    run_cells("02_vocab", **photos)
    run_cells("03_train_dual_t4", dataset_dir=photos["dataset_dir"], **small)
    run_cells("04_evaluate", dataset_dir=photos["dataset_dir"])
    rows = json.loads((here / "outputs/04_evaluate/scores.json").read_text())["rows"]
    cider = {name: row["CIDEr-D"]["value"] for name, row in rows.items()}
    assert cider["beam search, width 5"] > cider["constant caption"]
