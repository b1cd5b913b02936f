import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from worlds import make_line, walk

from vla0 import InputError, Spec
from vla0.files import held
from vla0.sim.baselines import blanked, random_actions, swapped
from vla0.sim.evaluate import EvalConfig, evaluate, make_env
from vla0.sim.experiment import fit
from vla0.sim.results import mean_success, mend, read_episodes, suites, summary, table, wilson
from vla0.sim.workers import RolloutConfig, work, write_video


def config_of(folder, tasks=("fine",), **changes) -> EvalConfig:
    folder.mkdir(exist_ok=True)
    return EvalConfig(
        tasks=tuple(tasks),
        env=str(folder),
        **{"episodes": 3, "first_seed": 0, "ensemble": "mean", **changes},
    )


def run(tmp_path, config, policies=None, **changes):
    return evaluate(
        policies or {"policy": walk},
        4,
        config,
        tmp_path / "out",
        make_env=make_line,
        **{"workers": 3, **changes},
    )


def test_every_episode_has_its_line_video_and_actions(tmp_path):
    lines = run(tmp_path, config_of(tmp_path / "world", ("fine", "also")))
    assert {(e["task"], e["seed"]) for e in lines} == {
        (task, seed) for task in ("fine", "also") for seed in range(3)
    }
    assert all(e["success"] and e["steps"] == 7 and e["error"] is None for e in lines)
    assert read_episodes(tmp_path / "out" / "episodes.jsonl") == lines
    for line in lines:
        assert (tmp_path / "out" / line["video"]).stat().st_size > 0
        with np.load((tmp_path / "out" / line["video"]).with_suffix(".npz")) as arrays:
            assert arrays["actions"].shape == (7, 1)
            assert arrays["chunks"].shape == (7, 4, 1)
            assert arrays["queries"].tolist() == list(range(7))


def test_a_video_shows_what_was_seen(tmp_path):
    import av

    line = run(tmp_path, config_of(tmp_path / "world", episodes=1))[0]
    with av.open(str(tmp_path / "out" / line["video"])) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 7
    np.testing.assert_allclose([f.mean() for f in frames], [0, 30, 60, 90, 120, 150, 180], atol=4)


def test_environments_share_one_batched_policy(tmp_path):
    sizes = []

    def counted(observations):
        sizes.append(len(observations))
        return walk(observations)

    run(tmp_path, config_of(tmp_path / "world", episodes=6), {"policy": counted}, workers=6)
    assert sum(sizes) == 6 * 7
    assert max(sizes) > 1


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import worlds
from vla0.sim.evaluate import EvalConfig, evaluate
with Path("begun").open("a") as file:
    file.write(__name__ + "\\n")
def own(config, task):
    return worlds.make_line(config, task)
