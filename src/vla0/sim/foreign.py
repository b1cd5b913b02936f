"""Policies that are not ours in the evaluator; those that LeRobot loads."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla0.checkpoint.io import fingerprint
from vla0.checkpoint.location import locate
from vla0.core.ensemble import NONE
from vla0.core.spec import Observation
from vla0.errors import InputError, said
from vla0.sim.baselines import baselines
from vla0.sim.evaluate import PRESENT, EvalConfig, Past, evaluate
from vla0.sim.experiment import reported
from vla0.sim.simulator import Simulator, simulator
from vla0.sim.workers import Predict

LEROBOT = "lerobot:"  # prefix of the name of a policy that LeRobot loads
STATE = "observation.state"
BASELINES = ("blank", "swapped", "random")
EMPTY = "empty_camera"  # part of the names of pictures that some policies leave out on purpose


@dataclass(frozen=True)
class Foreign:
    """A policy that is not ours.

    Args:
        predict: Turns B observations into chunks (B, H, D).
        chunk_size: Steps of its chunks.
        n_action_steps: Steps of a chunk that it executes by its own recipe, None if not known.
        image_size: Side of the pictures that it was trained with, None where they are not square.
        mark: What tells it from others, as far as is known.
        past: What it sees of the past.
        ensemble: How it averages overlapping chunks by its own recipe, in our words. None if that
            has none.
    """

    predict: Predict
    chunk_size: int
    n_action_steps: int | None
    image_size: int | None
    mark: str
    past: Past = PRESENT
    ensemble: str | None = NONE


def trial(
    policy: Foreign,
    title: str,
    settings: EvalConfig,
    out: Path,
    own: Sequence[str] = (),
    baseline: Sequence[str] = (),
    workers: int | None = None,
    render: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a policy that is not ours as `vla0.sim.experiment.trial` evaluates ours.

    Args:
        policy: The policy.
        title: Its name in the report.
        settings: What is evaluated.
        out: Folder of the results.
        own: Names of the settings that are the policy's own, since the user gave none:
            "n_action_steps", "ensemble" and "image_size".
        baseline: Of "blank", "swapped" and "random".
        workers: Number of simulator processes. None lets `evaluate` choose.
        render: Film every step.

    Returns:
        The lines of episodes.jsonl.

    Raises:
        InputError: When a baseline is not one of those, the steps to execute are not known, or
            episodes were given up after crashes.
    """
    if wrong := [kind for kind in baseline if kind not in BASELINES]:
        expected = f"a baseline of {BASELINES} with --policy"
        raise InputError(expected, f"'{wrong[0]}'", "leave it out")
    if policy.n_action_steps is None and "n_action_steps" in own:
        got = f"none; its chunks have {policy.chunk_size} steps"
        raise InputError("--n-action-steps for a server", got, "take what its recipe says")
    if policy.ensemble is None and "ensemble" in own:
        got = "temporal_ensemble_coeff, which is LeRobot's own way"
        raise InputError("--ensemble for a policy that averages its chunks", got, "v1, say")
    target = simulator(settings.env)
    recipe = {
        "n_action_steps": policy.n_action_steps,
        "ensemble": policy.ensemble,
        "image_size": policy.image_size,
    }
    recipe = {key: value for key, value in recipe.items() if key in own}
    settings = replace(settings, fps=settings.fps or target.fps, **recipe)
    low, high = zip(*target.ranges, strict=True)
    predicts = {"policy": policy.predict} | baselines(
        policy.predict, baseline, settings, low, high, policy.chunk_size
    )
    identity = {"checkpoint": policy.mark, "versions": target.provenance()}
    lines = evaluate(
        predicts,
        policy.chunk_size,
        settings,
        out,
        workers,
        identity=identity,
        render=render,
        past=policy.past,
    )
    return reported(lines, list(predicts), settings, out, title, target.actions)


