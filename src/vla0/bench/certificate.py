"""Certify that fast decoding on this device gives the chunks of decoding one token a pass."""

import importlib.metadata
import math
import time
from typing import Any

import numpy as np
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from vla0.bench.decode import parting, queries
from vla0.bench.inputs import Episodes, moving_pictures
from vla0.checkpoint import io as models
from vla0.core.rollout import rest
from vla0.decode import SpeculativeDecoder
from vla0.decode.draft import filled
from vla0.decode.tree_size import device_name
from vla0.errors import InputError
from vla0.policy import VLA0


def certificate(
    policy: VLA0,
    chunks: int,
    batch: int = 1,
    n_action_steps: int = 1,
    episodes: Episodes | None = None,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Compare successive chunks with those of decoding one token a pass.

    Args:
        policy: The policy of a checkpoint.
        chunks: How many chunks are compared.
        batch: Observations that are decoded together. They share matrix products, so a certificate
            is valid for one size of the batch.
        n_action_steps: Steps between queries.
        episodes: Gives the observations of an episode by its number. None makes pictures up.
        seconds: Time after which the comparison ends early.

    Returns:
        The content of the certificate. For each chunk that differs it holds the margin: the
        difference between the two largest logits at the place where the chunks part.

    Raises:
        InputError: When the fast decoder does not drive the policy's model, or a number is out of
            range.
    """
    if not isinstance(policy.decoder, SpeculativeDecoder):
        raise InputError(
            "a model that the fast decoder drives", "one decoded plainly", "nothing to certify here"
        )
    if min(chunks, batch) < 1 or not 1 <= n_action_steps <= policy.spec.chunk_size:
        got = f"{chunks}, {batch} and {n_action_steps}"
        raise InputError(
            f"chunks and batch >= 1, n_action_steps in 1..{policy.spec.chunk_size}",
            got,
            "give whole numbers from 1",
        )
    inputs = queries(policy.prompt, episodes or moving_pictures(policy.spec), batch, n_action_steps)
    decoder = SpeculativeDecoder(policy.model, policy.prompt)
    plain = SpeculativeDecoder(
        policy.model, policy.prompt, decoder.nodes(decoder.engine.held(batch)), plain=True
    )
    differing: list[dict[str, Any]] = []
    compared, passes, last, started = 0, [], None, time.monotonic()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("certifying", total=chunks)
        while compared < chunks and time.monotonic() - started < seconds:
            query = next(inputs)
            expected = plain.decode(query)
            guesses = (
                None
                if last is None
                else [filled(rest(chunk, n_action_steps), policy.spec.chunk_size) for chunk in last]
            )
            last = decoder.decode(query, guesses=guesses)
            passes.append(decoder.passes)
            for row, (plain_levels, fast_levels) in enumerate(zip(expected, last, strict=True)):
                if not np.array_equal(plain_levels, fast_levels):
                    margin = parting(policy, query, row, plain_levels, fast_levels)
                    differing.append(
                        {
                            "chunk": compared + row,
                            "numbers": int((plain_levels != fast_levels).sum()),
                            "margin": margin,
                        }
                    )
            compared += batch
            progress.update(bar, completed=compared)
    return {
        "chunks": compared,
        "identical": compared - len(differing),
        "differing": differing,
        "batch": batch,
        "n_action_steps": n_action_steps,
        "passes": float(np.mean(passes)),
        "invariant": decoder.engine.invariant,
        "nodes": plain.tree_size,
        "checkpoint": models.fingerprint(policy.model, policy.spec),
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "device": device_name(policy.model.device),
        "versions": {name: _version(name) for name in ("vla0", "torch", "transformers", "numpy")},
    }


def _version(name: str) -> str | None:
    """Return the version of a package, or None when it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # vla0 runs from a folder of sources
        return None
