"""What a policy is compared with: itself with black pictures or wrong words, and random actions."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vla0.errors import InputError
from vla0.sim.evaluate import EvalConfig
from vla0.sim.simulator import simulator
from vla0.sim.workers import Predict


def blanked(predict: Predict) -> Predict:
    """Return the policy with every picture black, which shows what it does without looking."""

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
    """Return the policy with the next other instruction in the suite.

    It shows what the policy does when the instruction is wrong.

    Args:
        predict: The policy.
        tasks: (task, instruction) of all tasks that are evaluated.

    Raises:
        InputError: When a suite has only one instruction, or two suites have one instruction with
            different next ones.
    """
    swap: dict[str, str] = {}
    for suite in {task.rpartition("/")[0] for task, _ in tasks}:
        instructions = [
            instruction for task, instruction in tasks if task.rpartition("/")[0] == suite
        ]
        if len(set(instructions)) < 2:
            raise InputError(
                "two tasks of a suite or more, to exchange instructions",
                f"{instructions}",
                "evaluate more tasks",
            )
        for place, instruction in enumerate(instructions):
            others = [*instructions[place + 1 :], *instructions[:place]]
            other = next(text for text in others if text != instruction)
            if swap.setdefault(instruction, other) != other:
                raise InputError(
                    "an instruction that stands for one task, to exchange instructions",
                    f"'{instruction}' in several",
                    "evaluate the suites one by one",
                )

    def deaf(observations):
        return predict([replace(o, instruction=swap[o.instruction]) for o in observations])

    return deaf


def random_actions(
    low: Sequence[float], high: Sequence[float], chunk_size: int, seed: int = 0
) -> Predict:
    """Return a policy whose actions are uniformly random between the bounds (D,)."""
    rng = np.random.default_rng(seed)
    return lambda observations: rng.uniform(
        low, high, (len(observations), chunk_size, len(low))
    ).astype(np.float32)


def baselines(
    predict: Predict,
    names: Sequence[str],
    settings: EvalConfig,
    low: Sequence[float],
    high: Sequence[float],
    chunk_size: int,
) -> dict[str, Predict]:
    """Return {name: predict} of those of "blank", "swapped" and "random" that are in names.

    Args:
        predict: The policy.
        names: What is asked for; others are passed over.
        settings: What is evaluated.
        low: Lower bounds (D,) of random actions.
        high: Upper bounds (D,) of random actions.
        chunk_size: Steps of random chunks.
    """
    result: dict[str, Predict] = {}
    if "blank" in names:
        result["blank"] = blanked(predict)
    if "swapped" in names:
        instruction = simulator(settings.env).instruction
        result["swapped"] = swapped(predict, [(task, instruction(task)) for task in settings.tasks])
    if "random" in names:
        result["random"] = random_actions(low, high, chunk_size)
    return result
