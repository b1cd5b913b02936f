"""The LeRobot plugin by LeRobot's own commands, and LeRobot's own client against our server."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TASKS, grpc_of, make_dataset, make_observation
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner
from worlds import JOINTS, Reach, arm_spec

from vla0 import VLA0, InputError
from vla0.checkpoint.tiny import tiny_model, tiny_processor
from vla0.checkpoint.tiny_families import FAMILIES
from vla0.cli import app
from vla0.cli.act import serve
from vla0.core.prompt import Prompt
from vla0.core.rollout import ChunkPolicy
from vla0.data.dataset import Samples, collator
from vla0.data.lerobot import DataConfig, Source
from vla0.train.loss import answered

pytest.importorskip("lerobot_policy_vla0", reason="the plugin is not installed")

from lerobot.configs import PreTrainedConfig
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
from lerobot.scripts import lerobot_train
from lerobot_policy_vla0.modeling_vla0 import left_over

SMALL = {
    "width": 48,
    "layers": 1,
    "heads": 3,
    "vision_width": 32,
    "vision_layers": 1,
    "vision_heads": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain transformers folder, as Qwen's would be."""
    folder = tmp_path_factory.mktemp("base")
    processor = tiny_processor(["State: ", "Write 6 integers.", *TASKS])
    tiny_model(processor, **SMALL).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def lerobot_train_with(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *map(str, words)])
    lerobot_train.main()


def words(base, dataset, output, *more):
    return [
        "--policy.type=vla0",
        f"--policy.model_name={base}",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--policy.chunk_size=2",
        "--policy.action_bins=100",
        "--policy.image_size=56",
        "--policy.system=Write {numbers} integers.",
        "--policy.use_state=true",
        "--policy.optimizer_lr=1e-3",
        "--dataset.repo_id=local/small",
        f"--dataset.root={dataset}",
        "--dataset.video_backend=pyav",
        "--batch_size=2",
        "--steps=4",
        "--save_freq=2",
        "--log_freq=1",
        "--num_workers=0",
        f"--output_dir={output}",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(base, dataset, tmp_path_factory):
    """`checkpoints` of a training by LeRobot's command."""
    output = tmp_path_factory.mktemp("lerobot") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lerobot_train_with(patch, *words(base, dataset, output))
    return output / "checkpoints"


def test_what_lerobot_trains_is_a_checkpoint_of_vla0(trained, base, dataset):
    from transformers import AutoModelForImageTextToText

    folder = trained / "last" / "pretrained_model"
    policy = VLA0.from_pretrained(folder)
    ours = Source(
        DataConfig(
            dataset=str(dataset),
            cameras={"top": "observation.images.top", "hand": "observation.images.hand"},
            state="observation.state",
        )
    )
    expected = ours.spec_fields(2)
    for name in ("low", "high", "state", "fps", "action_names"):
        assert getattr(policy.spec, name) == expected[name], name
    assert set(policy.spec.cameras) == set(expected["cameras"])
    weights = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    before = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    assert list(folder.glob("*.pkl")) == list(folder.glob("*.bin")) == []


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--peft.method_type=LORA", "--peft.r=4")])
@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "smolvlm", "gemma3"])
def test_lerobot_trains_and_opens_models_of_every_family(
    family, more, dataset, tmp_path, monkeypatch
):
    processor = tiny_processor(["State: ", "Write 6 integers.", *TASKS], family=family)
    tiny_model(processor, **SMALL).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    own = words(tmp_path / "base", dataset, tmp_path / "run", *more)
    side = f"--policy.image_size={FAMILIES[family].side}"
    lerobot_train_with(monkeypatch, *[side if "image_size" in word else word for word in own])
    folder = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    if more:
        assert (folder / "adapter_model.safetensors").is_file()
        return
    policy = VLA0.from_pretrained(folder)
    images = {name: np.zeros((64, 64, 3), np.uint8) for name in policy.spec.cameras}
    state = np.zeros(len(policy.spec.state[0]))
    assert np.isfinite(policy.predict(images, "push", state=state)).all()
    weights = policy.model.state_dict()
    before = type(policy.model).from_pretrained(tmp_path / "base").state_dict()
    assert any(not torch.equal(weights[name], before[name]) for name in weights)


