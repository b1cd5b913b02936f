"""What only a GPU can tell, in minutes: a model of Qwen2.5-VL-3B's shape trained and decoded, and
whether the tokens are right.

python benchmarks/gpu.py --minutes 8 --out runs/gpu      # --small: the tiny model, to rehearse on
any machine

Needs no network, no dataset and no weights: the model starts from random numbers and is trained for
some minutes on made-up pictures, so that its chunks resemble each other as a policy's do. Each
stage is a process with a time limit; what it has measured is on the disk after each row, so that a
run cut at any moment loses nothing. The most valuable stages come first.
"""

import gc
import importlib.util
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import training
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from vla0.bench import decode as decoding
from vla0.bench.certificate import certificate
from vla0.bench.inputs import build_3b, product_rate
from vla0.checkpoint import io as models
from vla0.checkpoint.tiny import tiny_model, tiny_processor
from vla0.core.spec import MAIN, Observation, Sample, Spec
from vla0.data.config import Augmentation
from vla0.data.dataset import collator
from vla0.data.lerobot import DataConfig
from vla0.decode.kv_cache import CudaGraph
from vla0.decode.speculative import SpeculativeDecoder
from vla0.decode.tree_size import cache_file, key_of, read
from vla0.policy import VLA0
from vla0.train.config import LoggingConfig, Lora, TrainConfig, TrainingConfig
from vla0.train.lora import adapted
from vla0.train.trainer import VLA0Trainer, arguments

COLOURS = ("red", "blue", "green")
PLAIN = "one token a pass"
TAIL = "tree that learns, and a tail"


@dataclass
class Stage:
    """What a stage is told, and where it writes."""

    name: str
    out: Path
    scratch: Path
    small: bool
    seconds: float
    rows: list[dict[str, Any]]
    started: float = 0.0

    def note(self, **row: Any) -> None:
        """Adds a row; the file on the disk is whole at every moment."""
        self.rows.append(row)
        partial = self.out / f".{self.name}.json"
        partial.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.out / f"{self.name}.json")
        print(f"[{self.name} {time.monotonic() - self.started:.0f} s] {short(row)}", flush=True)

    def left(self) -> float:
        """Seconds until the limit."""
        return self.started + self.seconds - time.monotonic()


