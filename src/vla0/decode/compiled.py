"""Compile the layers of a language model, so that a pass needs fewer kernels.

One compilation serves all layers.
"""

import copy
from typing import Any

import torch

SIZES = 64  # of passes, by rows, tokens and slots: more than one model meets


class Own:
    """A cache of one layer's keys and values.

    With it, the compiled code does not depend on the layer's number and serves all layers.

    Args:
        keys: (B, heads, slots, width).
        values: (B, heads, slots, width).
        at: (N,) slots that the pass writes.
    """

    is_compileable = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor):
        self.keys, self.values, self.at = keys, values, at

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any):
        """Write keys and values (B, heads, N, width), and return those of all slots."""
        return self.keys.index_copy_(2, self.at, keys), self.values.index_copy_(2, self.at, values)


def _layer(
    layer: Any,
    hidden: torch.Tensor,
    cache: str,
    keys: torch.Tensor,
    values: torch.Tensor,
    at: torch.Tensor,
    arguments: Any,
):
    """Call a layer with its own cache; this function is what torch.compile compiles."""
    return layer(hidden, **arguments, **{cache: Own(keys, values, at)})


class Layer(torch.nn.Module):
    """A decoder layer that is compiled at its first call and shares the weights of the original.

    Args:
        layer: The original layer.
        number: Its place in the cache.
        run: The compiled `_layer`.
    """

    def __init__(self, layer: torch.nn.Module, number: int, run: Any):
        super().__init__()
        self.layer, self.number, self.run = layer, number, run

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Compute what the layer computes; the cache must be a KVCache whose `at` is set."""
        name = "cache" if "cache" in arguments else "past_key_values"
        cache = arguments.pop(name)
        keys, values = cache.layers[self.number]
        return self.run(self.layer, hidden, name, keys, values, cache.at, arguments)


def layered(model: Any) -> Any:
    """Return a language model that computes the same with compiled layers.

    It shares the weights of the model, which is not changed.
    """
    # Each size of a pass is compiled for itself, and after eight of them torch would raise.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(SIZES, dynamo.recompile_limit)
    run = torch.compile(_layer, fullgraph=True, dynamic=False)
    compiled_model = copy.copy(model)
    compiled_model._modules = dict(model._modules)
    compiled_model.layers = torch.nn.ModuleList(
        Layer(layer, number, run) for number, layer in enumerate(model.layers)
    )
    return compiled_model
