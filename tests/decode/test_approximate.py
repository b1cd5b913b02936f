import numpy as np
import pytest
import torch
from conftest import make_observation

from vla0 import InputError
from vla0.decode import SpeculativeDecoder
from vla0.decode.approximate import ENOUGH, MODES
from vla0.decode.draft import Tree


def test_nothing_is_inexact_unless_asked_for(policy):
    assert policy.decoder.acceptance_ratio == 1
    relaxed = policy.approximate("relaxed")
    assert relaxed.decoder.acceptance_ratio == ENOUGH < 1
    assert policy.decoder.acceptance_ratio == 1
    assert relaxed.model is policy.model


def test_a_guess_passes_that_is_likely_enough_where_the_pick_was_not_guessed():
    tree = Tree.of(0, (0, ""))
    one = tree.add(0, 1)
    two = tree.add(one, 2)
    shares = np.zeros((3, 12))
    shares[0, [1, 5]] = 0.4, 0.6
    shares[one, [2, 7]] = 0.1, 0.9
    picks = [5, 7, 10]
    assert tree.walk(picks) == ([0], 5)
    assert tree.walk(picks, shares, 0.5) == ([0, one], 7)
    assert tree.walk(picks, shares, 0.1) == ([0, one, two], 10)
    assert tree.walk([1, 2, 10], shares, 0.1) == ([0, one, two], 10)


def test_relaxed_decoding_takes_fewer_passes_and_still_writes_whole_chunks(policy):
    batch = policy.prompt.observe([make_observation(seed) for seed in range(3)])
    exact, relaxed = (
        SpeculativeDecoder(policy.model, policy.prompt, 16),
        SpeculativeDecoder(policy.model, policy.prompt, 16, acceptance_ratio=0.01),
    )
    guess = list(np.full((3, policy.spec.chunk_size, policy.spec.dimensions), 37))
    first, other = exact.decode(batch, guesses=guess), relaxed.decode(batch, guesses=guess)
    assert relaxed.passes < exact.passes
    assert first.shape == other.shape
    assert 0 <= other.min() <= other.max() <= policy.spec.bins


LIBRARY = {"int8": "torchao", "nf4": "bitsandbytes"}


def need_library(mode):
    """Skip where the base package is installed alone, as `make newest` does."""
    pytest.importorskip(LIBRARY[mode], reason="the base package alone cannot quantize")


# layers of 48 numbers: coarser than any real one
@pytest.mark.parametrize(("mode", "near"), [("int8", 0.02), ("nf4", 0.5)])
def test_weights_in_few_bits_are_a_copys_and_nearly_the_same(policy, mode, near):
    need_library(mode)
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    other = policy.approximate(mode)
    assert all(
        torch.equal(before[name], weight) for name, weight in policy.model.state_dict().items()
    )
    layer, own = (
        policy.model.model.language_model.layers[0].mlp,
        other.model.model.language_model.layers[0].mlp,
    )
    x = torch.randn(1, 4, policy.model.config.text_config.hidden_size)
    with torch.inference_mode():
        error = (layer(x) - own(x)).abs().mean() / layer(x).abs().mean()
    assert 0 < error < near
    assert other.predict_batch([make_observation(0)]).shape == (
        1,
        policy.spec.chunk_size,
        policy.spec.dimensions,
    )


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_few_bits_are_not_saved_as_a_checkpoint(policy, tmp_path, mode):
    need_library(mode)
    with pytest.raises(InputError, match="exact"):
        policy.approximate(mode).save_pretrained(tmp_path / "x")


def test_an_unknown_mode_is_refused(policy):
    with pytest.raises(InputError, match="relaxed"):
        policy.approximate("int2")
    assert set(MODES) == {"relaxed", "int8", "nf4"}
