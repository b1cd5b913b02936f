"""The simulators, by name.

Each module here names its CAMERAS (ours → key in a dataset), ACTIONS and their RANGES and SWITCHES,
STATES, IMAGE_SIZE, HEAVY, FIRST_SEED of an evaluation, SEEDS and NOISE of demonstrations, and has
`instruction` of a task, `provenance` of a result, `has_expert` and `make_expert`.
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vla0.core.rollout import Env
from vla0.errors import InputError, nearest

# → the extra whose packages it needs
ENVS = {"metaworld": "metaworld", "libero": "libero", "arm": "robot"}


def simulator(env: str) -> ModuleType:
    """The module of a simulator.

    Raises InputError for an unknown name, or where its packages are missing.
    """
    if env not in ENVS:
        raise InputError(f"env of {tuple(ENVS)}", f"'{env}'", nearest(env, ENVS))
    try:
        return importlib.import_module(f"vla0.sim.{env}")
    except ImportError as error:
        raise InputError(
            f"the packages of {env}", str(error), f"pip install 'vla0[{ENVS[env]}]'"
        ) from None


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


def make(
    env: str,
    task: str,
    image_size: int | None = None,
    max_steps: int | None = None,
    start: str = "stock",
    fps: float = 80.0,
    quick: bool = False,
) -> Env:
    """The Env of a task. None: as the simulator has it.

    start and fps are Meta-World's, quick is LIBERO's.
    """
    module = simulator(env)
    size = image_size or module.IMAGE_SIZE
    if env == "libero":
        return module.LiberoEnv(task, size, max_steps, quick)
    if env == "arm":
        return module.ArmEnv(task, size, max_steps or module.STEPS)
    return module.MetaWorldEnv(task, size, max_steps or module.STEPS, start, fps)


def named(
    env: str, tasks: Sequence[str] | None, suite: str | None, assets: Path | None
) -> tuple[str, ...]:
    """The tasks asked for, by name or by suite.

    The folder of LIBERO's meshes goes to the environment, for all processes.
    """
    module = simulator(env)
    if env == "libero":
        if assets is not None:
            os.environ[module.ASSETS] = str(assets.resolve())
        module.assets()  # nothing is started without them
        found = (
            *(module.task_named(task) for task in tasks or ()),
            *(module.tasks(suite) if suite else ()),
        )
    elif suite or assets:
        raise InputError("suite and assets with --env libero", f"--env {env}", "leave them away")
    else:
        found = tuple(tasks or ())
    if not found:
        example = {
            "metaworld": "--task drawer-close-v3",
            "libero": "--suite object",
            "arm": "--task touch-cube",
        }[env]
        raise InputError(
            "--task or --suite (LIBERO's)", "neither", f"name what to do, e.g. {example}"
        )
    return tuple(dict.fromkeys(found))
