"""The interface of a simulator, and the simulators by name.

To add one, copy metaworld.py, which has an Env, its expert, and `SIMULATOR` at its end. Then enter
it in SIMULATORS.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

from vla0.core.rollout import Env, Policy
from vla0.errors import InputError, nearest, refuse_unknown

# The simulators, each with the extra of this package that installs what it needs
SIMULATORS = {"metaworld": "metaworld", "libero": "libero", "arm": "robot"}


class Simulator(Protocol):
    """Describes a simulator's pictures, states, actions and tasks, and makes its Envs."""

    cameras: Mapping[str, str]  # {name in a Spec: key in a dataset}
    actions: tuple[str, ...]  # (D,) names of the dimensions of an action
    ranges: tuple[tuple[float, float], ...]  # (D,) low and high; actions outside are clipped
    switches: tuple[int, ...]  # dimensions of an action of which only the sign counts
    states: tuple[str, ...]  # (S,) names of the dimensions of a state
    image_size: int  # default side of the pictures in pixels
    fps: float  # default control rate in Hz
    any_fps: bool  # whether decisions can be made at another rate
    heavy: bool  # whether a world takes long to build, so that a process should keep to one task
    seeds: range  # seeds of demonstrations
    evaluation_seeds: range  # seeds of evaluations; no demonstration has them
    noise: tuple[float, float]  # share of a demonstration's steps that are disturbed; how much
    example: str  # words that name a task on the command line
    options: type  # a frozen dataclass of the options that only this simulator has

    def ready(self) -> None:
        """Raise InputError when something is missing that the simulator needs."""
        ...

    def tasks(self, names: Sequence[str], suite: str | None = None) -> tuple[str, ...]:
        """Return the full names of tasks, and of the tasks of a suite.

        Raises:
            InputError: When a task or the suite does not exist.
        """
        ...

    def instruction(self, task: str) -> str:
        """Return the instruction that the policy receives for a task."""
        ...

    def step_limit(self, task: str) -> int:
        """Return the steps after which an episode has failed, if nobody says otherwise."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Return what a result depends on: the versions, and whatever spoils a comparison."""
        ...

    def make(
        self,
        task: str,
        *,
        image_size: int | None = None,
        max_steps: int | None = None,
        fps: float | None = None,
        options: Any = None,
    ) -> Env:
        """Make the Env of a task. None takes the simulator's default.

        Args:
            task: Full name of the task.
            image_size: Side of the pictures in pixels.
            max_steps: Steps after which an episode has failed.
            fps: Decisions per second.
            options: An instance of the simulator's `options`.
        """
        ...

    def has_expert(self, task: str) -> bool:
        """Return whether a script solves a task, or raise InputError for an unknown task."""
        ...

    def make_expert(self, env: Any) -> Policy:
        """Make the script that solves the task of an Env of this simulator."""
        ...


def simulator(name: str) -> Simulator:
    """Return the simulator with a name.

    Raises:
        InputError: When the name is unknown, or packages are missing.
    """
    if name not in SIMULATORS:
        raise InputError(f"env of {tuple(SIMULATORS)}", f"'{name}'", nearest(name, SIMULATORS))
    try:
        return importlib.import_module(f"vla0.sim.{name}").SIMULATOR
    except ImportError as error:
        extra = SIMULATORS[name]
        raise InputError(
            f"the packages of {name}", str(error), f"pip install 'vla0[{extra}]'"
        ) from None


def options_of(name: str, values: Mapping[str, Any]) -> Any:
    """Turn {option: value} into the options of a simulator.

    Raises:
        InputError: When the simulator does not have such an option, or not such a value.
    """
    options_class = simulator(name).options
    known = [field.name for field in fields(options_class)]
    if values and not known:
        raise InputError(f"no options for {name}", f"{dict(values)}", "leave them out")
    refuse_unknown(values, known, f"the options of {name}")
    return options_class(**values)


def tasks_of(name: str, tasks: Sequence[str], suite: str | None) -> tuple[str, ...]:
    """Return the full names of the tasks that are asked for by name and by suite, each once.

    Args:
        name: Name of the simulator.
        tasks: Names of tasks.
        suite: Name of a suite, or None.

    Raises:
        InputError: When no task is named, or one does not exist.
    """
    target = simulator(name)
    target.ready()
    full_names = target.tasks(tasks, suite)
    if not full_names:
        remedy = f"name what to do, e.g. {target.example}"
        raise InputError("--task or --suite (LIBERO's)", "neither", remedy)
    return tuple(dict.fromkeys(full_names))


def refuse_suite(name: str, suite: str | None) -> None:
    """Raise InputError when a suite is named for a simulator that has none."""
    if suite:
        raise InputError("--suite with --env libero", f"--env {name}", "leave it out")


def renderer(model: Any, height: int, width: int) -> Any:
    """Return MuJoCo's renderer for pictures of a size.

    Raises:
        InputError: When nothing can be drawn on this machine.
    """
    import mujoco

    mujoco: Any  # pyright cannot see the names, which come from a binary
    try:
        return mujoco.Renderer(model, height, width)
    except (mujoco.FatalError, RuntimeError, AttributeError) as error:
        remedy = "set MUJOCO_GL=egl before mujoco is imported, and see `make rendering`"
        raise InputError(
            "OpenGL to draw with", f"{error} (MUJOCO_GL={os.environ.get('MUJOCO_GL')})", remedy
        ) from error
