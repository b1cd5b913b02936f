"""How many guesses a pass should check: measured on the device at hand, once."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from vla0.decode.slots import Slots

logger = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SLOW_MS = 2000.0  # of all sizes together: one round has to do
CONTEXT = 256  # slots before the tree, about a prompt and half an answer


def width(model: Any, fresh: bool = False) -> int:
    """Nodes of a pass that decode fastest: measured at first, then read from the cache. fresh: measured anew."""
    key, file = _key(model), cache_file()
    known = _read(file)
    if fresh or key not in known:
        known[key] = times = measure(model)
        chosen = best(times)
        logger.info(
            "a pass of %s takes %.1f ms, of %d nodes %.1f ms: decoding uses %d", key, times[1], chosen, times[chosen], chosen
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(json.dumps({name: {str(n): ms for n, ms in row.items()} for name, row in known.items()}, indent=1))
        partial.replace(file)
    return best(known[key])


def best(times: dict[int, float]) -> int:
    """Of the sizes measured {nodes: ms} the best: what a tree wins grows about as the logarithm of its nodes."""
    return min(times, key=lambda nodes: times[nodes] / math.log2(1 + nodes))


@torch.inference_mode()
def measure(model: Any, rounds: int = 4) -> dict[int, float]:
    """{nodes: ms of a pass} of the language model, the least of some rounds; no more nodes than may pay."""
    times: dict[int, float] = {}
    for nodes in SIZES:
        times[nodes] = _time_pass(model, nodes)
        if nodes > 2 * best(times):
            break
    for _ in range(rounds - 1):  # in turns: what else the machine does hits all sizes alike
        if sum(times.values()) > SLOW_MS:
            break
        times = {nodes: min(ms, _time_pass(model, nodes)) for nodes, ms in times.items()}
    return times


def _time_pass(model: Any, nodes: int) -> float:
    weight = model.lm_head.weight
    cache = Slots(model.config.text_config, 1, CONTEXT + nodes, weight)
    cache.span = slice(CONTEXT, CONTEXT + nodes)
    embedded = weight.new_zeros((1, nodes, weight.shape[1]))
    places = torch.arange(CONTEXT, CONTEXT + nodes, device=weight.device).expand(3, 1, -1)
    mask = torch.ones((1, 1, nodes, CONTEXT + nodes), dtype=torch.bool, device=weight.device)
    if model.config.text_config._attn_implementation == "eager":
        mask = mask.to(weight.dtype)
    if weight.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    model.model.language_model(
        inputs_embeds=embedded, position_ids=places, attention_mask={"full_attention": mask},
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    if weight.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def cache_file() -> Path:
    """Where the measurements are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vla0" / "decode.json"


def _key(model: Any) -> str:
    text, device = model.config.text_config, model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    return f"{name}, {str(model.dtype).removeprefix('torch.')}, {text.num_hidden_layers} layers of {text.hidden_size}"


def _read(file: Path) -> dict[str, dict[int, float]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {name: {int(n): float(ms) for n, ms in row.items()} for name, row in content.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # none yet, or another version's: measured again
