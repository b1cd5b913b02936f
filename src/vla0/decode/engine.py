"""Run the passes of the unmodified model: a prefill, then trees of guesses over its KV cache."""

import logging
import math
from collections.abc import Callable, Sequence
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


class Engine:
    """Runs the passes of a model over trees of guesses.

    Call `prefill` once and then `step` many times, with `accept` after each of these calls. A pass
    is a function of one tensor of integers (and of the pixels, in the first pass), so that the host
    sends its input in one copy.

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
        self.passes = 0
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
    ) -> Verdict:
        """Read the prompts and the first trees, whose node 0 is the prompt's last token.

        Args:
            batch: The output of `Prompt.observe`, on the host: B prompts of L tokens, padded on the
                left.
            trees: A tree for each prompt.
            max_nodes: Most nodes of a tree, now and in later passes.

        Returns:
            The same as `step`.

        Raises:
            InputError: When a prompt and its answer are longer than the model allows.
        """
        ids, seen = batch["input_ids"].numpy(), batch["attention_mask"].numpy().astype(np.bool_)
        grids = [tuple(grid) for grid in batch["image_grid_thw"].tolist()]
        pixels = batch["pixel_values"]
        rows, length = ids.shape
        limit = self.model.config.text_config.max_position_embeddings
        if length + self.grammar.longest > limit:
            remedy = "fewer or smaller images, or a shorter instruction"
            raise InputError(
                f"a prompt and an answer of {limit} tokens at most",
                f"{length} and {self.grammar.longest}",
                remedy,
            )
        places = self._positions(batch, grids)
        if self.fixed:  # pad with rows and tokens that are never read
            more, before = self.held(rows) - rows, -(length + self._spare(max_nodes)) % BUCKET
            fill = lambda array: np.pad(array, [(0, more), (before, 0)])  # noqa: E731
            ids, seen, places = fill(ids), fill(seen), np.stack([fill(axis) for axis in places])
            pixels = torch.cat(
                [pixels, pixels.new_zeros(more * len(pixels) // rows, pixels.shape[1])]
            )
            grids, length = grids + more * grids[: len(grids) // rows], length + before
            ids[rows:], seen[rows:], places[:, rows:] = ids[0], seen[0], places[:, :1]
        if (key := tuple(grids)) not in self.vision_towers:
            self.vision_towers[key] = VisionTower(
                self.model.model.visual, key, self.model.device, self.compiled
            )
        self.vision_tower = self.vision_towers[key]
        self._open(seen[:, :-1], places[0, :, -1], max_nodes)
        tree = self._numbers(trees, 1 if self.invariant else max_nodes)
        tree[0][:, 0] = ids[:, -1]
        width = length - 1 + tree[0].shape[1]  # tokens of a row in this pass
        row, column = np.nonzero((ids == self.model.config.image_token_id) & seen)
        self.cache.span, self.passes = slice(0, width), 1
        judgement = self._run(
            self._first,
            [ids[:, :-1], places[:, :, :-1], seen[:, :-1], row * width + column, *tree],
            pixels,
        )
        return self._verdict(judgement, rows)

    def step(self, trees: Sequence[Tree]) -> Verdict:
        """Run a pass over each row's tree.

        Returns:
            The model's pick after each node (B, N), and the probabilities of the symbols after it
            (B, N, 12), 0 where the grammar forbids one.
        """
        tree = self._numbers(trees, self.max_nodes)
        self.cache.span, self.passes = (
            slice(self.base, self.base + tree[0].shape[1]),
            self.passes + 1,
        )
        before = [self.seen if self.fixed else self.seen[:, : self.base]]
        if self.invariant:
            before = [self.padding, self.accepted]
        return self._verdict(
            self._run(self._next, [np.array([self.base]), *before, *tree]), len(trees)
        )

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the nodes of each row's path in the last trees, and drop their other nodes.

        Args:
            paths: For each row, the nodes from node 0 on; [] for a row that has ended.
        """
        target = self.accepted[:, None] + np.arange(
            self.max_nodes if self.fixed else max(map(len, paths))
        )
        source = target.copy()
        for row, path in enumerate(paths):
            source[row, : len(path)] = self.base + np.array(path, np.int64)
            self.seen[row, self.accepted[row] : self.accepted[row] + len(path)] = True
            self.accepted[row] += len(path)
            self.place[row] += len(path)
        self.base = int(self.accepted.max())
        if not np.array_equal(source, target):
            self.cache.move(*torch.from_numpy(np.stack([source, target])).to(self.model.device))

    def blank(self, seen: int, nodes: int) -> None:
        """Act as if a prompt of `seen` tokens had been read, so that `step` can be measured."""
        self._open(np.ones((1, seen), np.bool_), np.array([seen]), nodes)

    def held(self, rows: int) -> int:
        """Return how many rows a pass has when this many are asked for."""
        return 1 << (rows - 1).bit_length() if self.fixed else rows

    def _spare(self, max_nodes: int) -> int:
        """Return the slots that an answer and a tree need."""
        return self.grammar.longest + max_nodes

    def _open(self, seen: np.ndarray, place: np.ndarray, max_nodes: int) -> None:
        """Prepare the state before node 0 of the first tree.

        Args:
            seen: (B, n) bool, which slots of the prompt are not padding.
            place: (B,) position of node 0.
            max_nodes: Most nodes of a tree.
        """
        rows, length = seen.shape
        slots = length + 1 + self._spare(max_nodes)
        key, config, like = (rows, slots), self.model.config.text_config, self.embed.weight
        self.cache = self.caches.get(key) or KVCache(config, rows, slots, like)
        if self.fixed:
            self.caches[key] = self.cache
        self.max_nodes, self.base, self.place = max_nodes, length, place.copy()
        # slots that nodes may see, besides those of their own tree
        self.seen = np.pad(seen, [(0, 0), (0, slots - length)])
        self.padding = seen.argmax(1)  # how many slots at the start of each row are padding
        self.accepted = np.full(rows, length)  # slots before node 0

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
        self,
        forward: Callable[..., torch.Tensor],
        numbers: Sequence[np.ndarray],
        *more: torch.Tensor,
    ) -> np.ndarray:
        """Run a pass, as a CUDA graph where that works, and return (B, N, 1 + 12) on the host."""
        shapes = tuple(array.shape for array in numbers)
        function = partial(forward, shapes)
        inputs = [
            torch.from_numpy(
                np.concatenate([array.reshape(-1) for array in numbers], dtype=np.int64)
            ),
            *more,
        ]
        if self.capturing:
            key = (forward.__name__, shapes, len(self.cache), self.vision_tower if more else None)
            try:
                if key not in self.graphs:
                    self.pool = self.pool or torch.cuda.graph_pool_handle()
                    self.graphs[key] = CudaGraph(
                        function, self.pool, *(tensor.to(self.model.device) for tensor in inputs)
                    )
                return self.graphs[key](*inputs).cpu().numpy()
            except torch.OutOfMemoryError:
                logger.warning(
                    "no memory to capture a CUDA graph of %s: decoding goes on without, and slower",
                    forward.__name__,
                )
                self.capturing = False
                self.graphs.clear()
                torch.cuda.empty_cache()
        return function(*(tensor.to(self.model.device) for tensor in inputs)).cpu().numpy()

    def _first(
        self, shapes: Sequence[tuple[int, ...]], numbers: torch.Tensor, pixels: torch.Tensor
    ) -> torch.Tensor:
        """Compute the first pass: the prompts with their images, and the first trees."""
        ids, before, seen, pictures, tokens, places, paths, allowed = _apart(numbers, shapes)
        length, nodes = ids.shape[1], tokens.shape[1]
        embedded = self.embed(torch.cat([ids, tokens], 1))
        images = self.vision_tower(pixels.to(embedded.dtype)).to(embedded.dtype)
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
            mask = pad(mask, (0, len(self.cache) - length - nodes))
        places = torch.cat([before, places.expand(3, -1, -1)], 2)
        hidden = self._pass(embedded, places, mask, at)
        return self._judge(hidden[:, length:], allowed.bool())

    def _next(self, shapes: Sequence[tuple[int, ...]], numbers: torch.Tensor) -> torch.Tensor:
        """Compute a later pass: the trees over what the cache holds."""
        base, *before, tokens, places, paths, allowed = _apart(numbers, shapes)
        at = base + torch.arange(tokens.shape[1], device=base.device)
        embedded, places = self.embed(tokens), places.expand(3, -1, -1)
        if self.invariant:
            trees = self.attention.Trees(base, *before, places[0] - places[0, :, :1], paths)
            with self.attention.attending(self.language.config):
                hidden = self._pass(embedded, places, trees, at)
        else:
            seen = before[0].bool()[:, None].expand(-1, tokens.shape[1], -1)
            mask = (
                seen.index_copy(2, at, below(paths))
                if self.fixed
                else torch.cat([seen, below(paths)], 2)
            )
            hidden = self._pass(embedded, places, mask, at)
        return self._judge(hidden, allowed.bool())

    def _pass(
        self, embedded: torch.Tensor, places: torch.Tensor, mask: Any, at: torch.Tensor
    ) -> torch.Tensor:
        """Return the hidden states of tokens; the mask is (B, N, slots) bool, or Trees."""
        self.cache.at = at if self.fixed else None
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
            **{self.cache_name: self.cache},
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

    def _numbers(self, trees: Sequence[Tree], max_nodes: int) -> list[np.ndarray]:
        """Return the input of a pass over trees.

        Args:
            trees: A tree for each row.
            max_nodes: N where passes are of fixed size; elsewhere N fits the largest tree.

        Returns:
            Tokens (B, N), positions (B, N), paths (B, N, N) and allowed symbols (B, N, 12).
        """
        nodes = max_nodes if self.fixed else max(map(len, trees))
        symbols, depths, paths, allowed = drawn(trees, self.grammar, len(self.seen), nodes)
        return [self.ids[symbols], self.place[:, None] + depths, paths, allowed[..., self.order]]

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
