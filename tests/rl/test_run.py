"""A run learns, resumes bit for bit, keeps every episode, and says when nothing can be learned."""

import dataclasses
import functools
import json
import shutil
import types
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import worlds
from conftest import make_spec

from vla0 import InputError
from vla0.checkpoint.tiny import tiny_model
from vla0.core.spec import Observation
from vla0.data.config import DataConfig, Masking
from vla0.policy import VLA0
from vla0.rl import run as module
from vla0.rl.config import RLConfig, RolloutsConfig, RunConfig, UpdateConfig
from vla0.rl.play import LEAST, Player, remembered, shares
from vla0.rl.run import main
from vla0.train.config import Lora, build

SMALL = {"width": 48, "layers": 2, "heads": 3}
SMALL |= {"vision_width": 32, "vision_layers": 1, "vision_heads": 2}
TOY = types.SimpleNamespace(
    seeds=range(10, 20), heavy=False, ready=lambda: None, provenance=lambda: {"toy": "1"}
)


@pytest.fixture(scope="module", autouse=True)
def toy():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "simulator", lambda name: TOY)
        monkeypatch.setattr(module, "fit", lambda spec, env: None)
        made = functools.partial(module.world, make_env=worlds.make_sides)
        monkeypatch.setattr(module, "world", made)
        yield


@pytest.fixture(scope="module")
def start(processor, tmp_path_factory):
    spec = make_spec(
        low=(-1.0,), high=(1.0,), cameras=("front",), state=None, chunk_size=1, bins=9, crop=1.0
    )
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    VLA0(tiny_model(processor, **SMALL, seed=1), processor, spec).save_pretrained(folder)
    return str(folder)


