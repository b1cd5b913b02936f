import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from conftest import TASKS, frame_of, make_dataset, make_spec
from hypothesis import given
from hypothesis import strategies as st
from made_datasets import CAMERAS, downgraded, source_of
from torch.utils.data import BatchSampler

from vla0 import InputError
from vla0.core.prompt import IGNORE, Prompt
from vla0.data.config import Augmentation
from vla0.data.dataset import Order, Samples, collator
from vla0.data.lerobot import DataConfig, Source


def spec_of(source: Source, **changes):
    fields = {**source.spec_fields(changes.get("chunk_size", 3)), **changes}
    return make_spec(**fields)


def test_a_row_becomes_the_sample_that_was_recorded(dataset):
    source = source_of(dataset)
    sample = source.sample(7, chunk_size=3, history=1)  # second episode, step 1
    assert sample.observation.instruction == TASKS[1]
    np.testing.assert_allclose(
        sample.observation.state, np.array([11.0, 11.1, 11.2]) / 2, rtol=1e-6
    )
    np.testing.assert_allclose(
        sample.actions, [[11, 11.1, 11.2], [12, 12.1, 12.2], [13, 13.1, 13.2]], rtol=1e-6
    )
    assert sample.valid.tolist() == [True, True, True]
    np.testing.assert_array_equal(sample.observation.images["front"], frame_of(1, 1, 0))
    np.testing.assert_array_equal(sample.observation.images["wrist"], frame_of(1, 1, 1))


def test_a_chunk_never_crosses_an_episodes_end(dataset):
    source = source_of(dataset)
    for row in range(len(source)):
        sample = source.sample(row, chunk_size=4, history=1)
        step, last = row - source.start[row], source.end[row] - 1 - source.start[row]
        expected = [min(step + ahead, last) + 10 * source.episode_of[row] for ahead in range(4)]
        np.testing.assert_allclose(sample.actions[:, 0], expected)
        assert sample.valid.tolist() == [step + ahead <= last for ahead in range(4)]


def test_history_starts_with_its_episode(dataset):
    source = source_of(dataset)
    frames = source.sample(7, 2, history=3).observation.images["front"]
    np.testing.assert_array_equal(frames, [frame_of(1, 0, 0), frame_of(1, 0, 0), frame_of(1, 1, 0)])


def test_video_reads_as_images_do(tmp_path):
    source = source_of(make_dataset(tmp_path / "video", videos=True, lengths=(4, 5)))
    frames = source.sample(6, 2, history=2).observation.images["wrist"]
    assert frames.dtype == np.uint8
    expected = np.stack([frame_of(1, 1, 1), frame_of(1, 2, 1)]).astype(int)
    assert np.abs(frames.astype(int) - expected).max() <= 6  # lossy


def test_bounds_are_those_of_the_data(dataset):
    source = source_of(dataset)
    fields = source.spec_fields(3)
    np.testing.assert_allclose(fields["low"], [0, 0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(fields["high"], [24, 24.1, 24.2], rtol=1e-6)
    np.testing.assert_allclose(fields["state"][1], np.array([24, 24.1, 24.2]) / 2, rtol=1e-6)
    assert (fields["fps"], fields["cameras"]) == (10.0, ("front", "wrist"))
    spec = spec_of(source)
    assert Samples(source, spec).outside().tolist() == [0, 0, 0]


def test_quantile_bounds_lie_inside_and_what_clips_is_counted(dataset):
    source = source_of(dataset, statistics="quantiles")
    spec = spec_of(source)
    np.testing.assert_allclose(spec.low[0], np.quantile(source.actions[:, 0], 0.01), rtol=1e-5)
    assert Samples(source, spec).outside().tolist() == [2, 2, 2]


def test_bounds_of_relative_actions_are_over_all_chunks(dataset):
    source = source_of(dataset, relative_dims=[0])
    fields = source.spec_fields(3)
    chunks = np.concatenate(
        [
            source.sample(row, 3, 1).actions[:, :1] - source.states[row, :1]
            for row in range(len(source))
        ]
    )
    np.testing.assert_allclose(
        (fields["low"][0], fields["high"][0]), (chunks.min(), chunks.max()), rtol=1e-6
    )
    np.testing.assert_allclose(fields["low"][1], 0.1, rtol=1e-6)


def test_held_out_episodes_are_not_trained_on(dataset):
    source = source_of(dataset, held_out=1)
    spec = spec_of(source)
    assert len(Samples(source, spec)) == 10
    assert len(Samples(source, spec, held_out=True)) == 5
    assert spec.high[0] == pytest.approx(13)


def test_a_batch_is_the_prompt_and_the_answer_and_nothing_after_the_end(dataset, processor):
    source = source_of(dataset)
    spec = spec_of(source)
    prompt = Prompt(spec, processor)
    samples = Samples(source, spec)
    rows = [0, 5]  # 5: the last step of the first episode
    batch = collator([prompt], None)([samples[row] for row in rows])
    for row, (index, kept) in enumerate(zip(rows, (3, 1), strict=True)):
        sample = samples.sample(index)
        answer = " ".join(
            map(
                str,
                np.rint(
                    (sample.actions.astype(float) - spec.low)
                    / np.subtract(spec.high, spec.low)
                    * 100
                )
                .astype(int)
                .ravel(),
            )
        )
        first = " ".join(answer.split(" ")[: kept * 3])
        expected = [prompt.ids[c] for c in first] + ([prompt.end_id] if kept == 3 else [])
        labels = batch["labels"][row]
        assert labels[labels != IGNORE].tolist()[: len(expected)] == expected
        digits = [
            t
            for t in labels[labels != IGNORE].tolist()
            if t not in (prompt.ids[" "], prompt.end_id)
        ]
        assert len(digits) == len(first.replace(" ", ""))


def test_augmentation_is_a_function_of_seed_epoch_and_row(dataset, processor):
    source = source_of(dataset)
    spec = spec_of(source)
    collate = collator([Prompt(spec, processor)], Augmentation())
    samples = Samples(source, spec)
    first, in_another_batch = collate([samples[0], samples[7]]), collate([samples[7], samples[0]])
    assert (first["pixel_values"].chunk(2)[0] == in_another_batch["pixel_values"].chunk(2)[1]).all()
    other_seed = collate([Samples(source, spec, seed=1)[0], samples[7]])
    samples.epoch = 1
    for other in (collate([samples[0], samples[7]]), other_seed):
        assert (first["pixel_values"] != other["pixel_values"]).any()


def test_pictures_of_other_rows_and_cameras_are_not_decoded(dataset, monkeypatch):
    """The slow path: a chunk query through LeRobot decodes the pictures of all its rows."""
    from PIL import Image

    source = source_of(dataset, cameras={"front": CAMERAS["front"]})
    decoded = []
    original = Image.Image.load
    monkeypatch.setattr(
        Image.Image, "load", lambda self: (decoded.append(id(self)), original(self))[1]
    )
    source.sample(3, chunk_size=8, history=1)
    assert len(set(decoded)) <= 2  # the picture, and its RGB form


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": "actions"}, "key 'actions' for action; got keys"),
        ({"state": "nothing"}, "key 'nothing'"),
        ({"cameras": {"front": "observation.images.nowhere"}}, "for front"),
        ({"cameras": {"front": "action"}}, "pictures in 'action'"),
        ({"held_out": 3}, "held_out"),
    ],
)
def test_a_dataset_without_the_mapped_key_is_refused(dataset, change, message):
    with pytest.raises(InputError, match=message):
        source_of(dataset, **change)