config = EvalConfig(tasks=("fine",), env={world!r}, episodes=3, first_seed=0, ensemble="mean")
def play():
    evaluate({{"policy": worlds.walk}}, 4, config, Path("out"), make_env={made}, workers=2)
{called}
"""


@pytest.mark.parametrize(
    ("made", "called", "names"),
    [
        ("worlds.make_line", "play()", ["__main__"]),
        ("own", "if __name__ == '__main__': play()", ["__main__", "__mp_main__", "__mp_main__"]),
    ],
    ids=["a script without a guard", "a script that defines its world"],
)
def test_worlds_do_not_run_the_script_again_unless_they_need_it(tmp_path, made, called, names):
    (tmp_path / "world").mkdir()
    tests = str(Path(__file__).parents[1])
    text = SCRIPT.format(tests=tests, world=str(tmp_path / "world"), made=made, called=called)
    (tmp_path / "script.py").write_text(text)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "begun").read_text().split() == names
    assert sum(line["success"] for line in read_episodes(tmp_path / "out" / "episodes.jsonl")) == 3


def test_every_policy_sees_the_same_seeds(tmp_path):
    lines = run(
        tmp_path,
        config_of(tmp_path / "world"),
        {"policy": walk, "random": random_actions([-0.1], [0.1], 4)},
    )
    rows = summary(lines)
    assert (rows["policy"]["fine"]["successes"], rows["random"]["fine"]["successes"]) == (3, 0)
    assert {e["seed"] for e in lines if e["policy"] == "random"} == {0, 1, 2}


@pytest.mark.parametrize("trouble", ["raises", "dies"])
def test_a_crash_is_an_error_line_and_a_new_attempt(tmp_path, trouble):
    lines = run(tmp_path, config_of(tmp_path / "world", (trouble,)))
    errors = [line for line in lines if line["error"]]
    assert [(e["seed"], e["success"]) for e in errors] == [(1, None)]
    row = summary(lines)["policy"][trouble]
    assert (row["episodes"], row["successes"], row["errors"]) == (3, 3, 1)


@pytest.mark.parametrize("trouble", ["raises", "dies"])
def test_a_crash_that_stays_is_given_up_and_never_a_failure(tmp_path, trouble):
    config = config_of(tmp_path / "world", (trouble,))
    (tmp_path / "world" / "always").touch()
    lines = run(tmp_path, config)
    row = summary(lines)["policy"][trouble]
    assert (row["episodes"], row["successes"], row["errors"]) == (2, 2, 3)
    assert mean_success(summary(lines)["policy"]) == 1.0
    assert len(run(tmp_path, config)) == 5  # given up is given up


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    config, calls = config_of(tmp_path / "world", episodes=8), []

    def breaks(observations):
        calls.append(1)
        if len(calls) > 10:
            raise KeyboardInterrupt
        return walk(observations)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, config, {"policy": breaks}, workers=2)
    before = read_episodes(tmp_path / "out" / "episodes.jsonl")
    assert 0 < len(before) < 8
    with (tmp_path / "out" / "episodes.jsonl").open("a") as file:
        file.write('{"policy": "policy", "ta')  # what a kill leaves
    lines = run(tmp_path, config)
    assert lines[: len(before)] == before
    assert sorted(line["seed"] for line in lines) == list(range(8))
    assert run(tmp_path, config, {"policy": None}) == lines  # nothing is left to do


def test_an_error_of_the_policy_rises(tmp_path):
    def broken(observations):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, config_of(tmp_path / "world"), {"policy": broken})
    assert read_episodes(tmp_path / "out" / "episodes.jsonl") == []


def test_actions_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(InputError, match="nothing was executed"):
        run(tmp_path, config_of(tmp_path / "world"), {"policy": lambda o: walk(o) * np.nan})


def test_a_world_that_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(InputError, match="a known task"):
        run(tmp_path, config_of(tmp_path / "world", ("unknown",)))


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    run(tmp_path, config_of(tmp_path / "world"))
    with pytest.raises(InputError, match="n_action_steps"):
        run(tmp_path, config_of(tmp_path / "world", n_action_steps=2))
    # more of the same is no other setting
    assert len(run(tmp_path, config_of(tmp_path / "world", episodes=4))) == 4


def test_another_checkpoint_in_the_same_folder_is_refused(tmp_path):
    config = config_of(tmp_path / "world")
    lines = run(tmp_path, config, identity={"checkpoint": "one", "versions": {"mujoco": "3.3.2"}})
    with pytest.raises(InputError, match="checkpoint one"):
        run(tmp_path, config, identity={"checkpoint": "two", "versions": {"mujoco": "3.3.2"}})
    with pytest.raises(InputError, match="versions"):
        run(tmp_path, config, identity={"checkpoint": "one", "versions": {"mujoco": "3.4.0"}})
    assert read_episodes(tmp_path / "out" / "episodes.jsonl") == lines


def test_ensembling_that_would_do_nothing_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(InputError, match="would do nothing"):
        run(tmp_path, config_of(tmp_path / "world", n_action_steps=4, ensemble="v1"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"episodes": 0}, {"tasks": ()}, {"tasks": "one"}, {"max_steps": 0}]
)
def test_incoherent_settings_are_refused(change):
    with pytest.raises(InputError):
        EvalConfig(**{"tasks": ("a",), **change})


def test_an_unknown_simulator_is_refused():
    with pytest.raises(InputError, match="did you mean 'metaworld'"):
        make_env(EvalConfig(tasks=("a",), env="meta"), "a")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"cameras": ("top",)}, "'top'"), ({"low": (0.0,), "high": (1.0,)}, "1 in the check")],
)
def test_a_checkpoint_that_does_not_fit_the_simulator_is_refused(change, words):
    pytest.importorskip("metaworld")
    fits = {
        "low": (0.0,) * 4,
        "high": (1.0,) * 4,
        "fps": 80.0,
        "cameras": ("front",),
        "base_model": "tiny",
    }
    fit(Spec(**fits), "metaworld")
    with pytest.raises(InputError, match=words):
        fit(Spec(**{**fits, **change}), "metaworld")


@pytest.mark.parametrize(
    "bounds", [(0.0, 1.0), (-1.0, 0.0), (0.0, 0.04), (-100.0, 100.0), (0.0, 0.0)]
)
def test_a_gripper_in_other_units_than_liberos_is_refused(bounds):
    pytest.importorskip("libero")
    low, high = (*(-1.0,) * 6, bounds[0]), (*(1.0,) * 6, bounds[1])
    with pytest.raises(InputError, match="'gripper' from -1 to 1"):
        fit(Spec(low=low, high=high, fps=20.0, cameras=("agentview",), base_model="tiny"), "libero")


def test_what_a_simulator_clips_of_a_checkpoint_is_said(caplog):
    pytest.importorskip("libero")
    fits = {"fps": 20.0, "cameras": ("agentview",), "base_model": "tiny"}
    fit(Spec(low=(-0.94,) * 6 + (-1.0,), high=(1.0,) * 7, **fits), "libero")
    assert not caplog.records
    fit(Spec(low=(-50.0,) + (-1.0,) * 6, high=(1.0,) * 6 + (-1.0,), **fits), "libero")
    assert "'x' goes from -50 to 1" in caplog.text
    assert "gripper is always -1" in caplog.text


def test_the_blank_control_sees_black(tmp_path):
    from vla0 import Observation

    seen = []
    predict = blanked(lambda observations: seen.extend(observations) or walk(observations))
    original = Observation({"front": np.full((4, 4, 3), 9, np.uint8)}, "go", np.ones(1))
    predict([original])
    assert seen[0].images["front"].max() == 0
    assert seen[0].instruction == "go"
    assert original.images["front"].min() == 9


def test_exchanged_sentences_are_those_of_the_suite():
    from vla0 import Observation

    tasks = [
        ("a/1", "open it"),
        ("b/1", "lift it"),
        ("a/2", "close it"),
        ("b/2", "drop it"),
        ("a/3", "turn it"),
    ]
    heard = []
    deaf = swapped(lambda observations: heard.extend(o.instruction for o in observations), tasks)
    deaf([Observation({}, instruction) for _, instruction in tasks])
    assert heard == ["close it", "drop it", "turn it", "lift it", "open it"]
    with pytest.raises(InputError, match="two tasks"):
        swapped(walk, [("a/1", "open it"), ("b/1", "lift it")])


def test_a_suite_is_its_tasks_together():
    lines = [
        {
            "policy": "policy",
            "task": f"libero_goal/{task}",
            "seed": seed,
            "success": seed < task,
            "steps": 9,
            "error": None,
        }
        for task in (1, 3)
        for seed in range(4)
    ]
    found = suites(summary(lines)["policy"])
    assert found == {
        "libero_goal": {
            "episodes": 8,
            "successes": 4,
            "low": wilson(4, 8)[0],
            "high": wilson(4, 8)[1],
        }
    }
    shown = table(lines)
    assert [str(cell) for cell in list(shown.columns)[-1].cells] == ["", "", "VLA-0: 96.2 %", ""]
    assert suites({"drawer-close-v3": {}}) == {}


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [(0, 20, 0, 0.1611), (20, 20, 0.8389, 1), (18, 20, 0.699, 0.9721), (0, 0, 0, 1)],
)
def test_wilson_gives_the_known_intervals(successes, episodes, low, high):
    assert wilson(successes, episodes) == pytest.approx((low, high), abs=2e-4)


def test_the_table_is_a_function_of_the_lines(tmp_path):
    lines = run(
        tmp_path, config_of(tmp_path / "world", ("fine", "also")), {"policy": walk, "another": walk}
    )
    assert [(name, list(rows)) for name, rows in summary(lines).items()] == [
        ("policy", ["also", "fine"]),
        ("another", ["also", "fine"]),
    ]
    again = [json.loads(json.dumps(line)) for line in reversed(lines)]  # whoever ended first
    assert list(summary(again).items()) == list(summary(lines).items())
    assert table(again).row_count == 6


def test_a_whole_file_is_left_as_it_is(tmp_path):
    file = tmp_path / "episodes.jsonl"
    mend(file)
    file.write_text('{"a": 1}\n')
    mend(file)
    assert file.read_text() == '{"a": 1}\n'


def test_a_video_holds_what_the_policy_looked_at_or_every_step(tmp_path):
    import av

    config = EvalConfig(
        tasks=("line",),
        env=str(tmp_path),
        episodes=1,
        first_seed=0,
        n_action_steps=3,
        ensemble="none",
    )
    still = {"policy": lambda observations: np.zeros((len(observations), 4, 1), np.float32)}
    for render, frames, rate in ((False, 3, Fraction(20, 3)), (True, 8, 20)):
        evaluate(still, 4, config, tmp_path / f"{render}", 1, make_line, render=render)
        with av.open(str(tmp_path / f"{render}" / "videos" / "policy_line_0.mp4")) as video:
            assert sum(1 for _ in video.decode(video=0)) == frames
            assert video.streams.video[0].average_rate == rate


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    with (
        held(tmp_path / "out", "evaluation"),
        pytest.raises(InputError, match="for this evaluation alone"),
    ):
        run(tmp_path, config_of(tmp_path / "world"))
    run(tmp_path, config_of(tmp_path / "world"))


LINE = {
    "policy": "policy",
    "task": "a",
    "seed": 1,
    "success": True,
    "steps": 3,
    "video": "videos/a.mp4",
    "error": None,
}


def test_an_episode_is_counted_once_whoever_wrote_it(tmp_path):
    file = tmp_path / "episodes.jsonl"
    other = {**LINE, "success": False}
    file.write_text(
        "".join(
            json.dumps(line) + "\n"
            for line in (
                LINE,
                {**LINE, "error": "boom", "success": None},
                other,
                {**LINE, "seed": 2},
            )
        )
    )
    lines = read_episodes(file)
    assert [line["seed"] for line in lines] == [1, 1, 2]
    assert summary(lines)["policy"]["a"]["episodes"] == 2
    assert summary(lines)["policy"]["a"]["successes"] == 2


@pytest.mark.parametrize(
    "damaged",
    ["", "{", "[]", "7", json.dumps({**LINE, "seed": "<script>"}), json.dumps({**LINE, "policy": 3}), json.dumps({"policy": "x"}),
     json.dumps({**LINE, "success": "yes"}), json.dumps({**LINE, "steps": [1]})],
)  # fmt: skip
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damaged):
    file = tmp_path / "episodes.jsonl"
    file.write_text(f"{json.dumps(LINE)}\n{damaged}\n{json.dumps({**LINE, 'seed': 2})}\n")
    with pytest.raises(InputError, match="line 2"):
        read_episodes(file)


def test_a_kill_at_any_line_of_mending_loses_no_episode(tmp_path):
    """A process for each line: it is killed before that."""
    file, whole = tmp_path / "episodes.jsonl", b'{"policy": 1}\n{"policy": 2}\n'
    for most in range(1000):
        file.write_bytes(whole + b'{"pol')
        if (process := os.fork()) == 0:
            lines = itertools.count()

            def trace(frame, event, argument, lines=lines, most=most):
                if event == "line" and next(lines) == most:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys.settrace(trace)
            mend(file)
            os._exit(0)
        if os.waitpid(process, 0)[1] == 0:
            break
        assert file.read_bytes().startswith(whole)
    assert most > 3
    assert file.read_bytes() == whole


def test_a_process_whose_parent_is_gone_ends_in_peace(tmp_path):
    """It has asked, and nobody read it: a reset, no end of file."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    (tmp_path / "videos").mkdir()
    play = RolloutConfig(
        make_env=partial(make_line, config_of(tmp_path / "world")),
        acting=(4, 1, "mean", None, None),
        keep=1,
    )
    process = context.Process(target=work, args=(theirs, play, tmp_path))
    process.start()
    theirs.close()
    ours.send(("policy", "fine", 0))
    assert ours.poll(60)
    ours.close()
    process.join(60)
    assert process.exitcode == 0


def test_a_video_is_whole_or_not_there(tmp_path):
    rng, bad = np.random.default_rng(0), {"front": np.zeros((16, 16), np.uint8)}
    good = [{"front": rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)} for _ in range(200)]
    with pytest.raises(ValueError, match="dim"):
        write_video(tmp_path / "one.mp4", [*good, bad], 20)
    assert not list(tmp_path.iterdir())
    write_video(tmp_path / "one.mp4", good, 20)
    before = (tmp_path / "one.mp4").read_bytes()
    with pytest.raises(ValueError, match="dim"):
        write_video(tmp_path / "one.mp4", [*good, bad], 20)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("one.mp4", before)]


def test_what_a_kill_left_of_a_video_goes_with_the_next_evaluation(tmp_path):
    (tmp_path / "out" / "videos").mkdir(parents=True)
    (tmp_path / "out" / "videos" / ".partial-17-policy_fine_0.mp4").write_bytes(b"half")
    run(tmp_path, config_of(tmp_path / "world", episodes=1))
    assert sorted(file.name for file in (tmp_path / "out" / "videos").iterdir()) == [
        "policy_fine_0.mp4",
        "policy_fine_0.npz",
    ]
