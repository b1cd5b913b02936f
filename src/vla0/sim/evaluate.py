"""Evaluate policies on tasks in a simulator, and write a line per episode to episodes.jsonl."""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vla0.core.ensemble import TemporalEnsemble
from vla0.core.rollout import Env
from vla0.core.spec import tupled
from vla0.errors import InputError, refuse_unknown
from vla0.files import clear_aside, held, read_json, write_whole
from vla0.sim.history import Remembering
from vla0.sim.results import mend, read_episodes
from vla0.sim.simulator import SIMULATORS, options_of, simulator
from vla0.sim.workers import ATTEMPTS, NoChunkError, Predict, RolloutConfig, WorkerPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is evaluated, and how the policy acts there.

    It is saved beside the results, and a run continues only with the same settings.
    """

    tasks: tuple[str, ...]  # the tasks, by the simulator's names
    env: str = "metaworld"  # the simulator: metaworld, libero or arm
    # Episodes of each task. Their seeds are first_seed, first_seed + 1, and so on
    episodes: int = 20
    # Seed of the first episode. None takes the simulator's default: in LIBERO 0, which is its first
    # initial state, and in Meta-World the first seed that no demonstration has
    first_seed: int | None = None
    n_action_steps: int = 1  # steps executed per query of the model
    # Weights of overlapping chunks by age: see vla0.core.ensemble.weights_by_age
    ensemble: str = "v1"
    # Steps after which an episode has failed. None means 150 in Meta-World and the suite's cap in
    # LIBERO
    max_steps: int | None = None
    # Side of the simulator's pictures in pixels. None means 112 in Meta-World and 256 in LIBERO
    image_size: int | None = None
    # Decisions per second, in simulators that let one choose. The policy's Spec decides it
    fps: float | None = None
    # Options that only this simulator has, such as {start: above} in Meta-World
    options: Mapping[str, Any] = field(default_factory=dict)
    # How many of the newest chunks are averaged. The policy's Spec decides it
    ensemble_k: int | None = None
    # Dimensions that wrap around. The policy's Spec decides them
    periodic: tuple[tuple[int, float, float], ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "tasks", tupled(self.tasks))
        object.__setattr__(self, "periodic", tupled(self.periodic))
        if not self.tasks or isinstance(self.tasks, str):
            raise InputError("a list of tasks", f"{self.tasks!r}", "name one at least")
        target = simulator(self.env) if self.env in SIMULATORS else None
        if target is not None:
            options_of(self.env, self.options)
            object.__setattr__(self, "tasks", target.tasks(self.tasks))
            if self.first_seed is None:
                object.__setattr__(self, "first_seed", target.evaluation_seeds.start)
        if (
            min(self.episodes, 1 if self.max_steps is None else self.max_steps) < 1
            or (self.first_seed or 0) < 0
        ):
            raise InputError(
                "episodes and max_steps >= 1, first_seed >= 0", f"{asdict(self)}", "correct them"
            )
        seed_limit = None if target is None else target.evaluation_seeds.stop
        if seed_limit is not None and (self.first_seed or 0) + self.episodes > seed_limit:
            raise InputError(
                f"at most the {seed_limit} initial states of {self.env}",
                f"{self.episodes} episodes from {self.first_seed}",
                f"evaluate {seed_limit} or fewer",
            )


def make_env(config: EvalConfig, task: str) -> Env:
    """Make the Env of a task. The simulator is imported only now."""
    return simulator(config.env).make(
        task,
        image_size=config.image_size,
        max_steps=config.max_steps,
        fps=config.fps,
        options=options_of(config.env, config.options),
    )


@dataclass(frozen=True)
class Past:
    """What a policy sees of the past.

    Args:
        count: Pictures of each camera, the present one included.
        states: Whether it sees past states too.
    """

    count: int = 1
    states: bool = False


PRESENT = Past()


def _remembering(make: Callable[[str], Env], past: Past, task: str) -> Env:
    """Make an Env whose observations hold what a policy sees of the past."""
    return Remembering(make(task), past.count, past.states)


def world(
    config: EvalConfig,
    past: Past = PRESENT,
    make_env: Callable[[EvalConfig, str], Env] = make_env,
) -> Callable[[str], Env]:
    """Return what makes the Env of a task, with as much of the past as a policy sees."""
    make: Callable[[str], Env] = partial(make_env, config)
    return partial(_remembering, make, past) if past.count > 1 else make


def evaluate(
    policies: Mapping[str, Predict],
    chunk_size: int,
    config: EvalConfig,
    out: str | Path,
    workers: int | None = None,
    make_env: Callable[[EvalConfig, str], Env] = make_env,
    identity: Mapping[str, Any] | None = None,
    render: bool = False,
    pool: Callable[..., Any] = WorkerPool,
    past: Past = PRESENT,
) -> list[dict[str, Any]]:
    """Run the episodes that are missing in `out`/episodes.jsonl.

    A line is written when its episode ends. When a simulator crashes, an error line is written and
    the episode is tried again, up to 3 attempts. An error of a policy ends the evaluation.

    Args:
        policies: The policies by name, such as {"policy": vla0.predict_batch, "blank": ...}. All
            see the same seeds.
        chunk_size: Steps of the chunks that the policies predict.
        config: What is evaluated.
        out: Folder of the results.
        workers: Number of processes. None means one per core for heavy simulators and 8 per core
            for others.
        make_env: Makes the Env of (config, task). It must be picklable, because it runs in the
            processes. Pass your own to evaluate in your own world.
        identity: What else a result depends on, such as the checkpoint and versions. It is recorded
            in `out`.
        render: Film every step. Otherwise the videos hold what the policy looked at.
        pool: Class that plays the episodes: WorkerPool here, or the one of vla0.sim.ray_workers.
        past: What the policies see of the past.

    Returns:
        The lines of episodes.jsonl: one for each finished episode and each error.

    Raises:
        InputError: When `out` holds results of other settings or of another identity.
    """
    acting = (
        chunk_size,
        config.n_action_steps,
        config.ensemble,
        config.ensemble_k,
        config.periodic,
    )
    make = world(config, past, make_env)
    if past.count > 1:
        identity = {**(identity or {}), "past": asdict(past)}
    TemporalEnsemble(*acting)  # raises InputError for bad settings before anything starts
    with held(Path(out), "evaluation"):
        try:
            return _run(policies, acting, config, Path(out), workers, make, identity, render, pool)
        finally:
            # These files are left by processes that died while they filmed, in this run or before.
            clear_aside(Path(out) / "videos")


def _run(
    policies, acting, config: EvalConfig, out: Path, workers, make, identity, render, pool
) -> list[dict[str, Any]]:
    """Do what `evaluate` says, while the folder is locked."""
    (out / "videos").mkdir(exist_ok=True)
    _same_settings(out / "evaluation.json", {**asdict(config), **(identity or {})})
    log = out / "episodes.jsonl"
    mend(log)
    lines = read_episodes(log)
    done = {(e["policy"], e["task"], e["seed"]) for e in lines if e["error"] is None}
    failed = [
        (e["policy"], e["task"], e["seed"])
        for e in lines
        if e["error"] is not None and not e["error"].startswith(NoChunkError.__name__)
    ]
    first = config.first_seed or 0
    seeds = range(first, first + config.episodes)
    heavy = config.env in SIMULATORS and simulator(config.env).heavy
    if heavy:  # one task at a time, so that a process builds each world once
        all_jobs = [
            (name, task, seed) for task in config.tasks for name in policies for seed in seeds
        ]
    else:  # one policy at a time, so that batches are full
        all_jobs = [
            (name, task, seed) for name in policies for seed in seeds for task in config.tasks
        ]
    jobs = deque(job for job in all_jobs if job not in done and failed.count(job) < ATTEMPTS)
    if jobs:
        count = min(len(jobs), workers or (1 if heavy else 8) * (os.cpu_count() or 1))
        with _progress() as progress, log.open("a", encoding="utf-8") as file:
            bar = progress.add_task("", total=len(all_jobs), completed=len(all_jobs) - len(jobs))

            def record(line):
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
                if line["error"] is None:
                    progress.advance(bar)

            rollout = RolloutConfig(
                make_env=make,
                acting=acting,
                keep=1 if heavy else len(config.tasks),
                render=render,
            )
            pool(policies, rollout, out, count).run(jobs, record)
    return lines


def _same_settings(file: Path, now: dict[str, Any]) -> None:
    """Write the settings, or raise InputError when the file holds others."""
    now = json.loads(json.dumps(now))
    if file.exists():
        before = read_json(
            file,
            "remove it if the results beside it are of the same settings, or evaluate into "
            "another folder",
        )
        refuse_unknown(before, now, str(file))
        for key in now:
            if key != "episodes" and before.get(key) != now[key]:
                raise InputError(
                    f"{key} {before.get(key)}, as in '{file}'",
                    f"{now[key]}",
                    "evaluate into another folder",
                )
    write_whole(file, json.dumps(now, indent=2) + "\n")


def _progress() -> Progress:
    """Return the bar that counts episodes."""
    return Progress(
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes"),
        TimeRemainingColumn(),
    )