def test_lerobots_training_goes_on_where_it_stopped(trained, monkeypatch):
    config = trained / "last" / "pretrained_model" / "train_config.json"
    lerobot_train_with(monkeypatch, f"--config_path={config}", "--resume=true", "--steps=6")
    assert (
        json.loads((trained / "000006" / "training_state" / "training_step.json").read_text())[
            "step"
        ]
        == 6
    )
    assert VLA0.from_pretrained(trained / "000006" / "pretrained_model").spec.chunk_size == 2


def test_adapters_are_trained_saved_and_go_on(base, dataset, tmp_path, monkeypatch):
    output = tmp_path / "lora"
    lerobot_train_with(
        monkeypatch, *words(base, dataset, output, "--peft.method_type=LORA", "--peft.r=4")
    )
    folder = output / "checkpoints" / "last" / "pretrained_model"
    assert (folder / "adapter_model.safetensors").stat().st_size < 1e5
    with pytest.raises(InputError, match="vla0 convert"):
        VLA0.from_pretrained(folder)
    assert not (folder / "model.safetensors").exists()
    lerobot_train_with(
        monkeypatch, f"--config_path={folder / 'train_config.json'}", "--resume=true", "--steps=6"
    )
    config = PreTrainedConfig.from_pretrained(
        output / "checkpoints" / "000006" / "pretrained_model"
    )
    config.pretrained_path = output / "checkpoints" / "000006" / "pretrained_model"
    policy = make_policy(config, ds_meta=LeRobotDataset("local/small", root=dataset).meta)
    assert any(
        weight.abs().max() > 0 for name, weight in policy.named_parameters() if "lora_B" in name
    )
    done = CliRunner().invoke(
        app, ["convert", str(config.pretrained_path), str(tmp_path / "merged")]
    )
    assert done.exit_code == 0, done.output
    ordinary = VLA0.from_pretrained(tmp_path / "merged")
    batch = policy.collate(
        [(sample, (0,), 0) for sample in policy._samples(training_batch(policy, dataset))]
    )
    with torch.no_grad():
        _, adapted, _ = answered(policy.get_base_model().model, batch)
        _, merged, _ = answered(ordinary.model, batch)
        with policy.disable_adapter():
            _, plain, _ = answered(policy.get_base_model().model, batch)
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-4, rtol=1e-4)


def training_batch(policy, dataset, rows=(0, 3, 5, 9, 14)):
    """What LeRobot's loader gives a policy to learn from; some rows at an episode's end."""
    meta = LeRobotDataset("local/small", root=dataset).meta
    ahead = resolve_delta_timestamps(policy.config, meta)
    found = LeRobotDataset(
        "local/small", root=dataset, delta_timestamps=ahead, video_backend="pyav"
    )
    return torch.utils.data.default_collate([found[row] for row in rows])


def batch_of(policy, observation, cameras=("front", "wrist"), state=2):
    """What LeRobot gives a policy of an observation."""
    frames = dict(zip(cameras, observation.images.values(), strict=True))
    batch = {
        f"observation.images.{c}": torch.from_numpy(f).permute(2, 0, 1)[None].float() / 255
        for c, f in frames.items()
    }
    values = np.resize(observation.state, state).astype(np.float32)
    return {
        **batch,
        "observation.state": torch.from_numpy(values)[None],
        "task": [observation.instruction],
    }


@pytest.fixture(scope="module")
def plugged(policy, tmp_path_factory):
    """(a policy of LeRobot's, preprocessor, postprocessor, the checkpoint): opened from what vla0
    saved.
    """
    folder = tmp_path_factory.mktemp("ours") / "checkpoint"
    policy.save_pretrained(folder)
    return opened(folder)


def opened(folder, **changes):
    config = PreTrainedConfig.from_pretrained(
        folder, cli_overrides=[f"--{name}={value}" for name, value in changes.items()]
    )
    config.pretrained_path = folder
    found = get_policy_class(config.type).from_pretrained(folder, config=config)
    overrides = {
        "device_processor": {"device": "cpu"},
        "rename_observations_processor": {"rename_map": {}},
    }
    before, after = make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)
    return found, before, after, folder


