"""Latency on the simulated arm, in real time, over a socket: a script instead of a model, so that only the loop is measured.

python benchmarks/arm_latency.py

Every two seconds the arm is to be somewhere else. The script sees where it is and which goal is shown, and answers after
the latency with a chunk of 8 steps at 20 Hz, four degrees a step at most. A goal is reached if the arm comes within six
degrees of it in all joints while it is shown.
"""

import asyncio
import logging
import threading
import time
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from vla0.robot.arm import make_robot
from vla0.robot.loop import WAYS
from vla0.robot.session import Session, SessionConfig
from vla0.robot.simulatedarm import JOINTS, RANGES
from vla0.serve.client import RemotePolicy
from vla0.serve.server import Server
from vla0.spec import Observation, Spec

NAMES = tuple(f"{joint}.pos" for joint in JOINTS)
SHOWN_S, NEAR = 2.0, 6.0  # a goal is shown for so long; degrees
LOW, HIGH = np.array(RANGES).T


class Script:
    """What a server needs of a policy."""

    def __init__(self, latency_s: float):
        self.latency_s, self.began = latency_s, time.monotonic()
        self.spec = Spec(
            tuple(LOW), tuple(HIGH), 20.0, ("front", "wrist"), "none", image_size=56, state=(tuple(LOW), tuple(HIGH)),
            action_names=NAMES, state_names=NAMES, most_change=(8.0,) * 6,
        )  # fmt: skip

    def goal(self, at: float) -> np.ndarray:
        """Where the arm is to be at an instant."""
        rng = np.random.default_rng([7, max(0, int((at - self.began) / SHOWN_S))])
        return np.r_[rng.uniform(-35, 35), rng.uniform(-20, 20, 3), rng.uniform(-30, 30), rng.uniform(10, 60)]

    def predict_batch(self, observations: list[Observation], steps: int | None = None) -> np.ndarray:
        """A chunk each, after the latency."""
        seen = time.monotonic()
        time.sleep(self.latency_s)
        return np.stack([self._chunk(observation, self.goal(seen)) for observation in observations])

    def _chunk(self, observation: Observation, goal: np.ndarray) -> np.ndarray:
        begun = np.zeros((0, 6)) if observation.committed is None else observation.committed
        place, chunk = begun[-1] if len(begun) else observation.state, list(begun)
        while len(chunk) < self.spec.horizon:
            place = place + np.clip(goal - place, -4, 4)
            chunk.append(place)
        return np.array(chunk, np.float32)


def tried(way: str, latency_s: float, goals: int) -> tuple[int, float, float]:
    """(goals reached, share of the ticks without a command, longest time between two commands in s)."""
    policy, ports, loops = Script(latency_s), [], []

    async def serving() -> None:
        stop = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stop))
        await Server(policy).run("127.0.0.1", 0, stop, ready=ports.append)  # type: ignore[arg-type]

    server = threading.Thread(target=lambda: asyncio.run(serving()))
    server.start()
    while not ports:
        time.sleep(0.01)
    arm: Any = make_robot(["--robot.type=sim", "--robot.width=64", "--robot.height=48"])
    config = SessionConfig("reach", live=True, way=way, seconds=goals * SHOWN_S, stop_s=5.0, hold_s=1.0)
    remote = RemotePolicy(f"ws://127.0.0.1:{ports[0]}")
    session = Session(config, arm, remote, told=lambda line: None)
    thread = threading.Thread(target=session.run)
    thread.start()
    while not arm.diary and thread.is_alive():
        time.sleep(0.001)
    policy.began, reached = time.monotonic(), set()
    while thread.is_alive():
        now = time.monotonic()
        if np.abs(arm.joints - policy.goal(now)).max() < NEAR:
            reached.add(int((now - policy.began) / SHOWN_S))
        time.sleep(0.01)
    remote.close()
    loop, stop = loops[0]
    loop.call_soon_threadsafe(stop.set)
    server.join()
    times = [at for at, _ in arm.diary]
    ticks = config.seconds * policy.spec.fps
    return len(reached & set(range(goals))), 1 - len(times) / ticks, float(np.diff(times).max()) if len(times) > 1 else np.inf


def run(
    latency_ms: Annotated[list[int], typer.Option()] = [0, 50, 100, 200, 300, 500],  # noqa: B006
    goals: Annotated[int, typer.Option()] = 10,
) -> None:
    """Print a row for each latency: goals reached, ticks without a command, the longest pause."""
    logging.getLogger("lerobot").setLevel(logging.ERROR)
    console = Console()
    console.print("latency", *WAYS, sep=" | ")
    for latency in latency_ms:
        cells = []
        for way in WAYS:
            reached, idle, pause = tried(way, latency / 1e3, goals)
            cells.append(f"{reached} of {goals}, {max(0.0, idle):.0%} idle, {pause * 1e3:.0f} ms")
        console.print(f"{latency} ms", *cells, sep=" | ")


if __name__ == "__main__":
    typer.run(run)
