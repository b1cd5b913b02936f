"""How fast training is here: vla0 against transformers' Trainer with all logits and LeRobot's own
reader.
"""

import resource
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from reading import BASELINE, Stock, dataset_or_made, show
from rich.progress import track
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from vla0.bench.inputs import build_3b, moving_pictures, product_rate
from vla0.checkpoint.io import default_device, load
from vla0.checkpoint.location import locate
from vla0.checkpoint.tiny import TINY, tiny_model, tiny_processor
from vla0.core.prompt import Prompt
from vla0.core.spec import Sample, Spec
from vla0.data.dataset import Samples, collator
from vla0.data.lerobot import DataConfig, Source
from vla0.errors import InputError
from vla0.quiet import hush, quiet
from vla0.train.config import LoggingConfig, TrainConfig, TrainingConfig
from vla0.train.trainer import VLA0Trainer, arguments

WAYS = {  # (reader, loss)
    BASELINE: ("stock", "all logits"),
    "vla0's reader, all logits": ("vla0", "all logits"),
    "LeRobot's reader, vla0's loss": ("stock", "vla0"),
    "vla0": ("vla0", "vla0"),
}
COMPILED = "vla0, compiled"
WARM = 3  # steps before the clock


@dataclass(frozen=True)
class Settings:
    """What is trained."""

    model: str  # tiny, 3b, or a checkpoint
    # None: pictures in memory, where LeRobot is not installed; both readers are then the same
    dataset: str | None
    batch_size: int
    steps: int
    workers: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Speed:
    """A row of the result."""

    way: str
    samples_per_s: float
    tokens_per_s: float  # of prompts and answers, padding left out
    # of the rate of large products of matrices on this device, measured now; nothing computed twice
    # counts
    mfu: float
    peak_gib: float  # on a GPU what torch allocated; else of the process


def bench(settings: Settings, ways: Sequence[str], rounds: int) -> list[Speed]:
    """A row for each way: the median of rounds in which the ways take turns, each in a process of
    its own.
    """
    known = (*WAYS, COMPILED)
    if unknown := [way for way in ways if way not in known]:
        raise InputError(f"a way of {known}", f"'{unknown[0]}'", "choose one of those")
    if min(settings.batch_size, settings.steps, rounds) < 1 or settings.workers < 0:
        raise InputError("batch, steps and rounds >= 1", f"{settings}", "give whole numbers from 1")
    found: dict[str, list[Speed]] = {way: [] for way in ways}
    for way in track(list(ways) * rounds, "training", transient=True):
        with ProcessPoolExecutor(1, get_context("spawn"), hush) as pool:
            found[way].append(pool.submit(measure, way, settings).result())
    result = []
    for way, own in found.items():
        names = ("samples_per_s", "tokens_per_s", "mfu", "peak_gib")
        result.append(
            Speed(way, *(float(np.median([asdict(row)[name] for row in own])) for name in names))
        )
    return result


def measure(way: str, settings: Settings) -> Speed:
    """Trains some steps in one way."""
    reader, loss = WAYS.get(way, WAYS["vla0"])
    with TemporaryDirectory() as folder:
        model, prompt, rows = _inputs(settings, reader)
        training = TrainingConfig(
            num_steps=WARM + settings.steps, batch_size=settings.batch_size, learning_rate=1e-6,
            precision="bf16" if torch.cuda.is_available() else "fp32",
            gradient_checkpointing=settings.gradient_checkpointing,
        )  # fmt: skip
        data = DataConfig(dataset="", cameras={"any": ""}, num_workers=settings.workers)
        config = TrainConfig(
            data=data,
            training=training,
            logging=LoggingConfig(output_dir=folder, log_every_n_steps=10**6),
        )
        told = arguments(config, Path(folder), WARM + settings.steps, 1.0)
        told.disable_tqdm, told.torch_compile = True, way == COMPILED
        told.save_strategy = type(told.save_strategy)("no")
        collate = collator([prompt], config.augmentation)
        kind = VLA0Trainer if loss == "vla0" else Trainer
        clock = Clock()
        trainer = kind(
            model=model, args=told, train_dataset=rows, data_collator=collate, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)  # it prints a summary as it ends
        trainer.train()
        batch = collate([rows[i % len(rows)] for i in range(settings.batch_size)])
        tokens = int(batch["attention_mask"].sum()) / settings.batch_size
        samples = settings.steps * settings.batch_size / clock.seconds
        # forward, and twice that for backward
        work = 3 * _forward(trainer.model, batch) / settings.batch_size
        rate = product_rate(torch.cuda.is_available())
    peak = clock.peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Speed(way, samples, samples * tokens, samples * work / rate, peak)


