"""LIBERO's tasks, initial states and meshes: what can be known of it without a simulator."""

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

# caps
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
MUJOCO = "3.3.2"  # later ones render darker (LIBERO issue 88, lerobot issue 4390)
ASSETS = "VLA0_LIBERO_ASSETS"  # environment variable: folder of the meshes
FOLDERS = (
    "articulated_objects",
    "stable_scanned_objects",
    "turbosquid_objects",
    "stable_hope_objects",
    "scenes",
)


def tasks(suite: str) -> tuple[str, ...]:
    """The tasks "suite/name" of a suite (spatial, object, goal, 10 or long, 90; with or without
    "libero_") or of all four.
    """
    short = suite.removeprefix("libero_")
    if short not in SUITES:
        raise InputError(f"a suite of {', '.join(SUITES)}", f"'{suite}'", nearest(short, SUITES))
    return tuple(f"{name}/{task}" for name in SUITES[short] for task in _task_map()[name])


def task_named(task: str) -> str:
    """The task "suite/name", named so or "suite/number" in the official order.

    Raises InputError, naming the nearest.
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
    """The instruction of a task, as the benchmark makes it of its name."""
    name = task.partition("/")[2]
    if name[0].isupper():  # "LIVING_ROOM_SCENE2_put_..."
        name = name.partition("SCENE")[2].partition("_")[2]
    return name.replace("_", " ")


def goals(task: str) -> set[str]:
    """The kinds of goal of a task: "in", "on", "open", "close", "turnon", "turnoff"."""
    suite, name = task.split("/")
    text = (package() / "bddl_files" / suite / f"{name}.bddl").read_text(encoding="utf-8")
    return {kind.lower() for kind in re.findall(r"\((\w+)", text[text.index("(:goal") + 6 :])} - {
        "and"
    }


def has_expert(task: str) -> bool:
    """Whether the scripted expert knows what to do: pick and place, nothing to open or turn on, no
    drawer to reach into.
    """
    return goals(task) <= {"in", "on"} and "drawer" not in instruction(task)


def provenance() -> dict[str, Any]:
    """What a result depends on: versions, and whether the meshes are the real ones.

    Warns of what spoils a comparison.
    """
    found: dict[str, Any] = {
        package: metadata.version(package) for package in ("hf-libero", "robosuite", "mujoco")
    }
    if found["mujoco"] != MUJOCO:
        logger.warning(
            "MuJoCo %s: LIBERO's pictures differ from %s on; results fall by points",
            found["mujoco"],
            MUJOCO,
        )
    found["stand-in assets"] = standins()
    if found["stand-in assets"]:
        logger.warning(
            "%d of LIBERO's meshes are stand-ins: no result is comparable to a published one",
            found["stand-in assets"],
        )
    return found


def standins() -> int:
    """How many of the meshes are not the real ones."""
    file = assets() / "STANDINS.txt"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


def assets() -> Path:
    """The folder of LIBERO's meshes: $VLA0_LIBERO_ASSETS, those inside the package, or those that
    hf-libero downloaded.
    """
    given = os.environ.get(ASSETS)
    places = [Path(given).expanduser()] if given else [package() / "assets", ASSETS_FOLDER]
    for place in places:
        if all((place / folder).is_dir() for folder in FOLDERS):
            return place.resolve()
    missing = [folder for folder in FOLDERS if not (places[-1] / folder).is_dir()]
    remedy = f"download them with `vla0 download libero-assets`, or set {ASSETS} to their folder"
    raise InputError("LIBERO's meshes", f"no {missing[0]} in '{places[-1]}'", remedy)


@cache
def package() -> Path:
    """The folder of hf-libero."""
    found = importlib.util.find_spec("libero")
    if found is None or found.origin is None:
        raise InputError("LIBERO", "no hf-libero", "pip install 'vla0[libero]'")
    return Path(found.origin).parent / "libero"


@cache
def _task_map() -> dict[str, list[str]]:
    # By its path: the package around it imports torch, which no simulator's process needs.
    return runpy.run_path(str(package() / "benchmark" / "libero_suite_task_map.py"))[
        "libero_task_map"
    ]


@cache
def environment() -> Any:
    """hf-libero's environment, imported with a configuration of ours: without one it asks at a
    prompt, and downloads.
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
    logging.disable(logging.WARNING)  # robosuite's advice on its own set-up
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
    """(50, S) simulator states of a task; torch's file format, read without torch."""
    with zipfile.ZipFile(file) as archive, archive.open("archive/data.pkl") as content:
        return np.asarray(load_arrays(content, str(file)))
