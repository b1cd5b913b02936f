"""Make what succeeded likelier than what failed: GRPO on the tokens of chunks, or imitation.

Z. Shao et al., arXiv 2402.03300; the wider upper clip and the mean over all tokens of a step are
those of Q. Yu et al., arXiv 2503.14476.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from vla0.core.codec import END, SPACE, SYMBOLS, Grammar, written
from vla0.core.greedy import model_inputs
from vla0.core.prompt import HIDDEN, Prompt, hide
from vla0.decode.draft import after, may_follow
from vla0.errors import InputError, said
from vla0.rl import processes
from vla0.rl.config import UpdateConfig
from vla0.rl.weights import Query, Weighed

# Of the weights that act, by update.precision.
DTYPES: dict[str | None, Any] = {None: "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


def symbols_of(levels: np.ndarray, grammar: Grammar) -> list[int]:
    """Return the symbols of the first (n, D) levels of a chunk, with the one after each number."""
    symbols = [SYMBOLS.index(character) for character in written(levels)]
    assert symbols[-1] == SPACE
    return [*symbols[:-1], END] if levels.size == grammar.count else symbols


def read_of(levels: np.ndarray, grammar: Grammar) -> str:
    """Return the text that a model reads while it writes (n, D) levels: all but the last symbol."""
    return "".join(SYMBOLS[symbol] for symbol in symbols_of(levels, grammar)[:-1])


def log_probabilities(
    model: Any,
    prompt: Prompt,
    turns: Sequence[Query],
    temperature: float,
    read: Sequence[str] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of what was written, of the distribution that it was drawn from.

    That is the model's over what the grammar allows at each place, at a temperature.

    Args:
        model: The model.
        prompt: Its prompt.
        turns: B queries.
        temperature: Divides the log-probabilities.
        read: What it reads of its own text, where some of that is hidden (masked action
            augmentation). A hidden symbol counts as none.

    Returns:
        (B, n) fp32, padded on the left by 0, and (B, n) bool, where there is a symbol.
    """
    grammar = Grammar(prompt.spec.bins, prompt.spec.numbers)
    rows = [symbols_of(turn.levels, grammar) for turn in turns]
    texts = read or [read_of(turn.levels, grammar) for turn in turns]
    batch = prompt.gather([turn.seen for turn in turns], prefixes=texts)
    longest = max(map(len, rows))
    symbols = np.zeros((len(rows), longest), np.int64)
    allowed = np.zeros((len(rows), longest, len(SYMBOLS) + 1), np.bool_)
    allowed[..., 0] = True  # where there is none, so that nothing is infinite
    present = np.zeros((len(rows), longest), np.bool_)
    for line, row in enumerate(rows):
        state, first = grammar.start, longest - len(row)
        symbols[line, first:], present[line, -1] = row, True
        present[line, first:-1] = [character != HIDDEN for character in texts[line]]
        for place, symbol in enumerate(row, first):
            allowed[line, place] = may_follow(grammar, state)
            state = after(state, symbol)
    inputs = model_inputs(model, batch)
    logits = model(**inputs, logits_to_keep=longest, use_cache=False).logits[:, -longest:]
    device = logits.device
    ids = torch.tensor(prompt.symbol_ids, device=device)
    scores = logits[..., ids].float() / temperature
    scores = scores.masked_fill(~torch.from_numpy(allowed).to(device), -torch.inf)
    chosen = torch.from_numpy(symbols).to(device)[..., None]
    there = torch.from_numpy(present).to(device)
    found = torch.log_softmax(scores, -1).gather(-1, chosen)[..., 0]
    return torch.where(there, found, 0.0), there


