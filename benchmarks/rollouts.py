"""How fast episodes are played for learning, beside `vla0 eval` with the same policy and worlds.

python benchmarks/rollouts.py --checkpoint runs/rl_demo/start-0/last

Three turns of each way in one run, each with processes of its own, whose start counts. For
learning, answers are drawn at random, worlds wait for each other, and nothing is filmed.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

TASKS = ("button-press-topdown-v3", "drawer-close-v3", "window-close-v3")


def run(
    checkpoint: Annotated[Path, typer.Option()],
    episodes: Annotated[int, typer.Option(help="of each task and way, in a turn")] = 16,
    turns: Annotated[int, typer.Option()] = 3,
    temperature: Annotated[float, typer.Option()] = 1.0,
) -> None:
    """Measure, and print steps per second of each way."""
    # Here, because each process of a world imports this file anew, and needs none of these.
    from rich.console import Console
    from rich.table import Table

    from vla0.core.ensemble import steps_used
    from vla0.policy import VLA0
    from vla0.quiet import quiet
    from vla0.rl.rollouts import RolloutPool, greedy, sampled
    from vla0.sim.evaluate import EvalConfig, evaluate, world
    from vla0.sim.experiment import following
    from vla0.sim.workers import RolloutConfig

    quiet()
    policy = VLA0.from_pretrained(checkpoint)
    settings = following(
        EvalConfig(
            tasks=TASKS, episodes=episodes, max_steps=50, n_action_steps=2, ensemble="none",
            options={"start": "above"},
        ),
        policy.spec,
    )  # fmt: skip
    chunk_size = policy.spec.chunk_size
    steps = steps_used(chunk_size, settings.n_action_steps, settings.ensemble)
    count = min(8 * (os.cpu_count() or 1), episodes * len(TASKS))
    first = settings.first_seed or 0
    jobs = [("way", task, seed) for seed in range(first, first + episodes) for task in TASKS]

    def evaluated() -> int:
        predict = {"policy": lambda seen: policy.predict_batch(seen, num_steps=steps)}
        with tempfile.TemporaryDirectory() as folder:
            lines = evaluate(predict, chunk_size, settings, folder, count)
        return sum(line["steps"] for line in lines)

    def played(answer) -> int:
        acting = (chunk_size, settings.n_action_steps, settings.ensemble, policy.spec.ensemble_k)
        acting += (settings.periodic,)
        rollout = RolloutConfig(make_env=world(settings), acting=acting, keep=len(TASKS))
        pool = RolloutPool(rollout, count)
        try:
            return sum(episode.line["steps"] for episode in pool.play(jobs, answer))
        finally:
            pool.close()

    ways = {
        "vla0 eval": evaluated,
        "rollouts, greedy": lambda: played(greedy(policy, steps)),
        "rollouts, drawn": lambda: played(
            sampled(policy, temperature, steps, lambda job: [job[2], TASKS.index(job[1])])
        ),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            started = time.monotonic()
            done = way()
            speeds[name].append(done / (time.monotonic() - started))
    result = Table("way", "steps a second, each turn", "of vla0 eval")
    base = sorted(speeds["vla0 eval"])[turns // 2]
    for name, found in speeds.items():
        each = ", ".join(f"{speed:.1f}" for speed in found)
        result.add_row(name, each, f"{sorted(found)[turns // 2] / base:.2f}")
    Console().print(result)


if __name__ == "__main__":
    typer.run(run)
