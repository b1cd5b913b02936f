"""Nothing comes after the stop: a model of the interleavings, each point at which a signal or a
second thread can come.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla0 import InputError, Observation
from vla0.robot import safety as module
from vla0.robot.limits import ActionLimits
from vla0.robot.safety import SafetyGuard

LIMITS = ActionLimits(low=(-1.0, -1.0), high=(1.0, 1.0), step=(0.2, 0.3))
AWAY = np.array([0.1, 0.1])


class RobotInterface:
    """A diary of what reached it; two at once are an error, of ours."""

    def __init__(self):
        self.diary, self.busy = [], threading.Lock()

    def do(self, what):
        assert self.busy.acquire(blocking=False), f"{what} while something else is done"
        self.diary.append(what)
        self.busy.release()

    def observe(self):
        self.do("look")
        return Observation({}, "go", np.zeros(2))

    def send(self, action):
        self.do("send")

    def hold(self):
        self.do("hold")

    def stop(self):
        self.do("stop")


class Clock:
    """Seconds that pass when they are asked to."""

    def __init__(self):
        self.at = 0.0

    def __call__(self):
        return self.at


def made() -> tuple[SafetyGuard, RobotInterface, Clock]:
    body, clock = RobotInterface(), Clock()
    return (
        SafetyGuard(body, LIMITS, 0.1, np.zeros(2), live=True, hold_s=0.2, stop_s=1.0, now=clock),
        body,
        clock,
    )


def use(guard: SafetyGuard, clock: Clock) -> None:
    """What a loop and a watchdog do with it: look, send, hold, send again."""
    guard.observe()
    guard.send(AWAY, 10.0)
    clock.at += 0.3
    guard.check()
    guard.send(2 * AWAY, 10.0)
    guard.check()


def reached(act: Callable[[], None], number: int, every: str, injected: Callable[[], None]) -> bool:
    """Runs act, and calls `injected` at one point of the guard's code that it comes through;
    whether it came to that.

    every: "opcode" or "line", which are numbered from 0.
    """
    count, done = 0, False

    def trace(frame, event, arg):
        nonlocal count, done
        if frame.f_code.co_filename != module.__file__:
            return None
        frame.f_trace_opcodes = every == "opcode"
        if event == every:
            if count == number and not done:
                done = True
                injected()
            count += 1
        return trace

    # before settrace, which reads whether anybody wants them
    sys._getframe().f_trace_opcodes = every == "opcode"
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return done


def judged(body: RobotInterface) -> None:
    """Exactly one stop, and nothing but looks after it."""
    assert body.diary.count("stop") == 1, body.diary
    after = body.diary[body.diary.index("stop") + 1 :]
    assert set(after) <= {"look"}, body.diary


@pytest.mark.parametrize("way", ["a signal's handler", "another thread"])
def test_nothing_follows_the_stop_wherever_it_comes_from_and_whenever(way):
    """At each instruction of the guard's code that a look, commands and a hold come through."""

    def tried(number: int) -> bool:
        guard, body, clock = made()

        def stop() -> None:
            if way == "another thread":
                other = threading.Thread(target=guard.stop, args=("a key",))
                other.start()
                other.join(5)
                assert not other.is_alive()  # who asks for the stop never waits
            else:
                guard.stop("SIGINT")

        came = reached(lambda: use(guard, clock), number, "opcode", stop)
        if came:
            judged(body)
        return came

    points = 0
    while tried(points):
        points += 1
    assert points > 300


