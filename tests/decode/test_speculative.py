import copy
import json
import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_observation, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from vla0 import InputError
from vla0.checkpoint.tiny import tiny_model
from vla0.core.codec import Grammar
from vla0.decode import GreedyDecoder, SpeculativeDecoder, decode, decoder
from vla0.decode import tree_size as width
from vla0.decode.draft import Draft, Expectation, Tree, after
from vla0.policy import VLA0

WAYS = {
    "one token a pass": {"tree_size": 1, "chain_fraction": 0.0},
    "forced": {"tree_size": 4, "chain_fraction": 0.0, "min_probability": 0.999, "learning": False},
    "blind": {"tree_size": 40, "chain_fraction": 0.0, "learning": False},
    "tree": {"tree_size": 16, "chain_fraction": 0.0},
    "chain": {"tree_size": 16, "chain_fraction": 1.0},
    "default": {"tree_size": 33},
}


@pytest.fixture(scope="module", params=[100, 1000, 7])
def random_policy(request, processor):
    """Policies with random weights and 1, 3 and 4 digits."""
    small = {
        "width": 48,
        "layers": 2,
        "heads": 3,
        "vision_width": 32,
        "vision_layers": 1,
        "vision_heads": 2,
    }
    spec = make_spec(bins=request.param, chunk_size=2)
    return VLA0(tiny_model(processor, **small, seed=request.param), processor, spec)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_way_writes_the_plain_decoders_tokens(random_policy, way, rows):
    policy, rng = random_policy, np.random.default_rng(0)
    fast = SpeculativeDecoder(policy.model, policy.prompt, **WAYS[way])
    for seed in range(3):
        batch = policy.prompt.observe([make_observation(10 * seed + row) for row in range(rows)])
        expected = decode(policy.model, batch, policy.prompt)
        wrong = rng.integers(0, policy.spec.bins + 1, expected.shape)
        for guesses in (None, list(expected), list(wrong), [None, *wrong[1:]]):
            np.testing.assert_array_equal(fast.decode(batch, guesses=guesses), expected)


def test_weights_that_change_are_seen(policy):
    other = VLA0(type(policy.model)(policy.model.config), policy.processor, policy.spec)
    batch = policy.prompt.observe([make_observation(0)])
    other.predict_batch([make_observation(0)])
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.normal_(0, 0.05)
    np.testing.assert_array_equal(
        other.decoder.decode(batch), decode(other.model, batch, other.prompt)
    )


def test_a_true_guess_saves_passes(random_policy):
    policy = random_policy
    batch = policy.prompt.observe([make_observation(0)])
    expected = decode(policy.model, batch, policy.prompt)
    passes = {}
    for name, guesses in {"none": None, "true": [expected[0]]}.items():
        fast = SpeculativeDecoder(
            policy.model, policy.prompt, 24, chain_fraction=1.0, learning=False
        )
        fast.decode(batch, guesses=guesses)
        passes[name] = fast.passes
    assert passes["true"] < passes["none"]
    assert passes["true"] <= 2


def test_rows_of_a_batch_do_not_touch_each_other(random_policy):
    policy = random_policy
    observations = [make_observation(seed) for seed in range(4)]
    fast = SpeculativeDecoder(policy.model, policy.prompt, 16)
    together = fast.decode(policy.prompt.observe(observations))
    for row, observation in enumerate(observations):
        np.testing.assert_array_equal(
            together[row], fast.decode(policy.prompt.observe([observation]))[0]
        )


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_both_kinds_of_attention_are_driven(policy, kind):
    batch = policy.prompt.observe([make_observation(seed) for seed in range(2)])
    expected = decode(policy.model, batch, policy.prompt)
    before = policy.model.config._attn_implementation
    try:
        policy.model.set_attn_implementation(kind)
        np.testing.assert_array_equal(
            SpeculativeDecoder(policy.model, policy.prompt, 16).decode(batch), expected
        )
    finally:
        policy.model.set_attn_implementation(before)


def test_stopping_early_changes_no_number_and_saves_passes(policy):
    fast = SpeculativeDecoder(policy.model, policy.prompt, 4)
    batch = policy.prompt.observe([make_observation(0)])
    whole = fast.decode(batch)
    most = fast.passes
    np.testing.assert_array_equal(fast.decode(batch, 1), whole[:, :1])
    assert fast.passes < most


