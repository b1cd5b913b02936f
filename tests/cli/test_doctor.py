"""The doctor says what works, and what to do about the rest."""

import subprocess
import sys

import pytest

from vla0.doctor import Finding, _try, diagnose, draw, findings_table
from vla0.errors import InputError


def doctor(*words, **variables):
    import os

    return subprocess.run(
        [sys.executable, "-m", "vla0", "doctor", *words], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "160", **variables},
    )  # fmt: skip


def test_this_machine_passes_where_the_tests_pass():
    found = {line.name: line for line in diagnose()}
    for name in ("Python", "torch", "transformers"):
        assert found[name].fine, found[name]


def test_a_job_that_cannot_run_is_exit_code_1_with_the_remedy():
    pytest.importorskip("mujoco")
    done = doctor("--for", "eval", MUJOCO_GL="nonsense")
    assert done.returncode == 1
    assert "→ Debian: apt-get install libegl1" in done.stdout
    assert "eval cannot run here: rendering" in done.stdout


def test_an_unknown_job_is_refused():
    done = doctor("--for", "dinner")
    assert done.returncode == 2
    assert "train" in done.stderr


def test_a_frame_is_drawn_without_a_screen():
    pytest.importorskip("mujoco")
    assert draw().startswith("MUJOCO_GL=")


def test_whatever_breaks_is_a_line_on_the_screen():
    def broken():
        raise OSError("libGL.so.1: cannot open shared object file\nsecond line")

    def refused():
        raise InputError("meshes", "none", "fetch them")

    line = _try("drawing", broken, "install it", ("eval",))
    assert line == Finding(
        "drawing",
        False,
        "OSError: libGL.so.1: cannot open shared object file",
        "install it",
        ("eval",),
    )
    assert _try("meshes", refused, "install it", ()).remedy == "fetch them"
    assert findings_table([line, Finding("all else", True, "well")]).row_count == 3
