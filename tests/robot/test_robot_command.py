"""`vla0 robot` on a simulated arm in real time: a server over a socket, late answers, dead cameras,
keys, recordings.
"""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import serving
from hypothesis import given
from hypothesis import strategies as st
from worlds import JOINTS, Reach, arm_spec

import vla0.sim  # noqa: F401  says how MuJoCo draws
from vla0 import InputError, Observation
from vla0.cli.act import robot_words
from vla0.robot.lerobot_robot import LeRobotBody, _age, make_robot
from vla0.robot.limits import ActionLimits
from vla0.robot.motor_limits import limits_of, refuse_elsewhere
from vla0.robot.resample import Resampled, sampled
from vla0.robot.session import RobotSession, SessionConfig
from vla0.serve.client import RemotePolicy

pytest.importorskip("mujoco", reason="the simulated arm")


@pytest.fixture
def arm():
    made = make_robot(["--robot.type=sim", "--robot.width=64", "--robot.height=48"])
    yield made
    made.disconnect()


def session(arm, url, cameras=None, limits=None, **config) -> RobotSession:
    return RobotSession(
        SessionConfig(
            **{"instruction": "reach", "live": True, "seconds": 2.0, "stop_s": 1.0, **config}
        ),
        arm,
        RemotePolicy(url, timeout_s=1.0),
        cameras,
        limits,
    )


def run_until(current, reached):
    """Run a session of one episode until something is reached; a slow machine takes longer."""
    failed = []

    def run():
        try:
            current.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive() and not reached():
        time.sleep(0.01)
    current.key("right")
    thread.join(60)
    assert not thread.is_alive()
    assert not failed, failed
    (report,) = current.reports
    return report


def commands(arm):
    return np.array([command for _, command in arm.diary]), np.array([at for at, _ in arm.diary])


def assert_within(spec, arm, start=None):
    """Every command within bounds, and none further from the last than the demonstrations went."""
    sent, _ = commands(arm)
    assert (sent >= np.array(spec.low) - 1e-6).all()
    assert (sent <= np.array(spec.high) + 1e-6).all()
    if len(sent) > 1:
        assert (np.abs(np.diff(sent, axis=0)) <= np.array(spec.max_step_change) + 1e-6).all()


@pytest.mark.parametrize("way", ["sync", "async", "ensemble"])
def test_the_arm_reaches_its_goal_though_answers_are_late(arm, way):
    meanwhile = []

    def late(query):
        before, until = len(arm.diary), time.monotonic() + (0.15 if way == "sync" else 0.6)
        while time.monotonic() < until and len(arm.diary) == before:
            time.sleep(0.01)
        meanwhile.append(len(arm.diary) - before)
        return 0.0

    # chunks of 1.6 s outlast an answer on a machine on which a picture takes half a second
    policy = Reach(arm_spec(fps=5.0), latency_s=late)
    with serving(policy) as (url, _):
        (report,) = session(arm, url, mode=way, seconds=5.0).run()
    sent, _ = commands(arm)
    assert report.stopped is None
    assert_within(policy.spec, arm)
    np.testing.assert_allclose(sent[-1], policy.goal, atol=3)
    # whether it moves while an answer is on its way; how evenly is a law in simulated time
    assert (max(meanwhile) > 0) == (way != "sync")


def test_whatever_a_policy_says_and_when_no_command_leaves_the_limits(arm):
    policy = Reach(latency_s=lambda query: (0.0, 0.3, 0.05, 0.5)[query % 4], wild=300.0)
    with serving(policy) as (url, _):
        limits = {"low": {JOINTS[0]: -5.0}, "high": {JOINTS[0]: 5.0}}
        current = session(arm, url, limits=limits, seconds=30.0)
        report = run_until(current, lambda: policy.queries > 4 and len(arm.diary) > 20)
    assert_within(policy.spec, arm)
    assert np.abs(commands(arm)[0][:, 0]).max() <= 5
    assert report.queries > 3


