"""Words: `tokenize` gives the COCO evaluation's tokens without Java, `detokenize` sentences."""

import csv
import importlib.util
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import storyteller_utils as st

pytestmark = pytest.mark.fast

FLICKR8K = Path(__file__).resolve().parents[2] / "shared" / "flickr8k"
needs_java = pytest.mark.skipif(
    not shutil.which("java") or not importlib.util.find_spec("pycocoevalcap"),
    reason="COCO's tokenizer needs java and pycocoevalcap",
)
needs_photos = pytest.mark.skipif(not FLICKR8K.exists(), reason=f"no real captions at {FLICKR8K}")

# What pycocoevalcap's PTBTokenizer (Stanford CoreNLP 3.4.1) answers, so that no Java is needed.
COCO = {
    "A man's dog doesn't run.": "a man 's dog does n't run",
    "I can't, cannot; they're gonna, she'll": "i ca n't can not they 're gon na she 'll",
    "gimme a lemon, lemme, wanna, gotta": "gim me a lemon lem me wan na got ta",
    "The boys' dogs play: the players' ball!": "the boys dogs play the players ball",
    "He said \"hello\" and 'hi'?": "he said hello and hi",
    "3,000 or 4.5, .5, 1/2, 10-20, -5 at 10:30": "3,000 or 4.5 .5 1/2 10-20 -5 at 10:30",
    "a tug-of-war in a t-shirt - yes -- no": "a tug-of-war in a t-shirt yes no",
    "$5 and 50% and #7 and # 7 and/or": "$ 5 and 50 % and # 7 and # 7 and/or",
    "(a man) [a dog] {x}": "-lrb- a man -rrb- -lsb- a dog -rsb- -lcb- x -rcb-",
    "Mr. Smith of the U.S. at 5 p.m. in D.C.": "mr. smith of the u.s. at 5 p.m. in d.c.",
    "The camera is on. Another boy looks on.": "the camera is on another boy looks on",
    "O'Brien at McDonald's at five o'clock, ma'am": "o'brien at mcdonald 's at five o'clock ma'am",
    "Hello... wait! what? ends.Then": "hello wait what ends.then",
    "it’s a “nice” day — isn’t it… yes–no": "it 's a nice day is n't it yes no",
    "ice-cream café, naïve Straße": "ice-cream café naïve straße",
    "русский हिन्दी עברית": "русский हिन्दी עברית",
    "": "",
    " \t . , ' \" `` '' - -- ...": "",
}
PIECES = [
    "a",
    "b",
    "i",
    "dog",
    "man's",
    "don't",
    "cannot",
    "gonna",
    "'s",
    "n't",
    "'ll",
    "'",
    '"',
    ".",
    ",",
    "!",
    "?",
    "?!",
    ":",
    ";",
    "-",
    "--",
    "/",
    "&",
    "#",
    "$",
    "%",
    "(",
    ")",
    "[",
    "}",
    "5",
    "12",
    "3,000",
    ".5",
    "é",
    "日本",
    "हिन्दी",
    "😀",
    "o'",
    "'n'",
    "mr.",
    "u.s.",
    "foo.com",
    "-lrb-",
    "_",
    "*",
    "’",
    "“",
    "—",
    "…",
    "½",
    "İ",
    "ς",
    "ﬁ",
] + [" "] * 12


def captions() -> list[str]:
    with open(FLICKR8K / "captions.txt", encoding="utf-8", newline="") as file:
        return [row["caption"] for row in csv.DictReader(file)]


def coco(texts: list[str], monkeypatch) -> list[list[str]]:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    answer = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    return [answer[i][0].split() for i in range(len(texts))]


def as_typed(caption: str) -> str:
    """The same caption as people type it: Flickr's are already cut at punctuation and clitics."""
    caption = re.sub(r" (?=[.,!?;:)]|'s\b|n't\b|'re\b|'ll\b)", "", caption)
    return re.sub(r'([(#]) |" ([^"]*) "', lambda hit: hit[1] or f'"{hit[2]}"', caption)


@pytest.mark.parametrize("text", COCO)
def test_a_caption_is_cut_as_cocos_tokenizer_cuts_it(text):
    assert st.tokenize(text) == COCO[text].split()


@needs_java
def test_the_answers_written_down_are_those_of_cocos_tokenizer(monkeypatch):
    texts = [text for text in COCO if text.strip(" \t.,'\"`-")]
    assert coco(texts, monkeypatch) == [COCO[text].split() for text in texts]


def test_typographic_signs_are_the_same_words_as_typed_ones():
    assert st.tokenize("‘don’t’ ´it´s` a‑b “x”") == st.tokenize("'don't' 'it's' a-b \"x\"")
    assert st.tokenize("½ cup, co\xadop\u200b") == ["1/2", "cup", "coop"]


def test_emoji_survive_as_words_of_their_own():
    # COCO's tokenizer of 2014 deletes them; a caption that is only an emoji would be empty.
    assert st.tokenize("dog😀 ❤️ 👍🏽!") == ["dog", "😀", "❤", "👍🏽"]


