"""In 16 bits, too: what is written does not depend on what else was guessed."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_observation, make_spec

pytest.importorskip("triton")

from vla0.checkpoint.tiny import tiny_model
from vla0.decode import SpeculativeDecoder, decode
from vla0.decode import speculative as fast_module
from vla0.decode.invariant import Trees, broken, gathered
from vla0.policy import VLA0

SMALL = {
    "width": 48,
    "layers": 2,
    "heads": 3,
    "vision_width": 32,
    "vision_layers": 1,
    "vision_heads": 2,
}


class Heard(SpeculativeDecoder):
    """Remembers what the model said at each symbol that was written."""

    def _advance(self, row, tree, picks, shares):
        path = super()._advance(row, tree, picks, shares)
        self.shares = [*getattr(self, "shares", []), *(shares[node] for node in path)]
        return path


def random_trees(seed, rows=2, nodes=9, slots=140, heads=6, kinds=2, width=24, dtype=torch.float32):
    """Queries, keys, values, and where trees of random shapes find theirs."""
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, heads, nodes, width, generator=draw).to(dtype)
    keys, values = torch.randn(2, rows, kinds, slots, width, generator=draw).to(dtype)
    paths, depths = (
        torch.arange(nodes).view(1, nodes, 1).repeat(rows, 1, nodes),
        torch.zeros(rows, nodes, dtype=torch.long),
    )
    for row in range(rows):
        for node in range(1, nodes):
            parent = int(torch.randint(0, node, (1,), generator=draw))
            depth = int(depths[row, parent]) + 1
            depths[row, node] = depth
            paths[row, node, :depth] = paths[row, parent, :depth]
    base = slots - nodes
    accepted, first = base - 5 * torch.arange(rows), 3 * torch.arange(rows)
    return query, keys, values, Trees(torch.tensor([base]), first, accepted, depths, paths)


def side_by_side(row, node, keys, values, trees):
    """The same node alone: its ancestors lie in the slots in which they would be written."""
    depth, base = int(trees.depths[row, node]), int(trees.accepted[row])
    own = int(trees.base) + trees.paths[row, node, : depth + 1]
    keys, values = keys[row : row + 1].clone(), values[row : row + 1].clone()
    for content in (keys, values):
        content[:, :, base : base + depth + 1] = content[:, :, own]
    alone = Trees(
        torch.tensor([base + depth]), trees.first[row : row + 1], torch.tensor([base + depth]),
        torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 1, dtype=torch.long),
    )  # fmt: skip
    return keys, values, alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_node_s_attention_is_what_it_would_be_alone_bit_for_bit(dtype):
    query, keys, values, trees = random_trees(0, dtype=dtype)
    whole = gathered(query, keys, values, trees, 0.2)
    for row in range(2):
        for node in range(query.shape[2]):
            own = query[row : row + 1, :, node : node + 1]
            alone = gathered(own, *side_by_side(row, node, keys, values, trees), 0.2)
            assert torch.equal(alone[0, 0], whole[row, node])


def test_the_kernel_gives_what_copying_gives_and_depends_on_no_other_node():
    """By Triton's interpreter, which runs a kernel without a GPU; it has to be asked for before
    Triton is imported.
    """
    program = """
import torch, test_invariant as t
from vla0.decode.invariant import broken, gathered, launched
assert broken(torch.device("cpu"), torch.float16) is None
for seed, dtype, near in ((0, torch.float32, 1e-5), (1, torch.float16, 2e-3)):
    query, keys, values, trees = t.random_trees(seed, dtype=dtype)
    whole = launched(query, keys, values, trees, 0.2)
    torch.testing.assert_close(whole, gathered(query, keys, values, trees, 0.2), rtol=near, atol=near)
    for row, node in ((0, 3), (0, 8), (1, 5)):
        own = query[row : row + 1, :, node : node + 1]
        alone = launched(own, *t.side_by_side(row, node, keys, values, trees), 0.2)
        assert torch.equal(alone[0, 0], whole[row, node])
print("fine")
"""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(
            (os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)))
        ),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


def test_where_the_kernel_cannot_run_it_says_so_and_decoding_goes_on_without(small, caplog):
    reason = broken(torch.device("cpu"), torch.bfloat16)  # nothing runs a kernel there
    assert reason is not None
    with caplog.at_level(logging.WARNING):
        assert not fast_module._steady(small.model)
    assert caplog.text.count("may depend on other guesses") == 1


@pytest.fixture(scope="module")
def small(processor):
    return VLA0(
        tiny_model(processor, **SMALL, seed=3), processor, make_spec(bins=100, chunk_size=2)
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_invariant_passes_write_the_tokens_of_plain_decoding(small, rows):
    fast = SpeculativeDecoder(small.model, small.prompt, 12, invariant=True)
    for seed in range(3):
        batch = small.prompt.observe([make_observation(10 * seed + row) for row in range(rows)])
        np.testing.assert_array_equal(fast.decode(batch), decode(small.model, batch, small.prompt))


@pytest.mark.parametrize("rows", [1, 3])
def test_in_bf16_a_guess_that_was_right_leaves_what_no_guess_leaves_bit_for_bit(small, rows):
    model = tiny_model(small.processor, **SMALL, seed=3).to(torch.bfloat16)
    plain = Heard(model, small.prompt, 12, plain=True, invariant=True)
    fast = Heard(model, small.prompt, 12, invariant=True)
    for seed in range(4):
        batch = small.prompt.observe([make_observation(10 * seed + row) for row in range(rows)])
        expected = plain.decode(batch)
        np.testing.assert_array_equal(fast.decode(batch, guesses=list(expected)), expected)
        assert fast.passes < plain.passes
    if rows == 1:  # of several the order differs
        np.testing.assert_array_equal(fast.shares, plain.shares)


@pytest.mark.slow
@pytest.mark.parametrize("invariant", [False, True])
def test_compiled_layers_write_the_same_tokens_and_leave_the_model_alone(small, invariant):
    before = [type(layer) for layer in small.model.model.language_model.layers]
    fast = SpeculativeDecoder(small.model, small.prompt, 12, compiled=True, invariant=invariant)
    for seed in range(3):
        batch = small.prompt.observe([make_observation(seed)])
        np.testing.assert_array_equal(fast.decode(batch), decode(small.model, batch, small.prompt))
    assert [type(layer) for layer in small.model.model.language_model.layers] == before
    assert not any("_orig_mod" in name for name in small.model.state_dict())