def test_a_stream_gives_each_step_once_and_the_first_before_the_last_pass(policy):
    observation = make_observation(0)
    policy = VLA0(policy.model, policy.processor, policy.spec)
    policy.decoder = SpeculativeDecoder(policy.model, policy.prompt, 4)
    passes, at = [], []
    hook = policy.model.model.language_model.register_forward_pre_hook(lambda *_: passes.append(1))
    stream = []
    for action in policy.predict_stream(observation):
        stream.append(action)
        at.append(len(passes))
    hook.remove()
    np.testing.assert_array_equal(stream, policy.predict_batch([observation])[0])
    assert at[0] < at[-1]
    assert len(list(policy.predict_stream(observation, 2))) == 2


def test_a_stream_that_another_decode_has_overtaken_says_so(policy):
    decoder, batch = (
        SpeculativeDecoder(policy.model, policy.prompt, 4),
        policy.prompt.observe([make_observation(0)]),
    )
    stream = decoder.stream(batch)
    next(stream)
    whole = decoder.decode(batch)
    with pytest.raises(InputError, match="one stream at a time"):
        list(stream)
    np.testing.assert_array_equal(decoder.decode(batch), whole)


def test_what_was_expected_changes_no_action(policy):
    observation = make_observation(0)
    actions = policy.predict_batch([observation])
    for expected in (actions[0], actions[0][:1], -actions[0]):
        seen = make_observation(0)
        object.__setattr__(seen, "draft_actions", expected)
        np.testing.assert_array_equal(policy.predict_batch([seen]), actions)


@pytest.mark.parametrize(
    "expected",
    [np.zeros((0, 3)), np.zeros((4, 3)), np.zeros((2, 2)), np.zeros(3), np.full((1, 3), np.nan)],
)
def test_an_expectation_of_another_shape_is_refused(policy, expected):
    seen = make_observation(0)
    object.__setattr__(seen, "draft_actions", expected)
    with pytest.raises(InputError):
        policy.predict_batch([seen])


def test_a_guess_of_another_shape_is_refused(policy):
    batch = policy.prompt.observe([make_observation(0)])
    with pytest.raises(InputError, match="guess of shape"):
        SpeculativeDecoder(policy.model, policy.prompt, 4).decode(
            batch, guesses=[np.zeros((1, 3), np.int64)]
        )


