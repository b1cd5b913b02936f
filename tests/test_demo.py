"""`make demo` at a smaller size: the same script, the same recipe, fewer of everything."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("metaworld") is None:
    pytest.skip("Meta-World is an extra: uv sync --extra metaworld", allow_module_level=True)

ROOT = Path(__file__).parents[1]


def demo(out):
    words = [
        "--out",
        out,
        "--task",
        "coffee-button-v3",
        "--demonstrations",
        2,
        "--steps",
        3,
        "--episodes",
        1,
        "--install-s",
        1.5,
    ]
    return subprocess.run([sys.executable, "examples/demo.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True)


def test_a_bar_that_vanishes_says_how_many_and_the_loss_has_plain_numbers(tmp_path):
    from matplotlib import pyplot

    content = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(content)
    content.loader.exec_module(module)
    state = tmp_path / "state" / "checkpoint-3" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"log_history": [{"step": step, "loss": 4 / step} for step in range(1, 9)]}))
    row = {"episodes": 20, "low": 0.0, "high": 0.16}
    tasks = {"policy": {"reach-v3": row | {"successes": 3}}, "blank": {"reach-v3": row | {"successes": 0}}}
    module.plot({"tasks": tasks}, tmp_path, tmp_path / "plot.png")
    loss, success = pyplot.gcf().axes
    assert [text.get_text() for text in success.texts] == ["0/20"]
    labels = [label.get_text() for minor in (False, True) for label in loss.get_yticklabels(minor=minor)]
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
