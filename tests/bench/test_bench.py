import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import reading
import torch
import training
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vla0 import InputError
from vla0.bench import inputs
from vla0.bench.certificate import certificate
from vla0.bench.decode import BASELINE, WAYS, bench, refuse, tables
from vla0.bench.inputs import SHAPE_3B, chosen, moving_pictures, recorded
from vla0.cli.bench import write
from vla0.core.spec import Spec
from vla0.data.lerobot import DataConfig, Source
from vla0.decode import SpeculativeDecoder

COLUMNS = {"way", "batch", "n_action_steps", "chunks", "passes", "ms_median", "ms_p95", "identical"}


def test_every_way_is_timed_on_the_same_inputs_and_writes_the_same_tokens(policy, tmp_path):
    rows = bench(policy, [1, 2], [1, 3], 3)
    assert [row.way for row in rows[: len(WAYS)]] == list(WAYS)
    assert rows[0].way == "generate"
    assert len(rows) == 4 * len(WAYS)
    assert all(row.identical == (None if row.way == BASELINE else 1) for row in rows)
    assert all(row.compared == (0 if row.way == BASELINE else row.chunks) for row in rows)
    assert all(row.margin is None for row in rows)
    assert all(row.chunks == 3 * row.batch for row in rows)
    passes = {row.way: row.passes for row in rows if (row.batch, row.n_action_steps) == (1, 1)}
    assert passes["generate"] == passes["one token a pass"] > passes["forced symbols ride along"]
    assert passes["one token a pass"] > passes["all digits, two levels"] > 1
    assert [table.row_count for table in tables(rows)] == [len(WAYS)] * 4
    write(tmp_path / "rows.json", [asdict(row) for row in rows])
    assert set(json.loads((tmp_path / "rows.json").read_text())[0]) >= COLUMNS


def test_a_decoder_that_errs_is_found_with_the_margin_at_which_it_parts(policy, monkeypatch):
    from vla0.decode.speculative import SpeculativeDecoder

    right = SpeculativeDecoder.decode

    def wrong(self, *args, **more):
        levels = right(self, *args, **more)
        levels[0, -1, -1] = (levels[0, -1, -1] + 1) % policy.spec.bins
        return levels

    monkeypatch.setattr(SpeculativeDecoder, "decode", wrong)
    _, row = bench(policy, [1], [1], 2, ["generate", "tree that learns"])
    assert row.identical == 0
    assert row.margin is not None
    assert row.margin >= 0


def test_the_pictures_move_a_little_at_each_step(spec):
    episode = moving_pictures(spec)(0)
    first, second = (next(episode) for _ in range(2))
    change = abs(first.images["front"].astype(int) - second.images["front"]).mean()
    assert 0 < change < 30
    assert set(first.images) == set(spec.cameras)
    assert len(first.state) == len(spec.state[0])


def test_recorded_episodes_are_those_of_the_dataset_again_and_again(dataset, spec):
    config = DataConfig(
        dataset=str(dataset),
        cameras={"front": "observation.images.top", "wrist": "observation.images.hand"},
    )
    episode = recorded(config, spec)(1)
    seen = [next(episode).images["front"] for _ in range(9)]
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[4])  # the second episode has four steps


@pytest.mark.parametrize(
    ("batches", "steps_per_query", "chunks"),
    [([0], [1], 1), ([1], [0], 1), ([1], [9], 1), ([1], [1], 0)],
)
def test_numbers_that_mean_nothing_are_refused(batches, steps_per_query, chunks):
    with pytest.raises(InputError):
        refuse(batches, steps_per_query, chunks, 8)


def test_a_model_of_random_weights_in_bf16_is_measured_too(monkeypatch):
    small = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
    }
    text = {**SHAPE_3B["text_config"], **small}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [2, 3, 3],
    }
    vision = {
        **SHAPE_3B["vision_config"],
        "depth": 1,
        "out_hidden_size": 64,
        "hidden_size": 64,
        "num_heads": 4,
    }
    monkeypatch.setattr(
        inputs, "SHAPE_3B", {**SHAPE_3B, "text_config": text, "vision_config": vision}
    )
    policy = chosen("3b", "cpu")
    assert str(policy.model.dtype) == "torch.bfloat16"
    rows = bench(policy, [1], [1], 1, ["generate", "tree that learns, and a tail"])
    assert rows[1].passes < rows[0].passes


