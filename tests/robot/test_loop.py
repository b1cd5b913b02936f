"""Real time without waiting for it: a simulated arm, answers that come late, never, or wrong."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla0 import InputError, Observation
from vla0.robot.clock import RealWorld, SimulatedWorld
from vla0.robot.limits import ActionLimits
from vla0.robot.loop import MODES, Pacer, drive
from vla0.robot.safety import SafetyGuard
from vla0.serve.client import NoAnswerError

FPS, HORIZON = 20.0, 8
LIMITS = ActionLimits(low=(-1.0, -1.0), high=(1.0, 1.0), step=(0.2, 0.3))
GOAL = np.array([0.8, -0.6])


class Arm:
    """Two joints that go where they are told, and a diary of everything that reached them."""

    def __init__(self, now=lambda: 0.0):
        self.now, self.position, self.diary, self.frozen_at = now, np.zeros(2), [], None

    def observe(self):
        at = self.now() if self.frozen_at is None else self.frozen_at
        return Observation(
            {"front": np.zeros((4, 4, 3), np.uint8)}, "go", self.position.copy(), captured_at=at
        )

    def send(self, action):
        self.diary.append(("send", self.now(), action.copy()))
        self.position = action.copy()

    def hold(self):
        self.diary.append(("hold", self.now(), None))

    def stop(self):
        self.diary.append(("stop", self.now(), None))

    @property
    def sent(self):
        return [(at, action) for kind, at, action in self.diary if kind == "send"]


def towards(observation):
    """A chunk of absolute positions, a step of 0.05 each, that begins with what is committed."""
    begun = np.zeros((0, 2)) if observation.action_prefix is None else observation.action_prefix
    place = begun[-1] if len(begun) else observation.state
    chunk = list(begun)
    while len(chunk) < HORIZON:
        place = place + np.clip(GOAL - place, -0.05, 0.05)
        chunk.append(place)
    return np.array(chunk, np.float32)


def simulated(
    way="async",
    latency=lambda query: 0.0,
    predict=towards,
    steps=80,
    live=True,
    limits=LIMITS,
    **pace,
):
    """(arm, guard, report) of a run in simulated time."""
    world = SimulatedWorld(predict, latency)
    arm = Arm(world.now)
    guard = SafetyGuard(
        arm, limits, 1 / FPS, start=np.zeros(2), live=live, hold_s=0.2, stop_s=1.5, now=world.now
    )
    world.check = guard.check
    report = drive(world, guard, Pacer(fps=FPS, chunk_size=HORIZON, mode=way, **pace), steps)
    return arm, guard, report


@pytest.mark.parametrize("way", MODES)
@pytest.mark.parametrize("latency_s", [0.0, 0.03, 0.12, 0.3])
def test_the_arm_arrives_whatever_the_latency(way, latency_s):
    arm, guard, report = simulated(way, lambda query: latency_s)
    np.testing.assert_allclose(arm.position, GOAL, atol=0.02)
    assert guard.late == 0
    assert report.queries > 3
    assert all(abs(took - latency_s) < 0.06 for took in report.latency_s)


def test_asynchronous_execution_never_pauses_where_the_synchronous_way_does():
    idle = {way: simulated(way, lambda query: 0.12, steps=60)[2] for way in ("sync", "async")}
    times = {
        way: [at for at, _ in simulated(way, lambda query: 0.12, steps=60)[0].sent]
        for way in ("sync", "async")
    }
    gaps = {way: np.diff(found).max() for way, found in times.items()}
    assert gaps["async"] < 1.5 / FPS  # after the first answer a command at every tick
    assert gaps["sync"] > 2 / FPS
    assert idle["async"].idle <= 4


@pytest.mark.parametrize("latency_s", [0.22, 0.3, 0.38, 0.6])
def test_where_answers_take_most_of_a_chunk_the_asynchronous_way_moves_as_much_as_waiting_does(
    latency_s,
):
    moved = {}
    for way, pace in {"sync": {"n_action_steps": HORIZON}, "async": {}}.items():
        moved[way] = simulated(way, lambda query: latency_s, steps=300, **pace)[1].sent
    assert moved["async"] >= 0.95 * moved["sync"]
    assert moved["sync"] > 60


def test_what_is_committed_is_what_is_executed():
    asked = []

    def remembering(observation):
        asked.append(observation)
        return towards(observation)

    arm, *_ = simulated("async", lambda query: 0.12, remembering, steps=60)
    commands = [action for _, action in arm.sent]
    begun = [observation for observation in asked if observation.action_prefix is not None]
    assert len(begun) > 4
    for observation in begun:
        count = len(observation.action_prefix)
        slices = [commands[i : i + count] for i in range(len(commands) - count + 1)]
        assert any(np.allclose(observation.action_prefix, own, atol=1e-6) for own in slices)
    assert all(len(o.action_prefix) >= 3 for o in begun[1:])  # 0.12 s are three ticks of 0.05
    steps = np.abs(np.diff(commands, axis=0)).max()
    assert steps <= 0.05 + 1e-6  # no jump where one chunk takes over from another


@given(
    st.lists(
        st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf, -np.inf]), min_size=16, max_size=16
    ),
    st.sampled_from(MODES),
    st.lists(st.floats(0, 0.7), min_size=1, max_size=5),
)
def test_no_command_leaves_the_limits_or_follows_a_stop(numbers, way, latencies):
    """Whatever a policy says, and whenever."""
    arm, guard, report = simulated(
        way,
        lambda query: latencies[query % len(latencies)],
        lambda o: np.array(numbers, np.float32).reshape(8, 2),
        steps=40,
    )
    last, kinds = np.zeros(2), [kind for kind, *_ in arm.diary]
    for _, action in arm.sent:
        assert (np.abs(action) <= 1).all()
        assert (np.abs(action - last) <= np.array([0.2, 0.3]) + 1e-9).all()
        last = action
    assert kinds.count("stop") == (guard.stopped is not None)
    assert "stop" not in kinds[:-1]  # nothing after it
    if not np.isfinite(np.array(numbers)).all() and guard.sent + report.idle < report.steps:
        assert guard.stopped is not None


@given(
    st.sampled_from(["async", "ensemble"]),
    st.lists(st.floats(0, 0.7), min_size=1, max_size=5),
    st.integers(1, HORIZON),
)
def test_every_action_is_executed_in_the_tick_that_it_was_meant_for(way, latencies, n_action_steps):
    """Answers may come when they like: what was meant for a moment that has passed is not executed,
    unless the robot has waited for it: then nothing was executed since it was looked at.
    """

    def meant(observation):
        first = round(observation.captured_at * FPS)
        return (
            np.stack([first + np.arange(HORIZON), np.full(HORIZON, first)], 1).astype(np.float32)
            / 100
        )

    wide = ActionLimits(low=(-1, -1), high=(1, 1))
    arm, guard, _ = simulated(
        way,
        lambda query: latencies[query % len(latencies)],
        meant,
        90,
        limits=wide,
        n_action_steps=n_action_steps,
    )
    ticks = [int(at * FPS + 1e-6) for at, _ in arm.sent]
    for tick, (_, action) in zip(ticks, arm.sent, strict=True):
        step, looked = np.round(action * 100, 3)
        if way == "ensemble":
            assert step == tick
        else:
            waited = tick - round(step)
            assert not any(round(looked) <= other < round(looked) + waited for other in ticks)
            assert waited >= 0
    assert guard.late == 0


@given(
    st.lists(st.floats(-10, 10), min_size=2, max_size=2),
    st.lists(st.floats(-1, 1), min_size=2, max_size=2),
)
def test_safe_is_the_nearest_within_all_limits(action, last):
    limits = ActionLimits(low=(-1, -0.5), high=(1, 0.5), step=(0.3, 0.2), velocity=(1.0, 100.0))
    last = np.clip(last, limits.low, limits.high)
    safe = limits.safe(np.array(action), last, 0.1)
    assert (safe >= np.array(limits.low) - 1e-12).all()
    assert (safe <= np.array(limits.high) + 1e-12).all()
    assert (np.abs(safe - last) <= np.array([0.1, 0.2]) + 1e-12).all()
    np.testing.assert_allclose(limits.safe(safe, last, 0.1), safe)


def test_a_policy_that_dies_is_held_and_then_stopped():
    def dying(observation):
        if len(calls) > 3:
            raise NoAnswerError("the server is gone")
        calls.append(observation)
        return towards(observation)

    calls = []
    arm, _, report = simulated("async", lambda query: 0.05, dying, steps=400)
    kinds = [kind for kind, *_ in arm.diary]
    assert kinds[-2:] == ["hold", "stop"]
    at = {kind: when for kind, when, _ in arm.diary}
    assert at["hold"] - at["send"] <= 0.2 + 2 / FPS
    assert at["stop"] - at["send"] <= 1.5 + 2 / FPS
    assert report.failures > 0
    assert "no fresh command" in report.stopped


def test_a_camera_that_froze_is_not_asked_about():
    world = SimulatedWorld(towards, lambda query: 0.0)
    arm = Arm(world.now)
    arm.frozen_at = 0.0
    guard = SafetyGuard(arm, LIMITS, 1 / FPS, start=np.zeros(2), live=True, now=world.now)
    report = drive(world, guard, Pacer(fps=FPS, chunk_size=HORIZON), 200)
    assert report.stale > 0
    assert guard.stopped is not None
    assert max(at for at, _ in arm.sent) < 0.5 + HORIZON / FPS + 0.1


def test_a_dry_run_moves_nothing():
    arm, guard, _ = simulated(live=False)
    assert arm.diary == []
    assert guard.sent > 50


def test_a_command_after_its_deadline_is_not_sent():
    arm = Arm()
    guard = SafetyGuard(arm, LIMITS, 0.05, start=np.zeros(2), live=True, now=lambda: 7.0)
    assert guard.send(np.zeros(2), 6.9) is None
    assert guard.late == 1
    assert arm.diary == []


def test_after_the_stop_nothing_is_sent():
    arm = Arm()
    guard = SafetyGuard(arm, LIMITS, 0.05, start=np.zeros(2), live=True, now=lambda: 0.0)
    guard.send(np.zeros(2), 1.0)
    guard.stop("a key")
    assert guard.send(np.zeros(2), 1.0) is None
    guard.stop("another")
    guard.check()
    assert [kind for kind, *_ in arm.diary] == ["send", "stop"]


def test_a_body_that_cannot_be_stopped_is_sent_nothing_more(caplog):
    class Broken(Arm):
        def stop(self):
            raise ConnectionError("bus")

    arm = Broken()
    guard = SafetyGuard(arm, LIMITS, 0.05, start=np.zeros(2), live=True, now=lambda: 0.0)
    guard.stop("a key")
    assert "could not be stopped" in caplog.text
    assert guard.send(np.zeros(2), 1.0) is None
    assert arm.diary == []


def test_a_body_that_fails_is_stopped_at_once():
    class Broken(Arm):
        def send(self, action):
            raise ConnectionError("bus")

    arm = Broken()
    guard = SafetyGuard(arm, LIMITS, 0.05, start=np.zeros(2), live=True)
    assert guard.send(np.zeros(2), np.inf) is None
    assert "bus" in guard.stopped
    assert [kind for kind, *_ in arm.diary] == ["stop"]


def test_an_interruption_stops_the_body():
    class Interrupted(Arm):
        def observe(self):
            if len(self.sent) > 3:
                raise KeyboardInterrupt
            return super().observe()

    world = SimulatedWorld(towards, lambda query: 0.0)
    arm = Interrupted(world.now)
    guard = SafetyGuard(arm, LIMITS, 1 / FPS, start=np.zeros(2), live=True, now=world.now)
    with pytest.raises(KeyboardInterrupt):
        drive(world, guard, Pacer(fps=FPS, chunk_size=HORIZON), 100)
    assert [kind for kind, *_ in arm.diary][-2:] == ["send", "stop"]


def test_the_watchdog_holds_though_the_loop_hangs():
    """In real time: the body's camera blocks, the watchdog's thread does not."""
    release = threading.Event()

    class Hanging(Arm):
        def observe(self):
            if len(self.sent) > 2:
                release.wait(5)
            return super().observe()

    arm = Hanging(time.monotonic)
    guard = SafetyGuard(arm, LIMITS, 1 / FPS, start=np.zeros(2), live=True, hold_s=0.15, stop_s=0.4)
    done = guard.watch()
    thread = threading.Thread(
        target=drive, args=(RealWorld(towards), guard, Pacer(fps=FPS, chunk_size=HORIZON), 100)
    )
    thread.start()
    while guard.stopped is None:
        time.sleep(0.01)
    release.set()
    thread.join(5)
    done.set()
    kinds = [kind for kind, *_ in arm.diary]
    assert kinds[-2:] == ["hold", "stop"]
    at = {kind: when for kind, when, _ in arm.diary}
    assert 0.15 <= at["hold"] - at["send"] < 0.6
    assert 0.4 <= at["stop"] - at["send"] < 1.2


def test_a_body_that_hangs_in_a_command_is_held_and_stopped_all_the_same():
    """In real time: a bus that blocks keeps neither the watchdog nor whoever presses the key
    waiting.
    """
    release = threading.Event()

    class Stuck(Arm):
        def send(self, action):
            super().send(action)
            if len(self.sent) > 2:
                release.wait(5)

    for key in (False, True):
        release.clear()
        arm = Stuck(time.monotonic)
        guard = SafetyGuard(
            arm, LIMITS, 1 / FPS, start=np.zeros(2), live=True, hold_s=0.15, stop_s=0.4
        )
        done = guard.watch()
        thread = threading.Thread(
            target=drive, args=(RealWorld(towards), guard, Pacer(fps=FPS, chunk_size=HORIZON), 100)
        )
        thread.start()
        if key:
            time.sleep(0.3)
            asked = time.monotonic()
            guard.stop("a key")
            assert time.monotonic() - asked < 1  # it does not wait for a bus that takes five
        time.sleep(1.5)
        assert guard.stopped is not None
        assert [kind for kind, *_ in arm.diary][-1] == "stop"
        at = {kind: when for kind, when, _ in arm.diary}
        assert at["stop"] - at["send"] < 1.4
        release.set()
        thread.join(5)
        done.set()
        # the command that was stuck is not followed by another
        assert [kind for kind, *_ in arm.diary][-1] == "stop"


def test_in_real_time_commands_leave_while_the_policy_thinks_and_never_faster_than_the_pace():
    arm, meanwhile = Arm(time.monotonic), []

    def slowly(observation):
        before = len(arm.sent)
        time.sleep(0.12)
        meanwhile.append(len(arm.sent) - before)
        return towards(observation)

    guard = SafetyGuard(arm, LIMITS, 1 / FPS, start=np.zeros(2), live=True)
    report = drive(RealWorld(slowly), guard, Pacer(fps=FPS, chunk_size=HORIZON), 60)
    gaps = np.diff([at for at, _ in arm.sent])
    # upper bounds on time would be laws about the machine; those of the pace are in simulated time
    assert np.median(gaps) > 1 / FPS - 0.02
    assert sum(moved > 0 for moved in meanwhile) > len(meanwhile) / 2
    assert report.queries > 3
    np.testing.assert_allclose(arm.position, GOAL, atol=0.06)


@given(
    st.sampled_from([(1007, 2), (9, 2), (8, 3), (0, 2), (2,), (1, 8, 2), ()]) | st.just("nan"),
    st.sampled_from(MODES),
)
def test_a_chunk_that_could_not_be_executed_moves_nothing(shape, way):
    chunk = np.full((8, 2), np.nan) if shape == "nan" else np.full(shape, 0.1)
    arm, guard, report = simulated(way, lambda query: 0.02, lambda observation: chunk, steps=60)
    assert arm.sent == []
    assert report.failures == report.queries - (report.queries > report.failures)
    assert guard.sent == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActionLimits(low=(0.0,), high=(1.0, 2.0)), "high: 1 finite"),
        (lambda: ActionLimits(low=(2.0,), high=(1.0,)), "low <= high"),
        (lambda: ActionLimits(low=(0.0,), high=(1.0,), step=(0.0,)), "step > 0"),
        (lambda: SafetyGuard(Arm(), LIMITS, 0.05), "start, for limits of change"),
        (
            lambda: SafetyGuard(Arm(), LIMITS, 0.05, np.zeros(2), hold_s=2.0, stop_s=1.0),
            "hold first",
        ),
        (lambda: Pacer(fps=FPS, chunk_size=HORIZON, mode="asynchronous"), "a mode of"),
        (lambda: Pacer(fps=FPS, chunk_size=HORIZON, n_action_steps=9), "n_action_steps in 1..8"),
        (lambda: Pacer(fps=0.0, chunk_size=HORIZON), "above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_workspace_of_ones_own_is_kept(spec):
    def disc(action):
        return action / max(1.0, np.linalg.norm(action) / 0.5)

    arm, guard, _ = simulated(limits=ActionLimits(low=(-1, -1), high=(1, 1), workspace=disc))
    assert max(np.linalg.norm(action) for _, action in arm.sent) <= 0.5 + 1e-9
    assert guard.clipped > 0
    assert ActionLimits.of(spec).low == spec.low
