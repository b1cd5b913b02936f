"""Latency on the simulated arm, in real time, over a socket, with a server in a process of its own.

python benchmarks/arm_latency.py                                  # a script instead of a model:
only the loop is measured python benchmarks/arm_latency.py --checkpoint runs/arm/train/last # a
policy: tasks solved

The script: every two seconds the arm is to be somewhere else. It sees where the arm is and which
goal is shown, and answers after the latency with a chunk of 8 steps at 20 Hz, four degrees a step
at most. A goal is reached if the arm comes within six degrees of it in all joints while it is
shown. The policy: its latency comes on top of the time that it takes itself; an episode of `vla0
eval --env arm`'s seeds is solved when the fingertips touch what the instruction names, failed after
5 s.
"""

import asyncio
import logging
import multiprocessing
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from vla0.core.spec import Observation, Spec
from vla0.robot.lerobot_robot import make_robot
from vla0.robot.loop import MODES
from vla0.robot.session import RobotSession, SessionConfig
from vla0.serve.client import RemotePolicy
from vla0.sim.arm import ACTIONS, FIRST_SEED, RANGES, instruction

SHOWN_S, NEAR = 2.0, 6.0  # a goal is shown for so long; degrees
LASTS_S = 5.0  # an episode of a policy
LOW, HIGH = np.array(RANGES).T
THREAD = ThreadPoolExecutor(1)


def goal(at: float, began: float) -> np.ndarray:
    """Where the script wants the arm at an instant."""
    rng = np.random.default_rng([7, max(0, int((at - began) / SHOWN_S))])
    return np.r_[
        rng.uniform(-35, 35), rng.uniform(-20, 20, 3), rng.uniform(-30, 30), rng.uniform(10, 60)
    ]


class Script:
    """What a server needs of a policy."""

    def __init__(self, began: Any):
        self.began = began
        self.spec = Spec(
            low=tuple(LOW),
            high=tuple(HIGH),
            fps=20.0,
            cameras=("front", "wrist"),
            base_model="none",
            image_size=56,
            state=(tuple(LOW), tuple(HIGH)),
            action_names=ACTIONS,
            state_names=ACTIONS,
            max_step_change=(8.0,) * 6,
        )

    def predict_batch(
        self, observations: list[Observation], steps: int | None = None
    ) -> np.ndarray:
        """A chunk each."""
        now = goal(time.monotonic(), self.began.value)
        return np.stack([self._chunk(observation, now) for observation in observations])

    def _chunk(self, observation: Observation, goal: np.ndarray) -> np.ndarray:
        begun = np.zeros((0, 6)) if observation.action_prefix is None else observation.action_prefix
        place, chunk = begun[-1] if len(begun) else observation.state, list(begun)
        while len(chunk) < self.spec.chunk_size:
            place = place + np.clip(goal - place, -4, 4)
            chunk.append(place)
        return np.array(chunk, np.float32)


def served(checkpoint: str | None, latency_s: Any, began: Any, ports: Any) -> None:
    """The server's process."""
    from vla0.serve.server import Server

    policy: Any = Script(began)
    if checkpoint is not None:
        from vla0.policy import VLA0

        policy = VLA0.from_pretrained(checkpoint)
    at_once = policy.predict_batch

    def late(observations: list[Observation], *others: Any, **named: Any) -> np.ndarray:
        chunks = at_once(observations, *others, **named)
        time.sleep(latency_s.value)
        return chunks

    policy.predict_batch = late
    asyncio.run(Server(policy).run("127.0.0.1", 0, asyncio.Event(), ready=ports.put))


@dataclass
class Tally:
    """What came of the runs of one cell."""

    done: int = 0
    of: int = 0
    seconds: list[float] = field(default_factory=list)  # of the solved episodes
    ticks: float = 0.0
    commands: int = 0
    pause_s: float = 0.0  # the longest between two commands

    def add(self, arm: Any, began: float, lasted_s: float, fps: float) -> None:
        """Counts the commands of a session, until it had done what it should."""
        times = [at for at, _ in arm.diary if at <= began + lasted_s]
        self.ticks, self.commands = self.ticks + lasted_s * fps, self.commands + len(times)
        self.pause_s = max(
            self.pause_s, float(np.diff(times).max()) if len(times) > 1 else lasted_s
        )

    def __str__(self) -> str:
        took = f" in {np.median(self.seconds):.1f} s" if self.seconds else ""
        idle = max(0.0, 1 - self.commands / self.ticks)
        return f"{self.done} of {self.of}{took}, {idle:.0%} idle, {self.pause_s * 1e3:.0f} ms"


