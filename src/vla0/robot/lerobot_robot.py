"""A LeRobot Robot as a RobotInterface, once it is shown to be the one that a checkpoint was trained
for.
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
from vla0.errors import InputError, nearest
from vla0.sim.simulator import simulator

logger = logging.getLogger(__name__)

INSTALL = "pip install 'vla0[robot]'"


def make_robot(words: Sequence[str]) -> Any:
    """LeRobot's Robot of `--robot.type=...` and the other words that its own commands take; not
    connected yet.

    Third-party robots (`lerobot_robot_*`) are found as LeRobot finds them; `--robot.type=sim` is
    vla0's simulated arm.
    """
    try:
        import draccus
        from lerobot.cameras import opencv, realsense, zmq  # noqa: F401  their names become known
        from lerobot.robots import RobotConfig, make_robot_from_config
        from lerobot.utils.import_utils import register_third_party_plugins
    except ImportError as error:
        raise InputError("LeRobot, for robots", str(error), INSTALL) from None
    import importlib
    import pkgutil

    import lerobot.robots

    if "--robot.type=sim" in words:
        simulator("arm")  # says what it needs
    with contextlib.suppress(ImportError):
        import vla0.robot.simulatedarm  # noqa: F401
    for module in pkgutil.iter_modules(lerobot.robots.__path__):
        with contextlib.suppress(ImportError):  # one whose driver is not installed cannot be chosen
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
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            config = draccus.parse(Command, args=words).robot
        return make_robot_from_config(config)
    except SystemExit:
        reason = told.getvalue().strip().splitlines()[-1:] or ["not understood"]
        raise InputError(
            "--robot.type=... and what that robot needs, as for lerobot-record",
            reason[0],
            "correct it",
        ) from None
    except (ImportError, ValueError, TypeError, OSError) as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        raise InputError(
            "a robot that LeRobot can make", text, f"correct --robot.*, or {INSTALL}"
        ) from None
    except Exception as error:  # draccus has errors of its own kinds
        raise InputError(
            "--robot.* as for lerobot-record", " ".join(str(error).split())[:300], "correct it"
        ) from None


def _whole_type(word: str, known: Mapping[str, Any]) -> str:
    """so101 → so101_follower; an unknown type is refused with the nearest."""
    name, _, kind = word.partition("=")
    if name != "--robot.type" or kind in known:
        return word
    if f"{kind}_follower" in known:
        return f"{name}={kind}_follower"
    raise InputError(f"a robot of {sorted(known)}", f"'{kind}'", nearest(kind, known))


class LeRobotBody:
    """A LeRobot Robot.

    spec: of the checkpoint. cameras: {camera of the checkpoint: the robot's name for it} where they
    differ. Raises InputError where the robot lacks a camera, a joint or an action, or has others. A
    camera that is silent gives the last picture with its old time: the loop does not ask about it.
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
        self.seen: dict[str, Any] = {}  # as LeRobot gave it

    @property
    def absolute(self) -> bool:
        """Whether actions are positions that the robot also reports."""
        return all(name in self.numbers for name in self.actions)

    def position(self) -> np.ndarray | None:
        """(D,) where it is, in the terms of actions; None where it reports no such thing."""
        return (
            np.array([float(self.seen[name]) for name in self.actions])
            if self.absolute and self.seen
            else None
        )

    def observe(self) -> Observation:
        """What it sees and feels now.

        Raises TimeoutError where a camera has never given a picture.
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
        """Monotonic seconds of the oldest picture, where its camera says.

        Raises InputError for a clock that is not known.
        """
        now = time.monotonic()
        held = (getattr(self.robot, "cameras", None) or {}).items()
        ages = [
            _age(name, at)
            for name, camera in held
            if (at := getattr(camera, "latest_timestamp", None)) is not None
        ]
        return now - max(ages, default=0.0)

    def send(self, action: np.ndarray) -> None:
        """Executes an action (D,)."""
        self.command = {
            name: float(value) for name, value in zip(self.actions, action, strict=True)
        }
        self.robot.send_action(dict(self.command))

    def hold(self) -> None:
        """Position-controlled joints keep the last position by themselves; velocities become 0."""
        if any(name.endswith(".vel") for name in self.actions):
            still = {
                name: 0.0 if name.endswith(".vel") else value
                for name, value in self.command.items()
            }
            self.robot.send_action(
                still or {name: 0.0 for name in self.actions if name.endswith(".vel")}
            )

    def went_itself(self, goal: np.ndarray) -> bool:
        """Whether it went to a position (D,) by itself: a simulated arm does, where its servos can;
        a real one never.
        """
        go = getattr(self.robot, "go_by_itself", None)
        return go is not None and go(
            {name: float(value) for name, value in zip(self.actions, goal, strict=True)}
        )

    def stop(self) -> None:
        """As `hold`: under power it does not fall. `release` ends that."""
        self.hold()

    def release(self) -> None:
        """Disconnects; whether the motors then go limp, the robot's own setting says
        (disable_torque_on_disconnect).
        """
        if self.robot.is_connected:
            self.robot.disconnect()


def _cameras(
    pictures: Mapping[str, tuple], spec: Spec, renamed: Mapping[str, str]
) -> dict[str, str]:
    """{camera of the checkpoint: the robot's name of it}."""
    if unknown := [camera for camera in renamed if camera not in spec.cameras]:
        raise InputError(
            f"cameras of the checkpoint, {spec.cameras}",
            f"'{unknown[0]}'",
            nearest(unknown[0], spec.cameras),
        )
    depth = {camera for camera, *_ in spec.depth}
    found = {camera: renamed.get(camera, camera) for camera in spec.cameras}
    for camera, name in found.items():
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
    return found


def _age(camera: str, taken: float) -> float:
    """Seconds since a picture was taken: LeRobot's cameras count in perf_counter, others in
    time.time.
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
    what: str, trained: Sequence[str] | None, given: list[str], count: int | None
) -> list[str]:
    """The robot's names of the numbers, in the order of the checkpoint."""
    if trained is not None and count is not None:
        if missing := [name for name in trained if name not in given]:
            raise InputError(
                f"{what} {list(trained)} of the checkpoint",
                f"no '{missing[0]}' in {given}",
                "use the dataset's robot",
            )
        return list(trained)
    if count is not None and len(given) != count:
        raise InputError(
            f"{what} of {count} numbers", f"{len(given)}: {given}", "use the robot of the dataset"
        )
    if count is not None:
        logger.warning(
            "the checkpoint does not name the numbers of its %s: taken in the robot's order, %s",
            what,
            given,
        )
    return given
