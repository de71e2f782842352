"""Search, against exhaustive search and a plain loop; the captioner on disk."""

import itertools
import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import storyteller_utils as st

pytestmark = pytest.mark.fast


class Chain:
    """A captioner whose next word depends on the photo, the place and the last two words, by random tables."""

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
        photo, caption = state.photo["photo"], state.caption
        row = photo.repeat_interleave(len(words) // len(photo))
        logits = self.table[row, caption["place"], words] + self.earlier[caption["earlier"]]
        return logits, st.State(state.photo, {"place": caption["place"] + 1, "earlier": words})


def photos(count):
    return torch.arange(count, dtype=torch.float32)[:, None, None]


def log_probs(chain, photo, ids):
    """What the search may choose from after `ids`: the probabilities as they are, but never <pad>, <start> or <unk>."""
    earlier, last = ([0, st.START] + list(ids))[-2:]
    row = (chain.table[photo, len(ids), last] + chain.earlier[earlier]).log_softmax(-1)
    row[[st.PAD, st.START, st.UNK]] = -math.inf
    return row


def exhaustive(chain, photo, max_length, preference):
    """Score every caption that there is and return the best (ids, score)."""
    words = range(4, chain.table.shape[-1])
    best = ([], -math.inf)
    for length in range(max_length):
        for middle in itertools.product(words, repeat=length):
            ids = [*middle, st.END]
            total = sum(
                float(log_probs(chain, photo, ids[:place])[word]) for place, word in enumerate(ids)
            )
            score = total / len(ids) ** preference
            best = max(best, (ids, score), key=lambda one: one[1])
    return best


def plain_beam(chain, photo, width, preference, max_length):
    """Beam search as its docstring says it, one photo, in plain Python."""
    beams, pool = [([], 0.0)], []
    for length in range(1, max_length + 1):
        found = []
        for ids, total in beams:
            row = log_probs(chain, photo, ids)
            found += [
                ([*ids, word], total + float(row[word]))
                for word in range(len(row))
                if row[word] > -math.inf
            ]
        found.sort(key=lambda one: -one[1])
        going = [one for one in found if one[0][-1] != st.END][:width]
        ended = [one for one in found if one[0][-1] == st.END]
        both = sorted(going + ended, key=lambda one: -one[1])[:width]
        pool += [(ids, total / length**preference) for ids, total in both if ids[-1] == st.END]
        pool = sorted(pool, key=lambda one: -one[1])[:width]
        beams = going
        if len(pool) == width and pool[-1][1] >= beams[0][1] / length**preference:
            return pool
    return pool or [(ids, total / max_length**preference) for ids, total in beams]


def repeats(ids, n):
    """Return whether some n words in a row occur twice."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) < len(grams)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_caption_says_the_same_words_twice_when_that_is_not_allowed(n):
    chain = Chain(vocabulary=7, photos=8, end=-3.0)
    free = st.beam_search(chain, photos(8), beam_width=3, max_length=12, no_repeat=0)
    assert any(repeats(h.ids, n) for found in free for h in found)
    for found in st.beam_search(chain, photos(8), beam_width=3, max_length=12, no_repeat=n):
        assert found and not any(repeats(h.ids, n) for h in found)
        assert not any(
            h.ids[i] in h.ids[max(0, i - 2) : i] for h in found for i in range(len(h.ids))
        )


def test_no_caption_ends_before_its_shortest_allowed_length():
    chain = Chain(vocabulary=9, photos=8, end=3.0)
    assert (
        min(len(h.ids) for found in st.beam_search(chain, photos(8), beam_width=3) for h in found)
        < 5
    )
    found = [
        h.ids
        for found in st.beam_search(chain, photos(8), beam_width=3, min_length=5)
        for h in found
    ]
    assert min(map(len, found)) == 6 and all(
        ids[-1] == st.END for ids in found
    )  # five words and <end>


@pytest.mark.parametrize("preference", [0.0, 0.7, 1.0])
def test_a_wide_beam_finds_the_best_of_all_captions(preference):
    chain = Chain(vocabulary=7, photos=6)
    told = st.beam_search(
        chain, photos(6), beam_width=200, length_preference=preference, max_length=4, no_repeat=0
    )
    for photo, hypotheses in enumerate(told):
        ids, score = exhaustive(chain, photo, 4, preference)
        assert hypotheses[0].ids == ids and hypotheses[0].score == pytest.approx(score, abs=1e-5)
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_batched_beam_search_tells_what_a_plain_loop_over_photos_and_beams_tells(width):
    chain = Chain(vocabulary=12, photos=20, end=1.5, seed=width)
    told = st.beam_search(
        chain, photos(20), beam_width=width, length_preference=0.7, max_length=12, no_repeat=0
    )
    for photo, hypotheses in enumerate(told):
        plain = plain_beam(chain, photo, width, 0.7, 12)
        assert [h.ids for h in hypotheses] == [ids for ids, _ in plain]
        assert [h.score for h in hypotheses] == pytest.approx(
            [score for _, score in plain], abs=1e-5
        )


def test_width_one_takes_the_likeliest_word_each_time():
    chain = Chain(vocabulary=12, photos=8, end=1.0)
    for photo, (hypothesis,) in enumerate(
        st.beam_search(chain, photos(8), beam_width=1, max_length=15, no_repeat=0)
    ):
        word, ids = st.START, []
        while word != st.END and len(ids) < 15:
            word = int(log_probs(chain, photo, ids).argmax())
            ids.append(word)
        assert hypothesis.ids == ids


def test_photos_in_a_batch_do_not_influence_each_other():
    chain = Chain(vocabulary=12, photos=16, end=1.0)
    together = st.beam_search(chain, photos(16), max_length=12)
    alone = [st.beam_search(chain, photos(16)[i : i + 1], max_length=12)[0] for i in range(16)]
    assert [[h.ids for h in one] for one in together] == [[h.ids for h in one] for one in alone]


def test_a_model_that_never_ends_is_still_told():
    chain = Chain(vocabulary=9, photos=3, end=-1e9)
    for photo, hypotheses in enumerate(st.beam_search(chain, photos(3), max_length=6, no_repeat=0)):
        plain = plain_beam(chain, photo, 5, st.LENGTH_PREFERENCE, 6)
        assert [h.ids for h in hypotheses] == [ids for ids, _ in plain] and len(
            hypotheses[0].ids
        ) == 6
        assert [h.score for h in hypotheses] == pytest.approx(
            [score for _, score in plain], abs=1e-5
        )


@pytest.mark.parametrize("width", [1, 5])
def test_special_words_are_never_told_however_likely(width):
    chain = Chain(vocabulary=9, photos=4)
    chain.table[..., [st.PAD, st.START, st.UNK]] += 50
    sampled = st.sample_captions(chain, photos(4), max_length=8)
    for hypotheses in [*st.beam_search(chain, photos(4), beam_width=width, max_length=8), *sampled]:
        for hypothesis in hypotheses:
            assert not {st.PAD, st.START, st.UNK} & set(hypothesis.ids)


def test_more_length_preference_tells_longer_captions():
    chain = Chain(vocabulary=12, photos=30, end=2.0)
    mean = [
        np.mean(
            [
                len(h[0].ids)
                for h in st.beam_search(chain, photos(30), length_preference=p, max_length=20)
            ]
        )
        for p in (0.0, 0.7, 2.0)
    ]
    assert mean[0] < mean[1] < mean[2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_captioners_probabilities_at_their_temperature(temperature):
    chain, features = Chain(vocabulary=8, photos=1), torch.zeros(4000, 1, 1)
    told = st.sample_captions(chain, features, temperature, seed=1, max_length=1)
    counts = np.bincount([h[0].ids[0] for h in told], minlength=8) / 4000
    assert counts == pytest.approx(
        (log_probs(chain, 0, []) / temperature).softmax(-1).numpy(), abs=0.03
    )
    again = st.sample_captions(chain, features, temperature, seed=1, max_length=1)
    assert [h[0].ids for h in told] == [h[0].ids for h in again]


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


def test_a_captioner_read_back_from_disk_tells_the_same(storyteller, saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "vocab.json",
    ]
    again = st.Storyteller.from_pretrained(saved)
    assert again.caption(some_images()) == storyteller.caption(some_images())


def test_telling_photos_is_telling_their_features(storyteller):
    images = some_images()
    assert storyteller.caption(images) == storyteller.caption_features(storyteller.extract(images))


def test_paths_images_and_arrays_one_or_many_are_told_alike(storyteller, tmp_path):
    image = some_images()[0]
    image.save(tmp_path / "photo.png")
    one = storyteller.caption(image)
    assert len(one) == 1
    for other in storyteller.caption(
        [tmp_path / "photo.png", str(tmp_path / "photo.png"), np.asarray(image)]
    ):
        # Products of one row and of three round differently in the last digit.
        assert other.words == one[0].words and other.score == pytest.approx(one[0].score, rel=1e-5)
    assert storyteller.caption([]) == []


def test_a_telling_has_sentence_score_words_and_alternatives(storyteller):
    (telling,) = storyteller.caption(some_images()[0], beam_width=3)
    assert (
        telling.text == st.detokenize(telling.words) and st.tokenize(telling.text) == telling.words
    )
    assert (
        telling.alternatives[0] == (telling.text, telling.score)
        and 1 <= len(telling.alternatives) <= 3
    )
    (greedy,) = storyteller.caption(some_images()[0], method="greedy")
    assert greedy == storyteller.caption(some_images()[0], beam_width=1)[0]


def a_looking_teller(end=0.0):
    """An untrained captioner with attention, that wants to end as much as `end` says."""
    torch.manual_seed(2)
    vocab = st.Vocab([*st.SPECIAL, *(f"w{i}" for i in range(20))])
    captioner = st.Captioner(
        "attention", 6, 24, (torch.zeros(6), torch.ones(6)), embedding=8, hidden=8
    ).eval()
    captioner.decoder.output.bias.data[st.END] += end
    return st.Storyteller({}, vocab, captioner)


def test_a_decoder_with_attention_tells_where_each_word_looked():
    teller, features = a_looking_teller(), torch.randn(3, 49, 6)
    for photo, telling in enumerate(teller.caption_features(features)):
        assert telling.attention.shape == (len(telling.words), 7, 7)
        np.testing.assert_allclose(telling.attention.sum((1, 2)), 1, rtol=1e-5)
        state, word = teller.captioner.start(features[photo : photo + 1]), st.START
        for said, look in zip(telling.words, telling.attention, strict=True):
            _, state = teller.captioner.step(torch.tensor([word]), state)
            np.testing.assert_allclose(look.ravel(), state.caption["weights"][0], atol=1e-6)
            word = teller.vocab.ids[said]


def test_every_telling_has_a_word_however_it_is_sampled_or_searched():
    teller, features = a_looking_teller(end=50), torch.randn(40, 49, 6)
    for options in (
        {"method": "sample", "temperature": 2.0},
        {"beam_width": 3},
        {"method": "greedy"},
    ):
        for told in teller.caption_features(features, **options):
            assert len(told.words) == len(told.attention) == 1


@pytest.mark.parametrize("method", ["beam", "sample"])
@pytest.mark.parametrize("length", [3, 2 * st.MAX_WORDS])
def test_captions_may_be_shorter_or_longer_than_usual(method, length):
    teller, limits = a_looking_teller(end=-50), {"no_repeat": 0} if method == "beam" else {}
    (told,) = teller.caption_features(torch.randn(1, 49, 6), method, max_length=length, **limits)
    assert len(told.words) == length and told.attention.shape == (length, 7, 7)
    with pytest.raises(TypeError, match="max_lenth"):
        teller.caption_features(torch.randn(1, 49, 6), method, max_lenth=3)


@pytest.mark.parametrize(
    "options", [{"method": "magic"}, {"beam_width": 0}, {"temperature": 0, "method": "sample"}]
)
def test_a_wrong_option_is_named(storyteller, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        storyteller.caption(some_images(), **options)


def test_a_photo_that_cannot_be_read_is_named(storyteller, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    with pytest.raises(ValueError, match="bad.jpg"):
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


def test_the_terminal_tells_photos_and_names_those_it_cannot_read(
    saved, tmp_path, capsys, monkeypatch
):
    some_images()[0].save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"")
    monkeypatch.setattr(
        "sys.argv",
        [
            "st",
            "caption",
            str(tmp_path),
            "--model",
            str(saved),
            "--csv",
            str(tmp_path / "told.csv"),
        ],
    )
    with pytest.raises(SystemExit, match="1 of 2 photos"):
        st.main()
    out, err = capsys.readouterr()
    assert "good.png: W" in out and "bad.jpg" in err
    assert (tmp_path / "told.csv").read_text().startswith("image,caption\n")
