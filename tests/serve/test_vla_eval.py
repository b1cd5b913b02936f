"""The policy as a model server of vla-eval: its own orchestrator, its own client, no Docker."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import anyio
import msgpack
import numpy as np
import pytest
import yaml
from conftest import TASKS, make_observation, make_spec, serving
from PIL import Image

from vla0 import VLA0, InputError
from vla0.checkpoint.tiny import tiny_model, tiny_processor
from vla0.core.rollout import ChunkPolicy

pytest.importorskip("vla_eval", reason="vla-eval is not installed")

from vla_eval.connection import Connection
from vla_eval.protocol.messages import Message, MessageType, pack_message, unpack_message
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from vla0.serve.listen import ServerLimits, served
from vla0.serve.vla_eval import VlaEvalServer


def sent(observation, names):
    images = {names.get(camera, camera): frame for camera, frame in observation.images.items()}
    return {
        "images": images,
        "task_description": observation.instruction,
        "states": observation.state,
    }


@pytest.mark.parametrize(
    ("n_action_steps", "ensemble"), [(1, "v1"), (2, "mean"), (3, "none"), (1, "none")]
)
def test_a_harness_is_given_what_vla0s_own_evaluation_executes(policy, n_action_steps, ensemble):
    """Two episodes at once of each of two clients, by vla-eval's own; nobody meets another's
    chunks.
    """
    names, expected = {"front": "agentview"}, {}
    for start in (0, 20, 50, 70):
        alone = ChunkPolicy(lambda o: policy.predict_batch([o])[0], 3, n_action_steps, ensemble)
        expected[start] = [alone.act(make_observation(start + step)) for step in range(6)]

    async def episodes(url, client):
        async with Connection(url) as connection:
            assert connection.server_info["observation_params"]["send_wrist_image"]
            for start in (client, client + 20):
                await connection.start_episode({"task": {"name": "any"}})
                for step, action in enumerate(expected[start]):
                    answer = await connection.act(sent(make_observation(start + step), names))
                    np.testing.assert_allclose(answer["actions"], action, atol=1e-5)
                await connection.end_episode({})

    async def together(url):
        async with anyio.create_task_group() as group:
            group.start_soon(episodes, url, 0)
            group.start_soon(episodes, url, 50)

    with serving(
        policy, VlaEvalServer, keys=names, n_action_steps=n_action_steps, ensemble=ensemble
    ) as (url, _):
        anyio.run(together, url)


def asked(connection, kind, payload, seq=1):
    """What a server says to a message; an error as its text."""
    connection.send(
        payload if isinstance(payload, bytes | str) else pack_message(Message(kind, payload, seq))
    )
    found = unpack_message(connection.recv(timeout=20))
    return found.payload["error"] if found.type is MessageType.ERROR else found


SEEN = sent(make_observation(0), {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {}}, "camera 'front'"),
        ({"images": [1]}, "images, a mapping"),
        ({"task_description": None}, "an instruction"),
        ({"states": None}, "a state"),
        ({"states": np.full(2, np.nan)}, "a finite state"),
        ({"images": {**SEEN["images"], "front": {"__image__": True, "format": "png", "data": b"none"}}}, "a PNG or JPEG"),
        ({"images": {**SEEN["images"], "front": {"__image__": True, "format": "raw", "data": b"1", "dtype": "|u1", "shape": [9, 9, 3]}}}, "shape and bytes agree"),
        ({"images": {**SEEN["images"], "front": {"__ndarray__": True, "data": b"12345678", "dtype": "|O", "shape": [1]}}}, "arrays of numbers"),
    ],
)  # fmt: skip
def test_what_a_benchmark_lacks_is_said_in_words_and_to_it_alone(policy, changes, message):
    expected = policy.predict_batch([make_observation(0)])[0][0]
    with serving(policy, VlaEvalServer) as (url, _), connect(url) as broken, connect(url) as good:
        for connection in (broken, good):
            connection.send(pack_message(Message(MessageType.EPISODE_START, {}, 0)))
        assert message in asked(broken, MessageType.OBSERVATION, {**SEEN, **changes})
        for connection in (good, broken):
            np.testing.assert_allclose(
                asked(connection, MessageType.OBSERVATION, SEEN).payload["actions"],
                expected,
                atol=1e-5,
            )


def test_an_observation_belongs_to_an_episode(policy):
    with serving(policy, VlaEvalServer) as (url, _), connect(url) as connection:
        assert "send episode_start first" in asked(connection, MessageType.OBSERVATION, SEEN)


def bomb(side: int) -> bytes:
    """A PNG of few bytes and many pixels."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


