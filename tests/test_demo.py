"""`make demo` at a smaller size: the same script, the same recipe, fewer of everything."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
import yaml

if importlib.util.find_spec("metaworld") is None:
    pytest.skip("Meta-World is an extra: make install", allow_module_level=True)

ROOT = Path(__file__).parents[1]
STEPS = 30


def words(out, demonstrations=2, steps=3, episodes=1):
    sizes = [
        "--demonstrations",
        demonstrations,
        "--steps",
        steps,
        "--episodes",
        episodes,
        "--install-s",
        1.5,
    ]
    return [
        sys.executable,
        "examples/demo.py",
        *map(str, ["--out", out, "--task", "coffee-button-v3", *sizes]),
    ]


def demo(out):
    return subprocess.run(words(out), cwd=ROOT, capture_output=True, text=True)


def test_a_bar_that_vanishes_says_how_many_and_the_loss_has_plain_numbers(tmp_path):
    from matplotlib import pyplot

    content = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(content)
    content.loader.exec_module(module)
    state = tmp_path / "state" / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(
        json.dumps({"log_history": [{"step": step, "loss": 4 / step} for step in range(1, 9)]})
    )
    row = {"episodes": 20, "low": 0.0, "high": 0.16}
    tasks = {
        "policy": {"reach-v3": row | {"successes": 3}},
        "blank": {"reach-v3": row | {"successes": 0}},
    }
    module.plot({"tasks": tasks}, tmp_path, tmp_path / "plot.png")
    loss, success = pyplot.gcf().axes
    assert [text.get_text() for text in success.texts] == ["0/20"]
    labels = [
        label.get_text() for minor in (False, True) for label in loss.get_yticklabels(minor=minor)
    ]
    assert {"0.5", "1", "2"} <= set(labels)
    assert not [label for label in labels if "10" in label and "^" in label]
    pyplot.close("all")


def test_the_demo_goes_from_nothing_to_results_and_keeps_what_is_done(tmp_path):
    result = demo(tmp_path / "demo")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert list(results["tasks"]) == ["policy", "blank", "random", "untrained"]
    assert all(own["coffee-button-v3"]["episodes"] == 1 for own in results["tasks"].values())
    assert list(results["seconds"]) == ["install", "collect", "train", "evaluate", "total"]
    assert results["versions"]["mujoco"] == "3.3.2"
    assert (tmp_path / "demo" / "plot.png").stat().st_size > 10_000
    assert "coffee-button-v3" in (tmp_path / "demo" / "eval" / "report.html").read_text()
    assert len(list((tmp_path / "demo" / "eval" / "videos").glob("*.mp4"))) == 4
    episodes = (tmp_path / "demo" / "eval" / "episodes.jsonl").read_text()
    assert demo(tmp_path / "demo").returncode == 0
    assert (tmp_path / "demo" / "eval" / "episodes.jsonl").read_text() == episodes


@pytest.mark.slow
def test_ctrl_c_in_any_stage_loses_no_more_than_what_was_under_way(tmp_path):
    """As a terminal sends it: to the demo, its command and all their processes."""
    out, recipe = tmp_path / "demo", tmp_path / "recipe.yaml"
    content = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    content["logging"] |= {"save_every_n_steps": 2, "log_every_n_steps": 1}
    recipe.write_text(json.dumps(content))
    command = [*words(out, 12, STEPS, 4), "--config", str(recipe)]

    def interrupted(begun):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True
        )
        until = time.monotonic() + 120
        while not begun():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert said.splitlines()[-1] == "interrupted: run again to go on"
        assert "Traceback" not in said + errors, errors

    interrupted(lambda: len(list(out.glob(".dataset.episodes-*/*.npz"))) > 1)
    assert not (out / "dataset").exists()
    interrupted((out / "train" / "last").exists)
    done = int((out / "train" / "last").resolve().name.removeprefix("step-"))
    assert 2 <= done < STEPS
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    log = out / "eval" / "episodes.jsonl"
    interrupted(lambda: log.exists() and len(log.read_text().splitlines()) > 1)
    played = log.read_text()
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert log.read_text().startswith(played)
    assert json.loads((out / "dataset" / "meta" / "info.json").read_text())["total_episodes"] == 12
    state = json.loads(
        (out / "train" / "state" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()
    )
    assert [line["step"] for line in state["log_history"] if "loss" in line] == list(
        range(1, STEPS + 1)
    )
    found = json.loads((out / "results.json").read_text())["tasks"]
    assert [own["coffee-button-v3"]["episodes"] for own in found.values()] == [4] * 4
