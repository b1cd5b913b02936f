"""The server with real connections: old clients, hostile ones, many at once."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from conftest import make_observation, make_spec, serving
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from vla0 import InputError, Observation
from vla0.cli.act import serve
from vla0.cli.screen import pairs_of
from vla0.policy import VLA0
from vla0.serve import msgpack_numpy as wire
from vla0.serve.batches import Batches, together, warm_up
from vla0.serve.client import NoAnswerError, RemotePolicy
from vla0.serve.listen import ServerLimits
from vla0.serve.messages import request
from vla0.serve.metrics import Metrics
from vla0.serve.msgpack_numpy import pack, unpack
from vla0.serve.server import Server
from vla0.serve.session import ClientSession

KEY = "a key that is long enough"


def message_of(observation: Observation, **more) -> bytes:
    pictures = {f"observation/{camera}": frame for camera, frame in observation.images.items()}
    return pack(
        {
            **pictures,
            "observation/state": observation.state,
            "prompt": observation.instruction,
            **more,
        }
    )


def test_a_remote_chunk_is_the_local_one(policy):
    with serving(policy) as (url, _):
        remote = RemotePolicy(url)
        for seed in range(3):
            expected = policy.predict_batch([make_observation(seed)])[0]
            np.testing.assert_array_equal(remote.predict(make_observation(seed)), expected)
            steps = list(remote.predict_stream(make_observation(seed)))
            np.testing.assert_array_equal(np.stack(steps), expected)
            begun = replace(make_observation(seed), action_prefix=expected[:1] + 0.1)
            np.testing.assert_array_equal(remote.predict(begun), policy.predict_batch([begun])[0])
        assert remote.metadata["chunk_size"] == 3
        assert remote.spec == policy.spec
        remote.close()


def test_an_abandoned_stream_spoils_no_later_answer(policy):
    with serving(policy) as (url, _):
        remote = RemotePolicy(url)
        next(iter(remote.predict_stream(make_observation(0))))
        for seed in (1, 2):
            np.testing.assert_array_equal(
                remote.predict(make_observation(seed)),
                policy.predict_batch([make_observation(seed)])[0],
            )
        remote.close()


def test_a_session_is_ensembled_by_itself(policy):
    """Two clients, turn by turn, each as if it were alone; a reset forgets."""

    def local(seeds):
        own = VLA0(policy.model, policy.processor, policy.spec).acting(1, "v1")
        return [own.act(make_observation(seed)) for seed in seeds]

    with serving(policy, ensemble="v1") as (url, _):
        one, two = RemotePolicy(url), RemotePolicy(url)
        found = [
            (one.predict(make_observation(seed)), two.predict(make_observation(seed + 10)))
            for seed in range(4)
        ]
        one.reset()
        again = [one.predict(make_observation(seed)) for seed in range(2)]
        for remote in (one, two):
            remote.close()
    for sent, expected in zip(
        found, zip(local(range(4)), local(range(10, 14)), strict=True), strict=True
    ):
        for action, alone in zip(sent, expected, strict=True):
            np.testing.assert_allclose(action, alone[None], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(again), local(range(2)), rtol=1e-6)


def asking(connection, seed: int, **more) -> np.ndarray:
    """The actions that answer an openpi client's message."""
    connection.send(message_of(make_observation(seed), **more))
    answer = connection.recv()
    assert isinstance(answer, bytes), answer
    return unpack(answer)["actions"]


def test_an_ensemble_needs_a_client_that_says_where_an_episode_begins(policy):
    """openpi's clients keep one connection for all episodes, and know no reset: averaged, one's
    chunks would go on in the next.
    """
    with serving(policy, ensemble="v1") as (url, _), connect(url) as own:
        own.recv()
        own.send(message_of(make_observation(0)))
        refusal = own.recv()
        assert isinstance(refusal, str)
        with pytest.raises(InputError, match="which says where an episode begins"):
            unpack(refusal)
        assert "'vla0/reset'" in refusal
        assert "without --ensemble" in refusal


