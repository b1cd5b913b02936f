import json

import numpy as np
import pytest
from worlds import make_line

from vla0 import InputError
from vla0.evaluate import (
    EvalConfig,
    blanked,
    evaluate,
    make_env,
    mean_success,
    mend,
    random_actions,
    read_episodes,
    summary,
    table,
    wilson,
)  # fmt: skip


def config_of(folder, tasks=("fine",), **changes) -> EvalConfig:
    folder.mkdir(exist_ok=True)
    return EvalConfig(tuple(tasks), str(folder), **{"episodes": 3, "first_seed": 0, "ensemble": "mean", **changes})


def walk(observations):
    """Half a step a tick: solves in seven."""
    return np.full((len(observations), 4, 1), 0.5, np.float32)


def run(tmp_path, config, policies=None, **changes):
    return evaluate(policies or {"policy": walk}, 4, config, tmp_path / "out", make_env=make_line, **{"workers": 3, **changes})


def test_every_episode_has_its_line_video_and_actions(tmp_path):
    lines = run(tmp_path, config_of(tmp_path / "world", ("fine", "also")))
    assert {(e["task"], e["seed"]) for e in lines} == {(task, seed) for task in ("fine", "also") for seed in range(3)}
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


def test_every_policy_sees_the_same_seeds(tmp_path):
    lines = run(tmp_path, config_of(tmp_path / "world"), {"policy": walk, "random": random_actions([-0.1], [0.1], 4)})
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
    with pytest.raises(InputError, match="replan"):
        run(tmp_path, config_of(tmp_path / "world", replan=2))
    assert len(run(tmp_path, config_of(tmp_path / "world", episodes=4))) == 4  # more of the same is no other setting


def test_ensembling_that_would_do_nothing_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(InputError, match="would do nothing"):
        run(tmp_path, config_of(tmp_path / "world", replan=4, ensemble="v1"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"episodes": 0}, {"tasks": ()}, {"tasks": "one"}, {"max_steps": 0}])
def test_incoherent_settings_are_refused(change):
    with pytest.raises(InputError):
        EvalConfig(**{"tasks": ("a",), **change})


def test_an_unknown_simulator_is_refused():
    with pytest.raises(InputError, match="env of"):
        make_env(EvalConfig(("a",), "nowhere"), "a")


def test_the_blank_control_sees_black(tmp_path):
    from vla0 import Observation

    seen = []
    predict = blanked(lambda observations: seen.extend(observations) or walk(observations))
    original = Observation({"front": np.full((4, 4, 3), 9, np.uint8)}, "go", np.ones(1))
    predict([original])
    assert seen[0].images["front"].max() == 0
    assert seen[0].instruction == "go"
    assert original.images["front"].min() == 9


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"), [(0, 20, 0, 0.1611), (20, 20, 0.8389, 1), (18, 20, 0.699, 0.9721), (0, 0, 0, 1)]
)
def test_wilson_gives_the_known_intervals(successes, episodes, low, high):
    assert wilson(successes, episodes) == pytest.approx((low, high), abs=2e-4)


def test_the_table_is_a_function_of_the_lines(tmp_path):
    lines = run(tmp_path, config_of(tmp_path / "world", ("fine", "also")), {"policy": walk, "another": walk})
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
