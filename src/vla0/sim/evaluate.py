"""Tasks x episodes → episodes.jsonl."""

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
from vla0.sim.results import mend, read_episodes
from vla0.sim.simulator import SIMULATORS, options_of, simulator
from vla0.sim.workers import ATTEMPTS, Predict, RolloutConfig, WorkerPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is evaluated, and how the policy acts in it.

    Saved beside the results; a run goes on only with the same.
    """

    tasks: tuple[str, ...]  # by the simulator's names
    env: str = "metaworld"  # metaworld, libero or arm
    episodes: int = 20  # for each task, seeds first_seed, first_seed + 1, ...
    # None: the simulator's own. LIBERO: 0, its first initial state; Meta-World: above the
    # demonstrations
    first_seed: int | None = None
    n_action_steps: int = 1  # steps executed per query
    ensemble: str = "v1"  # vla0.core.ensemble.weights_by_age
    max_steps: int | None = None  # None: 150 in Meta-World, the suite's cap in LIBERO
    # of the simulator's cameras; None: 112 in Meta-World, 256 in LIBERO
    image_size: int | None = None
    # decisions a second, where the simulator can be asked: those of the policy's Spec
    fps: float | None = None
    # what this simulator alone can be told, e.g. {start: above} in Meta-World
    options: Mapping[str, Any] = field(default_factory=dict)
    ensemble_k: int | None = None  # the newest chunks that are averaged: that of the policy's Spec
    # dimensions that wrap: those of the policy's Spec
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
        most = None if target is None else target.evaluation_seeds.stop
        if most is not None and (self.first_seed or 0) + self.episodes > most:
            raise InputError(
                f"at most the {most} initial states of {self.env}",
                f"{self.episodes} episodes from {self.first_seed}",
                f"evaluate {most} or fewer",
            )


def make_env(config: EvalConfig, task: str) -> Env:
    """The Env of a task. Simulators are imported here, where they are used."""
    return simulator(config.env).make(
        task,
        image_size=config.image_size,
        max_steps=config.max_steps,
        fps=config.fps,
        options=options_of(config.env, config.options),
    )


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
) -> list[dict[str, Any]]:
    """Runs what is missing in `out`/episodes.jsonl, and gives its lines, one for each finished
    episode and each error.

    policies: by name, e.g. {"policy": vla0.predict_batch, "blank": ...}; all see the same seeds. A
    line is written when its episode ends. A crashed simulator is an error line and a new attempt,
    at most 3; an error of the policy rises. make_env: (config, task) → Env, picklable, runs in the
    processes; give your own to evaluate in your own world. identity: what else a result depends on
    (the checkpoint, versions): recorded, and refused where it differs. render: film every step;
    without it the videos hold what the policy looked at. pool: who plays: processes here, or
    vla0.sim.ray_workers.
    """
    acting = (
        chunk_size,
        config.n_action_steps,
        config.ensemble,
        config.ensemble_k,
        config.periodic,
    )
    TemporalEnsemble(*acting)  # refuses what it must before anything starts
    with held(Path(out), "evaluation"):
        try:
            return _run(
                policies, acting, config, Path(out), workers, make_env, identity, render, pool
            )
        finally:
            # of processes that died as they filmed, in this run or before
            clear_aside(Path(out) / "videos")


def _run(
    policies, acting, config: EvalConfig, out: Path, workers, make_env, identity, render, pool
) -> list[dict[str, Any]]:
    (out / "videos").mkdir(exist_ok=True)
    _same_settings(out / "evaluation.json", {**asdict(config), **(identity or {})})
    log = out / "episodes.jsonl"
    mend(log)
    lines = read_episodes(log)
    done = {(e["policy"], e["task"], e["seed"]) for e in lines if e["error"] is None}
    failed = [(e["policy"], e["task"], e["seed"]) for e in lines if e["error"] is not None]
    first = config.first_seed or 0
    seeds = range(first, first + config.episodes)
    heavy = config.env in SIMULATORS and simulator(config.env).heavy
    if heavy:  # one task at a time: a process builds each world once
        every = [(name, task, seed) for task in config.tasks for name in policies for seed in seeds]
    else:  # one policy at a time: full batches
        every = [(name, task, seed) for name in policies for seed in seeds for task in config.tasks]
    jobs = deque(job for job in every if job not in done and failed.count(job) < ATTEMPTS)
    if jobs:
        count = min(len(jobs), workers or (1 if heavy else 8) * (os.cpu_count() or 1))
        with _progress() as progress, log.open("a", encoding="utf-8") as file:
            bar = progress.add_task("", total=len(every), completed=len(every) - len(jobs))

            def record(line):
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
                if line["error"] is None:
                    progress.advance(bar)

            rollout = RolloutConfig(
                make_env=partial(make_env, config),
                acting=acting,
                keep=1 if heavy else len(config.tasks),
                render=render,
            )
            pool(policies, rollout, out, count).run(jobs, record)
    return lines


def _same_settings(file: Path, now: dict[str, Any]) -> None:
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
    return Progress(
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes"),
        TimeRemainingColumn(),
    )
