import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import make_dataset, make_recipe

from vla0 import InputError
from vla0.checkpoint.tiny import FAMILY
from vla0.checkpoint.tiny_families import FAMILIES
from vla0.core.prompt import IGNORE, Prompt
from vla0.core.spec import MAIN
from vla0.data.config import Augmentation
from vla0.data.dataset import Samples, collator
from vla0.data.lerobot import Source
from vla0.files import held
from vla0.policy import VLA0
from vla0.train import checkpoints as keep
from vla0.train import run as train
from vla0.train.checkpoints import point
from vla0.train.config import TrainConfig, build, read_config
from vla0.train.measure import action_error
from vla0.train.run import _start, main
from vla0.train.trainer import VLA0Trainer, arguments


def config_of(dataset, output, **changes) -> TrainConfig:
    return build(TrainConfig, make_recipe(dataset, output, **changes), "test")


def trained_weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_training_leaves_a_checkpoint_that_acts(dataset, tmp_path):
    last = main(config_of(dataset, tmp_path / "run"))
    policy = VLA0.from_pretrained(last)
    source = Source(build(TrainConfig, make_recipe(dataset, tmp_path / "run"), "test").data)
    sample = source.sample(0, 2, 1)
    assert policy.predict_batch([sample.observation]).shape == (1, 2, 3)
    assert policy.spec.high[0] == 24
    assert {file.suffix for file in last.iterdir()} <= {
        ".json",
        ".safetensors",
        ".jinja",
        ".txt",
        ".md",
        ".png",
    }
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("named", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_of_a_gpu_grows_in_segments_unless_its_user_says_otherwise(
    dataset, tmp_path, monkeypatch, named
):
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    if named is not None:
        os.environ[named] = "max_split_size_mb:512"
    with pytest.raises(InputError, match="teacher_weight"):
        main(config_of(dataset, tmp_path / "run", teacher_weight=0.5))
    said = {key: value for key, value in os.environ.items() if "ALLOC" in key}
    expected = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert said == ({named: "max_split_size_mb:512"} if named else expected)


def test_training_learns(tmp_path):
    """Four rows, learned by heart: what is read back through the grammar is what was recorded."""
    few = make_dataset(tmp_path / "few", lengths=(4,), dimensions=1)
    spec, action = (
        {"image_size": 56, "crop": 1.0, "system": "Write."},
        {"chunk_size": 1, "action_bins": 10},
    )
    changes = {
        "num_steps": 120,
        "batch_size": 4,
        "learning_rate": 3e-3,
        "save_every_n_steps": 120,
        "max_grad_norm": 1.0,
        "spec": spec,
        "action": action,
    }
    plain = {"mask": "none", "jitter": [0, 0, 0, 0]}
    config = config_of(few, tmp_path / "run", **changes, augmentation=plain)
    policy, source = VLA0.from_pretrained(main(config)), Source(config.data)
    samples = [source.sample(row, 1, 1) for row in range(4)]
    chunks = policy.predict_batch([sample.observation for sample in samples])
    np.testing.assert_allclose(chunks, np.stack([sample.actions for sample in samples]), atol=0.16)


def test_resuming_gives_what_an_uninterrupted_run_gives(dataset, tmp_path):
    whole = main(config_of(dataset, tmp_path / "whole"))

    class KilledError(Exception):
        pass

    def stop(policy, folder):
        raise KilledError  # in the middle of step 2's save, after `last` was named

    with pytest.raises(KilledError):
        main(config_of(dataset, tmp_path / "parts"), stop)
    assert (tmp_path / "parts" / "last").resolve().name == "step-000002"
    resumed = main(config_of(dataset, tmp_path / "parts"))
    assert resumed.resolve().name == "step-000004"
    for (name, one), other in zip(
        trained_weights(whole).items(), trained_weights(resumed).values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


def test_a_finished_run_stays_as_it_is(dataset, tmp_path):
    last = main(config_of(dataset, tmp_path / "run"))
    before = trained_weights(last)
    main(config_of(dataset, tmp_path / "run"))
    assert all((before[name] == weight).all() for name, weight in trained_weights(last).items())


def test_another_recipe_in_the_same_folder_is_refused(dataset, tmp_path):
    main(config_of(dataset, tmp_path / "run"))
    with pytest.raises(InputError, match="learning_rate"):
        main(config_of(dataset, tmp_path / "run", learning_rate=1e-4))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_never_leaves_half_a_checkpoint_as_last(dataset, tmp_path):
    """SIGKILL at random moments of a run that saves at every step; `last` always loads, and the run
    ends.
    """
    recipe = tmp_path / "train_config.json"  # JSON is YAML
    recipe.write_text(
        json.dumps(make_recipe(dataset, tmp_path / "run", num_steps=60, save_every_n_steps=1))
    )
    command = [sys.executable, "-m", "vla0", "train", "--config", str(recipe)]
    rng, reached = np.random.default_rng(0), [0]
    for _ in range(12):
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "2"},
        )
        time.sleep(9 + rng.random() * 4)
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "run" / "last").exists():
            VLA0.from_pretrained(tmp_path / "run" / "last")
            reached.append(int((tmp_path / "run" / "last").resolve().name.removeprefix("step-")))
        if ended:
            break
    assert reached == sorted(reached)
    assert reached[-1] == 60 or len(set(reached)) > 3
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)  # the rest of it
    recipe.write_text(
        json.dumps(make_recipe(dataset, tmp_path / "whole", num_steps=60, save_every_n_steps=1))
    )
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)
    assert losses(tmp_path / "run", 60) == losses(tmp_path / "whole", 60)  # bit for bit
    one, two = (trained_weights(tmp_path / name / "last") for name in ("run", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_best_is_the_checkpoint_that_measured_best(dataset, tmp_path):
    scores = iter([0.9, 0.2])
    config = config_of(
        dataset, tmp_path / "run", data={**make_recipe(dataset, tmp_path)["data"], "held_out": 1}
    )
    main(config, lambda policy, folder: {"success": next(scores)})
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["success"] for line in lines] == [0.9, 0.2]
    assert all(math.isfinite(line["held_out_loss"]) for line in lines)
    assert all(0 <= line[f"error/{d}"] < 30 for line in lines for d in range(3))
    assert (tmp_path / "run" / "best").resolve().name == "step-000002"
    assert (tmp_path / "run" / "last").resolve().name == "step-000004"
    VLA0.from_pretrained(tmp_path / "run" / "best")
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert "| success | 0.9 |" in card
    assert str(tmp_path) not in card


def test_the_code_of_a_model_card_runs(dataset, tmp_path):
    last = main(config_of(dataset, tmp_path / "run"))
    card = (last / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "vla0"
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    names = {"front": np.zeros((48, 64, 3), np.uint8), "state": np.zeros(3)}
    exec(code.replace("this folder or its Hub id", str(last)), names)
    assert names["actions"].shape == (2, 3)


def test_a_disk_without_room_for_checkpoints_is_refused_before_training(
    dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="GiB free for checkpoints"):
        main(config_of(dataset, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("s*"))


# of the fifteen rows no more than whole batches of four
THREE = {"num_steps": 3, "save_every_n_steps": 3}


def losses(run, steps=3):
    state = json.loads((run / "state" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return [line["loss"] for line in state["log_history"] if "loss" in line]


def test_a_batch_in_parts_gives_the_losses_of_the_whole(dataset, tmp_path):
    """Steps' losses count each token alike, however many of them a part has."""
    main(config_of(dataset, tmp_path / "whole", batch_size=4, **THREE))
    main(
        config_of(dataset, tmp_path / "parts", batch_size=1, gradient_accumulation_steps=4, **THREE)
    )
    np.testing.assert_allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-4)


def launched(recipe, folder, *program):
    """Trains on two processes without a GPU."""
    (folder / "train_config.json").write_text(json.dumps(recipe))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [
        *launch,
        *(program or ("-m", "vla0.train")),
        "--config",
        str(folder / "train_config.json"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_give_the_losses_of_one_at_the_same_global_batch(dataset, tmp_path):
    main(config_of(dataset, tmp_path / "one", batch_size=4, **THREE))
    launched(make_recipe(dataset, tmp_path / "two", batch_size=2, **THREE), tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


def test_at_an_epochs_end_processes_take_each_row_once(dataset, tmp_path):
    """Of fifteen rows in batches of fourteen the last is one row, and one of the processes has
    none.
    """
    steps = {"num_steps": 3, "save_every_n_steps": 3}
    main(config_of(dataset, tmp_path / "one", batch_size=14, **steps))
    launched(make_recipe(dataset, tmp_path / "two", batch_size=7, **steps), tmp_path)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


def test_what_lies_beside_old_checkpoints_is_left_alone(dataset, tmp_path):
    def evaluated(policy, folder):
        (tmp_path / "run" / f"{folder.name}-eval").mkdir()
        return {"success": 1.0 if folder.name == "step-000002" else 0.0}

    main(config_of(dataset, tmp_path / "run", num_steps=6), evaluated)
    names = {folder.name for folder in (tmp_path / "run").glob("step-*")}
    assert names == {
        "step-000002",
        "step-000006",
        "step-000002-eval",
        "step-000004-eval",
        "step-000006-eval",
    }


def test_the_log_tells_the_share_of_tokens_that_were_right(dataset, tmp_path):
    main(
        config_of(
            dataset, tmp_path / "run", num_steps=30, save_every_n_steps=30, learning_rate=3e-3
        )
    )
    state = json.loads(
        (tmp_path / "run" / "state" / "checkpoint-30" / "trainer_state.json").read_text()
    )
    shares = [line["token_accuracy"] for line in state["log_history"] if "loss" in line]
    assert len(shares) == 30
    assert all(0 <= share <= 1 for share in shares)
    assert sum(shares[-5:]) > sum(shares[:5])


def test_the_error_of_actions_is_in_the_datasets_units_and_of_recorded_steps_only(
    dataset, tmp_path
):
    config = config_of(
        dataset, tmp_path / "run", data={**make_recipe(dataset, tmp_path)["data"], "held_out": 1}
    )
    vlm, processor, specs = _start(config, {MAIN: (source := Source(config.data))}, None)
    spec = specs[MAIN]

    class Constant(VLA0):
        def predict_batch(self, observations, num_steps=None):
            return np.full((len(observations), 2, 3), 20.0, np.float32)

    # the third episode: 20 to 24, in all dimensions and tenths of it more
    held_out = Samples(source, spec, held_out=True)
    error = action_error(Constant(vlm, processor, spec), held_out)
    steps = np.array([0, 1, 1, 2, 2, 3, 3, 4, 4])  # of two steps ahead the last row has one
    np.testing.assert_allclose(
        error, [steps.mean(), (steps + 0.1).mean(), (steps + 0.2).mean()], rtol=1e-5
    )


def batch_and_trainer(dataset, tmp_path, **changes):
    config = config_of(dataset, tmp_path / "run", **changes)
    source = Source(config.data)
    vlm, processor, specs = _start(config, {MAIN: source}, None)
    spec = specs[MAIN]
    collate = collator([Prompt(spec, processor)], Augmentation())
    trainer = VLA0Trainer(model=vlm, args=arguments(config, tmp_path / "run", 4, 8))
    return collate([Samples(source, spec)[row] for row in (0, 5, 9)]), trainer


def test_the_loss_is_the_models_own(dataset, tmp_path):
    """Logits at the answers alone give the loss that transformers computes over whole rows."""
    batch, trainer = batch_and_trainer(dataset, tmp_path)
    with torch.no_grad():
        expected = trainer.model(**batch).loss
        torch.testing.assert_close(trainer.compute_loss(trainer.model.train(), batch), expected)


def test_the_loss_of_held_out_rows_does_not_depend_on_how_they_are_batched(dataset, tmp_path):
    batch, trainer = batch_and_trainer(
        dataset, tmp_path, augmentation={"mask": "number", "mask_most": 0.9, "mask_none": 0.0}
    )
    counts = (batch["labels"] != IGNORE).sum(1)
    assert len(set(counts.tolist())) > 1  # else any mean would do
    patches = batch["image_grid_thw"].prod(1).cumsum(0).tolist()
    images = len(batch["image_grid_thw"]) // len(counts)
    alone = []
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.mul_(30)  # tokens of very different losses
        for row in range(len(counts)):
            own = {
                key: value[row : row + 1]
                for key, value in batch.items()
                if len(value) == len(counts)
            }
            grids = batch["image_grid_thw"][row * images : (row + 1) * images]
            first, last = ([0, *patches][row * images], [0, *patches][(row + 1) * images])
            own |= {"image_grid_thw": grids, "pixel_values": batch["pixel_values"][first:last]}
            alone.append(trainer.compute_loss(trainer.model.eval(), own))
        together = trainer.compute_loss(trainer.model.eval(), batch)
    torch.testing.assert_close(torch.stack(alone).mean(), together, rtol=1e-4, atol=1e-5)


def test_logits_are_computed_only_where_there_are_labels(dataset, tmp_path):
    batch, trainer = batch_and_trainer(dataset, tmp_path)
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    labelled = batch["labels"].shape[1] - int((batch["labels"] != IGNORE).any(0).int().argmax())
    assert outputs.logits.shape[1] == labelled + 1
    assert labelled + 1 < batch["labels"].shape[1]


def test_accumulated_batches_give_the_gradient_of_the_whole(dataset, tmp_path):
    """Of batches with unequal numbers of labels, too: each token counts the same."""
    weights = []
    for name, changes in {
        "whole": {"batch_size": 4},
        "parts": {"batch_size": 2, "gradient_accumulation_steps": 2},
    }.items():
        config = config_of(
            dataset,
            tmp_path / name,
            num_steps=1,
            augmentation={"mask": "none", "jitter": [0, 0, 0, 0]},
            spec={**make_recipe(dataset, tmp_path)["spec"], "crop": 1.0},
            learning_rate=1e-2,
            **changes,
        )
        weights.append(trained_weights(main(config)))
    for name, one in weights[0].items():
        torch.testing.assert_close(one, weights[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_an_unknown_key_is_refused_and_the_nearest_named(dataset, tmp_path):
    for changes, near in (
        ({"learning_rat": 1.0}, "training.learning_rate"),  # in the wrong section, too
        ({"training": {"num_steps": 3, "learning_rat": 1.0}}, "learning_rate"),
        ({"spec": {"image_siz": 10}}, "image_size"),
        ({"data": {"dataset": "x", "camera": {}}}, "cameras"),
        ({"augmentation": {"masks": "none"}}, "mask"),
    ):
        with pytest.raises(InputError, match=f"did you mean '{near}'"):
            config_of(dataset, tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 0},
        {"num_steps": "many"},
        {"num_steps": 1.5},
        {"num_epochs": 2.0},  # beside num_steps
        {"training": {}},
        {"warmup_ratio": 3.0},
        {"keep_last": 0},
        {"save_every_n_epochs": 1},  # beside save_every_n_steps
        {"learning_rate": 0.0},
        {"precision": "fp16"},
        {"model": {"name": "tiny", "lora": {"alpha": 8.0}}},  # of no rank
        {"data": {"dataset": "x", "weight": 2.0}},  # of no mixture
        {"data": "here"},
        {"spec": {"low": [0]}},
    ],
)
def test_an_incoherent_recipe_is_refused(dataset, tmp_path, changes):
    with pytest.raises(InputError):
        config_of(dataset, tmp_path, **changes)


def test_a_recipe_without_a_needed_key_is_refused(dataset, tmp_path):
    recipe = make_recipe(dataset, tmp_path)
    del recipe["logging"]["output_dir"]
    with pytest.raises(InputError, match="'output_dir'"):
        build(TrainConfig, recipe, "test")


def test_overrides_go_over_the_file_and_deeper(tmp_path):
    file = tmp_path / "recipe.yaml"
    content = (
        "logging: {output_dir: a}\ntraining: {num_steps: 5}\ndata: {dataset: d, cameras: "
        "{front: key}}\nspec: {crop: 0.5}\n"
    )
    file.write_text(content)
    overrides = [
        "training.num_steps=7",
        "spec.crop=0.7",
        "data.dataset=e",
        "training.learning_rate=1e-4",
    ]
    config = read_config(TrainConfig, file, overrides)
    assert (config.training.num_steps, config.spec["crop"], config.data.dataset) == (7, 0.7, "e")
    assert config.training.learning_rate == 1e-4
    for bad in (["training"], ["=3"], ["training=[1"]):
        with pytest.raises(InputError):
            read_config(TrainConfig, file, bad)
    with pytest.raises(InputError, match="not there"):
        read_config(TrainConfig, tmp_path / "none.yaml")
    with pytest.raises(InputError, match="a YAML file"):
        read_config(TrainConfig, tmp_path)
    file.write_text("a: [")
    with pytest.raises(InputError):
        read_config(TrainConfig, file)


def test_a_constant_rate_warms_up_where_it_is_asked_to(dataset, tmp_path):
    main(config_of(dataset, tmp_path / "run", num_steps=4, warmup_ratio=0.5, learning_rate=1e-3))
    state = json.loads(
        (tmp_path / "run" / "state" / "checkpoint-4" / "trainer_state.json").read_text()
    )
    rates = [line["learning_rate"] for line in state["log_history"] if "learning_rate" in line]
    np.testing.assert_allclose(rates, [0.0, 5e-4, 1e-3, 1e-3])


def test_an_evaluation_of_nothing_is_said(dataset, tmp_path, caplog):
    main(config_of(dataset, tmp_path / "run", num_steps=1, eval_every_n_steps=1))
    assert "logging.eval_every_n_steps only saves" in caplog.text


def test_a_mapping_that_is_given_whole_replaces_the_files(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "logging: {output_dir: a}\ntraining: {num_steps: 5}\ndata: {dataset: d, cameras: {front: "
        "x, wrist: y}}\n"
    )
    config = read_config(
        TrainConfig, file, ["data.cameras={high: z, left: observation.images.left}"]
    )
    assert config.data.cameras == {"high": "z", "left": "observation.images.left"}
    assert read_config(TrainConfig, file, ["data.cameras.front=z"]).data.cameras == {
        "front": "z",
        "wrist": "y",
    }
    assert read_config(TrainConfig, file, ["data.cameras=null"]).data.cameras is None


def test_epochs_are_steps_over_the_rows(dataset, tmp_path):
    """Fifteen rows by four: four steps an epoch; what is measured is saved too, and the last two
    stay.
    """
    timing = {
        "save_every_n_steps": None,
        "save_every_n_epochs": 1,
        "eval_every_n_steps": 3,
        "keep_last": 2,
    }
    scores = {"step-000003": 0.5, "step-000006": 1.0, "step-000009": 0.0, "step-000010": 0.0}
    tried = []

    def measure(policy, folder):
        tried.append(folder.name)
        return {"success": scores[folder.name]}

    config = config_of(
        dataset, tmp_path / "run", num_steps=None, num_epochs=2.5, batch_size=4, **timing
    )
    assert main(config, measure).resolve().name == "step-000010"
    assert tried == list(scores)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [f"step-{step:06d}" for step in (3, 4, 6, 8, 9, 10)]
    assert (tmp_path / "run" / "best").resolve().name == "step-000006"
    assert sorted(f.name for f in (tmp_path / "run").glob("step-*")) == [
        "step-000006",
        "step-000009",
        "step-000010",
    ]


def test_a_measurement_does_not_change_what_is_learned(dataset, tmp_path):
    def noisy(policy, folder):
        torch.rand(7)
        return {"success": 0.0}

    # dropout draws from torch's generator
    lora = {"lora": {"rank": 2, "dropout": 0.5}, "learning_rate": 1e-2}
    weights = [
        trained_weights(main(config_of(dataset, tmp_path / str(measure), **lora), measure))
        for measure in (None, noisy)
    ]
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())


def test_a_run_goes_on_with_another_log_and_refuses_another_global_batch(
    dataset, tmp_path, monkeypatch
):
    main(config_of(dataset, tmp_path / "run", num_steps=2))
    main(config_of(dataset, tmp_path / "run", num_steps=2, log_every_n_steps=7))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="global_batch: 4 instead of 2"):
        main(config_of(dataset, tmp_path / "run", num_steps=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named(tmp_path, workers):
    import pyarrow.parquet

    folder = make_dataset(tmp_path / "bad")
    (file,) = (folder / "data").rglob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    pictures = table["observation.images.top"].to_pylist()
    pictures[7]["bytes"] = pictures[7]["bytes"][:40]
    place = table.column_names.index("observation.images.top")
    column = pyarrow.array(pictures, table.schema.field(place).type)
    pyarrow.parquet.write_table(table.set_column(place, table.schema.field(place), column), file)
    recipe = make_recipe(folder, tmp_path / "run", num_steps=8)
    recipe["data"]["num_workers"] = workers
    with pytest.raises(InputError) as refusal:
        main(build(TrainConfig, recipe, "test"))
    assert str(refusal.value).startswith(
        "expected readable pictures; got episode 1, frame 1 of 'observation.images.top'"
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "halve training.batch_size",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "room on the disk"),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file "
                "data/1"
            ),
            "room on the disk",
        ),
    ],
)
def test_what_the_machine_lacks_is_said_and_the_checkpoint_before_is_whole(
    dataset, tmp_path, monkeypatch, error, expected
):
    save = VLA0Trainer._save_checkpoint

    def fails(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            raise error
        return save(trainer, *args, **kwargs)

    monkeypatch.setattr(VLA0Trainer, "_save_checkpoint", fails)
    with pytest.raises(InputError, match=expected):
        main(config_of(dataset, tmp_path / "run"))
    assert (tmp_path / "run" / "last").resolve().name == "step-000002"
    VLA0.from_pretrained(tmp_path / "run" / "last")


def test_a_tracker_that_is_not_installed_is_refused_at_once(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("vla0.train.trainer.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install trackio"):
        main(config_of(dataset, tmp_path / "run", trackio="arm"))


SHARDED = """
import accelerate.state, torch
from accelerate.utils import DistributedType

# accelerate shards over accelerators only: here it takes two processes on a CPU for two GPUs.
torch.distributed.init_process_group("gloo")
prepare = accelerate.state.PartialState._prepare_backend
accelerate.state.PartialState._prepare_backend = lambda *args, **kw: (prepare(*args, **kw)[0], DistributedType.MULTI_GPU)
accelerate.state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
import sys
from vla0.cli import main
sys.argv.insert(1, "train")
main()
"""


FUSED = """
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from vla0.checkpoint.tiny import tiny_model, tiny_processor
from vla0.train.trainer import LIGER
model, rotary = tiny_model(tiny_processor(["push"])), modeling.apply_multimodal_rotary_pos_emb
layer, before, eps = model.model.language_model.layers[0], model.forward, model.model.language_model.norm.variance_epsilon
apply_liger_kernel(model, LIGER)
assert "liger" in layer.mlp.forward.__module__ and "liger" in layer.input_layernorm.forward.__module__
assert layer.input_layernorm.variance_epsilon == eps
assert model.forward == before and modeling.apply_multimodal_rotary_pos_emb is rotary
"""


@pytest.mark.slow  # torch and transformers once more, in a process whose norms may change
def test_liger_fuses_norms_and_leaves_the_loss_and_other_models_alone():
    pytest.importorskip("liger_kernel")
    subprocess.run([sys.executable, "-c", FUSED], check=True, timeout=300)


def test_liger_is_refused_without_a_gpu(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU"):
        main(config_of(dataset, tmp_path / "run", liger=True))
    assert not (tmp_path / "run").exists()


def test_wandb_gets_what_tensorboard_gets(dataset, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    main(config_of(dataset, tmp_path / "run", wandb="arms"))
    wandb.finish()
    (file,) = tmp_path.rglob("run-*.wandb")
    content = file.read_bytes()
    # Blocks of 32 KiB begin with a header of 7 bytes, which may stand in the midst of a word.
    written = b"".join(content[at + 7 : at + 32768] for at in range(0, len(content), 32768))
    words = (b"arms", b"train/token_accuracy", b"train/loss")
    assert [word for word in words if word not in written] == []


@pytest.mark.parametrize(
    "family",
    [
        "qwen2_5_vl",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen3_vl", "internvl", "smolvlm", "gemma3")
        ),
    ],
)
def test_shards_give_the_losses_of_one_process_and_an_ordinary_checkpoint(
    dataset, tmp_path, family
):
    """FSDP2 over two processes, measured and gone on with on the way."""
    held_out = {**make_recipe(dataset, tmp_path)["data"], "held_out": 1}
    settings = {"num_steps": 2, "save_every_n_steps": 1, "keep_last": 2, "data": held_out}
    if family != FAMILY:
        settings |= {
            "name": f"tiny:{family}",
            "spec": {"image_size": FAMILIES[family].side, "system": "Write {numbers} integers."},
        }
    main(config_of(dataset, tmp_path / "one", batch_size=4, **settings))
    (tmp_path / "sharded.py").write_text(SHARDED)
    recipe = make_recipe(dataset, tmp_path / "two", batch_size=2, shard=True, **settings)
    launched(recipe, tmp_path, str(tmp_path / "sharded.py"))
    # a part of each
    assert list(
        (tmp_path / "two" / "state" / "checkpoint-2" / "pytorch_model_fsdp_0").glob("__1_*")
    )
    shutil.rmtree(tmp_path / "two" / "step-000002")
    point(tmp_path / "two" / "last", "step-000001")  # as if it had been stopped there
    launched(recipe, tmp_path, str(tmp_path / "sharded.py"))
    np.testing.assert_allclose(losses(tmp_path / "two", 2), losses(tmp_path / "one", 2), rtol=1e-4)
    assert all(
        "error/2" in line for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    )
    one, two = (trained_weights(tmp_path / name / "last") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=2e-4, msg=name)
    VLA0.from_pretrained(tmp_path / "two" / "last")


def test_sharding_that_would_not_happen_is_refused(dataset, tmp_path):
    with pytest.raises(InputError, match="got one process"):
        main(config_of(dataset, tmp_path / "run", shard=True))
    with pytest.raises(InputError, match="both"):
        config_of(dataset, tmp_path / "run", shard=True, lora={"rank": 4})


def whole(output: Path) -> dict[str, bytes]:
    """What of a run lies in its checkpoint, and how it was ranked."""
    files = {name: (output / "last" / name).read_bytes() for name in ("README.md", "vla0.json")}
    return {
        **files,
        "metrics": (output / "metrics.jsonl").read_bytes(),
        "best": (output / "best").resolve().name.encode(),
    }


@pytest.mark.parametrize(
    "lora",
    [{}, {"lora": {"rank": 4}, "precision": "bf16", "learning_rate": 0.02}],
    ids=["all weights", "LoRA"],
)  # in bf16 a merged model measures otherwise than its adapters beside it
@pytest.mark.parametrize("at", ["the end", "the middle"])
def test_what_a_kill_left_unfinished_of_a_save_is_made_good(dataset, tmp_path, at, lora):
    """`last` has moved, and then the power went: no card, no rank, no chart."""
    data = {**make_recipe(dataset, tmp_path)["data"], "held_out": 1}
    settings = {
        "num_steps": 4 if at == "the end" else 6,
        "save_every_n_steps": 2,
        "keep_last": 3,
        "data": data,
        **lora,
    }
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    main(config_of(dataset, plain, **settings))
    shutil.copytree(plain, cut, symlinks=True)
    recipe = json.loads((cut / "train_config.json").read_text())
    recipe["logging"]["output_dir"] = str(cut)
    (cut / "train_config.json").write_text(json.dumps(recipe))
    step = 4
    for later in ("step-000006",) if at == "the middle" else ():
        shutil.rmtree(cut / later)
    point(cut / "last", f"step-{step:06d}")
    for name in ("README.md", "training.png"):
        (cut / f"step-{step:06d}" / name).unlink()
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:1]))
    point(cut / "best", "step-000002")
    main(config_of(dataset, cut, **settings))
    assert (cut / "last" / "training.png").is_file()
    assert whole(cut) == whole(plain)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: (run / "train_config.json").write_text(""), "JSON in"),
        (lambda run: (run / "train_config.json").write_text('{"model"'), "JSON in"),
        (lambda run: (state_of(run) / "trainer_state.json").write_text("[]"), "a JSON object"),
        (
            lambda run: (state_of(run) / "trainer_state.json").write_text("{}"),
            "global_step and max_steps",
        ),
        (lambda run: cut(state_of(run) / "trainer_state.json"), "JSON in"),
        (lambda run: cut(state_of(run) / "optimizer.pt"), "a training state that is whole"),
        (
            lambda run: (state_of(run) / "optimizer.pt").write_bytes(b""),
            "a training state that is whole",
        ),
        (lambda run: shutil.rmtree((run / "last").resolve()), "the checkpoint that"),
    ],
)
def test_a_run_whose_files_are_damaged_says_so_and_never_begins_anew(
    dataset, tmp_path, damage, named
):
    main(config_of(dataset, tmp_path / "run", num_steps=4, save_every_n_steps=2))
    state = state_of(tmp_path / "run") / "trainer_state.json"
    # as if it had more to do
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 3}))
    before = sorted(file.name for file in (tmp_path / "run").iterdir())
    damage(tmp_path / "run")
    with pytest.raises(InputError, match=named):
        main(config_of(dataset, tmp_path / "run", num_steps=4, save_every_n_steps=2))
    assert {*before, ".lock", ".owner"} >= {file.name for file in (tmp_path / "run").iterdir()}


