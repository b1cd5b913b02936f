"""Success against latency: a policy executed in three ways by the robot's loop, in simulated time.

python benchmarks/latency.py --checkpoint runs/demo/train/last

The synchronous way executes whole chunks, the asynchronous one half of each. Time is the
simulator's: a tick of the loop is a step of Meta-World, and where the loop sends nothing the hand
stays.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vla0.policy import VLA0
from vla0.robot.clock import SimulatedWorld
from vla0.robot.limits import ActionLimits
from vla0.robot.loop import MODES, Pacer, drive
from vla0.robot.safety import SafetyGuard
from vla0.sim.metaworld import FIRST_SEED, MetaWorldEnv
from vla0.sim.results import wilson

TASKS = ["button-press-topdown-v3", "drawer-close-v3", "window-close-v3"]


class Hand:
    """A Meta-World hand as a body: what it is sent is executed when the tick ends."""

    def __init__(self, env: MetaWorldEnv, seed: int):
        self.env, self.done, self.command, self.ticks = env, False, None, 0
        self.seen = env.reset(seed)
        self.world: SimulatedWorld | None = None

    def observe(self):
        """The last picture; the time is now."""
        assert self.world is not None
        return replace(self.seen, captured_at=self.world.now())

    def send(self, action: np.ndarray) -> None:
        """Remembers it for the end of the tick."""
        self.command = action

    def hold(self) -> None:
        """A hand without a command stays."""

    def stop(self) -> None:
        """The same."""

    def end(self, step: int) -> None:
        """The tick, and those that passed without the loop."""
        while self.ticks <= step and not self.done:
            action = np.zeros(4) if self.command is None or self.ticks < step else self.command
            self.seen, self.done = self.env.step(np.asarray(action, np.float32))
            self.ticks += 1
        self.command = None


def run(
    checkpoint: Annotated[Path, typer.Option()],
    latency_ms: Annotated[list[int], typer.Option()] = [0, 50, 100, 200, 500],  # noqa: B006
    episodes: Annotated[int, typer.Option(help="for each task")] = 8,
    ticks: Annotated[
        int, typer.Option(help="after which an episode has failed; Meta-World ends at 250")
    ] = 240,
) -> None:
    """Print successes, the median time of those, and of the time that passed the share without a
    command.
    """
    policy = VLA0.from_pretrained(checkpoint)
    spec = policy.spec
    console, table = Console(), Table("latency", *MODES)
    for latency in latency_ms:
        cells = []
        for way in MODES:
            solved = tried = idle = passed = 0
            took: list[int] = []
            for task in TASKS:
                env = MetaWorldEnv(task, start="above", fps=spec.fps)
                for seed in range(episodes):
                    hand = Hand(env, FIRST_SEED + seed)
                    world = SimulatedWorld(
                        lambda o: policy.predict_batch([o])[0], lambda _, s=latency / 1e3: s
                    )
                    hand.world = world
                    guard = SafetyGuard(
                        hand,
                        ActionLimits.of(spec),
                        1 / spec.fps,
                        live=True,
                        stop_s=1e6,
                        now=world.now,
                    )
                    pace = Pacer(
                        fps=spec.fps,
                        chunk_size=spec.chunk_size,
                        mode=way,
                        n_action_steps=spec.chunk_size if way == "sync" else None,
                    )
                    drive(
                        world,
                        guard,
                        pace,
                        ticks,
                        lambda tick, h=hand: h.end(tick.step),
                        lambda h=hand: h.done,
                    )
                    solved, tried = solved + hand.done, tried + 1
                    took += [hand.ticks] if hand.done else []
                    idle, passed = idle + hand.ticks - guard.sent, passed + hand.ticks
                env.close()
            low, high = wilson(solved, tried)
            seconds = f"{np.median(took) / spec.fps:.2f} s" if took else "never"
            cells.append(
                f"{solved} of {tried} ({low:.0%} to {high:.0%}), {seconds}, {idle / passed:.0%} "
                f"idle"
            )
        table.add_row(f"{latency} ms", *cells)
        console.print(f"{latency} ms", *cells, sep=" | ")
    console.print(table)


if __name__ == "__main__":
    typer.run(run)