def test_a_dry_run_says_what_it_would_have_sent(arm):
    told = []
    with serving(Reach()) as (url, _):
        current = session(arm, url, live=False, seconds=1.0)
        current.told = told.append
        current.run()
    lines = [line for line in told if "would have gone" in line]
    assert [line.split()[0] for line in lines] == list(JOINTS)


def test_a_dry_run_sends_nothing(arm):
    with serving(Reach()) as (url, _):
        current = session(arm, url, live=False, seconds=30.0)
        run_until(current, lambda: current.guard is not None and current.guard.sent > 10)
    assert current.guard.sent > 10
    assert arm.diary == []


def test_a_server_that_dies_is_held_and_then_stopped(arm):
    with serving(Reach()) as (url, _):
        current = session(arm, url, seconds=30.0)
        held, original = [], current.body.hold
        current.body.hold = lambda: (held.append(time.monotonic()), original())
        thread = threading.Thread(target=current.run)
        thread.start()
        while len(arm.diary) < 30:
            time.sleep(0.01)
    before = len(arm.diary)
    thread.join(10)
    assert not thread.is_alive()
    assert "no fresh command" in current.reports[0].stopped
    assert len(arm.diary) - before <= 8  # what was left of the chunk
    assert arm.diary[-1][0] <= held[0]


@pytest.mark.parametrize("fault", ["frozen", "silent"])
def test_a_camera_that_sees_nothing_new_is_not_acted_upon(arm, fault):
    with serving(Reach(goal=(1e3,) * 6)) as (url, _):
        current = session(arm, url, seconds=30.0)
        thread = threading.Thread(target=current.run)
        thread.start()
        while len(arm.diary) < 20:
            time.sleep(0.01)
        setattr(arm.cameras["wrist"], fault, True)
        before = len(arm.diary)
        thread.join(10)
    assert current.reports[0].stale > 0
    assert "no fresh command" in current.reports[0].stopped
    # half a second until it is known to be stale, and what was left of the chunk
    assert len(arm.diary) - before <= 0.5 * 20 + 8 + 2


def test_frames_that_are_dropped_now_and_then_do_no_harm(arm):
    policy = Reach()
    with serving(policy) as (url, _):
        current = session(arm, url, seconds=2.5)
        thread = threading.Thread(target=current.run)
        thread.start()
        arm.cameras["front"].silent = True  # from the beginning
        for _ in range(6):
            arm.cameras["front"].silent = True
            time.sleep(0.15)
            arm.cameras["front"].silent = False
            time.sleep(0.1)
        thread.join(10)
    assert current.reports[0].stopped is None
    np.testing.assert_allclose(commands(arm)[0][-1], policy.goal, atol=3)


def command_line(url, *words):
    code = "from vla0.cli import main; main()"
    size = ["--robot.width=64", "--robot.height", "48"]
    return [
        sys.executable,
        "-c",
        code,
        "robot",
        "--policy-url",
        url,
        "--instruction",
        "reach",
        "--robot",
        "sim",
        *size,
        *words,
    ]


