"""Bounds never erase a dimension, and what they lose is said."""

import json

import numpy as np
import pytest
from conftest import make_recipe
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vla0 import InputError, Spec
from vla0.core.codec import ActionCodec, to_levels
from vla0.data.bounds import bounds, remarks
from vla0.data.lerobot import DataConfig, Source
from vla0.train.config import TrainConfig, build
from vla0.train.run import main

CAMERAS = {"front": "observation.images.top"}
NUMBERS = arrays(np.float64, (50, 2), elements=st.sampled_from([0.0, 0.0, 0.0, 1.0, -3.5, 1e-3]))


@pytest.fixture(scope="module")
def pulsed(tmp_path_factory):
    """A dataset whose third action, and state, is a trigger that is pulled in one of 120 frames."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder = tmp_path_factory.mktemp("data") / "pulsed"
    features = {
        "observation.images.top": {
            "dtype": "image",
            "shape": (28, 28, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "trigger"]},
        "action": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "trigger"]},
    }
    dataset = LeRobotDataset.create("local/pulsed", 10, features, root=folder, use_videos=False)
    for episode in range(4):
        for step in range(120):
            action = np.array(
                [np.sin(step / 9 + episode), np.cos(step / 7), float(step == 60)], np.float32
            )
            picture = np.zeros((28, 28, 3), np.uint8)
            dataset.add_frame(
                {
                    "observation.images.top": picture,
                    "observation.state": action,
                    "action": action,
                    "task": "pull",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return folder


@given(NUMBERS, st.sampled_from(["minmax", "quantiles"]))
def test_what_varies_is_never_written_as_one_level(values, statistics):
    low, high = (np.array(end) for end in bounds(values, statistics))
    varies = values.min(axis=0) < values.max(axis=0)
    assert (low < high).tolist() == varies.tolist()


@given(NUMBERS)
def test_quantiles_are_kept_where_they_differ(values):
    low, high = (np.array(end) for end in bounds(values, "quantiles"))
    inner = np.quantile(values, [0.01, 0.99], axis=0)
    apart = inner[0] < inner[1]
    assert low[apart].tolist() == inner[0][apart].tolist()
    assert high[apart].tolist() == inner[1][apart].tolist()


def test_a_trigger_that_is_seldom_pulled_can_be_pulled(pulsed):
    source = Source(
        DataConfig(
            dataset=str(pulsed), cameras=CAMERAS, state="observation.state", statistics="quantiles"
        )
    )
    spec = Spec(base_model="tiny", chunk_size=4, **source.spec_fields(4))
    codec = ActionCodec(spec)
    assert set(codec.decode(codec.encode(source.actions))[:, 2].tolist()) == {0.0, 1.0}
    assert (spec.state[0][2], spec.state[1][2]) == (0.0, 1.0)
    said = source.problems(spec)
    assert [text.split(" is ")[0] for text in said if "its quantiles would have" in text] == [
        "action trigger",
        "state trigger",
    ]


def test_training_and_the_card_say_which_bounds_are_not_the_quantiles(pulsed, tmp_path, caplog):
    recipe = make_recipe(
        pulsed,
        tmp_path / "run",
        num_steps=1,
        data={
            "dataset": str(pulsed),
            "cameras": CAMERAS,
            "state": "observation.state",
            "statistics": "quantiles",
        },
    )
    last = main(build(TrainConfig, recipe, "a test"))
    assert "action trigger is 0 in more than 98 % of the rows" in caplog.text
    card = (last / "README.md").read_text()
    assert "action trigger is 0 in more than 98 % of the rows" in card
    assert "state trigger is 0 in more than 98 % of the rows" in card


def test_a_dimension_that_an_outlier_squeezes_into_few_levels_is_told_of():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 2))
    values[7, 0] = 900.0
    said = remarks(values, bounds(values, "minmax"), "minmax", 1000, ["action 0", "action 1"])
    assert [text.split(",")[0] for text in said] == ["action 0 varies"]
    assert (
        f"with {len(np.unique(to_levels(values, *map(np.array, bounds(values, 'minmax')), 1000)[:, 0])) - 1} of"
        not in said[0]
    )


def test_a_gripper_of_two_positions_is_no_fault():
    values = np.array([[-1.0, 1.0][i % 2] for i in range(100)])[:, None]
    assert remarks(values, bounds(values, "quantiles"), "quantiles", 1000, ["action 0"]) == []


def test_a_pulse_far_outside_of_its_bounds_is_told_of():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1000, 1)) * 1e-3
    values[:5] = 1.0
    (said,) = remarks(values, bounds(values, "quantiles"), "quantiles", 1000, ["action 0"])
    assert "far outside of its bounds" in said


@pytest.mark.parametrize(
    ("turn", "written"), [(360.0, "[-180, 180]"), (2 * np.pi, "[-3.14159265, 3.14159265]")]
)
def test_relative_bounds_far_wider_than_the_usual_step_are_told_of(turn, written):
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (1000, 1)) * turn / 120
    values[::100] -= turn
    (said,) = [
        text
        for text in remarks(values, bounds(values, "minmax"), "minmax", 100, ["action 0"], [0])
        if "90 %" in text
    ]
    assert f"data.periodic={{DIMENSION: [{written}]}}".replace("[[", "[").replace("]]", "]") in said


@pytest.mark.parametrize("change", ["an action", "an instruction", "an episode"])
def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path, change):
    import pandas
    from conftest import make_dataset

    folder = make_dataset(
        tmp_path / "data", lengths=(6, 4) if change == "an episode" else (6, 4, 5)
    )
    recipe = build(TrainConfig, make_recipe(folder, tmp_path / "run"), "a test")
    main(recipe)
    longer = build(TrainConfig, make_recipe(folder, tmp_path / "run"), "a test")
    last = (tmp_path / "run" / "last").resolve()
    state = (
        tmp_path
        / "run"
        / "state"
        / f"checkpoint-{int(last.name.removeprefix('step-'))}"
        / "trainer_state.json"
    )
    # as if it had been interrupted
    state.write_text(json.dumps({**json.loads(state.read_text()), "global_step": 3}))
    if change == "an episode":
        import shutil

        shutil.rmtree(folder)
        make_dataset(folder, lengths=(6, 4, 5))
    elif change == "an instruction":
        file = folder / "meta" / "tasks.parquet"
        pandas.read_parquet(file).rename(index={"open the drawer": "close the drawer"}).to_parquet(
            file
        )
    else:
        file = next(folder.glob("data/*/*.parquet"))
        table = pandas.read_parquet(file)
        table.at[3, "action"] = table.at[3, "action"] + np.float32(0.25)
        table.to_parquet(file)
    named = {
        "an action": "other numbers",
        "an instruction": "other instructions",
        "an episode": "other rows",
    }[change]
    with pytest.raises(InputError, match=named):
        main(longer)
