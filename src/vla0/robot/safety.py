"""The safety guard, through which every command to a robot passes.

A command that passes the guard is finite, within the limits, on time, and never after the stop.
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
    """What the guard needs of a robot: your own, one of LeRobot's, or a simulated one."""

    def observe(self) -> Observation:
        """Read the cameras and the state.

        Returns:
            The observation, its `captured_at` in seconds of `time.monotonic`.
        """
        ...

    def send(self, action: np.ndarray) -> None:
        """Execute an action.

        Args:
            action: (D,), in the dataset's units.
        """
        ...

    def hold(self) -> None:
        """Keep the robot where it is, under power."""
        ...

    def stop(self) -> None:
        """Bring the robot to the safest end that it has; nothing is sent after it."""
        ...


class SafetyGuard:
    """Checks each command and passes it on to the robot, or refuses it.

    All access to the robot goes through the guard, by one thread at a time.

    A caller of `stop` (a signal handler, a key, the watchdog) sets a flag. If no other thread is
    using the robot, the caller also stops it. Otherwise the thread that is using the robot stops it
    as soon as its call returns, so that nothing is sent after the stop. When the robot hangs, the
    watchdog stops it from its own thread: during an observation after `grace_s`, during a command
    after `slow_s`, because that command may still reach the robot. If a command returns after such
    a stop, the robot is stopped a second time.

    Args:
        robot: The robot. Nothing else may use it.
        limits: The limits that each command is brought within.
        period_s: Seconds from one command to the next.
        start: (D,), where the robot is, in units of actions. Limits of change begin from it.
        live: Whether to move the robot. A dry run (False) only observes it, without even a stop.
        hold_s: Seconds without a fresh command after which the robot holds. `watch` enforces it.
        stop_s: Seconds without a fresh command after which the robot is stopped. `watch` enforces
            it.
        grace_s: Seconds for which an observation that hangs delays a hold or a stop.
        slow_s: Seconds for which a command that hangs delays a stop.
        now: The clock, in seconds.

    Raises:
        InputError: `hold_s` is not between 0 and `stop_s`, `start` is not finite, or it is missing
            although the limits restrict changes.
    """

    def __init__(
        self,
        robot: RobotInterface,
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
        self.robot = robot
        self.limits = limits
        self.period_s = period_s
        self.live = live
        self.now = now
        self.hold_s, self.stop_s, self.grace_s, self.slow_s = hold_s, stop_s, grace_s, slow_s
        # held by the one thread that uses the robot; a signal handler never waits for it
        self.touching = threading.Lock()
        self.doing: tuple[str, float] | None = None  # "look" or "command", since when
        # keeps a stop apart from a hold that is sent while an observation hangs
        self.apart = threading.Lock()
        # acquired once and never released: by the first request for a stop, by the stop itself
        self.once, self.ended = threading.Lock(), threading.Lock()
        self.stopped: str | None = None  # the reason, once a stop was requested
        self.stopped_at = 0.0
        self.over = False  # whether the robot was stopped while a call to it hung
        self.holding = False
        self.last = None if start is None else np.asarray(start, np.float64)
        self.fresh_at: float | None = None  # time of the last command, or of the first attempt
        self.sent = self.clipped = self.late = self.holds = 0

    def observe(self) -> Observation:
        """Read the robot's cameras and state."""
        with self._acquired("look"):
            return self.robot.observe()

    def send(self, action: np.ndarray, deadline: float) -> np.ndarray | None:
        """Bring an action within the limits and pass it on to the robot.

        An action that is not D finite numbers, or an error of the robot, stops the robot.

        Args:
            action: (D,), what the policy wants, in the dataset's units.
            deadline: Time by `now`, in seconds, after which the action is not executed.

        Returns:
            The command (D,) float64 that was passed on; None if the action came after the deadline
            or the stop, or caused the stop.
        """
        self.fresh_at = self.now() if self.fresh_at is None else self.fresh_at
        try:
            with self._acquired("command"):
                return self._send(action, deadline)
        except Exception as error:  # how much of the command was sent is unknown
            self.stop(f"{type(error).__name__}: {error}")
            return None

    def _send(self, action: np.ndarray, deadline: float) -> np.ndarray | None:
        """Check an action and pass it on, while the robot is acquired."""
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
        if self.stopped is not None:  # checked last, immediately before the command
            return None
        if self.live:
            self.robot.send(command)
        self.clipped += bool(np.any(np.abs(command - action) > 1e-9))
        self.sent, self.last, self.fresh_at, self.holding = (
            self.sent + 1,
            command,
            self.now(),
            False,
        )
        return command

    def stop(self, reason: str) -> None:
        """Stop the robot for good; later calls do nothing.

        It never waits, so a signal handler may call it at any point.

        Args:
            reason: Why, for the log and the report. The first caller's reason is kept.
        """
        if not self.once.acquire(blocking=False):
            return
        self.stopped_at = self.now()
        self.stopped = reason
        self._finish()
        # the signal may have interrupted a write to the same stream
        with contextlib.suppress(RuntimeError):
            logger.warning("stopped: %s", reason)

    def check(self) -> None:
        """Hold the robot after `hold_s` without a fresh command, and stop it after `stop_s`.

        After a stop was requested, it stops a robot that hangs.
        """
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
        """Call `check` regularly from a daemon thread.

        Args:
            every_s: Seconds between two checks.

        Returns:
            An event. Setting it ends the thread.
        """
        done = threading.Event()

        def work() -> None:
            while not done.wait(every_s):
                self.check()

        threading.Thread(target=work, daemon=True, name="watchdog").start()
        return done

    @contextmanager
    def _acquired(self, what: str) -> Iterator[None]:
        """Acquire the robot, and stop it on release if a stop was requested meanwhile."""
        with self.touching:
            self.doing = (what, self.now())
            try:
                yield
            finally:
                self.doing = None
                if self.stopped is not None:
                    self._end(again=self.over and what == "command")
        # a stop that was requested after the check above, while the lock was still held
        if self.stopped is not None:
            self._finish()

    def _hold(self) -> None:
        """Hold the robot; after `grace_s` it proceeds even though an observation hangs."""
        free = self.touching.acquire(timeout=self.grace_s)
        if not free and (self.doing or ("", 0.0))[0] != "look":
            return  # a command is on its way, so there is nothing to hold for
        try:
            with self.apart:
                if self.stopped is None and self.now() - (self.fresh_at or 0.0) > self.hold_s:
                    self.holding, self.holds = True, self.holds + 1
                    if self.live:
                        self.robot.hold()
        except Exception as error:
            self.stop(f"cannot hold: {type(error).__name__}: {error}")
        finally:
            if free:
                self.touching.release()
        if self.stopped is not None:
            self._finish()

    def _finish(self) -> None:
        """Stop the robot unless another thread is using it; that thread stops it afterwards."""
        if self.touching.acquire(blocking=False):
            try:
                self._end()
            finally:
                self.touching.release()

    def _overdue(self) -> None:
        """Stop the robot although another thread's call to it has not returned in time."""
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
        """Stop the robot, once, or a second time with `again`."""
        if not self.ended.acquire(blocking=False) and not again:
            return
        if self.live:
            try:
                with self.apart:
                    self.robot.stop()
            except Exception:
                logger.exception("the robot could not be stopped: switch its power off")