def test_what_a_fresh_connection_gets_is_what_a_new_episode_gets(policy):
    with serving(policy, ensemble="v1") as (url, _):
        with connect(url) as own:
            own.recv()
            for step in range(5):
                asking(own, step, **{"vla0/reset": step == 0})
            again = asking(own, 7, **{"vla0/reset": True})
        with connect(url) as fresh:
            fresh.recv()
            np.testing.assert_array_equal(again, asking(fresh, 7, **{"vla0/reset": True}))


def test_after_a_long_pause_nothing_old_is_averaged(policy, caplog, monkeypatch):
    from vla0.serve import session

    caplog.set_level("INFO")
    with serving(policy, ensemble="v1") as (url, _), connect(url) as own:
        own.recv()
        asking(own, 0, **{"vla0/reset": True})
        averaged = asking(own, 7)
        monkeypatch.setattr(session, "PAUSE_S", 0.0)
        alone = asking(own, 7)
    assert not np.array_equal(averaged, alone)
    np.testing.assert_allclose(
        alone[0], policy.predict_batch([make_observation(7)])[0, 0], rtol=1e-6
    )
    assert "what was predicted before is forgotten" in caplog.text


def test_what_would_do_nothing_is_refused(policy):
    with pytest.raises(InputError, match="do nothing"):
        Server(policy, ensemble="v1", n_action_steps=3)
    with pytest.raises(InputError, match="cameras of"):
        Server(policy, keys={"top": "x"})
    with pytest.raises(InputError, match="--api-key-file"):
        asyncio.run(Server(policy).run("0.0.0.0", 0, asyncio.Event()))


@pytest.mark.parametrize(
    "message",
    [
        b"\xdd\x01\xe0\x00\x00" + b"\x90" * (30 << 20), b"\x91" * (2 << 20), b"\x81\xa1x" * (1 << 20),
        b"\xdc\xff\xff" + b"\xc0" * 65535, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff\xa1x",
        b"\x81\xa1x\xdc\xff\xff" + b"\xdc\xff\xff" * 60000,
    ],
    ids=["empty lists", "deep lists", "deep mappings", "many", "a length that lies", "another", "lists of lists"],
)  # fmt: skip
def test_a_message_that_would_hold_up_whoever_builds_it_is_refused_at_once(message):
    began = time.perf_counter()
    with pytest.raises(InputError):
        unpack(message)
    # it took 33 s; this is milliseconds, whatever else runs here
    assert time.perf_counter() - began < 3


WHATEVER = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=400)
    | st.binary(max_size=70_000),
    lambda own: st.lists(own, max_size=20) | st.dictionaries(st.text(max_size=3), own, max_size=20),
    max_leaves=40,
)


@given(WHATEVER)
def test_what_is_skipped_is_what_msgpack_writes(content):
    """The walk over a message ends where the message ends, whatever kinds of things are in it."""
    packed, place, left = msgpack.packb(content), 0, 1
    while left:
        entries, place = wire._skipped(packed, place)
        left += entries - 1
    assert place == len(packed)


def test_a_web_page_is_not_let_in_unless_it_is_asked_for(policy):
    """Any page that a browser on this machine shows could move the robot else: browsers say whose
    page asks.
    """
    with serving(policy) as (url, _):
        for origin in ("https://evil.example", "http://127.0.0.1:3000", "null"):
            with pytest.raises(InvalidStatus, match="403"):
                connect(url, origin=origin)
        connect(url).close()
    with serving(policy, origins=("https://lab.example",)) as (url, _):
        connect(url, origin="https://lab.example").close()
        with pytest.raises(InvalidStatus):
            connect(url, origin="https://lab.example.evil")


def test_only_who_knows_the_key_is_let_in(policy):
    with serving(policy, key=KEY) as (url, _):
        for wrong in (None, "another key, also long"):
            with pytest.raises(InputError, match="a key that"):
                RemotePolicy(url, wrong)
        with pytest.raises(urllib.error.HTTPError):
            fetch(url, "/metrics")
        assert fetch(url, "/healthz") == "OK\n"
        remote = RemotePolicy(url, KEY)
        remote.predict(make_observation(0))
        page = fetch(url, "/metrics", {"Authorization": f"Api-Key {KEY}"})
        assert "vla0_requests_total 1.0" in page
        assert "vla0_clients 1.0" in page
        remote.close()


