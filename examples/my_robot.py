"""Runs a policy on your own arm: fill in MyRobot, and run this against `vla0 serve`.

    vla0 serve --checkpoint runs/mine/best                       # where the GPU is
    python examples/my_robot.py --policy-url ws://127.0.0.1:8000 # here; moves nothing until --live

Ctrl-C stops the arm. Commands are within limits, on time, and never sent after the stop
(vla0/robot/safety.py).
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
    """Your arm. This one is made up: it reaches each goal at once, and its cameras see grey."""

    def __init__(self, cameras: list[str], dimensions: int, state: int, instruction: str):
        self.cameras, self.state, self.instruction = cameras, state, instruction
        self.position = np.zeros(dimensions)

    def observe(self) -> Observation:
        """Reads your cameras, RGB and upright, and joints, in the dataset's units and order."""
        images = {camera: np.full((240, 320, 3), 128, np.uint8) for camera in self.cameras}
        return Observation(
            images,
            self.instruction,
            np.resize(self.position, self.state),
            captured_at=time.monotonic(),
        )

    def send(self, action: np.ndarray) -> None:
        """Commands your joints; `action` (D,) is within your limits already."""
        self.position = action

    def hold(self) -> None:
        """Stays in place, under power; most position-controlled arms need to do nothing."""

    def stop(self) -> None:
        """Brings your arm to the safest end that it has; nothing is sent after it."""
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
    metadata = policy.metadata  # of the checkpoint: cameras, sizes, rate and bounds
    robot = MyRobot(
        list(metadata["cameras"]), metadata["dimensions"], metadata["state"] or 0, instruction
    )
    # The bounds of the demonstrations; narrow them at first. Add step=... or velocity=... if
    # actions are positions.
    limits = ActionLimits(low=metadata["low"], high=metadata["high"])
    guard = SafetyGuard(robot, limits, 1 / metadata["fps"], start=robot.position, live=live)
    watchdog = guard.watch()
    pace = Pacer(fps=metadata["fps"], chunk_size=metadata["chunk_size"], mode=mode)
    try:
        report = drive(RealWorld(policy.predict), guard, pace, round(seconds * metadata["fps"]))
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
