"""How fast chunks are decoded here, each way, on the same weights and inputs, and whether the
tokens are the same.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from rich.table import Column, Table

from vla0.bench.inputs import Episodes, moving_pictures
from vla0.core.codec import ActionCodec, Grammar
from vla0.core.prompt import Prompt
from vla0.core.rollout import rest
from vla0.decode import GreedyDecoder, SpeculativeDecoder
from vla0.decode.approximate import MODES, approximate
from vla0.decode.draft import filled
from vla0.errors import InputError
from vla0.policy import VLA0

BASELINE = "generate"
WAYS: dict[
    str, dict[str, Any] | None
] = {  # arguments of SpeculativeDecoder; None: transformers' generate with a logits processor
    BASELINE: None,
    "one token a pass": {"plain": True},
    "forced symbols ride along": {
        "tree_size": 4,
        "chain_fraction": 0.0,
        "min_probability": 0.999,
        "learning": False,
    },
    "all digits, one level": {"tree_size": 21, "chain_fraction": 0.0, "learning": False},
    "all digits, two levels": {"tree_size": 232, "chain_fraction": 0.0, "learning": False},
    "tree of the last chunk": {"chain_fraction": 0.0, "learning": False},
    "tree that learns": {"chain_fraction": 0.0},
    "tree that learns, and a tail": {},
}
OTHERS: dict[str, dict[str, Any]] = {  # by name only: what they are for, a machine may not have
    "compiled": {"compiled": True},
    "not invariant": {"invariant": False},
}
# nodes of a pass: of many rows each has fewer, or the exhaustive ways would take minutes
MOST = 1024
# they guess without a last chunk
BLIND = ("forced symbols ride along", "all digits, one level", "all digits, two levels")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """A row of the result."""

    way: str
    batch: int
    n_action_steps: int
    chunks: int  # decoded, each row of a batch counted
    passes: float  # mean of a decode
    ms_median: float  # of a decode
    ms_p95: float
    # share of the compared chunks with the expected tokens: those of `generate`, or the plainest
    # way's
    identical: float
    # where the first other one parts: how far the two likeliest tokens' logits are apart
    margin: float | None = None
    compared: int = 0  # chunks


def bench(
    policy: VLA0,
    batches: Sequence[int],
    steps_per_query: Sequence[int],
    chunks: int,
    ways: Sequence[str] = tuple(WAYS),
    episodes: Episodes | None = None,
) -> list[Timing]:
    """Timings of each way, batch size and n_action_steps. chunks: decodes of each.

    episodes: of a number its observations.
    """
    episodes = episodes or moving_pictures(policy.spec)
    rows = []
    with Progress(transient=True) as progress:
        bar = progress.add_task(
            "decoding", total=len(ways) * len(batches) * len(steps_per_query) * chunks
        )
        for batch in batches:
            for n_action_steps in steps_per_query:
                inputs = inputs_of(policy.prompt, episodes, batch, n_action_steps, chunks)
                expected: list[np.ndarray] = []
                for way in ways if ways[0] == BASELINE else (BASELINE, *ways):
                    row, levels = measure(
                        policy, way, inputs, n_action_steps, expected, lambda: progress.advance(bar)
                    )
                    expected = expected or levels
                    rows.append(row)
    return rows


def queries(
    prompt: Prompt, episodes: Episodes, batch: int, n_action_steps: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The model's inputs of successive queries in `batch` episodes at once, without an end."""
    streams = [episodes(number) for number in range(batch)]
    while True:
        yield prompt.observe([next(stream) for stream in streams])
        for stream in streams:
            for _ in range(n_action_steps - 1):
                next(stream)


def inputs_of(
    prompt: Prompt, episodes: Episodes, batch: int, n_action_steps: int, chunks: int
) -> list[dict[str, torch.Tensor]]:
    """Those of the first `chunks` queries."""
    return list(islice(queries(prompt, episodes, batch, n_action_steps), chunks))


def measure(
    policy: VLA0, way: str, inputs, n_action_steps: int, expected: list[np.ndarray], tick
) -> tuple[Timing, list[np.ndarray]]:
    batch = len(inputs[0]["input_ids"])
    decoder = _decoder(policy, way, batch)
    passes, calls = [], []
    seconds, found, last = [], [], None
    for own in {own["input_ids"].shape: own for own in inputs}.values():
        # What happens once, and once for each size of the inputs, happens here; `generate` has
        # nothing to prepare.
        decoder.decode(own, 1 if way == BASELINE else None)
    hook = policy.model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    for own in inputs:
        guesses = None
        if last is not None and way not in BLIND:
            guesses = [
                filled(rest(chunk, n_action_steps), policy.spec.chunk_size) for chunk in last
            ]
        started = time.perf_counter()
        last = decoder.decode(own, guesses=guesses)
        seconds.append(time.perf_counter() - started)
        passes.append(
            decoder.passes if isinstance(decoder, SpeculativeDecoder) else len(calls)
        )  # what is captured calls no hook
        calls.clear()
        found.append(last)
        tick()
    hook.remove()
    same = [
        np.array_equal(a, b)
        # of a slow way there may be fewer
        for one, other in zip(found, expected or found, strict=False)
        for a, b in zip(one, other, strict=True)
    ]
    margin = None
    if not all(same):
        at, row = divmod(same.index(False), batch)
        margin = parting(policy, inputs[at], row, expected[at][row], found[at][row])
    ms = np.array(seconds) * 1e3
    timing = Timing(
        way=way,
        batch=batch,
        n_action_steps=n_action_steps,
        chunks=len(found) * batch,
        passes=float(np.mean(passes)),
        ms_median=float(np.median(ms)),
        ms_p95=float(np.percentile(ms, 95)),
        identical=float(np.mean(same)),
        margin=margin,
        compared=len(same),
    )
    return timing, found


