"""A simulated arm in real time, as a LeRobot Robot: `vla0 robot --robot sim`, where no real one is
at hand.

The world of vla0.sim.arm, whose physics and cameras run here in a thread of their own, whatever the
program does.
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

# how long it may go by itself, and how often it looks whether it is there
GOING_S, LOOK_S = 5.0, 0.1
# degrees between two looks; from the goal, below which its own weight draws it
STILL, THERE = 0.05, 3.0


@RobotConfig.register_subclass("sim")
@dataclass(kw_only=True)
class SimulatedArmConfig(RobotConfig):
    """`--robot.width`, `--robot.height`: of the pictures.

    `--robot.camera_fps`: how often there are new ones.

    `--robot.seed`: of where arm, cube and mark are at the start, as in `vla0 eval --env arm`; none:
    upright.
    """

    width: int = 112
    height: int = 112
    camera_fps: float = 20.0
    seed: int | None = None


class SimulatedArm(Robot):
    """The arm.

    For tests: `frozen` keeps the cameras at their last picture, `silent` makes them say nothing.
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
        # (monotonic seconds, command), of the last connection
        self.diary: list[tuple[float, np.ndarray]] = []
        self.touched: set[str] = set()  # the tasks that are done at this instant

    @property
    def observation_features(self) -> dict[str, Any]:
        """Joints, then cameras."""
        return {
            **self.action_features,
            **dict.fromkeys(self.cameras, (self.config.height, self.config.width, 3)),
        }

    @property
    def action_features(self) -> dict[str, Any]:
        """Goal positions."""
        return dict.fromkeys(ACTIONS, float)

    @property
    def is_connected(self) -> bool:
        """Whether its world runs."""
        return self.thread is not None and self.thread.is_alive()

    @property
    def is_calibrated(self) -> bool:
        """Always."""
        return True

    def calibrate(self) -> None:
        """Nothing to do."""

    def configure(self) -> None:
        """Nothing to do."""

    def connect(self, calibrate: bool = True) -> None:
        """Starts the world. Raises InputError where MuJoCo cannot draw."""
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
        """Ends the world."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join(5)
            self.thread = None

    def get_observation(self) -> dict[str, Any]:
        """Joints and the newest pictures.

        Raises TimeoutError as LeRobot's cameras do: nothing for half a second.
        """
        self._awake()
        with self.lock:
            seen: dict[str, Any] = {
                name: float(v) for name, v in zip(ACTIONS, self.joints, strict=True)
            }
            return seen | {name: eye.read_latest() for name, eye in self.cameras.items()}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """Goal positions, clipped to what the servos can do."""
        self._awake()
        wanted = np.array([float(action[name]) for name in ACTIONS])
        goal = within(wanted)
        with self.lock:
            self.goal = goal
            self.diary.append((time.monotonic(), wanted))
        return {name: float(v) for name, v in zip(ACTIONS, goal, strict=True)}

    def go_by_itself(self, goal: dict[str, float]) -> bool:
        """Goes to these positions, as fast as its servos do, and rests there; False, and still,
        where they cannot.

        What nobody can carry to where an episode may begin: real arms have no such method.
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
        if not self.is_connected:
            raise ConnectionError("the simulated arm is not connected")

    def _live(self) -> None:
        """The thread: physics that follows the clock, and pictures at the cameras' rate."""
        try:
            # here: OpenGL wants to be used where it was made
            world = ArmPhysics(self.config.height, self.config.width)
            if self.config.seed is not None:
                world.place(self.config.seed)
            self.goal = world.joints()
            began, drawn, told = time.monotonic(), -math.inf, set()
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
                for task in self.touched - told:
                    logger.info(
                        "%s: done %.1f s after the arm was connected",
                        task,
                        time.monotonic() - began,
                    )
                told |= self.touched
                self.ready.set()
                time.sleep(0.002)
            world.close()
        except Exception as error:
            self.error = error
            self.ready.set()


class Eye:
    """A camera's newest picture."""

    def __init__(self):
        self.frame, self.latest_timestamp, self.frozen, self.silent = None, None, False, False

    def see(self, frame: np.ndarray) -> None:
        """A new picture, but where it is frozen or silent."""
        if not (self.frozen or self.silent):
            self.frame, self.latest_timestamp = frame, time.perf_counter()

    def read_latest(self, max_age_ms: float = 500) -> np.ndarray:
        """The newest; TimeoutError where it is older, as with LeRobot's cameras."""
        if self.frame is None or (
            self.silent and (time.perf_counter() - (self.latest_timestamp or 0)) * 1e3 > max_age_ms
        ):
            raise TimeoutError("the camera is silent")
        return self.frame
