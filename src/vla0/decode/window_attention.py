"""Compute the windowed attention of a vision tower for all windows of one size at once.

transformers computes one window after another. A picture of 224 x 448 has eight windows in each of
28 blocks, and a launch for each of them takes most of the tower's time, in training and in acting.
The products and sums here are the same. They go through transformers' public interface for
attention functions.
"""

from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

# For names with "flash", transformers makes one call for all windows, and passes their ends.
NAME = "vla0_flash_windows"


def attend_in_windows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q: Any = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Let tokens attend to the tokens of their window.

    Args:
        module: The attention module; it is not read.
        query: (1, heads, N, width).
        key: (1, heads, N, width).
        value: (1, heads, N, width).
        attention_mask: Not read.
        scaling: The factor of the scores. None takes that of SDPA.
        dropout: The dropout of the shares.
        cu_seq_lens_q: Where each window begins, and the end of the last: a tensor, or Ends.

    Returns:
        (1, N, heads, width), and None for the weights.
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
        attended = _batched(
            query[:, :, rows], key[:, :, rows], value[:, :, rows], length, scaling, dropout
        )
        out = out.index_copy(1, rows, attended.reshape(1, -1, heads, width))
    return out, None


def _batched(query, key, value, length: int, scaling: float | None, dropout: float) -> torch.Tensor:
    """Attend in windows of one length, and return (windows, length, heads, width)."""
    heads, tokens, width = query.shape[1:]
    apart = (
        tensor.view(heads, tokens // length, length, width).transpose(0, 1)
        for tensor in (query, key, value)
    )
    return scaled_dot_product_attention(*apart, dropout_p=dropout, scale=scaling).transpose(1, 2)


class Ends:
    """Where windows end, known to the host.

    It replaces the tensor that a tower passes to its blocks. They compute the lengths from it by
    `(ends[1:] - ends[:-1]).tolist()`. This class answers that without a wait for the device.

    Args:
        ends: Where each window begins, and the end of the last.
        device: Where the tokens are.
    """

    def __init__(self, ends: torch.Tensor, device: torch.device):
        places = ends.tolist()
        self.lengths = [end - start for start, end in pairwise(places)]
        # for each size of window: its length, and the tokens of all such windows
        self.groups: list[tuple[int, torch.Tensor]] = []
        for length in dict.fromkeys(self.lengths):
            starts = torch.tensor(
                [
                    start
                    for start, window_length in zip(places, self.lengths, strict=False)
                    if window_length == length
                ]
            )
            self.groups.append(
                (length, (starts[:, None] + torch.arange(length)).flatten().to(device))
            )

    def __getitem__(self, _: slice) -> "Ends":
        return self

    def __sub__(self, _: "Ends") -> "Ends":
        return self

    def tolist(self) -> list[int]:
        """Return the lengths of the windows."""
        return self.lengths

    def max(self) -> int:
        """Return the length of the longest window."""
        return max(self.lengths)


# The last tensors. All blocks ask for the same one, and only the first block waits for the device.
_seen: list[tuple[torch.Tensor, Ends]] = []


@torch.compiler.disable()  # a graph breaks here, and nowhere else
def _groups(ends: torch.Tensor, device: torch.device) -> list[tuple[int, torch.Tensor]]:
    """Return the groups of a tensor of ends, remembered for the last few tensors."""
    for known_ends, host_ends in tuple(_seen):
        if known_ends is ends:
            return host_ends.groups
    host_ends = Ends(ends, device)
    _seen.append((ends, host_ends))
    del _seen[:-4]
    return host_ends.groups  # the last item of _seen may be another thread's by now


def in_windows(model: Any) -> Any:
    """Let a model's vision tower attend in all windows at once, where it uses SDPA in windows.

    Only the configuration of the tower's attention modules changes. The model's configuration,
    which is saved, stays as it is.

    Returns:
        The same model.
    """
    vision: Any = getattr(model.config, "vision_config", None)
    if not hasattr(vision, "window_size") or vision._attn_implementation != "sdpa":
        return model
    attention_config = copy(vision)
    attention_config._attn_implementation = NAME
    for block in model.model.visual.blocks:
        if block.attn.config is vision:
            block.attn.config = attention_config
            block.attn.register_forward_pre_hook(_without_lengths, with_kwargs=True)
    return model


def _without_lengths(
    _: Any, inputs: tuple[Any, ...], arguments: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Set the length of the longest window to 0 where it is not given; it is not read here.

    Later versions of transformers would ask the device for it in each block, and wait.
    """
    return inputs, {**arguments, "max_seqlen": arguments.get("max_seqlen") or 0}


AttentionInterface.register(NAME, attend_in_windows)
