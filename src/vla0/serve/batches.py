"""What waits for the model goes to it together; what would hold up others goes alone, one at a
time.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla0.core.spec import Observation
from vla0.errors import InputError
from vla0.policy import TextPolicy
from vla0.serve.messages import Request
from vla0.serve.metrics import Metrics
from vla0.serve.session import LATELY_S, ClientSession

logger = logging.getLogger(__name__)

LONG = 300  # bytes of an instruction: with a longer one, all that are decoded with it are as long
# Who takes more of the server's time than others do has the share of one of them, a tenth at least:
# after an answer it waits as long as reading and decoding took, times the others, at most a second.
LEAST, MORE, OTHERS, MOST_S = 0.1, 2.0, 9, 1.0
READING = 2.0  # times that its seconds count: it holds the interpreter, which all others need, too


@dataclass(eq=False)
class Asked:
    """A question on its way to the model, and where its answer goes: steps (int, action), and then
    a chunk or an error.
    """

    session: ClientSession
    request: Request
    observation: Observation
    answers: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    @property
    def alone(self) -> bool:
        """Whether it would hold up who is decoded with it."""
        return (
            self.request.stream
            or len(self.observation.instruction.encode("utf-8", "replace")) > LONG
        )


class Batches:
    """One model, asked by one thread. steps: of a chunk, that are decoded.

    most: observations at once.
    """

    def __init__(self, policy: TextPolicy, steps: int | None, most: int, metrics: Metrics):
        self.policy, self.steps, self.most, self.metrics = policy, steps, most, metrics
        self.waiting: list[Asked] = []
        self.asked = asyncio.Event()  # whether anybody waits
        self.thread = ThreadPoolExecutor(1, "model")
        self.sessions: list[ClientSession] = []  # of the clients that are here

    async def aside[T](self, session: ClientSession, read: Callable[..., T], *given: Any) -> T:
        """What `read` makes of a message, in a thread of its own: megabytes, which others need not
        wait for.
        """
        began = time.monotonic()
        found = await asyncio.to_thread(read, *given)
        self.charge(session, READING * (time.monotonic() - began))
        return found

    async def ask(
        self, asked: Asked, step: Callable[[int, np.ndarray], Awaitable[None]] | None = None
    ) -> np.ndarray:
        """(T, D): the chunk. step: called with each action of a stream.

        Raises the error that is its own.
        """
        with self.metrics.request():
            self.waiting.append(asked)
            self.asked.set()
            while isinstance(part := await asked.answers.get(), tuple):
                if step is not None:
                    await step(*part)
            if isinstance(part, BaseException):
                raise part
            return part

    async def run(self) -> None:
        """Forever."""
        loop = asyncio.get_running_loop()
        while True:
            await self.asked.wait()
            alone = [own for own in self.waiting if own.alone]
            whole = [own for own in self.waiting if not own.alone]
            whole, alone, self.waiting = (
                whole[: self.most],
                alone[:1],
                whole[self.most :] + alone[1:],
            )
            if not self.waiting:
                self.asked.clear()
            if whole:
                self.metrics.batches.observe(len(whole))
                began = time.monotonic()
                found = await loop.run_in_executor(
                    self.thread,
                    together,
                    self.policy,
                    [own.observation for own in whole],
                    self.steps,
                )
                each = (time.monotonic() - began) / len(whole)
                for own, chunk in zip(whole, found, strict=True):
                    self.charge(own.session, each)
                    own.answers.put_nowait(chunk)
            for own in alone:
                self.metrics.batches.observe(1)
                began = time.monotonic()
                await loop.run_in_executor(self.thread, self._stream, own, loop)
                self.charge(own.session, time.monotonic() - began)

    def charge(self, own: ClientSession, seconds: float) -> None:
        """Who makes the model, or who reads for it, work more than others do waits before he is
        heard again.
        """
        now = time.monotonic()
        own.used = own.lately(now) + seconds
        own.used_at = now
        others = [
            other.lately(now)
            for other in self.sessions
            if other is not own and now - other.heard_at < LATELY_S
        ]
        if others and own.used > max(LEAST, MORE * sum(others) / len(others)):
            own.charge(min(min(len(others), OTHERS) * seconds, MOST_S))

    def _stream(self, asked: Asked, loop: asyncio.AbstractEventLoop) -> None:
        def put(value: Any) -> None:
            loop.call_soon_threadsafe(asked.answers.put_nowait, value)

        actions = []
        try:
            for step, action in enumerate(
                self.policy.predict_stream(asked.observation, self.steps)
            ):
                actions.append(action)
                if asked.request.stream:
                    put((step, action))
            put(np.stack(actions))
        except Exception as error:
            put(told(error))


def together(
    policy: TextPolicy, observations: Sequence[Observation], steps: int | None
) -> list[np.ndarray | InputError]:
    """A chunk for each, decoded together, or the error that is its own."""
    try:
        return list(policy.predict_batch(observations, steps))
    except Exception as error:
        if len(observations) == 1:
            return [told(error)]
    # one of them is at fault
    return [together(policy, [observation], steps)[0] for observation in observations]


def told(error: Exception) -> InputError:
    """What a client is told of an error: its own fault in full, ours in a word."""
    if isinstance(error, InputError):
        return error
    logger.error("the model failed", exc_info=error)
    return InputError(
        "an observation that the model can take",
        f"{type(error).__name__} in the server",
        "see the server's log",
    )
