"""Datasets, caption formats and splits: no caption is lost silently, no photo is in two splits."""

import contextlib
import importlib.util
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import storyteller_utils as st
from support import begin_stage

pytestmark = pytest.mark.fast

ONE_PIXEL = bytes.fromhex(
    "47494638396101000100800000ffffff00000021f90401000000002c00000000010001000002024401003b"
)


def dataset(
    folder: Path,
    text,
    photos=("dog.jpg", "cat.jpg", "sky.jpg"),
    file: str = "captions.txt",
    below: str = "Images",
):
    for name in photos:
        path = folder / below / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ONE_PIXEL)
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return st.find_dataset(str(folder))


def told(folder: Path, text, **more) -> list[tuple[str, str]]:
    captions = st.read_captions(dataset(folder, text, **more))
    assert not captions.without_photo and not captions.unread
    return captions.rows


# What the formats hold


def test_comma_csv_with_quoted_captions_is_read_whole(tmp_path):
    text = 'image,caption\ndog.jpg,"A dog, wet, runs ."\ndog.jpg,"A ""wet"" dog ."\ncat.jpg,A cat sleeps .\n'
    assert told(tmp_path, text) == [
        ("dog.jpg", "A dog, wet, runs ."),
        ("dog.jpg", 'A "wet" dog .'),
        ("cat.jpg", "A cat sleeps ."),
    ]


def test_commas_without_quotes_stay_in_the_caption(tmp_path):
    text = 'image,caption\ndog.jpg,A dog, wet, runs .\ncat.jpg,Up , up , and away .\nsky.jpg,It says,"up",twice .\n'
    assert told(tmp_path, text) == [
        ("dog.jpg", "A dog, wet, runs ."),
        ("cat.jpg", "Up , up , and away ."),
        ("sky.jpg", 'It says,"up",twice .'),
    ]


def test_a_photo_name_with_a_comma_may_be_quoted(tmp_path):
    lines = [
        '"dog, wet.jpg",A dog .',
        '"dog, wet.jpg","A dog, wet ."',
        '"dog, wet.jpg",A dog, wet too .',
    ]
    assert told(tmp_path, "\n".join(["image,caption", *lines]), photos=["dog, wet.jpg"]) == [
        ("dog, wet.jpg", caption) for caption in ("A dog .", "A dog, wet .", "A dog, wet too .")
    ]


