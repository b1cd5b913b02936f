"""A published figure is compared with what the same protocol gives here, of every kind of policy."""

import fnmatch
import importlib.util
import json
import os
import shutil

import numpy as np
import pytest

if importlib.util.find_spec("metaworld") is None:
    pytest.skip("Meta-World is an extra: make install", allow_module_level=True)

from conftest import make_spec

from vla0 import VLA0, InputError
from vla0.checkpoint.convert import convert
from vla0.sim.published import CHECKPOINTS, Part, Published
from vla0.sim.reproduce import HIGHER, LOWER, SAME, UNCLEAR, Outcome, listing, reproduce
from vla0.sim.results import read_episodes
from vla0.sim.simulator import tasks_of

TWO = {
    "reaching": Part(percent=100.0, tasks=("reach-v3",), max_steps=3),
    "pushing": Part(percent=0.0, tasks=("push-v3",), max_steps=2),
}


def published(**changes):
    return Published(
        **{
            "model": "someone/weights",
            "source": "a paper",
            "parts": TWO,
            "episodes": 30,
            "n_action_steps": 2,
            "ensemble": "none",
            "env": "metaworld",
            "versions": {"mujoco": "1.0"},
            **changes,
        }
    )


@pytest.fixture
def ours(policy, tmp_path):
    spec = make_spec(
        low=(-1.0,) * 4, high=(1.0,) * 4, cameras=("front",), state=None, fps=80.0, action_names=None
    )  # fmt: skip
    VLA0(policy.model, policy.processor, spec).save_pretrained(tmp_path / "ours")
    return str(tmp_path / "ours")


def test_a_difference_has_newcombes_interval():
    apart, low, high = Outcome("all", 48 / 80, 80, 56, 70).difference  # his example, method 10
    np.testing.assert_allclose((apart, low, high), (0.2, 0.0524, 0.3339), atol=5e-5)


@pytest.mark.parametrize(
    ("stated", "stated_episodes", "successes", "episodes", "verdict"),
    [
        (0.947, 2000, 1890, 2000, SAME),
        (0.947, 2000, 1854, 2000, LOWER),  # the 92.7 % that others measured
        (0.947, 2000, 1950, 2000, HIGHER),
        (0.947, 2000, 19, 20, UNCLEAR),  # a wide interval proves nothing
        (0.947, 2000, 0, 10, LOWER),
        (1.0, 10, 500, 500, UNCLEAR),  # nor do few published episodes
    ],
)
def test_a_verdict_says_no_more_than_the_episodes_tell(
    stated, stated_episodes, successes, episodes, verdict
):
    assert Outcome("all", stated, stated_episodes, successes, episodes).verdict == verdict


def test_parts_are_evaluated_by_the_published_protocol_and_go_on(ours, tmp_path, monkeypatch):
    monkeypatch.setitem(CHECKPOINTS, "standin", published())
    result = reproduce("standin", tmp_path / "out", ours, episodes=2, workers=1, device="cpu")
    assert [(o.name, o.successes, o.episodes) for o in result.outcomes] == [
        ("reaching", 0, 2),
        ("pushing", 0, 2),
        ("all", 0, 4),
    ]
    assert result.outcomes[2].stated == 0.5
    assert result.outcomes[2].stated_episodes == 60
    settings = json.loads((tmp_path / "out" / "reaching" / "evaluation.json").read_text())
    assert (settings["n_action_steps"], settings["ensemble"]) == (2, "none")
    assert (settings["max_steps"], settings["tasks"]) == (3, ["reach-v3"])
    assert {line[0] for line in result.differing} == {
        "mujoco",
        "episodes of each task",
        "checkpoint",
    }
    kept = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    assert kept["parts"][0]["verdict"] == LOWER
    assert kept["versions"]["device"] == "cpu"

    lines = [read_episodes(tmp_path / "out" / part / "episodes.jsonl") for part in TWO]
    again = reproduce("standin", tmp_path / "out", ours, ["reaching"], 2, 1, "cpu")
    assert again.outcomes == result.outcomes  # the other part is known
    fewer = reproduce("standin", tmp_path / "out", ours, ["reaching"], 1, 1, "cpu")
    assert [(o.name, o.episodes) for o in fewer.outcomes] == [("reaching", 1)]
    assert lines == [read_episodes(tmp_path / "out" / part / "episodes.jsonl") for part in TWO]


