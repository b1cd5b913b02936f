"""The queue in front of the model: requests are decoded together.

A request that would hold up the others is decoded alone, one at a time.
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

LONG = 300  # bytes of an instruction; a longer one would pad all that are decoded with it
# A client that lately used more of the server's time than LEAST seconds, and than MORE times the
# mean of the other clients, waits after an answer: for as long as reading and decoding took, times
# the number of the others (at most OTHERS), at most MOST_S seconds. So it gets the share of one
# client, and a tenth at least.
LEAST, MORE, OTHERS, MOST_S = 0.1, 2.0, 9, 1.0
READING = 2.0  # weight of a second of reading: it holds the interpreter lock, which all need


@dataclass(eq=False)
class Asked:
    """A request on its way to the model, with the queue that takes its answer.

    The queue gets a pair (step, action (D,)) for each step of a stream, and then a chunk (T, D) or
    an error.
    """

    session: ClientSession
    request: Request
    observation: Observation
    answers: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    @property
    def alone(self) -> bool:
        """Whether it would hold up the requests that are decoded with it."""
        return (
            self.request.stream
            or len(self.observation.instruction.encode("utf-8", "replace")) > LONG
        )


class Batches:
    """The requests that wait for one model, which a single thread runs.

    Args:
        policy: The policy.
        steps: Steps of a chunk that are decoded; None decodes all.
        max_batch: Observations in a batch, at most.
        metrics: The server's counters.
    """

    def __init__(self, policy: TextPolicy, steps: int | None, max_batch: int, metrics: Metrics):
        self.policy, self.steps, self.max_batch, self.metrics = policy, steps, max_batch, metrics
        self.waiting: list[Asked] = []
        self.asked = asyncio.Event()  # set while a request waits
        self.thread = ThreadPoolExecutor(1, "model")
        self.sessions: list[ClientSession] = []  # of the clients that are connected

    async def aside[T](self, session: ClientSession, read: Callable[..., T], *arguments: Any) -> T:
        """Run `read` in another thread, because reading megabytes would hold up other clients.

        Args:
            session: The client, which is charged for the time.
            read: The function.
            arguments: Its arguments.

        Returns:
            What `read` returns.
        """
        began = time.monotonic()
        result = await asyncio.to_thread(read, *arguments)
        self.charge(session, READING * (time.monotonic() - began))
        return result

    async def ask(
        self, asked: Asked, step: Callable[[int, np.ndarray], Awaitable[None]] | None = None
    ) -> np.ndarray:
        """Wait until a request is decoded.

        Args:
            asked: The request.
            step: Called with the index and the action (D,) of each step of a stream.

        Returns:
            The chunk (T, D).

        Raises:
            InputError: The observation cannot be decoded, or the model failed.
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
        """Decode requests as they arrive, until the task is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self.asked.wait()
            single = [asked for asked in self.waiting if asked.alone]
            batch = [asked for asked in self.waiting if not asked.alone]
            batch, single, self.waiting = (
                batch[: self.max_batch],
                single[:1],
                batch[self.max_batch :] + single[1:],
            )
            if not self.waiting:
                self.asked.clear()
            if batch:
                self.metrics.batches.observe(len(batch))
                began = time.monotonic()
                chunks = await loop.run_in_executor(
                    self.thread,
                    together,
                    self.policy,
                    [asked.observation for asked in batch],
                    self.steps,
                )
                each = (time.monotonic() - began) / len(batch)
                for asked, chunk in zip(batch, chunks, strict=True):
                    self.charge(asked.session, each)
                    asked.answers.put_nowait(chunk)
            for asked in single:
                self.metrics.batches.observe(1)
                began = time.monotonic()
                await loop.run_in_executor(self.thread, self._stream, asked, loop)
                self.charge(asked.session, time.monotonic() - began)

    def charge(self, session: ClientSession, seconds: float) -> None:
        """Add to the time that a client used, and delay it if it uses more than the others.

        Args:
            session: The client.
            seconds: Seconds of reading or decoding.
        """
        now = time.monotonic()
        session.used = session.lately(now) + seconds
        session.used_at = now
        others = [
            other.lately(now)
            for other in self.sessions
            if other is not session and now - other.heard_at < LATELY_S
        ]
        if others and session.used > max(LEAST, MORE * sum(others) / len(others)):
            session.charge(min(min(len(others), OTHERS) * seconds, MOST_S))

    def _stream(self, asked: Asked, loop: asyncio.AbstractEventLoop) -> None:
        """Decode a single request, in the model's thread."""

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


def warm_up(policy: TextPolicy, most: int = 1) -> None:
    """Answer black pictures, so that no client waits for what is done at a size's first query.

    Passes of that size are then measured, captured and compiled.

    Args:
        policy: The policy.
        most: Observations that are decoded together, at most.
    """
    spec = policy.spec
    before = (spec.history,) if spec.history > 1 else ()
    depth = {camera for camera, *_ in spec.depth}
    images = {
        camera: np.zeros(
            (*before, spec.image_size, spec.image_size, *(() if camera in depth else (3,))),
            np.uint16 if camera in depth else np.uint8,
        )
        for camera in spec.cameras
    }
    state = np.mean(spec.state, 0) if spec.state else np.zeros(spec.dimensions)
    black = Observation(images, "pick up the object and put it in its place", state)
    for count in sorted({1 << doublings for doublings in range(most.bit_length())} | {most}):
        policy.predict_batch([black] * count)


def together(
    policy: TextPolicy, observations: Sequence[Observation], steps: int | None
) -> list[np.ndarray | InputError]:
    """Decode observations together.

    Args:
        policy: The policy.
        observations: The observations.
        steps: Steps of a chunk that are decoded; None decodes all.

    Returns:
        For each observation its chunk (T, D), or its own error.
    """
    try:
        return list(policy.predict_batch(observations, steps))
    except Exception as error:
        if len(observations) == 1:
            return [told(error)]
    # one of them caused the error: decode each by itself
    return [together(policy, [observation], steps)[0] for observation in observations]


def told(error: Exception) -> InputError:
    """Return the error that a client is sent.

    An InputError, which the client caused, is sent in full; any other error is logged here, and the
    client is sent its type.
    """
    if isinstance(error, InputError):
        return error
    logger.error("the model failed", exc_info=error)
    return InputError(
        "an observation that the model can take",
        f"{type(error).__name__} in the server",
        "see the server's log",
    )
