"""A language model whose layers are compiled: few kernels where there were many.

One compilation serves all layers.
"""

import copy
from typing import Any

import torch


class Own:
    """What a layer needs of a cache: its own keys and values, so that no layer's number is compiled
    into it.
    """

    is_compileable = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor):
        self.keys, self.values, self.at = keys, values, at

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any):
        """Writes keys and values (B, heads, N, width), and gives all there are."""
        return self.keys.index_copy_(2, self.at, keys), self.values.index_copy_(2, self.at, values)


def _layer(
    layer: Any,
    hidden: torch.Tensor,
    cache: str,
    keys: torch.Tensor,
    values: torch.Tensor,
    at: torch.Tensor,
    told: Any,
):
    return layer(hidden, **told, **{cache: Own(keys, values, at)})


class Layer(torch.nn.Module):
    """A decoder layer, compiled when it is called; its weights are the layer's own."""

    def __init__(self, layer: torch.nn.Module, number: int, run: Any):
        super().__init__()
        self.layer, self.number, self.run = layer, number, run

    def forward(self, hidden: torch.Tensor, **told: Any) -> torch.Tensor:
        """What the layer gives; the cache is of slots that the pass names (KVCache.at)."""
        name = "cache" if "cache" in told else "past_key_values"
        cache = told.pop(name)
        keys, values = cache.content[self.number]
        return self.run(self.layer, hidden, name, keys, values, cache.at, told)


def layered(model: Any) -> Any:
    """A language model that does the same by compiled layers.

    It shares the weights; the model itself is not touched.
    """
    run = torch.compile(_layer, fullgraph=True, dynamic=False)
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.layers = torch.nn.ModuleList(
        Layer(layer, number, run) for number, layer in enumerate(model.layers)
    )
    return other
