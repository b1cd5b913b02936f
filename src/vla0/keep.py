"""`last` and `best`: clean checkpoint folders that are complete whenever they are named so."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback

from vla0 import model as models
from vla0.adapter import merged, plain
from vla0.data import Samples
from vla0.policy import VLA0
from vla0.spec import Spec

Measure = Callable[[VLA0, Path], Mapping[str, float]]  # a policy tried in a simulator: must return "success"


class Keeper(TrainerCallback):
    """Keeps `last` and `best`: clean checkpoint folders, complete whenever they are named so.

    The Trainer's own folders (state/checkpoint-N) hold optimiser pickles and may be half-written after a kill; `last`
    moves on only after one is whole, and resuming starts from the one that `last` names.
    """

    trainer: Trainer

    def __init__(self, output: Path, processor: Any, samples: Samples, held_out: Samples | None, measure: Measure | None):
        self.output, self.spec, self.processor, self.samples = output, samples.spec, processor, samples
        self.held_out, self.measure = held_out, measure

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Tells the rows their epoch; resuming starts within one."""
        self.samples.epoch = int((state.epoch or 0) + 1e-6)

    def on_save(self, args, state, control, **kwargs):
        """Names the new checkpoint `last`, measures it, and names it `best` where it is."""
        step = f"step-{state.global_step:06d}"
        if state.is_world_process_zero:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            whole = self.output / "state" / f"checkpoint-{state.global_step}"
            if (weights := merged(model)) is None:
                models.publish(whole, self.output / step, self.processor, self.spec)
            else:
                models.save(self.output / step, plain(model), self.processor, self.spec, weights)
            point(self.output / "last", step)
        metrics = self._measured(state)
        if state.is_world_process_zero:
            text = card(self.spec, self.samples.source.config.dataset, state.global_step, metrics)
            write_whole(self.output / step / "README.md", text)
            self._rank(step, metrics)
            self._prune()

    def _measured(self, state) -> dict[str, float]:
        metrics = {}
        if self.held_out is not None:
            metrics["held_out_loss"] = self.trainer.evaluate(self.held_out)["eval_loss"]  # type: ignore[arg-type]
        if state.is_world_process_zero and (self.held_out is not None or self.measure is not None):
            policy = VLA0(plain(self.trainer.accelerator.unwrap_model(self.trainer.model)), self.processor, self.spec)
            if self.held_out is not None:
                metrics |= {f"error/{d}": float(error) for d, error in enumerate(action_error(policy, self.held_out))}
                self.trainer.log({f"held_out/{name}": value for name, value in metrics.items() if name.startswith("error")})
            if self.measure is not None:
                tried = self.measure(policy, self.output / "simulator" / f"step-{state.global_step:06d}")
                self.trainer.log({f"simulator/{name}": value for name, value in tried.items()})
                metrics |= tried
            policy.model.train()
        return metrics

    def _rank(self, step: str, metrics: dict[str, float]) -> None:
        file = self.output / "metrics.jsonl"
        earlier = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        earlier = [m for m in earlier if m["step"] < step] + [{"step": step, **metrics}]
        write_whole(file, "".join(json.dumps(m) + "\n" for m in earlier))
        score = (lambda m: m["success"]) if "success" in metrics else (lambda m: -m.get("held_out_loss", 0.0))
        best = max(reversed(earlier), key=score) if metrics else earlier[-1]  # of equals the later
        if best["step"] == step or not (self.output / "best").exists():
            point(self.output / "best", step)

    def _prune(self) -> None:
        kept = {(self.output / name).resolve().name for name in ("last", "best")}
        for folder in self.output.glob("step-*"):  # a checkpoint's evaluation lies beside it: step-000500-eval
            if folder.name not in kept and folder.name.removeprefix("step-").isdecimal():
                shutil.rmtree(folder)


def card(spec: Spec, dataset: str, step: int, metrics: Mapping[str, float]) -> str:
    """The model card of a checkpoint: what it was trained on, what it takes and gives, what was measured, how to use it."""
    base = f"base_model: {spec.base_model}\n" if "/" in spec.base_model else ""
    data = f"datasets: [{dataset}]\n" if dataset.count("/") == 1 and not Path(dataset).exists() else ""
    images = ", ".join(f'"{camera}": {camera}' for camera in spec.cameras)
    state = "" if spec.state is None else ", state=state"
    lines = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    measured = "\n".join(["| measured | |", "|---|---|", *lines]) if lines else "Nothing was measured while it was trained."
    relative = f", dimensions {list(spec.relative)} relative to the state" if spec.relative else ""
    return f"""---
library_name: vla0
pipeline_tag: robotics
tags: [robotics, VLA-0, LeRobot]
{base}{data}---

# A robot policy that writes its actions as text

Trained from {spec.base_model} on {Path(dataset).name if not data else dataset}, {step} steps, by the method of
[VLA-0](https://arxiv.org/abs/2510.13054). It takes pictures of {", ".join(spec.cameras)} and a sentence, and gives
{spec.horizon} actions of {spec.dimensions} numbers at {spec.fps:g} a second{relative}. All that acting must know is in
`vla0.json`.

{measured}

```python
from vla0 import VLA0

model = VLA0.from_pretrained("this folder or its Hub id")
actions = model.predict({{{images}}}, "what the robot shall do"{state})  # ({spec.horizon}, {spec.dimensions})
```
"""


def action_error(policy: VLA0, held_out: Samples, most: int = 64) -> np.ndarray:
    """(D,): mean distance, in the dataset's units, of decoded actions from recorded ones, over some rows spread evenly."""
    rows = np.unique(np.linspace(0, len(held_out) - 1, min(most, len(held_out))).astype(int))
    samples = [held_out[int(row)][0] for row in rows]
    errors = []
    for first in range(0, len(samples), 16):
        some = samples[first : first + 16]
        chunks = policy.predict_batch([sample.observation for sample in some])
        errors += [np.abs(chunk - sample.actions)[sample.valid] for chunk, sample in zip(chunks, some, strict=True)]
    return np.concatenate(errors).mean(axis=0)


def point(link: Path, name: str) -> None:
    """Makes `link` name a sibling folder, in one instant."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.replace(link)


def write_whole(file: Path, text: str) -> None:
    """Writes a file that is never half there."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