def fetch(url, path, headers=None):
    asked = urllib.request.Request(url.replace("ws://", "http://") + path, headers=headers or {})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return answer.read().decode()


def test_bad_input_is_answered_and_hurts_nobody_else(policy):
    observation = make_observation(0)
    good = message_of(observation)
    wrong = {
        "camera 'wrist'": pack(
            {"observation/front": observation.images["front"], "prompt": "x", "state": np.zeros(2)}
        ),
        "an instruction": message_of(observation, prompt=3),
        "a state of 2 numbers": message_of(observation, **{"observation/state": np.zeros(5)}),
        "finite": message_of(observation, **{"observation/state": np.array([np.nan, 0])}),
        "state of numbers": message_of(observation, **{"observation/state": "here"}),
        "at most 4096 pixels": message_of(
            observation, **{"observation/front": np.zeros((5000, 4, 3), np.uint8)}
        ),
        "uint8": message_of(observation, **{"observation/front": np.zeros((9, 9, 3))}),
        "a picture": message_of(observation, **{"observation/front": np.zeros(3, np.uint8)}),
        "msgpack": good[:-5],
        "a mapping": msgpack.packb([1, 2]),
        "shape and bytes agree": good.replace(b"\x93\x30\x40\x03", b"\x93\x31\x40\x03", 1),
        "arrays of numbers": msgpack.packb(
            {"x": {b"__ndarray__": True, b"data": b"", b"dtype": "O", b"shape": (0,)}}
        ),
        "vla0/streem": message_of(observation, **{"vla0/streem": True}),
        "of its kind": message_of(observation, **{"vla0/number": "x"}),
    }
    with serving(policy) as (url, _):
        bystander = RemotePolicy(url)
        expected = bystander.predict(observation)
        for words, message in wrong.items():
            with connect(url, compression=None) as rude:
                rude.recv()
                rude.send(message)
                answer = rude.recv()
                assert isinstance(answer, str), words
                assert words in answer
                assert "Traceback" not in answer
                rude.send(good)
                np.testing.assert_array_equal(unpack(rude.recv())["actions"], expected)
        with connect(url, compression=None) as rude:
            rude.recv()
            rude.send("hello")
            assert "binary messages" in rude.recv()
        np.testing.assert_array_equal(bystander.predict(observation), expected)
        bystander.close()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"state": None, "relative_dims": (2,)},
        {"history": 2},
        {"depth": (("wrist", 0.1, 1.0),)},
    ],
)
def test_any_policy_can_be_warmed_up(policy, processor, changes):
    own = VLA0(policy.model, processor, replace(policy.spec, **changes))
    counts, whole = [], own.predict_batch
    own.predict_batch = lambda seen, *more: counts.append(len(seen)) or whole(seen, *more)
    warm_up(own, 3)
    assert counts == [1, 2, 3]


