"""What the evaluator costs beside the simulators it drives, and where the time of a LIBERO
evaluation goes.

python benchmarks/libero_eval.py --workers 2 [--checkpoint DIR]

Runs of the same episodes in the same number of processes: processes that only reset, step and draw;
`evaluate` with a policy that costs nothing, asked at every step and at every eighth; and with a
checkpoint, where one is given. Each builds its worlds first; the clock runs from the first reset
on.
"""

import json
import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vla0.sim.evaluate import EvalConfig, evaluate, make_env

DIMENSIONS = 7


class Timed:
    """A LiberoEnv that writes down when each of its parts began and how long it took."""

    def __init__(self, config: EvalConfig, folder: Path, task: str):
        self.env = make_env(config, task)
        self.fps, self.max_steps = self.env.fps, self.env.max_steps
        self.file = (folder / f"{time.monotonic_ns()}.jsonl").open("w", buffering=1)
        self.env._draw = partial(self._time, "draw", self.env._draw)  # type: ignore[attr-defined]

    def _time(self, part, call, *arguments):
        started = time.monotonic()
        result = call(*arguments)
        self.file.write(json.dumps([part, started, time.monotonic() - started]) + "\n")
        return result

    def reset(self, seed):
        """As the Env below."""
        return self._time("reset", self.env.reset, seed)

    def step(self, action):
        """As the Env below."""
        return self._time("step", self.env.step, action)

    def close(self):
        """As the Env below."""
        self.env.close()


def timed(config: EvalConfig, task: str, *, folder: Path) -> Timed:
    """The make_env of this benchmark."""
    return Timed(config, folder, task)


def alone(config: EvalConfig, folder: Path, seeds: list[int]) -> None:
    """A process that does nothing but simulate and draw."""
    env = Timed(config, folder, config.tasks[0])
    for seed in seeds:
        dict(env.reset(seed).images)
        for _ in range(env.max_steps):
            observation, _ = env.step(np.zeros(DIMENSIONS))
            dict(observation.images)
    env.close()


class Counted:
    """A policy that counts its own seconds."""

    def __init__(self, predict):
        self.predict, self.seconds = predict, 0.0

    def __call__(self, observations):
        started = time.monotonic()
        chunks = self.predict(observations)
        self.seconds += time.monotonic() - started
        return chunks


def read(folder: Path) -> tuple[float, dict[str, float]]:
    """Wall seconds from the first reset to the last end, and seconds by part, over all
    processes.
    """
    lines = [
        json.loads(line)
        for file in folder.glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    parts: dict[str, float] = {}
    for part, _, seconds in lines:
        parts[part] = parts.get(part, 0.0) + seconds
    return max(s + d for _, s, d in lines) - min(s for _, s, _ in lines), parts


def measure(
    task: Annotated[str, typer.Option()] = "libero_object/0",
    workers: Annotated[int, typer.Option(help="simulators at once")] = 2,
    episodes: Annotated[int, typer.Option(help="for each simulator")] = 2,
    steps: Annotated[int, typer.Option(help="of an episode")] = 60,
    quick: Annotated[bool, typer.Option(help="no shadows, reflections and multisampling")] = False,
    checkpoint: Annotated[str | None, typer.Option(help="also with this policy")] = None,
) -> None:
    """Print each way's rate and where its time goes."""
    shape = {"episodes": workers * episodes, "max_steps": steps, "options": {"quick": quick}}
    config = EvalConfig(tasks=(task,), env="libero", n_action_steps=1, ensemble="none", **shape)
    rates = {}

    def show(way, folder, model=0.0):
        wall, parts = read(folder)
        parts = {part: seconds / workers for part, seconds in parts.items()} | {"model": model}
        parts["idle"] = wall - sum(parts.values())
        shares = ", ".join(f"{part} {seconds / wall:.0%}" for part, seconds in parts.items())
        rates[way] = workers * episodes / wall * 3600
        line = (
            f"{rates[way]:.0f} episodes/h of {steps} steps, "
            f"{rates[way] / rates['alone']:.2f} of alone"
        )
        print(f"{way}: {line}; {shares}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "alone"
        folder.mkdir()
        context = multiprocessing.get_context("spawn")
        shares = [list(range(i, workers * episodes, workers)) for i in range(workers)]
        processes = [
            context.Process(target=alone, args=(config, folder, share)) for share in shares
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        show("alone", folder)
        ways = {
            f"evaluator, {n_action_steps} steps a query": (n_action_steps, Counted(zero))
            for n_action_steps in (1, 8)
        }
        if checkpoint is not None:
            from vla0.policy import VLA0

            policy = VLA0.from_pretrained(checkpoint)
            ways["evaluator, 1 step a query, model"] = (
                1,
                Counted(partial(policy.predict_batch, num_steps=1)),
            )
        for number, (way, (n_action_steps, predict)) in enumerate(ways.items()):
            own, folder = (
                EvalConfig(
                    tasks=(task,),
                    env="libero",
                    n_action_steps=n_action_steps,
                    ensemble="none",
                    **shape,
                ),
                Path(name) / str(number),
            )
            folder.mkdir()
            evaluate(
                {"policy": predict},
                8,
                own,
                Path(name) / f"out{number}",
                workers,
                partial(timed, folder=folder),
            )
            show(way, folder, predict.seconds)


def zero(observations):
    """Chunks of nothing."""
    return np.zeros((len(observations), 8, DIMENSIONS), np.float32)


if __name__ == "__main__":
    typer.run(measure)