def test_a_message_of_vla_evals_cannot_swell_nor_hold_up_others(policy):
    """Its own server takes any size, and builds whatever a message says."""
    picture = {"__image__": True, "format": "png", "data": bomb(3000)}
    with (
        serving(policy, VlaEvalServer, limits=ServerLimits(message_bytes=4 * 2**20)) as (url, _),
        connect(url) as connection,
    ):
        assert "at most 4194304 bytes" in asked(
            connection, MessageType.OBSERVATION, {"images": {"front": picture}}
        )
        small = {"__image__": True, "format": "png", "data": bomb(1000)}
        assert "bytes" in asked(
            connection, MessageType.OBSERVATION, {"images": {str(n): small for n in range(100)}}
        )
        nested = msgpack.packb({"type": "hello", "payload": [[[]] * 50_000] * 20, "seq": 1})
        began = time.monotonic()
        assert "entries" in asked(connection, None, nested)
        assert time.monotonic() - began < 3  # building it would be many seconds
        assert asked(connection, MessageType.HELLO, {}).payload["protocol_version"] == 1


def test_a_web_page_can_neither_ask_nor_change_the_server_of_a_harness(policy):
    """vla-eval's own server answers any page, and takes settings from a GET."""
    with serving(policy, VlaEvalServer) as (url, _):
        with pytest.raises(InvalidStatus, match="403"):
            connect(url, origin="http://evil.example")
        with connect(f"{url}/config?max_batch_size=0") as connection:  # a name like any other
            assert asked(connection, MessageType.HELLO, {}).type is MessageType.HELLO
        port = url.rpartition(":")[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
            assert answer.status == 200


def test_a_harness_is_refused_what_cannot_be(policy):
    with pytest.raises(InputError, match="no key"):
        served(VlaEvalServer(policy), "0.0.0.0", 0)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InputError, match="choose another --port"),
    ):
        served(VlaEvalServer(policy), "127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="name those of the checkpoint"):
        VlaEvalServer(policy, {"side": "x"})
    with pytest.raises(InputError, match="do nothing"):
        VlaEvalServer(policy, n_action_steps=3, ensemble="v1")


def test_vla_evals_own_client_runs_against_the_command(tmp_path):
    """Meta-World, one short episode: the real orchestrator, the real simulator, a checkpoint of
    random weights.
    """
    processor = tiny_processor(["Write integers.", *TASKS])
    small = {
        "width": 48,
        "layers": 1,
        "heads": 3,
        "vision_width": 32,
        "vision_layers": 1,
        "vision_heads": 2,
    }
    spec = make_spec(
        low=(-1.0,) * 4,
        high=(1.0,) * 4,
        cameras=("front",),
        state=None,
        bins=10,
        system="Write integers.",
    )
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
    # as in a shell's `&`
    ignoring = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); from vla0.cli "
        "import main; main()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", ignoring, *words], stdout=subprocess.PIPE, text=True
    )
    try:
        address = next(line for line in server.stdout if "ws://" in line).strip()
        params = {"tasks": ["drawer-close-v3"], "max_steps": 12}
        benchmark = {
            "benchmark": "vla_eval_worlds:MetaWorldBenchmark",
            "mode": "sync",
            "episodes_per_task": 1,
            "params": params,
        }
        config = {
            "server": {"url": address, "timeout": 30},
            "output_dir": str(tmp_path / "out"),
            "benchmarks": [benchmark],
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
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
        assert (task["task"], episode["steps"], episode["metrics"]) == (
            "drawer-close-v3",
            12,
            {"success": False},
        )
        assert "failure_reason" not in episode, episode
    finally:
        server.send_signal(signal.SIGINT)
        ended = server.wait(20)
    assert ended == 0