def test_nothing_follows_a_stop_that_is_interrupted_itself():
    """Each pair of lines: the stop halts at its own, the loop goes on from where it was to its end,
    then the stop goes on.
    """

    def tried(first: int, second: int) -> tuple[bool, bool]:
        guard, body, clock = made()
        here, go, lines = threading.Event(), threading.Event(), 0

        def halt(frame, event, arg):
            nonlocal lines
            if frame.f_code.co_filename != module.__file__:
                return None
            if event == "line":
                if lines == second:
                    here.set()
                    # the loop may wait for it: for the body, while it is being stopped
                    go.wait(0.02)
                lines += 1
            return halt

        def stop() -> None:
            sys.settrace(halt)
            guard.stop("a key")
            sys.settrace(None)
            here.set()

        thread = threading.Thread(target=stop)

        def begin() -> None:
            thread.start()
            assert here.wait(5)  # it stands at its line, or is through

        came = reached(lambda: use(guard, clock), first, "line", begin)
        go.set()
        if came:
            thread.join(5)
            guard.check()
            judged(body)
        return came, lines > second

    pairs, first = 0, 0
    while True:
        for second in range(100):
            came, halted = tried(first, second)
            pairs += came and halted
            if not (came and halted):
                break
        if not came:
            break
        first += 1
    assert pairs > 300


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_real_signal_in_the_middle_of_a_command_stops_after_it(kind):
    body = RobotInterface()
    fired = []

    def workspace(action):
        if not fired:
            fired.append(signal.raise_signal(kind))
        return action

    guard = SafetyGuard(
        body,
        ActionLimits(low=(-1, -1), high=(1, 1), workspace=workspace),
        0.1,
        np.zeros(2),
        live=True,
    )
    before = signal.signal(kind, lambda number, frame: guard.stop(signal.Signals(number).name))
    try:
        assert guard.send(AWAY, time.monotonic() + 1) is None
    finally:
        signal.signal(kind, before)
    assert body.diary == ["stop"]


def test_a_slow_bus_puts_nothing_on_the_wire_after_the_stop():
    class Slow(RobotInterface):
        def send(self, action):
            time.sleep(0.25)
            super().send(action)

    body = Slow()
    guard = SafetyGuard(body, LIMITS, 0.1, np.zeros(2), live=True)
    done = guard.watch()
    threading.Timer(0.05, guard.stop, ("a key",)).start()
    guard.send(AWAY, time.monotonic() + 1)
    assert guard.send(AWAY, time.monotonic() + 1) is None
    done.set()
    assert body.diary == ["send", "stop"]


def test_a_command_that_comes_through_after_all_is_stopped_again():
    """A bus that hangs: stopped over its head, as somebody may have a hand there, and once more."""

    class Hanging(RobotInterface):
        def send(self, action):
            time.sleep(0.5)
            self.diary.append("send")

        def stop(self):
            self.diary.append("stop")

    body = Hanging()
    guard = SafetyGuard(body, LIMITS, 0.1, np.zeros(2), live=True, slow_s=0.1)
    done = guard.watch()
    threading.Timer(0.05, guard.stop, ("a key",)).start()
    guard.send(AWAY, time.monotonic() + 1)
    done.set()
    assert body.diary == ["stop", "send", "stop"]


@given(st.floats(-3, 3), st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_a_start_outside_of_the_limits_comes_in_and_stays(start, wanted):
    """On the way in a command lies between the one before and the limits, nearer by a step each
    time; then within.
    """
    limits = ActionLimits(low=(-1.0, -1.0), high=(1.0, 1.0), step=(0.1, 0.1))
    guard = SafetyGuard(RobotInterface(), limits, 0.1, np.array([start, 0.0]), live=True)
    last, outside = start, abs(start) > 1
    for goal in wanted:
        command = guard.send(np.array([goal, 0.0]), np.inf)[0]
        if abs(last) > 1:
            assert abs(command) <= max(1.0, abs(last) - 0.1 + 1e-9)
            assert np.sign(command) == np.sign(last)
        else:
            assert abs(command) <= 1
        assert abs(command - last) <= 0.1 + 1e-9
        outside, last = outside and abs(command) > 1, command


def test_a_start_that_is_no_place_is_refused():
    with pytest.raises(InputError, match="a finite start"):
        SafetyGuard(RobotInterface(), LIMITS, 0.1, np.array([np.nan, 0.0]))
