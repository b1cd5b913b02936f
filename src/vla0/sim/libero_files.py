"""LIBERO's tasks, initial states and meshes, read without starting the simulator."""

import importlib.util
import logging
import os
import re
import runpy
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vla0.checkpoint.hub import ASSETS_FOLDER
from vla0.checkpoint.safe_pickle import load_arrays
from vla0.errors import InputError, nearest
from vla0.files import set_aside

logger = logging.getLogger(__name__)

# Caps: the steps after which an episode of a suite has failed.
STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
SUITES = {name.removeprefix("libero_"): (name,) for name in STEPS} | {
    "long": ("libero_10",),
    "all": ("libero_spatial", "libero_object", "libero_goal", "libero_10"),
}
MUJOCO = "3.3.2"  # later versions render darker (LIBERO issue 88, lerobot issue 4390)
ASSETS = "VLA0_LIBERO_ASSETS"  # the environment variable that names the folder of the meshes
FOLDERS = (
    "articulated_objects",
    "stable_scanned_objects",
    "turbosquid_objects",
    "stable_hope_objects",
    "scenes",
)


def tasks(suite: str) -> tuple[str, ...]:
    """Return the tasks "suite/name" of a suite.

    Args:
        suite: spatial, object, goal, 10 or long, or 90, with or without "libero_" before it. "all"
            means the first four.

    Raises:
        InputError: When the suite does not exist.
    """
    short = suite.removeprefix("libero_")
    if short not in SUITES:
        raise InputError(f"a suite of {', '.join(SUITES)}", f"'{suite}'", nearest(short, SUITES))
    return tuple(f"{name}/{task}" for name in SUITES[short] for task in _task_map()[name])


def task_named(task: str) -> str:
    """Return the full name "suite/name" of a task.

    Args:
        task: "suite/name", or "suite/number" where the number counts in the official order.

    Raises:
        InputError: When there is no such task. The message names the nearest one.
    """
    suite, _, name = task.partition("/")
    known = tasks(suite)
    if name.isdigit() and int(name) < len(known):
        return known[int(name)]
    full = f"{known[0].partition('/')[0]}/{name}"
    if full not in known:
        raise InputError(
            f"a task of {suite}: a number below {len(known)} or its name",
            f"'{name}'",
            nearest(full, known),
        )
    return full


def instruction(task: str) -> str:
    """Derive the instruction of a task from its name, as the benchmark does."""
    name = task.partition("/")[2]
    if name[0].isupper():  # "LIVING_ROOM_SCENE2_put_..."
        name = name.partition("SCENE")[2].partition("_")[2]
    return name.replace("_", " ")


def goals(task: str) -> set[str]:
    """Return a task's kinds of goal, of "in", "on", "open", "close", "turnon" and "turnoff"."""
    suite, name = task.split("/")
    text = (package() / "bddl_files" / suite / f"{name}.bddl").read_text(encoding="utf-8")
    return {kind.lower() for kind in re.findall(r"\((\w+)", text[text.index("(:goal") + 6 :])} - {
        "and"
    }


def has_expert(task: str) -> bool:
    """Return whether the scripted expert can solve a task.

    It picks and places. It cannot open things, turn them on or reach into a drawer.
    """
    return goals(task) <= {"in", "on"} and "drawer" not in instruction(task)


def provenance() -> dict[str, Any]:
    """Return what a result depends on: the versions, and how many meshes are stand-ins.

    The log warns of whatever spoils a comparison.
    """
    versions: dict[str, Any] = {
        package: metadata.version(package) for package in ("hf-libero", "robosuite", "mujoco")
    }
    if versions["mujoco"] != MUJOCO:
        logger.warning(
            "MuJoCo %s: LIBERO's pictures differ from %s on; results fall by points",
            versions["mujoco"],
            MUJOCO,
        )
    versions["stand-in assets"] = standins()
    if versions["stand-in assets"]:
        logger.warning(
            "%d of LIBERO's meshes are stand-ins: no result is comparable to a published one",
            versions["stand-in assets"],
        )
    return versions


def standins() -> int:
    """Count the meshes that are stand-ins for the real ones."""
    file = assets() / "STANDINS.txt"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


def assets() -> Path:
    """Return the folder of LIBERO's meshes.

    It is $VLA0_LIBERO_ASSETS where that is set. Otherwise it is the folder inside the package, or
    the one to which hf-libero downloads.

    Raises:
        InputError: When the meshes are not there.
    """
    set_folder = os.environ.get(ASSETS)
    places = (
        [Path(set_folder).expanduser()] if set_folder else [package() / "assets", ASSETS_FOLDER]
    )
    for place in places:
        if all((place / folder).is_dir() for folder in FOLDERS):
            return place.resolve()
    missing = [folder for folder in FOLDERS if not (places[-1] / folder).is_dir()]
    remedy = f"download them with `vla0 download libero-assets`, or set {ASSETS} to their folder"
    raise InputError("LIBERO's meshes", f"no {missing[0]} in '{places[-1]}'", remedy)


@cache
def package() -> Path:
    """Return the folder of hf-libero, or raise InputError when it is not installed."""
    module = importlib.util.find_spec("libero")
    if module is None or module.origin is None:
        raise InputError("LIBERO", "no hf-libero", "pip install 'vla0[libero]'")
    return Path(module.origin).parent / "libero"


@cache
def _task_map() -> dict[str, list[str]]:
    """Return the names of the tasks of each suite, in the official order."""
    # The file is run by its path, because the package around it imports torch, which no simulator's
    # process needs.
    return runpy.run_path(str(package() / "benchmark" / "libero_suite_task_map.py"))[
        "libero_task_map"
    ]


@cache
def environment() -> Any:
    """Import hf-libero's environment class with a configuration that this function writes.

    Without a configuration, hf-libero would ask at a prompt and download files.

    Raises:
        InputError: When hf-libero or its meshes are missing.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vla0" / "libero"
    paths = {
        "benchmark_root": "",
        "bddl_files": "bddl_files",
        "init_states": "init_files",
        "datasets": "../datasets",
    }
    lines = [f"{key}: {package() / path}" for key, path in paths.items()] + [f"assets: {assets()}"]
    folder.mkdir(parents=True, exist_ok=True)
    with set_aside(folder / "config.yaml") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    logging.disable(logging.WARNING)  # hides robosuite's advice on its own set-up
    try:
        import libero.libero as installed

        installed._assets_path_cache = str(assets())
        from libero.libero.envs import OffScreenRenderEnv
    except ImportError as error:
        raise InputError("LIBERO", str(error), "pip install 'vla0[libero]'") from None
    finally:
        logging.disable(logging.NOTSET)
    return OffScreenRenderEnv


def initial_states(file: Path) -> np.ndarray:
    """Read the (50, S) initial states of a task from a file of torch's format, without torch."""
    with zipfile.ZipFile(file) as archive, archive.open("archive/data.pkl") as content:
        return np.asarray(load_arrays(content, str(file)))
