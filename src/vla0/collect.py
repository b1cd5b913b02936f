"""An expert in an Env → a LeRobot dataset of what it saw and did."""

import atexit
import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vla0.rollout import Env, rollout
from vla0.spec import InputError, Observation

logger = logging.getLogger(__name__)

SEEDS = 10_000  # demonstrations take seeds below it, evaluations from it on: what is tested was never seen


@dataclass(frozen=True)
class Demonstration:
    """A solved episode of the expert."""

    instruction: str
    images: np.ndarray  # (T, h, w, 3) uint8
    states: np.ndarray  # (T, S) float32
    actions: np.ndarray  # (T, D) float32: what the expert wanted, without the noise


class NoisyEnv:
    """An Env that disturbs a share of the actions, so that the expert shows how to recover. Labels stay clean."""

    def __init__(self, env: Env, rng: np.random.Generator, share: float, scale: float):
        self.env, self.rng, self.share, self.scale = env, rng, share, scale
        self.fps, self.max_steps = env.fps, env.max_steps

    def reset(self, seed: int) -> Observation:
        """Starts the episode of the seed, undisturbed."""
        return self.env.reset(seed)

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """One tick with the action, at times disturbed by normal noise of `scale`."""
        if self.rng.random() < self.share:
            action = action + self.rng.normal(0, self.scale, action.shape)
        return self.env.step(action)

    def close(self) -> None:
        """Closes the world below."""
        self.env.close()


@lru_cache(maxsize=16)
def _world(task: str, image_size: int, start: str, fps: float):
    from vla0.envs.metaworld import MetaWorldEnv, MetaWorldExpert

    env = MetaWorldEnv(task, image_size, start=start, fps=fps)
    atexit.register(env.close)  # before the interpreter takes OpenGL apart
    return env, MetaWorldExpert(env)


def demonstrate(
    task: str, seed: int, image_size: int, start: str, fps: float, share: float, scale: float
) -> Demonstration | None:
    """The expert's episode for a seed; None where it failed."""
    env, expert = _world(task, image_size, start, fps)
    seen: list[Observation] = []
    noisy = NoisyEnv(env, np.random.default_rng([seed, SEEDS]), share, scale)
    episode = rollout(noisy, expert, seed, lambda observation, action: seen.append(observation))
    if not episode.success:
        return None
    images = np.stack([next(iter(observation.images.values())) for observation in seen])
    states = np.stack([observation.state for observation in seen if observation.state is not None])
    return Demonstration(env.instruction, images, states, episode.actions)


def collect(
    tasks: Sequence[str],
    episodes: int,
    out: str | Path,
    seed: int = 0,
    image_size: int = 112,
    start: str = "stock",
    fps: int = 80,
    noise_share: float = 0.3,
    noise_scale: float = 0.3,
    workers: int | None = None,
) -> dict[str, int]:
    """Writes a LeRobotDataset v3.0 of `episodes` solved episodes for each Meta-World task; {task: failures left out}.

    At `out` there is never a half-written dataset: it is built beside and renamed. Same arguments, same dataset.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from vla0.data import video_backend
    from vla0.envs.metaworld import CAMERA

    out = Path(out)
    if out.exists():
        raise InputError("a new folder", f"'{out}', which exists", "name another, or remove it")
    if episodes < 1 or not 0 <= seed < SEEDS - 2 * episodes:
        raise InputError(
            f"episodes >= 1, and seeds in 0..{SEEDS - 1}", f"{episodes} from seed {seed}", "later seeds are for evaluation"
        )
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    features = {
        f"observation.images.{CAMERA}": {
            "dtype": "image",
            "shape": (image_size, image_size, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
        "action": {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "gripper"]},
    }
    failures = dict.fromkeys(tasks, 0)
    try:
        dataset = LeRobotDataset.create(
            f"local/{out.name}", fps, features, root=partial, robot_type="metaworld", use_videos=False,
            image_writer_threads=2, video_backend=video_backend(),
        )  # fmt: skip
        for task, demonstration in _stream(
            tasks, episodes, seed, (image_size, start, fps, noise_share, noise_scale), workers, failures
        ):
            logger.debug("%s: %d steps", task, len(demonstration.actions))
            for image, state, action in zip(demonstration.images, demonstration.states, demonstration.actions, strict=True):
                frame = {f"observation.images.{CAMERA}": image, "observation.state": state, "action": action}
                dataset.add_frame({**frame, "task": demonstration.instruction})
            dataset.save_episode()
        dataset.finalize()
        shutil.rmtree(partial / "images", ignore_errors=True)  # LeRobot's scratch copies; the parquet holds them
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return failures


def _stream(tasks, episodes, seed, settings, workers, failures) -> Iterator[tuple[str, Demonstration]]:
    """Demonstrations in a fixed order, tasks taking turns, made in parallel processes."""
    columns = (TextColumn("collecting"), BarColumn(), MofNCompleteColumn(), TextColumn("episodes"), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        bar = progress.add_task("", total=episodes * len(tasks))
        seeds = {task: iter(range(seed, seed + 2 * episodes)) for task in tasks}
        ahead = {task: [] for task in tasks}

        def submit(task):
            following = next(seeds[task], None)
            if following is not None:
                ahead[task].append(pool.submit(demonstrate, task, following, *settings))

        for task in tasks:
            submit(task)
            submit(task)
        for _ in range(episodes):
            for task in tasks:
                demonstration = None
                while demonstration is None:
                    if not ahead[task]:
                        raise InputError(
                            f"an expert that solves {task}", f"{failures[task]} failures", "less noise, or another task"
                        )
                    demonstration = ahead[task].pop(0).result()
                    failures[task] += demonstration is None
                    submit(task)
                yield task, demonstration
                progress.advance(bar)
        for task in tasks:
            for future in ahead[task]:
                future.cancel()
