"""Servers' policies in the evaluator: what they are sent, and what their faults become."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest

if importlib.util.find_spec("metaworld") is None:
    pytest.skip("Meta-World is an extra: make install", allow_module_level=True)

from test_client import faked

from vla0 import InputError, cli
from vla0.serve.client import NoAnswerError
from vla0.serve.evaluated import served
from vla0.sim import foreign
from vla0.sim.evaluate import EvalConfig
from vla0.sim.results import read_episodes
from vla0.sim.simulator import simulator

WORLD = simulator("metaworld")
NAMES = {"front": "observation/image", "state": "observation/state"}
CONFIG = EvalConfig(
    tasks=("reach-v3",), episodes=2, max_steps=6, image_size=56, n_action_steps=3, ensemble="none"
)
CHUNK = np.full((4, 4), 0.5, np.float32)


def openpi(chunk=CHUNK, seen=None):
    """The answers of a server that knows nothing of vla0."""

    def answer(count, message):
        if seen is not None:
            seen.append(message)
        return [{"actions": chunk, "server_timing": {"infer_ms": 1.0}}]

    return answer


def test_a_server_of_openpis_is_sent_its_own_names(tmp_path):
    seen = []
    with faked(openpi(seen=seen), {}) as url:
        policy = served(url, WORLD, NAMES, "reach the goal")
        assert (policy.chunk_size, policy.n_action_steps) == (4, None)
        lines = foreign.trial(policy, url, CONFIG, tmp_path, workers=1)
    assert [line["error"] for line in lines] == [None, None]
    assert {"observation/image", "observation/state", "prompt"} <= set(seen[1])
    assert seen[1]["observation/image"].shape == (56, 56, 3)
    assert seen[1]["observation/state"].shape == (4,)
    assert len(seen) == 1 + 2 * 2  # once for the size, twice an episode of six steps
    settings = json.loads((tmp_path / "evaluation.json").read_text())
    assert settings["checkpoint"].startswith(url)


def test_without_names_a_server_gets_the_simulators(tmp_path):
    seen = []
    with faked(openpi(seen=seen), {}) as url:
        served(url, WORLD, {}, "reach the goal")
    assert list(seen[0]["images"]) == ["front"]
    assert seen[0]["state"].shape == (4,)


def test_a_server_whose_policy_sees_the_past_is_sent_the_last_pictures(tmp_path):
    seen = []
    with faked(openpi(seen=seen), {"history": 3}) as url:
        policy = served(url, WORLD, NAMES, "reach the goal")
        lines = foreign.trial(policy, url, CONFIG, tmp_path, workers=1)
    assert [line["error"] for line in lines] == [None, None]
    asked = [message["observation/image"] for message in seen]
    assert {frames.shape for frames in asked[1:]} == {(3, 56, 56, 3)}
    first, second = asked[1], asked[2]  # of one episode, three steps apart
    assert all(np.array_equal(frame, first[-1]) for frame in first)
    assert not np.array_equal(second[0], second[-1])
    assert all(message["observation/state"].shape == (4,) for message in seen)
    with (
        faked(openpi(), {"history": 0}) as url,
        pytest.raises(InputError, match=r"a history of 1 to 64 pictures .* got 0"),
    ):
        served(url, WORLD, NAMES, "x")


@pytest.mark.parametrize(
    "fault", [[1.0], ["broken"], [{"actions": CHUNK[:2]}], [{"actions": CHUNK * np.nan}]]
)
def test_a_fault_is_an_error_line_and_tried_again_and_no_failure(tmp_path, fault):
    """Late, refusing, of another shape, no numbers: at the second question of an episode."""

    asked = []  # over all connections

    def answers(count, message):
        asked.append(message)
        return fault if len(asked) == 3 else openpi()(count, message)

    with faked(answers, {}) as url:
        policy = served(url, WORLD, NAMES, "reach the goal", timeout_s=0.5)
        lines = foreign.trial(policy, url, CONFIG, tmp_path, workers=1)
    wrong = [line for line in lines if line["error"] is not None]
    assert len(wrong) == 1
    assert url in wrong[0]["error"]
    ended = [line for line in lines if line["error"] is None]
    assert sorted(line["seed"] for line in ended) == [CONFIG.first_seed, CONFIG.first_seed + 1]
    assert all(line["steps"] == 6 for line in ended)
    assert read_episodes(tmp_path / "episodes.jsonl") == lines


def test_a_server_that_is_gone_ends_the_evaluation_and_the_same_command_goes_on(tmp_path):
    asked = []

    def answers(count, message):
        asked.append(message)
        return openpi()(count, message) if len(asked) < 3 else []

    with faked(answers, {}) as url:
        policy = served(url, WORLD, NAMES, "reach the goal", timeout_s=0.2)
        with pytest.raises(InputError, match=r"none to 3 observations in a row.*goes on"):
            foreign.trial(policy, url, CONFIG, tmp_path, workers=1)
        lines = read_episodes(tmp_path / "episodes.jsonl")
        assert all(line["error"].startswith("NoChunkError") for line in lines)
    with faked(openpi(), {}) as again:
        back = replace(served(again, WORLD, NAMES, "reach the goal"), mark=policy.mark)
        lines = foreign.trial(back, again, CONFIG, tmp_path, workers=1)
    assert sum(line["error"] is None for line in lines) == 2


def test_pictures_that_are_not_named_are_sent_by_their_own_names():
    seen = []
    with faked(openpi(seen=seen), {}) as url:
        served(url, WORLD, {"state": "observation/state"}, "reach the goal")
    assert list(seen[0]["images"]) == ["front"]


@pytest.mark.parametrize("url", ["ws://", "ws://h/#x", "ws://h:abc", "ws://h:99999"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(InputError, match="correct the address"):
        served(url, WORLD, NAMES, "x")


def test_what_does_not_fit_is_refused_before_an_episode(tmp_path):
    with (
        faked(openpi(np.zeros((4, 7), np.float32)), {}) as url,
        pytest.raises(InputError, match=r"4 numbers, as the simulator takes; got shape \(4, 7\)"),
    ):
        served(url, WORLD, NAMES, "x")
    with (
        faked(openpi(), {"ensemble": "v1"}) as url,
        pytest.raises(InputError, match="sends whole chunks; got one that ensembles"),
    ):
        served(url, WORLD, NAMES, "x")
    with pytest.raises(InputError, match="'wrist'; correct it"):
        served("ws://127.0.0.1:1", WORLD, {"wrist": "x"}, "x")
    with faked(openpi(), {}) as url:
        policy = served(url, WORLD, NAMES, "x")
        with pytest.raises(InputError, match=r"--n-action-steps for a server; got none.* 4 steps"):
            foreign.trial(policy, url, CONFIG, tmp_path, own=["n_action_steps"])
    with (
        faked(lambda count, message: [], {}) as url,
        pytest.raises(NoAnswerError, match="no answer"),
    ):
        served(url, WORLD, NAMES, "x", timeout_s=0.2)


def test_the_command_takes_a_server(tmp_path, monkeypatch, capsys):
    def run(url, *words):
        sizes = ["--episodes", "1", "--max-steps", "3", "--workers", "1", "--out", str(tmp_path)]
        given = ["vla0", "eval", "--task", "reach-v3", "--policy", url, *sizes, *words]
        monkeypatch.setattr("sys.argv", given)
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code or 0
        return 0

    with faked(openpi(), {}) as url:
        keys = [word for pair in NAMES.items() for word in ("--key", "=".join(pair))]
        assert run(url, *keys, "--n-action-steps", "2") == 0
        assert "0 of 1" in capsys.readouterr().out
        assert run(url, "--device", "cpu") == 2
        assert "--device" in capsys.readouterr().err
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\n")
    with faked(openpi(), {}, file.read_text().strip()) as url:
        keys += ["--n-action-steps", "2", "--out", str(tmp_path / "keyed")]
        assert run(url, *keys) == 2
        assert "key" in capsys.readouterr().err
        assert run(url, *keys, "--api-key-file", str(file)) == 0
