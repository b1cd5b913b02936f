"""The only way to a robot: what passes here is finite, within limits, on time, and never after the
stop.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from vla0.core.spec import Observation
from vla0.errors import InputError
from vla0.robot.limits import ActionLimits

logger = logging.getLogger(__name__)


class RobotInterface(Protocol):
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


class SafetyGuard:
    """Passes commands on to a body, or does not; the body is touched through it alone, by one
    thread at a time.

    start: (D,) where the body is, for limits of change to begin from. live: without it nothing
    reaches the body, not even a stop: a dry run. hold_s: without a fresh command for so long the
    body holds; after stop_s it is stopped. Both are looked after by `watch`, whatever else hangs.

    Who stops it (a signal's handler, a key, the watchdog) sets a flag, and stops the body if nobody
    is in the middle of something with it; else who is does so on his way out, so that nothing comes
    after the stop. A look that takes longer than grace_s is not waited for; a command is, up to
    slow_s, since its wire may still come: after that the body is stopped over its head, and once
    more when the command is through.
    """

    def __init__(
        self,
        body: RobotInterface,
        limits: ActionLimits,
        period_s: float,
        start: np.ndarray | None = None,
        live: bool = False,
        hold_s: float = 0.2,
        stop_s: float = 2.0,
        grace_s: float = 0.1,
        slow_s: float = 0.6,
        now: Callable[[], float] = time.monotonic,
    ):
        if not 0 < hold_s < stop_s:
            raise InputError(
                "0 < hold_s < stop_s", f"{hold_s} and {stop_s}", "hold first, then stop"
            )
        if start is None and (limits.step or limits.velocity):
            raise InputError(
                "start, for limits of change",
                "none",
                "give where the robot is: its first command may be far off",
            )
        if start is not None and not np.isfinite(start).all():
            raise InputError("a finite start", f"{start}", "look at the robot's sensors")
        self.body, self.limits, self.period_s, self.live, self.now = (
            body,
            limits,
            period_s,
            live,
            now,
        )
        self.hold_s, self.stop_s, self.grace_s, self.slow_s = hold_s, stop_s, grace_s, slow_s
        # one at a time talks to the body; a signal's handler never waits for it
        self.touching = threading.Lock()
        self.doing: tuple[str, float] | None = None  # what, since when
        self.apart = threading.Lock()  # a hold over the head of a look that hangs, and the stop
        # taken for good: by who asks for the stop, by who does it
        self.once, self.ended = threading.Lock(), threading.Lock()
        self.stopped: str | None = None  # why
        self.stopped_at = 0.0
        self.over = False  # whether it was stopped over the head of a command
        self.holding = False
        self.last = None if start is None else np.asarray(start, np.float64)
        self.fresh_at: float | None = None  # of the last command, or of the try at the first
        self.sent = self.clipped = self.late = self.holds = 0

    def observe(self) -> Observation:
        """What the body sees and feels."""
        with self._body("look"):
            return self.body.observe()

    def send(self, action: np.ndarray, deadline: float) -> np.ndarray | None:
        """The command that was passed on; None where it came too late, or after the stop.

        A broken one stops the body.
        """
        self.fresh_at = self.now() if self.fresh_at is None else self.fresh_at
        try:
            with self._body("command"):
                return self._send(action, deadline)
        except Exception as error:  # half-way in a command there is one safe thing to do
            self.stop(f"{type(error).__name__}: {error}")
            return None

    def _send(self, action: np.ndarray, deadline: float) -> np.ndarray | None:
        action = np.asarray(action, np.float64)
        if action.shape != (len(self.limits.low),) or not np.isfinite(action).all():
            raise InputError(
                f"a command of {len(self.limits.low)} finite numbers",
                f"{action}",
                "look at the policy",
            )
        command = self.limits.safe(action, self.last, self.period_s)
        if command.shape != action.shape or not np.isfinite(command).all():
            raise InputError("a finite action of the workspace's limits", f"{command}", "mend it")
        if self.now() > deadline:
            self.late += self.stopped is None
            return None
        if self.stopped is not None:  # nothing stands between this look and the command
            return None
        if self.live:
            self.body.send(command)
        self.clipped += bool(np.any(np.abs(command - action) > 1e-9))
        self.sent, self.last, self.fresh_at, self.holding = (
            self.sent + 1,
            command,
            self.now(),
            False,
        )
        return command

    def stop(self, reason: str) -> None:
        """Ends it, once and for all.

        Never waits: it may be called where a signal has interrupted anything.
        """
        if not self.once.acquire(blocking=False):
            return
        self.stopped_at = self.now()
        self.stopped = reason
        self._finish()
        # a signal may have interrupted who was writing to the same stream
        with contextlib.suppress(RuntimeError):
            logger.warning("stopped: %s", reason)

    def check(self) -> None:
        """Holds, and later stops, where no fresh command has come; stops what hangs."""
        if self.stopped is not None:
            self._overdue()
            return
        if self.fresh_at is None:
            return
        silent = self.now() - self.fresh_at
        if silent > self.stop_s:
            self.stop(f"no fresh command for {silent:.2f} s")
        elif silent > self.hold_s and not self.holding:
            self._hold()

    def watch(self, every_s: float = 0.005) -> threading.Event:
        """Checks from a thread of its own, until the event is set that it gives."""
        done = threading.Event()

        def work() -> None:
            while not done.wait(every_s):
                self.check()

        threading.Thread(target=work, daemon=True, name="watchdog").start()
        return done

    @contextmanager
    def _body(self, what: str) -> Iterator[None]:
        """The body for oneself; stopped on the way out, where somebody has asked for it
        meanwhile.
        """
        with self.touching:
            self.doing = (what, self.now())
            try:
                yield
            finally:
                self.doing = None
                if self.stopped is not None:
                    self._end(again=self.over and what == "command")
        # asked for after the look above: nobody had the body to himself then
        if self.stopped is not None:
            self._finish()

    def _hold(self) -> None:
        free = self.touching.acquire(timeout=self.grace_s)
        if not free and (self.doing or ("", 0.0))[0] != "look":
            return  # a command is on its way: that is no silence
        try:
            with self.apart:
                if self.stopped is None and self.now() - (self.fresh_at or 0.0) > self.hold_s:
                    self.holding, self.holds = True, self.holds + 1
                    if self.live:
                        self.body.hold()
        except Exception as error:
            self.stop(f"cannot hold: {type(error).__name__}: {error}")
        finally:
            if free:
                self.touching.release()
        if self.stopped is not None:
            self._finish()

    def _finish(self) -> None:
        """Stops the body, if nobody is in the middle of something with it: he does so
        himself then.
        """
        if self.touching.acquire(blocking=False):
            try:
                self._end()
            finally:
                self.touching.release()

    def _overdue(self) -> None:
        """Stops the body over the head of who does not come back."""
        doing = self.doing
        if doing is None:
            self._finish()
        elif not self.ended.locked():
            what, since = doing
            if self.now() - max(since, self.stopped_at) > (
                self.grace_s if what == "look" else self.slow_s
            ):
                logger.warning(
                    "the robot hangs in a %s: it is stopped all the same; be ready to switch its "
                    "power off",
                    what,
                )
                self.over = True
                self._end()

    def _end(self, again: bool = False) -> None:
        if not self.ended.acquire(blocking=False) and not again:
            return
        if self.live:
            try:
                with self.apart:
                    self.body.stop()
            except Exception:
                logger.exception("the robot could not be stopped: switch its power off")
