"""What a checkpoint can do: its loss and its actions' errors on held-out episodes, and its success
in a simulator.
"""

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

# A policy tried in a simulator, with a folder for what it does there: must return "success".
Measure = Callable[[VLA0, Path], Mapping[str, float]]


class Measurement:
    """Measures the model that is being trained.

    specs, held_out: by embodiment. sharded: whether no process has the weights whole.
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
        """{name: value}; all processes take part in the loss, the first one alone in the rest.

        folder: of the checkpoint, whose name tells the step.
        """
        metrics: dict[str, float] = {}
        if self.held_out:
            parts, names = list(self.held_out.values()), list(self.specs)
            places = [names.index(name) for name in self.held_out]
            rows: Any = Mixture(parts, [1.0] * len(parts), places=places)
            metrics["held_out_loss"] = trainer.evaluate(rows)["eval_loss"]
        if not state.is_world_process_zero or not (self.held_out or self.simulate):
            return metrics
        if self.sharded:  # no process has the weights whole; the checkpoint has
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


def action_error(policy: VLA0, held_out: Samples, most: int = 64) -> np.ndarray:
    """(D,): mean distance, in the dataset's units, of decoded actions from recorded ones, over some
    rows spread evenly.
    """
    rows = np.unique(np.linspace(0, len(held_out) - 1, min(most, len(held_out))).astype(int))
    samples = [held_out.sample(int(row)) for row in rows]
    errors = []
    for first in range(0, len(samples), 16):
        some = samples[first : first + 16]
        chunks = policy.predict_batch([sample.observation for sample in some])
        for chunk, sample in zip(chunks, some, strict=True):
            errors.append(
                np.abs(shortest(chunk - sample.actions, policy.spec.periodic))[sample.valid]
            )
    return np.concatenate(errors).mean(axis=0)