def test_what_vla0_saves_opens_in_lerobot_and_acts_alike(policy, plugged):
    found, before, after, folder = plugged
    assert found.config.chunk_size == policy.spec.chunk_size
    for seed in range(4):
        expected = policy.predict_batch(
            [replace(make_observation(seed), state=make_observation(seed).state.astype(np.float32))]
        )[0]
        found.reset()
        for step in range(3):  # executed one after another
            action = after(found.select_action(before(batch_of(found, make_observation(seed)))))
            np.testing.assert_array_equal(action[0].numpy(), expected[step])
    assert VLA0.from_pretrained(folder).spec == policy.spec


def test_lerobots_batches_become_the_very_samples_of_the_spine(trained, dataset):
    """The same pixels and the same tokens for the same frame."""
    folder = trained / "last" / "pretrained_model"
    found, before, *_ = opened(folder)
    spec = found.vla.spec
    keys = {camera: f"observation.images.{camera}" for camera in spec.cameras}
    ours = Samples(
        Source(DataConfig(dataset=str(dataset), cameras=keys, state="observation.state")), spec
    )
    rows = (0, 3, 5, 9, 14)
    batch = before(training_batch(found, dataset, rows))
    samples = found._samples(batch)
    for row, sample in zip(rows, samples, strict=True):
        expected = ours.sample(row)
        for camera in spec.cameras:
            np.testing.assert_array_equal(
                sample.observation.images[camera], expected.observation.images[camera]
            )
        np.testing.assert_array_equal(sample.observation.state, expected.observation.state)
        np.testing.assert_array_equal(sample.actions, expected.actions)
        np.testing.assert_array_equal(sample.valid, expected.valid)
        assert sample.observation.instruction == expected.observation.instruction
    prompts = [Prompt(spec, found.vla.processor)]
    pairs = [
        [(sample, (7, i), 0) for i, sample in enumerate(group)]
        for group in (samples, [ours.sample(row) for row in rows])
    ]
    first, second = (collator(prompts, found.config.augmentation)(pair) for pair in pairs)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


def test_ensembles_of_a_batch_are_those_of_each_environment(policy, tmp_path):
    policy.save_pretrained(tmp_path / "checkpoint")
    found, *_ = opened(tmp_path / "checkpoint", n_action_steps=1, temporal_ensemble="v1")
    seeds = [(0, 1), (2, 3), (4, 5), (6, 7)]  # of two environments, step by step
    alone = [ChunkPolicy(lambda o: policy.predict_batch([o])[0], 3, 1, "v1") for _ in range(2)]
    for pair in seeds:
        rows = [batch_of(found, make_observation(seed)) for seed in pair]
        batch = {
            key: (
                [row[key][0] for row in rows]
                if key == "task"
                else torch.cat([row[key] for row in rows])
            )
            for key in rows[0]
        }
        action = found.select_action(batch)
        for place, seed in enumerate(pair):
            seen = replace(
                make_observation(seed), state=make_observation(seed).state.astype(np.float32)
            )
            np.testing.assert_allclose(action[place].numpy(), alone[place].act(seen), atol=1e-6)


def test_real_time_chunks_go_on_from_what_will_have_been_executed(policy, plugged):
    found, *_ = plugged
    batch = batch_of(found, make_observation(1))
    seen = replace(make_observation(1), state=make_observation(1).state.astype(np.float32))
    own = policy.predict_batch([seen])[0]
    ahead = own[:2] + np.float32(0.1)
    left_over = torch.zeros(10, 3)  # LeRobot fills up with zeros
    left_over[:2] = torch.from_numpy(ahead)
    assert found.supports_rtc()
    for delay, committed in ((0, None), (1, ahead[:1]), (2, ahead), (7, ahead)):
        chunk = found.predict_action_chunk(
            batch, inference_delay=delay, prev_chunk_left_over=left_over
        )[0].numpy()
        np.testing.assert_array_equal(
            chunk, policy.predict_batch([replace(seen, action_prefix=committed)])[0]
        )


@pytest.mark.parametrize("ahead", [0.0, 0.5, "0.5 then 0", "0 then 0.5"])
def test_committed_steps_are_forced_whatever_their_values(policy, plugged, ahead):
    found, *_ = plugged
    rows = {"0.5 then 0": [0.5, 0.0], "0 then 0.5": [0.0, 0.5]}.get(ahead, [ahead, ahead])
    wanted = torch.tensor(rows)[:, None].repeat(1, 3)
    batch = batch_of(found, make_observation(1))
    found.reset()
    chunk = found.predict_action_chunk(batch, inference_delay=2, prev_chunk_left_over=wanted)[0]
    half = (np.array(policy.spec.high) - policy.spec.low) / policy.spec.bins / 2
    assert (np.abs(chunk[:2].numpy() - wanted.numpy()) <= half + 1e-6).all()


