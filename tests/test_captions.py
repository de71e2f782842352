"""Datasets, caption formats and splits: no caption is lost silently, no photo is in two splits."""

import contextlib
import csv
import importlib.util
import io
import json
import os
import shutil
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import caption_files
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
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return st.Dataset.find(str(folder))


def rows_of(folder: Path, text, **more) -> list[tuple[str, str]]:
    captions = caption_files.read_captions(dataset(folder, text, **more))
    assert not captions.without_photo and not captions.unread
    return captions.rows


# What the formats hold


def test_comma_csv_with_quoted_captions_is_read_whole(tmp_path):
    text = 'image,caption\ndog.jpg,"A dog, wet, runs ."\ndog.jpg,"A ""wet"" dog ."\n'
    text += "cat.jpg,A cat sleeps .\n"
    assert rows_of(tmp_path, text) == [
        ("dog.jpg", "A dog, wet, runs ."),
        ("dog.jpg", 'A "wet" dog .'),
        ("cat.jpg", "A cat sleeps ."),
    ]


def test_commas_without_quotes_stay_in_the_caption(tmp_path):
    text = "image,caption\ndog.jpg,A dog, wet, runs .\ncat.jpg,Up , up , and away .\n"
    text += 'sky.jpg,It says,"up",twice .\n'
    assert rows_of(tmp_path, text) == [
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
    assert rows_of(tmp_path, "\n".join(["image,caption", *lines]), photos=["dog, wet.jpg"]) == [
        ("dog, wet.jpg", caption) for caption in ("A dog .", "A dog, wet .", "A dog, wet too .")
    ]


def test_captions_without_a_header_keep_their_first_line(tmp_path):
    assert rows_of(tmp_path, "dog.jpg,A dog .\ncat.jpg,A cat .") == [
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
    rows = rows_of(tmp_path, newline.join(lines).encode(encoding))
    assert rows == [("dog.jpg", "A dog in a café, wet ."), ("cat.jpg", "A cat’s naïve look .")]


@pytest.mark.parametrize(
    "header", ["image_name,comment_number,comment\n", "image_name, comment_number, comment\n", ""]
)
def test_the_comma_form_with_a_number_column_is_read(tmp_path, header):
    text = (
        header + 'dog.jpg,0,Two dogs play .\ndog.jpg,1,"Two young, wet dogs ."\n'
        'cat.jpg, 0, "A cat, 2 roofs ."\n'
        "sky.jpg,0,7 clouds, far away .\nsky.jpg,1,\n"
    )
    captions = caption_files.read_captions(dataset(tmp_path, text))
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
    rows = rows_of(tmp_path, text)
    assert [name for name, _ in rows] == ["dog.jpg", "cat.jpg", "sky.jpg"]
    assert rows[0][1].strip('"') == "A dog, wet" and rows[1:] == [
        ("cat.jpg", "A cat ."),
        ("sky.jpg", "A sky ."),
    ]


def test_flickr30k_results_csv_is_read_and_its_malformed_row_repaired(tmp_path):
    text = (
        "image_name| comment_number| comment\ndog.jpg| 0| Two dogs , one wet , play .\n"
        "dog.jpg| 1| A dog | a stick .\n"
        "cat.jpg| 4   A cat runs across 2 roofs .\nsky.jpg| 0| 7 clouds .\n"
    )
    assert rows_of(tmp_path, text, file="results.csv") == [
        ("dog.jpg", "Two dogs , one wet , play ."),
        ("dog.jpg", "A dog | a stick ."),
        ("cat.jpg", "A cat runs across 2 roofs ."),
        ("sky.jpg", "7 clouds ."),
    ]


@pytest.mark.parametrize("file", ["results_20130124.token", "Flickr8k.token.txt", "captions.token"])
def test_a_token_file_is_read_and_its_bad_photo_name_reported(tmp_path, file):
    text = "dog.jpg#0\tA dog , wet .\ndog.jpg#12\tNumber #1 dog .\n"
    text += "cat.jpg.1#0\tA cat .\ncat.jpg.1#1\tThe cat .\n"
    captions = caption_files.read_captions(dataset(tmp_path, text, file=file))
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
    rows = caption_files.read_captions(data).rows
    assert (
        rows[:3] == [("0.jpg", "Photo 0 ."), ("0.jpg", "Once more 0 ."), ("1.jpg", "Photo 1 .")]
        and len(rows) == 8
    )
    assert caption_files.split_photos(list(data.photos), 0, str(tmp_path / file)) == {
        "0.jpg": "train",
        "1.jpg": "train",
        "2.jpg": "val",
        "3.jpg": "test",
    }


def test_a_table_with_a_list_of_captions_in_a_cell_gives_captions_and_splits(tmp_path):
    """Hugging Face's flickr_annotations_30k.csv, and what pandas makes of lists and arrays."""
    names = [f"{i}.jpg" for i in range(4)]
    expected = [(name, text) for name in names for text in ("It's a dog .", 'A "big" dog, it is .')]
    texts = [text for _, text in expected[:2]]
    frame = pd.DataFrame({"sentids": "[0, 1]", "split": ["train", "train", "val", "test"]})
    frame["filename"] = names
    for i, cell in enumerate((json.dumps(texts), str(texts), str(np.array(texts)))):
        (folder := tmp_path / str(i)).mkdir()
        table = frame.assign(raw=cell).to_csv(index=False)
        data = dataset(folder, table, photos=names, file="flickr_annotations_30k.csv")
        assert caption_files.read_captions(data).rows == expected, cell
        split = caption_files.split_photos(names, 0, str(folder / "flickr_annotations_30k.csv"))
        assert split == dict(zip(names, frame["split"], strict=True))


@pytest.mark.parametrize("text", ["[inaudible]", "['A dog'] runs .", '["A dog", 5]'])
def test_a_caption_in_brackets_is_no_list(tmp_path, text):
    table = pd.DataFrame({"image": ["dog.jpg"], "caption": [text]}).to_csv(index=False)
    assert rows_of(tmp_path, table) == [("dog.jpg", text)]


@pytest.mark.parametrize("written", ["", "nan", "NULL", "N/A", "<NA>"])
def test_a_missing_caption_is_listed_and_not_learned(tmp_path, written):
    text = f"image,caption\ndog.jpg,{written}\ncat.jpg,A cat sleeps .\n"
    captions = caption_files.read_captions(dataset(tmp_path, text))
    assert captions.rows == [("cat.jpg", "A cat sleeps .")]
    assert captions.unread == [(2, "no caption")]


def test_broken_json_says_which_file_and_what_it_should_be(tmp_path):
    with pytest.raises(st.ArtifactError, match=r"dataset.json is not valid JSON"):
        rows_of(tmp_path, '{"images": [{"filename": "dog.jpg"}', file="dataset.json")
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(st.ArtifactError, match=r"No file of .* holds captions.*other.json"):
        rows_of(tmp_path, '{"images": [{"filename": "dog.jpg"}]}', file="other.json")


def test_any_number_of_captions_a_photo_is_kept(tmp_path):
    counts = {"dog.jpg": 1, "cat.jpg": 7, "sky.jpg": 3}
    text = "image,caption\n" + "".join(
        f"{name},Caption {i} .\n" for name, n in counts.items() for i in range(n)
    )
    assert Counter(name for name, _ in rows_of(tmp_path, text)) == counts


# Which photo a caption belongs to


@pytest.mark.parametrize("below", ["a", "a/b", "a/b/c"])
def test_photos_are_found_one_to_three_folders_deep(tmp_path, below):
    rows = rows_of(
        tmp_path,
        "image_name| comment_number| comment\ndog.jpg| 0| A dog .\n",
        file="results.csv",
        below=below,
    )
    assert rows == [("dog.jpg", "A dog .")]


def test_captions_inside_the_photo_folder_are_found_too(tmp_path):
    (tmp_path / "Images").mkdir()
    text = "image_name| comment_number| comment\ndog.jpg| 0| A dog .\n"
    assert rows_of(tmp_path, text, file="Images/results.csv") == [("dog.jpg", "A dog .")]


def test_names_given_with_folders_find_their_photo(tmp_path):
    text = "image,caption\nflickr30k_images/dog.jpg,A dog .\n"
    text += "C:\\photos\\cat.jpg,A cat .\n./sky.jpg,A sky .\n"
    assert rows_of(tmp_path, text) == [
        ("dog.jpg", "A dog ."),
        ("cat.jpg", "A cat ."),
        ("sky.jpg", "A sky ."),
    ]


def test_photos_of_the_same_file_name_are_never_mixed_up(tmp_path):
    captions = caption_files.read_captions(
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
    with pytest.raises(st.ArtifactError, match=r"'dog.jpg', and 2 photos have that name"):
        caption_files.read_captions(data)


def test_a_name_that_climbs_out_of_the_folder_is_no_photo(tmp_path):
    (tmp_path / "dog.jpg").write_bytes(ONE_PIXEL)
    captions = caption_files.read_captions(
        dataset(tmp_path / "data", "image,caption\n../dog.jpg,Outside .\ndog.jpg,Inside .\n")
    )
    assert captions.rows == [("dog.jpg", "Inside .")] and captions.without_photo == {
        "../dog.jpg": 1
    }


def test_lines_that_are_no_caption_are_listed_with_their_number(tmp_path):
    text = "image,caption\ndog.jpg,A dog .\n\ncat.jpg\n,Whose ?\nsky.jpg,  \n"
    captions = caption_files.read_captions(dataset(tmp_path, text))
    assert captions.rows == [("dog.jpg", "A dog .")]
    assert [number for number, _ in captions.unread] == [4, 5, 6]
    assert captions.without_caption == ["cat.jpg", "sky.jpg"]


def test_captions_of_other_photos_are_an_error_that_shows_one(tmp_path):
    with pytest.raises(st.ArtifactError, match=r"(?s)2 captions.*zebra.jpg"):
        rows_of(tmp_path, "image,caption\nzebra.jpg,A zebra .\nyak.jpg,A yak .\n")


# Files as people have them

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
FOLDERS = sorted(path.name for path in CASES.iterdir() if path.is_dir()) if CASES.is_dir() else []


@pytest.mark.skipif(not FOLDERS, reason=f"no caption files at {CASES}")
@pytest.mark.parametrize("case", FOLDERS or ["none"])
def test_a_caption_file_of_a_public_dataset_is_read_as_expected(tmp_path, case):
    expected = json.loads((CASES / case / "expected.json").read_text(encoding="utf-8"))
    for name in (CASES / case / "photos.txt").read_text(encoding="utf-8").splitlines():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ONE_PIXEL)
    for path in (CASES / case).iterdir():
        if path.name not in ("photos.txt", "expected.json"):
            shutil.copy(path, tmp_path)
    captions = caption_files.read_captions(st.Dataset.find(str(tmp_path)))
    first, caption = captions.rows[0]
    alike = [unicodedata.normalize("NFC", n).lower() for n in (first, expected["photo"])]
    assert alike[0] == alike[1]
    assert (len(captions.rows), caption) == (expected["captions"], expected["caption"])
    assert not captions.unread
    assert not captions.without_photo
    assert not captions.doubtful


SCENES = [f"scene_{i:04d}.jpg" for i in range(8)]
SENTENCES = [
    "There is a yellow balloon over a green field.",
    "A yellow balloon, soaring over a green field.",
    'Under the moon, a "yellow" balloon soars.',
    "Two balloons soar; it is day.",
]
PAIRS = [(name, SENTENCES[(i + j) % 4]) for i, name in enumerate(SCENES) for j in range(4)]
CELLS = {  # what a column holds, by its header
    **dict.fromkeys(["image", "image_name", "filename", "photo", "Bild", "file"], lambda n, c: n),
    **dict.fromkeys(
        ["caption", "comment", "text", "Description", "caption_en", "Beschreibung"],
        lambda n, c: c,
    ),
    **dict.fromkeys(["", "comment_number", "id", "Unnamed: 0"], lambda n, c: len(c)),
    **dict.fromkeys(["caption_de"], lambda n, c: f"Ein Bild: {c[-6:]}"),
    "image_id": lambda n, c: n[:-4],
    "filepath": lambda n, c: f"data/photos/{n}",
    "path": lambda n, c: f"C:\\photos\\{n}",
    "split": lambda n, c: "train",
    "url": lambda n, c: f"https://photos.org/{n}",
    "category": lambda n, c: "balloon",
    "caption_length": lambda n, c: len(c),
}


@pytest.mark.parametrize(
    "separator", [",", ";", "\t", "|"], ids=["comma", "semicolon", "tab", "bar"]
)
@pytest.mark.parametrize(
    "header",
    [
        "image caption",
        "caption image",
        "id image caption",
        " filename text",
        "image_name comment_number comment",
        "comment_number comment image_name",
        "split file text url category",
        "url photo caption",
        "image_id caption",
        "filepath Description",
        "path caption caption_length",
        "Bild Beschreibung",
        "photo caption_en caption_de",
    ],
)
def test_columns_are_recognised_in_any_order(tmp_path, header, separator):
    columns = header.split(" ")
    rows = [[CELLS[column](name, text) for column in columns] for name, text in PAIRS]
    data = dataset(tmp_path, "x", photos=SCENES)
    for quoting, written in ((csv.QUOTE_ALL, [columns, *rows]), (csv.QUOTE_MINIMAL, rows)):
        with open(data.tables[0], "w", newline="") as file:
            csv.writer(file, delimiter=separator, quoting=quoting).writerows(written)
        assert caption_files.read_captions(data).rows == PAIRS


def test_another_caption_column_is_read_where_it_is_asked_for(tmp_path):
    text = "image;en;de\ndog.jpg;A dog runs.;Ein Hund rennt.\n"
    data = dataset(tmp_path, text, photos=["dog.jpg"])
    read = caption_files.read_captions(data, caption_column="DE")
    assert read.rows == [("dog.jpg", "Ein Hund rennt.")]
    assert "'de'" in read.describe(1)
    assert caption_files.read_captions(data).rows == [("dog.jpg", "A dog runs.")]
    assert "captions also in 'de'" in caption_files.read_captions(data).describe(1)
    with pytest.raises(st.ArtifactError, match=r"caption_column is 'fr'; the columns are .*de"):
        caption_files.read_captions(data, caption_column="fr")


def test_a_row_of_several_captions_with_a_comma_too_many_is_reported(tmp_path):
    text = "image,en,de\ndog.jpg,A dog, brown,Ein Hund da\ncat.jpg,A cat sits,Eine Katze\n"
    text += "sky.jpg,A blue sky,Ein Himmel da,,\n"
    read = caption_files.read_captions(dataset(tmp_path, text))
    assert read.rows == [("cat.jpg", "A cat sits"), ("sky.jpg", "A blue sky")]
    assert read.unread == [(2, "more fields than columns")]


@pytest.mark.parametrize(
    "header, other",
    [
        ("image,caption_tokens,caption", "\"['A', 'dog']\""),
        ("image,question,answer", "What is to be seen?"),
        ("Datei,Autor,Beschreibung", "Jane Q. Public {}"),
        ("image,comment_number,comment", "5"),
    ],
)
def test_a_column_beside_the_captions_is_not_taken_for_them(tmp_path, header, other):
    rows = [("dog.jpg", "A dog runs."), ("cat.jpg", "A cat sits."), ("sky.jpg", "It is blue.")]
    lines = [f"{name},{other.format(i)},{caption}" for i, (name, caption) in enumerate(rows)]
    assert rows_of(tmp_path, "\n".join([header, *lines])) == rows


@pytest.mark.parametrize("row", ["dog.jpg,4 Dogs run, wet", "dog.jpg,Dogs run, wet"])
def test_a_row_without_its_number_or_the_comma_after_it_keeps_its_caption(tmp_path, row):
    text = f"image_name,comment_number,comment\n{row}\ncat.jpg,0,A cat sits\nsky.jpg,1,A sky\n"
    assert rows_of(tmp_path, text)[0] == ("dog.jpg", "Dogs run, wet")


def test_captions_that_all_have_a_comma_are_whole_without_header_and_quotes(tmp_path):
    text = "dog.jpg,A dog, wet\ncat.jpg,A cat, asleep\nsky.jpg,A sky, at sunset\n"
    assert rows_of(tmp_path, text)[0] == ("dog.jpg", "A dog, wet")


def test_empty_fields_after_a_caption_are_no_part_of_it(tmp_path):
    text = "image,caption\ndog.jpg,A dog runs.,,,\ncat.jpg,A cat, asleep,,\n"
    assert rows_of(tmp_path, text) == [("dog.jpg", "A dog runs."), ("cat.jpg", "A cat, asleep")]


def test_quotes_as_databases_and_spreadsheets_saved_twice_write_them(tmp_path):
    text = 'image,caption\ndog.jpg,"A \\"wet\\" dog, 12\\" tall"\n"cat.jpg,""A cat, asleep"""\n'
    text += '"sky.jpg,A sky, blue"\n'
    assert rows_of(tmp_path, text) == [
        ("dog.jpg", 'A "wet" dog, 12" tall'),
        ("cat.jpg", "A cat, asleep"),
        ("sky.jpg", "A sky, blue"),
    ]


def test_two_rows_with_an_odd_number_of_quotes_are_two(tmp_path):
    text = 'image,caption\ndog.jpg,"A 12" dog, wet"\ncat.jpg,"A 9" cat, dry"\n'
    assert [name for name, _ in rows_of(tmp_path, text)] == ["dog.jpg", "cat.jpg"]


def test_a_row_that_runs_into_the_next_is_reported(tmp_path):
    data = dataset(tmp_path, "image,caption\ndog.jpg,A dog.cat.jpg,A cat.\nsky.jpg,A sky.\n")
    assert caption_files.read_captions(data).doubtful == [(2, "A dog.cat.jpg,A cat.")]


def test_a_first_line_that_begins_as_a_remark_is_none_where_it_names_a_photo(tmp_path):
    text = "#1.jpg,A dog runs.\ncat.jpg,A cat sits.\n"
    assert rows_of(tmp_path, text, photos=["#1.jpg", "cat.jpg"])[0] == ("#1.jpg", "A dog runs.")


@pytest.mark.parametrize("mark", ["\ufeff", "\u200b"])
def test_signs_without_width_around_names_and_captions_are_no_part_of_them(tmp_path, mark):
    text = f"image,caption\n{mark}dog.jpg{mark},{mark}A dog.{mark}\n{mark}cat.jpg,A cat.{mark}\n"
    assert rows_of(tmp_path, text) == [("dog.jpg", "A dog."), ("cat.jpg", "A cat.")]


@pytest.mark.parametrize("sign", [": ", " ", ":", "->", "^", " - "])
def test_names_with_spaces_may_stand_before_a_sign(tmp_path, sign):
    text = f"my dog 1.jpg{sign}A dog: it runs.\nmy cat 1.jpg{sign}A cat sits.\n"
    rows = [("my dog 1.jpg", "A dog: it runs."), ("my cat 1.jpg", "A cat sits.")]
    assert rows_of(tmp_path, text, photos=["my dog 1.jpg", "my cat 1.jpg"]) == rows


@pytest.mark.parametrize("colon, bullet", [("", ""), (":", "- "), ("", "1. ")])
def test_captions_below_the_name_of_their_photo_are_read(tmp_path, colon, bullet):
    blocks = [n + colon + "".join(f"\n{bullet}{c}" for c in GROUPS[n]) for n in SCENES]
    text = "Captions\n\n" + "\n\n".join([*blocks, "gone.jpg\nNot here."])
    read = caption_files.read_captions(dataset(tmp_path, text, photos=SCENES))
    assert read.rows == PAIRS
    assert read.unread == [(1, "no photo name")] and read.without_photo == {"gone.jpg": 1}


def test_names_are_found_by_their_number_or_as_a_web_address_where_that_is_clear(tmp_path):
    photos = ["COCO_val2014_000000000042.jpg", "0007.jpg", "007.jpg", "my dog.jpg"]
    names = ["42", "42.0", "https://photos.org/my%20dog.jpg?size=large", "7", "9"]
    text = "image,caption\n" + "".join(f"{name},A caption.\n" for name in names)
    read = caption_files.read_captions(dataset(tmp_path, text, photos=photos))
    assert [name for name, _ in read.rows] == [photos[0], photos[0], photos[3]]
    assert read.without_photo == {"7": 1, "9": 1}
    assert read.written == {"by its number": 2, "as a web address": 1}


def test_a_number_of_a_row_is_not_taken_for_a_photo_that_is_named_by_one(tmp_path):
    photos = [f"{i}.jpg" for i in range(4)]
    text = "id,image,caption\n" + "".join(f"{3 - i},{i},Number {i} is here\n" for i in range(4))
    rows = [(name, f"Number {i} is here") for i, name in enumerate(photos)]
    assert rows_of(tmp_path, text, photos=photos) == rows


def test_a_list_of_splits_beside_the_captions_holds_none(tmp_path):
    dataset(tmp_path, "image,split\ndog.jpg,train\ncat.jpg,val\n", file="splits.csv")
    dataset(tmp_path, '{"dog.jpg": "train", "cat.jpg": "val"}', file="splits.json")
    assert rows_of(tmp_path, "dog.jpg,A dog .\n") == [("dog.jpg", "A dog .")]


def test_a_caption_that_begins_with_a_number_is_whole(tmp_path):
    text = "dog.jpg,1, 2 and 3 dogs run\ncat.jpg,A cat, and another\nsky.jpg,A sky\n"
    assert rows_of(tmp_path, text)[0] == ("dog.jpg", "1, 2 and 3 dogs run")


@pytest.mark.parametrize("sign", [": ", " : ", " = ", " - ", " \u2013 ", " -> ", "\uff1a "])
def test_a_sign_between_name_and_caption_is_no_part_of_either(tmp_path, sign):
    text = "".join(f"{name}{sign}{caption}\n" for name, caption in PAIRS)
    assert rows_of(tmp_path, text, photos=SCENES) == PAIRS


def test_a_column_of_names_that_exist_comes_before_one_of_others(tmp_path):
    rows = [(f"https://photos.org/{i}.jpg", n[:-4], c) for i, (n, c) in enumerate(PAIRS)]
    lines = [f'{url},{key},"{c.replace(chr(34), 2 * chr(34))}"\n' for url, key, c in rows]
    text = "url,key,caption\n" + "".join(lines)
    assert rows_of(tmp_path, text, photos=SCENES, file="list.csv") == PAIRS


@pytest.mark.parametrize("first", ["sep=;\n", "# Captions\n\n# of 2024\n"])
def test_remarks_before_a_table_are_no_part_of_it(tmp_path, first):
    text = first + 'image;caption\ndog.jpg;"A dog; it runs."\ncat.jpg;A cat.\n'
    assert rows_of(tmp_path, text) == [("dog.jpg", "A dog; it runs."), ("cat.jpg", "A cat.")]


def test_signs_as_web_pages_write_them_are_read_as_signs(tmp_path):
    text = "image,caption\ndog.jpg,A man &amp; his dog&#39;s ball; AT&T &notes.\n"
    assert rows_of(tmp_path, text)[0][1] == "A man & his dog's ball; AT&T &notes."
    text = "image,caption\ndog.jpg,<p>A <b>wet</b> dog<br/>runs.</p>\ncat.jpg,I <3 cats > dogs.\n"
    rows = [("dog.jpg", "A wet dog runs."), ("cat.jpg", "I <3 cats > dogs.")]
    assert rows_of(tmp_path, text) == rows


def test_names_without_suffix_before_a_space_are_read(tmp_path):
    text = "".join(f"{name[:-4]} {caption}\n" for name, caption in PAIRS)
    assert rows_of(tmp_path, text, photos=SCENES, file="descriptions.txt") == PAIRS


GROUPS = {name: [c for n, c in PAIRS if n == name] for name in SCENES}
SHAPES = {
    "records": [{"image": n, "caption": c} for n, c in PAIRS],
    "pairs": PAIRS,
    "records with lists": [{"filename": n, "captions": c} for n, c in GROUPS.items()],
    "records below a key": {"version": 1, "data": [{"image": n, "text": c} for n, c in PAIRS]},
    "lists by name": GROUPS,
    "lists by stem": {name[:-4]: captions for name, captions in GROUPS.items()},
    "objects by name": {n: {"captions": c, "split": "train"} for n, c in GROUPS.items()},
    "columns": {"image": [n for n, _ in PAIRS], "caption": [c for _, c in PAIRS]},
    "annotations": {"annotations": [{"image": n, "caption": c} for n, c in PAIRS]},
    "annotations below a key": {
        "set": {"annotations": [{"image": n, "text": c} for n, c in PAIRS]}
    },
    "columns and rows": {"columns": ["image", "caption"], "data": PAIRS},
    "numbered by name": {n: dict(enumerate(c)) for n, c in GROUPS.items()},
    "lists by name below a key": {"captions": GROUPS},
    "lists by name below the names of their splits": {
        "train": dict(list(GROUPS.items())[:5]),
        "val": dict(list(GROUPS.items())[5:]),
    },
    "objects by number": {i: {"file": n, "caption": c} for i, (n, c) in enumerate(PAIRS)},
    "objects of one name": [{n: c} for n, c in PAIRS],
    "photos as objects": [{"image": {"name": n, "width": 9}, "caption": c} for n, c in PAIRS],
    "dialogues of one answer": [
        {
            "image": n,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is to be seen?"},
                {"from": "gpt", "value": c},
            ],
        }
        for n, c in PAIRS
    ],
    "records below the names of their splits": {
        "train": [{"image": n, "caption": c} for n, c in PAIRS[:20]],
        "val": [{"image": n, "caption": c} for n, c in PAIRS[20:]],
    },
    "COCO": {
        "info": {},
        "images": [{"id": 7 * i, "file_name": n, "width": 9} for i, n in enumerate(SCENES)],
        "annotations": [
            {"id": i, "image_id": 7 * SCENES.index(n), "caption": c}
            for i, (n, c) in enumerate(PAIRS)
        ],
    },
    "Karpathy": {
        "dataset": "scenes",
        "images": [
            {
                "filename": n,
                "split": "train",
                "sentences": [{"tokens": c.split(), "raw": c} for c in captions],
            }
            for n, captions in GROUPS.items()
        ],
    },
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_json_of_any_shape_is_read(tmp_path, shape, encoding):
    data = json.dumps(SHAPES[shape]).encode(encoding)
    assert rows_of(tmp_path, data, photos=SCENES, file="annotations.json") == PAIRS


def test_a_name_that_is_there_several_times_in_json_keeps_all_its_captions(tmp_path):
    text = ", ".join(f"{json.dumps(n)}: {json.dumps(c)}" for n, c in PAIRS)
    assert rows_of(tmp_path, f"{{{text}}}", photos=SCENES, file="captions.json") == PAIRS


@pytest.mark.parametrize("sign", ["\u2028", "\x85", "\t", "\n"])
def test_a_sign_that_is_a_line_break_to_some_does_not_break_json_lines(tmp_path, sign):
    line = '{"image": "dog.jpg", "caption": "A dog' + sign.replace("\n", "\\n") + 'runs."}\n'
    text = line + '{"image": "cat.jpg", "caption": "A cat."}\n'
    rows = rows_of(tmp_path, text, file="captions.jsonl")
    assert rows == [("dog.jpg", "A dog runs."), ("cat.jpg", "A cat.")]


def test_a_broken_line_of_json_is_reported_and_the_others_are_read(tmp_path):
    lines = [json.dumps({"image": n, "caption": c}) for n, c in PAIRS]
    lines[4] = lines[4][:-5]
    data = dataset(tmp_path, "\n".join(lines), photos=SCENES, file="captions.jsonl")
    read = caption_files.read_captions(data)
    assert read.rows == PAIRS[:4] + PAIRS[5:] and read.unread == [(5, "no photo name")]


def test_columns_in_json_that_are_not_as_long_as_each_other_lose_nothing_silently(tmp_path):
    columns = {"image": ["dog.jpg", "cat.jpg"], "caption": ["A dog.", "A cat.", "A bird."]}
    read = caption_files.read_captions(dataset(tmp_path, json.dumps(columns), file="captions.json"))
    assert read.rows == [("dog.jpg", "A dog."), ("cat.jpg", "A cat.")]
    assert read.unread == [(3, "no photo name")]


def test_of_a_dialogue_with_several_answers_none_is_taken_for_the_caption(tmp_path):
    answers = [{"role": "assistant", "content": f"It is {one}."} for one in ("a dog", "brown")]
    one, two = ({"image": n, "messages": answers[:k]} for n, k in (("cat.jpg", 1), ("dog.jpg", 2)))
    read = caption_files.read_captions(dataset(tmp_path, json.dumps([one, two]), file="chat.json"))
    assert read.rows == [("cat.jpg", "It is a dog.")] and read.unread == [(2, "no caption")]


def test_json_lines_are_read_with_names_below_their_own_folder(tmp_path):
    for split in ("train", "test"):
        lines = [json.dumps({"file_name": "1.jpg", "text": f"A {split} dog."})]
        photos = [f"{split}/1.jpg"]
        data = dataset(tmp_path, "\n".join(lines), photos, f"{split}/metadata.jsonl", below="")
    with pytest.raises(st.ArtifactError, match=r"several files.*train/metadata.jsonl.*captions="):
        caption_files.read_captions(data)
    read = caption_files.read_captions(data, captions="*/metadata.jsonl")
    assert read.rows == [("test/1.jpg", "A test dog."), ("train/1.jpg", "A train dog.")]


def test_text_files_beside_the_photos_hold_a_caption_a_line(tmp_path):
    dataset(tmp_path, "A cat.\n", file="Images/cat.txt")
    data = dataset(tmp_path, "A dog.\n\nThe dog runs.\n", file="Images/dog.txt")
    assert caption_files.read_captions(data).rows == [
        ("cat.jpg", "A cat."),
        ("dog.jpg", "A dog."),
        ("dog.jpg", "The dog runs."),
    ]


def test_json_lines_of_one_name_each_are_read(tmp_path):
    text = "".join(json.dumps({name: caption}) + "\n" for name, caption in PAIRS)
    assert rows_of(tmp_path, text, photos=SCENES, file="captions.jsonl") == PAIRS


def test_records_below_the_names_of_their_splits_serve_as_splits(tmp_path):
    shape = SHAPES["records below the names of their splits"]
    data = dataset(tmp_path, json.dumps(shape), photos=SCENES, file="captions.json")
    split_of = caption_files.split_photos(SCENES, 0, str(data.tables[0]))
    assert split_of == {n: "train" if i < 5 else "val" for i, n in enumerate(SCENES)}


def test_photos_as_they_are_downloaded_have_text_and_json_beside_them(tmp_path):
    """What img2dataset leaves: key.jpg, key.txt and key.json; both hold the caption."""
    for name, caption in (("cat", "A cat sleeps."), ("dog", "A dog runs.")):
        facts = {"url": "https://photos.org/1.jpg", "caption": caption, "key": name, "width": 300}
        dataset(tmp_path, json.dumps(facts, indent=4), file=f"Images/{name}.json")
        if name == "dog":
            dataset(tmp_path, caption, file="Images/dog.txt")
    data = dataset(tmp_path, '{"count": 2}', file="Images_stats.json")
    read = caption_files.read_captions(data)
    assert sorted(read.rows) == [("cat.jpg", "A cat sleeps."), ("dog.jpg", "A dog runs.")]
    assert read.without_caption == ["sky.jpg"]


def test_text_files_of_most_photos_may_lie_in_a_folder_of_their_own(tmp_path):
    """Flickr30k Entities' Sentences/, and CUB's text/ with a folder for each kind of bird."""
    marked = "[/EN#1/people Two men] in [/EN#2/bodyparts/clothing red hats] stand .\nThey stand .\n"
    dataset(tmp_path, marked, ["a/1.jpg", "b/1.jpg"], file="Sentences/a/1.txt")
    dataset(tmp_path, "A [/EN#3/notvisual sunny] day .", [], file="Sentences/b/1.txt")
    data = dataset(tmp_path, "notes", [], file="readme.txt")
    assert caption_files.read_captions(data).rows == [
        ("a/1.jpg", "Two men in red hats stand ."),
        ("a/1.jpg", "They stand ."),
        ("b/1.jpg", "A sunny day ."),
    ]


def test_a_table_named_as_one_of_many_photos_is_a_table(tmp_path):
    photos = ["train.jpg", "dog.jpg", "cat.jpg"]
    data = dataset(tmp_path, "dog.jpg A dog.\ncat.jpg A cat.\n", photos, file="train.txt")
    assert caption_files.read_captions(data).rows == [("dog.jpg", "A dog."), ("cat.jpg", "A cat.")]


def test_captions_may_lie_beside_the_photos_in_files_named_so(tmp_path):
    data = dataset(tmp_path, "A dog runs.", file="Images/dog.caption")
    assert caption_files.read_captions(data).rows == [("dog.jpg", "A dog runs.")]


@pytest.mark.parametrize("beside", ["0 0.51 0.48 0.2 0.3\n", '{"shapes": [{"label": "dog"}]}'])
def test_files_beside_the_photos_that_hold_no_sentence_are_no_captions(tmp_path, beside):
    suffix = ".json" if beside.startswith("{") else ".txt"
    data = dataset(tmp_path, beside, file=f"Images/dog{suffix}")
    with pytest.raises(st.ArtifactError, match=f"holds captions.*Tried: dog{suffix}"):
        caption_files.read_captions(data)
    data = dataset(tmp_path, "image,caption\ndog.jpg,A dog runs.\n")
    assert caption_files.read_captions(data).rows == [("dog.jpg", "A dog runs.")]


def test_parquet_is_read_or_asks_for_what_reads_it(tmp_path):
    pd = pytest.importorskip("pandas")
    data = dataset(tmp_path, "x", photos=SCENES, file="train.parquet")
    try:
        pd.DataFrame(PAIRS, columns=["image", "caption"]).to_parquet(data.tables[0])
    except ImportError:
        with pytest.raises(st.ArtifactError, match="pip install pyarrow"):
            caption_files.read_captions(data)
    else:
        assert caption_files.read_captions(data).rows == PAIRS


FOREIGN = {
    "cp1251": ["Чёрная собака бежит по снегу.", "Два мальчика играют на пляже."],
    "koi8-r": ["Чёрная собака бежит по снегу.", "Два мальчика играют на пляже."],
    "gbk": ["一个男人在街上跑。", "两只狗在草地上玩耍。"],
    "shift-jis": ["男の人が通りを走っている。", "二匹の犬が草の上で遊んでいる。"],
    "euc-kr": ["남자가 거리를 달리고 있다.", "개 두 마리가 풀밭에서 논다."],
    "latin-1": ["Un garçon à vélo près d'une forêt.", "Une fille court."],
    "cp1252": ["Größere Häuser – “schön” – stehen.", "Ein Mädchen läuft."],
    "cp1250": ["Chłopiec biegnie przez łąkę.", "Żółta łódź na jeziorze."],
    "cp1253": ["Ένα σκυλί τρέχει στο χιόνι.", "Δύο αγόρια παίζουν."],
    "cp1254": ["Bir köpek karda koşuyor.", "Kırmızı giysili kız zıplıyor."],
    "utf-16-le": ["Чёрная собака бежит.", "一个男人在街上跑"],
    "utf-16-be": ["Чёрная собака бежит.", "一个男人在街上跑"],
}


@pytest.mark.parametrize("encoding", FOREIGN)
def test_an_encoding_that_is_not_marked_is_detected(tmp_path, encoding):
    rows = [(name, FOREIGN[encoding][i % 2]) for i, name in enumerate(SCENES)]
    text = "image,caption\n" + "".join(f"{name},{caption}\n" for name, caption in rows)
    captions = caption_files.read_captions(dataset(tmp_path, text.encode(encoding), photos=SCENES))
    assert captions.rows == rows
    assert encoding.replace("latin-1", "cp1252")[:5].replace("-", "_") in captions.notes[0].replace(
        "gb18030", "gbk"
    ).replace("-", "_")


SPOKEN = json.loads((Path(__file__).parent / "captions_of_languages.json").read_text("utf-8"))
WRITTEN = {
    "Russian": ["cp1251", "koi8_r", "cp866", "mac_cyrillic", "iso8859_5"],
    "Ukrainian": ["cp1251", "koi8_u", "mac_cyrillic", "iso8859_5"],
    "Polish": ["cp1250", "iso8859_2", "cp852"],
    "Czech": ["cp1250", "iso8859_2", "cp852"],
    "Lithuanian": ["cp1257", "iso8859_13"],
    "Latvian": ["cp1257", "iso8859_13"],
    "Hungarian": ["cp1250", "iso8859_2"],
    "French": ["cp1252", "mac_roman"],
    "German": ["cp1252", "mac_roman", "iso8859_2", "cp850"],
    "Spanish": ["cp1252", "mac_roman", "cp850"],
    "Portuguese": ["cp1252", "mac_roman"],
    "Swedish": ["cp1252", "mac_roman"],
    "Turkish": ["cp1254", "iso8859_9"],
    "Greek": ["cp1253", "iso8859_7"],
    "Hebrew": ["cp1255", "iso8859_8"],
    "Arabic": ["cp1256", "iso8859_6"],
    "Chinese": ["gb18030"],
    "Chinese, traditional": ["big5"],
    "Japanese": ["shift_jis", "euc_jp"],
    "Korean": ["euc_kr"],
}


@pytest.mark.fast
@pytest.mark.parametrize(
    "language, encoding", [(name, one) for name, several in WRITTEN.items() for one in several]
)
def test_ten_captions_are_read_in_every_encoding_of_their_language(language, encoding):
    text = "image,caption\n"
    text += "".join(f"{i}.jpg,{caption}\n" for i, caption in enumerate(SPOKEN[language]))
    read, said = caption_files._decode(text.encode(encoding))
    assert read == text and said.endswith(", as it seems")


def test_signs_that_old_encodings_lack_are_read_as_their_followers_write_them():
    text = "".join(
        f"{i}.jpg,{one}\n" for i, one in enumerate(["Un bœuf, là", "Un œil", "Une élève"])
    )
    assert caption_files._decode(text.encode("iso8859_15"))[0] == text


@pytest.mark.parametrize("stray", [b"\xff", b"\x9d", b"\xe0"])
def test_a_stray_byte_in_ascii_makes_it_no_other_language(stray):
    text = "".join(f"{i}.jpg,A dog runs over nice grass.\n" for i in range(100))
    data = text.encode().replace(b"nice", b"ni" + stray + b"ce", 1)
    read, said = caption_files._decode(data)
    assert read.count("nice") == 99 and said in ("utf-8, as it seems", "cp1252, as it seems")


@pytest.mark.parametrize(
    "text", ["A child\u2019s \u201cnew\u201d bike \u2013 red", "A caf\xe9 with jalape\xf1os"]
)
def test_signs_and_names_in_english_captions_are_read_as_windows_writes_them(text):
    lines = "".join(f"{i}.jpg,{text}\n" for i in range(4))
    assert caption_files._decode(lines.encode("cp1252")) == (lines, "cp1252, as it seems")


def test_stray_bytes_in_utf8_are_reported_by_line(tmp_path):
    rows = [(name, "A café – “nice” – and naïve") for name in SCENES]
    text = "image,caption\n" + "".join(f"{name},{caption}\n" for name, caption in rows)
    data = dataset(tmp_path, text.encode().replace(b"nice", b"ni\xffce", 1), photos=SCENES)
    captions = caption_files.read_captions(data)
    assert captions.rows[1:] == rows[1:]
    assert captions.doubtful == [(2, "A café – “ni\ufffdce” – and naïve")]
    assert "doubtful signs: 1 [(2," in captions.describe(8)


@pytest.mark.parametrize("text", ["a bell\x07", "a dоg", "a cafÃ© here", "it isâ€™s"])
def test_text_that_cannot_be_meant_is_reported(tmp_path, text):
    captions = caption_files.read_captions(dataset(tmp_path, f"image,caption\ndog.jpg,{text}\n"))
    assert [line for line, _ in captions.doubtful] == [2]


def test_names_match_by_case_by_unicode_form_and_without_suffix_where_that_is_clear(tmp_path):
    photos = ["Dog.JPG", "cafe\u0301.jpg", "sky.png", "A.jpg", "a.jpg"]
    names = ["dog.jpg", "caf\xe9.jpg", "sky", "SKY.jpg", "A.jpg", "a.JPG", "DOG"]
    lines = "".join(f"{name},A caption .\n" for name in names)
    captions = caption_files.read_captions(
        dataset(tmp_path, f"image,caption\n{lines}", photos=photos)
    )
    expected = ["Dog.JPG", "cafe\u0301.jpg", "sky.png", "sky.png", "A.jpg", "Dog.JPG"]
    assert [name for name, _ in captions.rows] == expected
    assert captions.without_photo == {"a.JPG": 1}
    said = captions.describe(5)
    assert "2 captions match a photo only if letter case" in said
    assert "3 captions match a photo only if the suffix is ignored" in said


def test_what_does_not_fit_is_a_warning_above_a_hundredth_and_an_error_above_half(tmp_path):
    photos = [f"{i}.jpg" for i in range(50)]
    lines = [f"{name},A dog ." for name in photos]
    few = caption_files.read_captions(
        dataset(tmp_path / "a", "\n".join([*lines[1:], "gone.jpg,A cat ."]), photos=photos)
    )
    said = few.describe(50)
    assert "\033[1mWarning: captions without a photo: 1 ['gone.jpg'] of 50\033[0m" in said
    assert "\033[1mWarning: photos without a caption: 1 ['0.jpg'] of 50\033[0m" in said
    many = caption_files.read_captions(
        dataset(tmp_path / "b", "\n".join(lines[:20]), photos=photos)
    )
    with pytest.raises(st.ArtifactError, match=r"photos without a caption: 30 .* of 50"):
        many.describe(50)


def test_several_caption_files_are_a_choice_and_never_a_guess(tmp_path):
    dataset(tmp_path, "dog.jpg,Ein Hund rennt .\n", file="german.csv")
    dataset(tmp_path, "dog.jpg\ncat.jpg\n", file="train.txt")
    dataset(tmp_path, "This is about dogs, cats and more.\n", file="README.txt")
    data = dataset(tmp_path, "dog.jpg,A dog runs .\n", file="english.csv")
    with pytest.raises(st.ArtifactError, match=r"several files.*'english.csv', 'german.csv'"):
        caption_files.read_captions(data)
    assert caption_files.read_captions(data, captions="german.csv").rows == [
        ("dog.jpg", "Ein Hund rennt .")
    ]
    with pytest.raises(st.ArtifactError, match=r"'french.csv' is not in .*german.csv"):
        caption_files.read_captions(data, captions="french.csv")
    (tmp_path / "german").mkdir()
    assert caption_files.read_captions(data, captions="german*").source() == "german.csv"
    with pytest.raises(st.ArtifactError, match="'german' is not in"):
        caption_files.read_captions(data, captions="german")


def test_what_macos_and_windows_leave_is_no_photo_and_no_caption_file(tmp_path):
    data = dataset(tmp_path, "dog.jpg,A dog .\n", photos=["dog.jpg", "._dog.jpg", "Thumbs.db"])
    (tmp_path / "._captions.txt").write_bytes(b"\0\5\26\7")
    assert list(st.Dataset.find(str(tmp_path)).photos) == ["dog.jpg"] == list(data.photos)


def test_captions_that_change_after_02_are_noticed_by_the_next_stage(here):
    photos = [f"{i}.jpg" for i in range(3)]
    data = dataset(here / "data", "".join(f"{n},A dog .\n" for n in photos), photos=photos)
    run = begin_stage("02_vocab", dataset_dir="data")
    run.finish(caption_files=caption_files.read_captions(data).files)
    later = begin_stage("03_train_dual_t4", dataset_dir="data")
    later.read("02_vocab")
    (here / "data/captions.txt").write_text("0.jpg,A cat .\n")
    with pytest.raises(st.ArtifactError, match=r"captions.txt has changed since 02_vocab"):
        later.read("02_vocab")


TEXT = some.text("ab é,;\t|\n\"'#1.", min_size=1, max_size=20).filter(lambda t: t.split())


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    texts=some.lists(TEXT.map("Some words {}, always".format), min_size=3, max_size=8),
    separator=some.sampled_from(",;\t|"),
    newline=some.sampled_from(["\n", "\r\n"]),
    reverse=some.booleans(),
)
def test_what_a_spreadsheet_writes_is_read_back(tmp_path, texts, separator, newline, reverse):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=newline)
    pairs = [(SCENES[i], t) for i, t in enumerate(texts)]
    for row in [("image", "caption"), *pairs]:
        writer.writerow(row[::-1] if reverse else row)
    rows = rows_of(tmp_path, text.getvalue(), photos=SCENES)
    assert rows == [(name, " ".join(t.split())) for name, t in pairs]