def test_captions_without_a_header_keep_their_first_line(tmp_path):
    assert told(tmp_path, "dog.jpg,A dog .\ncat.jpg,A cat .") == [
        ("dog.jpg", "A dog ."),
        ("cat.jpg", "A cat ."),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_every_encoding_and_line_ending_gives_the_same_captions(tmp_path, encoding, newline):
    lines = [
        "image,caption",
        'dog.jpg,"A dog in a café, wet ."',
        "cat.jpg,A cat’s naïve look .",
        "",
    ]
    rows = told(tmp_path, newline.join(lines).encode(encoding))
    assert rows == [("dog.jpg", "A dog in a café, wet ."), ("cat.jpg", "A cat’s naïve look .")]


@pytest.mark.parametrize(
    "header", ["image_name,comment_number,comment\n", "image_name, comment_number, comment\n", ""]
)
def test_the_comma_form_with_a_number_column_is_read(tmp_path, header):
    text = (
        header
        + 'dog.jpg,0,Two dogs play .\ndog.jpg,1,"Two young, wet dogs ."\ncat.jpg, 0, "A cat, 2 roofs ."\n'
        "sky.jpg,0,7 clouds, far away .\nsky.jpg,1,\n"
    )
    captions = st.read_captions(dataset(tmp_path, text))
    assert (
        captions.rows
        == [
            ("dog.jpg", "Two dogs play ."),
            ("dog.jpg", "Two young, wet dogs ."),
            ("cat.jpg", "A cat, 2 roofs ."),
            ("sky.jpg", "7 clouds, far away ."),
        ]
        and len(captions.unread) == 1
    )


def test_an_unclosed_quote_does_not_swallow_the_following_lines(tmp_path):
    text = 'image,caption\ndog.jpg,"A dog, wet\ncat.jpg,A cat .\nsky.jpg,"A sky ."\n'
    rows = told(tmp_path, text)
    assert [name for name, _ in rows] == ["dog.jpg", "cat.jpg", "sky.jpg"]
    assert rows[0][1].strip('"') == "A dog, wet" and rows[1:] == [
        ("cat.jpg", "A cat ."),
        ("sky.jpg", "A sky ."),
    ]


def test_flickr30k_results_csv_is_read_and_its_malformed_row_repaired(tmp_path):
    text = (
        "image_name| comment_number| comment\ndog.jpg| 0| Two dogs , one wet , play .\ndog.jpg| 1| A dog | a stick .\n"
        "cat.jpg| 4   A cat runs across 2 roofs .\nsky.jpg| 0| 7 clouds .\n"
    )
    assert told(tmp_path, text, file="results.csv") == [
        ("dog.jpg", "Two dogs , one wet , play ."),
        ("dog.jpg", "A dog | a stick ."),
        ("cat.jpg", "A cat runs across 2 roofs ."),
        ("sky.jpg", "7 clouds ."),
    ]


@pytest.mark.parametrize("file", ["results_20130124.token", "Flickr8k.token.txt", "captions.token"])
def test_a_token_file_is_read_and_its_bad_photo_name_reported(tmp_path, file):
    text = "dog.jpg#0\tA dog , wet .\ndog.jpg#12\tNumber #1 dog .\ncat.jpg.1#0\tA cat .\ncat.jpg.1#1\tThe cat .\n"
    captions = st.read_captions(dataset(tmp_path, text, file=file))
    assert captions.rows == [("dog.jpg", "A dog , wet ."), ("dog.jpg", "Number #1 dog .")]
    assert captions.without_photo == {"cat.jpg.1": 2}
    assert captions.without_caption == ["cat.jpg", "sky.jpg"]


@pytest.mark.parametrize(
    "file", ["dataset_flickr30k.json", "dataset_flickr8k.json", "dataset.json"]
)
def test_karpathys_json_gives_captions_and_splits(tmp_path, file):
    images = [
        {
            "filename": f"{i}.jpg",
            "split": split,
            "sentences": [{"raw": f"Photo {i} ."}, {"raw": f"Once more {i} ."}],
        }
        for i, split in enumerate(["train", "restval", "val", "test"])
    ]
    data = dataset(
        tmp_path, json.dumps({"images": images}), photos=[f"{i}.jpg" for i in range(4)], file=file
    )
    rows = st.read_captions(data).rows
    assert (
        rows[:3] == [("0.jpg", "Photo 0 ."), ("0.jpg", "Once more 0 ."), ("1.jpg", "Photo 1 .")]
        and len(rows) == 8
    )
    assert st.split_photos(list(data.photos), 0, str(data.captions)) == {
        "0.jpg": "train",
        "1.jpg": "train",
        "2.jpg": "val",
        "3.jpg": "test",
    }


def test_broken_json_says_which_file_and_what_it_should_be(tmp_path):
    with pytest.raises(st.ArtifactError, match="dataset.json.*Karpathy"):
        told(tmp_path, '{"images": [{"filename": "dog.jpg"}]}', file="dataset.json")


def test_any_number_of_captions_a_photo_is_kept(tmp_path):
    counts = {"dog.jpg": 1, "cat.jpg": 7, "sky.jpg": 3}
    text = "image,caption\n" + "".join(
        f"{name},Caption {i} .\n" for name, n in counts.items() for i in range(n)
    )
    assert Counter(name for name, _ in told(tmp_path, text)) == counts


# Which photo a caption belongs to


@pytest.mark.parametrize("below", ["a", "a/b", "a/b/c"])
def test_photos_are_found_one_to_three_folders_deep(tmp_path, below):
    rows = told(
        tmp_path,
        "image_name| comment_number| comment\ndog.jpg| 0| A dog .\n",
        file="results.csv",
        below=below,
    )
    assert rows == [("dog.jpg", "A dog .")]


def test_captions_inside_the_photo_folder_are_found_too(tmp_path):
    (tmp_path / "Images").mkdir()
    text = "image_name| comment_number| comment\ndog.jpg| 0| A dog .\n"
    assert told(tmp_path, text, file="Images/results.csv") == [("dog.jpg", "A dog .")]


def test_names_given_with_folders_find_their_photo(tmp_path):
    text = "image,caption\nflickr30k_images/dog.jpg,A dog .\nC:\\photos\\cat.jpg,A cat .\n./sky.jpg,A sky .\n"
    assert told(tmp_path, text) == [
        ("dog.jpg", "A dog ."),
        ("cat.jpg", "A cat ."),
        ("sky.jpg", "A sky ."),
    ]


def test_photos_of_the_same_file_name_are_never_mixed_up(tmp_path):
    captions = st.read_captions(
        dataset(
            tmp_path,
            "image,caption\na/dog.jpg,First .\nb/dog.jpg,Second .\ndog.jpg,Whose ?\n",
            photos=["a/dog.jpg", "b/dog.jpg"],
        )
    )
    assert captions.rows == [("a/dog.jpg", "First ."), ("b/dog.jpg", "Second .")]
    assert captions.without_photo == {"dog.jpg": 1}


def test_photos_that_are_there_twice_are_said_to_be(tmp_path):
    data = dataset(tmp_path, "image,caption\ndog.jpg,Whose ?\n", photos=["a/dog.jpg", "b/dog.jpg"])
    with pytest.raises(st.ArtifactError, match="'dog.jpg', and 2 photos have that name"):
        st.read_captions(data)


def test_a_name_that_climbs_out_of_the_folder_is_no_photo(tmp_path):
    (tmp_path / "dog.jpg").write_bytes(ONE_PIXEL)
    captions = st.read_captions(
        dataset(tmp_path / "data", "image,caption\n../dog.jpg,Outside .\ndog.jpg,Inside .\n")
    )
    assert captions.rows == [("dog.jpg", "Inside .")] and captions.without_photo == {
        "../dog.jpg": 1
    }


def test_lines_that_are_no_caption_are_listed_with_their_number(tmp_path):
    text = "image,caption\ndog.jpg,A dog .\n\ncat.jpg\n,Whose ?\nsky.jpg,  \n"
    captions = st.read_captions(dataset(tmp_path, text))
    assert captions.rows == [("dog.jpg", "A dog .")]
    assert [number for number, _ in captions.unread] == [4, 5, 6]
    assert captions.without_caption == ["cat.jpg", "sky.jpg"]


def test_captions_of_other_photos_are_an_error_that_shows_one(tmp_path):
    with pytest.raises(st.ArtifactError, match="(?s)2 captions.*zebra.jpg"):
        told(tmp_path, "image,caption\nzebra.jpg,A zebra .\nyak.jpg,A yak .\n")


WORD = some.one_of(
    some.text("ab é'\"|#\t,.-1", max_size=12),
    some.sampled_from(
        [
            "כלב רץ על הדשא",
            "😀 👩‍👩‍👧",
            "a dog " * 10_000,
            "\u202ea dog\u202c",
            "a\u2028b",
            "A dog .",
        ]
    ),
)
NAME = some.sampled_from(
    [
        "dog.jpg",
        "cat.jpg",
        "zebra.jpg",
        "x/dog.jpg",
        "../dog.jpg",
        "../../etc/dog.jpg",
        "dog.jpg.1",
        "",
        "dog",
        "big dog.jpg",
    ]
)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    lines=some.lists(some.tuples(NAME, WORD)),
    form=some.sampled_from(["comma", "pipe", "token"]),
    newline=some.sampled_from(["\n", "\r\n"]),
    encoding=some.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_every_line_of_any_file_is_read_reported_or_blank(tmp_path, lines, form, newline, encoding):
    layout = {"comma": "{},{}", "pipe": "{}| 0| {}", "token": "{}#0\t{}"}[form]
    first = {
        "comma": "image,caption",
        "pipe": "image_name| comment_number| comment",
        "token": "sky.jpg#1\tBlue .",
    }[form]
    written = [
        first,
        layout.format("sky.jpg", "A sky ."),
        *(layout.format(*line) for line in lines),
    ]
    photos = ["dog.jpg", "cat.jpg", "sky.jpg", "big dog.jpg"]
    captions = st.read_captions(dataset(tmp_path, newline.join(written).encode(encoding), photos))
    expected = len(written) - (form != "token")
    assert (
        len(captions.rows) + len(captions.unread) + sum(captions.without_photo.values()) == expected
    )
    assert {name for name, _ in captions.rows} <= set(photos)
    assert all(caption.strip() for _, caption in captions.rows)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    data=some.binary(max_size=60),
    start=some.sampled_from([b"", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"dog.jpg,A dog .\n"]),
)
def test_any_bytes_are_captions_or_an_error_that_names_the_file(tmp_path, data, start):
    try:
        captions = st.read_captions(dataset(tmp_path, start + data))
    except st.ArtifactError as error:
        assert "captions.txt" in str(error)
    else:
        assert captions.rows


