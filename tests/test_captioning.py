"""Search, against exhaustive search and a plain loop; its constraints; the captioner on disk."""

import itertools
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import storyteller_utils as st

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.fast


class Chain:
    """A captioner whose next word depends on the photo, the place and the last two words."""

    def __init__(self, vocabulary: int, photos: int, end: float = 0.0, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(photos, 40, vocabulary, vocabulary, generator=generator)
        self.earlier = torch.randn(vocabulary, vocabulary, generator=generator)
        self.table[..., st.END] += end

    def start(self, features):
        photo = features[:, 0, 0].long()
        nothing = torch.zeros_like(photo)
        return st.State({"photo": photo}, {"place": nothing, "earlier": nothing})

    def step(self, words, state):
        photo = state.photo["photo"]
        photo = photo.repeat_interleave(len(words) // len(photo))
        place, earlier = state.caption["place"], state.caption["earlier"]
        logits = self.table[photo, place, words] + self.earlier[earlier]
        return logits, st.State(state.photo, {"place": place + 1, "earlier": words})


def photos(count):
    return torch.arange(count, dtype=torch.float32)[:, None, None]


def search(chain, count, vocab=None, **options):
    """Search `count` photos with no limit but those in `options`."""
    decoding = st.Decoding(**{"min_length": 0, "no_repeat": 0} | options)
    return st.beam_search(chain, photos(count), decoding, vocab)


def log_probs(chain, photo, ids):
    """Log-probabilities of the words after `ids`; <pad>, <start> and <unk> are never generated."""
    earlier, last = ([0, st.START, *ids])[-2:]
    row = (chain.table[photo, len(ids), last] + chain.earlier[earlier]).log_softmax(-1)
    row[[st.PAD, st.START, st.UNK]] = -math.inf
    return row


def likelihood(chain, photo, ids):
    return sum(float(log_probs(chain, photo, ids[:i])[word]) for i, word in enumerate(ids))


def all_captions(chain, max_length):
    for length in range(max_length):
        for middle in itertools.product(range(4, chain.table.shape[-1]), repeat=length):
            yield [*middle, st.END]


def exhaustive(chain, photo, max_length, preference, allowed=lambda ids: True):
    """Score every caption that there is and return the best (ids, score)."""
    scored = (
        (ids, likelihood(chain, photo, ids) / len(ids) ** preference)
        for ids in all_captions(chain, max_length)
        if allowed(ids)
    )
    return max(scored, key=lambda pair: pair[1])


def plain_beam(chain, photo, width, preference, max_length):
    """Beam search as its docstring says it, for one photo, in plain Python."""
    beams, pool = [([], 0.0)], []
    for length in range(1, max_length + 1):
        continued = []
        for ids, total in beams:
            row = log_probs(chain, photo, ids)
            continued += [
                ([*ids, word], total + float(row[word]))
                for word in range(len(row))
                if row[word] > -math.inf
            ]
        continued.sort(key=lambda pair: -pair[1])
        going = [pair for pair in continued if pair[0][-1] != st.END][:width]
        ended = [pair for pair in continued if pair[0][-1] == st.END]
        both = sorted(going + ended, key=lambda pair: -pair[1])[:width]
        pool += [(ids, total / length**preference) for ids, total in both if ids[-1] == st.END]
        pool = sorted(pool, key=lambda pair: -pair[1])[:width]
        beams = going
        if len(pool) == width and pool[-1][1] >= beams[0][1] / length**preference:
            return pool
    return pool or [(ids, total / max_length**preference) for ids, total in beams]


def repeats(ids, n):
    """Return whether some n words in a row occur twice."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) < len(grams)


def number_vocab(size, width=1):
    """A vocabulary of words w4, w5, ... whose numbers are their ids."""
    return st.Vocab([*st.SPECIAL, *(f"w{i:0{width}}" for i in range(4, size))])


# Search ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_caption_has_the_same_words_twice_when_that_is_not_allowed(n):
    chain = Chain(vocabulary=7, photos=8, end=-3.0)
    free = search(chain, 8, beam_width=3, max_length=12)
    assert any(repeats(h.ids, n) for hypotheses in free for h in hypotheses)
    for hypotheses in search(chain, 8, beam_width=3, max_length=12, no_repeat=n):
        assert hypotheses and not any(repeats(h.ids, n) for h in hypotheses)
        for h in hypotheses:
            assert not any(h.ids[i] in h.ids[max(0, i - 2) : i] for i in range(len(h.ids)))


def test_no_caption_ends_before_its_shortest_allowed_length():
    chain = Chain(vocabulary=9, photos=8, end=3.0)
    free = search(chain, 8, beam_width=3)
    assert min(len(h.ids) for hypotheses in free for h in hypotheses) < 5
    long = [
        h.ids for hypotheses in search(chain, 8, beam_width=3, min_length=5) for h in hypotheses
    ]
    assert min(map(len, long)) == 6  # five words and <end>
    assert all(ids[-1] == st.END for ids in long)


@pytest.mark.parametrize("preference", [0.0, 0.7, 1.0])
def test_a_wide_beam_returns_the_best_of_all_captions(preference):
    chain = Chain(vocabulary=7, photos=6)
    found = search(chain, 6, beam_width=200, length_preference=preference, max_length=4)
    for photo, hypotheses in enumerate(found):
        ids, score = exhaustive(chain, photo, 4, preference)
        assert hypotheses[0].ids == ids and hypotheses[0].score == pytest.approx(score, abs=1e-5)
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_batched_beam_search_equals_a_plain_loop_over_photos_and_beams(width):
    chain = Chain(vocabulary=12, photos=20, end=1.5, seed=width)
    found = search(chain, 20, beam_width=width, length_preference=0.7, max_length=12)
    for photo, hypotheses in enumerate(found):
        plain = plain_beam(chain, photo, width, 0.7, 12)
        assert [h.ids for h in hypotheses] == [ids for ids, _ in plain]
        assert [h.score for h in hypotheses] == pytest.approx([s for _, s in plain], abs=1e-5)


@pytest.mark.parametrize("options", [{"beam_width": 1}, {"method": "greedy"}])
def test_width_one_takes_the_likeliest_word_each_time(options):
    chain = Chain(vocabulary=12, photos=8, end=1.0)
    for photo, (hypothesis,) in enumerate(search(chain, 8, max_length=15, **options)):
        word, ids = st.START, []
        while word != st.END and len(ids) < 15:
            word = int(log_probs(chain, photo, ids).argmax())
            ids.append(word)
        assert hypothesis.ids == ids


def test_photos_in_a_batch_do_not_influence_each_other():
    chain = Chain(vocabulary=12, photos=16, end=1.0)
    decoding = st.Decoding(max_length=12)
    together = st.beam_search(chain, photos(16), decoding)
    alone = [st.beam_search(chain, photos(16)[i : i + 1], decoding)[0] for i in range(16)]
    assert [[h.ids for h in hs] for hs in together] == [[h.ids for h in hs] for hs in alone]


def test_a_model_that_never_ends_still_gives_captions():
    chain = Chain(vocabulary=9, photos=3, end=-1e9)
    for photo, hypotheses in enumerate(search(chain, 3, max_length=6)):
        plain = plain_beam(chain, photo, 5, st.Decoding().length_preference, 6)
        assert [h.ids for h in hypotheses] == [ids for ids, _ in plain]
        assert len(hypotheses[0].ids) == 6
        assert [h.score for h in hypotheses] == pytest.approx([s for _, s in plain], abs=1e-5)


@pytest.mark.parametrize("width", [1, 5])
def test_special_words_are_never_generated_however_likely(width):
    chain = Chain(vocabulary=9, photos=4)
    chain.table[..., [st.PAD, st.START, st.UNK]] += 50
    sampled = st.sample_captions(chain, photos(4), st.Decoding(method="sample", max_length=8))
    for hypotheses in [*search(chain, 4, beam_width=width, max_length=8), *sampled]:
        for hypothesis in hypotheses:
            assert not {st.PAD, st.START, st.UNK} & set(hypothesis.ids)


def test_more_length_preference_gives_longer_captions():
    chain = Chain(vocabulary=12, photos=30, end=2.0)
    lengths = []
    for preference in (0.0, 0.7, 2.0):
        found = search(chain, 30, length_preference=preference, max_length=20)
        lengths.append(np.mean([len(hypotheses[0].ids) for hypotheses in found]))
    assert lengths[0] < lengths[1] < lengths[2]


# Constraints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3])
def test_every_photo_has_a_caption_when_nothing_is_allowed(width):
    # Three words, none of them twice, and at least eight: min_length gives way.
    chain = Chain(vocabulary=7, photos=6, end=-9.0)
    limits = {"no_repeat": 1, "min_length": 8, "max_length": 12}
    for hypotheses in search(chain, 6, beam_width=width, **limits):
        assert hypotheses
        assert all(len(h.ids) == 4 and h.ids[-1] == st.END for h in hypotheses)
    only_end = search(chain, 6, number_vocab(7), never="w4 w5 w6", min_length=3)
    assert [[h.ids for h in hypotheses] for hypotheses in only_end] == [[[st.END]]] * 6
    sampled = st.Decoding(method="sample", never="w4 w5 w6", min_length=3)
    drawn = st.sample_captions(chain, photos(6), sampled, number_vocab(7))
    assert [[h.ids for h in hypotheses] for hypotheses in drawn] == [[[st.END]]] * 6


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"start": "w5 w4"}, lambda ids: ids[:2] == [5, 4]),
        ({"never": "w4"}, lambda ids: 4 not in ids),
        ({"must": "w6"}, lambda ids: 6 in ids),
        ({"must": "w6 w5"}, lambda ids: {5, 6} <= set(ids)),
        ({"start": "w5", "must": "w5 w6"}, lambda ids: ids[0] == 5 and 6 in ids),
        (
            {"start": "w4", "never": "w5", "must": "w6"},
            lambda ids: ids[0] == 4 and 5 not in ids and 6 in ids,
        ),
    ],
)
def test_a_wide_beam_returns_the_best_of_all_captions_that_obey(options, allowed):
    chain = Chain(vocabulary=7, photos=6)
    found = search(chain, 6, number_vocab(7), beam_width=150, max_length=5, **options)
    for photo, hypotheses in enumerate(found):
        ids, score = exhaustive(chain, photo, 5, st.Decoding().length_preference, allowed)
        assert hypotheses[0].ids == ids and hypotheses[0].score == pytest.approx(score, abs=1e-5)
        assert all(allowed(h.ids) for h in hypotheses)
        assert len({tuple(h.ids) for h in hypotheses}) == len(hypotheses)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_narrow_beam_obeys_too(width):
    chain = Chain(vocabulary=30, photos=10, end=2.0)
    options = {"start": "w9", "must": "w11 w20 w29", "never": "w7 w8"}
    for hypotheses in search(chain, 10, number_vocab(30), beam_width=width, **options):
        assert hypotheses
        for h in hypotheses:
            assert h.ids[0] == 9 and {11, 20, 29} <= set(h.ids) and not {7, 8} & set(h.ids)


def test_the_most_of_the_words_are_there_when_not_all_can_be():
    chain = Chain(vocabulary=9, photos=4)
    options = {"must": "w5 w6 w7", "max_length": 2}
    for hypotheses in search(chain, 4, number_vocab(9), **options):
        assert all(len({5, 6, 7} & set(h.ids)) == 2 for h in hypotheses)


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
@pytest.mark.parametrize("limit", [20, 33, 60])
def test_no_caption_has_more_characters_than_allowed(method, limit):
    chain, vocab = Chain(vocabulary=30, photos=20, end=-2.0), number_vocab(30, width=6)
    free = search(chain, 20, vocab, max_length=20)
    assert any(len(st.detokenize(vocab.decode(hs[0].ids))) > limit for hs in free)
    decoding = st.Decoding(method=method, max_chars=limit, start="w000004", max_length=20)
    for hypotheses in st.generate(chain, photos(20), range(20), decoding, vocab):
        for h in hypotheses:
            assert h.ids[-1] == st.END and h.ids[0] == 4
            assert len(st.detokenize(vocab.decode(h.ids))) <= limit


def test_a_wide_beam_returns_the_best_of_all_captions_that_fit():
    chain, vocab = Chain(vocabulary=7, photos=6, end=-2.0), number_vocab(7, width=6)

    def fits(ids):
        return len(st.detokenize(vocab.decode(ids))) <= 30

    for photo, hypotheses in enumerate(
        search(chain, 6, vocab, beam_width=150, max_length=5, max_chars=30)
    ):
        ids, score = exhaustive(chain, photo, 5, st.Decoding().length_preference, fits)
        assert hypotheses[0].ids == ids and hypotheses[0].score == pytest.approx(score, abs=1e-5)


def test_a_caption_has_its_words_even_where_all_captions_are_cut_off_by_their_length():
    chain, vocab = Chain(vocabulary=12, photos=10, end=-1e4), number_vocab(12, width=6)
    options = {"must": "w000007 w000009", "max_chars": 40}
    for hypotheses in search(chain, 10, vocab, **options):
        assert hypotheses and all({7, 9} <= set(h.ids) for h in hypotheses)
        assert all(h.ids[-1] == st.END for h in hypotheses)


def test_what_already_fits_is_what_an_unlimited_search_returns():
    chain, vocab = Chain(vocabulary=30, photos=20, end=3.0), number_vocab(30)
    free = search(chain, 20, vocab, max_length=20)
    assert max(len(st.detokenize(vocab.decode(h.ids))) for hs in free for h in hs) < 100
    assert search(chain, 20, vocab, max_length=20, max_chars=125) == free


def test_words_that_cannot_be_are_refused():
    chain, vocab = Chain(vocabulary=9, photos=1), number_vocab(9)
    for options in ({"never": "zebra"}, {"must": "zebra"}, {"start": "w4 zebra"}):
        with pytest.raises(ValueError, match=r"does not know zebra: .* 9 words"):
            search(chain, 1, vocab, **options)
    with pytest.raises(ValueError, match="w4: required by start or must"):
        search(chain, 1, vocab, start="w4", never="w4")
    with pytest.raises(ValueError, match="after start"):
        search(chain, 1, number_vocab(9, 20), start="w" + "4".zfill(20), max_chars=20)


# Sampling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_captioners_probabilities_at_their_temperature(temperature):
    chain, features = Chain(vocabulary=8, photos=1), torch.zeros(4000, 1, 1)
    decoding = st.Decoding(
        method="sample", temperature=temperature, seed=1, min_length=0, max_length=1
    )
    drawn = st.sample_captions(chain, features, decoding)
    counts = np.bincount([h[0].ids[0] for h in drawn], minlength=8) / 4000
    expected = (log_probs(chain, 0, []) / temperature).softmax(-1).numpy()
    assert counts == pytest.approx(expected, abs=0.03)
    again = st.sample_captions(chain, features, decoding)
    assert [h[0].ids for h in drawn] == [h[0].ids for h in again]


def test_several_samples_of_a_photo_are_draws_from_its_own_probabilities():
    chain = Chain(vocabulary=8, photos=3)
    decoding = st.Decoding(method="sample", captions=1000, min_length=0, max_length=2)
    for photo, hypotheses in enumerate(st.sample_captions(chain, photos(3), decoding)):
        assert len(hypotheses) == 1000
        counts = np.bincount([h.ids[0] for h in hypotheses], minlength=8) / 1000
        expected = log_probs(chain, photo, []).softmax(-1).numpy()
        assert counts == pytest.approx(expected, abs=0.06)
        for h in hypotheses[:20]:
            rows = [log_probs(chain, photo, h.ids[:i]).log_softmax(-1) for i in range(len(h.ids))]
            total = sum(float(row[word]) for row, word in zip(rows, h.ids, strict=True))
            assert h.score == pytest.approx(total / len(h.ids), abs=1e-5)


def test_top_p_leaves_only_the_likeliest_words():
    chain = Chain(vocabulary=30, photos=1)
    likely = log_probs(chain, 0, []).softmax(-1)
    for top_p in (0, 1e-6, 0.3, 0.8):
        decoding = st.Decoding(
            method="sample", captions=500, top_p=top_p, max_length=1, min_length=0
        )
        drawn = {h.ids[0] for h in st.sample_captions(chain, photos(1), decoding)[0]}
        order = likely.argsort(descending=True)
        before = likely[order].cumsum(0) - likely[order]
        assert drawn <= {int(order[0]), *order[before < top_p].tolist()}
        assert int(order[0]) in drawn


# A captioner -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storyteller():
    """An untrained captioner on the backbone that comes from pip."""
    torch.manual_seed(1)
    vocab = st.Vocab([*st.SPECIAL, *(f"w{i}" for i in range(40))])
    captioner = st.Captioner(
        "lstm", 1280, 44, (torch.rand(1280) + 0.2, torch.rand(1280) + 0.5), embedding=16, hidden=32
    )
    backbone = st.load_backbone("efficientnet_lite0")
    config = {
        "decoder": "lstm",
        "sizes": {"embedding": 16, "hidden": 32},
        "backbone": backbone.name,
        "backbone_sha256": backbone.sha256,
        "regions": 1,
        "width": 1280,
        "preprocessing": "squash",
        "precision": "float32",
        "dataset": {"name": "nothing", "photos": 0, "sample": True, "fingerprint": ""},
        "recipe": "original",
        "training": {"epochs": 0, "photos": 0, "best_epoch": 0, "val_cider": 0.0},
        "feature_mean": captioner.mean.tolist(),
        "feature_deviation": captioner.deviation.tolist(),
    }
    with torch.no_grad():
        for weights in captioner.parameters():
            weights.copy_(weights.half().float())  # as they are on disk
    return st.Storyteller(config, vocab, captioner)


@pytest.fixture
def saved(storyteller, tmp_path):
    storyteller.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def some_images():
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(
            generator.integers(0, 255, (60 + 9 * i, 90, 3), dtype=np.uint8).repeat(4, 0)
        )
        for i in range(3)
    ]


def test_a_captioner_read_back_from_disk_gives_the_same_captions(storyteller, saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "vocab.json",
    ]
    again = st.Storyteller.from_pretrained(saved)
    assert again.caption(some_images()) == storyteller.caption(some_images())


def test_captioning_photos_is_captioning_their_features(storyteller):
    images = some_images()
    assert storyteller.caption(images) == storyteller.caption_features(storyteller.extract(images))


def test_paths_images_and_arrays_one_or_many_are_captioned_alike(storyteller, tmp_path):
    image = some_images()[0]
    image.save(tmp_path / "photo.png")
    single = storyteller.caption(image)
    assert len(single) == 1
    for other in storyteller.caption(
        [tmp_path / "photo.png", str(tmp_path / "photo.png"), np.asarray(image)]
    ):
        # Products of one row and of three round differently in the last digit.
        assert other.words == single[0].words
        assert other.score == pytest.approx(single[0].score, rel=1e-5)
    assert storyteller.caption([]) == []


def test_a_caption_has_sentence_score_words_and_alternatives(storyteller):
    (caption,) = storyteller.caption(some_images()[0], beam_width=3)
    assert (
        caption.text == st.detokenize(caption.words) and st.tokenize(caption.text) == caption.words
    )
    assert (
        caption.alternatives[0] == (caption.text, caption.score)
        and 1 <= len(caption.alternatives) <= 3
    )
    (greedy,) = storyteller.caption(some_images()[0], method="greedy")
    assert greedy == storyteller.caption(some_images()[0], beam_width=1)[0]


def an_attentive_captioner(end=0.0):
    """An untrained captioner with attention, that wants to end as much as `end` says."""
    torch.manual_seed(2)
    vocab = st.Vocab([*st.SPECIAL, *(f"w{i}" for i in range(20))])
    captioner = st.Captioner(
        "attention", 6, 24, (torch.zeros(6), torch.ones(6)), embedding=8, hidden=8
    ).eval()
    captioner.decoder.output.bias.data[st.END] += end
    return st.Storyteller({}, vocab, captioner)


def test_a_decoder_with_attention_gives_each_words_weights():
    storyteller, features = an_attentive_captioner(), torch.randn(3, 49, 6)
    for photo, caption in enumerate(storyteller.caption_features(features)):
        assert caption.attention.shape == (len(caption.words), 7, 7)
        np.testing.assert_allclose(caption.attention.sum((1, 2)), 1, rtol=1e-5)
        state, word = storyteller.captioner.start(features[photo : photo + 1]), st.START
        for word_said, weights in zip(caption.words, caption.attention, strict=True):
            _, state = storyteller.captioner.step(torch.tensor([word]), state)
            np.testing.assert_allclose(weights.ravel(), state.caption["weights"][0], atol=1e-6)
            word = storyteller.vocab.ids[word_said]


def test_every_caption_has_a_word_however_it_is_sampled_or_searched():
    storyteller, features = an_attentive_captioner(end=50), torch.randn(40, 49, 6)
    for options in (
        {"method": "sample", "temperature": 2.0},
        {"beam_width": 3},
        {"method": "greedy"},
    ):
        for caption in storyteller.caption_features(features, **options):
            assert len(caption.words) == len(caption.attention) == 1


@pytest.mark.parametrize("method", ["beam", "sample"])
@pytest.mark.parametrize("length", [3, 2 * st.Decoding.max_length])
def test_captions_may_be_shorter_or_longer_than_usual(method, length):
    storyteller, limits = (
        an_attentive_captioner(end=-50),
        {"no_repeat": 0} if method == "beam" else {},
    )
    options = {"method": method, "max_length": length, **limits}
    (caption,) = storyteller.caption_features(torch.randn(1, 49, 6), **options)
    assert len(caption.words) == length and caption.attention.shape == (length, 7, 7)
    with pytest.raises(TypeError, match="max_lenth"):
        storyteller.caption_features(torch.randn(1, 49, 6), max_lenth=3)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magic"},
        {"beam_width": 0},
        {"temperature": 0, "method": "sample"},
        {"top_p": 1.5},
        {"max_chars": 5},
        {"beam_width": 2.5},
        {"must": "w1", "method": "sample"},
    ],
)
def test_a_wrong_option_is_named(storyteller, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        storyteller.caption(some_images(), **options)


def calibrated(storyteller):
    """Scores say half of a caption's quality; the training photos vary in the first 64 features."""
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(300, 1280, generator=generator) * 0.01
    train[:, :64] += torch.randn(300, 64, generator=generator)
    train = train * storyteller.captioner.deviation + storyteller.captioner.mean
    scores = torch.randn(200, generator=generator).numpy()
    shares = 0.5 + 0.2 * scores + 0.2 * torch.randn(200, generator=generator).numpy()
    fitted = st.Storyteller(storyteller.config, storyteller.vocab, storyteller.captioner)
    fitted.calibrate(scores, shares, train[:200], train)
    return fitted, scores, shares, train


@pytest.mark.fast
def test_confidence_is_the_share_that_such_scores_reached(storyteller):
    from sklearn.isotonic import IsotonicRegression

    fitted, scores, shares, train = calibrated(storyteller)
    expected = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, shares)
    wanted = np.linspace(-1.2, 1.2, 30)
    confidence = fitted.confidence(wanted, train[:1].expand(30, -1))
    assert np.abs(confidence - expected.predict(wanted)).mean() < 0.05
    assert all(0 <= one <= 1 for one in confidence) and confidence == sorted(confidence)


@pytest.mark.fast
def test_a_photo_unlike_the_training_photos_is_a_guess_whatever_its_score(storyteller):
    fitted, _, _, train = calibrated(storyteller)
    strange = train[:1].clone()
    strange[:, 700:900] += 5 * storyteller.captioner.deviation[700:900]
    (familiar,), (other,) = (fitted.confidence([1.0], photo) for photo in (train[:1], strange))
    assert familiar > 0.6 and other == 0


def test_a_captioner_keeps_its_calibration_on_disk(storyteller, tmp_path):
    fitted, _, _, train = calibrated(storyteller)
    fitted.save_pretrained(tmp_path / "model")
    again = st.Storyteller.from_pretrained(tmp_path / "model")
    ours, theirs = (one.caption_features(train[:5, None], no_repeat=0) for one in (fitted, again))
    # The calibration is stored in float16.
    assert [one.confidence for one in ours] == pytest.approx(
        [one.confidence for one in theirs], abs=1e-3
    )
    assert all(one.confidence is not None for one in ours)


def test_a_handful_of_photos_is_enough_to_calibrate(storyteller):
    fitted = st.Storyteller(storyteller.config, storyteller.vocab, storyteller.captioner)
    photos = torch.rand(7, 1280).repeat(4, 1)  # far fewer than dimensions, and some twice
    fitted.calibrate(np.array([-2.0, -1.0, -1.0]), np.array([0.2, 0.5, 0.9]), photos[:3], photos)
    low, high = fitted.confidence([-2.0, -1.0], photos[:2])
    assert (low, high) == pytest.approx((0.2, 0.7), abs=0.05)


def test_a_captioner_that_was_not_calibrated_has_no_confidence(storyteller):
    assert storyteller.caption_features(torch.rand(1, 1, 1280))[0].confidence is None


def test_the_shipped_captioner_knows_what_it_never_saw():
    shipped = st.Storyteller.from_pretrained(ROOT / "space/model")
    photos = [
        ROOT / f"space/examples/{name}.jpg" for name in ("cat", "coffee", "rocket", "astronaut")
    ]
    assert all(caption.confidence < 0.3 for caption in shipped.caption(photos))


def test_a_caption_is_as_sure_whatever_length_was_preferred():
    shipped = st.Storyteller.from_pretrained(ROOT / "space/model")
    features = shipped.extract([ROOT / "space/examples/bicycle.jpg"])
    options = [{"length_preference": preference} for preference in (0.9, 0.0, 2.0)]
    options.append({"method": "sample", "top_p": 1e-6})
    captions = [
        shipped.caption_features(
            features, min_length=4, max_length=4, beam_width=1, no_repeat=0, **chosen
        )[0]
        for chosen in options
    ]
    assert len({caption.text for caption in captions}) == 1
    assert 0.25 < captions[0].confidence < 0.95
    sure = captions[0].confidence
    assert [caption.confidence for caption in captions] == pytest.approx([sure] * 4, abs=0.02)


def test_saving_a_captioner_touches_no_other_file(storyteller, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_bytes(b"another one")
    storyteller.save_pretrained(tmp_path)
    storyteller.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "other/model.safetensors").read_bytes() == b"another one"
    assert len(list(tmp_path.iterdir())) == 6
    assert st.Storyteller.from_pretrained(tmp_path).config == storyteller.config


def test_attention_weights_are_spared_when_nobody_asks_for_them():
    storyteller, features = an_attentive_captioner(), torch.randn(3, 49, 6)
    with_weights = storyteller.caption_features(features)
    without = storyteller.caption_features(features, attention=False)
    assert [c.alternatives for c in with_weights] == [c.alternatives for c in without]
    assert all(c.attention is None for c in without)


def test_the_model_card_has_scores_and_settings_as_tables(storyteller):
    plain = st.Storyteller.model_card(storyteller.config)
    assert "|" not in plain and "drawings, not photos" in plain
    config = storyteller.config | {
        "scores": {"CIDEr-D": {"value": 0.5555, "low": 0.5, "high": 0.6}},
        "scored_on": "nothing, test",
        "settings": {"03_train_dual_t4": {"recipe": "best", "epochs": None, "flips": False}},
        "dataset": {"name": "Flickr30k", "sample": False},
    }
    card = st.Storyteller.model_card(config)
    assert "Scores on nothing, test:" in card and "| CIDEr-D | 0.555 | 0.500 to 0.600 |" in card
    assert "| 03_train_dual_t4 | recipe='best', epochs=None, flips=False |" in card
    assert card.startswith("---\n") and "license: other\n---" in card


def test_a_photo_that_cannot_be_read_is_named(storyteller, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    with pytest.raises(ValueError, match=r"bad.jpg"):
        storyteller.caption(tmp_path / "bad.jpg")


def break_vocabulary(folder):
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "words": vocab["words"] + ["more"]}))


