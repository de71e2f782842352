"""The decoder and its loss, against plain formulas."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import storyteller_utils as st

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parents[1]


def captioner(decoder="lstm", vocabulary=50, width=12, **sizes):
    torch.manual_seed(3)
    small = {
        "lstm": {"embedding": 8},
        "attention": {"embedding": 8, "attention": 12},
        "transformer": {"layers": 2, "heads": 4, "regions": 9},
    }
    sizes = {"hidden": 16, "dropout": 0.0} | small[decoder] | sizes
    moments = torch.randn(width), torch.rand(width) + 0.5
    return st.Captioner(decoder, width, vocabulary, moments, **sizes).eval()


every_decoder = pytest.mark.parametrize("decoder", st.DECODERS)


def captions(vocabulary=50, batch=6, longest=9):
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(4, vocabulary, (batch, longest + 2), generator=generator)
    words[:, 0] = st.START
    for row, length in enumerate(torch.randint(1, longest, (batch,), generator=generator).tolist()):
        words[row, length + 1] = st.END
        words[row, length + 2 :] = st.PAD
    return torch.randn(batch, 9, 12, generator=generator), words


@every_decoder
def test_stepping_word_by_word_gives_the_logits_of_reading_the_whole_caption(decoder):
    model, (features, words) = captioner(decoder), captions()
    whole = model.decoder.output(model.decoder.read(model.standardise(features), words))
    state = model.start(features)
    for place in range(words.shape[1]):
        logits, state = model.step(words[:, place], state)
        torch.testing.assert_close(logits, whole[:, place], atol=1e-5, rtol=1e-5)


@every_decoder
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_over_real_words_only(smoothing, decoder):
    model, (features, words) = captioner(decoder), captions()
    loss, likelihood = model(features, words, smoothing)
    logits = model.decoder.output(
        model.decoder.read(model.standardise(features), words[:, :-1])
    ).flatten(0, 1)
    plain = {"target": words[:, 1:].flatten(), "ignore_index": st.PAD, "reduction": "sum"}
    torch.testing.assert_close(likelihood, F.cross_entropy(logits, **plain))
    torch.testing.assert_close(loss, F.cross_entropy(logits, label_smoothing=smoothing, **plain))


@every_decoder
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_one_with_and_without_gradients_and_counts_captions_by_their_weights(
    smoothing, weighted, decoder
):
    model, (features, words) = captioner(decoder), captions()
    weights = torch.randn(len(words)) if weighted else None
    loss, _ = model(features, words, smoothing, weights)
    logits = model.decoder.output(model.decoder.read(model.standardise(features), words[:, :-1]))
    by_hand = torch.zeros(())
    for row, column in (words[:, 1:] != st.PAD).nonzero().tolist():
        log_probs = logits[row, column].log_softmax(-1)
        target = torch.full_like(log_probs, smoothing / len(log_probs))
        target[words[row, column + 1]] += 1 - smoothing
        by_hand = by_hand - (target * log_probs).sum() * (weights[row] if weighted else 1)
    torch.testing.assert_close(loss, by_hand)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(by_hand, parameters)
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), expected, atol=1e-4, rtol=1e-4
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(features, words, smoothing, weights)[0], by_hand.detach())


@every_decoder
def test_padding_changes_neither_the_loss_nor_the_gradient(decoder):
    model, (features, words) = captioner(decoder), captions()
    longer = F.pad(words, (0, 7), value=st.PAD)
    gradients = []
    for padded in (words, longer):
        loss, _ = model(features, padded)
        gradients.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for short, long in zip(*gradients, strict=True):
        torch.testing.assert_close(short, long)


def test_features_are_standardised_by_the_training_photos():
    model = captioner()
    features = torch.randn(4, 1, 12) * model.deviation * 3 + model.mean
    torch.testing.assert_close(model.standardise(features) * model.deviation + model.mean, features)
    raw = model.decoder.start(features).caption["hidden"]
    assert not torch.allclose(model.start(features).caption["hidden"], raw)


def test_the_photo_becomes_the_first_hidden_state_and_the_cell_starts_at_zero():
    model, (features, _) = captioner(), captions()
    state = model.start(features).caption
    encoder = model.decoder.encoder
    pooled = model.standardise(features).mean(1)
    torch.testing.assert_close(state["hidden"], pooled @ encoder.weight.T + encoder.bias)
    assert not state["cell"].any()


def test_a_pooled_decoder_reads_a_grid_by_averaging_it():
    model = captioner()
    grid = torch.randn(3, 49, 12)
    averaged = model.start(grid.mean(1, keepdim=True)).caption
    torch.testing.assert_close(model.start(grid).caption, averaged)


def test_the_original_has_eight_and_a_half_million_parameters():
    recipe = st.RECIPES["original"]
    model = st.Captioner(
        recipe["decoder"], 2048, 7689, (torch.zeros(2048), torch.ones(2048)), **recipe["sizes"]
    )
    by_hand = (2048 + 1) * 512 + 7689 * 256 + 4 * 512 * (256 + 512 + 2) + (512 + 1) * 7689
    assert sum(p.numel() for p in model.parameters()) == by_hand == 8_538_889


def test_attention_is_the_softmax_of_additive_scores_written_out():
    model, (features, _) = captioner("attention"), captions()
    decoder, photos = model.decoder, model.start(features).photo
    hidden = torch.randn(len(features), 16)
    context, weights = decoder.attend(hidden, photos)
    assert torch.allclose(weights.sum(1), torch.ones(len(features))) and weights.shape == (
        len(features),
        9,
    )
    for photo in range(len(features)):
        scores = [
            decoder.score(torch.tanh(decoder.key(region) + decoder.query(hidden[photo])))
            for region in photos["grid"][photo]
        ]
        by_hand = torch.cat(scores).softmax(0)
        torch.testing.assert_close(weights[photo], by_hand)
        mean = sum(w * region for w, region in zip(by_hand, photos["grid"][photo], strict=True))
        torch.testing.assert_close(
            context[photo], mean * torch.sigmoid(decoder.gate(hidden[photo]))
        )


def test_the_attention_decoders_depend_on_the_regions_and_the_pooled_one_on_their_mean():
    (features, words), mixed = captions(), None
    mixed = features[:, torch.randperm(9)] * torch.linspace(0.5, 2, 9)[:, None]
    same_mean = mixed - mixed.mean(1, keepdim=True) + features.mean(1, keepdim=True)
    for decoder, equal in (("lstm", True), ("attention", False), ("transformer", False)):
        model = captioner(decoder)
        assert (
            torch.allclose(model(features, words)[0], model(same_mean, words)[0], rtol=1e-5)
            == equal
        )


@every_decoder
def test_dropout_is_off_outside_training(decoder):
    model, (features, words) = captioner(decoder, dropout=0.5), captions()
    assert torch.equal(model(features, words)[0], model(features, words)[0])
    model.train()
    assert not torch.equal(model(features, words)[0], model(features, words)[0])


@every_decoder
def test_the_score_of_beam_search_is_the_likelihood_of_the_caption(decoder):
    model, (features, _) = captioner(decoder), captions()
    with torch.no_grad():
        model.decoder.output.weight.mul_(3)
    decoding = st.Decoding(beam_width=4, length_preference=1.0, max_length=7, no_repeat=0)
    found = st.beam_search(model, features, decoding)
    for photo, hypotheses in enumerate(found):
        assert len({tuple(h.ids) for h in hypotheses}) == len(hypotheses) >= 1
        for h in hypotheses:
            likelihood = model(features[photo : photo + 1], torch.tensor([[st.START, *h.ids]]))[1]
            assert h.score == pytest.approx(-float(likelihood) / len(h.ids), rel=1e-4)


@pytest.mark.parametrize("decoder", ["attention", "transformer"])
def test_captioners_saved_under_the_old_names_of_parameters_load(decoder):
    model = captioner(decoder)
    old = {".score.": ".worth.", ".init_state.": ".begin."}
    old |= {".keys_values.": ".memories.", ".mlp.": ".think."}
    saved = model.state_dict()
    for now, before in old.items():
        saved = {name.replace(now, before): tensor for name, tensor in saved.items()}
    assert saved.keys() != model.state_dict().keys()
    again = captioner(decoder)
    again.load_state_dict(saved)
    features, words = captions()
    assert torch.equal(again(features, words)[0], model(features, words)[0])


def test_building_a_captioner_to_load_does_not_import_torchs_compiler():
    """It takes seconds, and drawing weights on the meta device would need it."""
    code = """import sys, torch, storyteller_utils as st
with torch.device("meta"):
    for decoder in st.DECODERS:
        st.Captioner(decoder, 12, 50, (torch.zeros(12), torch.ones(12)))
        print(decoder, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{decoder} False" for decoder in st.DECODERS], done.stderr
