"""The policy as a model server of vla-eval: its own orchestrator, its own client, no Docker."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import numpy as np
import pytest
import yaml
from conftest import TASKS, make_observation, make_spec

from vla0 import VLA0, InputError
from vla0.rollout import ChunkPolicy
from vla0.tiny import tiny_model, tiny_processor

pytest.importorskip("vla_eval", reason="vla-eval is not installed")

from vla_eval.model_servers.predict import PredictModelServer

from vla0.serve.harness import HarnessServer, serve_harness


class Context:
    def __init__(self, name):
        self.session_id = name


def sent(observation, names):
    images = {names.get(camera, camera): frame for camera, frame in observation.images.items()}
    return {"images": images, "task_description": observation.instruction, "states": observation.state}


@pytest.mark.parametrize(("replan", "ensemble"), [(1, "v1"), (2, "mean"), (3, "none"), (1, "none")])
def test_a_harness_is_given_what_vla0s_own_evaluation_executes(policy, replan, ensemble):
    """Two episodes of one policy at once, neither meeting the other's chunks."""
    names = {"front": "agentview"}
    server = HarnessServer(policy, names, replan, ensemble)
    alone = {name: ChunkPolicy(lambda o: policy.predict_batch([o])[0], 3, replan, ensemble) for name in "ab"}
    for step in range(0, 6, replan):
        seen = {"a": make_observation(step), "b": make_observation(step + 50)}
        found = server.predict_batch([sent(o, names) for o in seen.values()], [Context(name) for name in seen])
        for name, answer in zip(seen, found, strict=True):
            expected = [alone[name].act(seen[name]) for _ in range(replan)]
            np.testing.assert_allclose(answer["actions"], expected, atol=1e-6)


def test_one_clients_fault_is_its_own(policy, monkeypatch):
    """Whoever is decoded with it gets what he would have got alone."""
    server = HarnessServer(policy)
    broken, good, poor = (sent(make_observation(seed), {}) for seed in range(3))
    broken["states"], poor["images"] = np.full(2, np.nan), {}
    found = server.predict_batch([broken, good, poor], [Context(name) for name in "abc"])
    expected = policy.predict_batch([make_observation(1)])[0, :1]
    np.testing.assert_allclose(found[1]["actions"], expected, atol=1e-6)

    async def answered(self, obs, ctx):
        return found[obs]

    monkeypatch.setattr(PredictModelServer, "_dispatch_batched", answered)
    assert anyio.run(server._dispatch_batched, 1, None) is found[1]
    for place, message in ((0, "a finite state"), (2, "camera 'front'")):
        with pytest.raises(InputError, match=message):
            anyio.run(server._dispatch_batched, place, None)


def test_what_a_benchmark_lacks_is_said_in_words(policy):
    server = HarnessServer(policy)
    whole = sent(make_observation(0), {})
    for changes, message in (
        ({"images": {}}, "camera 'front'"),
        ({"task_description": None}, "a sentence"),
        ({"states": None}, "a state"),
    ):
        with pytest.raises(InputError, match=message):
            server.predict_batch([{**whole, **changes}], [Context("a")])
    assert server.get_observation_params()["send_wrist_image"]
    with pytest.raises(InputError, match="no key"):
        serve_harness(server, "0.0.0.0", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="choose another --port"):
        serve_harness(server, "127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="name those of the checkpoint"):
        HarnessServer(policy, {"side": "x"})
    with pytest.raises(InputError, match="do nothing"):
        HarnessServer(policy, replan=3, ensemble="v1")


def test_vla_evals_own_client_runs_against_the_command(tmp_path):
    """Meta-World, one short episode: the real orchestrator, the real simulator, a checkpoint of random weights."""
    processor = tiny_processor(["Write integers.", *TASKS])
    small = {"width": 48, "layers": 1, "heads": 3, "vision_width": 32, "vision_layers": 1, "vision_heads": 2}
    spec = make_spec(low=(-1.0,) * 4, high=(1.0,) * 4, cameras=("front",), state=None, bins=10, system="Write integers.")
    VLA0(tiny_model(processor, **small), processor, spec).save_pretrained(tmp_path / "checkpoint")
    words = [
        "serve",
        "--checkpoint",
        str(tmp_path / "checkpoint"),
        "--protocol",
        "vla-eval",
        "--ensemble",
        "v1",
        "--key",
        "front=view",
        "--port",
        "0",
    ]
    ignoring = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); from vla0.cli import main; main()"  # as in a shell's `&`
    server = subprocess.Popen([sys.executable, "-c", ignoring, *words], stdout=subprocess.PIPE, text=True)
    try:
        address = next(line for line in server.stdout if "ws://" in line).strip()
        params = {"tasks": ["drawer-close-v3"], "max_steps": 12}
        benchmark = {"benchmark": "harness_worlds:MetaWorldBenchmark", "mode": "sync", "episodes_per_task": 1, "params": params}
        config = {"server": {"url": address, "timeout": 30}, "output_dir": str(tmp_path / "out"), "benchmarks": [benchmark]}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        command = [
            sys.executable,
            "-c",
            "from vla_eval.cli.main import main; main()",
            "run",
            "--config",
            str(tmp_path / "config.yaml"),
            "--no-docker",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / "out").rglob("*aggregate.json")
        (task,) = json.loads(file.read_text())["tasks"]
        (episode,) = task["episodes"]
        assert (task["task"], episode["steps"], episode["metrics"]) == ("drawer-close-v3", 12, {"success": False})
        assert "failure_reason" not in episode, episode
    finally:
        server.send_signal(signal.SIGINT)
        ended = server.wait(20)
    assert ended == 0
