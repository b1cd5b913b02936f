"""A policy behind another engine (vLLM, SGLang, llama.cpp) against the same checkpoint here: equal,
and how fast?

python -m vllm.entrypoints.openai.api_server --model DIR --dtype float32 --enforce-eager
--max-model-len 1024 --port 8011 python benchmarks/engines.py --checkpoint DIR --base-url
http://127.0.0.1:8011 --dataset runs/demo/dataset
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vla0.data.lerobot import DataConfig, Source
from vla0.policy import VLA0


def run(
    checkpoint: Annotated[Path, typer.Option()],
    base_url: Annotated[str, typer.Option()],
    dataset: Annotated[str, typer.Option(help="whose pictures are asked about")],
    engine: Annotated[str, typer.Option()] = "vllm",
    chunks: Annotated[int, typer.Option()] = 100,
) -> None:
    """Print how many chunks are the same: whole, streamed, begun by committed steps; and
    milliseconds of both.
    """
    here, there = VLA0.from_pretrained(checkpoint), VLA0.remote(base_url, checkpoint, engine=engine)
    cameras = {camera: f"observation.images.{camera}" for camera in here.spec.cameras}
    source = Source(
        DataConfig(
            dataset=dataset,
            cameras=cameras,
            state=None if here.spec.state is None else "observation.state",
        )
    )
    rows = np.linspace(0, len(source) - 1, chunks).astype(int)
    seen = [source.sample(int(row), 1, 1).observation for row in rows]
    took: dict[str, list[float]] = {"here": [], "there": []}
    same = dict.fromkeys(("whole", "streamed", "begun"), 0)
    for observation in seen:
        found = {}
        for name, policy in {"here": here, "there": there}.items():
            began = time.perf_counter()
            found[name] = policy.predict_batch([observation])[0]
            took[name].append((time.perf_counter() - began) * 1e3)
        prefixes = replace(
            observation, action_prefix=found["here"][: here.spec.chunk_size // 2] * 0.9
        )
        same["whole"] += np.array_equal(found["here"], found["there"])
        same["streamed"] += np.array_equal(found["here"], list(there.predict_stream(observation)))
        same["begun"] += np.array_equal(
            here.predict_batch([prefixes]), there.predict_batch([prefixes])
        )
    print(", ".join(f"{name}: {count} of {chunks} identical" for name, count in same.items()))
    print(", ".join(f"{name}: {np.median(times):.0f} ms a chunk" for name, times in took.items()))


if __name__ == "__main__":
    typer.run(run)
