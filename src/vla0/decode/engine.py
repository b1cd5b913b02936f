"""The passes of the unmodified model: prefill, then trees of guesses over a cache of its keys and values."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from vla0.codec import SYMBOLS, Grammar
from vla0.decode.draft import State, Tree
from vla0.decode.slots import Replay, Slots

logger = logging.getLogger(__name__)

BUCKET = 128  # slots
Verdict = tuple[list[list[int]], np.ndarray]  # picks (B, N), and (B, N, 12) their and the others' probabilities


def supported(model: Any) -> str | None:
    """Why the engine cannot drive a model; None where it can."""
    if type(model) is not Qwen2_5_VLForConditionalGeneration:
        return f"{type(model).__name__} is not Qwen2.5-VL as it is"
    text: Any = model.config.text_config
    if set(text.layer_types) != {"full_attention"}:
        return "layers of sliding attention"
    if text._attn_implementation not in ("sdpa", "eager"):
        return f"attention '{text._attn_implementation}', which takes no mask of a tree"
    return None


class Engine:
    """The passes of a model over trees of guesses: `prefill`, then many times `step`, `accept` after each.

    fixed: trees are filled up and each pass looks at all slots, so that it can be captured as a CUDA graph. Otherwise a pass is
    as small as it can be, which is faster where nothing is captured.
    """

    def __init__(self, model: Any, symbol_ids: Sequence[int], grammar: Grammar, fixed: bool):
        self.model, self.language, self.grammar, self.fixed = model, model.model.language_model, grammar, fixed
        # Ties go to the lower token, as argmax over the whole vocabulary has it.
        self.symbols = np.argsort(symbol_ids)
        self.ids = torch.tensor(symbol_ids, device=model.device)
        self.capturing = fixed and model.device.type == "cuda"
        self.caches: dict[tuple[int, int], Slots] = {}  # rows, slots
        self.replays: dict[tuple[int, int, int], Replay] = {}  # rows, nodes, slots
        self.passes = 0

    def prefill(self, batch: dict[str, torch.Tensor], trees: Sequence[Tree], most: int) -> Verdict:
        """Reads the prompts (B, L), padded on the left, and first trees whose node 0 is the prompt's last token.

        most: nodes of a tree, now and later. Gives what `step` gives.
        """
        self.most, room = most, self.grammar.longest + most + 1
        body, ids, seen = self.model.model, batch["input_ids"], batch["attention_mask"].bool()
        rows, length = ids.shape
        positions, _ = body.get_rope_index(
            ids, batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"], attention_mask=batch["attention_mask"]
        )
        images = body.get_image_features(batch["pixel_values"].to(self.model.dtype), batch["image_grid_thw"]).pooler_output
        embedded = body.get_input_embeddings()(ids)
        pictures = (ids == self.model.config.image_token_id)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(pictures, torch.cat(list(images)).to(embedded.dtype))
        # By the way things were: weights may have been trained since.
        self.head = self.model.lm_head.weight[self.ids[torch.from_numpy(self.symbols).to(ids.device)]]
        self.cache = self._cache(rows, length - 1 + room, embedded)
        fresh = seen.new_zeros((rows, len(self.cache) - length + 1))
        self.seen = torch.cat([seen[:, :-1], fresh], 1)  # slots that count, but for the tree's own
        self.accepted = torch.full((rows, 1), length - 1, device=ids.device)  # slots before node 0
        self.base = length - 1  # where the trees are written
        self.place = positions[:, :, -1:]  # (3, B, 1) of node 0
        tokens, deep, below = self._tensors(trees)
        causal = torch.ones((length - 1, length - 1), dtype=torch.bool, device=ids.device).tril()
        # A padding sees itself: a row of a softmax over nothing is not a number, and would spread.
        before = causal & seen[:, None, :-1] | torch.eye(length - 1, dtype=torch.bool, device=ids.device)
        above = torch.nn.functional.pad(before, (0, tokens.shape[1]))
        mask = torch.cat([above, torch.cat([seen[:, None, :-1].expand(-1, tokens.shape[1], -1), below], 2)], 1)
        guesses = body.get_input_embeddings()(tokens[:, 1:])
        places = torch.cat([positions[:, :, :-1], self.place + deep], 2)
        self.passes, self.cache.at, self.cache.span = 1, None, slice(0, length - 1 + tokens.shape[1])
        hidden = self._pass(torch.cat([embedded, guesses], 1), places, mask)
        return self._told(self._judge(hidden[:, length - 1 :], self.head, self._allowed(trees, tokens.shape[1])))

    def step(self, trees: Sequence[Tree]) -> Verdict:
        """What the model says at the nodes of each row's tree."""
        self.passes += 1
        tokens, deep, below = self._tensors(trees)
        nodes = tokens.shape[1]
        seen = self.seen[:, None].expand(-1, nodes, -1)
        span = slice(self.base, self.base + nodes)
        if not self.fixed:
            self.cache.span = span
            mask = torch.cat([seen[..., : self.base], below], 2)
            at = self.ids  # not asked for
        else:
            at = torch.arange(span.start, span.stop, device=tokens.device)
            mask = seen.clone()
            mask[:, :, span] = below
        inputs = (tokens, self.place + deep, mask, at, self.head, self._allowed(trees, nodes))
        return self._told(self._captured(*inputs) if self.capturing else self._step(*inputs))

    def accept(self, paths: Sequence[Sequence[int]]) -> None:
        """Keeps of the last trees the nodes of each row's path, from node 0 on; none of a row that has ended."""
        longest = max(map(len, paths))
        taken = torch.tensor([list(path) + [-1] * (longest - len(path)) for path in paths], device=self.ids.device)
        target = self.accepted + torch.arange(longest, device=self.ids.device)
        self.cache.move(torch.where(taken >= 0, self.base + taken, target), target)
        counts = (taken >= 0).sum(1, keepdim=True)
        self.seen.scatter_(1, target, (taken >= 0) | self.seen.gather(1, target))
        self.accepted, self.place = self.accepted + counts, self.place + counts
        self.base = int(self.accepted.max())

    def _cache(self, rows: int, slots: int, like: torch.Tensor) -> Slots:
        if not self.fixed:
            return Slots(self.model.config.text_config, rows, slots, like)
        slots = -(-slots // BUCKET) * BUCKET  # prompts of about one length share a graph
        if (rows, slots) not in self.caches:
            self.caches[rows, slots] = Slots(self.model.config.text_config, rows, slots, like)
        return self.caches[rows, slots]

    def _captured(self, *inputs: torch.Tensor) -> torch.Tensor:
        key = (*inputs[0].shape, len(self.cache))
        try:
            if key not in self.replays:
                self.replays[key] = Replay(self._step, *inputs)
            return self.replays[key](*inputs)
        except torch.OutOfMemoryError:
            logger.warning("no memory to capture a CUDA graph of %d rows: decoding goes on without, and slower", key[0])
            self.capturing = False
            self.replays.clear()
            torch.cuda.empty_cache()
            return self._step(*inputs)

    def _step(
        self, tokens: torch.Tensor, places: torch.Tensor, mask: torch.Tensor, at: torch.Tensor, head: torch.Tensor,
        allowed: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """A pass and its judgement as a function of tensors alone, each of fixed size where `fixed` is."""
        self.cache.at = at if self.fixed else None
        return self._judge(self._pass(self.model.model.get_input_embeddings()(tokens), places, mask), head, allowed)

    def _pass(self, embedded: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask[:, None]
        if self.model.config.text_config._attn_implementation == "eager":  # it adds
            mask = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill(~mask, torch.finfo(embedded.dtype).min)
        return self.language(
            inputs_embeds=embedded, position_ids=places, attention_mask={"full_attention": mask},
            past_key_values=self.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip

    def _tensors(self, trees: Sequence[Tree]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens (B, N), depths (B, N), mask (B, N, N): which nodes a node sees) of trees, filled up."""
        rows, most = len(trees), self.most if self.fixed else max(map(len, trees))
        symbols, deep = np.zeros((rows, most), np.int64), np.zeros((rows, most), np.int64)
        below = np.tile(np.eye(most, dtype=np.bool_), (rows, 1, 1))
        for row, tree in enumerate(trees):
            symbols[row, : len(tree)] = tree.symbols
            mask, depth = below[row], deep[row]
            for node, parent in enumerate(tree.parents[1:], 1):
                mask[node] |= mask[parent]
                depth[node] = depth[parent] + 1
        device = self.ids.device
        tokens = self.ids[torch.from_numpy(symbols).to(device)]
        return tokens, torch.from_numpy(deep).to(device), torch.from_numpy(below).to(device)

    def _allowed(self, trees: Sequence[Tree], nodes: int) -> torch.Tensor:
        """(B, N, 12): which symbols, in the order of `symbols`, may follow each node."""
        allowed = np.zeros((len(trees), nodes, len(self.symbols)), np.bool_)
        for row, tree in enumerate(trees):
            allowed[row, : len(tree)] = [_may_follow(self.grammar, state) for state in tree.states]
        allowed[..., 0] |= ~allowed.any(2)  # of what only fills up
        return torch.from_numpy(allowed[..., self.symbols]).to(self.ids.device)

    def _judge(self, hidden: torch.Tensor, head: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """(B, N, 1 + 12): the pick after each node, and the symbols' probabilities."""
        logits = torch.nn.functional.linear(hidden, head).float().masked_fill(~allowed, float("-inf"))
        return torch.cat([logits.argmax(2, keepdim=True).to(logits.dtype), torch.softmax(logits, 2)], 2)

    def _told(self, judgement: torch.Tensor) -> Verdict:
        both = judgement.cpu().numpy()
        probabilities = np.empty_like(both[..., 1:])
        probabilities[..., self.symbols] = both[..., 1:]
        return self.symbols[both[..., 0].astype(np.int64)].tolist(), probabilities


def _may_follow(grammar: Grammar, state: State) -> np.ndarray:
    number, digits = state
    if number == grammar.count:
        return np.zeros(len(SYMBOLS) + 1, np.bool_)
    return _row(grammar.bins, number == grammar.count - 1, digits)


@lru_cache(maxsize=10_000)
def _row(bins: int, last: bool, digits: str) -> np.ndarray:
    row = np.zeros(len(SYMBOLS) + 1, np.bool_)
    row[list(Grammar(bins, 1 if last else 2).allowed((0, digits)))] = True
    return row