def test_a_policy_of_lerobots_is_evaluated_too(tmp_path, monkeypatch):
    foreign = pytest.importorskip("test_foreign")
    name = foreign.act(tmp_path / "act").removeprefix("lerobot:")
    monkeypatch.setitem(CHECKPOINTS, "standin", published(lerobot=True, episodes=1))
    result = reproduce("standin", tmp_path / "out", name, ["reaching"], workers=1, device="cpu")
    assert result.outcomes[0].episodes == 1
    settings = json.loads((tmp_path / "out" / "reaching" / "evaluation.json").read_text())
    assert settings["image_size"] == foreign.SIDE
    assert settings["n_action_steps"] == 2


def test_what_is_unknown_is_refused_before_anything_is_fetched(tmp_path):
    with pytest.raises(InputError, match="did you mean 'vla0-libero'"):
        reproduce("vla0-lbero", tmp_path)
    with pytest.raises(InputError, match="--episodes of 1 or more"):
        reproduce("vla0-libero", tmp_path, episodes=0)
    with pytest.raises(InputError, match="did you mean 'libero_goal'"):
        reproduce("vla0-libero", tmp_path, parts=["libero_gaol"])


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_every_entry_names_tasks_that_exist(name):
    pytest.importorskip("libero")
    entry = CHECKPOINTS[name]
    for part, stated in entry.parts.items():
        tasks = tasks_of(entry.env, stated.tasks, stated.suite)
        assert {task.partition("/")[0] for task in tasks} == {part}
        assert len(tasks) == 10
    assert name in [str(cell) for cell in listing().columns[0].cells]


def test_a_run_of_the_official_code_is_fetched_without_what_nobody_reads(
    official_run, policy, tmp_path, monkeypatch
):
    hub = tmp_path / "hub"
    shutil.copytree(official_run, hub / "vla0")  # the released one may lie a folder deeper
    (hub / "videos").mkdir()
    (hub / "videos" / "episode.mp4").write_bytes(b"long")
    fetched = []

    def snapshot_download(repo, allow_patterns=(), ignore_patterns=None):
        assert repo == "someone/weights"
        for file in hub.rglob("*"):
            name = file.relative_to(hub).as_posix()
            if not file.is_file() or not any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                continue
            if any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns or ()):
                continue
            fetched.append(name)
            place, blob = tmp_path / "cache" / name, tmp_path / "blobs" / f"{len(fetched)}"
            for folder in (place.parent, blob.parent):
                folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            place.symlink_to(os.path.relpath(blob, place.parent))  # as the Hub's cache has it
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert convert("someone/weights", tmp_path / "out").chunk_size == 8
    assert VLA0.from_pretrained(tmp_path / "out", "cpu").spec.chunk_size == 8
    assert {"vla0/config.yaml", "vla0/dataset_stats.pkl"} < set(fetched)
    assert not [name for name in fetched if name.endswith((".mp4", ".pth"))]


def test_a_run_of_the_official_code_is_evaluated_in_libero(official_run, tmp_path, monkeypatch):
    pytest.importorskip("libero")
    part = Part(percent=95.0, tasks=("libero_goal/turn_on_the_stove",), max_steps=1)
    entry = published(env="libero", parts={"goal": part}, n_action_steps=1, ensemble="v1")
    monkeypatch.setitem(CHECKPOINTS, "standin", entry)
    result = reproduce("standin", tmp_path / "out", str(official_run), (), 1, 1, "cpu")
    assert (result.outcomes[0].successes, result.outcomes[0].episodes) == (0, 1)
    assert (tmp_path / "out" / "checkpoint" / "vla0.json").is_file()
    assert (tmp_path / "out" / "goal" / "report.html").is_file()
