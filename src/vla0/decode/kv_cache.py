"""Hold the keys and values of a decode, and capture a pass of fixed size as a CUDA graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class KVCache:
    """Keys and values of all layers, for passes over trees.

    It has what a language model needs of a transformers Cache. The nodes of a tree lie side by
    side; the accepted path is then moved together in all layers at once. Before each pass, `span`
    or `at` must name the slots that the pass writes.

    Args:
        shapes: For each layer, its heads and their width. Layers of one shape share a tensor
            (layers, 2, B, heads, slots, width).
        rows: B.
        slots: Slots of each row.
        like: A tensor whose number format and device the cache takes.
    """

    is_compileable = False

    def __init__(
        self, shapes: Sequence[tuple[int, int]], rows: int, slots: int, like: torch.Tensor
    ):
        self.slots = slots
        self.tensors: list[torch.Tensor] = []
        places: dict[int, torch.Tensor] = {}
        for shape in dict.fromkeys(shapes):
            layers = [layer for layer, own in enumerate(shapes) if own == shape]
            heads, width = shape
            self.tensors.append(like.new_zeros((len(layers), 2, rows, heads, slots, width)))
            places |= zip(layers, self.tensors[-1], strict=True)
        self.layers = [places[layer] for layer in range(len(shapes))]
        # the slots that the next pass writes; the pass sees the slots up to the last of them
        self.span = slice(0, 0)
        # (N,) numbers of these slots, instead of `span`; the pass then sees all slots
        self.at: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.slots

    def fill(self, cache: Any) -> None:
        """Take the first slots of the first rows from a DynamicCache of transformers."""
        for own, layer in zip(self.layers, cache.layers, strict=True):
            rows, _, length, _ = layer.keys.shape
            own[0, :rows, :, :length] = layer.keys
            own[1, :rows, :, :length] = layer.values

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any):
        """Write a layer's keys and values (B, heads, L, width), and return what the pass sees."""
        content = self.layers[layer]
        if self.at is not None:
            return (
                content[0].index_copy_(2, self.at, keys),
                content[1].index_copy_(2, self.at, values),
            )
        content[0, :, :, self.span] = keys
        content[1, :, :, self.span] = values
        return content[0, :, :, : self.span.stop], content[1, :, :, : self.span.stop]

    def get_seq_length(self, layer: int = 0) -> int:
        """Return how many slots lie before those that the next pass writes."""
        return self.span.start

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy slots `source` (B, n) to slots `target` (B, n) of the same row."""
        rows = torch.arange(len(source), device=source.device)[:, None]
        # The two indices are separated by a slice, so both sides have their dimensions in front:
        # (B, n, layers, 2, heads, width).
        for tensor in self.tensors:
            tensor[:, :, rows, :, target] = tensor[:, :, rows, :, source]


def below(paths: torch.Tensor) -> torch.Tensor:
    """Return which nodes each node sees, (B, N, N) bool, from the paths of `draft.drawn`."""
    return torch.zeros_like(paths, dtype=torch.bool).scatter(2, paths, True)


class CudaGraph:
    """A function of tensors, captured as a CUDA graph: the same kernels, launched at once.

    The function is called twice before the capture, because what kernels do at their first call
    cannot be captured.

    Args:
        function: The function to capture.
        pool: Memory that graphs share if only one of them runs at a time.
        inputs: Tensors of the shapes that the function takes.
    """

    def __init__(self, function: Callable[..., torch.Tensor], pool: Any, *inputs: torch.Tensor):
        self.inputs = [tensor.clone() for tensor in inputs]
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side_stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.result = function(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Call the function on inputs of the same shapes, which may be on any device.

        Returns:
            The result, which the next call overwrites.
        """
        for captured, tensor in zip(self.inputs, inputs, strict=True):
            captured.copy_(tensor)
        self.graph.replay()
        return self.result
