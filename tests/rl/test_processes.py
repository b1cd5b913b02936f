"""Two processes of torchrun play and learn as one: the same episodes, the same weights in both."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import make_spec

from vla0.checkpoint.tiny import tiny_model
from vla0.policy import VLA0
from vla0.rl import processes

SMALL = {"width": 48, "layers": 2, "heads": 3}
SMALL |= {"vision_width": 32, "vision_layers": 1, "vision_heads": 2}
TESTS = Path(__file__).parents[1]
SCRIPT = """
import functools, sys, types, torch
sys.path.insert(0, {tests!r})
import worlds
from vla0.rl import processes, run as module
from vla0.rl.config import RLConfig, RolloutsConfig, RunConfig, UpdateConfig

if __name__ == "__main__":
    torch.set_num_threads(1)
    module.simulator = lambda name: types.SimpleNamespace(
        seeds=range(10, 20), heavy=False, ready=lambda: None, provenance=lambda: {{}}
    )
    module.fit = lambda spec, env: None
    module.world = functools.partial(module.world, make_env=worlds.make_sides)
    weights, left = {{}}, processes.left
    learn = module.Learner.learn

    def noted(learner, *arguments):
        told = learn(learner, *arguments)
        weights.update({{name: w.detach().clone() for name, w in learner.weights.items()}})
        return told

    module.Learner.learn = noted
    rank, count = processes.joined()
    output = sys.argv[2]
    config = RLConfig(
        checkpoint=sys.argv[1],
        simulator={{"env": "toy", "tasks": ["left", "right"], "episodes": 2, "ensemble": "none"}},
        logging=RunConfig(output_dir=output, measure_every_n_rounds=2, stop_below_best=None),
        rollouts=RolloutsConfig(group_size=6, groups=3, workers=1),
        update=UpdateConfig(
            method=sys.argv[4], learning_rate=2e-3, batch_size=32, steps_per_round=1
        ),
        num_rounds=int(sys.argv[3]),
    )
    module.main(config)
    torch.save(weights, output + f"-{{rank}}.pt")
"""


def run(tmp_path, start, output, count, method, rounds=3):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(TESTS)))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    done = subprocess.run(
        [*command, str(script), start, str(output), str(rounds), method],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def episodes(output, number):
    lines = [json.loads(line) for line in (output / "episodes.jsonl").read_text().splitlines()]
    return sorted(
        (line["policy"], line["task"], line["success"]) for line in lines if line["round"] == number
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "imitation"])
def test_two_processes_are_one_run(processor, tmp_path, method):
    spec = make_spec(
        low=(-1.0,), high=(1.0,), cameras=("front",), state=None, chunk_size=1, bins=9, crop=1.0
    )
    start = tmp_path / "start"
    VLA0(tiny_model(processor, **SMALL, seed=1), processor, spec).save_pretrained(start)
    for count in (1, 2):
        run(tmp_path, str(start), tmp_path / f"by-{count}", count, method)
    assert episodes(tmp_path / "by-1", 1) == episodes(tmp_path / "by-2", 1)
    first = [
        json.loads((tmp_path / f"by-{n}" / "rounds.jsonl").read_text().splitlines()[0])
        for n in (1, 2)
    ]
    # Successes are drawn in each process from its own: as many, but not the same.
    assert first[0]["tokens"] == pytest.approx(first[1]["tokens"], rel=0.1)
    if method == "grpo":
        # One step a round: the gradient of both together is that of one which has all episodes.
        assert first[0]["tokens"] == first[1]["tokens"]
        assert first[0]["gradient_norm"] == pytest.approx(first[1]["gradient_norm"], rel=1e-3)
    one, other = (torch.load(tmp_path / f"by-2-{rank}.pt") for rank in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    last = VLA0.from_pretrained(tmp_path / "by-2" / "last", "cpu").model.state_dict()
    assert all(torch.equal(weight, last[name]) for name, weight in one.items())
    run(tmp_path, str(start), tmp_path / "by-2", 2, method, rounds=4)  # and goes on
    rounds = (tmp_path / "by-2" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in rounds] == [1, 2, 3, 4]


def test_alone_nothing_is_shared():
    assert processes.gathered(3) == [3]
    assert processes.summed([1.0, 2.0]) == [1.0, 2.0]
    assert processes.of_the_first("a") == "a"
    weight = torch.zeros(2, requires_grad=True)
    processes.sum_gradients([weight])
    assert weight.grad is None