JSON = some.recursive(
    some.none()
    | some.integers()
    | some.text(max_size=4)
    | some.sampled_from(["dog.jpg", "train", "val"]),
    lambda inner: (
        some.lists(inner, max_size=3)
        | some.dictionaries(
            some.sampled_from(["images", "filename", "split", "sentences", "raw"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(value=some.dictionaries(some.sampled_from(["images", "filename"]), JSON, min_size=1))
def test_any_json_is_captions_and_splits_or_an_error_that_names_the_file(tmp_path, value):
    data = dataset(tmp_path, json.dumps(value), file="dataset.json")
    for read in (
        lambda: st.read_captions(data),
        lambda: st.split_photos(list(data.photos), 0, str(data.captions)),
    ):
        with contextlib.suppress(st.ArtifactError):
            read()


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(
    texts=some.lists(
        some.binary(max_size=20) | some.sampled_from([b"dog.jpg", b"cat.jpg\r\nsky.jpg"]),
        min_size=3,
        max_size=3,
    )
)
def test_any_lists_are_a_split_or_one_error(tmp_path, texts):
    for split, text in zip(("train", "val", "test"), texts, strict=True):
        (tmp_path / f"{split}.txt").write_bytes(text)
    with contextlib.suppress(st.ArtifactError):
        assert set(
            st.split_photos(["dog.jpg", "cat.jpg", "sky.jpg"], 0, str(tmp_path)).values()
        ) >= {"train", "val"}


# Finding a dataset


def test_links_to_photos_and_to_folders_of_photos_are_followed_and_a_circle_ends(tmp_path):
    dataset(tmp_path / "disk", "x", photos=["dog.jpg", "deep/cat.jpg"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/Images").symlink_to(tmp_path / "disk/Images")
    (tmp_path / "disk/Images/deep/again").symlink_to(tmp_path / "disk/Images")
    (tmp_path / "data/top").symlink_to(tmp_path / "data")
    (tmp_path / "disk/Images/sky.jpg").symlink_to(tmp_path / "disk/Images/dog.jpg")
    (tmp_path / "disk/Images/gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "data/captions.txt").write_text(
        "image,caption\ndog.jpg,A dog .\ndeep/cat.jpg,A cat .\nsky.jpg,The sky .\n"
    )
    found = st.find_dataset(str(tmp_path / "data"))
    assert list(found.photos) == ["deep/cat.jpg", "dog.jpg", "gone.jpg", "sky.jpg"]
    assert st.read_captions(found).without_caption == ["gone.jpg"]


def test_a_name_that_is_no_text_is_refused_and_emoji_are_text(tmp_path):
    assert told(
        tmp_path / "emoji", "image,caption\n👩‍👩‍👧.jpg,Three .\n", photos=["👩‍👩‍👧.jpg"]
    ) == [("👩‍👩‍👧.jpg", "Three .")]
    folder = dataset(tmp_path, "image,caption\ndog.jpg,A dog .\n").folder
    try:
        Path(os.fsdecode(os.fsencode(folder / "Images") + b"/caf\xe9.jpg")).write_bytes(ONE_PIXEL)
    except OSError as error:
        pytest.skip(f"this file system has no such names ({error})")
    with pytest.raises(st.ArtifactError, match="caf.*Rename it"):
        st.find_dataset(str(folder))


def test_a_folder_without_photos_or_without_captions_says_what_is_missing(tmp_path):
    with pytest.raises(st.ArtifactError, match="nowhere.*not a folder"):
        st.find_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(st.ArtifactError, match="no photos"):
        dataset(tmp_path, "image,caption\n", photos=[])
    (tmp_path / "captions.txt").unlink()
    with pytest.raises(st.ArtifactError, match="no captions.*captions.txt"):
        dataset(tmp_path, "x", file="notes.md")


@pytest.fixture
def copied(here):
    """A project's folder of its own: a copy of the module, and a painter of one photo."""
    (here / "notebooks").mkdir()
    (here / "notebooks/sample.py").write_text(PAINTER)
    shutil.copy(st.__file__, here)
    spec = importlib.util.spec_from_file_location("copied", here / "storyteller_utils.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "copied", module)
        spec.loader.exec_module(module)
        yield module


PAINTER = f"""
def draw_dataset(folder):
    (folder / "Images").mkdir(parents=True)
    (folder / "Images/dog.gif").write_bytes({ONE_PIXEL!r})
    (folder / "captions.txt").write_text("image,caption\\ndog.gif,A dog .\\n")
"""


def test_off_kaggle_the_sample_is_drawn_once_and_named(copied):
    first = copied.find_dataset()
    before = {path: path.stat().st_mtime_ns for path in first.photos.values()}
    again = copied.find_dataset()
    assert first.is_sample and "drawn" in first.describe() and "dataset_dir" in first.describe()
    assert {path: path.stat().st_mtime_ns for path in again.photos.values()} == before
    assert len(before) == 1


def test_a_module_without_its_project_asks_for_a_dataset(here, copied):
    (here / "notebooks/sample.py").unlink()
    with pytest.raises(copied.ArtifactError, match="no dataset: set dataset_dir"):
        copied.find_dataset()
    assert not (here / "outputs/sample_dataset").exists()


def test_a_folder_in_the_home_directory_may_be_named_with_a_tilde(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    dataset(here / "photos", "image,caption\ndog.jpg,A dog .\n")
    assert (
        begin_stage("01_extract_features", dataset_dir="~/photos").dataset.folder == here / "photos"
    )


def test_on_kaggle_a_missing_dataset_says_how_to_add_it_and_draws_nothing(here, monkeypatch):
    (here / "input").mkdir()
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    with pytest.raises(st.ArtifactError, match="(?s)Add.*adityajn105/flickr30k.*dataset_dir"):
        st.find_dataset()
    assert not (here / "outputs").exists()


@pytest.mark.parametrize(
    "mount", ["flickr30k", "d/adityajn105/flickr30k", "datasets/adityajn105/flickr30k"]
)
def test_on_kaggle_the_dataset_is_found_at_any_depth_and_outputs_are_not_taken_for_one(
    here, monkeypatch, mount
):
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    earlier = here / "input/notebooks/me/vocab/outputs/02_vocab"
    earlier.mkdir(parents=True)
    for name in ("manifest.json", "captions.csv"):
        (earlier / name).write_text("{}")
    dataset(here / "input" / mount, "image,caption\ndog.jpg,A dog .\n")
    found = st.find_dataset()
    assert found.folder == here / "input" / mount and not found.is_sample


def test_on_kaggle_two_datasets_are_listed_and_none_is_chosen(here, monkeypatch):
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    for name in ("flickr8k", "flickr30k"):
        dataset(here / "input" / name, "image,caption\ndog.jpg,A dog .\n")
    with pytest.raises(st.ArtifactError, match="(?s)input/flickr.*input/flickr.*dataset_dir"):
        st.find_dataset()


def test_the_second_copy_of_the_captions_among_the_photos_is_the_same_dataset(here, monkeypatch):
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    text = "image_name| comment_number| comment\ndog.jpg| 0| A dog .\n"
    dataset(here / "input/images", text, file="results.csv", below="flickr30k_images")
    shutil.copy(
        here / "input/images/results.csv", here / "input/images/flickr30k_images/results.csv"
    )
    assert st.find_dataset().captions == here / "input/images/results.csv"


def test_a_dataset_is_the_same_wherever_it_lies_and_another_with_one_caption_changed(
    tmp_path, drawn
):
    copy = shutil.copytree(drawn, tmp_path / "elsewhere")
    ours, moved = st.find_dataset(str(drawn)).identity(), st.find_dataset(str(copy)).identity()
    assert ours["fingerprint"] == moved["fingerprint"] and ours["photos"] == 24
    (copy / "captions.txt").write_text((copy / "captions.txt").read_text().replace(".", "!", 1))
    assert st.find_dataset(str(copy)).identity()["fingerprint"] != ours["fingerprint"]
    (copy / "captions.txt").write_bytes((drawn / "captions.txt").read_bytes())
    (copy / "Images/scene_0001.jpg").unlink()
    assert st.find_dataset(str(copy)).identity()["fingerprint"] != ours["fingerprint"]


@given(photos=some.integers(0, 400), count=some.integers(0, 500))
def test_max_photos_chooses_that_many_different_photos_and_always_the_same(photos, count):
    names = [f"{i:03}.jpg" for i in range(photos)]
    chosen = st.Dataset("any", Path("a"), {name: Path(name) for name in names}, Path("c")).some(
        count
    )
    assert chosen == st.Dataset(
        "any", Path("b"), {name: Path("b", name) for name in names}, Path("c")
    ).some(count)
    assert len(set(chosen)) == len(chosen) == (min(count, photos) or photos)
    assert chosen == sorted(chosen) and set(chosen) <= set(names)


# Splits


@given(count=some.integers(10, 300), seed=some.integers(0, 5))
@settings(max_examples=40)
def test_a_split_is_by_photo_80_10_10_and_decided_by_the_seed(count, seed):
    names = [f"{i}.jpg" for i in range(count)]
    split = st.split_photos(names, seed)
    sizes = Counter(split.values())
    assert list(split) == names and split == st.split_photos(names, seed)
    assert abs(sizes["train"] - 0.8 * count) <= 1 and abs(sizes["val"] - sizes["test"]) <= 1
    assert min(sizes["val"], sizes["test"]) >= 1


def test_another_seed_splits_differently():
    names = [f"{i}.jpg" for i in range(50)]
    assert st.split_photos(names, 1) != st.split_photos(names, 2)


def test_too_few_photos_cannot_be_split():
    with pytest.raises(st.ArtifactError, match="4 captioned photos are too few"):
        st.split_photos(["1.jpg", "2.jpg", "3.jpg", "4.jpg"], 0)


def lists(folder: Path, style: str = "plain", **named: str) -> str:
    folder.mkdir(exist_ok=True)
    for split, text in named.items():
        name = (
            f"{split}.txt"
            if style == "plain"
            else f"Flickr_8k.{split.replace('val', 'dev')}Images.txt"
        )
        (folder / name).write_bytes(text.encode("utf-8-sig"))
    return str(folder)


@pytest.mark.parametrize("style", ["plain", "flickr8k"])
def test_given_lists_are_followed_and_unlisted_photos_left_out(tmp_path, style):
    splits = lists(
        tmp_path, style, train="1.jpg\r\n2.jpg\r\n", val="3.jpg\n\n", test="4.jpg\n9.jpg"
    )
    split = st.split_photos(["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"], 0, splits)
    assert split == {"1.jpg": "train", "2.jpg": "train", "3.jpg": "val", "4.jpg": "test"}


def test_lists_without_suffixes_and_with_other_slashes_are_followed(tmp_path):
    splits = lists(tmp_path, train="1\nphotos\\2.jpg\n", val="3\n")
    assert st.split_photos(["1.jpg", "2.jpg", "3.jpg"], 0, splits) == {
        "1.jpg": "train",
        "2.jpg": "train",
        "3.jpg": "val",
    }


def test_lists_that_leave_open_which_photo_they_mean_are_refused(tmp_path):
    splits = lists(tmp_path, train="a/1.jpg\n2.jpg\n", val="3.jpg\n", test="b/1.jpg\n")
    assert st.split_photos(["a/1.jpg", "b/1.jpg", "c/2.jpg", "d/2.jpg", "3.jpg"], 0, splits) == {
        "a/1.jpg": "train",
        "b/1.jpg": "test",
        "c/2.jpg": "train",
        "d/2.jpg": "train",
        "3.jpg": "val",
    }
    with pytest.raises(
        st.ArtifactError, match="1.jpg in test and train, none of them as x/a/1.jpg"
    ):
        st.split_photos(["x/a/1.jpg", "2.jpg", "3.jpg"], 0, splits)


def test_a_missing_test_list_is_allowed(tmp_path):
    splits = lists(tmp_path, train="1.jpg\n", val="2.jpg\n")
    assert st.split_photos(["1.jpg", "2.jpg", "3.jpg"], 0, splits) == {
        "1.jpg": "train",
        "2.jpg": "val",
    }


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_train_or_val_list_is_an_error(tmp_path, missing):
    given_lists = {"train": "1.jpg\n", "val": "2.jpg\n", "test": "3.jpg\n"}
    del given_lists[missing]
    with pytest.raises(st.ArtifactError, match="train.txt and val.txt"):
        st.split_photos(["1.jpg", "2.jpg", "3.jpg"], 0, lists(tmp_path, **given_lists))


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
def test_lists_that_share_a_photo_are_refused_by_its_name(tmp_path, pair):
    texts = {"train": "1.jpg\n", "val": "2.jpg\n", "test": "3.jpg\n"}
    texts = {split: text + "both.jpg\n" * (split in pair) for split, text in texts.items()}
    with pytest.raises(st.ArtifactError, match=f"both.jpg into both {pair[0]} and {pair[1]}"):
        st.split_photos(["1.jpg", "2.jpg", "3.jpg", "both.jpg"], 0, lists(tmp_path, **texts))


def test_lists_of_another_dataset_are_refused(tmp_path):
    with pytest.raises(st.ArtifactError, match="no val photo.*2 listed"):
        st.split_photos(["1.jpg"], 0, lists(tmp_path, train="1.jpg\n", val="8.jpg\n9.jpg\n"))


def test_photos_in_folders_are_found_in_lists_by_their_file_name(tmp_path):
    splits = lists(tmp_path, train="1.jpg\n", val="2.jpg\n")
    assert st.split_photos(["a/1.jpg", "b/2.jpg"], 0, splits) == {
        "a/1.jpg": "train",
        "b/2.jpg": "val",
    }


def test_real_lists_put_six_thousand_photos_into_train_and_one_thousand_into_val(shared):
    data = st.find_dataset(str(shared / "flickr8k"))
    captions = st.read_captions(data)
    assert len(data.photos) == 7000 and len(captions.rows) == 35000 and not captions.unread
    assert Counter(st.split_photos(list(data.photos), 0, str(shared / "flickr8k")).values()) == {
        "train": 6000,
        "val": 1000,
    }
