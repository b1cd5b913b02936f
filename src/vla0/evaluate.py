"""Tasks x episodes → episodes.jsonl."""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vla0.ensemble import TemporalEnsemble
from vla0.envs import ENVS, make, simulator
from vla0.parallel import ATTEMPTS, Crew, Predict
from vla0.rollout import Env
from vla0.spec import InputError, Spec, refuse_unknown, tupled
from vla0.table import mend, read_episodes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and how the policy acts in it. Saved beside the results; a run goes on only with the same."""

    tasks: tuple[str, ...]
    env: str = "metaworld"
    episodes: int = 20  # for each task, seeds first_seed, first_seed + 1, ...
    first_seed: int | None = (
        None  # None: the simulator's own. LIBERO: 0, its first initial state; Meta-World: above the demonstrations
    )
    replan: int = 1  # steps executed per query
    ensemble: str = "v1"  # vla0.ensemble.weights_by_age
    max_steps: int | None = None  # None: 150 in Meta-World, the suite's cap in LIBERO
    image_size: int | None = None  # of the simulator's cameras; None: 112 in Meta-World, 256 in LIBERO
    start: str = "stock"  # of Meta-World's hand; from "above" one has to look
    fps: float = 80.0  # decisions a second in Meta-World: those of the policy's Spec
    quick: bool = False  # LIBERO without shadows, reflections and multisampling: faster on a CPU, other pictures

    def __post_init__(self):
        object.__setattr__(self, "tasks", tupled(self.tasks))
        if not self.tasks or isinstance(self.tasks, str):
            raise InputError("a list of tasks", f"{self.tasks!r}", "name one at least")
        if self.first_seed is None and self.env in ENVS:
            object.__setattr__(self, "first_seed", simulator(self.env).FIRST_SEED)
        if min(self.episodes, 1 if self.max_steps is None else self.max_steps) < 1 or (self.first_seed or 0) < 0:
            raise InputError("episodes and max_steps >= 1, first_seed >= 0", f"{asdict(self)}", "correct them")
        if self.env == "libero":
            object.__setattr__(self, "tasks", tuple(simulator("libero").task_named(task) for task in self.tasks))
            if (self.first_seed or 0) + self.episodes > 50:
                raise InputError("at most LIBERO's 50 initial states", f"{self.episodes} episodes", "evaluate 50 or fewer")


def make_env(config: EvalConfig, task: str) -> Env:
    """The Env of a task. Simulators are imported here, where they are used."""
    return make(config.env, task, config.image_size, config.max_steps, config.start, config.fps, config.quick)


def fit(spec: Spec, env: str) -> None:
    """Raises InputError where a checkpoint cannot act in a simulator: other cameras, or another number of action dimensions."""
    module = simulator(env)
    missing = [camera for camera in spec.cameras if camera not in module.CAMERAS]
    if missing:
        remedy = "map the recipe's cameras to these names and train"
        raise InputError(f"cameras of {tuple(module.CAMERAS)}, as {env} has", f"'{missing[0]}' in the checkpoint", remedy)
    if spec.dimensions != len(module.ACTIONS):
        raise InputError(
            f"actions of {len(module.ACTIONS)} numbers, as {env} takes", f"{spec.dimensions} in the checkpoint", "use another"
        )


def evaluate(
    policies: Mapping[str, Predict],
    horizon: int,
    config: EvalConfig,
    out: str | Path,
    workers: int | None = None,
    make_env: Callable[[EvalConfig, str], Env] = make_env,
    identity: Mapping[str, Any] | None = None,
    render: bool = False,
) -> list[dict[str, Any]]:
    """Runs what is missing in `out`/episodes.jsonl, and gives its lines, one for each finished episode and each error.

    policies: by name, e.g. {"policy": vla0.predict_batch, "blank": ...}; all see the same seeds. A line is written when
    its episode ends. A crashed simulator is an error line and a new attempt, at most 3; an error of the policy rises.
    make_env: (config, task) → Env, picklable, runs in the processes; give your own to evaluate in your own world.
    identity: what else a result depends on (the checkpoint, versions): recorded, and refused where it differs.
    render: film every step; without it the videos hold what the policy looked at.
    """
    TemporalEnsemble(horizon, config.replan, config.ensemble)  # refuses what it must before anything starts
    out = Path(out)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    _same_settings(out / "evaluation.json", {**asdict(config), **(identity or {})})
    log = out / "episodes.jsonl"
    mend(log)
    lines = read_episodes(log)
    done = {(e["policy"], e["task"], e["seed"]) for e in lines if e["error"] is None}
    failed = [(e["policy"], e["task"], e["seed"]) for e in lines if e["error"] is not None]
    first = config.first_seed or 0
    seeds = range(first, first + config.episodes)
    heavy = config.env in ENVS and simulator(config.env).HEAVY
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
                if line["error"] is None:
                    progress.advance(bar)

            acting = (horizon, config.replan, config.ensemble)
            keep = 1 if heavy else len(config.tasks)
            Crew(policies, partial(make_env, config), acting, out, count, keep, render).run(jobs, record)
    return lines


def _same_settings(file: Path, now: dict[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        refuse_unknown(before, now, str(file))
        for key in now:
            if key != "episodes" and before.get(key) != now[key]:
                raise InputError(f"{key} {before.get(key)}, as in '{file}'", f"{now[key]}", "evaluate into another folder")
    file.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def blanked(predict: Predict) -> Predict:
    """The policy with every picture black: what it does without looking."""

    def blind(observations):
        dark = [{camera: np.zeros_like(frame) for camera, frame in o.images.items()} for o in observations]
        return predict([replace(o, images=images) for images, o in zip(dark, observations, strict=True)])

    return blind


def exchanged(predict: Predict, tasks: Sequence[tuple[str, str]]) -> Predict:
    """The policy given the next task's sentence, of those of its suite: what it does without listening.

    tasks: (task, sentence) of all that are evaluated.
    """
    swap: dict[str, str] = {}
    for suite in {task.rpartition("/")[0] for task, _ in tasks}:
        own = [sentence for task, sentence in tasks if task.rpartition("/")[0] == suite]
        if len(own) < 2:
            raise InputError("two tasks of a suite or more, to exchange sentences", f"{own}", "evaluate more tasks")
        swap |= dict(zip(own, own[1:] + own[:1], strict=True))

    def deaf(observations):
        return predict([replace(o, instruction=swap[o.instruction]) for o in observations])

    return deaf


def random_actions(low: Sequence[float], high: Sequence[float], horizon: int, seed: int = 0) -> Predict:
    """A policy of uniform actions between the bounds."""
    rng = np.random.default_rng(seed)
    return lambda observations: rng.uniform(low, high, (len(observations), horizon, len(low))).astype(np.float32)


def _progress() -> Progress:
    return Progress(TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("episodes"), TimeRemainingColumn())
