"""`last` and `best`: clean checkpoint folders that are complete whenever they are named so."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainerState

from vla0.checkpoint import io as models
from vla0.core.relative import shortest
from vla0.core.spec import MAIN, Spec
from vla0.data.dataset import Mixture, Samples
from vla0.files import settle, write_whole
from vla0.policy import VLA0
from vla0.train.lora import merged, plain
from vla0.train.plots import chart

FINISHED = "training.png"  # the last file of a checkpoint: where it is, nothing is left to do

# what a kill leaves of a checkpoint that was being written
HALF = re.compile(r"\.step-\d+\.(partial|old)(-\d+)?")

# a policy tried in a simulator: must return "success"
Measure = Callable[[VLA0, Path], Mapping[str, float]]


class CheckpointCallback(TrainerCallback):
    """Keeps `last` and `best`: clean checkpoint folders, complete whenever they are named so.

    The Trainer's own folders (state/checkpoint-N) hold optimiser pickles and may be half-written
    after a kill; `last` moves on only after one is whole, and resuming starts from the one that
    `last` names.
    """

    trainer: Trainer

    def __init__(
        self,
        output: Path,
        processor: Any,
        samples: Samples | Mixture,
        specs: Mapping[str, Spec],
        held_out: Mapping[str, Samples],
        measure: Measure | None,
        every: int = 0,
        keep_last: int = 1,
        sharded: bool = False,
    ):
        """specs, held_out: by embodiment.

        every: steps between two measurements, 0 for one at each save.
        """
        self.output, self.processor, self.samples, self.specs = output, processor, samples, specs
        self.parts = samples.parts if isinstance(samples, Mixture) else [samples]
        self.held_out, self.measure, self.every, self.keep_last, self.sharded = (
            held_out,
            measure,
            every,
            keep_last,
            sharded,
        )

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Tells the rows their epoch; resuming starts within one."""
        self.samples.epoch = int((state.epoch or 0) + 1e-6)

    def on_step_end(self, args, state, control, **kwargs):
        """What is measured is saved too: it may be the best."""
        control.should_save |= self._due(state) and bool(self.every)

    def _due(self, state) -> bool:
        return (
            not self.every
            or state.global_step % self.every == 0
            or state.global_step >= state.max_steps
        )

    def on_save(self, args, state, control, **kwargs):
        """Names the new checkpoint `last`, measures it, and names it `best` where it is."""
        step = f"step-{state.global_step:06d}"
        gathered: Any = None
        if self.sharded:  # all processes take part
            gathered = self.trainer.accelerator.get_state_dict(self.trainer.model)
        if state.is_world_process_zero:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            whole = self.output / "state" / f"checkpoint-{state.global_step}"
            if (weights := gathered or merged(model)) is None:
                models.publish(whole, self.output / step, self.processor, self.specs)
            else:
                models.save(self.output / step, plain(model), self.processor, self.specs, weights)
            for folder in (whole, self.output / step):
                settle(folder)
            point(self.output / "last", step)
        del gathered
        self._finish(state)

    def on_train_begin(self, args, state, control, **kwargs):
        """Makes good what a kill left unfinished of the checkpoint that a run goes on from."""
        folder = self.output / f"step-{state.global_step:06d}"
        if state.global_step and folder.is_dir() and not (folder / FINISHED).is_file():
            self._finish(state)

    def make_good(self, state: str) -> None:
        """The same for the last checkpoint of a run whose steps are done; state: the Trainer's
        folder of it.
        """
        self.trainer.state = TrainerState.load_from_json(f"{state}/trainer_state.json")
        self.trainer.state.is_world_process_zero = self.trainer.is_world_process_zero()
        # adapters; of others `last` was loaded
        if plain(self.trainer.model) is not self.trainer.model:
            self.trainer._load_from_checkpoint(state)
        self._finish(self.trainer.state)

    def _finish(self, state) -> None:
        """Measures a checkpoint that is whole, writes its card, ranks it, makes room, and draws how
        it went: in this order.
        """
        step = f"step-{state.global_step:06d}"
        with torch.random.fork_rng():  # a run that goes on from here has measured nothing
            metrics = self._measured(state, step) if self._due(state) else {}
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
        """{embodiment: (dataset, Spec)}."""
        return {
            n: (part.source.config.dataset, part.spec)
            for n, part in zip(self.specs, self.parts, strict=True)
        }

    def _measured(self, state, step: str) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.held_out:
            parts = list(self.held_out.values())
            rows = Mixture(
                parts,
                [1.0] * len(parts),
                places=[list(self.specs).index(name) for name in self.held_out],
            )
            metrics["held_out_loss"] = self.trainer.evaluate(rows)["eval_loss"]  # type: ignore[arg-type]
        if not state.is_world_process_zero or not (self.held_out or self.measure):
            return metrics
        if self.sharded:  # no process has the weights whole; the checkpoint has
            vlm, _ = models.load(self.output / step)
        else:
            vlm = plain(self.trainer.accelerator.unwrap_model(self.trainer.model))
        for name, rows in self.held_out.items():
            errors = action_error(VLA0(vlm, self.processor, self.specs[name]), rows)
            metrics |= {
                f"{name}/error/{d}".lstrip("/"): float(error) for d, error in enumerate(errors)
            }
        if self.held_out:
            self.trainer.log(
                {f"held_out/{name}": value for name, value in metrics.items() if "error/" in name}
            )
        if self.measure is not None:
            policy = VLA0(vlm, self.processor, self.specs[MAIN])
            tried = self.measure(policy, self.output / "simulator" / step)
            self.trainer.log({f"simulator/{name}": value for name, value in tried.items()})
            metrics |= tried
        vlm.train()
        return metrics

    def _metrics(self) -> list[dict[str, Any]]:
        file = self.output / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def _rank(self, step: str, metrics: dict[str, float]) -> None:
        every = [m for m in self._metrics() if m["step"] < step] + [{"step": step, **metrics}]
        write_whole(self.output / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in every))
        measure = next(
            (name for name in ("success", "held_out_loss") if any(name in m for m in every)), None
        )
        if measure is None:
            best = every[-1]
        else:  # of equals the later
            sign = 1 if measure == "success" else -1
            best = max(
                (m for m in reversed(every) if measure in m), key=lambda m: sign * m[measure]
            )
        if best["step"] == step or not (self.output / "best").exists():
            point(self.output / "best", step)

    def _prune(self, step: int) -> None:
        """Leaves `last`, `best`, the last few, what the last two are gone on with from, and nothing
        half-written.
        """
        kept = {(self.output / name).resolve().name for name in ("last", "best")}
        # A checkpoint's evaluation lies beside it: step-000500-eval
        folders = sorted(
            f for f in self.output.glob("step-*") if f.name.removeprefix("step-").isdecimal()
        )
        for folder in folders[: -self.keep_last]:
            if folder.name not in kept:
                shutil.rmtree(folder)
        states = {
            int(f.name.removeprefix("checkpoint-")): f
            for f in (self.output / "state").glob("checkpoint-*")
        }
        # a later one is what a kill left
        two = sorted(number for number in states if number <= step)[-2:]
        unfinished = [f for f in self.output.iterdir() if HALF.fullmatch(f.name)]
        for folder in [*unfinished, *(f for number, f in states.items() if number not in two)]:
            shutil.rmtree(folder)


