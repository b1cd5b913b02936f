"""Time the ways of decoding on the same weights and inputs, and compare their tokens."""

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
from vla0.core.greedy import model_inputs
from vla0.core.prompt import Prompt
from vla0.core.rollout import rest
from vla0.decode import GreedyDecoder, SpeculativeDecoder
from vla0.decode.approximate import MODES, approximate
from vla0.decode.draft import filled
from vla0.errors import InputError
from vla0.policy import VLA0

BASELINE = "generate"
# The arguments of SpeculativeDecoder for each way of decoding. None stands for transformers'
# generate with a logits processor.
WAYS: dict[str, dict[str, Any] | None] = {
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
# These ways are timed only when they are named, because not every machine has what they need.
OTHERS: dict[str, dict[str, Any]] = {
    "compiled": {"compiled": True},
    "compiled, one token a pass": {"compiled": True, "plain": True},
    "not invariant": {"invariant": False},
}
# Most nodes of a pass. In a large batch each row has fewer nodes, because the exhaustive ways would
# take minutes otherwise.
MAX_NODES = 1024
# These ways guess without the last chunk.
BLIND = ("forced symbols ride along", "all digits, one level", "all digits, two levels")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How a way of decoding performed with one batch size and one n_action_steps."""

    way: str
    batch: int
    n_action_steps: int
    chunks: int  # decoded chunks, where each row of a batch counts
    passes: float  # mean number of passes of a decode
    ms_median: float  # median time of a decode
    ms_p95: float  # 95th percentile of the time of a decode
    # share of the compared chunks that have the expected tokens, which are those of `generate` or
    # of the plainest way; None: nothing was compared
    identical: float | None
    # difference between the two largest logits where the first differing chunk parts
    margin: float | None = None
    compared: int = 0  # number of compared chunks


def bench(
    policy: VLA0,
    batches: Sequence[int],
    steps_per_query: Sequence[int],
    chunks: int,
    ways: Sequence[str] = tuple(WAYS),
    episodes: Episodes | None = None,
) -> list[Timing]:
    """Time each way of decoding with each batch size and n_action_steps.

    Args:
        policy: The policy whose model decodes.
        batches: Numbers of observations that are decoded together.
        steps_per_query: Numbers of steps between queries.
        chunks: Decodes of each combination.
        ways: Names of WAYS, OTHERS or MODES. The baseline is timed even when it is not named.
        episodes: Gives the observations of an episode by its number. None makes pictures up.
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
    """Yield the model's inputs for successive queries in `batch` episodes at once, endlessly."""
    streams = [episodes(number) for number in range(batch)]
    while True:
        yield prompt.observe([next(stream) for stream in streams])
        for stream in streams:
            for _ in range(n_action_steps - 1):
                next(stream)


def inputs_of(
    prompt: Prompt, episodes: Episodes, batch: int, n_action_steps: int, chunks: int
) -> list[dict[str, torch.Tensor]]:
    """Return the model's inputs for the first `chunks` queries."""
    return list(islice(queries(prompt, episodes, batch, n_action_steps), chunks))


def measure(
    policy: VLA0, way: str, inputs, n_action_steps: int, expected: list[np.ndarray], tick
) -> tuple[Timing, list[np.ndarray]]:
    """Time a way of decoding.

    Args:
        policy: The policy whose model decodes.
        way: A name of WAYS, OTHERS or MODES.
        inputs: The model's inputs of each query.
        n_action_steps: Steps between the queries.
        expected: The (B, H, D) levels to compare with. With an empty list nothing is compared.
        tick: Called after each decode.

    Returns:
        The timing, and the (B, H, D) levels of each decode.
    """
    batch = len(inputs[0]["input_ids"])
    decoder = _decoder(policy, way, batch)
    passes, calls = [], []
    seconds, decoded, last = [], [], None
    for query in {query["input_ids"].shape: query for query in inputs}.values():
        # This decode does what happens only once, and once for each size of the inputs. `generate`
        # has nothing to prepare.
        decoder.decode(query, 1 if way == BASELINE else None)
    hook = policy.model.get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
    for query in inputs:
        guesses = None
        if last is not None and way not in BLIND:
            guesses = [
                filled(rest(chunk, n_action_steps), policy.spec.chunk_size) for chunk in last
            ]
        started = time.perf_counter()
        last = decoder.decode(query, guesses=guesses)
        seconds.append(time.perf_counter() - started)
        # SpeculativeDecoder counts by itself, because a captured graph calls no hook.
        passes.append(decoder.passes if isinstance(decoder, SpeculativeDecoder) else len(calls))
        calls.clear()
        decoded.append(last)
        tick()
    hook.remove()
    same = [
        np.array_equal(a, b)
        # A slow way may have decoded fewer chunks.
        for levels, expected_levels in zip(decoded, expected, strict=False)
        for a, b in zip(levels, expected_levels, strict=True)
    ]
    margin = None
    if not all(same):
        at, row = divmod(same.index(False), batch)
        margin = parting(policy, inputs[at], row, expected[at][row], decoded[at][row])
    ms = np.array(seconds) * 1e3
    timing = Timing(
        way=way,
        batch=batch,
        n_action_steps=n_action_steps,
        chunks=len(decoded) * batch,
        passes=float(np.mean(passes)),
        ms_median=float(np.median(ms)),
        ms_p95=float(np.percentile(ms, 95)),
        identical=float(np.mean(same)) if same else None,
        margin=margin,
        compared=len(same),
    )
    return timing, decoded


def _decoder(policy: VLA0, way: str, batch: int) -> SpeculativeDecoder | GreedyDecoder:
    """Make the decoder of a way."""
    if way in MODES:
        return approximate(policy.model, policy.prompt, way)[1]
    if (settings := (WAYS | OTHERS)[way]) is None:
        return GreedyDecoder(policy.model, policy.prompt)
    fewer = (
        {"tree_size": min(settings["tree_size"], max(1, MAX_NODES // batch))}
        if "tree_size" in settings
        else {}
    )
    return SpeculativeDecoder(policy.model, policy.prompt, **settings | fewer)


@torch.inference_mode()
def parting(
    policy: VLA0, batch: dict[str, torch.Tensor], row: int, levels: np.ndarray, others: np.ndarray
) -> float:
    """Return the difference between the two largest logits at the place where two chunks part.

    Args:
        policy: The policy whose model gives the logits.
        batch: The model's inputs for B observations.
        row: The observation to which both chunks belong.
        levels: (H, D) levels of a chunk.
        others: (H, D) levels of a chunk that differs from it.
    """
    prompt, codec = policy.prompt, ActionCodec(policy.spec)
    texts = [prompt.answer_ids(codec.write(chunk)) for chunk in (levels, others)]
    agreed = next(place for place, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
    grammar = Grammar(policy.spec.bins, policy.spec.numbers)
    state = grammar.start
    for token in texts[0][:agreed]:
        state = grammar.advance(state, prompt.symbol_ids.index(token))
    more = torch.tensor([texts[0][:agreed]] * len(batch["input_ids"]), dtype=torch.long).reshape(
        len(batch["input_ids"]), -1
    )
    longer = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    inputs = {
        # What is aligned with the tokens goes on as text, of type 0.
        name: torch.cat([tensor, longer.get(name, torch.zeros_like(more))], 1)
        if tensor.shape == batch["input_ids"].shape
        else tensor
        for name, tensor in batch.items()
    }
    logits = (
        policy.model(**model_inputs(policy.model, inputs), logits_to_keep=1).logits[row, -1].float()
    )
    first, second = torch.topk(
        logits[[prompt.symbol_ids[s] for s in grammar.allowed(state)]], 2
    ).values.tolist()
    return first - second


def tables(rows: Sequence[Timing]) -> list[Table]:
    """Return a table for each batch size and n_action_steps.

    It lists the ways, and how many times faster than `generate` each is.
    """
    result = []
    for (batch, n_action_steps), group in groupby(
        rows, key=lambda row: (row.batch, row.n_action_steps)
    ):
        timings, columns = list(group), ("passes", "ms", "95 %", "faster", "identical")
        table = Table(
            Column("way", no_wrap=True),
            *(Column(name, no_wrap=True, justify="right") for name in columns),
        )
        table.title = f"{batch} at once, {n_action_steps} steps a query, {timings[0].chunks} chunks"
        base = next(row.ms_median for row in timings if row.way == BASELINE)
        for row in timings:
            cells = (
                f"{row.passes:.1f}",
                f"{row.ms_median:.1f}",
                f"{row.ms_p95:.1f}",
                f"{base / row.ms_median:.1f}",
            )
            same = "" if row.identical is None else f"{row.identical:.1%}"
            same += "" if row.margin is None else f", {row.margin:.2g}"
            table.add_row(row.way, *cells, same)
        if any(row.margin is not None for row in timings):
            table.caption = (
                "after the share: the margin of the model's choice where the first "
                "other chunk parts"
            )
        result.append(table)
    return result


def refuse(
    batches: Sequence[int],
    steps_per_query: Sequence[int],
    chunks: int,
    chunk_size: int,
    ways: Sequence[str] = (),
) -> None:
    """Raise InputError for numbers that are out of range, and for unknown ways."""
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
