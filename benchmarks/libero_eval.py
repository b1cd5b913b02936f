"""What the evaluator costs beside the simulators it drives, and where the time of a LIBERO evaluation goes.

python benchmarks/libero_eval.py --workers 2

Two runs of the same episodes in the same number of processes: `evaluate` with a policy that costs nothing, and processes that
only reset, step and render. Each builds its worlds first; the clock runs from the first reset on.
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

from vla0.evaluate import EvalConfig, evaluate, make_env

DIMENSIONS = 7


class Timed:
    """An Env that writes down when each of its parts began and how long it took."""

    def __init__(self, config: EvalConfig, folder: Path, task: str):
        self.env = make_env(config, task)
        self.fps, self.max_steps = self.env.fps, self.env.max_steps
        self.file = (folder / f"{time.monotonic_ns()}.jsonl").open("w", buffering=1)

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
    """A process that does nothing but simulate."""
    env = Timed(config, folder, config.tasks[0])
    for seed in seeds:
        env.reset(seed)
        for _ in range(env.max_steps):
            env.step(np.zeros(DIMENSIONS))


def read(folder: Path) -> tuple[float, dict[str, float]]:
    """Wall seconds from the first reset to the last end, and seconds by part, over all processes."""
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
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
) -> None:
    """Print both rates, their ratio, and the parts."""
    config = EvalConfig((task,), "libero", workers * episodes, max_steps=steps, quick=quick)
    count = workers * episodes * steps
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / way for way in ("alone", "evaluator", "out")]
        for folder in folders:
            folder.mkdir()
        context = multiprocessing.get_context("spawn")
        shares = [list(range(i, workers * episodes, workers)) for i in range(workers)]
        processes = [context.Process(target=alone, args=(config, folders[0], share)) for share in shares]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        zero = lambda observations: np.zeros((len(observations), 8, DIMENSIONS), np.float32)  # noqa: E731
        evaluate({"policy": zero}, 8, config, folders[2], workers, partial(timed, folder=folders[1]))
        for way, folder in (("alone", folders[0]), ("evaluator", folders[1])):
            wall, parts = read(folder)
            idle = wall * workers - sum(parts.values())
            shares = ", ".join(f"{part} {seconds / wall / workers:.0%}" for part, seconds in [*parts.items(), ("other", idle)])
            hourly = workers * episodes / wall * 3600
            print(f"{way}: {count / wall:.1f} steps/s, {hourly:.0f} episodes/h of {steps} steps; {shares}")
        print(f"evaluator / alone: {read(folders[0])[0] / read(folders[1])[0]:.2f}")


if __name__ == "__main__":
    typer.run(measure)