WORD = some.one_of(
    some.text("ab é'|#\t,.-1", max_size=12),
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
    captions = caption_files.read_captions(
        dataset(tmp_path, newline.join(written).encode(encoding), photos)
    )
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
        captions = caption_files.read_captions(dataset(tmp_path, start + data))
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
        lambda: caption_files.read_captions(data),
        lambda: caption_files.split_photos(list(data.photos), 0, str(data.tables[0])),
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
            caption_files.split_photos(["dog.jpg", "cat.jpg", "sky.jpg"], 0, str(tmp_path)).values()
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
    found = st.Dataset.find(str(tmp_path / "data"))
    assert list(found.photos) == ["deep/cat.jpg", "dog.jpg", "gone.jpg", "sky.jpg"]
    assert caption_files.read_captions(found).without_caption == ["gone.jpg"]


def test_a_name_that_is_no_text_is_refused_and_emoji_are_text(tmp_path):
    assert rows_of(
        tmp_path / "emoji", "image,caption\n👩‍👩‍👧.jpg,Three .\n", photos=["👩‍👩‍👧.jpg"]
    ) == [("👩‍👩‍👧.jpg", "Three .")]
    folder = dataset(tmp_path, "image,caption\ndog.jpg,A dog .\n").folder
    try:
        Path(os.fsdecode(os.fsencode(folder / "Images") + b"/caf\xe9.jpg")).write_bytes(ONE_PIXEL)
    except OSError as error:
        pytest.skip(f"this file system has no such names ({error})")
    with pytest.raises(st.ArtifactError, match=r"caf.*Rename it"):
        st.Dataset.find(str(folder))


def test_a_folder_without_photos_or_without_captions_says_what_is_missing(tmp_path):
    with pytest.raises(st.ArtifactError, match=r"nowhere.*not a folder"):
        st.Dataset.find(str(tmp_path / "nowhere"))
    with pytest.raises(st.ArtifactError, match="no photos"):
        dataset(tmp_path, "image,caption\n", photos=[])
    (tmp_path / "captions.txt").unlink()
    with pytest.raises(st.ArtifactError, match=r"no captions.*captions.txt"):
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
    first = copied.Dataset.find()
    before = {path: path.stat().st_mtime_ns for path in first.photos.values()}
    again = copied.Dataset.find()
    assert first.is_sample and "drawn" in first.describe() and "dataset_dir" in first.describe()
    assert {path: path.stat().st_mtime_ns for path in again.photos.values()} == before
    assert len(before) == 1


def test_a_module_without_its_project_asks_for_a_dataset(here, copied):
    (here / "notebooks/sample.py").unlink()
    with pytest.raises(copied.ArtifactError, match="no dataset: set dataset_dir"):
        copied.Dataset.find()
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
    with pytest.raises(st.ArtifactError, match=r"(?s)Add.*adityajn105/flickr30k.*dataset_dir"):
        st.Dataset.find()
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
    found = st.Dataset.find()
    assert found.folder == here / "input" / mount and not found.is_sample


def test_on_kaggle_two_datasets_are_listed_and_none_is_chosen(here, monkeypatch):
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    for name in ("flickr8k", "flickr30k"):
        dataset(here / "input" / name, "image,caption\ndog.jpg,A dog .\n")
    with pytest.raises(st.ArtifactError, match=r"(?s)input/flickr.*input/flickr.*dataset_dir"):
        st.Dataset.find()


def test_the_second_copy_of_the_captions_among_the_photos_is_the_same_dataset(here, monkeypatch):
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    text = "image_name| comment_number| comment\ndog.jpg| 0| A dog .\n"
    dataset(here / "input/images", text, file="results.csv", below="flickr30k_images")
    shutil.copy(
        here / "input/images/results.csv", here / "input/images/flickr30k_images/results.csv"
    )
    found = st.Dataset.find()
    assert found.folder == here / "input/images"
    assert caption_files.read_captions(found).rows == [("dog.jpg", "A dog .")]


def test_a_dataset_is_the_same_wherever_it_lies_and_another_with_a_photo_less(tmp_path, drawn):
    copy = shutil.copytree(drawn, tmp_path / "elsewhere")
    ours, moved = st.Dataset.find(str(drawn)).identity(), st.Dataset.find(str(copy)).identity()
    assert ours["fingerprint"] == moved["fingerprint"]
    assert ours["photos"] == 24
    (copy / "Images/scene_0001.jpg").unlink()
    assert st.Dataset.find(str(copy)).identity()["fingerprint"] != ours["fingerprint"]


@given(photos=some.integers(0, 400), count=some.integers(0, 500))
def test_max_photos_chooses_that_many_different_photos_and_always_the_same(photos, count):
    names = [f"{i:03}.jpg" for i in range(photos)]
    chosen = st.Dataset("any", Path("a"), {name: Path(name) for name in names}).some(count)
    assert chosen == st.Dataset("any", Path("b"), {name: Path("b", name) for name in names}).some(
        count
    )
    assert len(set(chosen)) == len(chosen) == (min(count, photos) or photos)
    assert chosen == sorted(chosen) and set(chosen) <= set(names)


# Splits


@given(count=some.integers(10, 300), seed=some.integers(0, 5))
@settings(max_examples=40)
def test_a_split_is_by_photo_80_10_10_and_decided_by_the_seed(count, seed):
    names = [f"{i}.jpg" for i in range(count)]
    split = caption_files.split_photos(names, seed)
    sizes = Counter(split.values())
    assert list(split) == names and split == caption_files.split_photos(names, seed)
    assert abs(sizes["train"] - 0.8 * count) <= 1 and abs(sizes["val"] - sizes["test"]) <= 1
    assert min(sizes["val"], sizes["test"]) >= 1


def test_another_seed_splits_differently():
    names = [f"{i}.jpg" for i in range(50)]
    assert caption_files.split_photos(names, 1) != caption_files.split_photos(names, 2)


def test_too_few_photos_cannot_be_split():
    with pytest.raises(st.ArtifactError, match="4 captioned photos are too few"):
        caption_files.split_photos(["1.jpg", "2.jpg", "3.jpg", "4.jpg"], 0)


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
    split = caption_files.split_photos(["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"], 0, splits)
    assert split == {"1.jpg": "train", "2.jpg": "train", "3.jpg": "val", "4.jpg": "test"}


def test_lists_without_suffixes_and_with_other_slashes_are_followed(tmp_path):
    splits = lists(tmp_path, train="1\nphotos\\2.jpg\n", val="3\n")
    assert caption_files.split_photos(["1.jpg", "2.jpg", "3.jpg"], 0, splits) == {
        "1.jpg": "train",
        "2.jpg": "train",
        "3.jpg": "val",
    }


def test_lists_are_followed_only_where_it_is_clear_which_photo_they_mean(tmp_path):
    splits = lists(tmp_path, train="a/1.jpg\n2.jpg\n", val="3.jpg\n", test="b/1.jpg\n")
    names = ["x/a/1.jpg", "x/b/1.jpg", "x/c/2.jpg", "x/d/2.jpg", "x/3.jpg"]
    expected = {"x/a/1.jpg": "train", "x/b/1.jpg": "test", "x/3.jpg": "val"}
    assert caption_files.split_photos(names, 0, splits) == expected


def test_a_missing_test_list_is_allowed(tmp_path):
    splits = lists(tmp_path, train="1.jpg\n", val="2.jpg\n")
    assert caption_files.split_photos(["1.jpg", "2.jpg", "3.jpg"], 0, splits) == {
        "1.jpg": "train",
        "2.jpg": "val",
    }


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_train_or_val_list_is_an_error(tmp_path, missing):
    given_lists = {"train": "1.jpg\n", "val": "2.jpg\n", "test": "3.jpg\n"}
    del given_lists[missing]
    with pytest.raises(st.ArtifactError, match=r"train.txt and val.txt"):
        caption_files.split_photos(["1.jpg", "2.jpg", "3.jpg"], 0, lists(tmp_path, **given_lists))


@pytest.mark.parametrize("pair", [("train", "val"), ("train", "test"), ("val", "test")])
def test_lists_that_share_a_photo_are_refused_by_its_name(tmp_path, pair):
    texts = {"train": "1.jpg\n", "val": "2.jpg\n", "test": "3.jpg\n"}
    texts = {split: text + "both.jpg\n" * (split in pair) for split, text in texts.items()}
    with pytest.raises(
        st.ArtifactError,
        match=f"both.jpg into both ({pair[0]} and {pair[1]}|{pair[1]} and {pair[0]})",
    ):
        caption_files.split_photos(
            ["1.jpg", "2.jpg", "3.jpg", "both.jpg"], 0, lists(tmp_path, **texts)
        )


def test_lists_of_another_dataset_are_refused(tmp_path):
    with pytest.raises(st.ArtifactError, match=r"no val photo.*2 listed"):
        caption_files.split_photos(
            ["1.jpg"], 0, lists(tmp_path, train="1.jpg\n", val="8.jpg\n9.jpg\n")
        )


def test_photos_in_folders_are_found_in_lists_by_their_file_name(tmp_path):
    splits = lists(tmp_path, train="1.jpg\n", val="2.jpg\n")
    assert caption_files.split_photos(["a/1.jpg", "b/2.jpg"], 0, splits) == {
        "a/1.jpg": "train",
        "b/2.jpg": "val",
    }


@pytest.mark.parametrize("form", ["utf-16", "csv", "coco", "json list"])
def test_lists_in_any_form_are_followed(tmp_path, form):
    for split, names in (("train", ["1.jpg", "2.JPG"]), ("val", ["3.jpg"])):
        if form == "coco":
            data = json.dumps({"images": [{"id": 5, "file_name": n} for n in names]}).encode()
            path = tmp_path / f"captions_{split}2017.json"
        elif form == "json list":
            data, path = json.dumps(names).encode(), tmp_path / f"{split}.json"
        elif form == "csv":
            rows = [f"{i},{name},x" for i, name in enumerate(names)]
            data, path = "\n".join(["id,image,y", *rows]).encode(), tmp_path / f"{split}.csv"
        else:
            data, path = "\r\n".join(names).encode("utf-16"), tmp_path / f"{split}.txt"
        path.write_bytes(data)
    expected = {"1.jpg": "train", "2.jpg": "train", "3.jpg": "val"}
    assert (
        caption_files.split_photos(["1.jpg", "2.jpg", "3.jpg", "4.jpg"], 0, str(tmp_path))
        == expected
    )


NAMED = {"train": ["1.jpg", "2.jpg"], "val": ["3.jpg"], "test": ["4.jpg"]}
LISTED = {name: split for split, names in NAMED.items() for name in names}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(NAMED),
        json.dumps(LISTED),
        json.dumps({name: {"split": split} for name, split in LISTED.items()}),
        json.dumps({split: [n[:-4] for n in names] for split, names in NAMED.items()}),
        "".join(f"{name},{split}\n" for name, split in LISTED.items()),
        "image;subset\n" + "".join(f"{name};{split}\n" for name, split in LISTED.items()),
        "id,image,split\n" + "".join(f"{5 - int(n[0])},{n[0]},{LISTED[n]}\n" for n in LISTED),
        "split,image\n"
        + "".join(f"{LISTED[n]}ing,{n}\n" for n in LISTED).replace("valing", "valid"),
    ],
)
def test_a_single_file_of_splits_in_any_form_is_followed(tmp_path, text):
    path = tmp_path / ("splits.json" if text.startswith("{") else "splits.csv")
    path.write_text(text)
    assert caption_files.split_photos(list(LISTED), 0, str(path)) == LISTED


