"""How far one gets in a Meta-World task without looking: the best of many constant actions, by
where the hand starts.

python benchmarks/constant_actions.py
"""

import itertools
from typing import Annotated

import numpy as np
import typer

from vla0.core.rollout import rollout
from vla0.sim.metaworld import FIRST_SEED, STARTS, MetaWorldEnv, MetaWorldExpert

TASKS = ["button-press-topdown-v3", "drawer-close-v3", "window-close-v3", "coffee-button-v3"]


def measure(
    task: Annotated[list[str], typer.Option()] = TASKS,
    episodes: Annotated[int, typer.Option()] = 12,
    steps: Annotated[int, typer.Option(help="after which a constant action has failed")] = 100,
) -> None:
    """Print the success of the best constant action for each task and start."""
    directions = [
        np.array(d, float) for d in itertools.product((-1.0, 0.0, 1.0), repeat=3) if any(d)
    ]
    for name in task:
        for start in STARTS:
            env = MetaWorldEnv(name, image_size=28, start=start)
            episode = rollout(env, MetaWorldExpert(env), 0)
            grip = float(np.median(episode.actions[:, 3]))
            candidates = [
                *directions,
                episode.actions[:, :3].mean(0),
                np.median(episode.actions[:, :3], 0),
            ]
            rates = [
                np.mean(
                    [solves(env, np.r_[c, grip], FIRST_SEED + s, steps) for s in range(episodes)]
                )
                for c in candidates
            ]
            best = int(np.argmax(rates))
            print(
                f"{name} {start}: best {rates[best]:.0%} of {episodes}, with "
                f"{np.round(candidates[best], 1).tolist()}",
                flush=True,
            )
            env.close()


def solves(env: MetaWorldEnv, action: np.ndarray, seed: int, steps: int) -> bool:
    """Whether one action, repeated, solves the seed's episode. Physics only: nothing is drawn."""
    env.reset(seed)
    return any(env.env.step(action.astype(np.float32))[4]["success"] for _ in range(steps))


if __name__ == "__main__":
    typer.run(measure)
