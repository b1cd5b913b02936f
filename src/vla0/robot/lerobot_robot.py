"""Adapts a LeRobot Robot to RobotInterface.

It checks that the robot is one that the checkpoint was trained for.
"""

import contextlib
import io
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla0.core.spec import Observation, Spec
from vla0.errors import InputError, nearest, said
from vla0.sim.simulator import simulator

logger = logging.getLogger(__name__)

INSTALL = "pip install 'vla0[robot]'"


def make_robot(words: Sequence[str]) -> Any:
    """Make a LeRobot Robot, not connected yet, from the words of a command line.

    Third-party robots (`lerobot_robot_*`) are found as LeRobot finds them; `--robot.type=sim` is
    vla0's simulated arm.

    Args:
        words: `--robot.type=...` and the other words that LeRobot's own commands take.

    Returns:
        The Robot.

    Raises:
        InputError: LeRobot is not installed, or it cannot make a robot from these words.
    """
    try:
        import draccus
        from lerobot.cameras import opencv, realsense, zmq  # noqa: F401  registers them
        from lerobot.robots import RobotConfig, make_robot_from_config
        from lerobot.utils.import_utils import register_third_party_plugins
    except ImportError as error:
        raise InputError("LeRobot, for robots", str(error), INSTALL) from None
    import importlib
    import pkgutil

    import lerobot.robots

    if "--robot.type=sim" in words:
        simulator("arm")  # raises an error that says what to install
    with contextlib.suppress(ImportError):
        import vla0.robot.simulatedarm  # noqa: F401
    for module in pkgutil.iter_modules(lerobot.robots.__path__):
        with contextlib.suppress(ImportError):  # a robot without its driver cannot be chosen
            importlib.import_module(f"lerobot.robots.{module.name}")
    register_third_party_plugins()

    @dataclass
    class Command:
        robot: RobotConfig

    if not any(word.startswith("--robot.type=") for word in words):
        raise InputError(
            "a robot", "none", "give --robot sim, or --robot.type=... as for lerobot-record"
        )
    words = [_whole_type(word, RobotConfig.get_known_choices()) for word in words]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            config = draccus.parse(Command, args=words).robot
        return make_robot_from_config(config)
    except SystemExit:
        reason = stderr.getvalue().strip().splitlines()[-1:] or ["not understood"]
        raise InputError(
            "--robot.type=... and what that robot needs, as for lerobot-record",
            reason[0],
            "correct it",
        ) from None
    except (ImportError, ValueError, TypeError, OSError) as error:
        text = said(error, 300)
        raise InputError(
            "a robot that LeRobot can make", text, f"correct --robot.*, or {INSTALL}"
        ) from None
    except Exception as error:  # draccus raises types of its own
        raise InputError(
            "--robot.* as for lerobot-record", " ".join(str(error).split())[:300], "correct it"
        ) from None


def _whole_type(word: str, known: Mapping[str, Any]) -> str:
    """Complete a robot's type, as so101 → so101_follower; refuse an unknown type."""
    name, _, kind = word.partition("=")
    if name != "--robot.type" or kind in known:
        return word
    if f"{kind}_follower" in known:
        return f"{name}={kind}_follower"
    raise InputError(f"a robot of {sorted(known)}", f"'{kind}'", nearest(kind, known))