@example([0.5, 0.0, 0.5], 2, 2)
@given(
    st.lists(st.sampled_from([0.0, 0.5, -1.0]), min_size=1, max_size=6),
    st.integers(0, 5),
    st.integers(0, 12),
)
def test_what_is_left_of_a_chunk_is_told_from_what_lerobot_fills_up_with(values, begun, length):
    chunk = np.float32(values)[:, None].repeat(2, 1)
    rest = chunk[min(begun, len(chunk) - 1) :][: max(length, 1)]
    filled = np.zeros((max(length, len(rest)), 2), np.float32)
    filled[: len(rest)] = rest
    found = left_over(filled, chunk)
    assert found >= len(rest)
    # what comes beyond can be a zero of the chunk's own, and nothing else
    assert not filled[len(rest) : found].any()
    # 0.5, 0 of the chunk 0.5, 0, 0.5 may be its first two or its last one, filled up: nothing tells
    # which, and fewer would be lost.
    assert any(
        np.array_equal(filled[:found], chunk[first : first + found]) for first in range(len(chunk))
    )


def test_what_lerobot_would_exchange_and_depth_as_colours_are_refused(base, tmp_path):
    import pandas

    folder = make_dataset(tmp_path / "swapped", lengths=(3, 3))
    file = folder / "meta" / "tasks.parquet"
    pandas.read_parquet(file).iloc[::-1].to_parquet(file)
    config = PreTrainedConfig.from_pretrained(_saved_config(tmp_path, base))
    meta = LeRobotDataset("local/swapped", folder).meta
    with pytest.raises(InputError, match=r"in the order of their task_index.*\[1, 0\]"):
        make_policy(config, ds_meta=meta)
    folder = make_dataset(tmp_path / "turned", videos=True, lengths=(3, 3))
    file = next(folder.glob("meta/episodes/*/*.parquet"))
    pandas.read_parquet(file).iloc[::-1].reset_index(drop=True).to_parquet(file)
    meta = LeRobotDataset("local/turned", folder, video_backend="pyav").meta
    with pytest.raises(InputError, match=r"by whose places LeRobot takes them; got \[1, 0\]"):
        make_policy(PreTrainedConfig.from_pretrained(_saved_config(tmp_path, base)), ds_meta=meta)
    meta = LeRobotDataset("local/deep", make_dataset(tmp_path / "deep", lengths=(3, 3))).meta
    meta.features["observation.images.top"]["info"] = {"is_depth_map": True}
    with pytest.raises(InputError, match="flags as depth maps"):
        make_policy(PreTrainedConfig.from_pretrained(_saved_config(tmp_path, base)), ds_meta=meta)


def _saved_config(folder, base):
    """A folder with the configuration of a policy that has not been trained."""
    from lerobot_policy_vla0 import VLA0Config

    VLA0Config(model_name=str(base), chunk_size=2, device="cpu")._save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.full((1, 3, 48, 64), 2.5), "0..1"), (torch.full((1, 3, 48, 64), 700, dtype=torch.int32), "0..1"),
        (torch.zeros(1, 1, 48, 64), "shape"), (torch.full((1, 3, 48, 64), -0.5), "0..1"),
    ],
)  # fmt: skip
def test_pictures_that_are_no_colours_are_refused(plugged, pictures, message):
    found, *_ = plugged
    batch = batch_of(found, make_observation(1))
    key = next(iter(found.config.image_features))
    with pytest.raises(InputError, match=re.escape(message)):
        found.predict_action_chunk({**batch, key: pictures})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"chunk_size": 2}, "chunk_size 3"), ({"n_action_steps": 9}, "n_action_steps in 1..3"), ({"temporal_ensemble": "v1"}, "do nothing"), ({"temporal_ensemble": "v9"}, "an ensemble")],
)  # fmt: skip
def test_settings_that_contradict_a_checkpoint_are_refused(plugged, changes, message):
    with pytest.raises(Exception, match=message):
        opened(plugged[3], **changes)


