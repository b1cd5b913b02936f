"""A checkpoint, tried in a simulator: what it must fit, what it has to beat, and the rows of the
published ablation.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vla0.checkpoint.io import fingerprint, untrained
from vla0.checkpoint.location import locate
from vla0.core.ensemble import NONE, steps_used
from vla0.core.spec import MAIN, Spec
from vla0.decode.approximate import MODES
from vla0.errors import InputError
from vla0.policy import VLA0
from vla0.sim.evaluate import EvalConfig, evaluate
from vla0.sim.ray_workers import RayWorkerPool
from vla0.sim.report import refuse_unknown_baselines, write_report
from vla0.sim.results import mean_success, summary
from vla0.sim.simulator import simulator
from vla0.sim.workers import Predict, WorkerPool
from vla0.train.config import build

logger = logging.getLogger(__name__)

# of the ablation: steps executed per query (None: the whole chunk, 8 of the published model),
# ensemble
ROWS = {
    "ensembling v1": (1, "v1"),
    "ensembling mean": (1, "mean"),
    "no ensembling": (1, NONE),
    "no ensembling, whole chunks": (None, NONE),
}
SEPARATE = "separate images"


def trial(
    checkpoint: str,
    settings: EvalConfig,
    out: Path,
    baseline: Sequence[str] = (),
    workers: int | None = None,
    device: str | None = None,
    render: bool = False,
    ray: str | None = None,
    approximate: Sequence[str] = (),
    embodiment: str = MAIN,
) -> list[dict[str, Any]]:
    """The lines of episodes.jsonl in `out`, where a report.html lies then.

    Goes on where it was interrupted.

    approximate: modes of vla0.decode.approximate, tried beside the policy, each under its name.
    ray: "local" or the address of a cluster. Raises InputError where the checkpoint does not fit,
    or episodes were given up.
    """
    refuse_unknown_baselines(baseline)
    if wrong := [name for name in approximate if name not in MODES]:
        raise InputError(f"a mode of {tuple(MODES)}", f"'{wrong[0]}'", "choose one of those")
    policy = VLA0.from_pretrained(
        checkpoint, device if ray is None else "cpu", embodiment=embodiment
    )
    spec = policy.spec
    fit(spec, settings.env)
    settings = following(settings, spec)
    mark = fingerprint(policy.model, spec)
    identity = {"checkpoint": mark, "versions": simulator(settings.env).provenance()}
    names = ("policy", *approximate, *baseline)
    bring = partial(policies, names=names, settings=settings)
    if ray is None:
        pool, policies_given = WorkerPool, bring(policy)
    else:
        pool, policies_given = (
            partial(
                RayWorkerPool, ray, partial(_load, checkpoint, device, embodiment, mark, bring)
            ),
            dict.fromkeys(names, _elsewhere),
        )
    lines = evaluate(
        policies_given,
        spec.chunk_size,
        settings,
        out,
        workers,
        identity=identity,
        render=render,
        pool=pool,
    )
    write_report(out, f"{checkpoint} on {settings.env}", spec.action_names)
    done = Counter((line["policy"], line["task"]) for line in lines if line["error"] is None)
    unfinished = sum(
        max(0, settings.episodes - done[name, task]) for name in names for task in settings.tasks
    )
    if unfinished:
        raise InputError(
            "every episode to end",
            f"{unfinished} given up after crashes",
            f"see the error lines in '{out}'",
        )
    return lines


def ablation(
    checkpoint: str, separate: str | None, settings: EvalConfig, out: Path, **others: Any
) -> dict[str, list[dict[str, Any]]]:
    """{row: lines} of the published ablation: ensembling on and off, 1 and 8 steps executed per
    query, separate images.

    separate: a checkpoint trained with `tile: false`, for the last row, which is left out without
    one. Each row has its folder in `out`; others as `trial` takes them.
    """
    lines_of, chunk_size = {}, _spec(checkpoint).chunk_size
    if separate is not None and _spec(separate).tile:
        raise InputError(
            "a checkpoint trained with tile: false",
            f"'{separate}', whose images are tiled",
            "train one",
        )
    for row, (n_action_steps, ensemble) in ROWS.items():
        row_settings = replace(
            settings, n_action_steps=n_action_steps or chunk_size, ensemble=ensemble
        )
        lines_of[row] = trial(
            checkpoint, row_settings, out / row.replace(",", "").replace(" ", "-"), **others
        )
    if separate is None:
        logger.warning(
            "no row '%s': it takes a checkpoint trained with tile: false (--separate)", SEPARATE
        )
    else:
        lines_of[SEPARATE] = trial(separate, settings, out / SEPARATE.replace(" ", "-"), **others)
    return lines_of


def following(settings: EvalConfig, spec: Spec) -> EvalConfig:
    """The settings with what the policy's Spec decides of them."""
    return replace(
        settings, fps=spec.fps, ensemble_k=spec.ensemble_k, periodic=spec.periodic or None
    )


