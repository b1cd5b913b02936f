"""The laws of the house that can be read off the files."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "vla0"
LIGHT = (
    "core.spec",
    "core.codec",
    "core.ensemble",
    "core.rollout",
    "core.relative",
    "checkpoint.safe_pickle",
)


def test_a_room_imports_only_rooms_below_it_and_has_no_circles_inside():
    """By import-linter; the rooms and their order stand in pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_method_can_be_read_in_an_evening():
    lines = sum(len(file.read_text().splitlines()) for file in (SOURCE / "core").glob("*.py"))
    assert lines < 1500


def test_files_stay_below_400_lines():
    assert {
        f.name: n for f in SOURCE.rglob("*.py") if (n := len(f.read_text().splitlines())) > 400
    } == {}


def test_learning_and_acting_import_neither_lerobot_nor_a_simulator():
    rooms = ("core", "decode", "checkpoint", "data", "train")
    files = [
        file
        for room in rooms
        for file in (SOURCE / room).glob("*.py")
        if file.name != "__main__.py"
    ]
    modules = ", ".join(
        str(file.relative_to(SOURCE.parent).with_suffix("")).replace(os.sep, ".") for file in files
    )
    code = (
        f"import sys, vla0.policy, {modules}; print([m for m in ('lerobot', 'mujoco', "
        f"'metaworld') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_a_simulators_and_a_robots_process_import_no_torch():
    modules = ("sim.workers", "sim.evaluate", "cli", "robot.loop", "serve.client", *LIGHT)
    code = (
        f"import sys, {', '.join('vla0.' + module for module in modules)}; print('torch' in "
        f"sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )


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
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    }
    found = subprocess.run(
        [sys.executable, "-c", "from vla0 import VLA0"], capture_output=True, text=True, check=True,
        env={**environment, **given, "OMP_DISPLAY_ENV": "verbose"},
    )  # fmt: skip
    assert heard in found.stderr


def test_the_list_of_licences_is_of_what_is_installed():
    """`make licences` writes it anew."""
    docs = ROOT / "docs"
    given = runpy.run_path(str(docs / "licences.py"))
    here = given["installed"]()
    told = {
        line.split("|")[1].strip(" *")
        for line in (docs / "licences.md").read_text().splitlines()
        if line.startswith("| ")
    }
    assert told - {"package"} == {name for name in given["wanted"]() if name in here}
