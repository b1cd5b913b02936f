"""Time and answers: of the real world, or of one that is simulated."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np

from vla0.core.spec import Observation


class Answer(Protocol):
    """A chunk that is on its way."""

    done_at: float  # seconds, once it is there

    def done(self) -> bool:
        """Whether it is there, or failed."""
        ...

    def result(self) -> np.ndarray:
        """The chunk (H, D), or the error that it became."""
        ...


class LoopWorld(Protocol):
    """What time is, and how answers come."""

    def now(self) -> float:
        """Seconds."""
        ...

    def sleep_until(self, moment: float) -> None:
        """Lets time pass."""
        ...

    def ask(self, observation: Observation) -> Answer:
        """Begins to ask the policy."""
        ...

    def wait(self, answer: Answer, until: float) -> None:
        """Lets time pass until the answer is there, or the moment."""
        ...


class RealWorld:
    """Monotonic seconds, and a policy asked from a thread of its own.

    predict: (observation) → chunk (H, D).
    """

    def __init__(self, predict: Callable[[Observation], np.ndarray]):
        self.predict = predict
        self.thread = ThreadPoolExecutor(1, "policy")

    def now(self) -> float:
        """Seconds of time.monotonic."""
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        """Sleeps."""
        time.sleep(max(0.0, moment - time.monotonic()))

    def ask(self, observation: Observation) -> Any:
        """Begins to ask."""
        answer: Any = self.thread.submit(self.predict, observation)
        answer.add_done_callback(lambda answer: setattr(answer, "done_at", time.monotonic()))
        return answer

    def wait(self, answer: Any, until: float) -> None:
        """Waits."""
        wait([answer], max(0.0, until - time.monotonic()))


class SimulatedWorld:
    """Time that passes only here, and a policy that takes `latency_s(query)` of it.

    check: called as time passes.
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
        """Seconds since it began."""
        return self.time

    def sleep_until(self, moment: float) -> None:
        """Lets time pass, a grain at a time."""
        while self.time < moment:
            self.time = min(moment, self.time + self.grain_s)
            self.check()

    def ask(self, observation: Observation) -> "Later":
        """The answer, which is there when its time has come."""
        self.queries += 1
        return Later(self, self.time + self.latency_s(self.queries - 1), observation)

    def wait(self, answer: Answer, until: float) -> None:
        """Lets time pass."""
        while not answer.done() and self.time < until:
            self.sleep_until(min(until, self.time + self.grain_s))


class Later:
    """An answer of a simulated world."""

    def __init__(self, world: SimulatedWorld, ready_at: float, observation: Observation):
        self.world, self.done_at, self.observation = world, ready_at, observation

    def done(self) -> bool:
        """Whether its time has come."""
        return self.world.time >= self.done_at - 1e-9

    def result(self) -> np.ndarray:
        """The chunk."""
        return self.world.predict(self.observation)
