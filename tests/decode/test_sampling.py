"""Answers are drawn from the model's own probabilities, whatever is guessed."""

import itertools

import numpy as np
import pytest
import torch
from conftest import make_observation, make_spec

from vla0 import InputError
from vla0.checkpoint.tiny import tiny_model
from vla0.core.codec import ActionCodec, Grammar
from vla0.decode import SpeculativeDecoder
from vla0.decode.sampling import Sampling, noise_for
from vla0.policy import VLA0

SMALL = {"width": 48, "layers": 2, "heads": 3}
SMALL |= {"vision_width": 32, "vision_layers": 1, "vision_heads": 2}


def policy_of(processor, seed=3, **changes):
    """A policy with random weights, sharp enough that answers differ in probability."""
    model = tiny_model(processor, **SMALL, seed=seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0)
    return VLA0(model, processor, make_spec(**changes))


def noises(policy, count, *seed):
    grammar = Grammar(policy.spec.bins, policy.spec.numbers)
    return [noise_for(grammar, np.random.default_rng([*seed, row])) for row in range(count)]


def draw(decoder, batch, sampling, **more):
    *_, levels = decoder.stream(batch, sampling=sampling, **more)
    return np.stack(levels)


def log_probabilities(policy, batch, temperature):
    """{levels: log-probability} of every answer, by the model's own forward pass."""
    spec, codec = policy.spec, ActionCodec(policy.spec)
    grammar, found = Grammar(spec.bins, spec.numbers), {}
    ids = torch.tensor(policy.prompt.symbol_ids)
    for numbers in itertools.product(range(spec.bins + 1), repeat=spec.numbers):
        levels = np.array(numbers).reshape(spec.chunk_size, spec.dimensions)
        tokens = policy.prompt.answer_ids(codec.write(levels))
        inputs = {**batch, "input_ids": torch.cat([batch["input_ids"], torch.tensor([tokens])], 1)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in set(inputs) - {"input_ids", "attention_mask"}:
            if inputs[name].shape == batch["input_ids"].shape:  # token types
                more = torch.zeros((1, len(tokens)), dtype=inputs[name].dtype)
                inputs[name] = torch.cat([inputs[name], more], 1)
        with torch.inference_mode():
            logits = policy.model(**inputs).logits[0, -len(tokens) - 1 : -1, ids]
        state, total = grammar.start, 0.0
        for token, row in zip(tokens, logits, strict=True):
            allowed = list(grammar.allowed(state))
            scores = torch.full((len(ids),), -torch.inf).index_copy(
                0, torch.tensor(allowed), row[allowed].float() / temperature
            )
            symbol = policy.prompt.symbol_ids.index(token)
            total += float(torch.log_softmax(scores, 0)[symbol])
            state = grammar.advance(state, symbol)
        found[tuple(numbers)] = total
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_answers_are_drawn_as_often_as_they_are_probable(processor, temperature):
    """Against the enumeration of all answers: two numbers in 0..11, which have one or two digits."""
    policy = policy_of(
        processor, bins=11, chunk_size=2, low=(0.0,), high=(1.0,), action_names=None
    )  # fmt: skip
    batch = policy.prompt.observe([make_observation(0)])
    expected = log_probabilities(policy, batch, temperature)
    chances = np.exp(np.array(list(expected.values())))
    assert abs(chances.sum() - 1) < 1e-5  # the enumeration is whole
    assert chances.max() < 0.9  # and there is something to draw

    total, rows = 4000, 50
    many = policy.prompt.observe([make_observation(0)] * rows)
    fast = SpeculativeDecoder(policy.model, policy.prompt, 12)
    counts = dict.fromkeys(expected, 0)
    for turn in range(total // rows):
        sampling = Sampling(temperature, noises(policy, rows, 7, turn))
        for levels in draw(fast, many, sampling):
            counts[tuple(levels.ravel().tolist())] += 1
    counted = np.array(list(counts.values()))
    often = chances * total >= 5  # the rare ones are counted together
    groups = [*zip(counted[often], chances[often], strict=True)]
    groups.append((counted[~often].sum(), chances[~often].sum()))
    seen, share = map(np.array, zip(*groups, strict=True))
    awaited = share / share.sum() * total
    statistic = torch.tensor(((seen - awaited) ** 2 / awaited).sum())
    freedom = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-3  # the chance of so much apart


@pytest.mark.parametrize("bins", [7, 100, 1000])
def test_guesses_change_no_symbol(processor, bins):
    policy = policy_of(processor, bins=bins, chunk_size=2)
    batch = policy.prompt.observe([make_observation(row) for row in range(3)])
    sampling = Sampling(1.0, noises(policy, 3, bins))
    plain = SpeculativeDecoder(policy.model, policy.prompt, 1, plain=True)
    expected = draw(plain, batch, sampling)
    rng = np.random.default_rng(0)
    wrong = list(rng.integers(0, bins + 1, expected.shape))
    for size in (1, 8, 40):
        fast = SpeculativeDecoder(policy.model, policy.prompt, size)
        for guesses in (None, list(expected), wrong):
            np.testing.assert_array_equal(draw(fast, batch, sampling, guesses=guesses), expected)
    # The first steps of a chunk are those of the whole one, and rows do not see each other.
    np.testing.assert_array_equal(draw(fast, batch, sampling, num_steps=1), expected[:, :1])
    alone = policy.prompt.observe([make_observation(1)])
    np.testing.assert_array_equal(
        draw(fast, alone, Sampling(1.0, sampling.noise[1:2]))[0], expected[1]
    )


def test_sampling_takes_hardly_more_passes_than_the_likeliest_answer(processor):
    policy = policy_of(processor, bins=100, chunk_size=4)
    batch = policy.prompt.observe([make_observation(0)])
    plain = SpeculativeDecoder(policy.model, policy.prompt, 1, plain=True)
    fast = SpeculativeDecoder(policy.model, policy.prompt, 32)
    passes = []
    for decoder in (plain, fast):
        taken = 0
        for seed in range(6):
            draw(decoder, batch, Sampling(1.0, noises(policy, 1, seed)))
            taken += decoder.passes
        passes.append(taken)
    assert passes[1] < 0.7 * passes[0], passes


def test_noise_differs_by_its_seed_alone(policy):
    grammar = Grammar(policy.spec.bins, policy.spec.numbers)
    one, again, other = (noise_for(grammar, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_draws_nothing_is_refused(temperature):
    with pytest.raises(InputError, match="a temperature above 0"):
        Sampling(temperature, [])
