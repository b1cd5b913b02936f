"""Tasks x episodes → episodes.jsonl → table."""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vla0.collect import SEEDS
from vla0.ensemble import TemporalEnsemble
from vla0.parallel import ATTEMPTS, Crew, Predict
from vla0.rollout import Env
from vla0.spec import InputError, Observation, refuse_unknown, tupled

logger = logging.getLogger(__name__)

ENVS = ("metaworld",)


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and how the policy acts in it. Saved beside the results; a run goes on only with the same."""

    tasks: tuple[str, ...]
    env: str = "metaworld"
    episodes: int = 20  # for each task, seeds first_seed, first_seed + 1, ...
    first_seed: int = SEEDS  # demonstrations take seeds below
    replan: int = 1  # steps executed per query
    ensemble: str = "v1"  # vla0.ensemble.weights_by_age
    max_steps: int = 150
    image_size: int = 112  # of the simulator's camera
    start: str = "stock"  # of Meta-World's hand; from "above" one has to look
    fps: float = 80.0  # decisions a second: those of the policy's Spec

    def __post_init__(self):
        object.__setattr__(self, "tasks", tupled(self.tasks))
        if not self.tasks or isinstance(self.tasks, str):
            raise InputError("a list of tasks", f"{self.tasks!r}", "name one at least")
        if min(self.episodes, self.max_steps) < 1 or self.first_seed < 0:
            raise InputError("episodes and max_steps >= 1, first_seed >= 0", f"{asdict(self)}", "correct them")


def make_env(config: EvalConfig, task: str) -> Env:
    """The Env of a task. Simulators are imported here, where they are used."""
    if config.env not in ENVS:
        raise InputError(f"env of {ENVS}", f"'{config.env}'", "choose one of those")
    try:
        from vla0.envs.metaworld import MetaWorldEnv
    except ImportError as error:
        raise InputError("Meta-World", str(error), "pip install 'vla0[metaworld]'") from None
    return MetaWorldEnv(task, config.image_size, config.max_steps, config.start, config.fps)


def evaluate(
    policies: Mapping[str, Predict],
    horizon: int,
    config: EvalConfig,
    out: str | Path,
    workers: int | None = None,
    make_env: Callable[[EvalConfig, str], Env] = make_env,
) -> list[dict[str, Any]]:
    """Runs what is missing in `out`/episodes.jsonl, and gives its lines, one for each finished episode and each error.

    policies: by name, e.g. {"policy": vla0.predict_batch, "blank": ...}; all see the same seeds. A line is written when
    its episode ends. A crashed simulator is an error line and a new attempt, at most 3; an error of the policy rises.
    make_env: (config, task) → Env, picklable, runs in the processes; give your own to evaluate in your own world.
    """
    TemporalEnsemble(horizon, config.replan, config.ensemble)  # refuses what it must before anything starts
    out = Path(out)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    _same_settings(out / "evaluation.json", config)
    log = out / "episodes.jsonl"
    mend(log)
    lines = read_episodes(log)
    done = {(e["policy"], e["task"], e["seed"]) for e in lines if e["error"] is None}
    failed = [(e["policy"], e["task"], e["seed"]) for e in lines if e["error"] is not None]
    seeds = range(config.first_seed, config.first_seed + config.episodes)
    # One policy at a time: full batches.
    every = [(name, task, seed) for name in policies for seed in seeds for task in config.tasks]
    jobs = deque(job for job in every if job not in done and failed.count(job) < ATTEMPTS)
    if jobs:
        count = min(len(jobs), workers or 8 * (os.cpu_count() or 1))
        with _progress() as progress, log.open("a", encoding="utf-8") as file:
            bar = progress.add_task("", total=len(every), completed=len(every) - len(jobs))

            def record(line):
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                if line["error"] is None:
                    progress.advance(bar)

            acting = (horizon, config.replan, config.ensemble)
            Crew(policies, partial(make_env, config), acting, out, count).run(jobs, record)
    return lines


def read_episodes(file: Path) -> list[dict[str, Any]]:
    """The lines of episodes.jsonl; none where there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def mend(file: Path) -> None:
    """Cuts a last line that a kill left half-written."""
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            file.write_bytes(whole)


def _same_settings(file: Path, config: EvalConfig) -> None:
    now = json.loads(json.dumps(asdict(config)))
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
        return predict([Observation(images, o.instruction, o.state) for images, o in zip(dark, observations, strict=True)])

    return blind


def random_actions(low: Sequence[float], high: Sequence[float], horizon: int, seed: int = 0) -> Predict:
    """A policy of uniform actions between the bounds."""
    rng = np.random.default_rng(seed)
    return lambda observations: rng.uniform(low, high, (len(observations), horizon, len(low))).astype(np.float32)


def wilson(successes: int, episodes: int) -> tuple[float, float]:
    """The 95 % interval of a success rate (Wilson 1927); (0, 1) of no episodes."""
    if episodes == 0:
        return 0.0, 1.0
    z, rate = 1.959964, successes / episodes
    centre = rate + z * z / (2 * episodes)
    half = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes * episodes))
    return max(0.0, (centre - half) / (1 + z * z / episodes)), min(1.0, (centre + half) / (1 + z * z / episodes))


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{policy: {task: {episodes, successes, errors, low, high, steps}}} of episodes.jsonl; steps: median of the solved."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for policy in sorted({line["policy"] for line in lines}, key=lambda name: (name != "policy", name)):
        for task in sorted({line["task"] for line in lines if line["policy"] == policy}):
            own = [line for line in lines if line["policy"] == policy and line["task"] == task]
            ended = [line for line in own if line["error"] is None]
            solved = [line["steps"] for line in ended if line["success"]]
            low, high = wilson(len(solved), len(ended))
            table.setdefault(policy, {})[task] = {
                "episodes": len(ended), "successes": len(solved), "errors": len(own) - len(ended),
                "low": low, "high": high, "steps": float(np.median(solved)) if solved else None,
            }  # fmt: skip
    return table


def mean_success(rows: Mapping[str, Mapping[str, Any]]) -> float:
    """The mean over tasks of a policy's success rates; nan where a task has no finished episode."""
    return float(np.mean([row["successes"] / row["episodes"] if row["episodes"] else math.nan for row in rows.values()]))


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table of episodes.jsonl: success per policy and task with Wilson 95 % intervals."""
    result = Table("policy", "task", "success", "95 % interval", "median steps", "errors")
    for policy, rows in summary(lines).items():
        for task, row in rows.items():
            result.add_row(
                policy, task, f"{row['successes']} of {row['episodes']}", f"{row['low']:.0%} to {row['high']:.0%}",
                "" if row["steps"] is None else f"{row['steps']:.0f}", str(row["errors"] or ""),
            )  # fmt: skip
        result.add_row(policy, "mean", f"{mean_success(rows):.1%}", "", "", "", end_section=True, style="bold")
    return result


def _progress() -> Progress:
    return Progress(TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TextColumn("episodes"), TimeRemainingColumn())