def short(row: dict[str, Any]) -> str:
    """A row on a line."""
    cells = ((k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in row.items())
    return ", ".join(f"{k} {v}" for k, v in cells if not isinstance(v, (dict, list)))[:400]


# What is seen and what is done


def spec() -> Spec:
    """The published prompt of LIBERO: two cameras tiled to 224 x 448, 8 steps of 7 numbers in
    0..1000.
    """
    return Spec(
        low=(-1.0,) * 7,
        high=(1.0,) * 7,
        fps=20.0,
        cameras=("agentview", "wrist"),
        base_model="random",
    )


def lesson(number: int) -> Iterator[tuple[Observation, np.ndarray]]:
    """An episode without an end: pictures whose colours turn, and the actions (8, 7) that go with
    them, a little unsteady.
    """
    rng = np.random.default_rng(number)
    phase, pace = rng.random(), 1 / 96
    hidden = np.random.default_rng(0)
    shift, turns = hidden.random(7), np.array([1, 1, 1, 1, 1, 2, 1])
    shade = np.linspace(-25, 25, 256)[None, :, None] * np.ones((256, 1, 3))
    while True:
        angle = 2 * np.pi * phase
        picture = 127 + 90 * np.cos(angle + np.array([0, 2.1, 4.2])) + shade
        picture = np.clip(picture, 0, 255).astype(np.uint8)
        when = phase + pace * np.arange(8)
        actions = 0.9 * np.sin(2 * np.pi * (when[:, None] * turns + shift))
        actions[:, 6] = np.sign(actions[:, 6])  # a gripper
        actions[:, :6] += rng.normal(0, 0.005, (8, 6))
        images = {"agentview": picture, "wrist": picture[::-1, ::-1]}
        yield (
            Observation(images, f"move the {COLOURS[number % 3]} block"),
            actions.astype(np.float32),
        )
        phase += pace


def observations(number: int) -> Iterator[Observation]:
    """Those of a lesson that training did not see."""
    return (observation for observation, _ in lesson(10_000 + number))


class Lessons(torch.utils.data.Dataset):
    """A few hundred rows of lessons, again and again."""

    def __init__(self, count: int = 384):
        self.rows = []
        for number in range(count // 4):
            episode = lesson(number)
            for _ in range(4):
                observation, actions = next(episode)
                self.rows.append(Sample(observation, actions, np.ones(8, np.bool_)))

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int):
        return self.rows[index % len(self.rows)], (0, 0, index), 0


def processor() -> Any:
    """Of the tiny model: of Qwen's vocabulary only the size matters here."""
    return tiny_processor([spec().system_text(), "move the red blue green block"])


def vlm(small: bool, dtype: torch.dtype) -> Any:
    """A model of random weights on the device."""
    own: Any = tiny_model(processor())
    return (
        own.to(models.default_device(), dtype)
        if small
        else build_3b(processor(), models.default_device(), dtype)
    )


def policy_of(stage: Stage, trained: bool) -> VLA0:
    """The policy that the stage `policy` left, or one of random weights, in bf16 on a GPU."""
    if trained:
        return VLA0.from_pretrained(stage.scratch / "policy")
    return VLA0(
        vlm(stage.small, torch.bfloat16 if torch.cuda.is_available() else torch.float32),
        processor(),
        spec(),
    )


# Stages


def machine(stage: Stage) -> None:
    """Versions, and the two ceilings: products of matrices, and copies."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        own = torch.cuda.get_device_properties(0)
        found |= {
            "card": own.name,
            "gib": own.total_memory / 2**30,
            "capability": f"{own.major}.{own.minor}",
        }
        source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(source)
        found["copy_tb_per_s"] = 4 * 2**30 / device_ms(lambda: target.copy_(source), 10) / 1e9
    found["product_tflop_per_s"] = product_rate(True) / 1e12
    stage.note(**found)
    stage.note(way="rows of a product round the same wherever they stand", **steady())


def steady() -> dict[str, bool]:
    """Of the 3B's products, by rows: whether each row is the same, bit for bit, after the rows were
    put in another order.
    """
    found, device = {}, models.default_device()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    for into, out in ((2048, 2048), (2048, 256), (2048, 11008), (11008, 2048)):
        weight = torch.randn(out, into, device=device, dtype=dtype) / into**0.5
        for rows in (16, 32, 64, 128, 256, 512):
            given, order = (
                torch.randn(rows, into, device=device, dtype=dtype),
                torch.randperm(rows, device=device),
            )
            once, again = given @ weight.T, given[order] @ weight.T
            found[f"{into} to {out}, {rows}"] = bool(torch.equal(once[order], again))
    return found


def device_ms(function: Callable[[], Any], times: int) -> float:
    """Median milliseconds of a function on the device, after three calls that do not count."""
    taken = []
    for number in range(3 + times):
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            ms = begin.elapsed_time(end)
        else:
            started = time.perf_counter()
            function()
            ms = (time.perf_counter() - started) * 1e3
        taken += [ms] if number >= 3 else []
    return float(np.median(taken))


def random_weights(stage: Stage) -> None:
    """Decoding where guesses are worthless."""
    own = policy_of(stage, False)
    decoded(
        stage,
        own,
        [(1, 1)],
        (PLAIN, "all digits, one level", "all digits, two levels", TAIL),
        2 if stage.small else 6,
        base=False,
    )


def trained_weights(stage: Stage) -> None:
    """Decoding as of a policy: one, several steps a query, and many observations at once."""
    own = policy_of(stage, True)
    wrong = []
    for number in range(6):
        observation, actions = next(lesson(20_000 + number))
        wrong.append(np.abs(own.predict_batch([observation])[0] - actions).mean())
    stage.note(
        way="its mean error on unseen pictures, in actions",
        mean=float(np.mean(wrong)),
        of_always_zero=0.57,
    )
    decoded(stage, own, [(1, 1)], (PLAIN, TAIL, "not invariant"), 21, profile=True)
    decoded(stage, own, [(1, 8), (8, 1), (32, 1)], (TAIL,), 16, base=False)


def certified(stage: Stage) -> None:
    """Whether the chunks are those of one token a pass."""
    own = policy_of(stage, True)
    for batch in (1, 8):
        told = certificate(own, 1000, batch, 1, observations, min(25, stage.left() / 2))
        stage.note(way=f"certificate, {batch} at once", **told)


def decoded(stage, policy, kinds, ways, chunks, base=True, profile=False) -> None:
    """Rows of ways of decoding; `generate` on the first two chunks, one token a pass on the first
    few.
    """
    for batch, n_action_steps in kinds:
        inputs = decoding.inputs_of(policy.prompt, observations, batch, n_action_steps, chunks)
        expected: list[np.ndarray] = []
        baseline = 0.0
        if base:
            row, expected = decoding.measure(
                policy, decoding.BASELINE, inputs[:2], n_action_steps, [], lambda: None
            )
            baseline = row.ms_median
            stage.note(**asdict(row))
        for way in ways:
            if stage.left() < 15:
                stage.note(way=way, skipped="no time left")
                continue
            slow = way == PLAIN
            started = time.monotonic()
            row, levels = decoding.measure(
                policy,
                way,
                inputs[: max(2, chunks // 5) if slow else chunks],
                n_action_steps,
                expected,
                lambda: None,
            )
            expected = levels if way == ways[0] else expected
            own = {
                **asdict(row),
                "whole_s": time.monotonic() - started,
                "ms_per_number": row.ms_median / 56,
            }
            if baseline:
                own["faster"] = baseline / row.ms_median
            stage.note(**own)
        if batch == 1 and n_action_steps == 1 and len(expected) > 1:
            near = [np.abs(a[0, 1:] - b[0, :-1]).mean() for a, b in pairwise(expected)]
            stage.note(way="how far successive chunks are apart, levels", mean=float(np.mean(near)))
        parts(stage, policy, inputs[0], batch, profile)


def parts(
    stage: Stage,
    policy: VLA0,
    batch: dict[str, torch.Tensor],
    rows: int,
    profile: bool,
    **settings: Any,
) -> None:
    """What a chunk's time is made of: vision, first pass and the others on the device; the rest is
    the host's.
    """
    decoder = SpeculativeDecoder(policy.model, policy.prompt, **settings)
    started = time.perf_counter()
    decoder.decode(batch)
    first = time.perf_counter() - started
    seconds = []
    last: Any = None
    for _ in range(5):
        started = time.perf_counter()
        last = decoder.decode(batch, guesses=last)
        seconds.append(time.perf_counter() - started)
    engine: Any = decoder.engine
    found: dict[str, Any] = {
        "way": "parts",
        "batch": rows,
        **settings,
        "first_call_s": first,
        "tree_size": decoder.nodes(engine.held(rows)),
    }
    found |= {"same_again_ms": float(np.median(seconds)) * 1e3, "same_again_passes": decoder.passes}
    for key, replay in engine.graphs.items():
        found[f"{key[0]}_ms"] = device_ms(replay.graph.replay, 20)
    if torch.cuda.is_available():
        pixels = batch["pixel_values"].to(policy.model.device, policy.model.dtype)
        with torch.inference_mode():
            (tower,) = engine.vision_towers.values()
            vision = CudaGraph(tower, None, pixels) if rows == 1 else None
            if vision:
                found["vision_ms"] = device_ms(vision.graph.replay, 20)
        weights = sum(
            p.numel() * p.element_size()
            for p in policy.model.model.language_model.layers.parameters()
        )
        found["layers_gb"] = weights / 1e9
    found["pass_ms_by_nodes"] = read(cache_file()).get(key_of(engine))
    stage.note(**found)
    if profile and torch.cuda.is_available():
        for key, replay in engine.graphs.items():
            stage.note(**kernels(key[0], replay.graph.replay))


def kernels(name: str, function: Callable[[], Any]) -> dict[str, Any]:
    """Where the device's time goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as told:
        function()
        torch.cuda.synchronize()
    total: dict[str, list[float]] = {}
    for event in told.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            own = total.setdefault(event.name[:90], [0, 0.0])
            own[0], own[1] = own[0] + 1, own[1] + event.device_time / 1e3
    ranked = sorted(total.items(), key=lambda item: -item[1][1])
    return {
        "way": f"kernels of {name}",
        "count": sum(int(c) for c, _ in total.values()),
        "ms": sum(ms for _, ms in total.values()),
        "kernels": [{"name": k, "count": c, "ms": ms} for k, (c, ms) in ranked[:24]],
    }


def compiled(stage: Stage) -> None:
    """Layers by torch.compile: how much faster, and how long that takes."""
    own = policy_of(stage, (stage.scratch / "policy").exists())
    inputs = decoding.inputs_of(own.prompt, observations, 1, 1, 21)
    parts(stage, own, inputs[0], 1, True, compiled=True)
    levels: list[np.ndarray] = []
    # each is compared with the one before it
    for way, count in ((f"compiled, {PLAIN}", 4), ("compiled", 21), (TAIL, 21)):
        row, levels = decoding.measure(own, way, inputs[:count], 1, levels, lambda: None)
        stage.note(**asdict(row))


class Limit(TrainerCallback):
    """Stops training when its time is up, notes the losses, and times the steps after the first
    few.
    """

    def __init__(self, stage: Stage, seconds: float):
        self.stage, self.seconds, self.losses = stage, seconds, []
        self.began = self.clock = self.took = 0.0
        self.steps = self.halfway = 0

    def on_step_end(self, args, state, control, **kwargs):
        """Ends it in time."""
        if state.global_step == training.WARM:
            sync()
            self.clock = self.began = time.monotonic()
        # what is compiled, is so
        if not self.halfway and self.began and time.monotonic() - self.began > self.seconds / 2:
            sync()
            self.clock, self.halfway = time.monotonic(), state.global_step
        if state.global_step > training.WARM and time.monotonic() - self.began > self.seconds:
            control.should_training_stop = True
        if control.should_training_stop or state.global_step == state.max_steps:
            sync()
            self.took, self.steps = (
                time.monotonic() - self.clock,
                state.global_step - max(training.WARM, self.halfway),
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keeps the losses."""
        if logs and "loss" in logs:
            self.losses.append(
                [state.global_step, round(logs["loss"], 3), round(logs.get("token_accuracy", 0), 3)]
            )


def sync() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def trained(
    stage: Stage,
    name: str,
    seconds: float,
    own: Any = None,
    prompt: Any = None,
    steps: int = 10**6,
    lora: int = 0,
    profiled: bool = False,
    plain: bool = False,
    compiled: bool = False,
    rate: float = 2e-4,
    **settings: Any,
) -> Any:
    """Trains for some seconds as a config would, notes the speed, and gives the model."""
    gpu = torch.cuda.is_available()
    if own is None:
        own = vlm(stage.small, torch.bfloat16 if lora and gpu else torch.float32)
    model = adapted(own, Lora(lora), False)
    if compiled:
        # the tower's blocks, checkpointed, were not the same when computed anew
        for layer in own.model.language_model.layers:
            layer.compile()
    from vla0.core.prompt import Prompt

    prompt = Prompt(spec(), processor())
    with TemporaryDirectory() as folder:
        told = TrainingConfig(
            num_steps=steps,
            learning_rate=rate,
            precision="bf16" if gpu else "fp32",
            lr_scheduler="constant_with_warmup",
            warmup_ratio=30 / steps,
            max_grad_norm=1.0,
            **settings,
        )
        config = TrainConfig(
            data=DataConfig(dataset="", cameras={"any": ""}, num_workers=8 if gpu else 0),
            training=told,
            logging=LoggingConfig(output_dir=folder, log_every_n_steps=20),
        )
        asked = arguments(config, Path(folder), steps, 1.0)
        asked.disable_tqdm, asked.save_strategy = True, type(asked.save_strategy)("no")
        collate = collator([prompt], Augmentation(mask="none", jitter=(0.0, 0.0, 0.0, 0.0)))
        limit, rows = Limit(stage, seconds), Lessons()
        kind = training.Trainer if plain else VLA0Trainer
        trainer: Any = kind(
            model=model, args=asked, train_dataset=rows, data_collator=collate, callbacks=[limit]
        )
        trainer.remove_callback(training.PrinterCallback)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        batch = collate([rows[i] for i in range(told.batch_size)])
        work = 3 * training._forward(trainer.model, batch) / told.batch_size
        if profiled and gpu:
            inputs = trainer._prepare_inputs(batch)
            for what, function in {
                "a step's forward and backward": lambda: trainer.training_step(
                    trainer.model, inputs, None
                ),
                "a step of the optimiser": lambda: trainer.optimizer.step(),
            }.items():
                stage.note(**kernels(what, function))
    tokens = int(batch["attention_mask"].sum()) / told.batch_size
    speed = limit.steps * told.batch_size / limit.took
    stage.note(
        way=name,
        samples_per_s=speed,
        tokens_per_s=speed * tokens,
        tflop_per_sample=work / 1e12,
        tflop_per_s=speed * work / 1e12,
        mfu_of_measured=speed * work / product_rate(gpu),
        steps=limit.steps,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
        reserved_gib=torch.cuda.max_memory_reserved() / 2**30 if gpu else None,
        losses=limit.losses,
    )
    return own


def policy(stage: Stage) -> None:
    """Full fine-tuning from random weights, for as long as there is time: its speed, and a policy
    of it.
    """
    batch = 4 if stage.small else 32
    liger = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    own = trained(
        stage,
        f"full, checkpointing, {batch} a step{', liger' * liger}",
        min(30 if stage.small else 90, stage.seconds - 70),
        batch_size=batch,
        gradient_checkpointing=True,
        liger=liger,
        profiled=True,
        rate=1e-3 if stage.small else 1.5e-4,
    )
    own.zero_grad()
    gc.collect()
    own = own.to(torch.bfloat16) if torch.cuda.is_available() else own
    models.save(stage.scratch / "policy", own, processor(), {MAIN: spec()})
    stage.note(way="saved")


def lora(stage: Stage) -> None:
    """LoRA inside 24 GB: seen, not estimated."""
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 23.5 * 2**30 / whole))
    trained(
        stage,
        "LoRA 64, checkpointing, 8 a step, 23.5 GiB at most",
        12,
        lora=64,
        batch_size=8,
        gradient_checkpointing=True,
    )


def full(stage: Stage, name: str, **settings: Any) -> None:
    """Another config of full fine-tuning, a few steps."""
    told: dict[str, Any] = {"batch_size": 16} | settings
    trained(stage, name, 8, **told)


TRAINING: dict[str, dict[str, Any]] = {  # configs of full fine-tuning, a stage each
    "full_64_liger": {"batch_size": 64, "gradient_checkpointing": True, "liger": True},
    "full_16": {"gradient_checkpointing": True},
    "full_32": {"batch_size": 32, "gradient_checkpointing": True},
    "full_16_compiled": {"gradient_checkpointing": True, "compiled": True},
    "full_8_compiled": {"batch_size": 8, "compiled": True},
    "full_4": {"batch_size": 4},
    "plain_trainer_16": {"plain": True, "gradient_checkpointing": True},
}

# GiB of a card; of what is not named 12
NEEDS = {"policy": 70, "lora": 18, **dict.fromkeys(TRAINING, 70)}

STAGES: dict[str, tuple[float, Callable[[Stage], None]]] = {  # seconds at most, what is done
    "machine": (30, machine),
    "policy": (175, policy),
    "trained": (90, trained_weights),
    "compiled_pass": (60, compiled),
    "certificate": (60, certified),
    "lora": (40, lora),
    "random": (60, random_weights),
    **{
        name: (45, lambda stage, n=name, w=own: full(stage, n, **w))
        for name, own in TRAINING.items()
    },
}


def child(name: str, out: Path, scratch: Path, small: bool, seconds: float) -> None:
    """A stage in a process of its own."""
    stage = Stage(name, out, scratch, small, seconds, [], time.monotonic())
    needed = NEEDS.get(name, 12) * 2**30
    if torch.cuda.is_available() and not small and (there := torch.cuda.mem_get_info()[1]) < needed:
        stage.note(
            way=name,
            skipped=f"needs {needed / 2**30:.0f} GiB, the card has {there / 2**30:.1f}: "
            f"{needed - there} bytes lack",
        )
        return
    try:
        STAGES[name][1](stage)
    except Exception as error:  # the next stage begins clean
        traceback.print_exc()
        stage.note(
            way=name,
            error=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            if str(error)
            else repr(error),
        )


def run(
    out: Annotated[Path, typer.Option(help="a JSON file for each stage")] = Path("runs/gpu"),
    minutes: Annotated[float, typer.Option(help="of all stages together")] = 8.0,
    stage: Annotated[
        list[str] | None, typer.Option(help="those only; several times for several")
    ] = None,
    scratch: Annotated[
        Path | None, typer.Option(help="8 GB of weights go there; default OUT")
    ] = None,
    small: Annotated[bool, typer.Option(help="the tiny model: a rehearsal")] = False,
) -> None:
    """Run the stages that there is time for, and print what they found."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # as `vla0 train`
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if unknown := [name for name in stage or () if name not in STAGES]:
        raise typer.BadParameter(
            f"expected a stage of {list(STAGES)}; got '{unknown[0]}'; choose one of those"
        )
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
        "1"  # looks for a GPU without beginning CUDA, which children could not use then
    )
    if not small and not torch.cuda.is_available():
        print(
            f"expected a GPU that torch {torch.__version__} can use; got none, or a driver "
            f"before CUDA {torch.version.cuda};"
        )
        print("install a newer driver, or rehearse with --small. It would have measured:")
        for name in stage or STAGES:
            print(
                f"  {name}: at most {STAGES[name][0]} s. "
                f"{STAGES[name][1].__doc__ or 'Full fine-tuning by another config.'}"
            )
        raise typer.Exit(2)
    out.mkdir(parents=True, exist_ok=True)
    # widths are measured anew
    os.environ.setdefault("XDG_CACHE_HOME", str((out / "cache").absolute()))
    began, console = time.monotonic(), Console(width=150)
    # torch is imported once; CUDA begins in the child
    context = multiprocessing.get_context("fork")
    for name in stage or STAGES:
        left = minutes * 60 - (time.monotonic() - began)
        if left < 20:
            console.print(f"{name}: no time left")
            continue
        seconds = min(STAGES[name][0], left)
        own = context.Process(target=child, args=(name, out, scratch or out, small, seconds))
        own.start()
        own.join(seconds + 10)
        if own.is_alive():
            own.kill()
            own.join()
            console.print(f"{name}: stopped after {seconds:.0f} s")
        elif own.exitcode:
            console.print(f"{name}: ended with {own.exitcode}")
    show(out, console)


def show(out: Path, console: Console) -> None:
    """What lies on the disk, as tables."""
    for file in sorted(
        out.glob("*.json"), key=lambda f: list(STAGES).index(f.stem) if f.stem in STAGES else 99
    ):
        table = Table("what", "found", title=file.stem)
        for row in json.loads(file.read_text(encoding="utf-8")):
            told = dict(row)
            table.add_row(str(told.pop("way", "")), short(told))
        console.print(table)


if __name__ == "__main__":
    typer.run(run)