def test_a_checkpoint_that_learns_from_another_dataset_says_what_it_clips(
    trained, dataset, tmp_path, caplog
):
    folder = trained / "last" / "pretrained_model"
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    for other, clipped in (
        (dataset, False),
        (make_dataset(tmp_path / "longer", lengths=(9, 12, 9)), True),
    ):
        caplog.clear()
        policy = make_policy(config, ds_meta=LeRobotDataset("local/small", root=other).meta)
        assert ("are clipped" in caplog.text) == clipped
        assert next(policy.parameters()).dtype == torch.float32


def test_a_checkpoint_of_another_robot_is_refused(trained, tmp_path):
    config = PreTrainedConfig.from_pretrained(trained / "last" / "pretrained_model")
    config.pretrained_path = trained / "last" / "pretrained_model"
    other = make_dataset(tmp_path / "other", dimensions=4)
    with pytest.raises(InputError, match="actions of 3 numbers"):
        make_policy(config, ds_meta=LeRobotDataset("local/small", root=other).meta)


def test_a_camera_of_another_name_is_refused_with_the_remedy(plugged):
    found = plugged[0]
    batch = batch_of(found, make_observation(0), cameras=("left", "right"))
    with pytest.raises(InputError, match="--rename_map"):
        found.predict_action_chunk(batch)


# LeRobot's asynchronous inference


@pytest.fixture
def lerobot_server():
    """(a stub of LeRobot's client, the policy behind it)."""
    import grpc
    from lerobot.transport import services_pb2_grpc

    policy = Reach()
    with grpc_of(policy) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield services_pb2_grpc.AsyncInferenceStub(channel), policy


def instructions(**changes):
    from lerobot.async_inference.helpers import RemotePolicyConfig
    from lerobot.transport import services_pb2

    features = {"observation.state": {"dtype": "float32", "shape": (6,), "names": list(JOINTS)}}
    fields = {
        "policy_type": "vla0",
        "pretrained_name_or_path": "/etc",
        "lerobot_features": features,
        "actions_per_chunk": 5,
        **changes,
    }
    return services_pb2.PolicySetup(data=pickle.dumps(RemotePolicyConfig(**fields)))


def raw(step=0, place=0.0, **changes):
    from lerobot.async_inference.helpers import TimedObservation

    pictures = {camera: np.full((48, 64, 3), 100, np.uint8) for camera in ("front", "wrist")}
    content = {**dict.fromkeys(JOINTS, place), **pictures, "task": "reach", **changes}
    return TimedObservation(
        1000.0, step, {key: value for key, value in content.items() if value is not None}, True
    )


def parts(content):
    from lerobot.transport import services_pb2
    from lerobot.transport.utils import send_bytes_in_chunks

    data = content if isinstance(content, bytes) else pickle.dumps(content)
    return send_bytes_in_chunks(data, services_pb2.Observation, silent=True)


def test_lerobots_protocol_gives_the_policys_own_chunks(lerobot_server):
    from lerobot.transport import services_pb2

    stub, policy = lerobot_server
    stub.Ready(services_pb2.Empty())
    stub.SendPolicyInstructions(instructions())
    assert stub.GetActions(services_pb2.Empty()).data == b""  # nobody has seen anything yet
    for step, place in ((0, 0.0), (3, 10.0)):
        stub.SendObservations(parts(raw(99, 5.0)))  # makes room for a newer one
        stub.SendObservations(parts(raw(step, place)))
        actions = pickle.loads(stub.GetActions(services_pb2.Empty()).data)
        assert [action.timestep for action in actions] == list(range(step, step + 5))
        expected = policy.chunk(replace(make_observation(0), state=np.full(6, place)))
        np.testing.assert_allclose(
            np.stack([action.action.numpy() for action in actions]), expected[:5]
        )
        assert actions[1].timestamp - actions[0].timestamp == pytest.approx(0.05)


