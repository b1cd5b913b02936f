"""One round from recorded episodes: those that went better become likelier, and nothing is taken
for a verdict that is none.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TASKS, frame_of, make_spec

from vla0 import InputError
from vla0.checkpoint.tiny import tiny_model
from vla0.data.config import DataConfig
from vla0.data.lerobot import Source
from vla0.policy import VLA0
from vla0.rl.config import OfflineConfig, UpdateConfig
from vla0.rl.demonstrations import Demonstrations, Recorded
from vla0.rl.offline import offline, verdicts, weights_of
from vla0.rl.update import log_probabilities

SMALL = {"width": 48, "layers": 2, "heads": 3}
SMALL |= {"vision_width": 32, "vision_layers": 1, "vision_heads": 2}
COLUMNS = {"cameras": {"front": "observation.images.top"}, "state": "observation.state"}


def judged_dataset(folder: Path, said=(True, False, None, True), column: bool = True) -> Path:
    """Episodes of four steps whose actions tell their number, with a verdict each, or None."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        "observation.images.top": {
            "dtype": "image", "shape": (48, 64, 3), "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (2,), "names": None},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }  # fmt: skip
    if column:
        features["judged"] = features["next.success"]
    dataset = LeRobotDataset.create("local/judged", 10, features, root=folder, use_videos=False)
    for episode, verdict in enumerate(said):
        for step in range(4):
            frame = {
                "observation.images.top": frame_of(episode, step, 0),
                "observation.state": np.float32([step / 4, 0.5]),
                "action": np.float32([episode / 4, step / 4]),
                "next.success": np.array([step == 3 and verdict is True]),
                "task": TASKS[0],
            }
            if column:
                frame["judged"] = np.array([step == 3 and verdict is not None])
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return judged_dataset(tmp_path_factory.mktemp("judged") / "data")


@pytest.fixture(scope="module")
def start(processor, tmp_path_factory):
    spec = make_spec(
        low=(0.0, 0.0), high=(1.0, 1.0), fps=10.0, cameras=("front",), chunk_size=2, bins=20
    )
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    VLA0(tiny_model(processor, **SMALL, seed=1), processor, spec).save_pretrained(folder)
    return str(folder)


def config(start, dataset, output, **changes):
    update = {"learning_rate": 1e-3, "batch_size": 4, "steps_per_round": 4, "epochs": 3}
    return OfflineConfig(
        checkpoint=start,
        data=DataConfig(dataset=str(dataset), **COLUMNS),
        output_dir=str(output),
        update=UpdateConfig(**{**update, **changes.pop("update", {})}),
        **changes,
    )


def likelihoods(folder, dataset):
    """The mean log-probability of each episode's chunks."""
    policy = VLA0.from_pretrained(folder, "cpu")
    source = Source(DataConfig(dataset=str(dataset), **COLUMNS))
    with torch.no_grad():
        rows = [Recorded(source, row, policy.prompt) for row in range(len(source))]
        found, _ = log_probabilities(policy.model, policy.prompt, rows, 1.0)
    return found.sum(1).reshape(4, 4).mean(1)


def test_an_episode_without_a_verdict_is_neither_success_nor_failure(dataset, tmp_path):
    source = Source(DataConfig(dataset=str(dataset), **COLUMNS))
    assert verdicts(source) == {0: True, 1: False, 3: True}
    other = judged_dataset(tmp_path / "other", column=False)  # as LeRobot's own tools write it
    source = Source(DataConfig(dataset=str(other), **COLUMNS))
    assert verdicts(source) == {0: True, 1: False, 2: False, 3: True}


def test_weights_follow_how_much_better_than_its_task_an_episode_was():
    verdict = {0: True, 1: False, 2: True, 3: True}
    tasks = {0: 0, 1: 0, 2: 1, 3: 1}  # of the second task all succeeded
    assert weights_of(verdict, tasks, "filter", 1.0) == {0: 1.0, 2: 1.0, 3: 1.0}
    weights = weights_of(verdict, tasks, "weighted", 0.5)
    assert np.mean(list(weights.values())) == pytest.approx(1)
    assert weights[0] > weights[2] == weights[3] > weights[1] > 0
    assert weights[0] / weights[1] == pytest.approx(np.exp(1 / 0.5))


@pytest.mark.parametrize("how", ["filter", "weighted"])
def test_what_succeeded_becomes_likelier_than_if_it_had_failed(start, tmp_path, how):
    found = []
    for first in (True, False):
        said = (first, not first) * 2
        dataset = judged_dataset(tmp_path / f"data-{first}", said)
        last = offline(config(start, dataset, tmp_path / f"out-{first}", episodes=how))
        found.append(likelihoods(last, dataset))
    apart = found[0] - found[1]
    assert (apart[[0, 2]] > 0).all()
    assert (apart[[1, 3]] < 0).all()
    assert VLA0.from_pretrained(last, "cpu").spec == VLA0.from_pretrained(start, "cpu").spec
    assert (last / "README.md").is_file()
    with pytest.raises(InputError, match="a new output_dir"):
        offline(config(start, dataset, tmp_path / f"out-{first}", episodes=how))


def test_so_many_demonstrations_stand_beside_what_was_played(start, dataset):
    source = Source(DataConfig(dataset=str(dataset), held_out=1, **COLUMNS))
    some = Demonstrations(source, VLA0.from_pretrained(start, "cpu").prompt, 0.25)

    def rows(played, seed):
        drawn = some.beside(played, seed)
        assert all(query.imitated and query.advantage == 1 for query in drawn)
        return [query.turn.row for query in drawn]

    assert len(set(rows(21, [0, 1]))) == 7
    assert rows(21, [0, 1]) == rows(21, [0, 1]) != rows(21, [0, 2])
    assert len(many := rows(300, [0])) == 100
    assert set(many) == set(range(12))  # the last episode is held out
    assert rows(0, [0]) == []


def test_the_end_of_an_episode_is_not_learned_beyond(start, dataset):
    source = Source(DataConfig(dataset=str(dataset), **COLUMNS))
    prompt = VLA0.from_pretrained(start, "cpu").prompt
    assert [len(Recorded(source, row, prompt).levels) for row in range(4)] == [2, 2, 2, 1]


def test_what_does_not_fit_is_refused(start, dataset, tmp_path):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            offline(config(start, dataset, tmp_path / "out", **changes))
        assert not (tmp_path / "out" / "last").exists()

    refused("episodes of", episodes="good")
    refused("temperature above 0", temperature=0.0)
    refused("played", update={"clip_high": 0.5})
    refused("played", update={"method": "imitation"})
    none = judged_dataset(tmp_path / "none", said=(None,) * 4)
    with pytest.raises(InputError, match="episodes with a verdict; got none in 4 episodes"):
        offline(config(start, none, tmp_path / "out"))
    failed = judged_dataset(tmp_path / "failed", said=(False,) * 4)
    with pytest.raises(InputError, match="an episode that succeeded"):
        offline(config(start, failed, tmp_path / "out"))
    other = dict(COLUMNS, cameras={"hand": "observation.images.top"})
    with pytest.raises(InputError, match="cameras"):
        offline(
            OfflineConfig(
                checkpoint=start,
                data=DataConfig(dataset=str(dataset), **other),
                output_dir=str(tmp_path / "out"),
            )
        )


def test_a_dataset_without_verdicts_says_how_to_record_some(start, tmp_path):
    from conftest import make_dataset

    plain = make_dataset(tmp_path / "plain", dimensions=2)
    with pytest.raises(InputError, match=r"no such column; record with `vla0 robot --live`"):
        offline(config(start, plain, tmp_path / "out"))
