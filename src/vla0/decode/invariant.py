# ruff: noqa: N803 - what a kernel is compiled for is written in capitals, as Triton's users do
"""Attention of a tree's nodes that rounds the same whatever else is in the tree.

In bf16 a sum depends on the order of its terms. Where a node's ancestors lie scattered among other
guesses, SDPA adds them up in other groups than where they lie side by side, and a choice between
two likely symbols may fall the other way. Here each node reads its own path in the order in which
it would be written, so that a guess that was right leaves what no guess at all would have left, bit
for bit. The rest of a pass rounds row by row as long as its shape is the same.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "vla0_tree"
BLOCK = 64  # keys at a time


class Trees(NamedTuple):
    """Where nodes of trees find their keys and values. It goes in place of a mask."""

    base: torch.Tensor  # (1,) slot of each row's node 0; node n lies n slots behind
    first: torch.Tensor  # (B,) slots before it are padding
    # (B,) slots of the row's own before node 0; those between it and base are nobody's
    accepted: torch.Tensor
    depths: torch.Tensor  # (B, N)
    paths: torch.Tensor  # (B, N, N): a node's ancestors from node 0 on, at its depth itself


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Trees,
    scaling: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """((B, N, heads, width), None) of queries (B, heads, N, width), keys and values (B, key heads,
    slots, width).
    """
    factor: float = scaling or query.shape[-1] ** -0.5
    if query.device.type == "cuda":
        return launched(query, key, value, attention_mask, factor), None
    return gathered(query, key, value, attention_mask, factor), None


@lru_cache
def broken(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be used on a device, tried on a few numbers; None where it does what
    copying does.
    """
    draw = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, n, m, 32, generator=draw, device=device).to(dtype)
        for n, m in ((4, 3), (2, 80), (2, 80))
    )
    numbers = {"dtype": torch.long, "device": device}
    paths = torch.tensor([[[0, 0, 0], [0, 1, 1], [0, 2, 2]]], **numbers)
    base, first, accepted = (torch.tensor([n], **numbers) for n in (70, 2, 68))
    trees = Trees(base, first, accepted, torch.tensor([[0, 1, 1]], **numbers), paths)
    try:
        one, other = (way(query, key, value, trees, 0.2).float() for way in (launched, gathered))
    except Exception as error:
        # no compiler for what Triton writes, a card that it does not know, ...
        return (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            if str(error).strip()
            else repr(error)
        )
    off = float((one - other).abs().max())
    return None if off < 0.05 else f"it is off by {off:.2g}"


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """A language model's attention by `attend`, for a pass. config: the language model's."""
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def gathered(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, trees: Trees, scaling: float
) -> torch.Tensor:
    """The same by copying each node's keys: slow, for machines without Triton and as its
    measure.
    """
    rows, heads, nodes, width = query.shape
    slots, groups = key.shape[2], heads // key.shape[1]
    place = torch.arange(slots, device=query.device).expand(rows, nodes, slots)
    accepted = trees.accepted[:, None, None]
    own = trees.base + trees.paths.gather(2, (place - accepted).clamp(0, nodes - 1))
    slot = torch.where(place < accepted, place, own).clamp(max=slots - 1)
    seen = (place >= trees.first[:, None, None]) & (place <= accepted + trees.depths[..., None])
    out = query.new_empty(rows, nodes, heads, width)
    for row in range(rows):
        # (N, key heads, slots, width)
        keys, values = (content[row][:, slot[row]].transpose(0, 1) for content in (key, value))
        keys, values = (content.repeat_interleave(groups, 1) for content in (keys, values))
        told = query[row].transpose(0, 1)[:, :, None]  # (N, heads, 1, width)
        out[row] = scaled_dot_product_attention(
            told, keys, values, seen[row][:, None, None], scale=scaling
        )[:, :, 0]
    return out


def launched(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, trees: Trees, scaling: float
) -> torch.Tensor:
    """By a kernel that reads each node's keys where they lie."""
    rows, heads, nodes, width = query.shape
    groups = heads // key.shape[1]
    out = torch.empty((rows, nodes, heads, width), dtype=query.dtype, device=query.device)
    kernel: Any = _attend_tree
    kernel[(nodes, key.shape[1], rows)](
        query,
        key,
        value,
        out,
        trees.base,
        trees.first,
        trees.accepted,
        trees.depths,
        trees.paths,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        nodes,
        GROUPS=groups,
        PADDED=max(16, triton.next_power_of_2(groups)),
        WIDTH=width,
        WIDE=triton.next_power_of_2(width),
        HEADS=heads,
        BLOCK=BLOCK,
        PRECISE=query.dtype == torch.float32,
        # known when it is compiled: torch.compile would hand it over in float64
        SCALING=scaling * math.log2(math.e),
        num_warps=4,
        num_stages=2,
    )
    return out


@triton.jit
def _attend_tree(
    query,
    key,
    value,
    out,
    base,
    first,
    accepted,
    depths,
    paths,
    query_row,
    query_head,
    query_node,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    nodes,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISE: tl.constexpr,
    SCALING: tl.constexpr,
):
    # One node, the query heads of one key head. Blocks of keys are of places, not of slots: the
    # same in every tree.
    node, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group, wide = tl.arange(0, PADDED), tl.arange(0, WIDE)
    real, inside = group < GROUPS, wide < WIDTH
    heads = head * GROUPS + group
    own = query + row * query_row + heads[:, None] * query_head + node * query_node + wide[None, :]
    asked = tl.load(own, mask=real[:, None] & inside[None, :], other=0.0)
    start, before = tl.load(base), tl.load(accepted + row)
    begin = tl.load(first + row)
    end = before + tl.load(depths + row * nodes + node) + 1
    most = tl.full((PADDED,), -1.0e30, tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    sums = tl.zeros((PADDED, WIDE), tl.float32)
    for at in range(0, end, BLOCK):
        place = at + tl.arange(0, BLOCK)
        seen = (place >= begin) & (place < end)
        guessed = place >= before
        path = tl.load(
            paths + (row * nodes + node) * nodes + place - before, mask=guessed & seen, other=0
        )
        slot = tl.where(guessed, start + path, place)
        key_at = key + row * key_row + head * key_head + slot[:, None] * key_slot + wide[None, :]
        value_at = (
            value + row * value_row + head * value_head + slot[:, None] * value_slot + wide[None, :]
        )
        keys = tl.load(key_at, mask=seen[:, None] & inside[None, :], other=0.0)
        values = tl.load(value_at, mask=seen[:, None] & inside[None, :], other=0.0)
        if PRECISE:
            scores = tl.dot(asked, tl.trans(keys), input_precision="ieee") * SCALING
        else:
            scores = tl.dot(asked, tl.trans(keys)) * SCALING
        scores = tl.where(seen[None, :], scores, -1.0e30)
        higher = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - higher)
        shares = tl.where(seen[None, :], tl.exp2(scores - higher[:, None]), 0.0)
        total = total * shrink + tl.sum(shares, 1)
        sums = sums * shrink[:, None]
        if PRECISE:
            sums += tl.dot(shares, values, input_precision="ieee")
        else:
            sums += tl.dot(shares.to(values.dtype), values)
        most = higher
    result = sums / total[:, None]
    target = out + ((row * nodes + node) * HEADS + heads[:, None]) * WIDTH + wide[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


AttentionInterface.register(NAME, attend)