class Evil:
    """Would run where it is unpickled."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


def test_a_hostile_message_runs_nothing_and_hurts_nobody(lerobot_server, tmp_path):
    import grpc
    from lerobot.transport import services_pb2

    stub, _ = lerobot_server
    stub.Ready(services_pb2.Empty())
    with pytest.raises(grpc.RpcError, match="SendPolicyInstructions first"):
        stub.SendObservations(parts(raw()))
    stub.SendPolicyInstructions(instructions())
    for content in (
        Evil(tmp_path / "run"),
        raw(task=Evil(tmp_path / "run")),
        b"no pickle",
        {"a": 1},
        instructions().data,
    ):
        with pytest.raises(grpc.RpcError, match="got"):
            stub.SendObservations(parts(content))
    with pytest.raises(grpc.RpcError, match="got"):
        stub.SendPolicyInstructions(
            services_pb2.PolicySetup(data=pickle.dumps(Evil(tmp_path / "run")))
        )
    assert not (tmp_path / "run").exists()
    for changes, message in (
        ({"wrist": None}, "camera 'wrist'"),
        ({JOINTS[0]: None}, "no 'shoulder_pan.pos'"),
        ({"task": None}, "an instruction"),
    ):
        stub.SendObservations(parts(raw(**changes)))
        with pytest.raises(grpc.RpcError, match=message):
            stub.GetActions(services_pb2.Empty())
    stub.SendObservations(parts(raw(7)))
    assert len(pickle.loads(stub.GetActions(services_pb2.Empty()).data)) == 5


def test_a_stream_that_does_not_end_is_ended_and_newcomers_push_nobody_out(
    lerobot_server, monkeypatch
):
    import grpc
    from lerobot.transport import services_pb2

    from vla0.serve import lerobot as module

    stub, _ = lerobot_server
    monkeypatch.setattr(module, "STREAM_S", 0.3)
    stub.Ready(services_pb2.Empty())
    stub.SendPolicyInstructions(instructions())
    go = threading.Event()

    def endless():
        yield from parts(raw())
        go.wait(20)

    began = time.monotonic()
    with pytest.raises(grpc.RpcError):
        stub.SendObservations(endless())
    assert time.monotonic() - began < 10
    go.set()
    stub.SendObservations(parts(raw()))  # it is served as before
    assert stub.GetActions(services_pb2.Empty()).data


def test_a_newcomer_pushes_nobody_out_who_is_active():
    from vla0.serve.lerobot import Client, LeRobotServer
    from vla0.serve.listen import ServerLimits

    server = LeRobotServer(Reach(), ServerLimits(clients=2))
    for name in ("a", "b"):
        server._admit(name, Client(features={}, renamed={}, steps=3))
    server._admit("a", Client(features={}, renamed={}, steps=3))  # who begins anew keeps his place
    with pytest.raises(InputError, match="at most 2 clients"):
        server._admit("c", Client(features={}, renamed={}, steps=3))
    server.clients["b"].heard_at -= 100
    server._admit("c", Client(features={}, renamed={}, steps=3))
    assert list(server.clients) == ["a", "c"]


def test_lerobots_protocol_stays_on_this_machine(tmp_path):
    from vla0.serve.lerobot import LeRobotServer, serve_lerobot

    with pytest.raises(InputError, match="name those of the checkpoint"):
        LeRobotServer(Reach(), keys={"side": "x"})
    with pytest.raises(InputError, match="tunnel"):
        serve_lerobot(LeRobotServer(Reach()), "0.0.0.0", 0, lambda port: None)
    (tmp_path / "key").write_text("0123456789abcdef")
    for changes, message in (
        ({"ensemble": "v1"}, "averages by itself"),
        ({"protocol": "grpc"}, "--protocol of"),
        ({"api_key_file": tmp_path / "key"}, "without a key"),
    ):
        with pytest.raises(InputError, match=message):
            serve(str(tmp_path), **{"protocol": "lerobot", "port": 0, **changes})


def script(tmp_path, module, call):
    """LeRobot's command, once the simulated arm has a name there."""
    file = tmp_path / "command.py"
    counting = (
        "import atexit\nfrom vla0.robot.simulatedarm import SimulatedArm\n"
        "send, moved = SimulatedArm.send_action, []\n"
        "SimulatedArm.send_action = lambda self, action: (moved.append(action), send(self, "
        "action))[1]\n"
        "atexit.register(lambda: print('moved', len(moved), 'times'))\n"
    )
    file.write_text(f"{counting}from {module} import {call}\n{call}()\n")
    return [sys.executable, str(file)]


