"""The drawn sample: the same bytes for the same seed, captions that name what was drawn."""

import csv
import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import caption_files
import sample
import storyteller_utils as st

PAINTER = Path(sample.__file__)


def digests(folder) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def captions(folder) -> list[list[str]]:
    with open(folder / "captions.txt", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return sample.draw_dataset(tmp_path_factory.mktemp("scenes") / "sample", photos=24)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(scenes, tmp_path):
    again = sample.draw_dataset(tmp_path / "again", photos=6)
    assert digests(again / "Images").items() <= digests(scenes / "Images").items()
    assert captions(again) == captions(scenes)[: 1 + 6 * 5]
    other = sample.draw_dataset(tmp_path / "other", photos=6, seed=14)
    assert digests(other).keys() == digests(again).keys()
    assert not set(digests(other).values()) & set(digests(scenes).values())


def test_the_captions_of_a_seed_stay_those_that_the_stored_notebooks_show(scenes):
    assert captions(scenes)[1:3] == [
        ["scene_0001.jpg", "Three white dogs stand in the city at sunset."],
        ["scene_0001.jpg", "Three dogs stand in the city."],
    ]


def test_every_photo_has_five_captions_of_different_words(scenes):
    header, *rows = captions(scenes)
    assert header == ["image", "caption"]
    wordings: dict[str, set[str]] = {}
    for image, caption in rows:
        wordings.setdefault(image, set()).add(caption.lower().replace(",", "").strip("."))
    assert sorted(wordings) == sorted(path.name for path in (scenes / "Images").iterdir())
    assert len(rows) == 24 * 5
    assert {len(texts) for texts in wordings.values()} == {5}


def test_the_module_reads_all_that_was_drawn(scenes):
    read = caption_files.read_captions(st.Dataset.find(str(scenes)))
    assert set(Counter(name for name, _ in read.rows).values()) == {5}
    assert len(read.rows) == 24 * 5


def test_captions_with_commas_survive_the_csv(scenes):
    rows = captions(scenes)
    assert {len(row) for row in rows} == {2}
    quoted = [caption for _, caption in rows if "," in caption]
    text = (scenes / "captions.txt").read_text()
    assert quoted
    assert all(f'"{caption}"' in text for caption in quoted)


def test_photos_are_jpegs_of_the_size_asked_for(scenes, tmp_path):
    large = sample.draw_dataset(tmp_path / "large", photos=2, size=(500, 375), quality=95)
    for folder, size in ((scenes, (320, 240)), (large, (500, 375))):
        for path in (folder / "Images").iterdir():
            with Image.open(path) as photo:
                assert (photo.format, photo.mode, photo.size) == ("JPEG", "RGB", size)
    assert captions(large) == captions(scenes)[: 1 + 2 * 5]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch, error):
    paint, painted = sample.paint_scene, []

    def paint_three(*arguments):
        painted.append(arguments)
        if len(painted) > 3:
            raise error
        return paint(*arguments)

    monkeypatch.setattr(sample, "paint_scene", paint_three)
    with pytest.raises(type(error)):
        sample.draw_dataset(tmp_path / "sample", photos=5)
    assert len(painted) == 4
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_stays_as_it_was(tmp_path):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=str(tmp_path / "sample")):
        sample.draw_dataset(tmp_path / "sample", photos=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["sample", "mine.txt"]


def test_the_command_draws_a_folder_and_refuses_an_existing_one(tmp_path):
    def run(*words):
        command = [sys.executable, PAINTER, *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run("drawn", "--photos", "2").returncode == 0
    assert len(captions(tmp_path / "drawn")) == 1 + 2 * 5
    again = run("drawn")
    assert again.returncode == 2
    assert "drawn exists: delete it" in again.stderr


def test_every_sprite_tone_and_place_that_the_tables_name_exists():
    tones = {*sample.TONES, "body", "shade", "shine"}
    for shapes in sample.SPRITES.values():
        for shape in shapes:
            assert shape.tone in tones
            assert all(0 <= point <= sample.GRID for point in shape.points)
            assert len(shape.points) == 4 or shape.kind == "polygon"
    named = {"tree", "ball", *(subject.noun for subject in sample.SUBJECTS)}
    named.update(*(place.backdrop for place in sample.PLACES.values()))
    named.update(*(time.hanging for time in sample.TIMES))
    assert named == set(sample.SPRITES)
    for subject in sample.SUBJECTS:
        assert set(subject.colours) <= sample.TONES.keys()
        assert set(subject.places) <= sample.PLACES.keys()
