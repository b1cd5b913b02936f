"""The engine of Qwen2.5-VL, whose first pass reads the prompts and the first trees together.

Its passes are functions of tensors alone, so that they can be captured as CUDA graphs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from vla0.core.codec import Grammar
from vla0.decode.compiled import layered
from vla0.decode.draft import Tree
from vla0.decode.engine import DecodeState, Engine, Verdict, split
from vla0.decode.kv_cache import KVCache, below
from vla0.decode.vision_tower import VisionTower

BUCKET = 64  # the slots of a fixed pass are a multiple of this
Grid = tuple[int, ...]  # 1, and the rows and columns of patches of an image


class FusedEngine(Engine):
    """Runs the passes of Qwen2.5-VL over trees of guesses.

    Args:
        model: The vision-language model. It is not changed.
        symbol_ids: The token of each symbol.
        grammar: The grammar of the answers.
        fixed: As for `Engine`.
        compiled: Compile the layers with torch.compile, once for each size of a pass.
        invariant: The result at a node does not depend, bit for bit, on the other guesses of its
            tree (see `vla0.decode.invariant`). Passes must then be of fixed size, and the first
            one guesses nothing.
    """

    def __init__(
        self, model: Any, symbol_ids: Sequence[int], grammar: Grammar, fixed: bool,
        compiled: bool = False, invariant: bool = False,
    ):  # fmt: skip
        super().__init__(model, symbol_ids, grammar, fixed)
        self.compiled = compiled
        self.invariant = invariant
        if invariant:
            from vla0.decode import invariant as attention  # needs Triton

            self.attention: Any = attention
        if compiled:
            self.language = layered(self.language)
        heads = self.text_config.num_attention_heads
        shape = self.text_config.num_key_value_heads, self.text_config.hidden_size // heads
        self.shapes = [shape] * self.text_config.num_hidden_layers
        self.vision_towers: dict[tuple[Grid, ...], VisionTower] = {}
        self.places: dict[tuple, np.ndarray] = {}

    def fresh(self) -> "FusedEngine":
        """Return a new engine for the same model, without caches and graphs, and not compiled.

        It is for measuring passes of many sizes, each of which would be compiled for itself.
        """
        return FusedEngine(
            self.model, list(self.ids), self.grammar, self.fixed, invariant=self.invariant
        )

    def prefill(
        self, batch: dict[str, torch.Tensor], trees: Sequence[Tree], max_nodes: int
    ) -> tuple[DecodeState, Verdict]:
        """Read the prompts and the first trees in one pass, as `Engine.prefill` does in two."""
        ids, seen = batch["input_ids"].numpy(), batch["attention_mask"].numpy().astype(np.bool_)
        grids = [tuple(grid) for grid in batch["image_grid_thw"].tolist()]
        pixels = batch["pixel_values"]
        rows, length = ids.shape
        self._refuse_long(length)
        places = self._positions(batch, grids)
        if self.fixed:  # pad with rows and tokens that are never read
            more, before = self.held(rows) - rows, -(length + self._spare(max_nodes)) % BUCKET
            fill = lambda array: np.pad(array, [(0, more), (before, 0)])  # noqa: E731
            ids, seen, places = fill(ids), fill(seen), np.stack([fill(axis) for axis in places])
            padding = pixels.new_zeros(more * len(pixels) // rows, pixels.shape[1])
            pixels = torch.cat([pixels, padding])
            grids, length = grids + more * grids[: len(grids) // rows], length + before
            ids[rows:], seen[rows:], places[:, rows:] = ids[0], seen[0], places[:, :1]
        if (key := tuple(grids)) not in self.vision_towers:
            self.vision_towers[key] = VisionTower(
                self.model.model.visual, key, self.model.device, self.compiled
            )
        state = self._open(seen[:, :-1], places[0, :, -1], max_nodes)
        tree = self._numbers(state, trees, 1 if self.invariant else max_nodes)
        tree[0][:, 0] = ids[:, -1]
        width = length - 1 + tree[0].shape[1]  # tokens of a row in this pass
        row, column = np.nonzero((ids == self.model.config.image_token_id) & seen)
        state.cache.span = slice(0, width)
        state.passes = 1
        numbers = [ids[:, :-1], places[:, :, :-1], seen[:, :-1], row * width + column, *tree]
        judgement = self._run(
            partial(self._first, state.cache, self.vision_towers[key]), numbers, pixels
        )
        return state, self._verdict(judgement, rows)

    def _seen(self, state: DecodeState) -> np.ndarray:
        return state.padding if self.invariant else super()._seen(state)

    def _positions(self, batch: dict[str, torch.Tensor], grids: list[Grid]) -> np.ndarray:
        """Return the positions (3, B, L) of the prompts' tokens, remembered for prompts alike."""
        key = (
            batch["mm_token_type_ids"].numpy().tobytes(),
            batch["attention_mask"].numpy().tobytes(),
            tuple(grids),
        )
        if key not in self.places:
            if len(self.places) > 1000:
                self.places.clear()
            names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
            self.places[key] = self.model.model.get_rope_index(
                **{name: batch[name] for name in names}
            )[0].numpy()
        return self.places[key]

    def _first(
        self, cache: KVCache, vision_tower: VisionTower, shapes: Sequence[tuple[int, ...]],
        numbers: torch.Tensor, pixels: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Compute the first pass: the prompts with their images, and the first trees."""
        ids, before, seen, pictures, tokens, places, paths, allowed = split(numbers, shapes)
        length, nodes = ids.shape[1], tokens.shape[1]
        embedded = self.embed(torch.cat([ids, tokens], 1))
        images = vision_tower(pixels.to(embedded.dtype)).to(embedded.dtype)
        embedded.flatten(0, 1).index_copy_(0, pictures, images)
        causal = torch.ones((length, length), dtype=torch.bool, device=ids.device).tril()
        # A padding token sees itself: a softmax over nothing is NaN, which would spread.
        prompt = causal & seen.bool()[:, None] | torch.eye(
            length, dtype=torch.bool, device=ids.device
        )
        tree = torch.cat([seen.bool()[:, None].expand(-1, nodes, -1), below(paths)], 2)
        mask = torch.cat([pad(prompt, (0, nodes)), tree], 1)
        at = torch.arange(length + nodes, device=ids.device)
        if self.fixed:
            mask = pad(mask, (0, len(cache) - length - nodes))
        places = torch.cat([before, places.expand(3, -1, -1)], 2)
        hidden = self._layers(cache, embedded, places, self._attention_mask(mask), at)
        return self._judge(hidden[:, length:], allowed.bool())

    def _hidden(
        self, cache: KVCache, start: torch.Tensor, accepted: torch.Tensor, seen: torch.Tensor,
        tokens: torch.Tensor, places: torch.Tensor, paths: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        at = start + torch.arange(tokens.shape[1], device=tokens.device)
        embedded, axes = self.embed(tokens), places.expand(3, -1, -1)
        if not self.invariant:
            mask = self._attention_mask(self._tree_mask(seen, at, paths))
            return self._layers(cache, embedded, axes, mask, at)
        trees = self.attention.Trees(start, seen, accepted, places - places[:, :1], paths)
        with self.attention.attending(self.language.config):
            return self._layers(cache, embedded, axes, trees, at)

    def _layers(
        self, cache: KVCache, embedded: torch.Tensor, places: torch.Tensor, mask: Any,
        at: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Return the hidden states of tokens; the mask is (B, 1, N, slots), or Trees."""
        cache.at = at if self.fixed else None
        return self.language(
            inputs_embeds=embedded,
            position_ids=places,
            attention_mask={"full_attention": mask},
            use_cache=True,
            **{self.cache_name: cache},
        ).last_hidden_state
