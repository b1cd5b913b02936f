"""What the tests share: a tiny model, a small LeRobot dataset, the real processor where it lies
beside the checkout.
"""

import asyncio
import os
import pickle
import threading
import time
from contextlib import contextmanager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vla0 import Observation, Spec
from vla0.checkpoint.tiny import tiny_model, tiny_processor
from vla0.policy import VLA0
from vla0.serve.server import Server
from vla0.train.config import LoggingConfig, ModelConfig, TrainConfig, TrainingConfig

SHARED = Path(__file__).parents[2] / "shared"
TASKS = ("push the red block", "open the drawer")
QWEN = {
    "action_type": "original",
    "original_action_dim": 7,
    "horizon": 8,
    "history": 1,
    "num_cam": 2,
    "num_bins_actions": 1000,
    "tiled_rgb_imgs": True,
    "rgb_img_size": [224, 224],
    "add_vision_id": True,
    "qwen_model_id": "Qwen/Qwen2.5-VL-3B-Instruct",
}
OPTIONS = "IMAGE.crop_img:0.875:IMAGE.img_size:224:IMAGE.cam_list:('3p1','3p2')"
LOW = np.array([-0.9375, -0.9375, -0.9375, -0.25821429, -0.375, -0.3675, -1], np.float32)
HIGH = np.array([0.9375, 0.9375, 0.9375, 0.35571429, 0.375, 0.375, 1], np.float32)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(2)


@pytest.fixture
def spec() -> Spec:
    """The Spec of the tiny policy: two cameras, three dimensions, a state."""
    return make_spec()


def make_spec(**changes) -> Spec:
    fields = {
        "low": (-1.0, 0.0, -0.5),
        "high": (1.0, 2.0, 0.5),
        "fps": 20.0,
        "cameras": ("front", "wrist"),
        "base_model": "tiny",
        "chunk_size": 3,
        "bins": 100,
        "image_size": 56,
        "crop": 0.9,
        "state": ((0.0, 0.0), (1.0, 1.0)),
        "system": "Write {numbers} integers.",
    }
    return Spec(**{**fields, **changes})


@pytest.fixture(scope="session")
def processor():
    """The tiny processor."""
    return tiny_processor(["State: ", "Write integers.", *TASKS])


@pytest.fixture(scope="session")
def policy(processor) -> VLA0:
    """A tiny policy with random weights."""
    small = {
        "width": 48,
        "layers": 2,
        "heads": 3,
        "vision_width": 32,
        "vision_layers": 1,
        "vision_heads": 2,
    }
    return VLA0(tiny_model(processor, **small), processor, make_spec())


@pytest.fixture
def observation() -> Observation:
    return make_observation(0)


def make_observation(seed: int) -> Observation:
    rng = np.random.default_rng(seed)
    images = {
        camera: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for camera in ("front", "wrist")
    }
    return Observation(images, TASKS[seed % 2], rng.random(2))