def test_the_state_that_last_stands_on_stays_whatever_was_touched_latest(
    dataset, tmp_path, monkeypatch
):
    """A kill as an old state was removed, the next before a new `last`: the latest that was touched
    is then the oldest.
    """
    publish, run = keep.models.publish, tmp_path / "run"

    class KilledError(Exception):
        pass

    def stops(state, folder, *args):
        if folder.name == "step-000003":
            raise KilledError
        publish(state, folder, *args)

    monkeypatch.setattr(keep.models, "publish", stops)
    for _ in range(2):
        with pytest.raises(KilledError):
            main(config_of(dataset, run, save_every_n_steps=1))
        (run / "state" / "checkpoint-1").mkdir(exist_ok=True)
        for age, step in enumerate((1, 3, 2)):
            os.utime(run / "state" / f"checkpoint-{step}", (time.time() - 100 * age,) * 2)
    monkeypatch.undo()
    assert main(config_of(dataset, run, save_every_n_steps=1)).resolve().name == "step-000004"
    assert sorted(file.name for file in (run / "state").iterdir()) == [
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_what_kills_left_half_written_of_checkpoints_goes_with_the_next(dataset, tmp_path):
    for name in (
        ".step-000002.partial-17",
        ".step-000002.old-17",
        ".step-000001.partial",
        ".step-000002.mine",
        "step-2-eval",
    ):
        (tmp_path / "run" / name).mkdir(parents=True)
    main(config_of(dataset, tmp_path / "run"))
    left = {file.name for file in (tmp_path / "run").iterdir() if "step" in file.name}
    assert left == {".step-000002.mine", "step-2-eval", "step-000004"}


def state_of(run: Path) -> Path:
    return run / "state" / "checkpoint-4"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_two_trainings_do_not_share_a_folder(dataset, tmp_path):
    with (
        held(tmp_path / "run", "training"),
        pytest.raises(InputError, match=rf"alone; got process {os.getpid()} on"),
    ):
        main(config_of(dataset, tmp_path / "run"))
    main(config_of(dataset, tmp_path / "run"))


def test_last_names_a_checkpoint_only_once_it_is_on_the_disk(dataset, tmp_path, monkeypatch):
    """After a power cut it would name files that are empty, and the step before is gone."""
    settled, named = [], []
    monkeypatch.setattr(keep, "settle", lambda folder: settled.append(folder.name))
    point = keep.point

    def watched(link, name):
        named.append((link.name, name, tuple(settled)))
        point(link, name)

    monkeypatch.setattr(keep, "point", watched)
    main(config_of(dataset, tmp_path / "run"))
    first, *_ = [own for own in named if own[0] == "last"]
    assert first == ("last", "step-000002", ("checkpoint-2", "step-000002"))