def test_a_model_that_the_engine_cannot_drive_is_decoded_plainly_and_the_log_says_so(
    policy, caplog
):
    other = copy.deepcopy(policy.model)
    other.config.get_text_config()._attn_implementation = "flex_attention"
    with caplog.at_level(logging.WARNING):
        found = decoder(other, policy.prompt)
    assert isinstance(found, GreedyDecoder)
    assert "'flex_attention', which takes no mask of a tree" in caplog.text
    assert isinstance(decoder(policy.model, policy.prompt), SpeculativeDecoder)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_tree_holds_only_what_the_grammar_allows_each_node_once(data):
    bins, numbers = (
        data.draw(st.sampled_from([1, 5, 9, 10, 42, 100, 250, 1000])),
        data.draw(st.integers(1, 4)),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    expectation = Expectation(numbers, 1, bins)
    guess = rng.integers(0, bins + 1, (numbers, 1)) if data.draw(st.booleans()) else None
    grammar = Grammar(bins, numbers)
    draft = Draft(grammar, expectation.prior(guess), numbers)
    size, tail = data.draw(st.integers(1, 80)), data.draw(st.integers(0, 80))
    tree = draft.grow(0, grammar.start, size, min(tail, size))
    assert len(tree) <= size
    assert len(set(zip(tree.parents, tree.symbols, strict=True))) == len(tree)
    for node in range(1, len(tree)):
        parent, symbol = tree.parents[node], tree.symbols[node]
        assert parent < node
        assert tree.children[parent][symbol] == node
        assert (
            tree.states[node]
            == grammar.advance(tree.states[parent], symbol)
            == after(tree.states[parent], symbol)
        )
        assert tree.states[node][0] < numbers


@given(st.sampled_from([1, 5, 9, 10, 42, 99, 100, 250, 999, 1000, 1001]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_share_of_a_symbol_is_that_of_the_levels_that_begin_so(bins, seed):
    prior = np.random.default_rng(seed).random((1, bins + 1))
    grammar, draft = Grammar(bins, 1), None
    draft = Draft(grammar, prior, 1)
    for digits in {"", "0", "1", str(bins), str(bins)[:-1]}:
        state = (0, digits)
        symbols, shares = draft.next(state)
        assert sorted(symbols) == list(grammar.allowed(state))
        assert sum(shares) == pytest.approx(1)
        begin = (
            [prior[0, v] for v in range(bins + 1) if str(v).startswith(digits)]
            if digits
            else prior[0]
        )
        for symbol, share in zip(symbols, shares, strict=True):
            more = digits + str(symbol)
            own = (
                prior[0, int(digits)]
                if symbol >= 10
                else sum(prior[0, v] for v in range(bins + 1) if str(v).startswith(more))
            )
            assert share == pytest.approx(own / sum(begin))


def test_the_walk_follows_the_picks_as_far_as_the_tree_goes():
    tree = Tree.of(0, (0, ""))
    one = tree.add(0, 1)
    two = tree.add(one, 2)
    tree.add(0, 3)
    assert tree.walk([1, 2, 10, 0]) == ([0, one, two], 10)
    assert tree.walk([4, 2, 10, 0]) == ([0], 4)
    assert tree.add(0, 1) == one


def test_expectations_learn_how_far_chunks_are_from_their_guess():
    expectation = Expectation(2, 2, 100)
    for _ in range(60):
        expectation.learn(np.array([[50, 10], [50, 12]]), np.array([[50, 30], [50, 32]]))
    assert expectation.spread[0] < 1
    assert expectation.spread[1] == pytest.approx(20, abs=1)
    prior = expectation.prior(np.full((2, 2), 50))
    np.testing.assert_allclose(prior.sum(1), 1)
    assert prior.min() > 0
    assert prior[0].argmax() == 50


def test_the_width_is_measured_once_and_kept(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured, engine = [], policy.decoder.engine
    monkeypatch.setattr(
        width, "measure", lambda model: measured.append(1) or {1: 1.0, 8: 1.2, 16: 9.0}
    )
    assert width.measured_tree_size(engine) == width.measured_tree_size(engine) == 8
    assert len(measured) == 1
    width.measured_tree_size(engine, fresh=True)
    width.cache_file().write_text("{")
    assert width.measured_tree_size(engine) == 8
    assert len(measured) == 3
    assert json.loads(width.cache_file().read_text())


def test_measuring_compiles_nothing(policy, tmp_path, monkeypatch):
    """There are more sizes than torch compiles one function for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *a: compiled.append(a))
    fast = SpeculativeDecoder(policy.model, policy.prompt, compiled=True)
    assert fast.nodes(1) in width.SIZES
    assert not compiled


def test_a_compiled_policy_answers_prompts_of_more_sizes_than_torch_compiles_by_itself(
    policy, monkeypatch
):
    """Each size of a pass is a compilation; after eight of one function torch raises."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    compiled = VLA0(policy.model, policy.processor, policy.spec).compile()
    compiled.decoder.tree_size = 8
    for words in range(0, 500, 80):
        seen = replace(make_observation(words), instruction="go " + "on " * words)
        np.testing.assert_array_equal(compiled.predict_batch([seen]), policy.predict_batch([seen]))
    with pytest.raises(InputError, match="exact policy, to compile"):
        policy.approximate("relaxed").compile()


def test_a_row_of_many_gets_fewer_nodes_where_nodes_cost_and_as_many_where_they_do_not():
    dear = {1: 1.4, 2: 1.5, 4: 1.6, 8: 1.8, 16: 2.3, 32: 3.2, 64: 4.9}
    assert [width.best(dear, rows) for rows in (1, 3, 8, 32)] == [16, 8, 4, 2]
    free = dict.fromkeys((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), 1.0)
    assert [width.best(free, rows) for rows in (1, 4, 512)] == [512, 128, 1]


def test_the_measurement_times_passes(policy):
    times = width.measure(policy.decoder.engine)
    assert list(times) == [n for n in width.SIZES if n in times]
    assert min(times.values()) > 0


def test_the_engine_works_in_bf16_too(policy):
    half = VLA0(
        type(policy.model)(policy.model.config).to(torch.bfloat16), policy.processor, policy.spec
    )
    batch = half.prompt.observe([make_observation(0)])
    levels = SpeculativeDecoder(half.model, half.prompt, 16).decode(batch)
    assert levels.shape == (1, half.spec.chunk_size, half.spec.dimensions)
