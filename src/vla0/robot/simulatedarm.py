"""A simulated arm in real time, as a LeRobot Robot: `vla0 robot --robot sim`.

It stands in for a real robot. The physics and cameras of vla0.sim.arm run in a thread of their own,
whatever the program does meanwhile.
"""

import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

from vla0.errors import InputError
from vla0.sim.arm import ACTIONS, CAMERAS, TASKS, ArmPhysics, within

logger = logging.getLogger(__name__)

# seconds in which `go_by_itself` has to reach its goal, and between two checks of that
GOING_S, LOOK_S = 5.0, 0.1
# degrees: movement between two checks below which the arm rests; distance from the goal that its
# own weight may cause
STILL, THERE = 0.05, 3.0


@RobotConfig.register_subclass("sim")
@dataclass(kw_only=True)
class SimulatedArmConfig(RobotConfig):
    """The settings of the simulated arm, which are given as `--robot.width` and so on."""

    width: int = 112  # of pictures, pixels
    height: int = 112
    camera_fps: float = 20.0  # new pictures a second
    # places arm, cube and mark as in `vla0 eval --env arm`; None: the arm begins upright
    seed: int | None = None


class SimulatedArm(Robot):
    """The simulated arm.

    For tests, a camera's `frozen` keeps it at its last picture, and `silent` makes it send none.

    Args:
        config: The size and rate of the pictures, and the seed.

    Raises:
        InputError: The size or rate of the pictures is out of its range.
    """

    config_class = SimulatedArmConfig
    name = "sim"

    def __init__(self, config: SimulatedArmConfig):
        super().__init__(config)
        if not (
            28 <= config.width <= 1280
            and 28 <= config.height <= 960
            and 0 < config.camera_fps <= 60
        ):
            raise InputError(
                "pictures of 28 to 1280 by 28 to 960 pixels, at most 60 a second",
                f"{config}",
                "change those",
            )
        self.config, self.cameras = config, {camera: Eye() for camera in CAMERAS}
        self.lock, self.goal, self.joints = threading.Lock(), np.zeros(6), np.zeros(6)
        self.thread: threading.Thread | None = None
        self.ended, self.ready, self.error = threading.Event(), threading.Event(), None
        # (monotonic seconds, command (D,)) of each command since the arm was connected
        self.diary: list[tuple[float, np.ndarray]] = []
        self.touched: set[str] = set()  # the tasks that are done at this instant

    @property
    def observation_features(self) -> dict[str, Any]:
        """The joints, then the cameras."""
        return {
            **self.action_features,
            **dict.fromkeys(self.cameras, (self.config.height, self.config.width, 3)),
        }

    @property
    def action_features(self) -> dict[str, Any]:
        """The goal positions of the joints."""
        return dict.fromkeys(ACTIONS, float)

    @property
    def is_connected(self) -> bool:
        """Whether the simulation runs."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def is_calibrated(self) -> bool:
        """Always true: there is nothing to calibrate."""
        return True

    def calibrate(self) -> None:
        """Do nothing."""

    def configure(self) -> None:
        """Do nothing."""

    def connect(self, calibrate: bool = True) -> None:
        """Start the simulation.

        Raises:
            InputError: The simulation fails, for example because MuJoCo cannot draw.
        """
        self.ended.clear()
        self.ready.clear()
        self.diary.clear()
        self.thread = threading.Thread(target=self._live, daemon=True, name="simulated arm")
        self.thread.start()
        self.ready.wait(60)
        if self.error is not None:
            raise InputError(
                "a world that runs", repr(self.error), "see `vla0 doctor`"
            ) from self.error

    def disconnect(self) -> None:
        """End the simulation."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join(5)
            self.thread = None

    def get_observation(self) -> dict[str, Any]:
        """Return the joints' positions and the newest pictures.

        Raises:
            TimeoutError: A camera has sent nothing for half a second, as with LeRobot's cameras.
        """
        self._awake()
        with self.lock:
            joints: dict[str, Any] = {
                name: float(v) for name, v in zip(ACTIONS, self.joints, strict=True)
            }
            return joints | {name: eye.read_latest() for name, eye in self.cameras.items()}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Set the goal positions, clipped to what the servos can do, and return them."""
        self._awake()
        wanted = np.array([float(action[name]) for name in ACTIONS])
        goal = within(wanted)
        with self.lock:
            self.goal = goal
            self.diary.append((time.monotonic(), wanted))
        return {name: float(v) for name, v in zip(ACTIONS, goal, strict=True)}

    def go_by_itself(self, goal: dict[str, float]) -> bool:
        """Go to a position as fast as the servos can, and rest there.

        Nobody can move a simulated arm by hand to where an episode may begin. Real arms have no
        such method.

        Args:
            goal: The positions, by the names of the actions.

        Returns:
            Whether the arm is there now. It does not move if its servos cannot reach the goal.
        """
        self._awake()
        wanted = np.array([goal[name] for name in ACTIONS])
        if (within(wanted) != wanted).any():
            return False
        with self.lock:
            self.goal, before = wanted, self.joints
        for _ in range(round(GOING_S / LOOK_S)):
            time.sleep(LOOK_S)
            with self.lock:
                now = self.joints
            if np.abs(now - before).max() < STILL and np.abs(now - wanted).max() < THERE:
                return True
            before = now
        return False

    def _awake(self) -> None:
        """Raise ConnectionError unless the arm is connected."""
        if not self.is_connected:
            raise ConnectionError("the simulated arm is not connected")

    def _live(self) -> None:
        """Run the physics in real time and take pictures at the cameras' rate, in the thread."""
        try:
            # made in this thread, because OpenGL must be used in the thread that made its context
            world = ArmPhysics(self.config.height, self.config.width)
            if self.config.seed is not None:
                world.place(self.config.seed)
            self.goal = world.joints()
            began, drawn, announced = time.monotonic(), -math.inf, set()
            while not self.ended.is_set():
                with self.lock:
                    world.command(self.goal)
                world.until(time.monotonic() - began)
                if time.monotonic() - drawn >= 1 / self.config.camera_fps:
                    drawn = time.monotonic()
                    for camera, eye in self.cameras.items():
                        eye.see(world.picture(camera))
                with self.lock:
                    self.joints = world.joints()
                    self.touched = set(filter(world.touched, TASKS))
                for task in self.touched - announced:
                    logger.info(
                        "%s: done %.1f s after the arm was connected",
                        task,
                        time.monotonic() - began,
                    )
                announced |= self.touched
                self.ready.set()
                time.sleep(0.002)
            world.close()
        except Exception as error:
            self.error = error
            self.ready.set()


class Eye:
    """A camera of the simulated arm, with its newest picture."""

    def __init__(self):
        self.frame, self.latest_timestamp, self.frozen, self.silent = None, None, False, False

    def see(self, frame: np.ndarray) -> None:
        """Take a new picture, unless the camera is frozen or silent."""
        if not (self.frozen or self.silent):
            self.frame, self.latest_timestamp = frame, time.perf_counter()

    def read_latest(self, max_age_ms: float = 500) -> np.ndarray:
        """Return the newest picture; raise TimeoutError if there is none or it is too old."""
        if self.frame is None or (
            self.silent and (time.perf_counter() - (self.latest_timestamp or 0)) * 1e3 > max_age_ms
        ):
            raise TimeoutError("the camera is silent")
        return self.frame
