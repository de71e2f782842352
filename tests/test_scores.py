"""Scores: every number is checked against an independent or a brute-force implementation."""

import itertools
import math
import random
import socket
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import storyteller_utils as st

pytestmark = pytest.mark.fast

SUBJECTS = [
    "a man",
    "a woman",
    "two dogs",
    "a brown dog",
    "the little girl",
    "a child 's toy",
    "three people",
]
ACTIONS = [
    "runs",
    "is running",
    "sits",
    "is sitting quietly",
    "jumps and jumps",
    "does n't move",
    "plays with a ball",
]
PLACES = [
    "on the beach",
    "in the snow",
    "in the tall green grass",
    "near a red car",
    "on a bench",
    "by the sea at night",
]
SETS = some.lists(
    some.lists(
        some.lists(
            some.sampled_from(["a", "dog", "runs", "fast", "on", "red", "snow"]), max_size=7
        ),
        min_size=2,
        max_size=5,
    ),
    min_size=1,
    max_size=6,
)


def caption(rng: random.Random) -> list[str]:
    return " ".join(map(rng.choice, (SUBJECTS, ACTIONS, PLACES))).split()


def photos(count: int, seed: int = 0, ragged: bool = False) -> tuple[list, list]:
    """One hypothesis a photo and its references: five, or one to six."""
    rng = random.Random(seed)
    references = [
        [caption(rng) for _ in range(rng.randint(1, 6) if ragged else 5)] for _ in range(count)
    ]
    return [caption(rng) for _ in range(count)], references


def joined(hypotheses: list, references: list) -> tuple[dict, dict]:
    return (
        {i: [" ".join(words) for words in group] for i, group in enumerate(references)},
        {i: [" ".join(words)] for i, words in enumerate(hypotheses)},
    )


def values(scores: dict, names=st.METRICS) -> list[float]:
    return [scores[name]["value"] for name in names]


def bleus(hypotheses: list, references: list) -> list[float]:
    return values(st.score_captions(hypotheses, references), st.METRICS[:4])


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("nltk.download", lambda *_, **__: False)


class ToyWordNet:
    """Groups of synonyms, asked in the way of NLTK's corpus reader."""

    groups = (
        ("dog", "hound", "hot_dog"),
        ("run", "running", "runs", "dash"),
        ("man", "person"),
        ("red", "crimson"),
    )

    def __init__(self):
        self.asked = Counter()

    def synsets(self, word):
        self.asked[word] += 1
        return [
            SimpleNamespace(
                lemmas=lambda g=group: [SimpleNamespace(name=lambda n=name: n) for name in g]
            )
            for group in self.groups
            if word in group
        ]


# BLEU


@pytest.mark.parametrize("ragged", [False, True])
def test_bleu_is_that_of_nltk_and_sacrebleu_and_coco(ragged, capsys):
    nltk = pytest.importorskip("nltk.translate.bleu_score")
    sacrebleu = pytest.importorskip("sacrebleu")
    from pycocoevalcap.bleu.bleu import Bleu

    hypotheses, references = photos(100, ragged=ragged)
    ours = bleus(hypotheses, references)
    weights = [[1 / n] * n for n in range(1, 5)]
    assert ours == pytest.approx(nltk.corpus_bleu(references, hypotheses, weights), abs=1e-12)
    assert ours == pytest.approx(
        Bleu(4).compute_score(*joined(hypotheses, references))[0], abs=1e-9
    )
    texts, captions = joined(hypotheses, references)
    columns = [list(column) for column in itertools.zip_longest(*texts.values())]
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="none")
    theirs = metric.corpus_score([text for [text] in captions.values()], columns).score
    assert 100 * ours[3] == pytest.approx(theirs, abs=1e-9)


