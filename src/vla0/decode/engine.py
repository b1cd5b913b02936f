"""The passes of the unmodified model: prefill, then trees of guesses over a cache of its keys and values."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from vla0.codec import SYMBOLS, Grammar
from vla0.decode.draft import State, Tree

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


class Slots:
    """Keys and values of all layers in one tensor (layers, 2, B, heads, slots, width), written where it is told.

    What the language model needs of a transformers Cache. A tree's nodes lie side by side; the path that turns out true is
    moved together, all layers at once.
    """

    is_compileable = False

    def __init__(self, config: Any, rows: int, slots: int, like: torch.Tensor):
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.content = like.new_zeros((config.num_hidden_layers, 2, rows, heads, slots, width))
        self.first = self.end = 0  # the slots that the next pass writes

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any):
        """Writes a layer's keys and values (B, heads, L, width), and gives all up to the last written."""
        own = self.content[layer, :, :, :, : self.end]
        own[0, :, :, self.first :] = keys
        own[1, :, :, self.first :] = values
        return own[0], own[1]

    def get_seq_length(self, layer: int = 0) -> int:
        """How many slots come before the next pass."""
        return self.first

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies slots source (B, n) to target (B, n) of the same row."""
        rows = torch.arange(len(source), device=source.device)[:, None]
        # Indices apart by slices: the result has them in front, (B, n, layers, 2, heads, width), and so has what is assigned.
        self.content[:, :, rows, :, target] = self.content[:, :, rows, :, source]


class Engine:
    """The passes of one decode, for rows that go on together: `prefill`, then many times `step`, `accept` after each."""

    def __init__(self, model: Any, symbol_ids: Sequence[int], grammar: Grammar):
        self.model, self.language, self.grammar = model, model.model.language_model, grammar
        # Ties go to the lower token, as argmax over the whole vocabulary has it.
        self.symbols = np.argsort(symbol_ids)
        self.ids = torch.tensor(symbol_ids, device=model.device)
        self.head = model.lm_head.weight[self.ids[torch.from_numpy(self.symbols).to(model.device)]]
        self.passes = 0

    def prefill(self, batch: dict[str, torch.Tensor], trees: Sequence[Tree], room: int) -> Verdict:
        """Reads the prompts (B, L), padded on the left, and first trees whose node 0 is the prompt's last token.

        room: slots for the answer and a tree. Gives what `step` gives.
        """
        body, ids, seen = self.model.model, batch["input_ids"], batch["attention_mask"].bool()
        rows, length = ids.shape
        positions, _ = body.get_rope_index(
            ids, batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"], attention_mask=batch["attention_mask"]
        )
        images = body.get_image_features(batch["pixel_values"].to(self.model.dtype), batch["image_grid_thw"]).pooler_output
        embedded = body.get_input_embeddings()(ids)
        pictures = (ids == self.model.config.image_token_id)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(pictures, torch.cat(list(images)).to(embedded.dtype))
        self.cache = Slots(self.model.config.text_config, rows, length - 1 + room, embedded)
        self.seen = torch.cat([seen[:, :-1], seen.new_zeros((rows, room))], 1)  # slots that count, but for the tree's own
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
        hidden = self._pass(torch.cat([embedded, guesses], 1), places, mask)
        return self._judge(hidden[:, length - 1 :], trees)

    def step(self, trees: Sequence[Tree]) -> Verdict:
        """What the model says at the nodes of each row's tree."""
        tokens, deep, below = self._tensors(trees)
        seen = self.seen[:, None, : self.base].expand(-1, tokens.shape[1], -1)
        self.cache.first = self.base
        embedded = self.model.model.get_input_embeddings()(tokens)
        hidden = self._pass(embedded, self.place + deep, torch.cat([seen, below], 2))
        return self._judge(hidden, trees)

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

    def _pass(self, embedded: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.cache.end = self.cache.first + embedded.shape[1]
        mask = mask[:, None]
        if self.model.config.text_config._attn_implementation == "eager":  # it adds
            mask = torch.zeros_like(mask, dtype=embedded.dtype).masked_fill(~mask, torch.finfo(embedded.dtype).min)
        return self.language(
            inputs_embeds=embedded, position_ids=places, attention_mask={"full_attention": mask},
            past_key_values=self.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip

    def _tensors(self, trees: Sequence[Tree]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens (B, N), depths (B, N), mask (B, N, N): which nodes a node sees) of trees, filled up to the largest."""
        rows, most = len(trees), max(map(len, trees))
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

    def _judge(self, hidden: torch.Tensor, trees: Sequence[Tree]) -> Verdict:
        """What the model says after each node: (picks, (B, N, 12) probabilities), the grammar's symbols only."""
        logits = torch.nn.functional.linear(hidden, self.head).float()
        allowed = np.zeros(logits.shape, np.bool_)
        for row, tree in enumerate(trees):
            allowed[row, : len(tree)] = [_allowed(self.grammar, state) for state in tree.states]
        allowed[..., 0] |= ~allowed.any(2)  # of what only fills up
        logits = logits.masked_fill(~torch.from_numpy(allowed[..., self.symbols]).to(logits.device), float("-inf"))
        picks, shares = logits.argmax(2), torch.softmax(logits, 2)
        both = torch.cat([picks[..., None].to(shares.dtype), shares], 2).cpu().numpy()  # one transfer
        probabilities = np.empty_like(both[..., 1:])
        probabilities[..., self.symbols] = both[..., 1:]
        return self.symbols[both[..., 0].astype(np.int64)].tolist(), probabilities


@lru_cache(maxsize=100_000)
def _allowed(grammar: Grammar, state: State) -> np.ndarray:
    row = np.zeros(len(SYMBOLS) + 1, np.bool_)
    row[list(grammar.allowed(state))] = True
    return row
