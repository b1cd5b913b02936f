"""Mutated messages over all three protocols, and an honest client beside who must get what he
always got.
"""

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from conftest import make_observation

from soak import Bar, Until
from soak.mutants import message, pickled
from soak.servers import served
from vla0.serve.client import RemotePolicy
from vla0.serve.msgpack_numpy import pack

ROUND = 25  # messages of each thrower between two looks at the honest client
THROWERS = 32  # whoever is refused is not heard for a while
GOOD = 6  # after so many a thrower says something right: who never does is shown out
# that a server may grow by after its first rounds, whose sizes of batches and pictures are new
MORE_MIB = 96
ANSWER_S = 60.0


class Broken(Exception):  # noqa: N818
    """A law that does not hold."""


def small(seed: int) -> dict[str, Any]:
    """An observation of few bytes, so that most mutations are of what says something."""
    seen, rng = make_observation(seed), np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (6, 7, 3), dtype=np.uint8) for camera in seen.images}
    return {"images": images, "prompt": seen.instruction, "state": seen.state}


class OpenPi:
    """msgpack over a websocket: for each message one answer, be it that it is refused."""

    words = ("--protocol", "openpi", "--rate", "100000")

    def __init__(self, address: str, rng: np.random.Generator):
        self.url, self.rng, self.connection, self.count = f"ws://{address}", rng, None, 0
        seen = small(0)
        whole = seen | {
            "vla0/number": 1,
            "vla0/reset": False,
            "vla0/stream": False,
            "vla0/action_prefix": np.zeros((1, 3)),
        }
        self.contents = [msgpack.unpackb(pack(own), strict_map_key=False) for own in (seen, whole)]

    def ask(self) -> Any:
        """What an honest client hears."""
        remote = RemotePolicy(self.url, timeout_s=ANSWER_S)
        try:
            return remote.predict(make_observation(1)).tolist()
        finally:
            remote.close()

    def throw(self) -> bool:
        """One message; whether it was taken."""
        self.count += 1
        if self.count % GOOD == 0:
            self.thrown(msgpack.packb(self.contents[-1]))
        return self.thrown(message(self.contents[self.rng.integers(len(self.contents))], self.rng))

    def thrown(self, data: bytes) -> bool:
        from websockets.exceptions import ConnectionClosed
        from websockets.sync.client import connect

        if self.connection is None:
            self.connection = connect(
                self.url, compression=None, max_size=None, open_timeout=ANSWER_S, close_timeout=5
            )
            self.greeted()
        try:
            self.begin()
            self.connection.send(data)
            return self.heard()
        except ConnectionClosed as closed:  # too many in a row
            self.connection = None
            if closed.rcvd is None or closed.rcvd.code not in (1008, 1009):
                raise Broken(f"{data[:300]!r} ended the connection with {closed}") from None
            return False
        except TimeoutError:
            raise Broken(f"no answer in {ANSWER_S:g} s to {data[:300]!r}") from None

    def greeted(self) -> None:
        self.connection.recv(timeout=ANSWER_S)

    def begin(self) -> None:
        """What goes before each message."""

    def heard(self) -> bool:
        while True:
            answer = self.connection.recv(timeout=ANSWER_S)
            if isinstance(answer, str):
                return False
            content = msgpack.unpackb(answer, strict_map_key=False)
            if "actions" in content:
                found = content["actions"]
                actions = np.frombuffer(found[b"data"], found[b"dtype"])
                if not np.isfinite(actions).all() or np.abs(actions).max() > 2:
                    raise Broken(f"the answer {actions}")
                return True


class VlaEval(OpenPi):
    """vla-eval's messages; those that say nothing back are followed by one that does."""

    words = ("--protocol", "vla-eval", "--ensemble", "v1")

    def __init__(self, address: str, rng: np.random.Generator):
        super().__init__(address, rng)
        seen = small(0)
        payload = {
            "images": seen["images"],
            "task_description": seen["prompt"],
            "states": seen["state"],
        }
        said = [
            ("hello", {"harness_version": "0"}),
            ("episode_start", {"task": {"name": "a"}}),
            ("episode_end", {}),
        ]
        said += [("observation", payload)] * 5
        self.contents = [msgpack.unpackb(self.packed(kind, own)) for kind, own in said]

    def packed(self, kind: str, payload: dict[str, Any], seq: int = 1) -> bytes:
        from vla_eval.protocol.messages import Message, MessageType, pack_message

        return pack_message(Message(MessageType(kind), payload, seq))

    def ask(self) -> Any:
        from vla_eval.protocol.messages import unpack_message
        from websockets.sync.client import connect

        seen = make_observation(1)
        payload = {
            "images": dict(seen.images),
            "task_description": seen.instruction,
            "states": seen.state,
        }
        with connect(
            self.url, compression=None, max_size=None, open_timeout=ANSWER_S
        ) as connection:
            for data in (self.packed("episode_start", {}), self.packed("observation", payload)):
                connection.send(data)
            return unpack_message(connection.recv(timeout=ANSWER_S)).payload["actions"].tolist()

    def greeted(self) -> None:
        """Here the client says the first word."""

    def begin(self) -> None:
        self.connection.send(self.packed("episode_start", {}))

    def heard(self) -> bool:
        """An answer to the last message, if one comes, and then that to a word that is always
        answered.
        """
        self.connection.send(self.packed("hello", {}, 987654))
        taken = False
        while True:
            content = msgpack.unpackb(self.connection.recv(timeout=ANSWER_S), strict_map_key=False)
            if content["type"] == "hello" and content["seq"] == 987654:
                return taken
            taken |= content["type"] == "action"