def test_the_command_records_what_was_sent_beside_what_was_predicted(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    policy = Reach(wild=3.0)
    out, shown = tmp_path / "recorded", tmp_path / "shown.rrd"
    with serving(policy) as (url, _):
        words = [
            "--live",
            "--episodes",
            "2",
            "--seconds",
            "1.2",
            "--reset-s",
            "0.2",
            "--out",
            str(out),
            "--view",
            str(shown),
        ]
        done = subprocess.run(
            command_line(url, *words), capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr + done.stdout
    dataset = LeRobotDataset("local/recorded", root=out, video_backend="pyav")
    assert dataset.meta.total_episodes == 2
    assert dataset.meta.fps == 20
    assert 12 <= dataset.meta.episodes[0]["length"] <= 25
    table = dataset.hf_dataset.with_format("numpy")
    action, prediction = np.stack(table["action"]), np.stack(table["prediction"])
    chunk, age = (
        np.stack(table["chunk"]).reshape(-1, 8, 6),
        np.ravel(table["chunk_age"]).astype(int),
    )
    assert dataset.meta.features["action"]["names"] == list(JOINTS)
    assert (np.abs(action - prediction) > 1e-3).any()  # the wild policy was kept within its limits
    reached = (age >= 0) & (age < 8)
    rows = np.flatnonzero(reached)
    np.testing.assert_allclose(prediction[rows], chunk[rows, age[rows]], atol=1e-4)
    assert dataset[3]["observation.images.front"].shape == (3, 48, 64)
    assert shown.stat().st_size > 10_000
    assert "recorded" in done.stdout


def test_a_key_says_whether_an_episode_succeeded_and_the_recording_keeps_it(arm, tmp_path):
    """Three episodes: success, failure, and none said; what `vla0 rl --offline` reads of them."""
    from vla0.data.config import DataConfig
    from vla0.data.lerobot import Source
    from vla0.rl.offline import verdicts

    out, told = tmp_path / "recorded", []
    keys = iter(["s", "f", "right"])
    with serving(Reach()) as (url, _):
        current = session(arm, url, seconds=20.0, episodes=3, reset_s=0.1, out=out)
        current.told = told.append
        thread = threading.Thread(target=current.run)
        current.key("s")  # before there is an episode: said, and not taken for one
        thread.start()
        for key in keys:
            count = len(arm.diary)
            while len(arm.diary) < count + 8 or not current.acting:
                time.sleep(0.01)
            current.key(key)
        thread.join(60)
    assert sum("none is running" in line for line in told) == 1
    recorded = [line for line in told if line.startswith("recorded")]
    assert ["succeeded" in line for line in recorded] == [True, False, False]
    assert ["failed" in line for line in recorded] == [False, True, False]
    source = Source(DataConfig(dataset=str(out)))
    assert verdicts(source) == {0: True, 1: False}
    success = source.dataset.column("next.success")[:, 0]
    assert np.flatnonzero(success).tolist() == [int(source.end[0]) - 1]  # its last step alone


def test_a_viewer_that_takes_nothing_keeps_nobody_waiting(arm, caplog):
    """It listens and never reads: rerun itself would wait for it without end."""
    silent = socket.create_server(("127.0.0.1", 0))
    with serving(Reach()) as (url, _):
        current = session(
            arm, url, seconds=30.0, view=f"rerun+http://127.0.0.1:{silent.getsockname()[1]}/proxy"
        )
        report = run_until(current, lambda: len(arm.diary) >= 25)
    assert report.steps >= 25
    assert len(arm.diary) >= 20
    assert "has not taken everything" in caplog.text
    silent.close()


@pytest.mark.parametrize("to", ["rerun+http://127.0.0.1:9/proxy", "screen"])
def test_a_viewer_that_is_not_there_is_said_so_before_the_arm_moves(arm, to):
    with serving(Reach()) as (url, _), pytest.raises(InputError, match="viewer"):
        session(arm, url, view=to).run()
    assert not arm.is_connected


@pytest.mark.parametrize("how", ["key", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_key_or_a_signal_stops_the_arm_at_once(tmp_path, how):
    """In a terminal of its own, as whoever stands beside the arm has one."""
    out = tmp_path / "recorded"
    with serving(Reach()) as (url, _):
        ours, theirs = pty.openpty()
        words = command_line(url, "--live", "--seconds", "30", "--out", str(out))
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
        process = subprocess.Popen(
            words,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        text = read_until(ours, "limits", "most a step", 60)
        while not (out / "meta" / "info.json").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.write(ours, b" ") if how == "key" else process.send_signal(getattr(signal, how))
        text += read_until(ours, "Enter", "Enter", 20)
        os.write(ours, b"\n")
        text += read_until(ours, None, None, 20)
        assert process.wait(20) == (1 if how == "key" else 130), text
    assert re.search("stopped: (key 'space'|SIG)", text), text
    assert "recorded" in text


def read_until(terminal, *marks_and_limit) -> str:
    """What a terminal shows until one of the marks, its end, or the time is up."""
    *marks, limit_s = marks_and_limit
    text, until = "", time.monotonic() + limit_s
    while time.monotonic() < until and not any(mark and mark in text for mark in marks):
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the other end is closed
                break
    return text


def test_a_folder_that_cannot_be_made_is_refused_in_words(arm, tmp_path):
    (tmp_path / "file").write_text("")
    with serving(Reach()) as (url, _), pytest.raises(InputError, match="--out"):
        session(arm, url, out=tmp_path / "file" / "recorded").run()
    assert arm.diary == []
    assert not arm.is_connected


def test_a_server_that_averages_already_is_refused(arm):
    with (
        serving(Reach(), ensemble="v1") as (url, _),
        pytest.raises(InputError, match="serve without --ensemble"),
    ):
        session(arm, url)


def test_a_session_in_which_no_command_came_is_no_success(arm):
    with serving(Reach(latency_s=lambda query: 2.0)) as (url, _):
        (report,) = session(arm, url, seconds=1.0).run()
    assert report.stopped == "no command ever came"
    assert arm.diary == []


@pytest.mark.slow
def test_ctrl_c_twice_in_a_hurry_loses_no_episode(tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    out = tmp_path / "recorded"
    with serving(Reach()) as (url, _):
        process = subprocess.Popen(
            command_line(url, "--live", "--seconds", "30", "--out", str(out)),
            stdout=subprocess.PIPE,
            text=True,
        )
        while not (out / "meta" / "info.json").exists():
            time.sleep(0.05)
        time.sleep(1.5)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "recorded" in text
    assert LeRobotDataset("local/recorded", root=out, video_backend="pyav").meta.total_episodes == 1


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (
            {"cameras": ("front", "top")},
            {},
            "expected a camera 'top' of the robot; got .'front', 'wrist'.",
        ),
        ({"depth": (("front", 0.1, 2.0),)}, {}, "depth maps from 'front'"),
        ({"action_names": (*JOINTS[:5], "claw.pos")}, {}, "no 'claw.pos'"),
        (
            {"action_names": None, "low": (0.0,) * 4, "high": (1.0,) * 4, "max_step_change": None},
            {},
            "action of 4 numbers",
        ),
        ({"state_names": None, "state": ((0.0,) * 7, (1.0,) * 7)}, {}, "state of 7 numbers"),
        (
            {
                "action_names": JOINTS[:4],
                "low": (0.0,) * 4,
                "high": (1.0,) * 4,
                "max_step_change": None,
            },
            {},
            "alone; got also",
        ),
        ({"fps": 30.0}, {"fps": 20.0}, "give --resample"),
        ({}, {"mode": "fast"}, "a mode of"),
        ({}, {"fps": 0.0}, "fps of 0.1 or more; got 0"),
        ({}, {"seconds": -1.0}, "seconds of 0.1 or more; got -1"),
        ({}, {"limits": {"lo": 1.0}}, "did you mean 'low'"),
        ({}, {"limits": {"low": {"gripper": 1.0}}}, "did you mean 'gripper.pos'"),
        ({}, {"limits": {"low": [1.0, 2.0]}}, "6 numbers"),
        (
            {},
            {"limits": {"low": {"gripper.pos": 30.0}, "high": {"gripper.pos": 20.0}}},
            "low <= high of 'gripper.pos'; got 30 and 20",
        ),
        ({}, {"cameras": {"side": "front"}}, "cameras of the checkpoint"),
        ({"low": (200.0,) * 6, "high": (300.0,) * 6}, {}, "near 200..300, its limits"),
        (
            {"max_step_change": None},
            {},
            "a limit of change for each action, to move live; got none of 'shoulder_pan.pos'",
        ),
        (
            {"max_step_change": None},
            {"limits": {"step": dict.fromkeys(JOINTS[:5], 3.0)}},
            "a limit of change for each action, to move live; got none of 'gripper.pos'",
        ),
    ],
)
def test_a_checkpoint_of_another_robot_is_refused_before_it_moves(arm, spec, config, message):
    with serving(Reach(arm_spec(**spec))) as (url, _), pytest.raises(InputError, match=message):
        session(arm, url, **config).run()
    assert arm.diary == []


def test_limits_of_ones_own_let_a_checkpoint_move_whose_data_do_not_say_how_fast(arm):
    with serving(Reach(arm_spec(max_step_change=None))) as (url, _):
        session(arm, url, live=False, seconds=0.3).run()  # a dry run needs none
        limits = {"step": dict.fromkeys(JOINTS[:5], 2.0), "velocity": {JOINTS[5]: 30.0}}
        run_until(session(arm, url, limits=limits, seconds=30.0), lambda: len(arm.diary) > 5)
    sent, _ = commands(arm)
    assert len(sent) > 5
    assert (np.abs(np.diff(sent, axis=0)) <= np.array([2.0] * 5 + [1.5]) + 1e-6).all()


def test_a_demonstration_may_begin_a_step_outside_of_where_its_actions_led():
    limits = ActionLimits(low=(16.0,), high=(24.0,), step=(5.0,))
    for start in (7.5, 32.5):
        refuse_elsewhere(np.array([start]), limits, ["gripper.pos"])
    for start in (6.5, 33.5):
        with pytest.raises(InputError, match="its limits"):
            refuse_elsewhere(np.array([start]), limits, ["gripper.pos"])


class Carried:
    """A robot that moves by commands and by hand alone, as real ones do."""

    def __init__(self, robot):
        self.robot = robot

    def __getattr__(self, name):
        if name == "go_by_itself":
            raise AttributeError(name)
        return getattr(self.robot, name)


def test_an_arm_that_nobody_can_carry_goes_to_its_limits_by_itself_and_a_real_one_is_refused():
    arm = make_robot(
        ["--robot.type=sim", "--robot.width=64", "--robot.height=48", "--robot.seed=10000"]
    )
    try:
        arm.connect()
        start = np.array([arm.get_observation()[name] for name in JOINTS])
        arm.disconnect()
        low = start + np.array([12, 5, -15, 10, -5, 10])  # of few demonstrations, elsewhere
        high = start + np.array([16, 10, -10, 15, 5, 20])
        low[4] = high[4] = 0.0  # a joint that never moved
        most = (6.0, 6.0, 6.0, 6.0, 0.0, 20.0)
        spec, said = arm_spec(low=tuple(low), high=tuple(high), max_step_change=most), []
        with serving(Reach(spec)) as (url, _):
            own = session(Carried(arm), url)
            with pytest.raises(
                InputError, match=r"'shoulder_pan.pos' near .*, its limits; got .*; move it there"
            ):
                own.run()
            assert arm.diary == []
            assert np.abs(arm.joints - start).max() < 1
            own = session(arm, url)
            own.told = said.append
            report = own.run()[0]
        assert report.stopped is None
        assert "by itself" in said[0]
        assert len(arm.diary) > 10
        sent, _ = commands(arm)
        assert (np.clip(sent, np.array(low) - 1e-6, np.array(high) + 1e-6) == sent).all()
        assert (np.abs(arm.joints - np.clip(arm.joints, low, high)) < 3).all()
    finally:
        arm.disconnect()


def test_relative_actions_are_bounded_by_the_states_of_the_demonstrations(arm):
    spec = arm_spec(relative_dims=(0, 1), state=((-50.0,) * 6, (50.0,) * 6))
    limits = limits_of(spec, LeRobotBody(arm, spec, "reach"))
    assert limits.low[:3] == (-50.0, -50.0, -60.0)
    assert limits.step == spec.max_step_change


def test_history_is_kept_from_tick_to_tick(arm):
    arm.connect()
    body = LeRobotBody(arm, arm_spec(history=3), "reach")
    first, second = body.observe(), body.observe()
    assert first.images["front"].shape == (3, 48, 64, 3)
    assert (first.images["front"] == first.images["front"][0]).all()
    np.testing.assert_array_equal(second.images["front"][:2], first.images["front"][1:])


@given(
    st.integers(1, 12),
    st.sampled_from([10.0, 15.0, 20.0, 30.0, 50.0]),
    st.sampled_from([10.0, 15.0, 20.0, 30.0, 50.0]),
)
def test_a_chunk_at_another_rate_is_the_same_motion(chunk_size, fps, loop_fps):
    chunk = np.random.default_rng(chunk_size).normal(size=(chunk_size, 2))
    resampled = Resampled(lambda observation: chunk, fps, loop_fps, chunk_size)
    found = resampled(Observation({}, "go"))
    assert len(found) == resampled.chunk_size
    assert abs(len(found) / loop_fps - chunk_size / fps) <= 1 / loop_fps  # it lasts as long
    np.testing.assert_allclose(found[0], chunk[0])
    assert (found >= chunk.min(axis=0) - 1e-9).all()
    assert (found <= chunk.max(axis=0) + 1e-9).all()
    for step, action in enumerate(found):  # at the instants that both have, both agree
        own = step / loop_fps * fps
        if abs(own - round(own)) < 1e-9 and own < chunk_size:
            np.testing.assert_allclose(action, chunk[round(own)], atol=1e-9)
    if fps == loop_fps:
        np.testing.assert_allclose(found, chunk)


def test_what_is_committed_is_asked_about_at_the_policys_own_instants():
    asked = []

    def predict(observation):
        asked.append(observation.action_prefix)
        return np.zeros((8, 1))

    committed = np.arange(5.0)[:, None]  # of a loop twice as fast
    Resampled(predict, 10.0, 20.0, 8)(Observation({}, "go", action_prefix=committed))
    np.testing.assert_allclose(asked[0], [[0.0], [2.0], [4.0]])
    np.testing.assert_allclose(sampled(np.array([[1.0]]), 10.0, 20.0, 3), 1.0)


def test_a_loop_of_another_rate_runs_once_it_is_asked_for(arm):
    policy = Reach(arm_spec(fps=10.0))
    with serving(policy) as (url, _):
        current = session(arm, url, fps=20.0, resample=True, seconds=30.0)
        report = run_until(current, lambda: len(arm.diary) > 45)
    sent, _ = commands(arm)
    assert report.steps > 45
    np.testing.assert_allclose(sent[-1], policy.goal, atol=4)
    # twice as many commands, each of half the way
    assert np.abs(np.diff(sent, axis=0)).max() <= 2 + 1e-6


def test_words_of_a_robot_are_told_from_misspelt_options():
    known = ["--live", "--seconds"]
    assert robot_words(["--robot.port", "/dev/x", "--robot.id=me"], known, "so101") == [
        "--robot.type=so101", "--robot.port=/dev/x", "--robot.id=me"
    ]  # fmt: skip
    with pytest.raises(InputError, match="did you mean '--live'"):
        robot_words(["--livee"], known, None)
    with pytest.raises(InputError, match="'stray'; remove it"):
        robot_words(["--robot.id=me", "stray"], known, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--robot.type=so10"], "did you mean 'so101_follower'"),
        (["--robot.type=so101"], "port"),
        (["--robot.type=sim", "--robot.colour=red"], "--robot.colour"),
        (["--robot.type=sim", "--robot.width=9"], "pixels"),
        ([], "give --robot sim"),
        (
            ["--robot.type=so101", "--robot.port=x", "--robot.cameras={front: "],
            "expected the node content",
        ),
    ],
)
def test_a_robot_that_is_not_described_rightly_is_refused_in_words(words, message):
    with pytest.raises(InputError, match=message):
        make_robot(words)


def test_a_robot_that_is_not_there_is_said_so_in_one_line():
    with serving(Reach(arm_spec(cameras=("front",)))) as (url, _):
        words = command_line(url)
        words[words.index("sim") :] = [
            "so101",
            "--robot.port=/dev/nowhere",
            "--camera",
            "front=front",
            "--robot.cameras={front: {type: opencv, index_or_path: 99, width: 64, height: 48, "
            "fps: 30}}",
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "a robot that answers" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("clock", [time.perf_counter, time.time])
def test_the_age_of_a_picture_is_told_whichever_clock_its_camera_counts_in(clock):
    assert 2.9 < _age("front", clock() - 3.0) < 3.2
    assert _age("front", clock()) < 0.1


@pytest.mark.parametrize("ahead", [1000, float("nan"), float("inf")])
def test_a_camera_of_an_unknown_clock_is_refused(ahead):
    taken = time.time() + ahead
    """It would be taken for fresh however long it has been frozen."""
    with pytest.raises(InputError, match="how old a picture is, could not be told"):
        _age("front", taken)