def objective(
    new: torch.Tensor,
    old: torch.Tensor,
    present: torch.Tensor,
    advantage: torch.Tensor,
    config: UpdateConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token, and where a clip holds it.

    Args:
        new: (B, n) log-probabilities by the model that is trained.
        old: (B, n) log-probabilities by the model that played.
        present: (B, n) bool, where there is a token.
        advantage: (B,) of the episodes.
        config: The clips, and whose ratio is clipped.

    Returns:
        (B, n) losses, 0 where there is no token, and (B, n) bool.
    """
    apart = torch.where(present, new - old, 0.0)
    ratio, weight = apart.exp(), advantage[:, None]
    if config.ratio == "chunk":  # one loss for all its tokens, of which each has a part
        ratio = apart.sum(1, keepdim=True).exp().expand_as(apart)
        weight = weight / present.sum(1, keepdim=True)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    held = clipped * weight < ratio * weight
    loss = -torch.where(held, clipped, ratio) * weight
    return torch.where(present, loss, 0.0), held & present


class Learner:
    """The weights that are trained, and their optimizer.

    Args:
        model: The model, perhaps inside peft's wrapping.
        prompt: Its prompt.
        config: How it learns.
        temperature: At which the episodes are played.
        start: The model at the start, which config.kl keeps it near to. None without that.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        config: UpdateConfig,
        temperature: float,
        start: Any = None,
    ):
        self.model, self.prompt, self.config = model, prompt, config
        self.temperature, self.start = temperature, start
        self.weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        # Steps of the optimizer are too small for 16 bits: they are added up in copies of 32.
        self.copies = {
            name: w if w.dtype == torch.float32 else w.detach().float().requires_grad_()
            for name, w in self.weights.items()
        }
        self.optimizer = torch.optim.AdamW(
            self.copies.values(), lr=config.learning_rate, weight_decay=0.0
        )
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        dropping = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
        if config.gradient_checkpointing and dropping:
            remedy = "leave it out: what acts must be what is trained"
            raise InputError(
                "a model without dropout for update.gradient_checkpointing",
                f"{dropping[0]}",
                remedy,
            )

    def learn(
        self,
        queries: Sequence[Weighed],
        seed: Sequence[int],
        share: float = 1.0,
    ) -> dict[str, float]:
        """Take the steps of one round. Where there are several processes, all take them together.

        Args:
            queries: What was played in this process, with advantages, and what is imitated.
            seed: Of the order in which the queries come.
            share: Of the learning rate.

        Returns:
            What TensorBoard shows: mean ratio, share of tokens that a clip held, and so on.
        """
        started, config = time.monotonic(), self.config
        # transformers saves memory in training mode alone. Nothing else differs in it.
        self.model.train(config.gradient_checkpointing)
        rng = np.random.default_rng(list(seed))
        for group in self.optimizer.param_groups:
            group["lr"] = share * config.learning_rate
        # With a single step the model that is trained is still the one that played.
        several = config.epochs * config.steps_per_round > 1
        played = [query.turn for query in queries if not query.imitated and several]
        rows = iter(self._old(played))
        old = [None if query.imitated else next(rows, None) for query in queries]
        names = ("tokens", "ratio", "clipped", "kl", "norm", "steps")
        sums: dict[str, float] = dict.fromkeys(names, 0.0)
        for _ in range(config.epochs):
            order = rng.permutation(len(queries))
            for step in np.array_split(order, config.steps_per_round):
                items = [(queries[i], old[i], self._read(queries[i], rng)) for i in step]
                self._step(items, sums)
        self.model.eval()
        shared = ("ratio", "clipped", "kl")
        sums |= dict(zip(shared, processes.summed(sums[name] for name in shared), strict=True))
        tokens = sums["tokens"] or 1.0
        return {
            "ratio": sums["ratio"] / tokens,
            "clipped": sums["clipped"] / tokens,
            "kl": sums["kl"] / tokens,
            "gradient_norm": sums["norm"] / max(1.0, sums["steps"]),
            "learning_rate": share * config.learning_rate,
            "tokens": sums["tokens"] / config.epochs,
            "update_s": time.monotonic() - started,
        }

    def _batches(self, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
        for first in range(0, len(items), self.config.batch_size):
            yield items[first : first + self.config.batch_size]

    @torch.no_grad()
    def _old(self, turns: Sequence[Query]) -> list[torch.Tensor]:
        """Return the log-probabilities (n,) of each query by the model as it is."""
        found = []
        for batch in self._batches(turns):
            rows = log_probabilities(self.model, self.prompt, batch, self.temperature)
            found += [row[there] for row, there in zip(*rows, strict=True)]
        return found

    def _read(self, query: Weighed, rng: np.random.Generator) -> str:
        """Return what the model reads of its text. Of what it imitates some may be hidden."""
        grammar = Grammar(self.prompt.spec.bins, self.prompt.spec.numbers)
        given, text = self.config.augmentation, read_of(query.turn.levels, grammar)
        if not query.imitated:
            return text
        return hide(text, rng, given.mask, given.mask_most, given.mask_none)

    def _step(
        self,
        items: Sequence[tuple[Weighed, torch.Tensor | None, str]],
        sums: dict[str, float],
    ) -> None:
        """Take one step of the optimizer; the loss is the mean over all tokens."""
        own = sum(len(text) + 1 - text.count(HIDDEN) for *_, text in items)
        (total,) = processes.summed([own])
        if not total:
            return
        for batch in self._batches(items):
            turns, read = [query.turn for query, *_ in batch], [text for *_, text in batch]
            new, there = log_probabilities(self.model, self.prompt, turns, self.temperature, read)
            old = new.detach().clone()
            for row, (_, before, _) in enumerate(batch):
                if before is not None:
                    old[row, there[row]] = before
            advantage = torch.tensor([q.advantage for q, *_ in batch], device=new.device).float()
            losses, held = objective(new, old, there, advantage, self.config)
            imitated = torch.tensor([q.imitated for q, *_ in batch], device=new.device)[:, None]
            losses = torch.where(imitated, -advantage[:, None] * new, losses)
            held = held & ~imitated
            if self.start is not None:
                with torch.no_grad():
                    first, _ = log_probabilities(
                        self.start, self.prompt, turns, self.temperature, read
                    )
                apart = first - new  # J. Schulman's estimator, which is never below 0
                divergence = torch.where(there, apart.exp() - apart - 1, 0.0)
                losses = losses + self.config.kl * divergence
                sums["kl"] += float(divergence.detach().sum())
            (losses.sum() / total).backward()
            self._add_up()
            sums["ratio"] += float((new.detach() - old).exp()[there].sum())
            sums["clipped"] += float(held.sum())
        sums["tokens"] += total
        sums["norm"] += self._follow()
        sums["steps"] += 1

    def _add_up(self) -> None:
        """Add the gradients of weights of 16 bits up in their copies of 32."""
        for name, weight in self.weights.items():
            copy = self.copies[name]
            if copy is not weight and weight.grad is not None:
                more = weight.grad.float()
                copy.grad = more if copy.grad is None else copy.grad + more
                weight.grad = None

    def _follow(self) -> float:
        """Let the weights follow their gradients, and return the norm of these."""
        processes.sum_gradients(self.copies.values())
        limit = self.config.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.copies.values(), limit))
        if not np.isfinite(norm):
            remedy = "choose a smaller update.learning_rate; the checkpoint before is whole"
            raise InputError("finite gradients", f"a norm of {norm}", remedy)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, weight in self.weights.items():
                if self.copies[name] is not weight:
                    weight.copy_(self.copies[name])
        return norm

    def state(self) -> dict[str, Any]:
        """Return what a run needs to go on: trained weights in 32 bits, and the optimizer."""
        weights = {name: copy.detach() for name, copy in self.copies.items()}
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        for name, copy in self.copies.items():
            copy.copy_(state["weights"][name])
            self.weights[name].copy_(copy)
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]


@contextmanager
def memory(what: str, remedy: str) -> Iterator[None]:
    """Turn a lack of memory into an InputError that names what took it and what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"memory for {what}", said(error), remedy) from error


def learning(config: UpdateConfig) -> Any:
    """Explain a lack of memory while the weights are trained."""
    remedy = "halve update.batch_size, which changes nothing else; then "
    remedy += "update.gradient_checkpointing=true, or update.lora.rank=32"
    return memory(f"update.batch_size={config.batch_size}", remedy)