def test_bleu_counts_short_and_repeating_captions_as_coco_does(capsys):
    from pycocoevalcap.bleu.bleu import Bleu

    hypotheses, references = photos(60, ragged=True)
    hypotheses[:4] = [["a"], ["dogs", "a"], ["the"] * 9, hypotheses[4] * 3]
    theirs = Bleu(4).compute_score(*joined(hypotheses, references))[0]
    assert bleus(hypotheses, references) == pytest.approx(theirs, abs=1e-9)


def test_of_two_equally_close_references_the_shorter_counts():
    assert bleus([["a"] * 5], [[["a"] * 7, ["a"] * 3]])[0] == 1
    assert bleus([["a"] * 5], [[["a"] * 7]])[0] == pytest.approx(math.exp(1 - 7 / 5))


@pytest.mark.filterwarnings("error")
def test_bleu_of_nothing_is_zero():
    assert bleus([[], []], [[["a"]], [["b", "c"], []]]) == [0, 0, 0, 0]
    assert bleus([["x", "a"]], [[["a", "b"]]]) == [0.5, 0, 0, 0]


# CIDEr-D


@pytest.mark.parametrize("ragged", [False, True])
def test_cider_d_is_that_of_pycocoevalcap(ragged):
    from pycocoevalcap.cider.cider import Cider

    hypotheses, references = photos(300, ragged=ragged)
    hypotheses[:5] = [
        [],
        ["a"],
        ["gnu", "gnu", "yak"],
        ["the"] * 12,
        ["a", "man", "yak", "two", "dogs", "yak", "gnu", "yak", "two", "cow"],
    ]
    references[5][0] = ["the"] * 4
    mean, each = Cider().compute_score(*joined(hypotheses, references))
    ours = st.CiderD(references).score(hypotheses)
    assert ours == pytest.approx(each, abs=1e-9) and ours.mean() == pytest.approx(mean, abs=1e-9)


def test_cider_d_takes_document_frequencies_from_other_photos():
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    hypotheses, references = photos(80)
    # As many, because pycocoevalcap takes its N from the scored photos.
    _, training = photos(80, seed=5, ragged=True)
    scorer, documents = CiderScorer(), CiderScorer()
    for words, group in zip(hypotheses, references, strict=True):
        scorer += (" ".join(words), [" ".join(other) for other in group])
    for group in training:
        documents += (None, [" ".join(other) for other in group])
    documents.compute_doc_freq()
    scorer.document_frequency = documents.document_frequency
    ours = st.CiderD(references, training).score(hypotheses)
    assert ours == pytest.approx(scorer.compute_cider(), abs=1e-9)
    assert np.abs(ours - st.CiderD(references).score(hypotheses)).max() > 0.1


def test_cider_d_scores_several_samples_of_any_photos_in_any_order():
    hypotheses, references = photos(50, ragged=True)
    scorer, rng = st.CiderD(references), random.Random(1)
    asked = [(rng.randrange(50), caption(rng) + ["gnu"] * rng.randrange(2)) for _ in range(300)]
    together = scorer.score([words for _, words in asked], [photo for photo, _ in asked])
    assert together == pytest.approx(
        [scorer.score([words], [photo])[0] for photo, words in asked], abs=1e-12
    )
    assert scorer.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="3 captions for 50 photos"):
        scorer.score(hypotheses[:3])


# METEOR and WordNet


def mean_meteor(hypotheses: list, references: list, **lookups) -> float:
    from nltk.translate.meteor_score import meteor_score

    pairs = zip(hypotheses, references, strict=True)
    return np.mean([meteor_score(group, words, **lookups) for words, group in pairs])


def test_meteor_is_nltks_own_and_asks_for_synonyms_once(monkeypatch):
    hypotheses, references = photos(120, ragged=True)
    hypotheses[:3] = [
        [],
        ["the", "hound", "can", "dash", "near", "a", "crimson", "car"],
        ["man", "red", "red", "dog", "running", "runs"],
    ]
    references[2].append(["person", "person", "hound", "crimson", "crimson", "dashes"])
    toy = ToyWordNet()
    monkeypatch.setattr(st, "find_wordnet", lambda language="en": toy)
    scores = st.score_captions(hypotheses, references)
    assert toy.asked and max(toy.asked.values()) == 1, "every synonym is looked up once"
    assert scores["METEOR label"] == "METEOR (NLTK)"
    theirs = mean_meteor(hypotheses, references, wordnet=ToyWordNet())
    assert scores["METEOR"]["value"] == pytest.approx(theirs, abs=1e-12)


