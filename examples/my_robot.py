"""A policy on an arm of your own: fill in MyRobot, and run it against `vla0 serve`.

    vla0 serve --checkpoint runs/mine/best                       # where the GPU is
    python examples/my_robot.py --policy-url ws://127.0.0.1:8000 # here; moves nothing until --live

Ctrl-C stops the arm. What is sent is within limits, on time, and never after the stop (vla0/robot).
"""

import time
from typing import Annotated

import numpy as np
import typer

from vla0.core.spec import Observation
from vla0.robot.clock import RealWorld
from vla0.robot.limits import ActionLimits
from vla0.robot.loop import Pacer, drive
from vla0.robot.safety import SafetyGuard
from vla0.serve.client import RemotePolicy


class MyRobot:
    """Your arm. This one is made up: it goes at once where it is told, and its cameras see grey."""

    def __init__(self, cameras: list[str], dimensions: int, state: int, instruction: str):
        self.cameras, self.state, self.instruction = cameras, state, instruction
        self.position = np.zeros(dimensions)

    def observe(self) -> Observation:
        """Read your cameras, RGB and upright, and your joints, in the dataset's units and order."""
        images = {camera: np.full((240, 320, 3), 128, np.uint8) for camera in self.cameras}
        return Observation(
            images,
            self.instruction,
            np.resize(self.position, self.state),
            captured_at=time.monotonic(),
        )

    def send(self, action: np.ndarray) -> None:
        """Command your joints. `action` is within your limits already."""
        self.position = action

    def hold(self) -> None:
        """Stay where you are, under power: for most position-controlled arms there is nothing to
        do.
        """

    def stop(self) -> None:
        """The safest end that your arm has; nothing is sent after it."""
        print("stopped")


def run(
    policy_url: Annotated[str, typer.Option(help="of `vla0 serve`")] = "ws://127.0.0.1:8000",
    instruction: Annotated[
        str, typer.Option(help="what the robot shall do")
    ] = "pick up the red block",
    mode: Annotated[str, typer.Option(help="sync, async or ensemble")] = "async",
    seconds: Annotated[float, typer.Option()] = 10.0,
    live: Annotated[bool, typer.Option(help="really move")] = False,
) -> None:
    """Act for some seconds."""
    policy = RemotePolicy(policy_url, timeout_s=1.0)
    told = policy.metadata  # what the checkpoint says of itself
    robot = MyRobot(list(told["cameras"]), told["dimensions"], told["state"] or 0, instruction)
    # What the demonstrations did; add step=... or velocity=... where actions are positions. Narrow
    # it at first.
    limits = ActionLimits(low=told["low"], high=told["high"])
    guard = SafetyGuard(robot, limits, 1 / told["fps"], start=robot.position, live=live)
    watchdog = guard.watch()
    pace = Pacer(fps=told["fps"], chunk_size=told["chunk_size"], mode=mode)
    try:
        report = drive(RealWorld(policy.predict), guard, pace, round(seconds * told["fps"]))
    finally:
        watchdog.set()
        policy.close()
    latency = (
        f"{np.median(report.latency_s) * 1e3:.0f} ms a chunk"
        if report.latency_s
        else "no chunk came"
    )
    print(
        f"{'live' if live else 'dry run'}: {guard.sent} commands in {report.steps} ticks, "
        f"{guard.clipped} clipped, {latency}"
    )


if __name__ == "__main__":
    typer.run(run)
