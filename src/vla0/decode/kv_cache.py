"""Where a decode's keys and values lie, and a pass of fixed size as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch


class KVCache:
    """Keys and values of all layers in one tensor (layers, 2, B, heads, slots, width), written
    where it is told.

    What the language model needs of a transformers Cache. A tree's nodes lie side by side; the path
    that turns out true is moved together, all layers at once.
    """

    is_compileable = False

    def __init__(self, config: Any, rows: int, slots: int, like: torch.Tensor):
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.content = like.new_zeros((config.num_hidden_layers, 2, rows, heads, slots, width))
        # the slots that the next pass writes; it sees all up to the last of them
        self.span = slice(0, 0)
        # or (N,) their numbers; then it sees all slots there are
        self.at: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.content.shape[4]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any):
        """Writes a layer's keys and values (B, heads, L, width), and gives what the pass sees."""
        own = self.content[layer]
        if self.at is not None:
            return own[0].index_copy_(2, self.at, keys), own[1].index_copy_(2, self.at, values)
        own[0, :, :, self.span] = keys
        own[1, :, :, self.span] = values
        return own[0, :, :, : self.span.stop], own[1, :, :, : self.span.stop]

    def get_seq_length(self, layer: int = 0) -> int:
        """How many slots come before the next pass."""
        return self.span.start

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies slots source (B, n) to target (B, n) of the same row."""
        rows = torch.arange(len(source), device=source.device)[:, None]
        # Indices apart by slices: the result has them in front, (B, n, layers, 2, heads, width),
        # and so has what is assigned.
        self.content[:, :, rows, :, target] = self.content[:, :, rows, :, source]


def below(paths: torch.Tensor) -> torch.Tensor:
    """(B, N, N): which nodes a node sees, of the paths to them that vla0.decode.draft.drawn
    gives.
    """
    return torch.zeros_like(paths, dtype=torch.bool).scatter(2, paths, True)


class CudaGraph:
    """A function of tensors, captured as a CUDA graph: the same kernels, launched at once.

    Its result is overwritten.

    The function is called before: what kernels do at their first call cannot be captured. pool:
    memory that graphs share, of which one runs at a time.
    """

    def __init__(self, function: Callable[..., torch.Tensor], pool: Any, *inputs: torch.Tensor):
        self.inputs = [tensor.clone() for tensor in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The function of inputs of the same shapes, on any device."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result
