"""Try a checkpoint in a simulator, beside baselines, and run the published ablation."""

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
from vla0.sim.baselines import baselines
from vla0.sim.evaluate import EvalConfig, Past, evaluate
from vla0.sim.ray_workers import RayWorkerPool
from vla0.sim.report import refuse_unknown_baselines, write_report
from vla0.sim.results import mean_success, summary
from vla0.sim.simulator import simulator
from vla0.sim.workers import Predict, WorkerPool
from vla0.train.config import build

logger = logging.getLogger(__name__)

# The rows of the ablation: steps executed per query, and the ensemble. None executes the whole
# chunk, which has 8 steps in the published model.
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
    """Evaluate a checkpoint, and write episodes.jsonl and report.html into `out`.

    An interrupted trial continues where it stopped.

    Args:
        checkpoint: Checkpoint folder, or id of a model on the Hub.
        settings: What is evaluated. The checkpoint's Spec decides some of it, see `following`.
        out: Folder of the results.
        baseline: Names of baselines that are tried too (see `vla0.sim.report.BASELINES`).
        workers: Number of simulator processes. None lets `evaluate` choose.
        device: Where the model runs. None takes the GPU where there is one.
        render: Film every step.
        ray: "local" or the address of a Ray cluster. None uses processes on this machine.
        approximate: Modes of `vla0.decode.approximate` that are tried too, each under its name.
        embodiment: For a checkpoint trained on a mixture, the dataset whose robot acts.

    Returns:
        The lines of episodes.jsonl.

    Raises:
        InputError: When the checkpoint does not fit the simulator, or when episodes were given up
            after crashes.
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
        pool, predicts = WorkerPool, bring(policy)
    else:
        pool = partial(
            RayWorkerPool, ray, partial(_load, checkpoint, device, embodiment, mark, bring)
        )
        predicts = dict.fromkeys(names, _elsewhere)
    lines = evaluate(
        predicts,
        spec.chunk_size,
        settings,
        out,
        workers,
        identity=identity,
        render=render,
        pool=pool,
        past=Past(spec.history),
    )
    return reported(lines, names, settings, out, checkpoint, spec.action_names)


def reported(
    lines: list[dict[str, Any]],
    names: Sequence[str],
    settings: EvalConfig,
    out: Path,
    title: str,
    action_names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Write the report of an evaluation, and return its lines.

    Raises:
        InputError: When episodes of the policies `names` were given up after crashes.
    """
    write_report(out, f"{title} on {settings.env}", action_names)
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
    """Run the published ablation: ensembling on and off, 1 and 8 steps per query, separate images.

    Args:
        checkpoint: The checkpoint of all rows but the last.
        separate: A checkpoint trained with `tile: false`, for the last row. None leaves it out.
        settings: What is evaluated.
        out: Folder of the results. Each row has its own folder there.
        **others: Further arguments of `trial`.

    Returns:
        The lines of episodes.jsonl for each row.

    Raises:
        InputError: When the images of `separate` are tiled, or `trial` raises it.
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
    """Return the settings with fps, ensemble_k and periodic as the policy's Spec has them."""
    return replace(
        settings, fps=spec.fps, ensemble_k=spec.ensemble_k, periodic=spec.periodic or None
    )


def fit(spec: Spec, env: str) -> None:
    """Check that a checkpoint can act in a simulator.

    The log warns when the checkpoint's bounds reach beyond what the simulator executes.

    Raises:
        InputError: When the cameras, the number of the actions or their units do not fit.
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
        tolerance = 0.05 * (high - low)
        bounds = f"{spec.low[d]:g} to {spec.high[d]:g}"
        farthest = max(abs(spec.low[d] - low), abs(spec.high[d] - high))
        if d in target.switches and farthest > tolerance:
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
            spec.low[d] < low - tolerance or spec.high[d] > high + tolerance
        ):
            logger.warning(
                "'%s' goes from %s in the checkpoint; %s clips it to %g to %g: other units?",
                name,
                bounds,
                env,
                low,
                high,
            )


def policies(policy: VLA0, names: Sequence[str], settings: EvalConfig) -> dict[str, Predict]:
    """Return the policies that are evaluated, which decode only the steps that are used.

    Args:
        policy: The policy of the checkpoint.
        names: "policy", modes of `vla0.decode.approximate`, and baselines.
        settings: What is evaluated.

    Returns:
        {name: predict} in the order of names.
    """
    steps = steps_used(policy.spec.chunk_size, settings.n_action_steps, settings.ensemble)
    predict = partial(policy.predict_batch, num_steps=steps)
    result: dict[str, Predict] = {"policy": predict}
    for name in MODES:
        if name in names:
            result[name] = partial(policy.approximate(name).predict_batch, num_steps=steps)
    result |= baselines(predict, names, settings, policy.spec.low, policy.spec.high, steps)
    if "untrained" in names:
        random_policy = VLA0(untrained(policy.model), policy.processor, policy.spec)
        result["untrained"] = partial(random_policy.predict_batch, num_steps=steps)
    return {name: result[name] for name in names}


def measured(
    simulator: Mapping[str, Any] | None,
) -> Callable[[VLA0, Path], dict[str, float]] | None:
    """Return a function that evaluates a policy as the `simulator` of a training config says.

    Training calls it at each save.

    Args:
        simulator: The fields of an EvalConfig, or None.

    Returns:
        A function of a policy and a folder for the results, which returns {"success": rate}. None
        when `simulator` is None.
    """
    if simulator is None:
        return None
    settings = build(EvalConfig, simulator, "simulator")

    def measure(policy: VLA0, out: Path) -> dict[str, float]:
        fit(policy.spec, settings.env)
        tried_settings = following(settings, policy.spec)
        lines = evaluate(
            {"policy": policy.predict_batch},
            policy.spec.chunk_size,
            tried_settings,
            out,
            past=Past(policy.spec.history),
        )
        return {"success": mean_success(summary(lines)["policy"])}

    return measure


def _spec(checkpoint: str) -> Spec:
    """Load the Spec of a checkpoint."""
    return Spec.load(locate(checkpoint))


def _load(
    checkpoint: str,
    device: str | None,
    embodiment: str,
    mark: str,
    bring: Callable[[VLA0], dict[str, Predict]],
) -> dict[str, Predict]:
    """Load the policies on a machine of a cluster, and check that its checkpoint is the same."""
    policy = VLA0.from_pretrained(checkpoint, device, embodiment=embodiment)
    if (mark_here := fingerprint(policy.model, policy.spec)) != mark:
        raise InputError(
            f"the checkpoint {mark} in '{checkpoint}'",
            f"{mark_here}",
            "copy the same to every machine",
        )
    return bring(policy)


def _elsewhere(observations: Sequence[Any]) -> np.ndarray:
    """Stand in for a policy that the cluster's machines load themselves."""
    raise AssertionError("the cluster's machines load the policy themselves")
