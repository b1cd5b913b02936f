import numpy as np
import pytest
import torch
from conftest import make_observation

from vla0.core.codec import SYMBOLS, ActionCodec, Grammar
from vla0.decode import decode


def by_hand(policy, observation):
    """Constrained greedy decoding without a cache: the whole text through the model for every
    token.
    """
    prompt = policy.prompt
    grammar = Grammar(policy.spec.bins, policy.spec.numbers)
    batch = prompt.observe([observation])
    state, text = grammar.start, ""
    while symbols := grammar.allowed(state):
        with torch.inference_mode():
            logits = policy.model(**batch).logits[0, -1].float()
        symbol = max(symbols, key=lambda s: logits[prompt.symbol_ids[s]].item())
        state = grammar.advance(state, symbol)
        text += SYMBOLS[symbol] if symbol < len(SYMBOLS) else ""
        one = torch.ones((1, 1), dtype=torch.long)
        batch["input_ids"] = torch.cat([batch["input_ids"], one * prompt.symbol_ids[symbol]], 1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], one], 1)
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], one * 0], 1)
    return ActionCodec(policy.spec).read(text)


@pytest.mark.parametrize("seed", range(3))
def test_decoding_is_constrained_greedy(policy, seed):
    observation = make_observation(seed)
    levels = decode(policy.model, policy.prompt.observe([observation]), policy.prompt)
    np.testing.assert_array_equal(levels[0], by_hand(policy, observation))


@pytest.mark.parametrize("steps", [1, 2])
def test_stopping_early_changes_no_number(policy, steps):
    batch = policy.prompt.observe([make_observation(seed) for seed in range(4)])
    whole, short = (
        decode(policy.model, batch, policy.prompt),
        decode(policy.model, batch, policy.prompt, steps),
    )
    np.testing.assert_array_equal(short, whole[:, :steps])


def test_stopping_early_saves_the_passes(policy):
    batch = policy.prompt.observe([make_observation(0)])
    passes = []
    hook = policy.model.register_forward_pre_hook(lambda module, inputs: passes.append(1))
    decode(policy.model, batch, policy.prompt)
    whole = len(passes)
    decode(policy.model, batch, policy.prompt, 1)
    hook.remove()
    assert len(passes) - whole <= whole / policy.spec.chunk_size + 1


def test_decoding_gives_exactly_a_chunk_whatever_the_weights(policy):
    levels = decode(
        policy.model, policy.prompt.observe([make_observation(s) for s in range(4)]), policy.prompt
    )
    assert levels.shape == (4, policy.spec.chunk_size, policy.spec.dimensions)
    assert levels.min() >= 0
    assert levels.max() <= policy.spec.bins


def test_a_base_model_with_sampling_settings_still_decodes_greedily(policy):
    batch = policy.prompt.observe([make_observation(0)])
    expected = decode(policy.model, batch, policy.prompt)
    before = policy.model.generation_config.to_dict()
    try:
        policy.model.generation_config.update(
            do_sample=True, temperature=5.0, top_p=0.5, top_k=2, repetition_penalty=3.0
        )
        np.testing.assert_array_equal(decode(policy.model, batch, policy.prompt), expected)
    finally:
        policy.model.generation_config.update(**before)
