"""The only way to a robot: what passes here is finite, within limits, on time, and never after the stop."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vla0.errors import InputError
from vla0.spec import Observation, Spec, tupled

logger = logging.getLogger(__name__)


class Body(Protocol):
    """A robot: yours, LeRobot's, or a simulated one."""

    def observe(self) -> Observation:
        """What it sees and feels now, `captured_at` in the seconds of time.monotonic."""
        ...

    def send(self, action: np.ndarray) -> None:
        """Executes an action (D,), in the dataset's units."""
        ...

    def hold(self) -> None:
        """Stays where it is, under power."""
        ...

    def stop(self) -> None:
        """The safest end there is. Nothing is sent after it."""
        ...


@dataclass(frozen=True)
class Limits:
    """What a command may be, for each dimension of the action, in its units."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    step: tuple[float, ...] | None = None  # most change from one command to the next, of absolute actions
    velocity: tuple[float, ...] | None = None  # the same, a second
    periodic: tuple[tuple[int, float, float], ...] = ()  # dimensions that wrap: (dimension, low, high) of the Spec
    workspace: Callable[[np.ndarray], np.ndarray] | None = None  # the nearest allowed action, by whatever you know

    def __post_init__(self):
        for name in ("low", "high", "step", "velocity"):
            object.__setattr__(self, name, tupled(getattr(self, name)))
            value = getattr(self, name)
            if value is not None and (len(value) != len(self.low) or not np.isfinite(value).all()):
                raise InputError(f"{name}: {len(self.low)} finite numbers", f"{value}", "one for each dimension of the action")
        if not all(a <= b for a, b in zip(self.low, self.high, strict=True)):
            d = next(d for d, (a, b) in enumerate(zip(self.low, self.high, strict=True)) if a > b)
            raise InputError("low <= high", f"{self.low[d]:g} and {self.high[d]:g} of action {d}", "exchange them")
        for name in ("step", "velocity"):
            if getattr(self, name) is not None and min(getattr(self, name)) <= 0:
                raise InputError(f"{name} > 0", f"{getattr(self, name)}", "leave it out for no limit")

    @classmethod
    def of(cls, spec: Spec) -> "Limits":
        """What the demonstrations did and no more. Relative dimensions have no bounds of their own there: give them."""
        if spec.relative:
            raise InputError("limits", f"none, and relative dimensions {spec.relative}", "give low and high of the robot")
        return cls(spec.low, spec.high, periodic=spec.periodic)

    def safe(self, action: np.ndarray, last: np.ndarray | None, period_s: float) -> np.ndarray:
        """The nearest action within all limits; last: the command before, if there was one."""
        safe = np.clip(np.asarray(action, np.float64), self.low, self.high)
        if self.workspace is not None:
            safe = np.clip(self.workspace(safe), self.low, self.high)
        if last is not None:
            most = np.full(len(safe), np.inf)
            if self.step is not None:
                most = np.minimum(most, self.step)
            if self.velocity is not None:
                most = np.minimum(most, np.array(self.velocity) * period_s)
            safe = self._changed(safe, last, most)
        return safe

    def _changed(self, safe: np.ndarray, last: np.ndarray, most: np.ndarray) -> np.ndarray:
        """(D,): from `last` towards `safe` by `most`; of a periodic dimension over the seam, where its bounds meet there."""
        near = np.clip(safe, last - most, last + most)
        for d, low, high in self.periodic:
            if (high - self.high[d]) + (self.low[d] - low) > most[d]:
                continue  # what lies between the bounds cannot be crossed
            turn = high - low
            step = (safe[d] - last[d] + turn / 2) % turn - turn / 2
            goal = last[d] + np.clip(step, -most[d], most[d])
            around = (goal - low) % turn + low
            near[d] = around if self.low[d] <= around <= self.high[d] else np.clip(goal, self.low[d], self.high[d])
        return near


class Guard:
    """Passes commands on to a body, or does not; the body is touched through it alone.

    start: (D,) where the body is, for limits of change to begin from. live: without it nothing reaches the body, not even
    a stop: a dry run. hold_s: without a fresh command for so long the body holds; after stop_s it is stopped. Both are
    looked after by `watch`, whatever else hangs: a body that is in the middle of something is waited for, but not longer
    than grace_s.
    """

    def __init__(
        self,
        body: Body,
        limits: Limits,
        period_s: float,
        start: np.ndarray | None = None,
        live: bool = False,
        hold_s: float = 0.2,
        stop_s: float = 2.0,
        grace_s: float = 0.1,
        now: Callable[[], float] = time.monotonic,
    ):
        if not 0 < hold_s < stop_s:
            raise InputError("0 < hold_s < stop_s", f"{hold_s} and {stop_s}", "hold first, then stop")
        if start is None and (limits.step or limits.velocity):
            raise InputError("start, for limits of change", "none", "give where the robot is: its first command may be far off")
        self.body, self.limits, self.period_s, self.live, self.now = body, limits, period_s, live, now
        self.hold_s, self.stop_s, self.grace_s = hold_s, stop_s, grace_s
        self.touching = threading.Lock()  # one at a time talks to the body
        self.once = threading.Lock()  # taken by whoever stops the body, for good; a signal's handler never waits for it
        self.stopped: str | None = None  # why
        self.holding = False
        self.last = None if start is None else np.asarray(start, np.float64)
        self.fresh_at: float | None = None  # of the last command, or of the try at the first
        self.sent = self.clipped = self.late = self.holds = 0

    def observe(self) -> Observation:
        """What the body sees and feels."""
        with self.touching:
            return self.body.observe()

    def send(self, action: np.ndarray, deadline: float) -> np.ndarray | None:
        """The command that was passed on; None where it came too late, or after the stop. A broken one stops the body."""
        self.fresh_at = self.now() if self.fresh_at is None else self.fresh_at
        try:
            with self.touching:  # what stops the body waits here, and nothing is sent behind its back
                return self._send(action, deadline)
        except Exception as error:  # half-way in a command there is one safe thing to do
            self.stop(f"{type(error).__name__}: {error}")
            return None

    def _send(self, action: np.ndarray, deadline: float) -> np.ndarray | None:
        if self.stopped is not None:
            return None
        if self.now() > deadline:
            self.late += 1
            return None
        action = np.asarray(action, np.float64)
        if action.shape != (len(self.limits.low),) or not np.isfinite(action).all():
            raise InputError(f"a command of {len(self.limits.low)} finite numbers", f"{action}", "look at the policy")
        command = self.limits.safe(action, self.last, self.period_s)
        if command.shape != action.shape or not np.isfinite(command).all():
            raise InputError("a finite action of the workspace's limits", f"{command}", "mend it")
        if self.live:
            self.body.send(command)
        self.clipped += bool(np.any(np.abs(command - action) > 1e-9))
        self.sent, self.last, self.fresh_at, self.holding = self.sent + 1, command, self.now(), False
        return command

    def stop(self, reason: str) -> None:
        """Ends it, once and for all. A body that hangs in a command is stopped over its head; one that cannot be stopped
        is said so, and sent nothing more."""
        if not self.once.acquire(blocking=False):
            return
        self.stopped = reason
        logger.warning("stopped: %s", reason)
        if not self.live:
            return
        try:
            with self._free():
                self.body.stop()
        except Exception:
            logger.exception("the robot could not be stopped: switch its power off")

    def check(self) -> None:
        """Holds, and later stops, where no fresh command has come."""
        if self.stopped is not None or self.fresh_at is None:
            return
        silent = self.now() - self.fresh_at
        if silent > self.stop_s:
            self.stop(f"no fresh command for {silent:.2f} s")
        elif silent > self.hold_s and not self.holding:
            try:
                with self._free():
                    if self.stopped is None and self.now() - self.fresh_at > self.hold_s:
                        self.holding, self.holds = True, self.holds + 1
                        if self.live:
                            self.body.hold()
            except Exception as error:
                self.stop(f"cannot hold: {type(error).__name__}: {error}")

    @contextmanager
    def _free(self) -> Iterator[None]:
        """The body for oneself, if need be after grace_s without its consent."""
        free = self.touching.acquire(timeout=self.grace_s)
        try:
            yield
        finally:
            if free:
                self.touching.release()

    def watch(self, every_s: float = 0.005) -> threading.Event:
        """Checks from a thread of its own, until the event is set that it gives."""
        done = threading.Event()

        def work() -> None:
            while not done.wait(every_s):
                self.check()

        threading.Thread(target=work, daemon=True, name="watchdog").start()
        return done