def test_meteor_with_the_real_wordnet_is_nltks_own():
    if not st.find_wordnet():
        pytest.skip("NLTK finds no WordNet")
    hypotheses, references = photos(40)
    ours = st.score_captions(hypotheses, references)["METEOR"]["value"]
    assert ours == pytest.approx(mean_meteor(hypotheses, references), abs=1e-12)
    frank = st.score_captions([["dog"]], [[["domestic", "frank"]]])
    assert frank["METEOR"]["value"] > 0  # a frank is a hot dog


def test_meteor_without_wordnet_matches_words_and_stems_and_says_so(monkeypatch):
    monkeypatch.setattr(st, "find_wordnet", lambda language="en": None)
    scores = st.score_captions([["dogs", "run"]], [[["dog", "running"]]])
    assert scores["METEOR"]["value"] > 0.9
    assert st.score_captions([["hound"]], [[["dog"]]])["METEOR"]["value"] == 0
    assert scores["METEOR label"] == "METEOR (NLTK, no WordNet: exact and stem matches only)"


def test_captions_in_another_language_are_scored_without_english_synonyms(monkeypatch):
    monkeypatch.setattr("nltk.download", lambda *_, **__: pytest.fail("nothing to download"))
    scores = st.score_captions([["dog"]], [[["frank"]]], language="de")
    assert scores["METEOR"]["value"] == 0 and "no WordNet" in scores["METEOR label"]
    people = st.score_rows({"a": [["hund"]]}, [[["hund"], ["hunde"]]], language="de")
    assert {row["METEOR label"] for row in people.values()} == {scores["METEOR label"]}


@pytest.fixture
def no_wordnet(monkeypatch, tmp_path):
    """An NLTK that has not met WordNet in this process, and finds none on the disk."""
    import nltk
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    fresh = LazyCorpusLoader("wordnet", nltk.corpus.WordNetCorpusReader, None)
    monkeypatch.setattr(nltk.corpus, "wordnet", fresh)
    st.find_wordnet.cache_clear()
    yield
    st.find_wordnet.cache_clear()


@pytest.mark.parametrize("patience", [None, 77.0])
@pytest.mark.parametrize("trouble", [None, OSError("no route")])
def test_without_a_network_wordnet_is_asked_for_once_briefly_and_silently(
    patience, trouble, no_wordnet, monkeypatch, capfd
):
    timeouts = []

    def download(*arguments, print_error_to, **options):
        timeouts.append(socket.getdefaulttimeout())
        print("[nltk_data] Error loading wordnet", file=print_error_to)
        if trouble:
            raise trouble
        return False

    monkeypatch.setattr("nltk.download", download)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(patience)
    try:
        assert st.find_wordnet() is None
        assert st.find_wordnet() is None
        assert timeouts == [3] and socket.getdefaulttimeout() == patience
    finally:
        socket.setdefaulttimeout(before)
    assert capfd.readouterr() == ("", "")


# ROUGE and tokens


def lcs(first: list, second: list) -> int:
    return max(
        (
            n
            for n in range(len(second) + 1)
            for part in itertools.combinations(second, n)
            if all(word in rest for rest in [iter(first)] for word in part)
        ),
        default=0,
    )


def one(words: list, group: list) -> dict:
    return st.score_captions([words], [group])


