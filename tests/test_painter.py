import csv
import hashlib

import pytest
from PIL import Image

import storyteller_utils as painter
from storyteller_utils import draw_sample_dataset


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
def sample(tmp_path_factory):
    return draw_sample_dataset(tmp_path_factory.mktemp("drawn") / "sample", images=24)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(sample, tmp_path):
    assert digests(draw_sample_dataset(tmp_path / "again", images=24)) == digests(sample)
    other = digests(draw_sample_dataset(tmp_path / "other", images=24, seed=14))
    assert other.keys() == digests(sample).keys()
    assert not set(other.values()) & set(digests(sample).values())


def test_the_first_photos_of_a_larger_sample_are_the_smaller_sample(sample, tmp_path):
    smaller = draw_sample_dataset(tmp_path / "smaller", images=7)
    assert digests(smaller / "Images").items() <= digests(sample / "Images").items()
    assert captions(smaller) == captions(sample)[: 1 + 7 * 5]


def test_every_photo_has_five_captions_of_different_words(sample):
    header, *rows = captions(sample)
    assert header == ["image", "caption"]
    told = {}
    for image, caption in rows:
        told.setdefault(image, set()).add(caption.lower().replace(",", "").strip("."))
    assert sorted(told) == sorted(path.name for path in (sample / "Images").iterdir())
    assert len(rows) == 24 * 5 and {len(wordings) for wordings in told.values()} == {5}


def test_captions_with_commas_survive_the_csv(sample):
    rows = captions(sample)
    assert {len(row) for row in rows} == {2}
    quoted = [caption for _, caption in rows if "," in caption]
    assert quoted and all(
        f'"{caption}"' in (sample / "captions.txt").read_text() for caption in quoted
    )


def test_photos_are_jpegs_of_the_size_asked_for(sample, tmp_path):
    large = draw_sample_dataset(tmp_path / "large", images=2, size=(500, 375), quality=95)
    for folder, size in ((sample, (320, 240)), (large, (500, 375))):
        for path in (folder / "Images").iterdir():
            with Image.open(path) as photo:
                assert (photo.format, photo.mode, photo.size) == ("JPEG", "RGB", size)
    assert captions(large) == captions(sample)[: 1 + 2 * 5]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch, error):
    paint, painted = painter._paint_scene, []

    def paint_three(*arguments):
        painted.append(arguments)
        if len(painted) > 3:
            raise error
        return paint(*arguments)

    monkeypatch.setattr(painter, "_paint_scene", paint_three)
    with pytest.raises(type(error)):
        draw_sample_dataset(tmp_path / "sample", images=5)
    assert len(painted) == 4 and not list(tmp_path.iterdir())


def test_a_folder_that_is_there_already_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=str(tmp_path / "sample")):
        draw_sample_dataset(tmp_path / "sample", images=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["sample", "mine.txt"]


def test_every_sprite_and_tone_that_the_tables_name_exists():
    shapes = [shape for sprite in painter._SPRITES.values() for shape in sprite.split()]
    assert {shape[0] for shape in shapes} <= set("orp") and {shape[1] for shape in shapes} <= {
        *painter._TONES,
        *"bdh",
    }
    assert all(len(shape) == 6 for shape in shapes if shape[0] in "or")
    named = " ".join(row[0] for row in painter._SUBJECTS) + " tree ball "
    named += " ".join(
        [row[3] for row in painter._PLACES.values()] + [row[3] for row in painter._TIMES.values()]
    )
    assert set(named.split()) == set(painter._SPRITES)
    for _, colours, places, _ in painter._SUBJECTS:
        assert set(colours.split()) <= set(painter._TONES) and set(places.split()) <= set(
            painter._PLACES
        )
