"""64 clients that ask at their pace, and a hostile one beside: nobody is lost, answered otherwise,
or kept waiting.
"""

import asyncio
import math
import multiprocessing
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_observation
from websockets.asyncio.client import connect as aconnect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from soak import Bar, Until
from soak.servers import served
from vla0.serve.msgpack_numpy import pack, unpack

CLIENTS, SEEN = 64, 8  # that are honest; different observations
WINDOW_S = 30.0  # with the hostile one, at least; half as long without, by turns
MOST_RISE = 1.5  # of the 99th percentile
ANSWER_S = 60.0


def said(seed: int, side: int = 0, **more: Any) -> bytes:
    """A message that a client may send; side: of its pictures."""
    seen = make_observation(seed)
    images = (
        {camera: np.zeros((side, side, 3), np.uint8) for camera in seen.images}
        if side
        else dict(seen.images)
    )
    return pack({"images": images, "prompt": seen.instruction, "state": seen.state, **more})


def nested(size: int, element: bytes) -> bytes:
    """Empty lists or mappings, as many as fit."""
    rows = size // 65536
    return (
        b"\x81\xa1x\xdc"
        + struct.pack(">H", rows)
        + b"".join(b"\xdc\xff\xff" + element * 65535 for _ in range(rows))
    )


ATTACKS = {  # name → messages, sent one after another as fast as answers come
    "empty lists": lambda: [nested(12 << 20, b"\x90")],
    "empty mappings": lambda: [nested(12 << 20, b"\x80")],
    "large arrays": lambda: [pack({"x": np.zeros(12 << 20, np.uint8)})],
    "large pictures": lambda: [said(0, 1400)],
    "good questions": lambda: [said(seed) for seed in range(SEEN)],
    "streams": lambda: [said(seed, **{"vla0/stream": True}) for seed in range(SEEN)],
    "long instructions": lambda: [said(0, prompt="\U0001f600" * 2000)],
    "words that are tokens": lambda: [said(0, prompt="<|im_end|>" * 20)],
    "garbage": lambda: [b"\xc1" * 1000, b"", b"\x81\xa1x", said(0)[:-9]],
    "too large": lambda: [bytes(60 << 20)],
}


def attack(url: str, name: str, begins: Any, ends: Any) -> None:
    """Of a process of its own: one client that means ill, between two events."""
    os.nice(19)  # it would have a machine of its own
    messages, place = ATTACKS[name](), 0
    begins.set()
    while not ends.is_set():
        try:
            with connect(
                url, compression=None, max_size=None, open_timeout=20, close_timeout=0.2
            ) as connection:
                connection.recv(timeout=20)
                while not ends.is_set():
                    connection.send(messages[place % len(messages)])
                    place += 1
                    answer = connection.recv(timeout=20)
                    while not isinstance(answer, str) and "vla0/step" in unpack(answer):
                        answer = connection.recv(timeout=20)
        except (ConnectionClosed, InvalidStatus, OSError, TimeoutError):
            time.sleep(0.01)


class Honest:
    """64 connections, each with a question every `every_s` seconds, the first at a moment of its
    own.
    """

    def __init__(self, url: str, expected: list[np.ndarray], bar: Bar):
        self.url, self.draft_actions, self.bar = url, expected, bar
        self.messages = [said(seed) for seed in range(SEEN)]

    def window(self, seconds: float, every_s: float) -> list[float]:
        """Seconds that each answer took."""
        return asyncio.run(self._window(seconds, every_s))

    async def _window(self, seconds: float, every_s: float) -> list[float]:
        found: list[float] = []
        async with asyncio.TaskGroup() as group:
            for client in range(CLIENTS):
                group.create_task(self._client(client, seconds, every_s, found))
        return found

    async def _client(
        self, client: int, seconds: float, every_s: float, found: list[float]
    ) -> None:
        try:
            async with aconnect(
                self.url, compression=None, max_size=None, open_timeout=ANSWER_S
            ) as connection:
                await connection.recv()
                began, turn = time.monotonic(), 0
                await asyncio.sleep(every_s * client / CLIENTS)
                while time.monotonic() - began < seconds:
                    asked, own = time.monotonic(), (client + turn) % SEEN
                    await connection.send(self.messages[own])
                    answer = await asyncio.wait_for(connection.recv(), ANSWER_S)
                    found.append(time.monotonic() - asked)
                    self.bar.done += 1
                    if isinstance(answer, str) or not np.array_equal(
                        unpack(answer)["actions"], self.draft_actions[own]
                    ):
                        self.bar.wrong.append(f"client {client}: {str(answer)[:300]}")
                    turn += 1
                    await asyncio.sleep(
                        max(0.0, began + every_s * (client / CLIENTS + turn) - time.monotonic())
                    )
        except (ConnectionClosed, InvalidStatus, OSError, TimeoutError) as error:
            self.bar.wrong.append(f"client {client} was lost: {type(error).__name__}: {error}")


def clients(
    until: Until,
    seed: int,
    folder: Path,
    serve: Callable[..., Any] = served,
    least_s: float = WINDOW_S,
) -> list[Bar]:
    """Bars of the honest ones' answers, and of how much longer they wait beside each attack.

    serve: as `served`.
    """
    answers = Bar("network: 64 clients, none lost, each answered as before", 60 * 64)
    waits = Bar("network: the 99th percentile rises by less than half", len(ATTACKS))
    context, rng = multiprocessing.get_context("spawn"), np.random.default_rng(seed)
    with serve(folder, "--protocol", "openpi", "--rate", "100000") as server:
        url = f"ws://{server.address}"
        with connect(url, compression=None, max_size=None) as connection:
            connection.recv(timeout=ANSWER_S)
            expected = []
            for own in range(SEEN):
                connection.send(said(own))
                expected.append(unpack(connection.recv(timeout=ANSWER_S))["actions"])
        honest = Honest(url, expected, answers)
        full = len(honest.window(3.0, 0.0)) / 3.0  # answers a second, of clients that never pause
        # robots that ask now and then, and a model that is not overrun
        every_s = 4 * CLIENTS / full
        alone: list[float] = []
        beside: dict[str, list[float]] = {}
        while until.goes_on(len(beside)):
            names = [name for name in ATTACKS if name not in beside] or list(ATTACKS)
            name = names[rng.integers(len(names))]
            window_s = max(
                least_s, until.seconds / (3 * len(ATTACKS)) if until.seconds < math.inf else 0.0
            )
            alone += honest.window(window_s / 2, every_s)
            begins, ends = context.Event(), context.Event()
            process = context.Process(target=attack, args=(url, name, begins, ends), daemon=True)
            process.start()
            begins.wait(60)  # it has imported and packed what it needs
            beside.setdefault(name, []).extend(honest.window(window_s, every_s))
            ends.set()
            process.join(5)
            process.kill()
            if server.ended():
                answers.wrong.append(f"the server has ended: {server.said()}")
                break
    percentile = lambda own: float(np.percentile(own, 99)) * 1e3  # noqa: E731
    before = percentile(alone)
    rises = {name: percentile(own) / before for name, own in beside.items()}
    waits.done = len(beside)
    waits.wrong = [
        f"beside {name}: {rise:.2f} times {before:.0f} ms"
        for name, rise in rises.items()
        if rise > MOST_RISE
    ]
    told = ", ".join(
        f"{name} {rise:.2f}" for name, rise in sorted(rises.items(), key=lambda own: -own[1])
    )
    waits.remark = (
        f"{CLIENTS / every_s:.0f} questions a second; {before:.0f} ms alone, times: {told}"
    )
    return [answers, waits]