def fit(spec: Spec, env: str) -> None:
    """Raises InputError where a checkpoint cannot act in a simulator: other cameras, other actions,
    or other units of them.

    Where its bounds reach beyond what the simulator executes, the log says so.
    """
    target = simulator(env)
    missing = [camera for camera in spec.cameras if camera not in target.cameras]
    if missing:
        remedy = "map the config's cameras to these names and train"
        raise InputError(
            f"cameras of {tuple(target.cameras)}, as {env} has",
            f"'{missing[0]}' in the checkpoint",
            remedy,
        )
    if spec.dimensions != len(target.actions):
        raise InputError(
            f"actions of {len(target.actions)} numbers, as {env} takes",
            f"{spec.dimensions} in the checkpoint",
            "use another",
        )
    for d, (name, (low, high)) in enumerate(zip(target.actions, target.ranges, strict=True)):
        within = 0.05 * (high - low)
        bounds = f"{spec.low[d]:g} to {spec.high[d]:g}"
        if d in target.switches and max(abs(spec.low[d] - low), abs(spec.high[d] - high)) > within:
            if spec.low[d] == spec.high[d] and abs(spec.low[d]) == high:
                logger.warning(
                    "%s is always %g in the checkpoint's data: it cannot change", name, spec.low[d]
                )
                continue
            remedy = (
                "train on data that has it so, as lerobot/libero: 0 to 1 would close it for ever"
            )
            raise InputError(
                f"'{name}' from {low:g} to {high:g}, of which {env} takes the sign", bounds, remedy
            )
        if d not in spec.relative_dims and (
            spec.low[d] < low - within or spec.high[d] > high + within
        ):
            logger.warning(
                "'%s' goes from %s in the checkpoint; %s clips it to %g to %g: other units?",
                name,
                bounds,
                env,
                low,
                high,
            )


def blanked(predict: Predict) -> Predict:
    """The policy with every picture black: what it does without looking."""

    def blind(observations):
        dark = [
            {camera: np.zeros_like(frame) for camera, frame in o.images.items()}
            for o in observations
        ]
        return predict(
            [replace(o, images=images) for images, o in zip(dark, observations, strict=True)]
        )

    return blind


def swapped(predict: Predict, tasks: Sequence[tuple[str, str]]) -> Predict:
    """The policy given the next task's instruction, of those of its suite: what it does without
    listening.

    tasks: (task, instruction) of all that are evaluated.
    """
    swap: dict[str, str] = {}
    for suite in {task.rpartition("/")[0] for task, _ in tasks}:
        instructions = [
            instruction for task, instruction in tasks if task.rpartition("/")[0] == suite
        ]
        if len(instructions) < 2:
            raise InputError(
                "two tasks of a suite or more, to exchange instructions",
                f"{instructions}",
                "evaluate more tasks",
            )
        swap |= dict(zip(instructions, instructions[1:] + instructions[:1], strict=True))

    def deaf(observations):
        return predict([replace(o, instruction=swap[o.instruction]) for o in observations])

    return deaf


def random_actions(
    low: Sequence[float], high: Sequence[float], chunk_size: int, seed: int = 0
) -> Predict:
    """A policy of uniform actions between the bounds."""
    rng = np.random.default_rng(seed)
    return lambda observations: rng.uniform(
        low, high, (len(observations), chunk_size, len(low))
    ).astype(np.float32)


def policies(policy: VLA0, names: Sequence[str], settings: EvalConfig) -> dict[str, Predict]:
    """{name: predict} of "policy", of approximate modes and of baselines; only the steps that are
    used are decoded.
    """
    steps = steps_used(policy.spec.chunk_size, settings.n_action_steps, settings.ensemble)
    predict = partial(policy.predict_batch, num_steps=steps)
    instruction = simulator(settings.env).instruction
    result: dict[str, Predict] = {"policy": predict}
    for name in MODES:
        if name in names:
            result[name] = partial(policy.approximate(name).predict_batch, num_steps=steps)
    if "blank" in names:
        result["blank"] = blanked(predict)
    if "swapped" in names:
        result["swapped"] = swapped(predict, [(task, instruction(task)) for task in settings.tasks])
    if "random" in names:
        result["random"] = random_actions(policy.spec.low, policy.spec.high, steps)
    if "untrained" in names:
        other = VLA0(untrained(policy.model), policy.processor, policy.spec)
        result["untrained"] = partial(other.predict_batch, num_steps=steps)
    return {name: result[name] for name in names}


def measured(
    simulator: Mapping[str, Any] | None,
) -> Callable[[VLA0, Path], dict[str, float]] | None:
    """What a config's `simulator` asks to be measured at each save; None where it asks nothing."""
    if simulator is None:
        return None
    settings = build(EvalConfig, simulator, "simulator")

    def measure(policy: VLA0, out: Path) -> dict[str, float]:
        fit(policy.spec, settings.env)
        tried_settings = following(settings, policy.spec)
        lines = evaluate(
            {"policy": policy.predict_batch}, policy.spec.chunk_size, tried_settings, out
        )
        return {"success": mean_success(summary(lines)["policy"])}

    return measure


def _spec(checkpoint: str) -> Spec:
    return Spec.load(locate(checkpoint))


def _load(
    checkpoint: str,
    device: str | None,
    embodiment: str,
    mark: str,
    bring: Callable[[VLA0], dict[str, Predict]],
) -> dict[str, Predict]:
    """The policies on a cluster's machine, whose folder of that name may hold something else."""
    policy = VLA0.from_pretrained(checkpoint, device, embodiment=embodiment)
    if (found := fingerprint(policy.model, policy.spec)) != mark:
        raise InputError(
            f"the checkpoint {mark} in '{checkpoint}'", f"{found}", "copy the same to every machine"
        )
    return bring(policy)


def _elsewhere(observations: Sequence[Any]) -> np.ndarray:
    raise AssertionError("the cluster's machines load the policy themselves")