@pytest.mark.parametrize(
    "suffix, write",
    [
        (".json", lambda names: json.dumps({name: ["A dog."] for name in names})),
        (".json", lambda names: json.dumps({"data": [{"image": name} for name in names]})),
        (".jsonl", lambda names: "\n".join(json.dumps({"file_name": name}) for name in names)),
        (".txt", ",".join),
        (".txt", " ".join),
        (".txt", str),
        (".txt", lambda names: "\n".join(f"{name} 0" for name in names)),
        (".csv", lambda names: "id,image\n" + "\n".join(f"{5 - int(n[0])},{n[0]}" for n in names)),
    ],
)
def test_lists_are_followed_however_they_are_written(tmp_path, suffix, write):
    for split, names in NAMED.items():
        file = f"{split}ing{suffix}".replace("valing", "validation")
        (tmp_path / file).write_text(write(names))
    assert caption_files.split_photos(list(LISTED), 0, str(tmp_path)) == LISTED


@given(count=some.integers(10, 60), double=some.integers(1, 20), seed=some.integers(0, 5))
@settings(max_examples=40)
def test_copies_never_stand_in_two_splits(count, double, seed):
    names = [f"{i}.jpg" for i in range(count + double)]
    copies = {name: names[i if i < count else i % 7] for i, name in enumerate(names)}
    split = caption_files.split_photos(names, seed, copies=copies)
    assert list(split) == names
    assert all(split[name] == split[first] for name, first in copies.items())
    assert set(split.values()) == {"train", "val", "test"}