@pytest.fixture
def arm_checkpoint(tmp_path):
    processor = tiny_processor(["Write 24 integers.", "reach"])
    spec = arm_spec(
        system="Write {numbers} integers.", chunk_size=4, bins=100, state=None, state_names=None
    )
    VLA0(tiny_model(processor, **SMALL), processor, spec).save_pretrained(tmp_path / "arm")
    return tmp_path / "arm"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sync", "rtc"])
def test_lerobot_rollout_moves_the_simulated_arm(arm_checkpoint, tmp_path, how):
    command = script(tmp_path, "lerobot.scripts.lerobot_rollout", "main")
    arm = [
        "--robot.type=sim",
        "--robot.width=64",
        "--robot.height=48",
        "--task=reach",
        "--duration=3",
        "--fps=20",
        "--policy.device=cpu",
    ]
    done = subprocess.run(
        [*command, f"--policy.path={arm_checkpoint}", *arm, f"--inference.type={how}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Rollout finished" in done.stderr + done.stdout
    assert "inference error" not in done.stderr
    assert int(re.search(r"moved (\d+) times", done.stdout).group(1)) > 30


@pytest.mark.slow
def test_lerobots_own_robot_client_is_served(arm_checkpoint, tmp_path):
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vla0",
            "serve",
            "--checkpoint",
            str(arm_checkpoint),
            "--protocol",
            "lerobot",
            "--port",
            "0",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    address = next(line for line in server.stdout if "--server_address" in line).strip()
    command = script(tmp_path, "lerobot.async_inference.robot_client", "async_client")
    arm = [
        "--robot.type=sim",
        "--robot.width=64",
        "--robot.height=48",
        "--task=reach",
        "--fps=20",
        "--policy_type=vla0",
        "--actions_per_chunk=4",
    ]
    client = subprocess.Popen(
        [*command, address, *arm, "--pretrained_name_or_path=x"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(25)
    client.send_signal(signal.SIGINT)
    text, _ = client.communicate(timeout=30)
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0
    assert "Control loop thread starting" in text
    assert "INVALID_ARGUMENT" not in text, text[-3000:]
    assert int(re.search(r"moved (\d+) times", text).group(1)) > 100, text[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("env", ["metaworld", "libero"])
def test_lerobot_eval_runs_in_its_own_simulators(tmp_path, env):
    """One episode of an untrained policy: it plays, and nothing else is asked of it."""
    dimensions = 4 if env == "metaworld" else 7
    cameras = ("front",) if env == "metaworld" else ("image", "image2")
    processor = tiny_processor(["Write integers."])
    spec = arm_spec(
        low=(-1.0,) * dimensions,
        high=(1.0,) * dimensions,
        cameras=cameras,
        system="Write integers.",
        chunk_size=8,
        bins=10,
        state=None,
        state_names=None,
        action_names=None,
        max_step_change=None,
    )
    VLA0(tiny_model(processor, **SMALL), processor, spec).save_pretrained(tmp_path / "checkpoint")
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    words = [
        "--env.task=drawer-close-v3",
        '--rename_map={"observation.image": "observation.images.front"}',
    ]
    if env == "libero":
        words = ["--env.task=libero_object", "--env.task_ids=[0]", "--env.episode_length=16"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from lerobot.scripts.lerobot_eval import main; main()",
            f"--policy.path={tmp_path / 'checkpoint'}",
            "--policy.device=cpu",
            f"--env.type={env}",
            "--eval.n_episodes=1",
            "--eval.batch_size=1",
            f"--output_dir={tmp_path / 'out'}",
            *words,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        json.loads((tmp_path / "out" / "eval_info.json").read_text())["overall"]["n_episodes"] == 1
    )


def test_another_policys_config_is_read_by_lerobot_as_before(tmp_path):
    """The plugin stands before LeRobot's reader of config.json, for files of its own alone."""
    from lerobot.policies.act.configuration_act import ACTConfig

    config = ACTConfig(chunk_size=7, n_action_steps=3, device="cpu")
    config._save_pretrained(tmp_path)
    found = PreTrainedConfig.from_pretrained(tmp_path)
    assert found == config
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"unknown": 1}))
    with pytest.raises(Exception, match="unknown"):
        PreTrainedConfig.from_pretrained(tmp_path)
