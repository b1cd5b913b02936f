"""Let an expert act in an Env, and store what it saw and did as a LeRobot dataset."""

import atexit
import contextlib
import hashlib
import logging
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vla0.core.rollout import Env, rollout
from vla0.core.spec import Observation, tupled
from vla0.errors import InputError
from vla0.files import set_aside, unfinished, whole_folder
from vla0.sim.simulator import options_of, simulator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """An episode that the expert solved."""

    instruction: str
    images: dict[str, np.ndarray]  # {camera: (T, h, w, 3) uint8}
    states: np.ndarray  # (T, S) float32
    actions: np.ndarray  # (T, D) float32: what the expert wanted to do, without the noise


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What is demonstrated, and how. None takes the simulator's default."""

    tasks: tuple[str, ...]
    env: str = "metaworld"
    episodes: int = 40  # solved episodes of each task
    seed: int | None = None  # seed of the first episode
    image_size: int | None = None  # side of the pictures in pixels
    fps: float | None = None  # decisions per second, in simulators that let one choose
    # options that only this simulator has, such as {start: above} in Meta-World
    options: Mapping[str, Any] = field(default_factory=dict)
    noise_share: float | None = None  # share of the steps whose action is disturbed
    noise_scale: float | None = None  # standard deviation of the disturbance
    # store pictures as videos: they take a twentieth of the space, and more time to read and write
    videos: bool = False

    def __post_init__(self):
        target = simulator(self.env)
        options_of(self.env, self.options)
        object.__setattr__(self, "tasks", target.tasks(tupled(self.tasks)))
        if self.fps is not None and not target.any_fps:
            raise InputError(f"no fps for {self.env}", f"{self.fps:g}", "its rate is its own")
        for name, value in {
            "seed": target.seeds.start,
            "noise_share": target.noise[0],
            "noise_scale": target.noise[1],
        }.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        seeds = range(self.seed or 0, (self.seed or 0) + 2 * self.episodes)
        if self.episodes < 1 or seeds.start not in target.seeds or seeds[-1] not in target.seeds:
            raise InputError(
                f"episodes >= 1, and seeds in {target.seeds.start}..{target.seeds.stop - 1}",
                f"{self.episodes} from seed {self.seed}",
                "the others are for evaluation",
            )


class NoisyEnv:
    """An Env that disturbs a share of the actions, so that the expert shows how to recover.

    The recorded actions are those without the disturbance.

    Args:
        env: The Env that executes the actions.
        rng: Draws the noise.
        share: Share of the actions that are disturbed.
        scale: Standard deviation of the noise, in the units of the actions.
    """

    def __init__(self, env: Env, rng: np.random.Generator, share: float, scale: float):
        self.env, self.rng, self.share, self.scale = env, rng, share, scale
        self.fps, self.max_steps = env.fps, env.max_steps

    def reset(self, seed: int) -> Observation:
        """Start the episode of a seed, without any disturbance."""
        return self.env.reset(seed)

    def step(self, action: np.ndarray) -> tuple[Observation, bool]:
        """Execute an action, which is sometimes disturbed by normal noise."""
        if self.rng.random() < self.share:
            action = action + self.rng.normal(0, self.scale, action.shape)
        return self.env.step(action)

    def close(self) -> None:
        """Close the Env that executes the actions."""
        self.env.close()


@lru_cache(maxsize=4)  # a LIBERO world takes a gigabyte of memory
def _world(name: str, task: str, image_size: int | None, fps: float | None, options: Any):
    """Make the Env of a task and its expert."""
    target = simulator(name)
    env = target.make(task, image_size=image_size, fps=fps, options=options)
    atexit.register(env.close)  # it must close before the interpreter unloads OpenGL
    return env, target.make_expert(env)