class LeRobotBody:
    """A LeRobot Robot as a RobotInterface.

    If a camera sends nothing, the last observation is returned with its old time, so that the loop
    does not send it to the policy.

    Args:
        robot: The LeRobot Robot.
        spec: The Spec of the checkpoint.
        instruction: What the robot shall do.
        cameras: camera of the checkpoint → the robot's name for it, where they differ.

    Raises:
        InputError: The robot lacks a camera, a joint or an action of the checkpoint, or has other
            actions.
    """

    def __init__(
        self, robot: Any, spec: Spec, instruction: str, cameras: Mapping[str, str] | None = None
    ):
        self.robot, self.spec, self.instruction = robot, spec, instruction
        features = dict(robot.observation_features)
        pictures = {name: shape for name, shape in features.items() if isinstance(shape, tuple)}
        self.numbers = [name for name in features if name not in pictures]
        self.cameras = _cameras(pictures, spec, cameras or {})
        self.state = _names(
            "state",
            spec.state_names,
            self.numbers,
            None if spec.state is None else len(spec.state[0]),
        )
        self.actions = _names(
            "action", spec.action_names, list(robot.action_features), spec.dimensions
        )
        if unused := [name for name in robot.action_features if name not in self.actions]:
            raise InputError(
                f"a robot with the actions {self.actions} alone",
                f"also {unused}",
                "use the robot of the dataset",
            )
        self.frames = {camera: deque(maxlen=spec.history) for camera in spec.cameras}
        self.last: Observation | None = None
        self.command: dict[str, float] = {}
        self.seen: dict[str, Any] = {}  # the last observation as LeRobot returned it

    @property
    def absolute(self) -> bool:
        """Whether actions are positions that the robot also reports."""
        return all(name in self.numbers for name in self.actions)

    def position(self) -> np.ndarray | None:
        """Return where the robot is, in units of actions (D,).

        It is None before the first observation, and for a robot that does not report positions.
        """
        return (
            np.array([float(self.seen[name]) for name in self.actions])
            if self.absolute and self.seen
            else None
        )

    def observe(self) -> Observation:
        """Read the cameras and the state.

        Returns:
            The observation, its `captured_at` in seconds of `time.monotonic`.

        Raises:
            InputError: A camera's times are of a clock that is not known.
            TimeoutError: A camera has never sent a picture.
        """
        try:
            self.seen = self.robot.get_observation()
        except TimeoutError as error:
            if self.last is None:
                raise
            logger.debug("no picture: %s", error)
            return self.last
        for camera, name in self.cameras.items():
            frame = np.asarray(self.seen[name])
            self.frames[camera].extend(
                [frame] * (self.spec.history - len(self.frames[camera]) or 1)
            )
        images = {
            c: kept[-1] if self.spec.history == 1 else np.stack(kept)
            for c, kept in self.frames.items()
        }
        state = np.array([float(self.seen[name]) for name in self.state])
        self.last = Observation(images, self.instruction, state, captured_at=self._captured_at())
        return self.last

    def _captured_at(self) -> float:
        """Return the time of the oldest picture whose camera tells one, in monotonic seconds."""
        now = time.monotonic()
        held = (getattr(self.robot, "cameras", None) or {}).items()
        ages = [
            _age(name, at)
            for name, camera in held
            if (at := getattr(camera, "latest_timestamp", None)) is not None
        ]
        return now - max(ages, default=0.0)

    def send(self, action: np.ndarray) -> None:
        """Execute an action (D,), in the dataset's units."""
        self.command = {
            name: float(value) for name, value in zip(self.actions, action, strict=True)
        }
        self.robot.send_action(dict(self.command))

    def hold(self) -> None:
        """Hold the robot where it is: set velocities to 0.

        Position-controlled joints keep their last position by themselves.
        """
        if any(name.endswith(".vel") for name in self.actions):
            still = {
                name: 0.0 if name.endswith(".vel") else value
                for name, value in self.command.items()
            }
            self.robot.send_action(
                still or {name: 0.0 for name in self.actions if name.endswith(".vel")}
            )

    def went_itself(self, goal: np.ndarray) -> bool:
        """Let a simulated arm go to a position by itself; a real arm never does.

        Args:
            goal: (D,), in units of actions.

        Returns:
            Whether the arm is there now.
        """
        go = getattr(self.robot, "go_by_itself", None)
        return go is not None and go(
            {name: float(value) for name, value in zip(self.actions, goal, strict=True)}
        )

    def stop(self) -> None:
        """Hold the robot: under power it does not fall. `release` ends that."""
        self.hold()

    def release(self) -> None:
        """Disconnect the robot.

        Its setting disable_torque_on_disconnect decides whether the motors lose their power.
        """
        if self.robot.is_connected:
            self.robot.disconnect()


def _cameras(
    pictures: Mapping[str, tuple], spec: Spec, renamed: Mapping[str, str]
) -> dict[str, str]:
    """Return camera of the checkpoint → the robot's name for it."""
    if unknown := [camera for camera in renamed if camera not in spec.cameras]:
        raise InputError(
            f"cameras of the checkpoint, {spec.cameras}",
            f"'{unknown[0]}'",
            nearest(unknown[0], spec.cameras),
        )
    depth = {camera for camera, *_ in spec.depth}
    names = {camera: renamed.get(camera, camera) for camera in spec.cameras}
    for camera, name in names.items():
        if name not in pictures:
            remedy = "name it in --robot.cameras as in the dataset, or give --camera CAMERA=NAME"
            raise InputError(
                f"a camera '{name}' of the robot", f"{sorted(pictures) or 'none'}", remedy
            )
        if (pictures[name][-1] == 1) != (camera in depth):
            kinds = ("depth maps", "colours") if camera in depth else ("colours", "depth maps")
            raise InputError(
                f"{kinds[0]} from '{name}'", kinds[1], "name the camera that the dataset had"
            )
    return names


def _age(camera: str, taken: float) -> float:
    """Return the seconds since a picture was taken, by whichever clock its camera uses.

    LeRobot's cameras use time.perf_counter, others time.time.
    """
    for clock in (time.perf_counter, time.time):
        if (age := clock() - taken) > -0.5:
            return max(0.0, age)
    got = f"one {-age:.0f} s ahead of both: how old a picture is, could not be told"
    raise InputError(
        f"latest_timestamp of camera '{camera}' in time.perf_counter or time.time",
        got,
        "mend its driver",
    )


def _names(
    what: str, trained: Sequence[str] | None, reported: list[str], count: int | None
) -> list[str]:
    """Return the robot's names of the numbers, in the order of the checkpoint."""
    if trained is not None and count is not None:
        if missing := [name for name in trained if name not in reported]:
            raise InputError(
                f"{what} {list(trained)} of the checkpoint",
                f"no '{missing[0]}' in {reported}",
                "use the dataset's robot",
            )
        return list(trained)
    if count is not None and len(reported) != count:
        raise InputError(
            f"{what} of {count} numbers",
            f"{len(reported)}: {reported}",
            "use the robot of the dataset",
        )
    if count is not None:
        logger.warning(
            "the checkpoint does not name the numbers of its %s: taken in the robot's order, %s",
            what,
            reported,
        )
    return reported
