"""Attention of a vision tower in windows: all windows of one size at once, where transformers takes
them one after another.

A picture of 224 x 448 has eight windows in each of 28 blocks; a launch for each of them is most of
the tower's time, in training and in acting. The same products and sums, through transformers'
public interface for attention functions.
"""

from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

# of names with "flash" transformers asks one call for all windows, and their ends
NAME = "vla0_flash_windows"


def attend_in_windows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q: Any = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """((1, N, heads, width), None): attention of tokens (1, heads, N, width) to those of their own
    window.

    cu_seq_lens_q: where each window begins, and the end: a tensor, or Ends.
    """
    groups = (
        cu_seq_lens_q.groups
        if isinstance(cu_seq_lens_q, Ends)
        else _groups(cu_seq_lens_q, query.device)
    )
    heads, tokens, width = query.shape[1:]
    if len(groups) == 1:  # all windows are of one size
        return _batched(query, key, value, groups[0][0], scaling, dropout).reshape(
            1, tokens, heads, width
        ), None
    out = query.new_empty(1, tokens, heads, width)
    for length, rows in groups:
        own = _batched(
            query[:, :, rows], key[:, :, rows], value[:, :, rows], length, scaling, dropout
        )
        out = out.index_copy(1, rows, own.reshape(1, -1, heads, width))
    return out, None


def _batched(query, key, value, length: int, scaling: float | None, dropout: float) -> torch.Tensor:
    """(windows, length, heads, width)."""
    heads, tokens, width = query.shape[1:]
    apart = (
        tensor.view(heads, tokens // length, length, width).transpose(0, 1)
        for tensor in (query, key, value)
    )
    return scaled_dot_product_attention(*apart, dropout_p=dropout, scale=scaling).transpose(1, 2)


class Ends:
    """Where windows end, known to the host: in place of the tensor that a tower's blocks are told.

    They take it apart to learn the lengths, `(ends[1:] - ends[:-1]).tolist()`; it answers that, and
    no device is asked.
    """

    def __init__(self, ends: torch.Tensor, device: torch.device):
        places = ends.tolist()
        self.lengths = [end - start for start, end in pairwise(places)]
        # (length, which tokens) of the windows of each size
        self.groups: list[tuple[int, torch.Tensor]] = []
        for length in dict.fromkeys(self.lengths):
            starts = torch.tensor(
                [start for start, own in zip(places, self.lengths, strict=False) if own == length]
            )
            self.groups.append(
                (length, (starts[:, None] + torch.arange(length)).flatten().to(device))
            )

    def __getitem__(self, _: slice) -> "Ends":
        return self

    def __sub__(self, _: "Ends") -> "Ends":
        return self

    def tolist(self) -> list[int]:
        """Lengths."""
        return self.lengths

    def max(self) -> int:
        """The longest."""
        return max(self.lengths)


# the last tensors: each block asks for the same, and only the first one waits
_seen: list[tuple[torch.Tensor, Ends]] = []


@torch.compiler.disable()  # a graph breaks here, and nowhere else
def _groups(ends: torch.Tensor, device: torch.device) -> list[tuple[int, torch.Tensor]]:
    for known, found in tuple(_seen):
        if known is ends:
            return found.groups
    found = Ends(ends, device)
    _seen.append((ends, found))
    del _seen[:-4]
    return found.groups  # not the list's last: that may be another thread's by now


def in_windows(model: Any) -> Any:
    """The model, its vision tower's attention by all windows at once; as it is where that is not
    SDPA in windows.

    Only the tower's attention modules are told; the model's own configuration, which is saved,
    stays as it is.
    """
    vision: Any = getattr(model.config, "vision_config", None)
    if not hasattr(vision, "window_size") or vision._attn_implementation != "sdpa":
        return model
    told = copy(vision)
    told._attn_implementation = NAME
    for block in model.model.visual.blocks:
        if block.attn.config is vision:
            block.attn.config = told
            block.attn.register_forward_pre_hook(_without_lengths, with_kwargs=True)
    return model


def _without_lengths(
    _: Any, given: tuple[Any, ...], told: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Later transformers ask the device for the longest window in each block, and wait for it;
    nobody reads it here.
    """
    return given, {**told, "max_seqlen": told.get("max_seqlen") or 0}


AttentionInterface.register(NAME, attend_in_windows)