class LeRobot:
    """Pickles over gRPC."""

    words = ("--protocol", "lerobot")

    def __init__(self, address: str, rng: np.random.Generator):
        import grpc
        from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
        from lerobot.transport import services_pb2, services_pb2_grpc

        self.rng, self.messages, self.grpc = rng, services_pb2, grpc
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(address, options=options)
        self.stub = services_pb2_grpc.AsyncInferenceStub(self.channel)
        features = {"observation.state": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]}}
        self.setup = pickle.dumps(RemotePolicyConfig("vla0", "x", features, 3, "cpu"))
        self.step = 0

        def seen(observation) -> bytes:
            self.step += 1
            raw = {**observation["images"], "a": 0.5, "b": 0.25, "task": observation["prompt"]}
            return pickle.dumps(
                TimedObservation(1.0, self.step, raw, True), protocol=int(rng.choice([2, 4, 5]))
            )

        self.seen = seen
        self._sends(self.setup)

    def _sends(self, data: bytes) -> None:
        self.stub.SendPolicyInstructions(self.messages.PolicySetup(data=data), timeout=ANSWER_S)

    def _sees(self, data: bytes) -> None:
        parts = [self.messages.Observation(transfer_state=3, data=data)]
        self.stub.SendObservations(iter(parts), timeout=ANSWER_S)

    def _actions(self) -> list[Any]:
        data = self.stub.GetActions(self.messages.Empty(), timeout=ANSWER_S).data
        return pickle.loads(data) if data else []

    def ask(self) -> Any:
        seen = make_observation(1)
        self._sends(self.setup)
        self._sees(self.seen({"images": seen.images, "prompt": seen.instruction}))
        return [timed.action.tolist() for timed in self._actions()]

    def throw(self) -> bool:
        try:
            if self.rng.random() < 0.15:
                self._sends(pickled(self.setup, self.rng))
                return True
            data = pickled(self.seen(small(0)), self.rng)
            self._sees(data)
        except self.grpc.RpcError as error:
            if error.code() in (
                self.grpc.StatusCode.INVALID_ARGUMENT,
                self.grpc.StatusCode.RESOURCE_EXHAUSTED,
            ):
                if "SendPolicyInstructions first" in error.details():
                    self._sends(self.setup)
                return False
            raise Broken(f"{error.code()} {error.details()[:200]}") from None
        try:
            actions = np.array([timed.action.numpy() for timed in self._actions()])
        except self.grpc.RpcError as error:
            if error.code() is not self.grpc.StatusCode.INVALID_ARGUMENT:
                raise Broken(f"{error.code()} {error.details()[:200]}") from None
            return False
        if actions.size and not np.isfinite(actions).all():
            raise Broken(f"the answer {actions}")
        return actions.size > 0


PROTOCOLS: tuple[Callable[..., Any], ...] = (OpenPi, VlaEval, LeRobot)


def mutated(until: Until, seed: int, folder: Path, serve: Callable[..., Any] = served) -> list[Bar]:
    """Bars of messages: each is answered, nobody else notices, and memory stays flat.

    serve: as `served`.
    """
    bars = [Bar(f"messages: {kind.__name__}", 33_334) for kind in PROTOCOLS]
    for place, (kind, bar) in enumerate(zip(PROTOCOLS, bars, strict=True)):
        own = Until(until.seconds / len(PROTOCOLS), until.tries / len(PROTOCOLS))
        with serve(folder, *kind.words) as server:
            _mutated(kind, own, [seed, place], server, bar)
    return bars


def _mutated(
    kind: Callable[..., Any], until: Until, seed: list[int], server: Any, bar: Bar
) -> None:
    throwers = [
        kind(server.address, np.random.default_rng([*seed, own])) for own in range(THROWERS)
    ]
    honest = kind(server.address, np.random.default_rng(0))
    expected, taken, held, rounds = honest.ask(), [], [], 0

    def throws(thrower: Any) -> None:
        try:
            for _ in range(ROUND):
                if thrower.throw():
                    taken.append(1)
        except Exception as error:
            bar.wrong.append(f"round {rounds} of seed {seed}: {type(error).__name__}: {error}")

    while until.goes_on(bar.done) and not bar.wrong:
        threads = [threading.Thread(target=throws, args=(own,)) for own in throwers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        bar.done, rounds = bar.done + ROUND * THROWERS, rounds + 1
        if server.ended():
            bar.wrong.append(
                f"round {rounds} of seed {seed}: the server has ended: {server.said()}"
            )
            return
        if (found := honest.ask()) != expected:
            bar.wrong.append(
                f"round {rounds} of seed {seed}: an honest client got {found}, before {expected}"
            )
        held.append(server.megabytes())
        first = max(held[: max(1, len(held) // 5)])
        if len(held) > 4 and held[-1] > first + MORE_MIB:
            bar.wrong.append(
                f"round {rounds} of seed {seed}: {held[-1]:.0f} MiB, {first:.0f} before"
            )
    bar.remark = f"{len(taken):,} taken; {held[0]:.0f} to {held[-1]:.0f} MiB" if held else ""
