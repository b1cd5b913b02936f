"""Make what succeeded likelier than what failed: GRPO on the tokens of chunks, or imitation.

Z. Shao et al., arXiv 2402.03300; the wider upper clip and the mean over all tokens of a step are
those of Q. Yu et al., arXiv 2503.14476. Imitation of one's own successes: H. Dong et al., arXiv
2304.06767.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vla0.core.codec import END, SPACE, SYMBOLS, Grammar, written
from vla0.core.greedy import model_inputs
from vla0.core.prompt import Prompt, Seen
from vla0.decode.draft import after, may_follow
from vla0.errors import InputError
from vla0.rl import processes
from vla0.rl.config import UpdateConfig
from vla0.rl.rollouts import Played, Turn

EASY = 0.1  # weight of a success in a group where none failed, where it is 1 if nearly all did
# Of the weights that act, by update.precision.
DTYPES: dict[str | None, Any] = {None: "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


class Query(Protocol):
    """What was seen and written at one step; `Turn` is one."""

    @property
    def seen(self) -> Seen:
        """What the model saw."""
        ...

    @property
    def levels(self) -> np.ndarray:
        """(n, D) what was written."""
        ...


@dataclass(frozen=True)
class Weighed:
    """A query, and how much better than its group its episode was, or how much it counts."""

    turn: Query
    advantage: float


def advantages(group: Sequence[float], scale: bool) -> list[float]:
    """Return how much better than its group each episode was.

    Args:
        group: The rewards of episodes from one initial state.
        scale: Divide by the group's standard deviation.

    Returns:
        As many numbers, which sum to 0; all 0 where no episode differs.
    """
    rewards = np.asarray(group, np.float64)
    apart = rewards - rewards.mean()
    spread = rewards.std()
    if spread == 0:
        return [0.0] * len(rewards)
    return (apart / spread if scale else apart).tolist()


def weighed(groups: Sequence[Sequence[Played]], config: UpdateConfig) -> list[Weighed]:
    """Return all queries of groups of episodes with their advantages, but for those of 0.

    Args:
        groups: The episodes of each initial state.
        config: Whether advantages are scaled, and how much failures count.
    """
    found = []
    for group in groups:
        apart = advantages([float(episode.success) for episode in group], config.scale_by_deviation)
        for episode, advantage in zip(group, apart, strict=True):
            weight = advantage if advantage > 0 else config.failures * advantage
            if weight:
                found += [Weighed(turn, weight) for turn in episode.turns]
    return found


def imitated(groups: Sequence[Sequence[Played]]) -> list[Weighed]:
    """Return the queries of all successes, with how much each counts: 1 in the mean.

    All tasks count alike, so that none is forgotten while others are learned. Within a task an
    episode counts the more, the more of its group failed.

    Args:
        groups: This process's episodes of each initial state. Where there are several processes,
            all ask together.
    """
    found: list[tuple[str, float, Turn]] = []
    for group in groups:
        hard = float(1 - np.mean([episode.success for episode in group]) + EASY)
        for episode in (episode for episode in group if episode.success):
            each = hard / max(1, len(episode.turns))
            found += [(episode.job[1], each, turn) for turn in episode.turns]
    sums: dict[str, float] = {}
    count = 0
    for others in processes.gathered([(task, each) for task, each, _ in found]):
        count += len(others)
        for task, each in others:
            sums[task] = sums.get(task, 0.0) + each
    return [Weighed(turn, each / sums[task] / len(sums) * count) for task, each, turn in found]


def symbols_of(levels: np.ndarray, grammar: Grammar) -> list[int]:
    """Return the symbols of the first (n, D) levels of a chunk, with the one after each number."""
    symbols = [SYMBOLS.index(character) for character in written(levels)]
    assert symbols[-1] == SPACE
    return [*symbols[:-1], END] if levels.size == grammar.count else symbols


def log_probabilities(
    model: Any, prompt: Prompt, turns: Sequence[Query], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities of what was written, of the distribution that it was drawn from.

    That is the model's over what the grammar allows at each place, at a temperature.

    Args:
        model: The model.
        prompt: Its prompt.
        turns: B queries.
        temperature: Divides the log-probabilities.

    Returns:
        (B, n) fp32, padded on the left by 0, and (B, n) bool, where there is a symbol.
    """
    grammar = Grammar(prompt.spec.bins, prompt.spec.numbers)
    rows = [symbols_of(turn.levels, grammar) for turn in turns]
    # The last symbol is not read but written, so the text before it is what the model reads.
    read = ["".join(SYMBOLS[symbol] for symbol in row[:-1]) for row in rows]
    batch = prompt.gather([turn.seen for turn in turns], prefixes=read)
    longest = max(map(len, rows))
    symbols = np.zeros((len(rows), longest), np.int64)
    allowed = np.zeros((len(rows), longest, len(SYMBOLS) + 1), np.bool_)
    allowed[..., 0] = True  # where there is none, so that nothing is infinite
    present = np.zeros((len(rows), longest), np.bool_)
    for line, row in enumerate(rows):
        state, first = grammar.start, longest - len(row)
        symbols[line, first:], present[line, first:] = row, True
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
        imitate: bool = False,
        share: float = 1.0,
    ) -> dict[str, float]:
        """Take the steps of one round. Where there are several processes, all take them together.

        Args:
            queries: What was played in this process, with advantages.
            seed: Of the order in which the queries come.
            imitate: The queries were not played by this model: what was done in them becomes
                likelier, each by its advantage, which must not be negative.
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
        several = config.epochs * config.steps_per_round > 1 and not imitate
        # With a single step the model that is trained is still the one that played.
        old = self._old([query.turn for query in queries]) if several else [None] * len(queries)
        names = ("tokens", "ratio", "clipped", "kl", "norm", "steps")
        sums: dict[str, float] = dict.fromkeys(names, 0.0)
        for _ in range(config.epochs):
            order = rng.permutation(len(queries))
            for step in np.array_split(order, config.steps_per_round):
                self._step([(queries[i], old[i]) for i in step], sums, imitate)
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

    def _step(
        self,
        items: Sequence[tuple[Weighed, torch.Tensor | None]],
        sums: dict[str, float],
        imitate: bool,
    ) -> None:
        """Take one step of the optimizer; the loss is the mean over all tokens."""
        grammar = Grammar(self.prompt.spec.bins, self.prompt.spec.numbers)
        own = sum(len(symbols_of(query.turn.levels, grammar)) for query, _ in items)
        (total,) = processes.summed([own])
        if not total:
            return
        for batch in self._batches(items):
            turns = [query.turn for query, _ in batch]
            new, there = log_probabilities(self.model, self.prompt, turns, self.temperature)
            old = new.detach().clone()
            for row, (_, before) in enumerate(batch):
                if before is not None:
                    old[row, there[row]] = before
            advantage = torch.tensor([q.advantage for q, _ in batch], device=new.device).float()
            losses, held = objective(new, old, there, advantage, self.config)
            if imitate:
                losses, held = -advantage[:, None] * new, torch.zeros_like(there)
            if self.start is not None:
                with torch.no_grad():
                    first, _ = log_probabilities(self.start, self.prompt, turns, self.temperature)
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
        got = str(error).splitlines()[0]
        raise InputError(f"memory for {what}", got, remedy) from error


def learning(config: UpdateConfig) -> Any:
    """Explain a lack of memory while the weights are trained."""
    remedy = "halve update.batch_size, which changes nothing else; then "
    remedy += "update.gradient_checkpointing=true, or update.lora.rank=32"
    return memory(f"update.batch_size={config.batch_size}", remedy)
