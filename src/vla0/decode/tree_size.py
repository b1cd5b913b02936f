"""Measure once per device how many guesses a pass should check."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla0.core.codec import Grammar
from vla0.decode.draft import Draft
from vla0.decode.engine import Engine
from vla0.decode.support import fused
from vla0.files import set_aside

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SLOW_MS = 2000.0  # if one round over all sizes takes longer than this, there is no second round
CONTEXT = 256  # slots before the tree, about a prompt and half an answer


def measured_tree_size(engine: Engine, rows: int = 1, fresh: bool = False) -> int:
    """Return the nodes of each row's tree that decode fastest.

    They follow from times that are measured at the first call and read from a file later.

    Args:
        engine: The engine to measure.
        rows: Rows that are decoded together.
        fresh: Measure again.
    """
    key, file = key_of(engine), cache_file()
    known = read(file)
    if fresh or key not in known:
        known[key] = times = measure(engine)
        chosen = best(times)
        logger.info(
            "a pass of %s takes %.1f ms, of %d nodes %.1f ms: decoding uses %d",
            key,
            times[1],
            chosen,
            times[chosen],
            chosen,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        with set_aside(file) as partial:  # several processes may measure at once
            partial.write_text(
                json.dumps(
                    {name: {str(n): ms for n, ms in row.items()} for name, row in known.items()},
                    indent=1,
                )
            )
    return best(known[key], rows)


def best(times: dict[int, float], rows: int = 1) -> int:
    """Choose the nodes of each row's tree from times.

    The gain of a tree grows about as the logarithm of its nodes.

    Args:
        times: {nodes of a pass: milliseconds}.
        rows: Rows that are decoded together.
    """
    last = max(times)

    def cost(nodes: int) -> float:
        pass_nodes = rows * nodes
        beyond = max(1.0, pass_nodes / last)  # past what was measured, each node costs its share
        return (
            float(np.interp(pass_nodes, list(times), list(times.values())))
            * beyond
            / math.log2(1 + nodes)
        )

    return min((nodes for nodes in SIZES if nodes <= last), key=cost)


@torch.inference_mode()
def measure(engine: Engine, rounds: int = 4) -> dict[int, float]:
    """Measure the time to guess a tree and to check it, up to the size where more cannot pay.

    Args:
        engine: The engine. A fresh copy of it is measured.
        rounds: How often each size is measured; the shortest time counts.

    Returns:
        {nodes: milliseconds}.
    """
    fresh_engine = engine.fresh()  # its memory is free again afterwards
    times: dict[int, float] = {}
    for nodes in SIZES:
        if fresh_engine.capturing:
            _time(fresh_engine, nodes)  # captures the pass
        times[nodes] = _time(fresh_engine, nodes)
        if nodes > 2 * best(times):
            break
    # Sizes take turns, so that other work of the machine disturbs all of them alike.
    for _ in range(rounds - 1):
        if sum(times.values()) > SLOW_MS:
            break
        times = {nodes: min(ms, _time(fresh_engine, nodes)) for nodes, ms in times.items()}
    return times


def _time(engine: Engine, nodes: int) -> float:
    """Return the milliseconds that one tree takes, guessed and checked."""
    grammar = Grammar(engine.grammar.bins, 100)  # long enough for all the nodes
    draft = Draft(
        grammar, np.full((grammar.count, grammar.bins + 1), 1 / (grammar.bins + 1)), grammar.count
    )
    state = engine.blank(CONTEXT, nodes)
    started = time.perf_counter()
    tree = draft.grow(0, grammar.start, nodes, 0)
    _, probabilities = engine.step(state, [tree])
    draft.learn(tree, probabilities[0, : len(tree)])
    return (time.perf_counter() - started) * 1e3


def cache_file() -> Path:
    """Return the file that keeps the measurements."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vla0" / "decode.json"


def key_of(engine: Engine) -> str:
    """Describe what the times of a pass depend on: device, number format and model size."""
    model: Any = engine.model
    text, name = model.config.get_text_config(), device_name(model.device)
    return (
        f"{name}, {str(model.dtype).removeprefix('torch.')}, {text.num_hidden_layers} layers "
        f"of {text.hidden_size}{'' if fused(model) else f', {model.config.model_type}'}"
    )


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of a CPU with the number of threads that compute on it."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def read(file: Path) -> dict[str, dict[int, float]]:
    """Read what was measured: {key: {nodes: milliseconds}}."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {name: {int(n): float(ms) for n, ms in row.items()} for name, row in content.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # no file, or one of another version: the times are measured again
