"""How often the scripted expert solves each LIBERO task from random placements, disturbed as its
demonstrations are.

python benchmarks/libero_expert.py --suite object --episodes 10

The expert looks at no picture, so that none is drawn: several times faster than collecting.
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Annotated

import numpy as np
import typer

from vla0.core.rollout import rollout
from vla0.errors import InputError
from vla0.sim import libero_files
from vla0.sim.collect import NoisyEnv
from vla0.sim.libero import SIMULATOR, LiberoEnv
from vla0.sim.results import wilson


def attempt(task: str, episodes: int) -> tuple[str, list[int] | str]:
    """The task with the steps of its solved episodes, or with the reason why there is no expert."""
    env = LiberoEnv(task)
    try:
        expert = SIMULATOR.make_expert(env)
        share, scale = SIMULATOR.noise
        seeds = SIMULATOR.seeds[:episodes]
        done = [
            rollout(NoisyEnv(env, np.random.default_rng([s, 10_000]), share, scale), expert, s)
            for s in seeds
        ]
        return task, [episode.steps for episode in done if episode.success]
    except InputError as error:
        return task, error.args[1]
    finally:
        env.close()


def measure(
    suite: Annotated[str, typer.Option()] = "object",
    episodes: Annotated[int, typer.Option(help="for each task")] = 10,
    workers: Annotated[int, typer.Option()] = 2,
) -> None:
    """Print a line for each task."""
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for task, found in pool.map(partial(attempt, episodes=episodes), libero_files.tasks(suite)):
            if isinstance(found, str):
                print(f"| {task} | no expert: {found} |", flush=True)
                continue
            low, high = wilson(len(found), episodes)
            steps = f"{np.median(found):.0f}" if found else ""
            print(
                f"| {task} | {len(found)} of {episodes} | {low:.0%} to {high:.0%} | {steps} |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(measure)