WAYS: dict[str, dict[str, Any]] = {
    "GRPO": {},
    "LoRA": {"lora": Lora(4)},
    "imitation": {
        "method": "imitation",
        "lr_scheduler": "linear",
        "replay_rounds": 2,
        "augmentation": Masking(mask="number"),
    },
    "demonstrations": {"demonstrations": 0.4, "augmentation": Masking(mask="number")},
}


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """A dataset in which "push right" goes to the right, and nothing is said of the left."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    picture = {"dtype": "image", "shape": (56, 56, 3), "names": ["height", "width", "channels"]}
    action = {"dtype": "float32", "shape": (1,), "names": None}
    folder = tmp_path_factory.mktemp("demonstrations") / "data"
    dataset = LeRobotDataset.create(
        "local/right", 20, {"observation.images.front": picture, "action": action}, root=folder,
        use_videos=False,
    )  # fmt: skip
    for _ in range(2):
        for _ in range(4):
            frame = {"observation.images.front": np.zeros((56, 56, 3), np.uint8)}
            dataset.add_frame({**frame, "action": np.float32([0.5]), "task": "push right"})
        dataset.save_episode()
    dataset.finalize()
    return DataConfig(dataset=str(folder), cameras={"front": "observation.images.front"})


@pytest.fixture(scope="module")
def ways(demonstrations):
    """How a run may learn: {name: what `config` takes}."""
    data = {"demonstrations": {"data": demonstrations}}
    return {way: {"update": update, **data.get(way, {})} for way, update in WAYS.items()}


@pytest.fixture(scope="module")
def whole(start, ways, tmp_path_factory):
    """The folder of a run that was not interrupted, by how it learns."""
    folders = {}
    for way, changes in ways.items():
        folders[way] = tmp_path_factory.mktemp("whole") / way
        main(config(start, folders[way], **changes))
    return folders


def config(start, output, tasks=("left", "right"), rounds=4, **changes):
    update = {"learning_rate": 2e-3, "batch_size": 32, **changes.pop("update", {})}
    logging = {"measure_every_n_rounds": 2, "stop_below_best": None, **changes.pop("logging", {})}
    rollouts = {"group_size": 6, "groups": 2, "workers": 1, **changes.pop("rollouts", {})}
    return RLConfig(
        checkpoint=start,
        simulator={"env": "toy", "tasks": list(tasks), "episodes": 2, "ensemble": "none"},
        logging=RunConfig(output_dir=str(output), **logging),
        rollouts=RolloutsConfig(**rollouts),
        update=UpdateConfig(**update),
        num_rounds=rounds,
        **changes,
    )


def weights(folder):
    return VLA0.from_pretrained(folder, "cpu").model.state_dict()


def same(one, other):
    one, other = weights(one), weights(other)
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def rounds_of(output):
    return [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]


def test_a_run_learns_keeps_every_episode_and_draws_itself(start, tmp_path):
    last = main(config(start, tmp_path / "run", rounds=20))
    rounds = rounds_of(tmp_path / "run")
    assert rounds[-1]["success"] > 0.8 > rounds[0]["success"]
    episodes = (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()
    assert len(episodes) == sum(line["episodes"] for line in rounds)
    for name in ("last", "best"):
        assert (tmp_path / "run" / name / "vla0.json").is_file()
        assert (tmp_path / "run" / name / "training.png").stat().st_size > 5000
    page = (tmp_path / "run" / "report.html").read_text()
    assert "at the start" in page
    assert "data:image/png" in page
    assert last.resolve().name == "step-000020"
    assert VLA0.from_pretrained(last, "cpu").spec.bins == 9


def test_successes_alone_are_learned_from_at_a_rate_that_falls_to_nothing(start, tmp_path):
    update = {"method": "imitation", "lr_scheduler": "linear"}
    main(config(start, tmp_path / "run", ("left",), rounds=15, update=update))
    rounds = rounds_of(tmp_path / "run")
    assert rounds[-1]["success"] > 0.8 > rounds[0]["success"]
    rates = [line["learning_rate"] for line in rounds if "learning_rate" in line]
    np.testing.assert_allclose(rates, 2e-3 * np.linspace(1, 0, 16)[: len(rates)])
    # a group that all of its members solved counts, too
    assert all(line["useful"] == 2 for line in rounds)


def test_what_was_demonstrated_is_learned_beside_what_succeeds(start, demonstrations, tmp_path):
    """Only "push left" is played. Without demonstrations of the right all goes to the left."""
    seen = {
        side: Observation({"front": np.zeros((56, 56, 3), np.uint8)}, f"push {side}")
        for side in ("left", "right")
    }
    for data, right in ((None, -1), (demonstrations, 1)):
        last = main(config(start, tmp_path / f"{right}", ("left",), rounds=15, data=data))
        policy = VLA0.from_pretrained(last, "cpu")
        assert np.sign(policy.predict_batch([seen["left"]])[0][0, 0]) == -1
        assert np.sign(policy.predict_batch([seen["right"]])[0][0, 0]) == right


def test_demonstrations_that_do_not_fit_the_checkpoint_are_refused(start, demonstrations, tmp_path):
    wrong = dataclasses.replace(demonstrations, cameras={"top": "observation.images.front"})
    with pytest.raises(InputError, match="cameras: "):
        main(config(start, tmp_path / "run", data=wrong))


def test_a_run_does_not_go_on_with_other_demonstrations(start, demonstrations, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(demonstrations.dataset, folder)
    data = dataclasses.replace(demonstrations, dataset=str(folder))
    main(config(start, tmp_path / "run", rounds=1, data=data))
    (file,) = folder.glob("data/*/*.parquet")
    table = pq.read_table(file)
    other = table.column("action").combine_chunks()
    values = pa.array([-0.5] * len(other), other.type)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", values), file)
    with pytest.raises(InputError, match="demonstrations"):
        main(config(start, tmp_path / "run", rounds=2, data=data))


def test_tasks_whose_success_is_uncertain_get_more_initial_states():
    tasks = ["solved", "even", "new"]
    tried = {"solved": [200.0, 200.0], "even": [30.0, 60.0]}
    least, even, new = shares(tasks, tried)
    assert even == pytest.approx(new)
    assert least / even == pytest.approx(LEAST / 0.25)
    later = remembered(tried, [{"task": "even", "success": True}] * 100)
    assert later["even"] == [115.0, 130.0]
    assert later["solved"] == [100.0, 100.0]
    player: Any = types.SimpleNamespace(
        settings=types.SimpleNamespace(tasks=tasks), config=types.SimpleNamespace(seed=0)
    )
    whole = Counter()
    for start in range(300):  # each wave has as many as its share says, but for rounding
        found = Counter(Player._tasks(player, start, 7, tried))
        whole += found
        for task, share in zip(tasks, shares(tasks, tried), strict=True):
            assert abs(found[task] - 7 * share) < 1
    np.testing.assert_allclose([whole[t] / 2100 for t in tasks], [least, even, new], atol=0.02)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    start, whole, ways, tmp_path, monkeypatch, way
):
    changes = ways[way]
    play, left = Player.play, [3]

    def killed(*arguments):
        left[0] -= 1
        result = play(*arguments)
        if left[0] == 0:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Player, "play", killed)
    with pytest.raises(KeyboardInterrupt):
        main(config(start, tmp_path / "cut", **changes))
    assert (tmp_path / "cut" / "last").resolve().name == "step-000002"
    monkeypatch.setattr(Player, "play", play)
    cut = main(config(start, tmp_path / "cut", **changes))
    assert same(whole[way] / "last", cut)
    assert not same(cut, start)
    keys = ("round", "success", "episodes", "useful", "tokens")
    assert [[line[key] for key in keys] for line in rounds_of(whole[way])] == [
        [line[key] for key in keys] for line in rounds_of(tmp_path / "cut")
    ]
    measured = [(run / "metrics.jsonl").read_text() for run in (whole[way], tmp_path / "cut")]
    assert measured[0] == measured[1]
    lines = [
        (run / "episodes.jsonl").read_text().splitlines() for run in (whole[way], tmp_path / "cut")
    ]
    told = [[{**json.loads(line), "seconds": 0} for line in some] for some in lines]
    assert told[0] == told[1]  # none of a round that was cut, and none twice


@pytest.mark.parametrize("moment", ["point", "rank", "prune"])
def test_a_save_that_was_cut_is_made_good(start, whole, tmp_path, monkeypatch, moment):
    original, left = getattr(module, moment), [3]  # at the start, after two rounds, at the end

    def killed(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, moment, killed)
    with pytest.raises(KeyboardInterrupt):
        main(config(start, tmp_path / "cut"))
    monkeypatch.setattr(module, moment, original)
    cut = main(config(start, tmp_path / "cut"))
    assert same(whole["GRPO"] / "last", cut)
    for name in ("metrics.jsonl", "best"):
        one, other = whole["GRPO"] / name, tmp_path / "cut" / name
        if name == "best":
            assert one.resolve().name == other.resolve().name
        else:
            assert one.read_text() == other.read_text()


def test_a_run_that_has_ended_does_nothing_more(start, tmp_path):
    main(config(start, tmp_path / "run", rounds=2))
    before = (tmp_path / "run" / "rounds.jsonl").read_bytes()
    main(config(start, tmp_path / "run", rounds=2))
    assert (tmp_path / "run" / "rounds.jsonl").read_bytes() == before
    main(config(start, tmp_path / "run", rounds=3))  # and goes on where it is given more
    assert len(rounds_of(tmp_path / "run")) == 3


def test_a_policy_that_never_or_always_succeeds_is_told_after_one_round(start, tmp_path):
    for task, expected in (("never", "episodes that succeed"), ("always", "episodes that fail")):
        with pytest.raises(InputError, match=expected):
            main(config(start, tmp_path / task, tasks=(task,)))
        assert not (tmp_path / task / "rounds.jsonl").exists()


def test_a_round_without_success_later_on_is_said_and_the_run_goes_on(
    start, tmp_path, monkeypatch, caplog
):
    main(config(start, tmp_path / "run", rounds=2))
    play = Player.play

    def unlucky(*arguments):
        result = play(*arguments)
        result.own, result.useful = [], 0
        for line in result.lines:
            line["success"] = False
        return result

    monkeypatch.setattr(Player, "play", unlucky)
    main(config(start, tmp_path / "run", rounds=3))
    assert [line["success"] for line in rounds_of(tmp_path / "run")][2] == 0
    assert "nothing was learned" in caplog.text


def test_chunks_of_which_a_part_is_executed_and_averaged(processor, tmp_path):
    """Two steps of three are written and learned, and what overlaps is averaged."""
    spec = make_spec(
        low=(-1.0, -1.0), high=(1.0, 1.0), cameras=("front",), state=None, chunk_size=3, bins=9,
        crop=1.0, history=2,
    )  # fmt: skip
    policy = VLA0(tiny_model(processor, **SMALL, seed=1), processor, spec)
    policy.save_pretrained(tmp_path / "start")
    for ensemble, steps, written in (("none", 2, 2), ("v1", 1, 3)):
        made = config(str(tmp_path / "start"), tmp_path / ensemble, rounds=1)
        acting = {**made.simulator, "n_action_steps": steps, "ensemble": ensemble}
        main(dataclasses.replace(made, simulator=acting))
        (line,) = rounds_of(tmp_path / ensemble)
        queries = 6 * line["useful"]
        assert line["tokens"] == pytest.approx(
            4 * written * queries, rel=0.1
        )  # digits, and what closes them


def test_how_to_act_is_checked_before_anything_is_written(start, tmp_path):
    made = config(start, tmp_path / "run")
    for acting in ({"n_action_steps": 2}, {"ensemble": "v1"}):
        wrong = dataclasses.replace(made, simulator={**made.simulator, **acting})
        with pytest.raises(InputError):
            main(wrong)
    with pytest.raises(InputError, match="held-out seeds beside those of rounds"):
        main(dataclasses.replace(made, simulator={**made.simulator, "first_seed": 12}))
    assert not (tmp_path / "run" / "rl_config.json").exists()
    assert not (tmp_path / "run" / "last").exists()


def test_the_folder_of_something_else_is_left_alone(start, whole, tmp_path):
    (tmp_path / "episodes.jsonl").write_text("{}\n")  # of `vla0 eval`
    with pytest.raises(InputError, match=r"another's 'episodes\.jsonl'"):
        main(config(start, tmp_path))
    assert (tmp_path / "episodes.jsonl").read_text() == "{}\n"
    run = tmp_path / "run"
    shutil.copytree(whole["GRPO"], run, symlinks=True)
    shutil.rmtree(run / "step-000004")
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(InputError, match="step-000004', which is not there"):
        main(config(start, run))
    assert before == sorted(path.name for path in run.rglob("*"))


def test_a_fall_is_told_and_ends_the_run(start, tmp_path, monkeypatch, caplog):
    rates = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(
        Player, "measure", lambda player: {"success": next(rates), "episodes": 20.0}
    )
    main(config(start, tmp_path / "run", rounds=9, logging={"stop_below_best": 0.2}))
    assert len(rounds_of(tmp_path / "run")) == 2
    assert "fell to 50%" in caplog.text
    assert (tmp_path / "run" / "best").resolve().name == "step-000000"
    main(config(start, tmp_path / "run", rounds=9, logging={"stop_below_best": 0.2}))
    assert len(rounds_of(tmp_path / "run")) == 2  # and stays ended
    main(config(start, tmp_path / "run", rounds=3))  # unless a fall is no reason any more
    assert len(rounds_of(tmp_path / "run")) == 3


def test_another_config_checkpoint_or_damage_is_refused(start, processor, tmp_path):
    main(config(start, tmp_path / "run", rounds=2))
    with pytest.raises(InputError, match=r"update\.learning_rate: 0\.001 instead of 0.002"):
        main(config(start, tmp_path / "run", rounds=2, update={"learning_rate": 1e-3}))
    other = tmp_path / "other"
    policy = VLA0.from_pretrained(start, "cpu")
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(1.5)
    policy.save_pretrained(other)
    with pytest.raises(InputError, match="checkpoint"):
        main(config(str(other), tmp_path / "run", rounds=2))
    state = tmp_path / "run" / "state" / "checkpoint-2"
    whole = (state / "learner.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"{}"):
        (state / "learner.pt").write_bytes(content)
        with pytest.raises(InputError, match="a training state that is whole"):
            main(config(start, tmp_path / "run", rounds=4))
    torch.save({"weights": {}}, state / "learner.pt")
    with pytest.raises(InputError, match="a training state of this model"):
        main(config(start, tmp_path / "run", rounds=4))
    (state / "learner.pt").write_bytes(whole)
    (state / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json"):
        main(config(start, tmp_path / "run", rounds=4))


def test_too_little_memory_names_the_setting(start, tmp_path, monkeypatch):
    def none(*arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(module.Learner, "learn", none)
    with pytest.raises(InputError, match=r"halve update\.batch_size"):
        main(config(start, tmp_path / "run"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rollouts": {"temperature": 0.0}}, "temperature above 0"),
        ({"rollouts": {"group_size": 1}}, "group_size >= 2"),
        ({"update": {"ratio": "word"}}, "ratio of"),
        ({"update": {"learning_rate": 0.0}}, "learning_rate > 0"),
        ({"update": {"precision": "fp16"}}, "precision"),
        ({"update": {"method": "ppo"}}, "update.method of"),
        ({"update": {"lr_scheduler": "cosine"}}, "update.lr_scheduler of"),
        ({"update": {"method": "imitation", "clip_low": 0.1}}, "update.method=grpo"),
        ({"update": {"replay_rounds": 2}}, "update.method=imitation"),
        ({"update": {"augmentation": {"mask": "number"}}}, "update.method=imitation or data"),
        ({"update": {"demonstrations": 0.3}}, "data.dataset"),
        ({"update": {"demonstrations": 1.0}, "data": {"dataset": "d"}}, "below 1"),
        ({"data": {"dataset": "d", "relative_dims": [0]}}, "training anew"),
        ({"data": {}}, "'dataset'"),
        ({"update": {"lora": {"rank": 4, "dropout": 0.1}}}, "no update.lora.dropout"),
        ({"num_rounds": None}, "num_rounds or max_minutes"),
        ({"rolouts": {}}, "unknown key 'rolouts'"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    content = {
        "checkpoint": "x", "simulator": {}, "logging": {"output_dir": "y"}, "num_rounds": 1, **change
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        build(RLConfig, content, "a config")