def _decoder(policy: VLA0, way: str, batch: int) -> SpeculativeDecoder | GreedyDecoder:
    if way in MODES:
        return approximate(policy.model, policy.prompt, way)[1]
    if (settings := (WAYS | OTHERS)[way]) is None:
        return GreedyDecoder(policy.model, policy.prompt)
    fewer = (
        {"tree_size": min(settings["tree_size"], max(1, MOST // batch))}
        if "tree_size" in settings
        else {}
    )
    return SpeculativeDecoder(policy.model, policy.prompt, **settings | fewer)


@torch.inference_mode()
def parting(
    policy: VLA0, batch: dict[str, torch.Tensor], row: int, one: np.ndarray, other: np.ndarray
) -> float:
    """Where two chunks of levels part: the difference of the two largest logits that the grammar
    allows.
    """
    prompt, codec = policy.prompt, ActionCodec(policy.spec)
    texts = [prompt.answer_ids(codec.write(levels)) for levels in (one, other)]
    agreed = next(place for place, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
    grammar = Grammar(policy.spec.bins, policy.spec.numbers)
    state = grammar.start
    for token in texts[0][:agreed]:
        state = grammar.advance(state, prompt.symbol_ids.index(token))
    more = torch.tensor([texts[0][:agreed]] * len(batch["input_ids"]), dtype=torch.long).reshape(
        len(batch["input_ids"]), -1
    )
    inputs = dict(batch)
    inputs["input_ids"] = torch.cat([batch["input_ids"], more], 1)
    inputs["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
    inputs["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(more)], 1)
    inputs = {name: tensor.to(policy.model.device) for name, tensor in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(policy.model.dtype)
    logits = policy.model(**inputs, logits_to_keep=1).logits[row, -1].float()
    first, second = torch.topk(
        logits[[prompt.symbol_ids[s] for s in grammar.allowed(state)]], 2
    ).values.tolist()
    return first - second


def tables(rows: Sequence[Timing]) -> list[Table]:
    """A table for each batch size and n_action_steps: the ways, and how many times faster than
    `generate`.
    """
    result = []
    for (batch, n_action_steps), group in groupby(
        rows, key=lambda row: (row.batch, row.n_action_steps)
    ):
        own, columns = list(group), ("passes", "ms", "95 %", "faster", "identical")
        found = Table(
            Column("way", no_wrap=True),
            *(Column(name, no_wrap=True, justify="right") for name in columns),
        )
        found.title = f"{batch} at once, {n_action_steps} steps a query, {own[0].chunks} chunks"
        base = next(row.ms_median for row in own if row.way == BASELINE)
        for row in own:
            cells = (
                f"{row.passes:.1f}",
                f"{row.ms_median:.1f}",
                f"{row.ms_p95:.1f}",
                f"{base / row.ms_median:.1f}",
            )
            same = f"{row.identical:.1%}" + ("" if row.margin is None else f", {row.margin:.2g}")
            found.add_row(row.way, *cells, same)
        if any(row.margin is not None for row in own):
            found.caption = (
                "after the share: the margin of the model's choice where the first "
                "other chunk parts"
            )
        result.append(found)
    return result


def refuse(
    batches: Sequence[int],
    steps_per_query: Sequence[int],
    chunks: int,
    chunk_size: int,
    ways: Sequence[str] = (),
) -> None:
    """Raises InputError for numbers that mean nothing, and ways that there are not."""
    if min(batches) < 1 or chunks < 1:
        raise InputError(
            "batch and chunks >= 1", f"{min(batches)} and {chunks}", "give whole numbers from 1"
        )
    if not 1 <= min(steps_per_query) <= max(steps_per_query) <= chunk_size:
        raise InputError(
            f"n_action_steps in 1..{chunk_size}, the chunk's size",
            f"{sorted(steps_per_query)}",
            "give fewer steps a query",
        )
    if unknown := [way for way in ways if way not in (*WAYS, *OTHERS, *MODES)]:
        raise InputError(
            f"a way of {(*WAYS, *OTHERS, *MODES)}", f"'{unknown[0]}'", "choose one of those"
        )
