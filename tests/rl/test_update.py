"""What is learned is the probability of what was written, by how much better it went."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import make_observation, make_spec
from hypothesis import given
from hypothesis import strategies as st

from vla0.checkpoint.tiny import tiny_model
from vla0.core.codec import Grammar
from vla0.core.prompt import hide_numbers
from vla0.data.config import Masking
from vla0.decode import SpeculativeDecoder
from vla0.decode.sampling import Sampling, noise_for
from vla0.policy import VLA0
from vla0.rl.config import UpdateConfig
from vla0.rl.rollouts import Played, Turn
from vla0.rl.update import (
    Learner,
    log_probabilities,
    objective,
    read_of,
    symbols_of,
)
from vla0.rl.weights import Weighed, advantages, weighed

SMALL = {"width": 48, "layers": 2, "heads": 3}
SMALL |= {"vision_width": 32, "vision_layers": 1, "vision_heads": 2}


@pytest.fixture
def fresh(processor):
    return VLA0(tiny_model(processor, **SMALL, seed=4), processor, make_spec(bins=30))


def drawn(policy, count=3, num_steps=None, temperature=1.0):
    """Turns that are drawn at random, and the probabilities that the decoder gave them."""
    grammar = Grammar(policy.spec.bins, policy.spec.numbers)
    seen = [policy.prompt.see(make_observation(row)) for row in range(count)]
    noise = [noise_for(grammar, np.random.default_rng(row)) for row in range(count)]
    decoder = SpeculativeDecoder(policy.model, policy.prompt, 1, plain=True)
    given, step = [], decoder._advance

    def advance(row, tree, picks, shares):
        if not row.done:
            tempered = shares[0] ** (1 / temperature)
            given.append((id(row), np.log(tempered[picks[0]] / tempered.sum())))
        return step(row, tree, picks, shares)

    decoder._advance = advance
    sampling = Sampling(temperature, noise)
    *_, levels = decoder.stream(policy.prompt.gather(seen), num_steps, sampling=sampling)
    rows = list(dict.fromkeys(row for row, _ in given))
    return [Turn(*pair) for pair in zip(seen, levels, strict=True)], [
        [share for row, share in given if row == which] for which in rows
    ]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("num_steps", [None, 1])
def test_the_probabilities_that_are_trained_are_those_that_were_drawn_from(
    fresh, temperature, num_steps
):
    turns, expected = drawn(fresh, num_steps=num_steps, temperature=temperature)
    with torch.no_grad():
        rows = log_probabilities(fresh.model, fresh.prompt, turns, temperature)
    for found, there, row in zip(*rows, expected, strict=True):
        np.testing.assert_allclose(found[there].numpy(), row, atol=2e-4)
        assert not found[~there].any()


@torch.no_grad()
def test_what_is_hidden_is_neither_read_nor_learned(fresh):
    turns, _ = drawn(fresh, 2)
    grammar = Grammar(fresh.spec.bins, fresh.spec.numbers)
    texts = [read_of(turn.levels, grammar) for turn in turns]
    second = [text.split(" ")[1] for text in texts]
    hidden = [hide_numbers(text, np.arange(len(text.split(" "))) == 1) for text in texts]
    whole, there = log_probabilities(fresh.model, fresh.prompt, turns, 1.0)
    found, seen = log_probabilities(fresh.model, fresh.prompt, turns, 1.0, hidden)
    for row, (text, number) in enumerate(zip(texts, second, strict=True)):
        first = int(there[row].long().argmax())  # rows are padded on the left
        before = first + len(text.split(" ")[0]) + 1
        gone = slice(before, before + len(number))
        assert not seen[row, gone].any()
        assert seen[row].sum() == there[row].sum() - len(number)
        assert not found[row, gone].any()
        torch.testing.assert_close(found[row, :before], whole[row, :before])
        after = found[row, gone.stop + 1 :] - whole[row, gone.stop + 1 :]
        assert (after.abs() > 1e-4).any()  # it was read


def test_imitation_hides_as_much_as_it_is_told_to(fresh):
    turns, _ = drawn(fresh, 4)
    queries = [Weighed(turn, 1.0, imitated=True) for turn in turns]
    told = {}
    for share in (0.0, 1.0):
        masking = Masking(mask="number", mask_most=share, mask_none=0.0)
        learning = UpdateConfig(augmentation=masking, steps_per_round=1, learning_rate=1e-9)
        learner = Learner(fresh.model, fresh.prompt, learning, 1.0)
        told[share] = learner.learn(queries, [0])["tokens"]
        assert learner.learn(queries, [0])["tokens"] == told[share]
    assert 0.2 * told[0.0] < told[1.0] < 0.9 * told[0.0]


def test_a_chunk_ends_with_the_end_and_a_part_of_one_with_a_space():
    grammar = Grammar(30, 4)
    assert symbols_of(np.array([[3, 10]]), grammar) == [3, 10, 1, 0, 10]
    assert symbols_of(np.array([[3, 10], [0, 7]]), grammar) == [3, 10, 1, 0, 10, 0, 10, 7, 11]


@given(st.lists(st.booleans(), min_size=2, max_size=16), st.booleans())
def test_advantages_sum_to_nothing_and_follow_success(successes, scale):
    found = advantages([float(success) for success in successes], scale)
    assert abs(sum(found)) < 1e-9
    if len(set(successes)) == 1:
        assert found == [0.0] * len(successes)
    else:
        assert all((a > 0) == success for a, success in zip(found, successes, strict=True))
        if scale:
            assert np.std(found) == pytest.approx(1)


def test_episodes_without_an_advantage_are_left_out(fresh):
    turn = drawn(fresh, 1)[0][0]

    def group(*successes):
        line = {"success": False}
        return [
            Played(("a", "b", 0), {**line, "success": success}, [turn, turn])
            for success in successes
        ]

    both = [group(True, True), group(True, False)]
    for failures, wanted in ((1, [0.5, 0.5, -0.5, -0.5]), (0.5, [0.5, 0.5, -0.25, -0.25])):
        config = UpdateConfig(scale_by_deviation=False, failures=failures)
        assert [query.advantage for query in weighed(both, config)] == wanted
    found = weighed(both, UpdateConfig(scale_by_deviation=False, failures=0))
    assert [query.advantage for query in found] == [0.5, 0.5]


def test_the_clip_holds_what_has_moved_far_enough_in_the_right_direction():
    config = UpdateConfig(clip_low=0.2, clip_high=0.3)
    ratios = torch.tensor([[0.5, 1.0, 1.2, 2.0]])
    there = torch.ones_like(ratios, dtype=torch.bool)
    for advantage, kept, held in (
        (1.0, [0.5, 1.0, 1.2, 1.3], [False, False, False, True]),
        (-1.0, [0.8, 1.0, 1.2, 2.0], [True, False, False, False]),
    ):
        found, which = objective(
            ratios.log(), torch.zeros_like(ratios), there, torch.tensor([advantage]), config
        )
        np.testing.assert_allclose(found[0], [-advantage * r for r in kept], rtol=1e-6)
        assert which[0].tolist() == held
    chunk = dataclasses.replace(config, ratio="chunk")
    found, which = objective(
        ratios.log(), torch.zeros_like(ratios), there, torch.tensor([1.0]), chunk
    )
    # 0.5 * 1 * 1.2 * 2 is the ratio of the whole; all its tokens together have one loss.
    np.testing.assert_allclose(found[0].sum(), -1.2, rtol=1e-5)
    there[0, 0] = False
    assert (
        objective(ratios.log(), torch.zeros_like(ratios), there, torch.ones(1), config)[0][0, 0]
        == 0
    )


def test_what_went_better_becomes_likelier(fresh):
    turns, _ = drawn(fresh, 4)
    queries = [Weighed(turn, 1.0 if place < 2 else -1.0) for place, turn in enumerate(turns)]
    learner = Learner(
        fresh.model, fresh.prompt, UpdateConfig(learning_rate=1e-3, batch_size=3), 1.0
    )

    def sums():
        with torch.no_grad():
            return log_probabilities(fresh.model, fresh.prompt, turns, 1.0)[0].sum(1)

    before = sums()
    told = learner.learn(queries, [0, 1])
    moved = sums() - before
    assert (moved[:2] > 0).all()
    assert (moved[2:] < 0).all()
    assert told["gradient_norm"] > 0
    assert told["tokens"] > 0


def test_the_size_of_a_pass_changes_nothing_but_rounding(processor):
    ends = []
    for batch_size in (1, 4):
        policy = VLA0(tiny_model(processor, **SMALL, seed=4), processor, make_spec(bins=30))
        turns, _ = drawn(policy, 4)
        queries = [Weighed(turn, 1.0 - place) for place, turn in enumerate(turns)]
        config = UpdateConfig(
            learning_rate=1e-3, batch_size=batch_size, steps_per_round=2, epochs=2
        )
        Learner(policy.model, policy.prompt, config, 1.0).learn(queries, [3])
        ends.append(torch.cat([w.detach().flatten() for w in policy.model.parameters()]))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-3
    assert float((ends[0] - ends[1]).abs().mean()) < 1e-5


def test_what_is_imitated_is_held_by_no_clip_and_stands_beside_what_is_compared(processor):
    config = UpdateConfig(learning_rate=1e-3, steps_per_round=1, epochs=20, clip_high=0.05)
    moved, clipped = {}, {}
    for imitated in (False, True):
        policy = VLA0(tiny_model(processor, **SMALL, seed=4), processor, make_spec(bins=30))
        turns, _ = drawn(policy, 2)

        def likely(policy=policy, turns=turns):
            with torch.no_grad():
                found, _ = log_probabilities(policy.model, policy.prompt, turns, 1.0)
            return found.sum(1)

        before = likely()
        queries = [Weighed(turns[0], 1.0), Weighed(turns[1], 1.0, imitated)]
        told = Learner(policy.model, policy.prompt, config, 1.0).learn(queries, [1])
        moved[imitated], clipped[imitated] = likely() - before, told["clipped"]
    assert 0 < moved[False][1] < 0.5 * moved[True][1]
    assert 0 < clipped[True] < 0.6 * clipped[False] + 1e-9


def test_a_learner_goes_on_from_its_state_bit_for_bit(processor, tmp_path):
    def start():
        policy = VLA0(tiny_model(processor, **SMALL, seed=4), processor, make_spec(bins=30))
        config = UpdateConfig(learning_rate=1e-3)
        return policy, Learner(policy.model, policy.prompt, config, 1.0)

    policy, learner = start()
    queries = [Weighed(turn, 1.0 - place) for place, turn in enumerate(drawn(policy, 3)[0])]
    learner.learn(queries, [1])
    torch.save(learner.state(), tmp_path / "state.pt")
    learner.learn(queries, [2])
    again, other = start()
    other.load(torch.load(tmp_path / "state.pt", weights_only=True))
    other.learn(queries, [2])
    for one, two in zip(policy.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_weights_of_16_bits_follow_steps_that_are_too_small_for_them(fresh):
    model = fresh.model.to(torch.bfloat16)
    config = UpdateConfig(learning_rate=1e-5, steps_per_round=1)
    learner = Learner(model, fresh.prompt, config, 1.0)
    queries = [Weighed(turn, 1.0) for turn in drawn(fresh, 2)[0]]
    name, weight = next((n, w) for n, w in model.named_parameters() if "q_proj.weight" in n)
    first, copy = weight.detach().clone(), learner.copies[name].detach().clone()
    for turn in range(3):
        learner.learn(queries, [turn])
    moved = (learner.copies[name] - copy).abs()
    assert float(moved.detach().max()) > 2e-5  # several steps, added up
    assert torch.equal(weight, learner.copies[name].to(torch.bfloat16))
    assert float((weight.detach() - first).abs().max()) < 1e-2


def test_gradients_of_16_bits_are_added_up_in_32(processor):
    """One chunk a pass, or all at once: far apart if the sum were rounded at each pass."""
    norms = []
    for batch_size in (1, 24):
        policy = VLA0(tiny_model(processor, **SMALL, seed=4), processor, make_spec(bins=30))
        queries = [Weighed(turn, 1.0) for turn in drawn(policy, 2, num_steps=1)[0]] * 12
        model = policy.model.to(torch.bfloat16)
        config = UpdateConfig(learning_rate=1e-5, steps_per_round=1, batch_size=batch_size)
        learner = Learner(model, policy.prompt, config, 1.0)
        norms.append(learner.learn(queries, [1])["gradient_norm"])
        assert all(weight.grad is None for weight in model.parameters())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_less_memory_changes_no_weight(processor):
    ends, passes = [], []
    for checkpointing in (False, True):
        policy = VLA0(tiny_model(processor, **SMALL, seed=4), processor, make_spec(bins=30))
        queries = [Weighed(turn, 1.0 - place) for place, turn in enumerate(drawn(policy, 3)[0])]
        config = UpdateConfig(learning_rate=1e-3, gradient_checkpointing=checkpointing)
        calls, layer = [], policy.model.get_decoder().layers[0]
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        Learner(policy.model, policy.prompt, config, 1.0).learn(queries, [1])
        ends.append(torch.cat([w.detach().flatten() for w in policy.model.parameters()]))
        assert not policy.model.training
        passes.append(len(calls))
    assert passes[1] > passes[0]  # layers are computed again, in the backward pass
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)


def test_the_divergence_holds_the_model_near_its_start(processor):
    ends, told = [], {}
    for kl in (0.0, 5.0):
        policy = VLA0(tiny_model(processor, **SMALL, seed=4), processor, make_spec(bins=30))
        first = tiny_model(processor, **SMALL, seed=4).eval() if kl else None
        queries = [Weighed(turn, 1.0) for turn in drawn(policy, 2)[0]]
        config = UpdateConfig(learning_rate=3e-4, kl=kl, clip_high=10.0)
        learner = Learner(policy.model, policy.prompt, config, 1.0, first)
        for turn in range(4):
            told = learner.learn(queries, [turn])
        start = tiny_model(processor, **SMALL, seed=4)
        turns = [query.turn for query in queries]
        with torch.no_grad():
            now, was = (
                log_probabilities(m, policy.prompt, turns, 1.0)[0] for m in (policy.model, start)
            )
        ends.append(float((now - was).abs().mean()))
    assert told["kl"] > 0
    assert ends[1] < ends[0]