def test_the_3b_shape_has_the_published_models_parameters():
    with torch.device("meta"):
        vlm = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**SHAPE_3B))
    assert sum(p.numel() for p in vlm.model.visual.parameters()) / 1e9 == pytest.approx(
        0.669, abs=5e-4
    )
    assert sum(p.numel() for p in vlm.model.language_model.parameters()) / 1e9 == pytest.approx(
        3.086, abs=5e-4
    )
    assert vlm.lm_head.weight.shape == (151_936, 2048)


def test_the_benchmark_needs_neither_lerobot_nor_mujoco():
    code = (
        "import sys, vla0.bench.decode; print([m for m in ('lerobot', 'mujoco', 'robosuite') "
        "if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


ROW = {"way", "samples_per_s", "tokens_per_s", "mfu", "peak_gib"}


@pytest.mark.slow
def test_training_is_timed_beside_the_plain_way(tmp_path, dataset):
    settings = training.Settings("tiny", str(dataset), 2, 2, 0, False)
    rows = training.bench(settings, ["plain", "vla0"], 1)
    assert [row.way for row in rows] == ["plain", "vla0"]
    for row in rows:
        assert set(asdict(row)) == ROW
        assert row.samples_per_s > 0
        assert 0 < row.mfu < 1
        assert row.peak_gib > 0.1
    assert rows[0].tokens_per_s / rows[0].samples_per_s == pytest.approx(
        rows[1].tokens_per_s / rows[1].samples_per_s
    )
    with pytest.raises(InputError, match="a way of"):
        training.bench(settings, ["plane"], 1)


def test_both_readers_give_the_same_samples(dataset):
    """So that their times compare."""
    config = DataConfig(dataset=str(dataset), state="observation.state")
    source = Source(config)
    spec = Spec(base_model="none", chunk_size=3, **source.spec_fields(3))
    stock = reading.Stock(source, spec)
    for row in (0, 5, 8):
        one, other = source.sample(row, 3, 1), stock.sample(row)
        np.testing.assert_allclose(one.actions, other.actions)
        assert (one.valid == other.valid).all()
        assert one.observation.instruction == other.observation.instruction
        assert set(one.observation.images) == {"top", "hand"}
        for camera in source.cameras:
            np.testing.assert_array_equal(
                one.observation.images[camera], other.observation.images[camera]
            )


@pytest.mark.parametrize("videos", [False, True])
def test_the_made_up_dataset_is_read_and_timed(tmp_path, videos):
    folder = reading.made(tmp_path / "made", videos, episodes=1, frames=12)
    rows = reading.bench(folder, 4, 3, 1)
    assert [row["way"] for row in rows] == ["plain", "vla0"]
    assert all(row["samples_per_s"] > 0 for row in rows)
    with pytest.raises(InputError):
        reading.bench(folder, 0, 3, 1)


def test_a_certificate_counts_what_is_identical_and_says_where_others_part(policy, monkeypatch):
    found = certificate(policy, 5, 2)
    assert (found["chunks"], found["identical"], found["differing"]) == (6, 6, [])  # whole batches
    assert {"device", "dtype", "versions", "checkpoint", "passes", "invariant"} <= set(found)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    right, calls = SpeculativeDecoder.decode, []

    def wrong(self, *args, **more):
        levels = right(self, *args, **more)
        if not self.plain:
            calls.append(1)
            levels[0, -1, -1] = (
                (levels[0, -1, -1] + 1) % policy.spec.bins if len(calls) == 2 else levels[0, -1, -1]
            )
        return levels

    monkeypatch.setattr(SpeculativeDecoder, "decode", wrong)
    found = certificate(policy, 3)
    assert (found["chunks"], found["identical"]) == (3, 2)
    (other,) = found["differing"]
    assert (other["chunk"], other["numbers"]) == (1, 1)
    assert other["margin"] >= 0
    with pytest.raises(InputError, match=r"n_action_steps in 1\.\.3"):
        certificate(policy, 3, n_action_steps=9)


def test_a_certificate_is_written_by_the_command(policy, tmp_path):
    policy.save_pretrained(tmp_path / "checkpoint")
    words = (
        "bench",
        "decode",
        "--model",
        str(tmp_path / "checkpoint"),
        "--certify",
        "2",
        "--out",
        str(tmp_path / "c.json"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "vla0", *words], capture_output=True, text=True, check=True
    )
    assert "2 of 2 chunks identical to one token a pass" in done.stdout
    assert json.loads((tmp_path / "c.json").read_text())["identical"] == 2