def demonstrate(
    config: CollectConfig, task: str, seed: int, store: Path | None = None
) -> Demonstration | None:
    """Let the expert play the episode of a seed.

    Args:
        config: What is demonstrated.
        task: Full name of the task.
        seed: Seed of the episode.
        store: Folder that keeps finished episodes. An episode is read from there when an earlier
            run has stored it.

    Returns:
        The demonstration, or None when the expert failed.
    """
    file = None if store is None else store / f"{task.replace('/', '-')}_{seed}.npz"
    if file is not None and file.exists():
        return _read(file)
    options = options_of(config.env, config.options)
    env, expert = _world(config.env, task, config.image_size, config.fps, options)
    seen: list[Observation] = []
    noisy = NoisyEnv(
        env,
        np.random.default_rng([seed, 10_000]),
        config.noise_share or 0.0,
        config.noise_scale or 0.0,
    )
    episode = rollout(
        noisy,
        expert,
        seed,
        lambda observation, _: seen.append(replace(observation, images=dict(observation.images))),
    )
    demonstration = None
    if episode.success:
        images = {
            camera: np.stack([observation.images[camera] for observation in seen])
            for camera in seen[0].images
        }
        states = np.stack(
            [observation.state for observation in seen if observation.state is not None]
        )
        demonstration = Demonstration(
            instruction=seen[0].instruction, images=images, states=states, actions=episode.actions
        )
    if file is not None:
        _write(file, demonstration)
    return demonstration


def _write(file: Path, demonstration: Demonstration | None) -> None:
    """Store a demonstration, or an empty file for a failure."""
    with set_aside(file) as partial, partial.open("wb") as stream:
        if demonstration is None:
            np.savez(stream)
        else:
            pictures = {
                f"images.{camera}": frames for camera, frames in demonstration.images.items()
            }
            rest = {
                "instruction": demonstration.instruction,
                "states": demonstration.states,
                "actions": demonstration.actions,
            }
            np.savez_compressed(stream, allow_pickle=False, **pictures, **rest)


def _read(file: Path) -> Demonstration | None:
    """Read what `_write` stored."""
    with np.load(file, allow_pickle=False) as arrays:
        if not arrays.files:
            return None
        images = {
            key.removeprefix("images."): arrays[key]
            for key in arrays.files
            if key.startswith("images.")
        }
        return Demonstration(
            instruction=str(arrays["instruction"]),
            images=images,
            states=arrays["states"],
            actions=arrays["actions"],
        )


def collect(
    config: CollectConfig, out: str | Path, workers: int | None = None
) -> dict[str, tuple[int, int]]:
    """Write a LeRobotDataset v3.0 of the episodes that the expert solved.

    A task without an expert is left out with a warning, and so is the rest of a task at which the
    expert fails too often. The same arguments give the same dataset. It is built beside `out` and
    then renamed, so that `out` never holds half of it. After an interruption the finished episodes
    remain in a hidden folder beside `out`, and the same call continues from there.

    Args:
        config: What is demonstrated.
        out: New folder of the dataset.
        workers: Number of processes. None takes one per core.

    Returns:
        {task: (solved episodes, failed episodes, which are left out)}.

    Raises:
        InputError: When `out` exists, or the expert solves no episode.
    """
    out, target = Path(out), simulator(config.env)
    for task in config.tasks:
        if not target.has_expert(task):
            logger.warning("%s has no expert and is left out", task)
    config = replace(config, tasks=tuple(filter(target.has_expert, config.tasks)))
    # This is what an episode depends on beside its task and its seed.
    conditions = replace(config, tasks=(), episodes=1, videos=False)
    store = out.with_name(
        f".{out.name}.episodes-{hashlib.sha256(repr(conditions).encode()).hexdigest()[:8]}"
    )
    failures, solved = dict.fromkeys(config.tasks, 0), dict.fromkeys(config.tasks, 0)
    with whole_folder(out) as partial:
        store.mkdir(exist_ok=True)
        demonstrations = _stream(config, workers, failures, store)
        # Closed before the folder goes: what is interrupted here must not write into it later.
        with contextlib.closing(
            _write_dataset(partial, f"local/{out.name}", config, demonstrations)
        ) as written:
            for task in written:
                solved[task] += 1
        if not any(solved.values()):
            shutil.rmtree(store)
            raise InputError(
                "a task that its expert solves",
                f"{failures or 'no expert'}",
                "less noise, or another task",
            )
    for folder in (store, *unfinished(out.parent, re.escape(out.name))):
        shutil.rmtree(folder, ignore_errors=True)
    return {task: (solved[task], failures[task]) for task in config.tasks}