@pytest.mark.parametrize("change", [{"statistics": "mean"}, {"cameras": {}}, {"held_out": -1}])
def test_an_incoherent_recipe_is_refused(change):
    with pytest.raises(InputError):
        DataConfig(**{"dataset": "x", "cameras": CAMERAS, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"mask": "words"},
        {"mask_most": 2.0},
        {"mask_none": -0.1},
        {"jitter": (0, 0, 0)},
        {"jitter": (0, 0, 0, 0.7)},
    ],
)
def test_an_incoherent_augmentation_is_refused(change):
    with pytest.raises(InputError):
        Augmentation(**change)


def test_actions_that_are_not_numbers_are_refused_with_their_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = make_dataset(tmp_path / "nan", lengths=(3,))
    file = next((folder / "data").rglob("*.parquet"))
    table = pq.read_table(file)
    actions = np.stack(table["action"].to_numpy()).copy()
    actions[1, 0] = np.nan
    column = table.schema.get_field_index("action")
    pq.write_table(
        table.set_column(
            column,
            table.schema.field(column),
            pa.array(actions.tolist(), table.schema.field(column).type),
        ),
        file,
    )
    with pytest.raises(InputError, match="row 1"):
        source_of(folder)


def test_what_is_no_dataset_is_refused(tmp_path):
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(InputError, match="LeRobot dataset"):
            source_of(Path(name))


def test_an_older_format_is_sent_to_lerobots_converter(tmp_path):
    import json

    folder = make_dataset(tmp_path / "old", lengths=(3,))
    info = json.loads((folder / "meta" / "info.json").read_text())
    (folder / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))
    with pytest.raises(InputError, match=r"convert_dataset_v21_to_v30 .*--root="):
        source_of(folder)


def test_v21_reads_the_same_after_the_command_that_the_error_names(tmp_path):
    whole = source_of(make_dataset(tmp_path / "whole", lengths=(3, 4)))
    folder = downgraded(make_dataset(tmp_path / "old", lengths=(3, 4)))
    with pytest.raises(InputError) as refusal:
        source_of(folder)
    command = str(refusal.value).split("convert it: ")[1].split()
    result = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    converted = source_of(folder)
    np.testing.assert_array_equal(converted.actions, whole.actions)
    for row in range(7):
        one, other = (source.sample(row, 2, 1) for source in (converted, whole))
        assert one.observation.instruction == other.observation.instruction
        np.testing.assert_array_equal(
            one.observation.images["front"], other.observation.images["front"]
        )


@given(
    rows=st.integers(1, 60),
    batch=st.integers(1, 7),
    processes=st.integers(2, 5),
    epoch=st.integers(0, 3),
)
def test_all_processes_together_take_each_row_once_an_epoch(rows, batch, processes, epoch):
    taken = []
    for process in range(processes):
        order = Order(range(rows), batch * processes, seed=3)
        order.set_epoch(epoch)
        shard = BatchSamplerShard(BatchSampler(order, batch, drop_last=False), processes, process)
        taken.append([row for own in shard for row in own])
    assert len({len(own) for own in taken}) == 1
    assert sorted(row for own in taken for row in own if row >= 0) == list(range(rows))


def test_a_row_that_fills_a_batch_counts_nothing(dataset, processor):
    source = source_of(dataset)
    spec = spec_of(source)
    samples = Samples(source, spec)
    batch = collator([Prompt(spec, processor)], Augmentation())([samples[3], samples[-1]])
    assert (batch["labels"][0] != IGNORE).any()
    assert (batch["labels"][1] == IGNORE).all()