@pytest.fixture
def official_run(policy, tmp_path):
    """The structure of an official run folder, with the tiny model."""
    folder = tmp_path / "run"
    policy.model.save_pretrained(folder / "model_last")
    policy.processor.save_pretrained(folder / "model_last")
    config = {"MODEL": {"QWEN": QWEN}, "DATALOADER": {"ROBOVERSE": {"cfg_opts": OPTIONS}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    statistics = {"out_ori_act": {"min": LOW, "max": HIGH, "mean": LOW * 0, "count": np.float32(7)}}
    (folder / "dataset_stats.pkl").write_bytes(pickle.dumps(statistics, protocol=4))
    (folder / "model_last.pth").write_bytes(b"the optimiser, which nobody reads")
    return folder


@pytest.fixture(scope="session")
def real_processor():
    """Qwen2.5-VL's own processor."""
    folder = SHARED / "qwen2.5-vl-processor"
    if not folder.is_dir():
        pytest.skip("Qwen2.5-VL's processor files are not beside this checkout")
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def frame_of(episode: int, step: int, camera: int, sides=(48, 64)) -> np.ndarray:
    """A picture that tells its episode, step and camera by its colours; smooth, so that video keeps
    it.
    """
    image = np.zeros((*sides, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = (
        40 * episode + 20,
        20 * step + 10,
        100 * camera + 50,
    )
    return image


def make_dataset(
    folder: Path, videos: bool = False, lengths=(6, 4, 5), dimensions: int = 3, sides=(48, 64)
) -> Path:
    """A LeRobot dataset: action[d] = step + 10 * episode + d / 10, state = action / 2."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    kind = "video" if videos else "image"
    picture = {"dtype": kind, "shape": (*sides, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.top": picture,
        "observation.images.hand": picture,
        "observation.state": {"dtype": "float32", "shape": (dimensions,), "names": None},
        "action": {"dtype": "float32", "shape": (dimensions,), "names": None},
    }
    dataset = LeRobotDataset.create(
        "local/small", 10, features, root=folder, use_videos=videos, video_backend="pyav"
    )
    for episode, length in enumerate(lengths):
        for step in range(length):
            action = np.float32(step + 10 * episode) + np.arange(dimensions, dtype=np.float32) / 10
            dataset.add_frame(
                {
                    "observation.images.top": frame_of(episode, step, 0, sides),
                    "observation.images.hand": frame_of(episode, step, 1, sides),
                    "observation.state": action / 2, "action": action, "task": TASKS[episode % 2],
                }
            )  # fmt: skip
        dataset.save_episode()
    dataset.finalize()
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A small LeRobot dataset of images."""
    return make_dataset(tmp_path_factory.mktemp("data") / "small")


RECIPE = {
    "model": {
        "name": "tiny",
        "tiny": {
            "width": 48,
            "layers": 1,
            "heads": 3,
            "vision_width": 32,
            "vision_layers": 1,
            "vision_heads": 2,
        },
    },
    "action": {"chunk_size": 2, "action_bins": 100},
    "spec": {"image_size": 56, "system": "Write {numbers} integers."},
    "training": {"num_steps": 4, "batch_size": 2, "learning_rate": 1e-3, "precision": "fp32"},
    "logging": {"save_every_n_steps": 2, "log_every_n_steps": 1},
}


def make_recipe(dataset: Path, output: Path, **changes) -> dict:
    """A recipe that trains in seconds.

    changes: whole sections, or fields of model, training and logging by their names.
    """
    recipe = {name: dict(section) for name, section in RECIPE.items()}
    recipe["data"] = {
        "dataset": str(dataset),
        "cameras": {"front": "observation.images.top"},
        "state": "observation.state",
    }
    recipe["logging"]["output_dir"] = str(output)
    kinds = {"model": ModelConfig, "training": TrainingConfig, "logging": LoggingConfig}
    for name, value in changes.items():
        section = next(
            (section for section, kind in kinds.items() if name in kind.__dataclass_fields__), None
        )
        if name in TrainConfig.__dataclass_fields__ or section is None:
            recipe[name] = value
        else:
            recipe[section][name] = value
    return recipe


@contextmanager
def serving(policy, kind=Server, **settings):
    """A server in a thread: its address; ended as by SIGTERM."""
    server, ports, loops = kind(policy, **settings), [], []

    async def run():
        stop = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stop))
        await server.run("127.0.0.1", 0, stop, ready=ports.append)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    while not ports and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"ws://127.0.0.1:{ports[0]}", server
    finally:
        loop, stop = loops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def grpc_of(policy):
    """The port of a server of LeRobot's protocol."""
    from vla0.serve.lerobot import LeRobotServer, serve_lerobot

    stop, ports = threading.Event(), []
    thread = threading.Thread(
        target=serve_lerobot, args=(LeRobotServer(policy), "127.0.0.1", 0, ports.append, stop)
    )
    thread.start()
    while not ports:
        time.sleep(0.01)
    try:
        yield ports[0]
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