def _write_dataset(
    folder: Path,
    repo_id: str,
    config: CollectConfig,
    demonstrations: Iterable[tuple[str, Demonstration]],
) -> Generator[str]:
    """Write demonstrations into a new LeRobotDataset, and yield the task of each one written."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from vla0.data.frames import video_backend

    target = simulator(config.env)
    pictures = {
        "dtype": "video" if config.videos else "image",
        "shape": (config.image_size or target.image_size,) * 2 + (3,),
        "names": ["height", "width", "channels"],
    }
    features = dict.fromkeys(target.cameras.values(), pictures) | {
        key: {"dtype": "float32", "shape": (len(names),), "names": list(names)}
        for key, names in {"observation.state": target.states, "action": target.actions}.items()
    }
    dataset: Any = None
    try:
        for task, demonstration in demonstrations:
            if dataset is None:  # now one episode has shown that the expert works
                dataset = LeRobotDataset.create(
                    repo_id,
                    int(config.fps or target.fps),
                    features,
                    root=folder,
                    robot_type=config.env,
                    use_videos=config.videos,
                    image_writer_threads=2,
                    video_backend=video_backend(),
                )
            logger.debug("%s: %d steps", task, len(demonstration.actions))
            for step, (state, action) in enumerate(
                zip(demonstration.states, demonstration.actions, strict=True)
            ):
                frames = {
                    target.cameras[camera]: images[step]
                    for camera, images in demonstration.images.items()
                }
                arrays = {"observation.state": state, "action": action}
                dataset.add_frame({**frames, **arrays, "task": demonstration.instruction})
            dataset.save_episode()
            yield task
        if dataset is not None:
            dataset.finalize()
            shutil.rmtree(folder / "images", ignore_errors=True)  # LeRobot's temporary copies
    except BaseException:
        # Without this, the dataset would write its files later, after the folder is gone.
        if dataset is not None:
            with contextlib.suppress(Exception):
                dataset.finalize()
        raise


def _stream(
    config: CollectConfig, workers: int | None, failures: dict[str, int], store: Path | None
) -> Iterator[tuple[str, Demonstration]]:
    """Yield demonstrations in a fixed order, while processes make the next ones.

    The tasks of a heavy simulator come one after another, and those of others take turns.
    """
    workers = workers or os.cpu_count() or 1
    turns = [task for _ in range(config.episodes) for task in config.tasks]
    order = sorted(turns, key=config.tasks.index) if simulator(config.env).heavy else turns
    seeds = {
        task: iter(range(config.seed or 0, (config.seed or 0) + 2 * config.episodes))
        for task in config.tasks
    }
    spent: set[str] = set()
    ahead: dict[str, list[Future]] = {task: [] for task in config.tasks}
    columns = (
        TextColumn("collecting"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes"),
        TimeRemainingColumn(),
    )
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, ExitStack() as stack:
        pool = ProcessPoolExecutor(workers, context, _work_for_a_parent)
        # An interruption does not wait for the episodes that have not begun.
        stack.callback(pool.shutdown, cancel_futures=True)
        bar = progress.add_task("", total=len(order))
        for place, task in enumerate(order):
            demonstration = None
            while demonstration is None:
                for coming, count in Counter(order[place : place + 2 * workers]).items():
                    for seed in islice(seeds[coming], max(0, count - len(ahead[coming]))):
                        ahead[coming].append(pool.submit(demonstrate, config, coming, seed, store))
                if not ahead[task]:
                    break  # all seeds of the task are used up
                demonstration = ahead[task].pop(0).result()
                failures[task] += demonstration is None
            if demonstration is not None:
                yield task, demonstration
            elif task not in spent:
                logger.warning(
                    "%s is given up: its expert failed at %d seeds", task, failures[task]
                )
                spent.add(task)
            progress.advance(bar)


def _work_for_a_parent() -> None:
    """Let a worker leave Ctrl-C to its parent, and end when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
