"""Keep `last` and `best`, links to clean checkpoint folders that are always complete."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState

from vla0.checkpoint import io as models
from vla0.core.spec import Spec
from vla0.data.dataset import Mixture, Samples
from vla0.files import settle, unfinished, write_whole
from vla0.train.lora import merged, plain
from vla0.train.measure import Measurement
from vla0.train.model_card import card
from vla0.train.plots import chart

FINISHED = "training.png"  # the last file of a checkpoint: a folder that has it is finished


class CheckpointCallback(TrainerCallback):
    """Keeps `last` and `best`, links to clean checkpoint folders that are always complete.

    The Trainer's folders (state/checkpoint-N) hold optimiser pickles and may be half-written after
    a kill. `last` moves on only after such a folder is complete, and a run resumes from the folder
    that belongs to `last`.

    Args:
        output: The folder of the run.
        processor: The processor, saved with each checkpoint.
        samples: The rows that are trained on.
        specs: The Spec of each embodiment.
        measurement: Measures the model.
        every: Steps between two measurements. 0 measures at each save.
        keep_last: Checkpoints to keep, besides `best`.
    """

    trainer: Trainer

    def __init__(
        self,
        output: Path,
        processor: Any,
        samples: Samples | Mixture,
        specs: Mapping[str, Spec],
        measurement: Measurement,
        every: int = 0,
        keep_last: int = 1,
    ):
        self.output, self.processor, self.samples, self.specs = output, processor, samples, specs
        self.parts = samples.parts if isinstance(samples, Mixture) else [samples]
        self.measurement, self.every, self.keep_last = measurement, every, keep_last

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Set the epoch of the rows, also where a run resumes in the middle of one."""
        self.samples.epoch = int((state.epoch or 0) + 1e-6)

    def on_step_end(self, args, state, control, **kwargs):
        """Save wherever a measurement is due, because that checkpoint may be the best."""
        control.should_save |= self._due(state) and bool(self.every)

    def _due(self, state) -> bool:
        """Return whether a measurement is due at this step."""
        return (
            not self.every
            or state.global_step % self.every == 0
            or state.global_step >= state.max_steps
        )

    def on_save(self, args, state, control, **kwargs):
        """Save a checkpoint, point `last` to it, measure it, and point `best` to the best one."""
        step = f"step-{state.global_step:06d}"
        gathered: Any = None
        if self.measurement.sharded:  # all processes take part
            gathered = self.trainer.accelerator.get_state_dict(self.trainer.model)
        if state.is_world_process_zero:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            trainer_state = self.output / "state" / f"checkpoint-{state.global_step}"
            if (weights := gathered or merged(model)) is None:
                models.publish(trainer_state, self.output / step, self.processor, self.specs)
            else:
                models.save(self.output / step, plain(model), self.processor, self.specs, weights)
            for folder in (trainer_state, self.output / step):
                settle(folder)
            point(self.output / "last", step)
        del gathered
        self._finish(state)

    def on_train_begin(self, args, state, control, **kwargs):
        """Finish the checkpoint that a run resumes from, if a kill left it unfinished."""
        folder = self.output / f"step-{state.global_step:06d}"
        if state.global_step and folder.is_dir() and not (folder / FINISHED).is_file():
            self._finish(state)

    def make_good(self, state: str) -> None:
        """Finish the last checkpoint of a run whose steps are all done.

        Args:
            state: The Trainer's folder of that checkpoint.
        """
        self.trainer.state = TrainerState.load_from_json(f"{state}/trainer_state.json")
        self.trainer.state.is_world_process_zero = self.trainer.is_world_process_zero()
        # Adapters are loaded here; other models were loaded from `last`.
        if plain(self.trainer.model) is not self.trainer.model:
            self.trainer._load_from_checkpoint(state)
        self._finish(self.trainer.state)

    def _finish(self, state) -> None:
        """Measure a complete checkpoint, write its card, rank it, prune, and plot, in order."""
        step = f"step-{state.global_step:06d}"
        # A run that resumes from here has measured nothing, and must draw the same random numbers.
        with torch.random.fork_rng():
            folder = self.output / step
            metrics = self.measurement.of(self.trainer, state, folder) if self._due(state) else {}
        if state.is_world_process_zero:
            remarks = [text for part in self.parts for text in part.remarks]
            write_whole(
                self.output / step / "README.md",
                card(self._specs(), state.global_step, metrics, remarks),
            )
            self._rank(step, metrics)
            self._prune(state.global_step)
            losses = [line for line in state.log_history if "loss" in line]
            chart(losses, self._metrics(), self.output / step / FINISHED)

    def _specs(self) -> dict[str, tuple[str, Spec]]:
        """Return {embodiment: (dataset, Spec)}."""
        return {
            n: (part.source.config.dataset, part.spec)
            for n, part in zip(self.specs, self.parts, strict=True)
        }

    def _metrics(self) -> list[dict[str, Any]]:
        """Read the lines of metrics.jsonl."""
        return measured(self.output)

    def _rank(self, step: str, metrics: dict[str, float]) -> None:
        """Write the metrics of a checkpoint, and point `best` to it if it is the best one."""
        rank(self.output, step, metrics)

    def _prune(self, step: int) -> None:
        """Remove old checkpoints and training states."""
        prune(self.output, step, self.keep_last)


def measured(output: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl."""
    file = output / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rank(output: Path, step: str, metrics: Mapping[str, float]) -> None:
    """Write the metrics of a checkpoint, and point `best` to it if it is the best one.

    Args:
        output: The folder of the run.
        step: Name of the checkpoint's folder.
        metrics: What was measured.
    """
    every = [m for m in measured(output) if m["step"] < step] + [{"step": step, **metrics}]
    write_whole(output / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in every))
    measure = next(
        (name for name in ("success", "held_out_loss") if any(name in m for m in every)), None
    )
    if measure is None:
        best = every[-1]
    else:  # the later one of equals
        sign = 1 if measure == "success" else -1
        best = max((m for m in reversed(every) if measure in m), key=lambda m: sign * m[measure])
    if best["step"] == step or not (output / "best").exists():
        point(output / "best", step)


def prune(output: Path, step: int, keep_last: int) -> None:
    """Remove old checkpoints, all training states but the newest two, and unfinished folders.

    Args:
        output: The folder of the run.
        step: The step of the newest checkpoint.
        keep_last: The newest checkpoints that stay, besides `last` and `best`.
    """
    kept = {(output / name).resolve().name for name in ("last", "best")}
    # A checkpoint's evaluation lies beside it, as step-000500-eval, and is no checkpoint.
    folders = sorted(f for f in output.glob("step-*") if f.name.removeprefix("step-").isdecimal())
    for folder in folders[:-keep_last]:
        if folder.name not in kept:
            shutil.rmtree(folder)
    states = {
        int(f.name.removeprefix("checkpoint-")): f for f in (output / "state").glob("checkpoint-*")
    }
    # A state of a later step is what a kill left.
    kept_states = sorted(number for number in states if number <= step)[-2:]
    dropped = [folder for number, folder in states.items() if number not in kept_states]
    for folder in [*unfinished(output, r"step-\d+"), *dropped]:
        shutil.rmtree(folder)


def point(link: Path, name: str) -> None:
    """Make the symbolic link `link` point to a sibling folder, atomically."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.replace(link)