def watched(session: RobotSession, arm: Any) -> tuple[Future, float]:
    """The session, which runs, and when its first command went out."""
    running = THREAD.submit(session.run)
    while not arm.diary and not running.done():
        time.sleep(0.001)
    return running, time.monotonic()


def followed(url: str, way: str, goals: int, began: Any) -> Tally:
    """The script's goals."""
    arm: Any = make_robot(["--robot.type=sim", "--robot.width=64", "--robot.height=48"])
    config = SessionConfig(
        instruction="reach", live=True, mode=way, seconds=goals * SHOWN_S, stop_s=5.0, hold_s=1.0
    )
    remote = RemotePolicy(url)
    running, began.value = watched(RobotSession(config, arm, remote, told=lambda line: None), arm)
    reached = set()
    while not running.done():
        now = time.monotonic()
        if np.abs(arm.joints - goal(now, began.value)).max() < NEAR:
            reached.add(int((now - began.value) / SHOWN_S))
        time.sleep(0.01)
    running.result()
    tally = Tally(len(reached & set(range(goals))), goals)
    tally.add(arm, began.value, config.seconds, remote.spec.fps)
    remote.close()
    return tally


def solved(url: str, way: str, tasks: list[str], episodes: int) -> Tally:
    """A policy's episodes, `episodes` of each task."""
    tally = Tally()
    for task in tasks:
        for seed in range(FIRST_SEED, FIRST_SEED + episodes):
            arm: Any = make_robot(["--robot.type=sim", f"--robot.seed={seed}"])
            config = SessionConfig(
                instruction=instruction(task),
                live=True,
                mode=way,
                seconds=LASTS_S,
                stop_s=5.0,
                hold_s=1.0,
            )
            remote = RemotePolicy(url)
            session = RobotSession(config, arm, remote, told=lambda line: None)
            running, began = watched(session, arm)
            while not running.done() and task not in arm.touched:
                time.sleep(0.005)
            lasted = time.monotonic() - began if arm.diary else LASTS_S
            if not running.done():
                tally.done += 1
                tally.seconds.append(lasted)
                session.key("right")
            running.result()
            tally.of += 1
            tally.add(arm, began, lasted, remote.spec.fps)
            remote.close()
    return tally


def run(
    checkpoint: Annotated[Path | None, typer.Option()] = None,
    latency_ms: Annotated[list[int], typer.Option()] = [0, 50, 100, 200, 300, 500],  # noqa: B006
    goals: Annotated[int, typer.Option(help="of the script")] = 10,
    task: Annotated[list[str], typer.Option(help="of a policy")] = ["touch-cube"],  # noqa: B006
    episodes: Annotated[int, typer.Option(help="of each task")] = 12,
) -> None:
    """Print a row for each latency: what was done, ticks without a command, the longest pause."""
    logging.getLogger("lerobot").setLevel(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    latency, began, ports = (
        context.Value("d", 0.0),
        context.Value("d", time.monotonic()),
        context.Queue(),
    )
    name = None if checkpoint is None else str(checkpoint)
    server = context.Process(target=served, args=(name, latency, began, ports), daemon=True)
    server.start()
    url = f"ws://127.0.0.1:{ports.get(timeout=120)}"
    console = Console()
    console.print("latency", *MODES, sep=" | ")
    for added in latency_ms:
        latency.value = added / 1e3
        cells = [
            followed(url, way, goals, began)
            if checkpoint is None
            else solved(url, way, task, episodes)
            for way in MODES
        ]
        console.print(f"{added} ms", *map(str, cells), sep=" | ")
    server.terminate()
    server.join()


if __name__ == "__main__":
    typer.run(run)
