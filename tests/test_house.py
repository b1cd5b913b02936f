"""The laws of the house that can be read off the files."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "vla0"
ROOMS = (
    "errors noise files place spec settings relative bridge arrays codec ensemble rollout vision prompt pictures stored bounds source data windows tiny model adapter writeup recipe resume decode policy chart keep trainer train "
    "envs collect table parallel cluster evaluate report trial bench doctor inspect hub convert serve robot cli"
).split()  # fmt: skip
SPINE = ROOMS[: ROOMS.index("envs")]


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The rooms that a file imports; not what it does where it is run as a program (`-m vla0.train`)."""
    rooms, tree = set(), ast.parse(file.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vla0":
            parts = node.module.split(".")
            rooms |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name in ROOMS}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("vla0.")}
    return rooms


def test_every_file_is_in_a_room():
    assert {room_of(file) for file in SOURCE.rglob("*.py")} == {*ROOMS, "__init__"}


def test_a_file_imports_only_rooms_above_it():
    for file in SOURCE.rglob("*.py"):
        if file.name == "__init__.py" and file.parent == SOURCE:
            continue
        own = ROOMS.index(room_of(file))
        below = [room for room in imported(file) if ROOMS.index(room) > own]
        assert not below, f"{file.name} imports {below}, which stand below it"


def test_files_stay_below_250_lines():
    assert {f.name: n for f in SOURCE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 250} == {}


def test_the_spine_imports_without_lerobot_and_mujoco():
    modules = ", ".join(f"vla0.{room}" for room in SPINE)
    code = f"import sys, {modules}; print([m for m in ('lerobot', 'mujoco', 'metaworld') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_simulators_and_a_robots_process_import_no_torch():
    code = (
        "import sys, vla0.parallel, vla0.evaluate, vla0.cli, vla0.robot.loop, vla0.serve.client; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("given", "heard"),
    [
        ({}, "GOMP_SPINCOUNT = '3000'"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT = '77'"),
        ({"OMP_WAIT_POLICY": "active"}, "GOMP_SPINCOUNT = '30000000000'"),
    ],
)
def test_openmp_hears_how_its_threads_shall_wait_before_torch_is_loaded(given, heard):
    """From its own account; what a user has set stays."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    found = subprocess.run(
        [sys.executable, "-c", "from vla0 import VLA0"], capture_output=True, text=True, check=True,
        env={**environment, **given, "OMP_DISPLAY_ENV": "verbose"},
    )  # fmt: skip
    assert heard in found.stderr


def test_the_list_of_licences_is_of_what_is_installed():
    """`make licences` writes it anew."""
    docs = SOURCE.parents[1] / "docs"
    given = runpy.run_path(str(docs / "licences.py"))
    here = given["installed"]()
    told = {line.split("|")[1].strip(" *") for line in (docs / "licences.md").read_text().splitlines() if line.startswith("| ")}
    assert told - {"package"} == {name for name in given["wanted"]() if name in here}
