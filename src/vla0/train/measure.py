"""Measure a checkpoint: loss and action errors on held-out episodes, success in a simulator."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerState

from vla0.checkpoint import io as models
from vla0.core.relative import shortest
from vla0.core.spec import MAIN, Spec
from vla0.data.dataset import Mixture, Samples
from vla0.policy import VLA0
from vla0.train.lora import plain

# Tries a policy in a simulator, with a folder for its results. It must return "success" at least.
Measure = Callable[[VLA0, Path], Mapping[str, float]]


class Measurement:
    """Measures the model that is being trained.

    Args:
        processor: The processor of the model.
        specs: The Spec of each embodiment.
        held_out: The held-out rows of each embodiment that has some.
        simulate: Tries a policy in a simulator. None leaves that out.
        sharded: Whether the weights are spread over the processes, so that none has all of them.
    """

    def __init__(
        self,
        processor: Any,
        specs: Mapping[str, Spec],
        held_out: Mapping[str, Samples],
        simulate: Measure | None,
        sharded: bool,
    ):
        self.processor, self.specs, self.held_out = processor, specs, held_out
        self.simulate, self.sharded = simulate, sharded

    def of(self, trainer: Trainer, state: TrainerState, folder: Path) -> dict[str, float]:
        """Measure the model at a checkpoint.

        All processes take part in the loss. Only the first one does the rest.

        Args:
            trainer: The Trainer that has the model.
            state: The state of that Trainer.
            folder: The folder of the checkpoint, whose name tells the step.

        Returns:
            {name: value}.
        """
        metrics: dict[str, float] = {}
        if self.held_out:
            parts, names = list(self.held_out.values()), list(self.specs)
            places = [names.index(name) for name in self.held_out]
            rows: Any = Mixture(parts, [1.0] * len(parts), places=places)
            metrics["held_out_loss"] = trainer.evaluate(rows)["eval_loss"]
        if not state.is_world_process_zero or not (self.held_out or self.simulate):
            return metrics
        if self.sharded:  # no process has all weights, but the checkpoint has
            vlm, _ = models.load(folder)
        else:
            vlm = plain(trainer.accelerator.unwrap_model(trainer.model))
        for name, rows in self.held_out.items():
            errors = action_error(VLA0(vlm, self.processor, self.specs[name]), rows)
            metrics |= {
                f"{name}/error/{d}".lstrip("/"): float(error) for d, error in enumerate(errors)
            }
        if self.held_out:
            errors_logged = {name: value for name, value in metrics.items() if "error/" in name}
            trainer.log({f"held_out/{name}": value for name, value in errors_logged.items()})
        if self.simulate is not None:
            policy = VLA0(vlm, self.processor, self.specs[MAIN])
            simulated = self.simulate(policy, folder.parent / "simulator" / folder.name)
            trainer.log({f"simulator/{name}": value for name, value in simulated.items()})
            metrics |= simulated
        vlm.train()
        return metrics


def action_error(policy: VLA0, held_out: Samples, max_rows: int = 64) -> np.ndarray:
    """Compare decoded with recorded actions on some evenly spread rows.

    Args:
        policy: The policy to measure.
        held_out: The recorded rows.
        max_rows: How many of them to decode at most.

    Returns:
        (D,) mean absolute error in the dataset's units.
    """
    rows = np.unique(np.linspace(0, len(held_out) - 1, min(max_rows, len(held_out))).astype(int))
    samples = [held_out.sample(int(row)) for row in rows]
    errors = []
    for first in range(0, len(samples), 16):
        batch = samples[first : first + 16]
        chunks = policy.predict_batch([sample.observation for sample in batch])
        for chunk, sample in zip(chunks, batch, strict=True):
            errors.append(
                np.abs(shortest(chunk - sample.actions, policy.spec.periodic))[sample.valid]
            )
    return np.concatenate(errors).mean(axis=0)