def test_one_wrong_observation_of_a_batch_is_answered_alone(policy):
    right, wrong = make_observation(0), make_observation(1)
    wrong = Observation(wrong.images, wrong.instruction, np.array([np.inf, 0.0]))
    found = together(policy, [right, wrong, right], None)
    assert isinstance(found[1], InputError)
    np.testing.assert_array_equal(found[0], policy.predict_batch([right])[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_too_large_too_many_and_too_fast_are_refused(policy):
    with serving(policy, limits=ServerLimits(message_bytes=30_000, clients=2, rate=3)) as (url, _):
        with connect(url, compression=None) as one:
            one.recv()
            one.send(
                message_of(
                    make_observation(0), **{"observation/front": np.zeros((200, 200, 3), np.uint8)}
                )
            )
            with pytest.raises(Exception, match=r"1009|too big"):
                one.recv()
        remotes = [RemotePolicy(url), RemotePolicy(url)]
        with pytest.raises(NoAnswerError, match="503"):
            RemotePolicy(url, patience_s=0.3)
        for _ in range(3):
            remotes[0].predict(make_observation(0))
        with pytest.raises(InputError, match="messages a second"):
            remotes[0].predict(make_observation(0))
        remotes[1].predict(make_observation(0))
        for remote in remotes:
            remote.close()


def test_a_late_answer_is_dropped(policy, monkeypatch):
    predict, wait = policy.predict_batch, threading.Event()

    class Slow(VLA0):
        def predict_batch(self, observations, num_steps=None):
            if observations[0].state[0] == 0.5:
                wait.wait(5)
            return predict(observations, num_steps)

    slow = Slow(policy.model, policy.processor, policy.spec)
    with serving(slow) as (url, _):
        remote = RemotePolicy(url)
        first = make_observation(0)
        with pytest.raises(NoAnswerError):
            remote.predict(
                Observation(first.images, first.instruction, np.array([0.5, 0.5])), timeout_s=0.2
            )
        wait.set()
        np.testing.assert_array_equal(
            remote.predict(make_observation(1)), predict([make_observation(1)])[0]
        )
        remote.close()


def test_a_lost_connection_is_made_again_within_the_deadline(policy):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(NoAnswerError, match="expected a server at"):
        RemotePolicy(f"ws://127.0.0.1:{port}", patience_s=0.3)
    with serving(policy) as (url, _):
        remote = RemotePolicy(url)
        expected = remote.predict(make_observation(0))
        remote.connection.socket.shutdown(socket.SHUT_RDWR)
        np.testing.assert_array_equal(remote.predict(make_observation(0), timeout_s=5), expected)
    started = time.monotonic()
    with pytest.raises(NoAnswerError):
        remote.predict(make_observation(0), timeout_s=0.5)
    assert time.monotonic() - started < 3


def test_a_clients_mapping_of_cameras_and_openpis_forms_are_understood(policy):
    observation = make_observation(0)
    front, wrist = observation.images["front"], observation.images["wrist"]
    for message in (
        {
            "images": {"front": front.transpose(2, 0, 1), "wrist": wrist},
            "state": observation.state,
            "prompt": "x",
        },
        {
            "observation/front": front,
            "observation/wrist_image": wrist,
            "observation/state": observation.state,
            "prompt": "x",
        },
        {
            "observation.images.front": front,
            "observation.images.wrist": wrist,
            "observation.state": observation.state,
            "task": "x",
        },
    ):
        found = request(unpack(pack(message)), policy.spec, {}, 4096).observation
        for camera, frame in observation.images.items():
            np.testing.assert_array_equal(found.images[camera], frame)
        np.testing.assert_array_equal(found.state, observation.state)
    mapped = {"cam_high": front, "wrist": wrist, "state": observation.state, "prompt": "x"}
    with pytest.raises(InputError, match="cam_high"):
        request(mapped, policy.spec, {}, 4096)
    found = request(mapped, policy.spec, {"front": "cam_high"}, 4096).observation
    np.testing.assert_array_equal(found.images["front"], front)


@given(
    st.dictionaries(
        st.text(max_size=8),
        st.one_of(
            st.integers(-(2**60), 2**60), st.floats(allow_nan=False), st.text(max_size=20), st.booleans(),
            arrays.arrays(st.sampled_from([np.uint8, np.float32, np.int64, bool]), arrays.array_shapes(max_dims=4, max_side=4)),
        ),
    )
)  # fmt: skip
def test_unpack_inverts_pack(content):
    found = unpack(pack(content))
    assert found.keys() == content.keys()
    for key, value in content.items():
        if isinstance(value, np.ndarray):
            assert found[key].dtype == value.dtype
            np.testing.assert_array_equal(found[key], value)
        else:
            assert found[key] == value


@given(st.binary(max_size=200))
def test_any_bytes_are_a_mapping_or_an_input_error(message):
    with suppress(InputError):
        assert isinstance(unpack(message), dict)


@given(st.data())
def test_a_mutated_message_is_understood_or_refused_in_words(data):
    good = bytearray(message_of(make_observation(0)))
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(
            st.one_of(st.integers(0, 120), st.integers(len(good) - 160, len(good) - 1))
        )
        good[where] = data.draw(st.integers(0, 255))
    with suppress(InputError):
        request(unpack(bytes(good)), make_spec(), {}, 4096)


def test_the_command_serves_and_ends_what_was_begun(policy, tmp_path):
    policy.save_pretrained(tmp_path / "checkpoint")
    command = [
        sys.executable,
        "-m",
        "vla0",
        "serve",
        "--checkpoint",
        str(tmp_path / "checkpoint"),
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        assert "3 steps of 3 numbers at 20 Hz" in lines[0]
        remote = RemotePolicy(lines[1].strip())
        expected = policy.predict_batch([make_observation(0)])[0]
        np.testing.assert_array_equal(remote.predict(make_observation(0), timeout_s=10), expected)
        asked = message_of(make_observation(1))
        remote.connection.send(asked)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        answer = unpack(remote.connection.recv(timeout=10))
        np.testing.assert_array_equal(
            answer["actions"], policy.predict_batch([make_observation(1)])[0]
        )
        assert process.wait(15) == 0
    finally:
        process.kill()


def test_a_certificate_is_shown_and_checked(policy, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    cert, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = (
        f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext "
        f"subjectAltName=IP:127.0.0.1 -keyout {private} -out {cert}"
    )
    subprocess.run(["openssl", *words.split()], check=True, capture_output=True)
    policy.save_pretrained(tmp_path / "checkpoint")
    command = [
        sys.executable,
        "-m",
        "vla0",
        "serve",
        "--checkpoint",
        str(tmp_path / "checkpoint"),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, "--tls-cert", str(cert), "--tls-key", str(private)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.stdout.readline()
        url = process.stdout.readline().strip()
        assert url.startswith("wss://")
        with pytest.raises(InputError, match="certificate"):
            RemotePolicy(url)
        remote = RemotePolicy(url, certificate=cert)
        expected = policy.predict_batch([make_observation(0)])[0]
        np.testing.assert_array_equal(remote.predict(make_observation(0), timeout_s=10), expected)
        remote.close()
    finally:
        process.kill()


def test_what_cannot_be_served_is_refused_before_it_is(policy, tmp_path):
    policy.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "short").write_text("1234")
    taken = socket.create_server(("127.0.0.1", 0))
    for settings, message in (
        ({"host": "0.0.0.0"}, "--api-key-file"),
        ({"api_key_file": tmp_path / "none"}, "holds the key"),
        ({"api_key_file": tmp_path / "short"}, "16 ASCII"),
        ({"key": ["front"]}, "CAMERA=NAME"),
        ({"ensemble": "v3"}, "an ensemble"),
        ({"tls_cert": tmp_path / "none"}, "certificate"),
        ({"port": taken.getsockname()[1]}, "to listen on"),
    ):
        with pytest.raises(InputError, match=message):
            serve(str(tmp_path / "checkpoint"), **settings)
    taken.close()
    (tmp_path / "bare").mkdir()
    policy.spec.save(tmp_path / "bare")  # no weights: these are refused before any are loaded
    for settings, message in (
        ({"key": ["side=x"]}, "name those of the checkpoint"),
        ({"host": "0.0.0.0", "protocol": "vla-eval"}, "vla-eval's protocol knows no key"),
        ({"host": "0.0.0.0", "protocol": "lerobot"}, "tunnel"),
        ({"embodiment": "nobody", "base_url": "http://127.0.0.1:9"}, "an embodiment"),
    ):
        with pytest.raises(InputError, match=message):
            serve(str(tmp_path / "bare"), **settings)


def test_the_client_needs_no_torch(tmp_path):
    """In an environment that has numpy, msgpack and websockets alone."""
    (tmp_path / "site").mkdir()
    import websockets

    for package in (np, msgpack, websockets):
        folder = Path(package.__file__).parent
        for found in [
            folder,
            *folder.parent.glob(f"{folder.name}.libs"),
            *folder.parent.glob(f"{folder.name}-*.dist-info"),
        ]:
            (tmp_path / "site" / found.name).symlink_to(found)
    (tmp_path / "site" / "vla0").symlink_to(Path(__file__).parents[2] / "src" / "vla0")
    code = (
        "import vla0.serve.client, vla0.core.rollout, sys; print(sorted(m for m in "
        "sys.modules if m in ('torch', 'PIL', 'transformers')))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


OPENPI = """
import json, sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
policy = WebsocketClientPolicy(host="127.0.0.1", port=int(sys.argv[1]), api_key=sys.argv[2])
rng = np.random.default_rng(0)
frames = {f"observation/{c}": rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for c in ("front", "wrist")}
answer = policy.infer({**frames, "observation/state": rng.random(2), "prompt": "open the drawer"})
try:
    policy.infer({"prompt": "nothing to see"})
except RuntimeError as error:
    refused = str(error)
print(json.dumps([answer["actions"].tolist(), sorted(answer), policy.get_server_metadata()["chunk_size"], refused]))
"""


@pytest.mark.slow
def test_openpis_own_client_is_served_unchanged(policy, tmp_path):
    """Real openpi-client, which pins numpy < 2, in an environment of its own."""
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(tmp_path / "env")], capture_output=True
    )
    python = str(tmp_path / "env" / "bin" / "python")
    packages = ["openpi-client", "typing_extensions"]
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    if made.returncode or done.returncode:
        pytest.skip(f"openpi-client cannot be installed here: {done.stderr[-300:]}")
    with serving(policy, key=KEY) as (url, _):
        found = subprocess.run(
            [python, "-c", OPENPI, url.rpartition(":")[2], KEY],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert found.returncode == 0, found.stderr
    actions, names, chunk_size, refused = json.loads(found.stdout)
    rng = np.random.default_rng(0)
    images = {
        camera: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for camera in ("front", "wrist")
    }
    expected = policy.predict_batch([Observation(images, "open the drawer", rng.random(2))])[0]
    np.testing.assert_allclose(actions, expected, rtol=1e-6)
    assert (chunk_size, names) == (3, ["actions", "server_timing"])
    assert "camera 'front'" in refused


def test_the_example_of_an_own_robot_runs_against_a_server(policy):
    with serving(policy) as (url, _):
        command = [
            sys.executable,
            str(Path(__file__).parents[2] / "examples" / "my_robot.py"),
            "--policy-url",
            url,
        ]
        for live in ([], ["--live"]):
            done = subprocess.run(
                [*command, "--seconds", "2", *live], capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
            kind, sent = done.stdout.split(" commands")[0].rpartition(":")[::2]
            assert kind.endswith("live" if live else "dry run")
            assert int(sent) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "http://127.0.0.1:1"}, "ws://host:port"),
        ({"url": "127.0.0.1:1"}, "ws://host:port"),
        ({"url": "ws://127.0.0.1:1", "key": "a secret key\n"}, "a key of one line"),
        ({"url": "ws://127.0.0.1:1", "timeout_s": 0.0}, "timeout_s > 0"),
    ],
)
def test_a_client_that_is_told_nonsense_says_so_at_once_and_keeps_its_key_to_itself(
    settings, message
):
    with pytest.raises(InputError, match=message) as error:
        RemotePolicy(**settings)
    assert "a secret key" not in str(error.value)


def test_a_client_takes_observations_alone(policy):
    with serving(policy) as (url, _):
        remote = RemotePolicy(url)
        with pytest.raises(InputError, match="an Observation"):
            remote.predict({"observation/front": np.zeros((4, 4, 3), np.uint8)})
        remote.close()


@pytest.mark.parametrize(
    "words", [["front"], ["front="], ["front=a", "front=b"], ["front=a", "wrist=a"]]
)
def test_cameras_are_renamed_one_to_one(words):
    with pytest.raises(InputError, match="--key CAMERA=NAME, each once"):
        pairs_of("--key", words)
    assert pairs_of("--key", ["front=a", "wrist=b"]) == {"front": "a", "wrist": "b"}


def test_a_client_says_itself_what_the_server_will_not_take(policy):
    with serving(policy, limits=ServerLimits(message_bytes=20_000)) as (url, _):
        remote = RemotePolicy(url)
        assert remote.predict(make_observation(0)).shape == (3, 3)
        seen = make_observation(0)
        with pytest.raises(InputError, match="give 'wrist', in the checkpoint's own names"):
            remote.predict(
                replace(seen, images={"front": seen.images["front"], "hand": seen.images["wrist"]})
            )
        large = {camera: np.zeros((200, 200, 3), np.uint8) for camera in seen.images}
        with pytest.raises(InputError, match="send smaller pictures"):
            remote.predict(replace(seen, images=large))
        assert remote.predict(seen).shape == (3, 3)
        remote.close()


def test_what_a_thread_has_seen_already_gives_the_same_chunk(policy):
    seen = [make_observation(seed) for seed in range(3)]
    np.testing.assert_array_equal(
        policy.predict_batch(seen), policy.predict_batch([policy.see(own) for own in seen])
    )


def test_a_message_may_be_a_full_hd_picture_of_each_camera_unless_said_otherwise(policy):
    assert (
        2 * 1920 * 1080 * 3
        < ServerLimits().of(policy.spec).message_bytes
        < 2 * 1920 * 1080 * 3 + 2**21
    )
    assert ServerLimits(message_bytes=7).of(policy.spec).message_bytes == 7
    with pytest.raises(InputError, match="limits of one at least"):
        ServerLimits(message_bytes=0)


def busy(*used: float) -> tuple[Batches, list[ClientSession]]:
    """Batches, and sessions for which the model worked so many seconds just now."""
    batches, now = Batches(None, None, 64, Metrics()), time.monotonic()
    batches.sessions = [
        ClientSession(
            ensemble=None, n_action_steps=1, fps=20.0, heard_at=now, used=own, used_at=now
        )
        for own in used
    ]
    return batches, batches.sessions


def test_who_takes_more_of_the_server_than_others_waits_and_who_takes_as_much_does_not():
    batches, (heavy, *others) = busy(0.5, *[0.02] * 20)
    batches.charge(heavy, 0.05)
    batches.charge(others[0], 0.05)
    assert 0.3 < heavy.free_at - time.monotonic() < 0.46
    assert others[0].free_at <= time.monotonic()
    batches, alike = busy(*[0.3] * 4)
    for own in alike:
        batches.charge(own, 0.05)
    batches, (alone,) = busy(5.0)
    batches.charge(alone, 1.0)
    assert all(own.free_at <= time.monotonic() for own in (*alike, alone))


def test_large_messages_make_their_sender_wait_where_others_ask_and_nowhere_else(policy):
    large = {camera: np.zeros((1400, 1400, 3), np.uint8) for camera in make_observation(0).images}
    with serving(policy) as (url, server):
        robot, other = RemotePolicy(url), RemotePolicy(url)
        (own, _) = server.batches.sessions
        for _ in range(3):
            robot.predict(replace(make_observation(0), images=large))
        assert own.free_at == 0.0
        other.predict(make_observation(1))
        asked = time.monotonic()
        robot.predict(replace(make_observation(0), images=large))
        assert own.free_at > asked + 11.7e6 / ServerLimits().bytes_s
        robot.close()
        other.close()


def test_who_sends_megabytes_in_vain_is_not_heard_for_a_while_and_does_not_keep_the_server_from_ending(
    policy,
):
    with serving(policy) as (url, server), connect(url, compression=None, max_size=None) as rude:
        rude.recv()
        rude.send(b"\x81\xa1x\xc6" + (8 << 20).to_bytes(4, "big") + bytes(8 << 20))
        assert "camera 'front'" in rude.recv(timeout=10)
        time.sleep(0.1)
        (session,) = server.batches.sessions
        assert 5 < session.free_at - time.monotonic() < 9
        good = RemotePolicy(url)
        assert good.predict(make_observation(0)).shape == (3, 3)
        good.close()
        rude.send(pack({}))
        began = time.monotonic()
    assert time.monotonic() - began < 8  # not the pause of who is still there


def test_who_comes_again_and_again_waits_at_the_door(policy):
    with serving(policy, limits=ServerLimits(clients=4)) as (url, _):
        began = time.monotonic()
        for _ in range(14):
            RemotePolicy(url).close()
        assert time.monotonic() - began > 10 * 0.05 - 0.05


def test_a_client_hears_why_where_megabytes_are_too_many(policy):
    """They are not read to their end."""
    large = {camera: np.zeros((4000, 4000, 3), np.uint8) for camera in policy.spec.cameras}
    with serving(policy) as (url, _):
        remote = RemotePolicy(url)
        with pytest.raises(InputError, match="send smaller pictures"):
            remote.predict(replace(make_observation(0), images=large), timeout_s=20.0)
        assert remote.predict(make_observation(0)).shape == (3, 3)
        remote.close()