def card(
    specs: Mapping[str, tuple[str, Spec]],
    step: int,
    metrics: Mapping[str, float],
    remarks: Sequence[str] = (),
) -> str:
    """The model card of a checkpoint: what it was trained on, what it takes and gives, what was
    measured, how to use it.
    """
    dataset, spec = specs[MAIN]
    base = f"base_model: {spec.base_model}\n" if "/" in spec.base_model else ""
    data = (
        f"datasets: [{dataset}]\n" if dataset.count("/") == 1 and not Path(dataset).exists() else ""
    )
    images = ", ".join(f'"{camera}": {camera}' for camera in spec.cameras)
    state = "" if spec.state is None else ", state=state"
    lines = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    measured = (
        "\n".join(["| measured | |", "|---|---|", *lines])
        if lines
        else "Nothing was measured while it was trained."
    )
    others = "".join(
        f'\n- `embodiment="{name}"`: {spec_line(own)}'
        for name, (_, own) in specs.items()
        if name != MAIN
    )
    others = (
        f"\nIt has learned other embodiments too, for `from_pretrained(..., "
        f"embodiment=...)`:\n{others}\n"
        if others
        else ""
    )
    told = "".join(f"\n- {text}" for text in remarks)
    told = f"\nOf its data:\n{told}\n" if told else ""
    relative = (
        f", dimensions {list(spec.relative_dims)} relative to the state"
        if spec.relative_dims
        else ""
    )
    return f"""---
library_name: vla0
pipeline_tag: robotics
tags: [robotics, VLA-0, LeRobot]
{base}{data}---

# A robot policy that writes its actions as text

Trained from {spec.base_model} on {Path(dataset).name if not data else dataset}, {step} steps, by the method of
[VLA-0](https://arxiv.org/abs/2510.13054). It takes pictures of {", ".join(spec.cameras)} and an instruction, and gives
{spec_line(spec)}{relative}. All that acting must know is in `vla0.json`.
{others}{told}
![loss, share of right tokens, and what was measured](training.png)

{measured}

```python
from vla0 import VLA0

model = VLA0.from_pretrained("this folder or its Hub id")
actions = model.predict({{{images}}}, "what the robot shall do"{state})  # ({spec.chunk_size}, {spec.dimensions})
```
"""  # noqa: E501


def spec_line(spec: Spec) -> str:
    """What a policy gives."""
    return f"{spec.chunk_size} actions of {spec.dimensions} numbers at {spec.fps:g} a second"


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


def point(link: Path, name: str) -> None:
    """Makes `link` name a sibling folder, in one instant."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.replace(link)
