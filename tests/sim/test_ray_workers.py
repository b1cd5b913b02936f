"""A real Ray of two machines, both of them this one."""

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from worlds import load_absent, load_broken, load_walk, make_line

from vla0 import InputError
from vla0.sim.evaluate import EvalConfig, evaluate
from vla0.sim.ray_workers import RayWorkerPool
from vla0.sim.results import read_episodes

ray = pytest.importorskip("ray", reason="Ray is an extra: make install")


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster as Machines

    # for Ray's workers, which load `worlds`
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1})
    machines.add_node(num_cpus=1)
    machines.wait_for_nodes()
    yield machines.address
    machines.shutdown()
    del os.environ["PYTHONPATH"]


def run(tmp_path, address, load=load_walk, tasks=("fine", "also", "third"), episodes=8):
    (tmp_path / "world").mkdir(exist_ok=True)
    config = EvalConfig(
        tasks=tasks, env=str(tmp_path / "world"), episodes=episodes, first_seed=0, ensemble="mean"
    )
    pool = partial(RayWorkerPool, address, load)
    return evaluate({"policy": load}, 4, config, tmp_path / "out", 2, make_line, pool=pool)


def key(line):
    return line["task"], line["seed"]


def test_machines_share_the_episodes_and_their_lines_come_together(tmp_path, address):
    lines = run(tmp_path, address)
    assert sorted(map(key, lines)) == sorted(
        (task, seed) for task in ("fine", "also", "third") for seed in range(8)
    )
    assert all(line["success"] and line["steps"] == 7 for line in lines)
    assert read_episodes(tmp_path / "out" / "episodes.jsonl") == lines
    for line in lines:
        video = tmp_path / "out" / line["video"]
        assert video.stat().st_size > 0
        assert video.with_suffix(".npz").exists()
    more = run(tmp_path, address, episodes=9)
    assert more[: len(lines)] == lines
    assert len(more) == 27


@pytest.mark.slow
def test_a_crash_of_a_simulator_is_an_error_line_and_a_new_attempt(tmp_path, address):
    lines = run(tmp_path, address, tasks=("dies",), episodes=3)
    assert sum(line["error"] is not None for line in lines) == 1
    assert sorted(key(line) for line in lines if line["error"] is None) == [
        ("dies", seed) for seed in range(3)
    ]


@pytest.mark.slow
def test_a_mistake_of_the_policy_rises(tmp_path, address):
    with pytest.raises(InputError, match="a broken one"):
        run(tmp_path, address, load_broken)


@pytest.mark.slow
def test_a_policy_that_is_not_on_each_machine_is_one_clear_message(tmp_path, address):
    with pytest.raises(InputError, match="checkpoint must be on each machine"):
        run(tmp_path, address, load_absent)


@pytest.mark.slow
def test_what_a_killed_member_was_doing_is_done_by_others(tmp_path, address, monkeypatch):
    killed = []

    def kill(line, record=RayWorkerPool._record):
        if not killed:
            found = subprocess.run(
                ["pgrep", "-f", "ray::RayWorker.run"], capture_output=True, text=True
            ).stdout.split()
            killed.extend(found[:1])
            for process in killed:
                os.kill(int(process), signal.SIGKILL)
        return record

    monkeypatch.setattr(
        RayWorkerPool,
        "_record",
        lambda self, record, own=RayWorkerPool._record: (kill(record), own(self, record)),
    )
    lines = run(tmp_path, address)
    assert killed
    assert sorted(map(key, lines)) == sorted(
        (task, seed) for task in ("fine", "also", "third") for seed in range(8)
    )


def test_a_cluster_that_is_not_there_is_one_clear_message(tmp_path):
    with pytest.raises(InputError, match="a Ray cluster"):
        run(tmp_path, "127.0.0.1:1")
