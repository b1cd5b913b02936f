"""The clock of a loop and the policy that it asks: real, or simulated for tests."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np

from vla0.core.spec import Observation


class Answer(Protocol):
    """A chunk that is on its way."""

    done_at: float  # seconds; set once the answer has arrived

    def done(self) -> bool:
        """Tell whether the chunk has arrived, or the query failed."""
        ...

    def result(self) -> np.ndarray:
        """Return the chunk (H, D), or raise the error of the query."""
        ...


class LoopWorld(Protocol):
    """What a loop needs: a clock, and a policy that answers later."""

    def now(self) -> float:
        """Return the time, in seconds."""
        ...

    def sleep_until(self, moment: float) -> None:
        """Sleep until a time, in seconds of `now`."""
        ...

    def ask(self, observation: Observation) -> Answer:
        """Ask the policy, and return without waiting for the answer."""
        ...

    def wait(self, answer: Answer, until: float) -> None:
        """Wait until the answer has arrived, or until a time in seconds of `now`."""
        ...


class RealWorld:
    """The real clock, and a policy that is asked from another thread.

    Args:
        predict: Takes an observation and returns a chunk (H, D).
    """

    def __init__(self, predict: Callable[[Observation], np.ndarray]):
        self.predict = predict
        self.thread = ThreadPoolExecutor(1, "policy")

    def now(self) -> float:
        """Return the seconds of `time.monotonic`."""
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        """Sleep until a time, in seconds of `now`."""
        time.sleep(max(0.0, moment - time.monotonic()))

    def ask(self, observation: Observation) -> Any:
        """Ask the policy, and return without waiting for the answer."""
        answer: Any = self.thread.submit(self.predict, observation)
        answer.add_done_callback(lambda answer: setattr(answer, "done_at", time.monotonic()))
        return answer

    def wait(self, answer: Any, until: float) -> None:
        """Wait until the answer has arrived, or until a time in seconds of `now`."""
        wait([answer], max(0.0, until - time.monotonic()))


class SimulatedWorld:
    """A simulated clock, and a policy whose answers take simulated time.

    Args:
        predict: Takes an observation and returns a chunk (H, D).
        latency_s: Takes a query's number, from 0, and returns the seconds that its answer takes.
        grain_s: Seconds by which the time advances at once, at most.
        check: Called each time the time advances.
    """

    def __init__(
        self,
        predict: Callable[[Observation], np.ndarray],
        latency_s: Callable[[int], float],
        grain_s: float = 0.005,
        check: Callable[[], None] = lambda: None,
    ):
        self.predict, self.latency_s, self.grain_s, self.check = predict, latency_s, grain_s, check
        self.time, self.queries = 0.0, 0

    def now(self) -> float:
        """Return the simulated seconds since the world was made."""
        return self.time

    def sleep_until(self, moment: float) -> None:
        """Advance the time in steps of `grain_s`."""
        while self.time < moment:
            self.time = min(moment, self.time + self.grain_s)
            self.check()

    def ask(self, observation: Observation) -> "Later":
        """Return an answer that arrives after the latency of this query."""
        self.queries += 1
        return Later(self, self.time + self.latency_s(self.queries - 1), observation)

    def wait(self, answer: Answer, until: float) -> None:
        """Advance the time until the answer has arrived, or until a time in seconds."""
        while not answer.done() and self.time < until:
            self.sleep_until(min(until, self.time + self.grain_s))


class Later:
    """An answer of a simulated world."""

    def __init__(self, world: SimulatedWorld, ready_at: float, observation: Observation):
        self.world, self.done_at, self.observation = world, ready_at, observation

    def done(self) -> bool:
        """Tell whether the answer has arrived."""
        return self.world.time >= self.done_at - 1e-9

    def result(self) -> np.ndarray:
        """Return the chunk (H, D)."""
        return self.world.predict(self.observation)