def break_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["decoder.output.bias"][3] = math.nan
    save_file(weights, folder / "model.safetensors")


def break_config(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["sizes"]
    (folder / "config.json").write_text(json.dumps(config))


def break_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"sizes": {"embedding": 16, "hidden": 33}})
    )


def cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def change(**entries):
    def harm(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    return harm


def swap_words(folder):
    vocab = json.loads((folder / "vocab.json").read_text())
    words = vocab["words"]
    (folder / "vocab.json").write_text(json.dumps({**vocab, "words": words[:4] + words[:3:-1]}))


class Trace:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("a-pickle-was-run",)


def pickle_over(name):
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Trace()))


@pytest.mark.parametrize(
    "harm",
    [
        change(sizes={"embedding": 10**9, "hidden": 10**9}),
        change(width=10**12),
        change(regions="many"),
        change(feature_mean=[math.nan] * 1280),
        change(feature_deviation=[0.0] * 1280),
        change(feature_mean=[1.0] * 5),
        change(decoder="magic"),
        change(sizes={"layers": 2}),
        change(sizes=[1]),
        change(feature_mean="none"),
        change(backbone=5),
        swap_words,
        *map(pickle_over, ["config.json", "vocab.json", "model.safetensors"]),
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        lambda folder: (folder / "vocab.json").write_text('{"words": ' + "[" * 100_000),
        lambda folder: (folder / "config.json").write_text("[]"),
    ],
)
def test_a_hostile_captioner_is_one_artifact_error_and_runs_nothing(
    saved, harm, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    harm(saved)
    with pytest.raises(st.ArtifactError, match="model"):
        st.Storyteller.from_pretrained(saved)
    assert not (tmp_path / "a-pickle-was-run").exists()


@pytest.mark.parametrize(
    "harm",
    [
        break_vocabulary,
        break_weights,
        break_config,
        break_shape,
        cut_short,
        lambda folder: (folder / "vocab.json").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        shutil.rmtree,
    ],
)
def test_a_broken_captioner_is_one_artifact_error(saved, harm):
    harm(saved)
    with pytest.raises(st.ArtifactError, match="model"):
        st.Storyteller.from_pretrained(saved)


def test_the_weights_of_another_backbone_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"backbone_sha256": "0" * 64}))
    with pytest.raises(st.ArtifactError, match="not those that this captioner was trained with"):
        st.Storyteller.from_pretrained(saved).caption(some_images())
