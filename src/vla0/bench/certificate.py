"""A certificate: over many chunks of a checkpoint on this device, whether each is the one of one
token a pass.
"""

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
    """Over so many successive chunks: how many are identical to one token a pass, and of each other
    one where it parts.

    batch: observations decoded together; they share products of matrices, so that a certificate is
    of one size. n_action_steps: steps between queries. episodes: of a number its observations;
    default made-up ones. seconds: after which it ends early. The margin is how far the two
    likeliest symbols' logits are apart where the chunks part. Raises InputError for a policy whose
    model the fast decoder does not drive.
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
            own = next(inputs)
            expected = plain.decode(own)
            guesses = (
                None
                if last is None
                else [filled(rest(chunk, n_action_steps), policy.spec.chunk_size) for chunk in last]
            )
            last = decoder.decode(own, guesses=guesses)
            passes.append(decoder.passes)
            for row, (one, other) in enumerate(zip(expected, last, strict=True)):
                if not np.array_equal(one, other):
                    margin = parting(policy, own, row, one, other)
                    differing.append(
                        {
                            "chunk": compared + row,
                            "numbers": int((one != other).sum()),
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
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a folder of sources
        return None
