"""Run the passes of the unmodified model: a prefill, then trees of guesses over its KV cache."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, pad

from vla0.core.codec import Grammar
from vla0.decode.compiled import layered
from vla0.decode.draft import Tree, drawn
from vla0.decode.kv_cache import CudaGraph, KVCache, below
from vla0.decode.support import cache_argument
from vla0.decode.vision_tower import VisionTower
from vla0.errors import InputError

logger = logging.getLogger(__name__)

BUCKET = 64  # the slots of a fixed pass are a multiple of this
# picks (B, N), and the probabilities of all symbols (B, N, 12)
Verdict = tuple[list[list[int]], np.ndarray]
Grid = tuple[int, ...]  # 1, and the rows and columns of patches of an image


@dataclass(kw_only=True)
class DecodeState:
    """How far the answers of one batch of B prompts are, and what the KV cache holds of them.

    Args:
        cache: The keys and values, in `slots` slots of a row.
        max_nodes: Most nodes of a tree.
        next_slot: The slot of node 0 of the next trees, in all rows.
        accepted: (B,) slots that each row has filled, its padding included.
        position: (B,) position of node 0 of the next trees.
        seen: (B, slots) bool, the slots that nodes may see besides those of their own tree.
        padding: (B,) slots at the start of each row that are padding.
        passes: Passes that have been run.
    """

    cache: KVCache
    max_nodes: int
    next_slot: int
    accepted: np.ndarray
    position: np.ndarray
    seen: np.ndarray
    padding: np.ndarray
    passes: int = 0


class Engine:
    """Runs the passes of a model over trees of guesses.

    Call `prefill` once and then `step` many times with the state that it returns, and `accept`
    after each of these calls. A pass is a function of one tensor of integers (and of the pixels, in
    the first pass), so that the host sends its input in one copy. Where passes are of fixed size,
    the caches are used again, and a new state replaces the one before it.

    Args:
        model: The vision-language model. It is not changed.
        symbol_ids: The token of each symbol.
        grammar: The grammar of the answers.
        fixed: Pad rows, prompts and trees to a few sizes and let each pass look at all slots, so
            that it can be captured as a CUDA graph. Otherwise a pass is as small as it can be,
            which is faster where nothing is captured.
        compiled: Compile the layers with torch.compile, once for each size of a pass.
        invariant: The result at a node does not depend, bit for bit, on the other guesses of its
            tree (see `vla0.decode.invariant`). Passes must then be of fixed size, and the first
            one guesses nothing.
    """

    def __init__(
        self, model: Any, symbol_ids: Sequence[int], grammar: Grammar, fixed: bool,
        compiled: bool = False, invariant: bool = False,
    ):  # fmt: skip
        self.model = model
        self.grammar = grammar
        self.fixed = fixed
        self.compiled = compiled
        self.invariant = invariant
        if invariant:
            from vla0.decode import invariant as attention  # needs Triton

            self.attention: Any = attention
        self.language = (
            layered(model.model.language_model) if compiled else model.model.language_model
        )
        self.embed = model.model.get_input_embeddings()
        self.cache_name = cache_argument(model.model.language_model)
        # Ties go to the lower token, as in an argmax over the whole vocabulary.
        self.order = np.argsort(symbol_ids)
        self.ids = np.array(symbol_ids)
        self.head = torch.from_numpy(self.ids[self.order]).to(model.device)
        self.capturing = fixed and model.device.type == "cuda"
        self.caches: dict[tuple[int, int], KVCache] = {}  # rows, slots
        self.graphs: dict[tuple, CudaGraph] = {}
        self.pool: Any = None
        self.vision_towers: dict[tuple[Grid, ...], VisionTower] = {}
        self.places: dict[tuple, np.ndarray] = {}

    def fresh(self) -> "Engine":
        """Return a new engine for the same model, without caches and graphs."""
        return Engine(
            self.model, list(self.ids), self.grammar, self.fixed, self.compiled, self.invariant
        )

    def prefill(
        self, batch: dict[str, torch.Tensor], trees: Sequence[Tree], max_nodes: int
    ) -> tuple[DecodeState, Verdict]:
        """Read the prompts and the first trees, whose node 0 is the prompt's last token.

        Args:
            batch: The output of `Prompt.observe`, on the host: B prompts of L tokens, padded on the
                left.
            trees: A tree for each prompt.
            max_nodes: Most nodes of a tree, now and in later passes.

        Returns:
            The state that later calls take, and what `step` returns.

        Raises:
            InputError: When a prompt and its answer are longer than the model allows.
        """
        ids, seen = batch["input_ids"].numpy(), batch["attention_mask"].numpy().astype(np.bool_)
        grids = [tuple(grid) for grid in batch["image_grid_thw"].tolist()]
        pixels = batch["pixel_values"]
        rows, length = ids.shape
        limit = self.model.config.text_config.max_position_embeddings
        if length + self.grammar.longest > limit:
            expected = f"a prompt and an answer of {limit} tokens at most"
            got = f"{length} and {self.grammar.longest}"
            raise InputError(expected, got, "fewer or smaller images, or a shorter instruction")
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
        judgement = self._run(state.cache, numbers, self.vision_towers[key], pixels)
        return state, self._verdict(judgement, rows)

    def step(self, state: DecodeState, trees: Sequence[Tree]) -> Verdict:
        """Run a pass over each row's tree.

        Args:
            state: What `prefill` returned. The pass is counted in it.
            trees: A tree for each row.

        Returns:
            The model's pick after each node (B, N), and the probabilities of the symbols after it
            (B, N, 12), 0 where the grammar forbids one.
        """
        tree = self._numbers(state, trees, state.max_nodes)
        start = state.next_slot
        state.cache.span = slice(start, start + tree[0].shape[1])
        state.passes += 1
        if self.invariant:
            before = [state.padding, state.accepted]
        else:
            before = [state.seen if self.fixed else state.seen[:, :start]]
        judgement = self._run(state.cache, [np.array([start]), *before, *tree])
        return self._verdict(judgement, len(trees))

    def accept(self, state: DecodeState, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes of each row's path in the last trees, and drop their other nodes.

        Args:
            state: What `prefill` returned. It is changed.
            paths: For each row, the nodes from node 0 on; [] for a row that has ended.
        """
        width = state.max_nodes if self.fixed else max(map(len, paths))
        target = state.accepted[:, None] + np.arange(width)
        source = target.copy()
        for row, path in enumerate(paths):
            source[row, : len(path)] = state.next_slot + np.array(path, np.int64)
            state.seen[row, state.accepted[row] : state.accepted[row] + len(path)] = True
            state.accepted[row] += len(path)
            state.position[row] += len(path)
        state.next_slot = int(state.accepted.max())
        if not np.array_equal(source, target):
            moves = torch.from_numpy(np.stack([source, target])).to(self.model.device)
            state.cache.move(*moves)

    def blank(self, seen: int, nodes: int) -> DecodeState:
        """Act as if a prompt of `seen` tokens had been read, so that `step` can be measured."""
        return self._open(np.ones((1, seen), np.bool_), np.array([seen]), nodes)

    def held(self, rows: int) -> int:
        """Return how many rows a pass has when this many are asked for."""
        return 1 << (rows - 1).bit_length() if self.fixed else rows

    def _spare(self, max_nodes: int) -> int:
        """Return the slots that an answer and a tree need."""
        return self.grammar.longest + max_nodes

    def _open(self, seen: np.ndarray, position: np.ndarray, max_nodes: int) -> DecodeState:
        """Return the state before node 0 of the first tree.

        Args:
            seen: (B, n) bool, which slots of the prompt are not padding.
            position: (B,) position of node 0.
            max_nodes: Most nodes of a tree.
        """
        rows, length = seen.shape
        slots = length + 1 + self._spare(max_nodes)
        key = (rows, slots)
        cache = self.caches.get(key) or KVCache(
            self.model.config.text_config, rows, slots, self.embed.weight
        )
        if self.fixed:
            self.caches[key] = cache
        return DecodeState(
            cache=cache,
            max_nodes=max_nodes,
            next_slot=length,
            accepted=np.full(rows, length),
            position=position.copy(),
            seen=np.pad(seen, [(0, 0), (0, slots - length)]),
            padding=seen.argmax(1),
        )

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

    def _run(
        self, cache: KVCache, numbers: Sequence[np.ndarray],
        vision_tower: VisionTower | None = None, *pixels: torch.Tensor,
    ) -> np.ndarray:  # fmt: skip
        """Run a pass, as a CUDA graph where that works, and return (B, N, 1 + 12) on the host.

        It is the first pass where a vision tower and pixels are given.
        """
        shapes = tuple(array.shape for array in numbers)
        if vision_tower is None:
            function = partial(self._next, cache, shapes)
        else:
            function = partial(self._first, cache, vision_tower, shapes)
        flat = np.concatenate([array.reshape(-1) for array in numbers], dtype=np.int64)
        inputs = [torch.from_numpy(flat), *pixels]
        if self.capturing:
            key = (function.func.__name__, shapes, len(cache), vision_tower)
            try:
                if key not in self.graphs:
                    self.pool = self.pool or torch.cuda.graph_pool_handle()
                    on_device = [tensor.to(self.model.device) for tensor in inputs]
                    self.graphs[key] = CudaGraph(function, self.pool, *on_device)
                return self.graphs[key](*inputs).cpu().numpy()
            except torch.OutOfMemoryError:
                logger.warning(
                    "no memory to capture a CUDA graph of %s: decoding goes on without, and slower",
                    function.func.__name__,
                )
                self.capturing = False
                self.graphs.clear()
                torch.cuda.empty_cache()
        return function(*(tensor.to(self.model.device) for tensor in inputs)).cpu().numpy()

    def _first(
        self, cache: KVCache, vision_tower: VisionTower, shapes: Sequence[tuple[int, ...]],
        numbers: torch.Tensor, pixels: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Compute the first pass: the prompts with their images, and the first trees."""
        ids, before, seen, pictures, tokens, places, paths, allowed = _apart(numbers, shapes)
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
        hidden = self._pass(cache, embedded, places, mask, at)
        return self._judge(hidden[:, length:], allowed.bool())

    def _next(
        self, cache: KVCache, shapes: Sequence[tuple[int, ...]], numbers: torch.Tensor
    ) -> torch.Tensor:
        """Compute a later pass: the trees over what the cache holds."""
        base, *before, tokens, places, paths, allowed = _apart(numbers, shapes)
        at = base + torch.arange(tokens.shape[1], device=base.device)
        embedded, places = self.embed(tokens), places.expand(3, -1, -1)
        if self.invariant:
            trees = self.attention.Trees(base, *before, places[0] - places[0, :, :1], paths)
            with self.attention.attending(self.language.config):
                hidden = self._pass(cache, embedded, places, trees, at)
        else:
            seen = before[0].bool()[:, None].expand(-1, tokens.shape[1], -1)
            mask = (
                seen.index_copy(2, at, below(paths))
                if self.fixed
                else torch.cat([seen, below(paths)], 2)
            )
            hidden = self._pass(cache, embedded, places, mask, at)
        return self._judge(hidden, allowed.bool())

    def _pass(
        self, cache: KVCache, embedded: torch.Tensor, places: torch.Tensor, mask: Any,
        at: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Return the hidden states of tokens; the mask is (B, N, slots) bool, or Trees."""
        cache.at = at if self.fixed else None
        if isinstance(mask, torch.Tensor):
            mask = mask[:, None]
            if self.model.config.text_config._attn_implementation == "eager":  # adds its mask
                mask = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill(
                    ~mask, torch.finfo(embedded.dtype).min
                )
        return self.language(
            inputs_embeds=embedded,
            position_ids=places,
            attention_mask={"full_attention": mask},
            use_cache=True,
            **{self.cache_name: cache},
        ).last_hidden_state

    def _judge(self, hidden: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Return the pick after each node and the symbols' probabilities, as (B, N, 1 + 12)."""
        logits = (
            linear(hidden, self.model.lm_head.weight[self.head])
            .float()
            .masked_fill(~allowed, float("-inf"))
        )
        return torch.cat(
            [logits.argmax(2, keepdim=True).to(logits.dtype), torch.softmax(logits, 2)], 2
        )

    def _numbers(
        self, state: DecodeState, trees: Sequence[Tree], max_nodes: int
    ) -> list[np.ndarray]:
        """Return the input of a pass over trees.

        Args:
            state: Where the answers stand.
            trees: A tree for each row.
            max_nodes: N where passes are of fixed size; elsewhere N fits the largest tree.

        Returns:
            Tokens (B, N), positions (B, N), paths (B, N, N) and allowed symbols (B, N, 12).
        """
        nodes = max_nodes if self.fixed else max(map(len, trees))
        symbols, depths, paths, allowed = drawn(trees, self.grammar, len(state.seen), nodes)
        return [
            self.ids[symbols],
            state.position[:, None] + depths,
            paths,
            allowed[..., self.order],
        ]

    def _verdict(self, judgement: np.ndarray, rows: int) -> Verdict:
        """Return picks and probabilities of the first rows, in the order of the symbols."""
        probabilities = np.empty_like(judgement[:rows, :, 1:])
        probabilities[..., self.order] = judgement[:rows, :, 1:]
        return self.order[judgement[:rows, :, 0].astype(np.int64)].tolist(), probabilities


def _apart(numbers: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Split one flat tensor into tensors of these shapes."""
    return [
        part.view(shape)
        for part, shape in zip(numbers.split([math.prod(s) for s in shapes]), shapes, strict=True)
    ]