def test_rouge_l_is_f1_with_the_best_reference_where_coco_mixes_references():
    from pycocoevalcap.rouge.rouge import Rouge

    for words, group in zip(*photos(12, ragged=True), strict=True):
        pairs = [
            (lcs(other, words) / len(words), lcs(other, words) / len(other)) for other in group
        ]
        best = max(2 * p * r / (p + r) if p + r else 0 for p, r in pairs)
        assert one(words, group)["ROUGE-L"]["value"] == pytest.approx(best, abs=1e-12)
        # COCO takes the best precision and the best recall, of different references maybe, and
        # weighs recall more.
        p, r = max(p for p, _ in pairs), max(r for _, r in pairs)
        theirs = Rouge().calc_score([" ".join(words)], [" ".join(other) for other in group])
        mixed = (1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p else 0
        assert theirs == pytest.approx(mixed, abs=1e-12)


def overlaps(words: list, group: list, n: int) -> list[tuple]:
    """F1, precision and recall of n-grams with each reference, counted one by one."""
    found = []
    for other in group:
        given = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        wanted = [tuple(other[i : i + n]) for i in range(len(other) - n + 1)]
        shared = sum(min(given.count(gram), wanted.count(gram)) for gram in set(given))
        f1 = 2 * shared / (len(given) + len(wanted))
        found.append((f1, shared / len(given), shared / len(wanted)))
    return found


def test_rouge_and_token_scores_are_those_of_a_brute_force_count():
    hypotheses, references = photos(30, ragged=True)
    hypotheses[0] = ["the", "the", "the"]
    for words, group in zip(hypotheses, references, strict=True):
        scores = one(words, group)
        singles, doubles = overlaps(words, group, 1), overlaps(words, group, 2)
        assert scores["ROUGE-1"]["value"] == pytest.approx(max(singles)[0], abs=1e-12)
        assert scores["ROUGE-2"]["value"] == pytest.approx(max(doubles)[0], abs=1e-12)
        # Several references may share the best F1.
        ours = values(scores, ["F1", "precision", "recall"])
        best = [each for each in singles if each[0] > max(singles)[0] - 1e-9]
        assert any(ours == pytest.approx(each) for each in best)


# The table


@settings(max_examples=30, deadline=None)
@given(SETS, some.randoms())
def test_scores_are_within_their_range_and_the_order_does_not_matter(groups, rng):
    groups = [[words or ["a"] for words in group[:1]] + group[1:] for group in groups]
    hypotheses, references = [group[-1] for group in groups], [group[:-1] for group in groups]
    scores = st.score_captions(hypotheses, references)
    for name, value in zip(st.METRICS, values(scores), strict=True):
        assert 0 <= value <= (10 if name == "CIDEr-D" else 1) + 1e-9 and math.isfinite(
            scores[name]["high"]
        )
    shuffled = [
        (words, rng.sample(group, len(group)))
        for words, group in zip(hypotheses, references, strict=True)
    ]
    rng.shuffle(shuffled)
    again = st.score_captions(*map(list, zip(*shuffled, strict=True)))
    for name in {*st.METRICS} - {
        "precision",
        "recall",
    }:  # references of equal F1 may differ in these two
        assert again[name]["value"] == pytest.approx(scores[name]["value"], abs=1e-9)


def test_captions_equal_to_a_reference_score_one():
    _, references = photos(30)
    scores = st.score_captions([group[2] for group in references], references)
    assert all(
        scores[name]["value"] == pytest.approx(1)
        for name in st.METRICS
        if name not in ("CIDEr-D", "METEOR")
    )
    assert scores["METEOR"]["value"] > 0.95 and scores["CIDEr-D"]["value"] > 1


def test_means_over_photos_and_facts_about_the_wording():
    hypotheses, references = photos(40, ragged=True)
    scores = st.score_captions(hypotheses, references)
    each = [one(words, group) for words, group in zip(hypotheses, references, strict=True)]
    for name in ("METEOR", "ROUGE-1", "ROUGE-2", "ROUGE-L", "precision", "recall", "F1"):
        mean = np.mean([photo[name]["value"] for photo in each])
        assert scores[name]["value"] == pytest.approx(mean, abs=1e-12)
    ciders = st.CiderD(references).score(hypotheses)
    assert scores["CIDEr-D"]["value"] == pytest.approx(ciders.mean(), abs=1e-12)
    assert scores["mean length"] == pytest.approx(np.mean([len(words) for words in hypotheses]))
    assert scores["distinct words"] == len({word for words in hypotheses for word in words})
    distinct = len({" ".join(words) for words in hypotheses})
    assert scores["distinct captions"] == pytest.approx(distinct / 40)


def test_intervals_are_those_of_resampled_photos():
    hypotheses, references = photos(150)
    scores, rng = st.score_captions(hypotheses, references, seed=3), np.random.default_rng(0)
    assert scores == st.score_captions(hypotheses, references, seed=3)
    assert scores["F1"]["low"] != st.score_captions(hypotheses, references, seed=4)["F1"]["low"]
    each = st.CiderD(references).score(hypotheses)
    half = 1.96 * each.std() / math.sqrt(150)  # the normal distribution's answer for a mean
    assert scores["CIDEr-D"]["low"] == pytest.approx(each.mean() - half, abs=0.15 * half)
    assert scores["CIDEr-D"]["high"] == pytest.approx(each.mean() + half, abs=0.15 * half)
    # And BLEU-4, computed anew for every draw from NLTK's counts.
    from nltk.translate.bleu_score import closest_ref_length, modified_precision

    rows = []
    for words, group in zip(hypotheses, references, strict=True):
        precisions = [modified_precision(group, words, n) for n in range(1, 5)]
        lengths = len(words), closest_ref_length(group, len(words))
        rows.append([p.numerator for p in precisions] + [p.denominator for p in precisions])
        rows[-1] += lengths
    resampled = []
    for _ in range(1000):
        sums = np.array(rows)[rng.integers(150, size=150)].sum(0)
        brevity = min(1, math.exp(1 - sums[9] / sums[8]))
        resampled.append(brevity * np.prod(sums[:4] / sums[4:8]) ** 0.25)
    low, high = np.percentile(resampled, (2.5, 97.5))
    ours = [scores["BLEU-4"]["low"], scores["BLEU-4"]["high"]]
    assert ours == pytest.approx([low, high], abs=0.15 * (high - low))


def test_rows_are_paired_with_the_best_one_over_the_same_resamples():
    hypotheses, references = photos(150)
    worse = [words if i % 3 else ["a"] for i, words in enumerate(hypotheses)]
    rows = st.score_rows({"a": worse, "b": hypotheses, "c": hypotheses}, references, best="b")
    assert rows["b"] == st.score_captions(hypotheses, references)  # without any difference
    low, high = rows["a"]["CIDEr-D"]["difference"]
    cider = st.CiderD(references)
    each = cider.score(worse) - cider.score(hypotheses)
    half = 1.96 * each.std() / math.sqrt(150)
    assert [low, high] == pytest.approx([each.mean() - half, each.mean() + half], abs=0.15 * half)
    # Two rows of their own would be further apart than the same photos are.
    assert high - low < rows["b"]["CIDEr-D"]["high"] - rows["b"]["CIDEr-D"]["low"]
    assert rows["c"]["BLEU-4"]["difference"] == [0, 0]


def test_a_row_of_other_photos_has_no_difference():
    dog, cat = ["a", "dog"], ["a", "cat"]
    rows = st.score_rows({"b": [dog, cat]}, [[dog, cat], [cat]], best="b")
    assert list(rows) == ["b", "people (one reference)"]
    assert "difference" not in rows["people (one reference)"]["F1"]


def test_scoring_without_photos_or_references_says_what_is_missing():
    for hypotheses, references in ([], []), ([["a"]], []), ([["a"], ["b"]], [[["a"]], []]):
        with pytest.raises(ValueError, match="score one caption for each photo"):
            st.score_captions(hypotheses, references)
        with pytest.raises(ValueError, match="score one caption for each photo"):
            st.score_rows({"": hypotheses}, references)


# Reference rows


def people_row(references: list) -> tuple[str, dict]:
    (row,) = st.score_rows({}, references).items()
    return row


def test_people_are_scored_one_against_the_others():
    _, references = photos(60)
    (name, row), bleu, ciders = people_row(references), [], []
    for turn in range(5):
        people = [group[turn] for group in references]
        others = [group[:turn] + group[turn + 1 :] for group in references]
        bleu.append(bleus(people, others)[3])
        ciders.append(st.CiderD(others).score(people).mean())
    assert name == "people (four references)"
    assert row["BLEU-4"]["value"] == pytest.approx(np.mean(bleu), abs=1e-12)
    assert row["CIDEr-D"]["value"] == pytest.approx(np.mean(ciders), abs=1e-9)
    assert row["BLEU-4"]["low"] < np.mean(bleu) < row["BLEU-4"]["high"]


def test_people_with_uneven_numbers_of_captions_are_scored_too():
    dog, cat = ["a", "dog"], ["a", "cat"]
    assert people_row([[dog, cat]])[0] == "people (one reference)"
    name, row = people_row([[dog, dog], [cat, cat, cat], [dog]])
    assert name == "people (1-2 references)" and row["BLEU-2"]["value"] == 1
    assert people_row([[dog, cat, cat, dog]])[0] == "people (3 references)"
    assert st.score_rows({}, [[dog], [cat]]) == {}


def test_the_time_grows_with_the_captions_and_not_with_their_square(monkeypatch):
    asked = Counter()
    cider = st.CiderD.__init__

    def count(self, references, document_set=None):
        asked["references"] += sum(map(len, references))
        cider(self, references, document_set)

    monkeypatch.setattr(st.CiderD, "__init__", count)
    _, references = photos(4)
    rng = random.Random(1)
    for size in (100, 200):
        asked.clear()
        references[0] = [caption(rng) for _ in range(size)]
        people_row(references)
        assert asked["references"] < st.TURNS * (size + 20)


def test_the_constant_caption_is_the_best_one_for_every_photo():
    from nltk.translate.bleu_score import corpus_bleu

    _, references = photos(24, seed=2, ragged=True)
    candidates = {tuple(words) for group in references for words in group}
    scores = {words: corpus_bleu(references, [words] * 24) for words in candidates}
    chosen = st.constant_caption(references)
    assert scores[tuple(chosen)] == max(scores.values()) > np.median([*scores.values()])
    assert chosen == st.constant_caption(references)


# Figures


def test_a_sheet_draws_a_grey_tile_with_the_reason_for_a_photo_that_cannot_be_read(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photo")
    photo = np.zeros((8, 8, 3), np.uint8)
    sheet = st.caption_sheet([photo, broken, tmp_path / "gone.jpg"], ["black", "bad", "gone"], 2)
    tiles = [axis.images[0].get_array() for axis in sheet.axes if axis.images]
    assert [int(np.ptp(tile)) for tile in tiles] == [0, 0, 0]
    assert [int(tile[0, 0, 0]) for tile in tiles] == [0, 200, 200]
    reasons = [" ".join(text.get_text() for text in axis.texts) for axis in sheet.axes]
    assert reasons[0] == "" and "cannot be read" in " ".join(reasons[1].split())


def test_a_sheet_shows_captions_with_dollar_signs_as_they_are():
    # As a formula, this is an error.
    sheet = st.caption_sheet([np.zeros((8, 8, 3), np.uint8)], ["A $5 shirt and #2 for $6."], 1)
    assert sheet._repr_jpeg_()


def test_the_same_sheet_has_the_same_bytes(tmp_path):
    for name in ("one.png", "other.png"):
        sheet = st.caption_sheet([np.zeros((8, 8, 3), np.uint8)] * 3, ["a", "b", "c"], columns=2)
        st.save_figure(sheet, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
