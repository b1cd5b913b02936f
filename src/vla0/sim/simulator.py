"""What a simulator says of itself and can do, and the simulators by name.

To add one, copy metaworld.py: a module with an Env, its expert, and `SIMULATOR` at its end; then
enter it in SIMULATORS.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

from vla0.core.rollout import Env, Policy
from vla0.errors import InputError, nearest, refuse_unknown

# → the extra whose packages it needs
SIMULATORS = {"metaworld": "metaworld", "libero": "libero", "arm": "robot"}


class Simulator(Protocol):
    """A simulator: what its pictures, states and actions are, its tasks, and how to make an Env."""

    cameras: Mapping[str, str]  # name in a Spec → key in a dataset
    actions: tuple[str, ...]  # (D,) names
    ranges: tuple[tuple[float, float], ...]  # (D,) low and high; beyond them actions are clipped
    switches: tuple[int, ...]  # actions of which only the sign counts
    states: tuple[str, ...]  # (S,) names
    image_size: int  # side of its pictures, pixels, where nothing else is asked for
    fps: float  # its own control rate, Hz
    any_fps: bool  # whether it can be asked to decide at another rate
    heavy: bool  # whether a world takes long to build, so that a process should keep to one task
    seeds: range  # of demonstrations
    evaluation_seeds: range  # of what is tested: none of a demonstration
    noise: tuple[float, float]  # share of a demonstration's steps that are disturbed; how much
    example: str  # of the words that name a task on the command line
    options: type  # a frozen dataclass of what can be set in this simulator alone

    def ready(self) -> None:
        """Raises InputError where something is missing without which nothing should begin."""
        ...

    def tasks(self, names: Sequence[str], suite: str | None = None) -> tuple[str, ...]:
        """The full names of tasks, and of a suite's. Raises InputError for what there is not."""
        ...

    def instruction(self, task: str) -> str:
        """What the policy is told to do."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What a result depends on: versions, and whatever spoils a comparison."""
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
        """The Env of a task, which has `fps` and `max_steps`; None: as the simulator has it."""
        ...

    def has_expert(self, task: str) -> bool:
        """Whether a script solves the task. Raises InputError for an unknown one."""
        ...

    def make_expert(self, env: Any) -> Policy:
        """The script that solves the task of an Env of this simulator."""
        ...


def simulator(name: str) -> Simulator:
    """The simulator of a name.

    Raises InputError for an unknown name, or where its packages are missing.
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


def options_of(name: str, given: Mapping[str, Any]) -> Any:
    """A simulator's own options. Raises InputError for those that it does not have."""
    kind = simulator(name).options
    known = [field.name for field in fields(kind)]
    if given and not known:
        raise InputError(f"no options for {name}", f"{dict(given)}", "leave them out")
    refuse_unknown(given, known, f"the options of {name}")
    return kind(**given)


def tasks_of(name: str, tasks: Sequence[str], suite: str | None) -> tuple[str, ...]:
    """The tasks asked for by name and by suite, each once. Raises InputError for none."""
    own = simulator(name)
    own.ready()
    found = own.tasks(tasks, suite)
    if not found:
        remedy = f"name what to do, e.g. {own.example}"
        raise InputError("--task or --suite (LIBERO's)", "neither", remedy)
    return tuple(dict.fromkeys(found))


def refuse_suite(name: str, suite: str | None) -> None:
    """Raises InputError for a suite, of a simulator that has none."""
    if suite:
        raise InputError("--suite with --env libero", f"--env {name}", "leave it out")


def renderer(model: Any, height: int, width: int) -> Any:
    """MuJoCo's, of pictures of that size. Raises InputError where nothing can be drawn."""
    import mujoco

    mujoco: Any  # its names come from a binary
    try:
        return mujoco.Renderer(model, height, width)
    except (mujoco.FatalError, RuntimeError, AttributeError) as error:
        remedy = "set MUJOCO_GL=egl before mujoco is imported, and see `make rendering`"
        raise InputError(
            "OpenGL to draw with", f"{error} (MUJOCO_GL={os.environ.get('MUJOCO_GL')})", remedy
        ) from error
