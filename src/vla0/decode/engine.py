"""Run the passes of the unmodified model: a prefill, then trees of guesses over its KV cache."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import DynamicCache

from vla0.core.codec import Grammar
from vla0.core.greedy import model_inputs
from vla0.decode.draft import Tree, drawn
from vla0.decode.kv_cache import CudaGraph, KVCache, below
from vla0.decode.support import cache_argument, layer_types
from vla0.errors import InputError

logger = logging.getLogger(__name__)

# picks (B, N), and the probabilities of all symbols (B, N, 12)
Verdict = tuple[list[list[int]], np.ndarray]


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
    after each of these calls. The prompts are read by the model's own forward pass, and the trees
    by its language model. A pass over trees is a function of one tensor of integers, so that the
    host sends its input in one copy. Where passes are of fixed size, the caches are used again,
    and a new state replaces the one before it.

    Args:
        model: The vision-language model. It is not changed.
        symbol_ids: The token of each symbol.
        grammar: The grammar of the answers.
        fixed: Pad rows, slots and trees to a few sizes and let each pass look at all slots, so that
            it can be captured as a CUDA graph. Otherwise a pass is as small as it can be, which is
            faster where nothing is captured.
    """

    invariant = False  # whether a node's result is bit for bit that of a pass without guesses

    def __init__(self, model: Any, symbol_ids: Sequence[int], grammar: Grammar, fixed: bool):
        self.model = model
        self.grammar = grammar
        self.fixed = fixed
        self.language = model.get_decoder()
        self.embed = model.get_input_embeddings()
        self.output = model.get_output_embeddings()
        self.text_config = model.config.get_text_config()
        self.cache_name = cache_argument(self.language)
        self.layer_types = layer_types(model)
        self.window: Any = getattr(self.text_config, "sliding_window", None)
        # Ties go to the lower token, as in an argmax over the whole vocabulary.
        self.order = np.argsort(symbol_ids)
        self.ids = np.array(symbol_ids)
        self.head = torch.from_numpy(self.ids[self.order]).to(model.device)
        self.capturing = fixed and model.device.type == "cuda"
        self.shapes: list[tuple[int, int]] = []  # of each layer in the cache: heads, their width
        # Dimensions of positions: 3 where they have axes of time and place.
        self.axes = 3 if hasattr(model.base_model, "get_rope_index") else 2
        self.caches: dict[tuple[int, int], KVCache] = {}  # rows, slots
        self.graphs: dict[tuple, CudaGraph] = {}
        self.pool: Any = None

    def fresh(self) -> "Engine":
        """Return a new engine for the same model, without caches and graphs."""
        engine = Engine(self.model, list(self.ids), self.grammar, self.fixed)
        engine.shapes, engine.axes = self.shapes, self.axes
        return engine

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
        state = self.read(batch, max_nodes)
        return state, self.step(state, trees, batch["input_ids"][:, -1].numpy())

    def read(self, batch: dict[str, torch.Tensor], max_nodes: int) -> DecodeState:
        """Read the prompts without their last tokens, which are node 0 of the first trees."""
        self._refuse_long(batch["input_ids"].shape[1])
        whole = batch["input_ids"].shape
        seen = batch["attention_mask"][:, :-1]
        before = {
            name: value[:, :-1] if value.shape == whole else value for name, value in batch.items()
        }
        cache, last, _ = self.plain_pass(before)
        state = self._open(seen.numpy().astype(np.bool_), last + 1, max_nodes)
        state.cache.fill(cache)
        return state

    def plain_pass(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[DynamicCache, np.ndarray, torch.Tensor]:
        """Run the model's own forward pass on prompts.

        Returns:
            Its cache, the position (B,) of the last tokens, and the hidden states (B, L, width).
        """
        inputs = model_inputs(self.model, batch)
        if not hasattr(self.model.base_model, "get_rope_index"):  # the others compute their own
            seen = inputs["attention_mask"]
            inputs["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
        positions: list[torch.Tensor | None] = []
        hook = self.language.register_forward_pre_hook(
            lambda _, __, given: positions.append(given.get("position_ids")), with_kwargs=True
        )
        cache: Any = DynamicCache()
        try:
            output = self.model.base_model(**inputs, past_key_values=cache, use_cache=True)
        finally:
            hook.remove()
        (position,) = positions
        if position is None:  # of a text without images: they are counted
            position = inputs["attention_mask"].cumsum(1) - 1
        else:
            self.axes = position.ndim
            position = position if position.ndim == 2 else position[-1]
        self.shapes = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]
        return cache, position[:, -1].cpu().numpy(), output.last_hidden_state

    def _refuse_long(self, length: int) -> None:
        """Raise InputError when a prompt and its answer are longer than the model allows."""
        limit = getattr(self.text_config, "max_position_embeddings", math.inf)
        if length + self.grammar.longest > limit:
            expected = f"a prompt and an answer of {limit} tokens at most"
            got = f"{length} and {self.grammar.longest}"
            raise InputError(expected, got, "fewer or smaller images, or a shorter instruction")

    def step(
        self, state: DecodeState, trees: Sequence[Tree], node_0: np.ndarray | None = None
    ) -> Verdict:
        """Run a pass over each row's tree.

        Args:
            state: What `prefill` returned. The pass is counted in it.
            trees: A tree for each row.
            node_0: (B,) tokens of node 0, where they are no symbols: the last of the prompts.

        Returns:
            The model's pick after each node (B, N), and the probabilities of the symbols after it
            (B, N, 12), 0 where the grammar forbids one.
        """
        numbers = self.inputs(state, trees, node_0)
        return self._verdict(self._run(partial(self._next, state.cache), numbers), len(trees))

    def hidden(self, state: DecodeState, numbers: Sequence[np.ndarray]) -> torch.Tensor:
        """Run the pass of `step` on its inputs, and return the hidden states (B, N, width)."""
        tensors = [torch.as_tensor(array, device=self.model.device) for array in numbers]
        return self._hidden(state.cache, *tensors[:-1])

    def inputs(
        self, state: DecodeState, trees: Sequence[Tree], node_0: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Return the numbers that a pass over trees takes, and prepare the state for that pass."""
        tree = self._numbers(state, trees, state.max_nodes)
        if node_0 is not None:
            tree[0][: len(node_0), 0] = node_0
        start = state.next_slot
        state.cache.span = slice(start, start + tree[0].shape[1])
        state.passes += 1
        return [np.array([start]), state.accepted, self._seen(state), *tree]

    def _seen(self, state: DecodeState) -> np.ndarray:
        """Return what nodes see besides their own tree, for `_next`."""
        return state.seen if self.fixed else state.seen[:, : state.next_slot]

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
        if not self.shapes:
            few = torch.from_numpy(self.ids[None, :2])
            self.plain_pass({"input_ids": few, "attention_mask": torch.ones_like(few)})
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
        cache = self.caches.get(key) or KVCache(self.shapes, rows, slots, self.embed.weight)
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

    def _run(
        self,
        forward: partial[torch.Tensor],
        numbers: Sequence[np.ndarray],
        *more: torch.Tensor,
    ) -> np.ndarray:
        """Run a pass, as a CUDA graph where that works, and return (B, N, 1 + 12) on the host.

        Args:
            forward: Takes the shapes of the numbers, the numbers in one tensor, and `more`. Its
                first arguments must be the same object in each pass of the same shapes.
            numbers: Arrays of integers.
            *more: Other tensors.
        """
        shapes = tuple(array.shape for array in numbers)
        function = partial(forward, shapes)
        flat = np.concatenate([array.reshape(-1) for array in numbers], dtype=np.int64)
        inputs = [torch.from_numpy(flat), *more]
        if self.capturing:
            key = (forward.func.__name__, shapes, *forward.args)
            try:
                if key not in self.graphs:
                    self.pool = self.pool or torch.cuda.graph_pool_handle()
                    on_device = [tensor.to(self.model.device) for tensor in inputs]
                    self.graphs[key] = CudaGraph(function, self.pool, *on_device)
                return self.graphs[key](*inputs).cpu().numpy()
            except torch.OutOfMemoryError:
                logger.warning(
                    "no memory to capture a CUDA graph of %s: decoding goes on without, and slower",
                    forward.func.__name__,
                )
                self.capturing = False
                self.graphs.clear()
                torch.cuda.empty_cache()
        return function(*(tensor.to(self.model.device) for tensor in inputs)).cpu().numpy()

    def _next(
        self, cache: KVCache, shapes: Sequence[tuple[int, ...]], numbers: torch.Tensor
    ) -> torch.Tensor:
        """Compute a pass of the trees over what the cache holds."""
        start, accepted, seen, tokens, places, paths, allowed = split(numbers, shapes)
        hidden = self._hidden(cache, start, accepted, seen, tokens, places, paths)
        return self._judge(hidden, allowed.bool())

    def _hidden(
        self, cache: KVCache, start: torch.Tensor, accepted: torch.Tensor, seen: torch.Tensor,
        tokens: torch.Tensor, places: torch.Tensor, paths: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Return the hidden states (B, N, width) at the nodes of trees."""
        at = start + torch.arange(tokens.shape[1], device=tokens.device)
        cache.at = at if self.fixed else None
        mask = self._tree_mask(seen, at, paths)
        masks: Any = {"full_attention": self._attention_mask(mask)}
        if "sliding_attention" in self.layer_types:
            # How many tokens of the text lie before a node, and before each slot.
            node = accepted[:, None] + places - places[:, :1]
            slot = torch.arange(mask.shape[2], device=tokens.device).expand(len(mask), -1)
            near = node[:, :, None] - slot.index_copy(1, at, node)[:, None] < self.window
            masks["sliding_attention"] = self._attention_mask(mask & near)
        return self.model.base_model(
            input_ids=tokens,
            position_ids=places if self.axes == 2 else places.expand(3, -1, -1),
            # A mask for each kind of layer goes where there are several, or else only one.
            attention_mask=masks if len(masks) > 1 else masks["full_attention"],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def _tree_mask(self, seen: torch.Tensor, at: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
        """Return which slots each node sees, (B, N, slots) bool."""
        before = seen.bool()[:, None].expand(-1, paths.shape[1], -1)
        if self.fixed:
            return before.index_copy(2, at, below(paths))
        return torch.cat([before, below(paths)], 2)

    def _attention_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Return (B, 1, N, slots): True where seen, or, for eager attention, what it adds."""
        mask = mask[:, None]
        if self.text_config._attn_implementation != "eager":
            return mask
        dtype = self.embed.weight.dtype
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def _judge(self, hidden: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Return the pick after each node and the symbols' probabilities, as (B, N, 1 + 12)."""
        bias = getattr(self.output, "bias", None)
        logits = linear(
            hidden, self.output.weight[self.head], None if bias is None else bias[self.head]
        )
        if cap := getattr(self.text_config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap  # as the model rounds it
        logits = logits.float().masked_fill(~allowed, float("-inf"))
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


def split(numbers: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Split one flat tensor into tensors of these shapes."""
    return [
        part.view(shape)
        for part, shape in zip(numbers.split([math.prod(s) for s in shapes]), shapes, strict=True)
    ]