@pytest.mark.parametrize(
    "text, written",
    [
        ("一个男人，在跑。", "一个男人在跑。"),
        ("犬が「ワン」と吠える！", "犬がワンと吠える。"),
        ("หมาวิ่งบนหญ้า", "หมาวิ่งบนหญ้า"),
        ("ໝາແລ່ນ", "ໝາແລ່ນ"),
        ("ឆ្កែរត់", "ឆ្កែរត់"),
        ("ခွေးပြေး", "ခွေးပြေး"),
    ],
    ids=["Chinese", "Japanese", "Thai", "Lao", "Khmer", "Burmese"],
)
def test_scripts_without_spaces_are_split_by_character_and_written_together(text, written):
    words = st.tokenize(text)
    assert words == list(written.rstrip("。"))
    assert st.detokenize(words) == written


def test_only_english_splits_english_contractions():
    assert st.tokenize("Una gonna rossa", "it") == ["una", "gonna", "rossa"]
    assert st.tokenize("cannot", "en") == ["can", "not"]


def test_the_same_letters_composed_or_not_are_the_same_word():
    assert st.tokenize("cafe\u0301") == st.tokenize("café") == ["café"]


def test_sentences_read_as_people_write_them():
    assert (
        st.detokenize(["a", "man", "'s", "dog", "does", "n't", "run"]) == "A man's dog doesn't run."
    )
    sentence = [
        "the",
        "boy",
        "-lrb-",
        "he",
        "can",
        "not",
        "swim",
        "-rrb-",
        "is",
        "gon",
        "na",
        "jump",
    ]
    assert st.detokenize(sentence) == "The boy (he cannot swim) is gonna jump."
    sentence = ["mr.", "smith", "drinks", "3,000", "t-shirt", "o'clock"]
    assert st.detokenize(sentence) == "Mr. smith drinks 3,000 t-shirt o'clock."
    assert st.detokenize(["they", "got", "me", "$", "5", "at", "#", "7"]) == "They got me $5 at #7."
    assert st.detokenize(["in", "washington", "d.c."]) == "In washington d.c."
    assert st.detokenize([]) == ""


@settings(max_examples=400, deadline=None)
@given(some.lists(some.sampled_from(PIECES), max_size=8).map("".join))
def test_words_hold_no_space_and_depend_on_nothing_beyond_it(text):
    words = st.tokenize(text)
    assert " ".join(words).split() == words
    assert st.tokenize(f"a {text} b") == ["a", *words, "b"]
    assert st.tokenize(text.replace(" ", "\t \n")) == words


@needs_photos
def test_real_captions_are_read_back_as_their_words():
    rng = random.Random(0)
    texts = captions()
    vocabulary = sorted({word for text in texts for word in st.tokenize(text)})
    drawn = [rng.choices(vocabulary, k=rng.randint(0, 14)) for _ in range(2000)]
    for words in drawn + [st.tokenize(text) for text in rng.sample(texts, 3000)]:
        assert st.tokenize(st.detokenize(words)) == words


@needs_java
@needs_photos
# As stored and as typed, 8 and 9 of 35,000 differ.
@pytest.mark.parametrize(
    "form, step",
    [(str, 1), (as_typed, 4), (str.upper, 4), (lambda text: st.detokenize(st.tokenize(text)), 4)],
    ids=["as stored", "as typed", "in capitals", "as we write it"],
)
def test_real_captions_have_the_tokens_of_cocos_tokenizer(form, step, monkeypatch):
    texts = [form(text) for text in captions()[::step]]
    same = [
        ours == theirs
        for ours, theirs in zip(map(st.tokenize, texts), coco(texts, monkeypatch), strict=True)
    ]
    assert np.mean(same) > 0.9997


@needs_java
@needs_photos
def test_the_remaining_difference_does_not_move_bleu_and_cider(monkeypatch):
    texts = [as_typed(text) for text in captions()[:5_000]]
    scores = []
    for tokens in (coco(texts, monkeypatch), [*map(st.tokenize, texts)]):
        groups = [tokens[i : i + 5] for i in range(0, len(tokens), 5)]
        people, others = [group[0] for group in groups], [group[1:] for group in groups]
        row = st.score_captions(people, others)
        scores.append([row[name]["value"] for name in (*st.METRICS[:4], "CIDEr-D")])
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)


def test_words_are_written_as_people_write_them_inside_a_sentence(tmp_path):
    texts = [
        "Ein Hund rennt über die Wiese.",
        "ein Hund und ein mädchen",
        "Das Mädchen mit dem Hund.",
        "Zwei Kinder und ein Mädchen",
    ]
    vocab = st.Vocab.build([st.tokenize(text, "de") for text in texts], 1, texts)
    vocab.save(tmp_path / "vocab.json")
    sentence = st.Vocab.load(tmp_path / "vocab.json").sentence(
        ["das", "mädchen", "und", "ein", "hund"]
    )
    assert sentence == vocab.sentence(["das", "mädchen", "und", "ein", "hund"])
    assert sentence == "Das Mädchen und ein Hund."


@given(
    some.lists(some.lists(some.sampled_from(["a", "dog", "runs", "é"]), max_size=6), max_size=8),
    some.integers(1, 4),
)
def test_a_vocabulary_has_the_words_that_occur_often_enough_the_most_frequent_first(
    captions, least
):
    counts = Counter(word for caption in captions for word in caption)
    if least > max(counts.values(), default=0):
        with pytest.raises(st.ArtifactError, match=f"occurs {least} times.*Lower min_count"):
            st.Vocab.build(captions, least)
        return
    words = st.Vocab.build(captions, least).words[4:]
    assert set(words) == {word for word in counts if counts[word] >= least}
    assert [counts[word] for word in words] == sorted(map(counts.get, words), reverse=True)
