"""A robot's world in simulated time: its watchdog, signals, clocks that jump, a bus and cameras of
their own will.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from soak.sham import Clock
from vla0 import Observation
from vla0.robot import clock as clocks
from vla0.robot import limits as limiting
from vla0.robot import loop as loops
from vla0.robot import safety as guards
from vla0.robot.loop import Pacer

GRAIN_S = 0.005  # between two looks of the watchdog
OURS = (guards.__file__, loops.__file__, limiting.__file__, clocks.__file__)


class BusError(Exception):
    """What the robot's driver raises."""


class World:
    """Simulated time, in which the watchdog looks, signals come and clocks jump; and answers, asked
    for by RemotePolicy.
    """

    def __init__(self, rng: np.random.Generator, jumps: float):
        self.rng, self.time, self.jumps, self.guard = rng, 0.0, jumps, None
        self.clock = Clock(lambda: self.time)
        self.predict: Callable[[Observation], np.ndarray] | None = None
        self.due: list[tuple[float, Callable[[], None]]] = []  # what happens at a moment
        self.server: Any = None
        # question → when it was asked, when its answer was put to use
        self.used: dict[int, tuple[float, float]] = {}
        self.busy = False  # the watchdog is one thread: it does not look while it looks
        self.asked: list[tuple[float, float]] = []  # (when, captured when) of the questions

    def now(self) -> float:
        return self.time

    def sleep_until(self, moment: float) -> None:
        while self.time < moment:
            self.time = min(moment, self.time + GRAIN_S)
            if self.rng.random() < self.jumps:  # a machine that slept, or a scheduler that was busy
                self.time += self.rng.exponential(1.0)
            if self.guard is not None and not self.busy:
                self.busy = True
                self.guard.check()
                self.busy = False
            while self.due and self.due[0][0] <= self.time:
                self.due.pop(0)[1]()

    def ask(self, observation: Observation) -> "Answer":
        self.asked.append((self.time, observation.captured_at))
        return Answer(self, observation)

    def wait(self, answer: "Answer", until: float) -> None:
        while not answer.done() and self.time < until:
            self.sleep_until(min(until, self.time + GRAIN_S))

    def latest(self, action: np.ndarray, pace: Pacer, sends) -> float:
        """The instant that an action is meant for, which its first number says, but where the robot
        waited for it.
        """
        # the last action lasts as long as it was meant to, others are mixed
        resampled = pace.fps != self.server.fps
        meant, waited = float(action[0]) + (1 / self.server.fps if resampled else 0.0), 0.0
        if pace.mode == "ensemble":
            return meant
        for question in self.used if resampled else [round(float(action[3]))]:
            asked, used = self.used.get(question, (0.0, 0.0))
            if pace.mode == "sync" or not any(asked < begun < used for begun, *_ in sends):
                waited = max(waited, used - asked)
        # which goes on at the next tick
        return meant + waited + (1 / pace.fps if pace.mode == "sync" else 0.0)


class Answer:
    """A question that runs its whole course, in a clock of its own that is ahead of the world's."""

    def __init__(self, world: World, observation: Observation):
        self.world, self.error = world, None
        world.clock.ahead = 0.0
        try:
            self.chunk = world.predict(observation)
        except Exception as error:
            self.error = error
        self.question, self.asked_at = world.server.asked, world.time
        self.done_at, world.clock.ahead = world.time + world.clock.ahead, 0.0

    def done(self) -> bool:
        return self.world.time >= self.done_at - 1e-9

    def result(self) -> np.ndarray:
        if self.error is not None:
            raise self.error
        self.world.used[self.question] = (self.asked_at, self.world.time)
        return self.chunk


class RobotInterface:
    """An arm with a bus and cameras of their own will, and a diary: (kind, begun, ended,
    action).
    """

    def __init__(self, world: World, rng: np.random.Generator, start: np.ndarray, ill: float):
        self.world, self.rng, self.at, self.ill = world, rng, start, ill
        self.diary: list[tuple[str, float, float, Any]] = []
        self.bus_s = rng.choice([0.0, 0.002, 0.02, 0.25], p=[0.4, 0.3, 0.2, 0.1])
        self.frozen: float | None = None

    def observe(self) -> Observation:
        self._takes("look")
        if self.rng.random() < 0.05 * self.ill:
            self.frozen = None if self.frozen is not None else self.world.time
        at = self.world.time if self.frozen is None else self.frozen
        if self.rng.random() < 0.1 * self.ill:  # a camera that counts in another clock
            at = self.rng.choice([self.world.time + 5.0, self.world.time - 1e6, np.nan, np.inf])
        frame = np.zeros((2, 2, 3), np.uint8)
        return Observation(
            {"front": frame}, "go", np.array([self.world.time]), captured_at=float(at)
        )

    def send(self, action: np.ndarray) -> None:
        self._takes("send", action.copy())
        self.at = action.copy()

    def hold(self) -> None:
        self._takes("hold")

    def stop(self) -> None:
        self._takes("stop")

    def _takes(self, kind: str, action: Any = None) -> None:
        begun = self.world.time
        entry = len(self.diary)
        self.diary.append((kind, begun, np.inf, action))
        spent = self.bus_s * self.rng.uniform(0.5, 1.5)
        if self.rng.random() < 0.003 * self.ill:  # it hangs
            spent += self.rng.exponential(1.0)
        self.world.sleep_until(begun + spent)
        self.diary[entry] = (kind, begun, self.world.time, action)
        if self.rng.random() < 0.0005 * self.ill:
            raise BusError(kind)


def instructed(count: int, act: Callable[[], None]) -> None:
    """Calls act after so many instructions of the robot's own code from now: where a signal's
    handler may come.
    """
    monitoring, left = sys.monitoring, count
    events = monitoring.events
    if monitoring.get_tool(monitoring.DEBUGGER_ID) is None:
        monitoring.use_tool_id(monitoring.DEBUGGER_ID, "soak")

    def instruction(code, offset):
        nonlocal left
        if code.co_filename not in OURS:
            return monitoring.DISABLE
        left -= 1
        if left == 0:
            monitoring.set_events(monitoring.DEBUGGER_ID, 0)
            act()
        return None

    monitoring.register_callback(monitoring.DEBUGGER_ID, events.INSTRUCTION, instruction)
    monitoring.restart_events()
    monitoring.set_events(monitoring.DEBUGGER_ID, events.INSTRUCTION)


class Untimed:
    """A lock that waits for nobody: in simulated time, who has it is the caller of who wants it."""

    def __init__(self):
        self.taken = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        assert not (blocking and timeout < 0 and self.taken), "a deadlock"
        before, self.taken = self.taken, True
        return not before

    def release(self) -> None:
        self.taken = False

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()
