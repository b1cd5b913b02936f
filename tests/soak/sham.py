"""A server that is late, loses, repeats and sends garbage, and the connection to it, in simulated
time.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Close

from vla0.serve.msgpack_numpy import pack, unpack

D = 4  # dimensions: when an action is meant for, a position, an angle, which question it answers


class Clock:
    """Time of the thread that asks: the world's, and what it has waited since.

    In place of the module `time`.
    """

    def __init__(self, world: Callable[[], float]):
        self.world, self.ahead = world, 0.0

    def monotonic(self) -> float:
        return self.world() + self.ahead

    def sleep(self, seconds: float) -> None:
        self.ahead += max(0.0, seconds)


class Connection:
    """A websocket whose other end is a Server.

    Messages come when their time has come, and a closed one raises.
    """

    def __init__(self, server: "Server"):
        self.server, self.inbox, self.open = (
            server,
            [(server.clock.monotonic(), pack(server.metadata()))],
            True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open = False

    def send(self, message: bytes) -> None:
        if not self.open:
            raise ConnectionClosedError(None, None)
        answers = self.server.answers(unpack(message))
        # there is nothing but their order to tell answers by
        if not self.server.numbered and self.inbox:
            answers = [(max(at, self.inbox[-1][0]), own) for at, own in answers]
        self.inbox = sorted(self.inbox + answers, key=lambda entry: entry[0])

    def recv(self, timeout: float, decode: bool | None = None) -> Any:
        clock = self.server.clock
        if not self.inbox or self.inbox[0][0] > clock.monotonic() + timeout:
            clock.sleep(timeout)
            raise TimeoutError
        at, message = self.inbox.pop(0)
        clock.sleep(at - clock.monotonic())
        if message is None:
            self.open = False
            raise ConnectionClosedError(Close(1011, "broken"), None)
        return message


class Server:
    """Answers whose first number is the instant that an action is meant for, and whose last is the
    question's.

    ill: how often something goes wrong. Its positions and angles are wild whatever it is asked.
    """

    def __init__(
        self,
        clock: Clock,
        rng: np.random.Generator,
        chunk_size: int,
        fps: float,
        latency_s: float,
        ill: float,
    ):
        self.clock, self.rng, self.chunk_size, self.fps = clock, rng, chunk_size, fps
        self.latency_s, self.ill, self.asked, self.numbered = latency_s, ill, 0, True
        self.told: dict[str, Any] = {}
        self.sent: list[bytes] = []

    def metadata(self) -> dict[str, Any]:
        extensions = ["stream", "reset", "number", "action_prefix"] if self.numbered else []
        return {
            "chunk_size": self.chunk_size,
            "dimensions": D,
            "extensions": extensions,
        } | self.told

    def connect(self, *_, **__) -> Connection:
        self.clock.sleep(self.rng.exponential(0.01))
        if self.rng.random() < 0.3 * self.ill:
            raise ConnectionRefusedError("nobody there")
        return Connection(self)

    def answers(self, message: dict[str, Any]) -> list[tuple[float, Any]]:
        """(when, what) comes of a question; None for the end of the connection."""
        rng, at = self.rng, self.clock.monotonic()
        self.asked += 1
        number = {"vla0/number": message["vla0/number"]} if self.numbered else {}
        steps = np.arange(self.chunk_size)
        chunk = np.stack(
            [
                message["state"][0] + steps / self.fps,
                rng.normal(0, 10.0 ** rng.uniform(-2, 6))
                + rng.normal(0, 0.1, self.chunk_size).cumsum(),
                rng.normal(0, 10.0 ** rng.uniform(0, 4))
                + rng.normal(0, 10, self.chunk_size).cumsum(),
                np.full(self.chunk_size, self.asked),
            ],
            axis=1,
        ).astype(np.float32)
        if (committed := message.get("vla0/action_prefix")) is not None:
            chunk[: len(committed)] = committed
        whole = {"actions": chunk, **number}
        ready = at + rng.exponential(self.latency_s)
        if rng.random() >= self.ill:
            return [(ready, pack(whole))]
        # where order alone tells, it must be kept
        kind = rng.integers(9) if self.numbered else rng.choice([2, 3, 5, 7])
        if kind == 0:  # lost
            return []
        if kind == 1:  # twice, or many times, at once or later
            return [
                (ready + own, pack(whole))
                for own in (0.0, *rng.exponential(0.3, rng.integers(1, 40)))
            ]
        if kind == 2:  # very late
            return [(ready + rng.uniform(0.5, 20), pack(whole))]
        if kind == 3:  # the connection ends, before or in the place of the answer
            return [(ready, None)]
        if kind == 4:  # bytes that are none of a message
            raw = bytearray(pack(whole))
            for place in rng.integers(0, len(raw), rng.integers(1, 8)):
                raw[place] = rng.integers(256)
            # A mutation of its numbers is a policy that is wrong, not a server: it is limited, and
            # no label can tell it.
            return [(ready, bytes(raw[: rng.integers(1, len(raw))]))]
        if kind == 5:
            return [(ready, "something is wrong: " + "x" * int(rng.integers(5000)))]
        if kind == 6:  # the answer to another question
            return [(ready, pack(whole | {"vla0/number": self._odd_number(message)}))]
        return [(ready, pack(whole | {"actions": self._odd_actions(chunk)}))]

    def _odd_number(self, message: dict[str, Any]) -> Any:
        # Not the next one: a server that lies about what it answers is a policy that is wrong, and
        # limited.
        own = int(message.get("vla0/number", 1))
        odd = (
            own - 1,
            -1,
            2**63,
            float(own) + 0.5,
            "1",
            None,
            [own],
            {"a": 1},
            np.full(3, own),
            True,
        )
        return odd[self.rng.integers(len(odd))]

    def _odd_actions(self, chunk: np.ndarray) -> Any:
        broken = chunk.copy()
        broken[self.rng.integers(len(chunk)), self.rng.integers(D)] = self.rng.choice(
            [np.nan, np.inf, -np.inf]
        )
        odd = (
            broken,
            np.tile(chunk, (200, 1)),
            chunk[:, :-1],
            chunk[0],
            chunk[:0],
            chunk[None],
            None,
            "actions",
            [],
            {},
            [[1, 2, 3, "x"]],
            [[1.0] * D] * (self.chunk_size + 1),
            chunk.astype(np.float64) * 1e300,
            7,
            [[None] * D],
        )
        return odd[self.rng.integers(len(odd))]