def test_copies_are_found_by_their_bytes_and_follow_the_list_that_holds_out(tmp_path):
    for name, data in {"a": b"one", "b": b"two", "c": b"one", "d": b"six", "e": b""}.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    photos = {path.name: path for path in sorted(tmp_path.iterdir())}
    photos["gone.jpg"] = tmp_path / "gone.jpg"
    copies = caption_files.find_copies(photos)
    assert copies == {**{name: name for name in photos}, "c.jpg": "a.jpg"}
    splits = lists(tmp_path / "lists", train="c.jpg\nb.jpg\n", val="d.jpg\n", test="a.jpg\n")
    split = caption_files.split_photos(list(photos), 0, splits, copies)
    assert split == {"a.jpg": "test", "b.jpg": "train", "c.jpg": "test", "d.jpg": "val"}


def test_real_lists_put_six_thousand_photos_into_train_and_one_thousand_into_val(shared):
    data = st.Dataset.find(str(shared / "flickr8k"))
    captions = caption_files.read_captions(data)
    assert len(data.photos) == 7000 and len(captions.rows) == 35000 and not captions.unread
    assert Counter(
        caption_files.split_photos(list(data.photos), 0, str(shared / "flickr8k")).values()
    ) == {
        "train": 6000,
        "val": 1000,
    }