class Clock(TrainerCallback):
    """Seconds of the steps after the first few."""

    started = seconds = peak = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Starts after the warm-up, and stops at the end."""
        if state.global_step in (WARM, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                self.peak = torch.cuda.max_memory_allocated() / 2**30
            now = time.perf_counter()
            self.started, self.seconds = (
                (now, 0.0) if state.global_step == WARM else (0.0, now - self.started)
            )


class InMemory(torch.utils.data.Dataset):
    """Some rows that no reader has to read."""

    def __init__(self, spec: Spec, count: int = 64):
        stream = moving_pictures(spec)(0)
        rng = np.random.default_rng(0)
        shape = (spec.chunk_size, spec.dimensions)
        whole = np.ones(spec.chunk_size, bool)
        self.rows = [
            Sample(next(stream), rng.random(shape, np.float32), whole) for _ in range(count)
        ]

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int):
        return self.rows[index % len(self.rows)], (0, 0, index), 0


def _inputs(settings: Settings, reader: str) -> tuple[Any, Prompt, Any]:
    """(model, prompt, rows)."""
    source = None
    if settings.dataset is None:
        spec = Spec(
            low=(-1.0,) * 7,
            high=(1.0,) * 7,
            fps=20.0,
            cameras=("agentview", "wrist"),
            base_model=settings.model,
        )
    else:
        source = Source(DataConfig(dataset=settings.dataset))
        spec = Spec(base_model=settings.model, **source.spec_fields(Spec.chunk_size))
    if settings.model in (TINY, "3b"):
        processor: Any = tiny_processor([spec.system_text(), "move the red blue green block"])
        model: Any = (
            tiny_model(processor)
            if settings.model == TINY
            else build_3b(processor, default_device(), torch.float32)
        )
    else:
        model, processor = load(locate(settings.model), "cpu", torch.float32)
    prompt = Prompt(spec, processor)
    if source is None:
        return model, prompt, InMemory(spec)
    return model, prompt, Samples(source, spec) if reader == "vla0" else Stock(source, spec)


@torch.no_grad()
def _forward(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """FLOP of a forward pass that gives logits where there are labels."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    kept = int((labels != -100).any(0).sum()) + 1
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(**batch, logits_to_keep=kept, use_cache=False)
    return float(counter.get_total_flops())


def main(
    model: Annotated[
        str, typer.Option(help="tiny or 3b (random weights), or a checkpoint folder or Hub id")
    ] = "tiny",
    dataset: Annotated[
        str | None,
        typer.Option(help="LeRobot dataset; default one made up in the form of LIBERO's"),
    ] = None,
    batch: Annotated[int, typer.Option(help="samples of a step")] = 8,
    steps: Annotated[int, typer.Option(help="timed")] = 20,
    rounds: Annotated[int, typer.Option(help="the ways take turns; the median counts")] = 3,
    workers: Annotated[int, typer.Option(help="processes that prepare batches")] = 0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="less memory, more time")] = False,
    way: Annotated[
        list[str] | None, typer.Option(help="of the ways, those only; several times for several")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file for the rows, JSON")] = None,
) -> None:
    """Time training against transformers' Trainer with all logits and LeRobot's own reader."""
    quiet()
    with dataset_or_made(dataset) as folder:
        settings = Settings(model, folder, batch, steps, workers, gradient_checkpointing)
        ways = way or (list(WAYS) if folder else ["vla0's reader, all logits", "vla0"])
        show([asdict(row) for row in bench(settings, ways, rounds)], out)


if __name__ == "__main__":
    typer.run(main)
