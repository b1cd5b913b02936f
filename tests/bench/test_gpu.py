"""The script for a bare GPU machine: what fails to import on the day costs the day."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lerobot") is not None,
    reason="tried where only the base package is: make test does",
)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(out, *words):
    command = [sys.executable, str(SCRIPT), "--small", "--out", str(out), *words]
    # threads of several processes would wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_stage_leaves_its_rows_on_the_disk_and_a_stage_that_fails_does_not_end_the_run(tmp_path):
    done = run(
        tmp_path, "--minutes", "3", "--stage", "trained", "--stage", "random", "--stage", "machine"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # nothing was trained before
    assert "no such folder" in json.loads((tmp_path / "trained.json").read_text())[0]["error"]
    rows = json.loads((tmp_path / "random.json").read_text())
    assert [row["way"] for row in rows[:2]] == ["one token a pass", "all digits, one level"]
    assert rows[0]["identical"] is None  # with nothing before it to compare with
    assert all(row["identical"] == 1 for row in rows[1:] if "identical" in row)
    assert json.loads((tmp_path / "machine.json").read_text())[0]["product_tflop_per_s"] > 0
    assert "all digits, two levels" in done.stdout  # the table at the end


def test_without_a_gpu_it_says_what_it_would_have_measured_and_without_time_nothing_begins(
    tmp_path,
):
    if not torch.cuda.is_available():
        done = subprocess.run(
            [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "rehearse with --small" in done.stdout
        assert "trained: at most 90 s. Decoding as of a policy" in done.stdout
    done = run(tmp_path, "--minutes", "0.1")
    assert done.returncode == 0
    assert "machine: no time left" in done.stdout
    assert not list(tmp_path.glob("*.json"))
