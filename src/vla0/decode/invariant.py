# ruff: noqa: N803 - constants of a Triton kernel are in capitals, as is usual
"""Compute attention of a tree's nodes that rounds the same, whatever else is in the tree.

In bf16 a sum depends on the order of its terms. Where a node's ancestors lie scattered among other
guesses, SDPA groups the terms differently than where they lie side by side, and a choice between
two likely symbols may change. Here each node reads the keys of its path in the order in which they
would be written. A right guess therefore gives, bit for bit, what decoding without guesses gives.
The rest of a pass rounds each row by itself as long as the shape of the pass is the same.
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

from vla0.errors import said

NAME = "vla0_tree"
BLOCK = 64  # keys at a time


class Trees(NamedTuple):
    """Where the nodes of trees find their keys and values. It is passed in place of a mask."""

    base: torch.Tensor  # (1,) slot of node 0 in each row; node n lies n slots behind it
    first: torch.Tensor  # (B,) the first slot that is not padding
    # (B,) the first slot after the row's accepted tokens; slots from there to base are unused
    accepted: torch.Tensor
    depths: torch.Tensor  # (B, N)
    paths: torch.Tensor  # (B, N, N): a node's ancestors from node 0 on, and then the node itself


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Trees,
    scaling: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Let each node attend to its path and to what was accepted before it.

    Args:
        module: The attention module; it is not read.
        query: (B, heads, N, width).
        key: (B, key heads, slots, width).
        value: (B, key heads, slots, width).
        attention_mask: Where the nodes find their keys and values.
        scaling: The factor of the scores. None means width ** -0.5.

    Returns:
        (B, N, heads, width), and None for the weights.
    """
    factor: float = scaling or query.shape[-1] ** -0.5
    if query.device.type == "cuda":
        return launched(query, key, value, attention_mask, factor), None
    return gathered(query, key, value, attention_mask, factor), None


@lru_cache
def broken(device: torch.device, dtype: torch.dtype) -> str | None:
    """Try the kernel on a few numbers, and compare it with `gathered`.

    Returns:
        Why the kernel cannot be used on this device, or None where it can.
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
        result, expected = (
            attention(query, key, value, trees, 0.2).float() for attention in (launched, gathered)
        )
    except Exception as error:
        # e.g. there is no compiler for Triton's code, or Triton does not know the GPU
        return said(error)
    off = float((result - expected).abs().max())
    return None if off < 0.05 else f"it is off by {off:.2g}"


@contextmanager
def attending(config: Any) -> Iterator[None]:
    """Let a language model with this config use `attend` while the context is open."""
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def gathered(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, trees: Trees, scaling: float
) -> torch.Tensor:
    """Compute attention by copying each node's keys, one node at a time.

    This is slow. It serves machines without a GPU, and the kernel is compared with it. Nodes do not
    share a call, because some CPUs round a product of one node other than a product of several.
    """
    rows, heads, nodes, width = query.shape
    slots, groups = key.shape[2], heads // key.shape[1]
    place = torch.arange(slots, device=query.device).expand(rows, nodes, slots)
    accepted = trees.accepted[:, None, None]
    path_slot = trees.base + trees.paths.gather(2, (place - accepted).clamp(0, nodes - 1))
    slot = torch.where(place < accepted, place, path_slot).clamp(max=slots - 1)
    seen = (place >= trees.first[:, None, None]) & (place <= accepted + trees.depths[..., None])
    out = query.new_empty(rows, nodes, heads, width)
    for row in range(rows):
        # (N, key heads, slots, width)
        keys, values = (content[row][:, slot[row]].transpose(0, 1) for content in (key, value))
        keys, values = (content.repeat_interleave(groups, 1) for content in (keys, values))
        for node in range(nodes):
            one = slice(node, node + 1)
            queries = query[row, :, one].contiguous()[None]  # (1, heads, 1, width)
            mask = seen[row, one][:, None, None]
            out[row, node] = scaled_dot_product_attention(
                queries, keys[one], values[one], mask, scale=scaling
            )[0, :, 0]
    return out


def launched(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, trees: Trees, scaling: float
) -> torch.Tensor:
    """Compute attention by a kernel that reads each node's keys where they lie."""
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
        # It is a constant of the kernel, because torch.compile would pass it as float64.
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
    # Each program computes one node for the query heads of one key head. Keys are read in blocks of
    # places on the path, not of slots, so that the blocks are the same in every tree.
    node, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group, wide = tl.arange(0, PADDED), tl.arange(0, WIDE)
    real, inside = group < GROUPS, wide < WIDTH
    heads = head * GROUPS + group
    query_at = (
        query + row * query_row + heads[:, None] * query_head + node * query_node + wide[None, :]
    )
    queries = tl.load(query_at, mask=real[:, None] & inside[None, :], other=0.0)
    start, before = tl.load(base), tl.load(accepted + row)
    begin = tl.load(first + row)
    end = before + tl.load(depths + row * nodes + node) + 1
    maximum = tl.full((PADDED,), -1.0e30, tl.float32)
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
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * SCALING
        else:
            scores = tl.dot(queries, tl.trans(keys)) * SCALING
        scores = tl.where(seen[None, :], scores, -1.0e30)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - new_maximum)
        shares = tl.where(seen[None, :], tl.exp2(scores - new_maximum[:, None]), 0.0)
        total = total * shrink + tl.sum(shares, 1)
        sums = sums * shrink[:, None]
        if PRECISE:
            sums += tl.dot(shares, values, input_precision="ieee")
        else:
            sums += tl.dot(shares.to(values.dtype), values)
        maximum = new_maximum
    result = sums / total[:, None]
    target = out + ((row * nodes + node) * HEADS + heads[:, None]) * WIDTH + wide[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])


AttentionInterface.register(NAME, attend)