def load(name: str, target: Simulator, keys: Mapping[str, str], device: str | None) -> Foreign:
    """Load a policy of LeRobot's: ACT, SmolVLA, pi0 and others, by LeRobot's own means.

    Args:
        name: "lerobot:" and a checkpoint folder, or the id of a model on the Hub.
        target: The simulator in which it will act.
        keys: {camera of the simulator: the policy's name of its picture}. Cameras that are not
            named have the simulator's names of the public datasets.
        device: Where it runs. None takes the GPU where there is one.

    Raises:
        InputError: When LeRobot is missing or cannot load it, or its pictures, state or actions are
            not the simulator's.
    """
    if not name.startswith(LEROBOT) or name == LEROBOT:
        raise InputError("--policy lerobot:DIR_OR_ID", f"'{name}'", "give it so")
    try:
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies import get_policy_class, make_pre_post_processors
        from lerobot.utils.import_utils import register_third_party_plugins
    except ImportError as error:
        raise InputError("LeRobot", str(error), "pip install 'vla0[lerobot]'") from None
    folder = locate(name.removeprefix(LEROBOT))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    register_third_party_plugins()
    with _explained(folder):
        config: Any = PreTrainedConfig.from_pretrained(folder)
    config.device = device
    cameras = _cameras(config, target, keys)
    past = getattr(config, "n_obs_steps", 1)
    states = len(target.states) if config.robot_state_feature is not None else 0
    _fit(config, target, states)
    with _explained(folder):
        policy = get_policy_class(config.type).from_pretrained(folder, config=config).eval()
        before, after = make_pre_post_processors(
            config, str(folder), preprocessor_overrides={"device_processor": {"device": device}}
        )

    steps: list[int] = []  # of a chunk, known after the first

    @torch.inference_mode()
    def predict(observations: Sequence[Observation]) -> np.ndarray:
        batch: dict[str, Any] = {"task": [observation.instruction for observation in observations]}
        for camera, key in cameras.items():
            frames = np.stack([observation.images[camera] for observation in observations])
            # (B, h, w, 3), or (B, n, h, w, 3) with pictures of the past
            batch[key] = torch.from_numpy(frames).movedim(-1, -3).float() / 255
        if states:
            rows = [np.asarray(observation.state, np.float32) for observation in observations]
            batch[STATE] = torch.from_numpy(np.stack(rows))
        chunks = after(policy.predict_action_chunk(before(batch)))
        expected = (len(observations), *steps, len(target.actions))
        given = chunks.shape if steps else (chunks.shape[0], *chunks.shape[2:])
        if chunks.ndim != 3 or given != expected:
            got = f"{tuple(chunks.shape)} from {type(policy).__name__}"
            raise InputError(f"chunks (B, H, D) of {expected}", got, "use another policy")
        return chunks.float().cpu().numpy()

    before_now = (past,) if past > 1 else ()
    black = Observation(
        {
            camera: np.zeros((*before_now, *config.input_features[key].shape[1:], 3), np.uint8)
            for camera, key in cameras.items()
        },
        "do it",
        np.zeros((*before_now, states), np.float32) if states else None,
    )
    with _explained(folder):  # also finds policies that ask to be queried step by step
        steps.append(predict([black]).shape[1])
    own = getattr(config, "temporal_ensemble", None)  # of our own plugin, in our words
    averages = getattr(config, "temporal_ensemble_coeff", None) is not None
    sides = {side for key in cameras.values() for side in config.input_features[key].shape[1:]}
    return Foreign(
        predict,
        steps[0],
        min(getattr(config, "n_action_steps", None) or steps[0], steps[0]),
        sides.pop() if len(sides) == 1 else None,
        fingerprint(policy, _rest(folder, cameras)),
        Past(past, True),
        None if averages else own or NONE,
    )


def _rest(folder: Path, cameras: Mapping[str, str]) -> str:
    """Return what a policy's chunks depend on beside its weights: config, statistics, cameras."""
    files = sorted({folder / "config.json", *folder.glob("policy_*processor*")})
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return f"{digests} {sorted(cameras.items())}"


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what LeRobot raises for what it cannot load into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        expected = f"a policy that LeRobot loads in '{folder}'"
        raise InputError(expected, said(error), "see it") from None


def _cameras(config: Any, target: Simulator, keys: Mapping[str, str]) -> dict[str, str]:
    """Return {camera of the simulator: the policy's name of its picture}, for what it takes."""
    if unknown := [camera for camera in keys if camera not in target.cameras]:
        raise InputError(f"cameras of {tuple(target.cameras)}", f"'{unknown[0]}'", "correct --key")
    named = {
        camera: keys.get(camera, key)
        for camera, key in target.cameras.items()
        if camera in keys or key not in keys.values()
    }
    wanted = set(config.image_features)
    missing = {key for key in wanted - set(named.values()) if EMPTY not in key}
    unused = {key for key in keys.values() if key not in wanted}
    if missing or unused or not wanted:
        raise InputError(
            f"pictures of the policy, {sorted(wanted)}",
            f"{sorted(named.values())}",
            "name them: --key CAMERA=PICTURE, several times",
        )
    return {camera: key for camera, key in named.items() if key in wanted}


def _fit(config: Any, target: Simulator, states: int) -> None:
    """Raise InputError where actions, state or observations are not the simulator's."""
    for what, feature, expected in (
        ("actions", config.action_feature, len(target.actions)),
        ("a state", config.robot_state_feature, states),
    ):
        given = 0 if feature is None else feature.shape[0]
        if given != expected:
            raise InputError(
                f"{what} of {expected} numbers, as the simulator has",
                f"{given} in the policy",
                "use a policy that was trained for it",
            )
