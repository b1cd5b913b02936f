"""How many guesses a pass should check: measured on the device at hand, once."""

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
from vla0.files import set_aside

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SLOW_MS = 2000.0  # of all sizes together: one round has to do
CONTEXT = 256  # slots before the tree, about a prompt and half an answer


def measured_tree_size(engine: Engine, rows: int = 1, fresh: bool = False) -> int:
    """Nodes of each row's tree that decode fastest: measured at first, then read from the cache.

    fresh: measured anew.
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
    """Nodes of each row's tree, of times {nodes of a pass: ms}: what a tree wins grows about as the
    logarithm of its nodes.
    """
    last = max(times)

    def cost(nodes: int) -> float:
        whole = rows * nodes
        beyond = max(1.0, whole / last)  # of what was measured: there no node is free
        return (
            float(np.interp(whole, list(times), list(times.values())))
            * beyond
            / math.log2(1 + nodes)
        )

    return min((nodes for nodes in SIZES if nodes <= last), key=cost)


@torch.inference_mode()
def measure(engine: Engine, rounds: int = 4) -> dict[int, float]:
    """{nodes: ms} to guess a tree and to check it, the least of some rounds; no more nodes than may
    pay.
    """
    own = engine.fresh()  # whose memory is free again afterwards
    times: dict[int, float] = {}
    for nodes in SIZES:
        if own.capturing:
            _time(own, nodes)
        times[nodes] = _time(own, nodes)
        if nodes > 2 * best(times):
            break
    for _ in range(rounds - 1):  # in turns: what else the machine does hits all sizes alike
        if sum(times.values()) > SLOW_MS:
            break
        times = {nodes: min(ms, _time(own, nodes)) for nodes, ms in times.items()}
    return times


def _time(engine: Engine, nodes: int) -> float:
    grammar = Grammar(engine.grammar.bins, 100)  # long enough for all the nodes
    draft = Draft(
        grammar, np.full((grammar.count, grammar.bins + 1), 1 / (grammar.bins + 1)), grammar.count
    )
    engine.blank(CONTEXT, nodes)
    started = time.perf_counter()
    tree = draft.grow(0, grammar.start, nodes, 0)
    _, probabilities = engine.step([tree])
    draft.learn(tree, probabilities[0, : len(tree)])
    return (time.perf_counter() - started) * 1e3


def cache_file() -> Path:
    """Where the measurements are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vla0" / "decode.json"


def key_of(engine: Engine) -> str:
    """What the times of a pass depend on: device, number format and the model's size."""
    model: Any = engine.model
    text, name = model.config.text_config, device_name(model.device)
    return (
        f"{name}, {str(model.dtype).removeprefix('torch.')}, {text.num_hidden_layers} layers "
        f"of {text.hidden_size}"
    )


def device_name(device: torch.device) -> str:
    """The GPU's; of a CPU also how many threads compute on it."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def read(file: Path) -> dict[str, dict[int, float]]:
    """What was measured: {key: {nodes: ms}}."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {name: {int(n): float(ms) for n, ms in row.items()} for name, row in content.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # none yet, or another version's: measured again
