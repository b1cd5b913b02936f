"""Text against other ends of the same model, and against other policies, on one dataset.

python benchmarks/versus.py --dataset runs/demo/dataset --out runs/versus

Two questions, at least three seeds each. *What is text worth?* One backbone, one config, the same
rows, steps and seeds; it ends in text, in new tokens for bins, in a regression or in a flow
(`heads.py`). *What else could one train?* LeRobot's own policies by `lerobot-train`, for as many
seconds as the text took, each with its published recipe made small.

Everything is tried by one evaluator on the same seeds. The same command again goes on where it
stopped; `--row` and `--seed` share the work out over several processes.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import heads
import numpy as np
import torch
import typer
from ablation import Dataset, Episodes, Out, Rows, Seeds, Simulated, Steps, file_of, table
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from vla0.checkpoint.io import fingerprint
from vla0.checkpoint.tiny import tiny_model, tiny_processor
from vla0.checkpoint.tiny_families import FAMILIES
from vla0.errors import InputError
from vla0.files import write_whole
from vla0.quiet import quiet
from vla0.sim import experiment, foreign
from vla0.sim.evaluate import EvalConfig
from vla0.sim.simulator import simulator
from vla0.train import run as training
from vla0.train.config import TrainConfig, read_config
from vla0.train.resume import recorded

TEXT = "text"
FAMILY = "smolvlm"  # of SmolVLA's backbone
VLM_SIDE = FAMILIES[FAMILY].side  # of its pictures, in pixels
CALIBRATION = (10, 40)  # steps of two short runs, whose difference is what a step takes
# Where the weights of a training are in its folder; LeRobot has one place for all its policies.
PLACES = {TEXT: "last", **dict.fromkeys(heads.HEADS, ".")}
LEROBOT_PLACE = "checkpoints/last/pretrained_model"
console = Console()


@dataclass(frozen=True)
class Plan:
    """One simulator's share of it.

    Args:
        config: How the backbone is trained, whatever its end.
        steps: Of training; fewer than the config's, so that rows can differ.
        settings: Of the evaluation.
        rows: {a policy of LeRobot's: options of `lerobot-train`}.
    """

    config: Path
    steps: int
    settings: Mapping[str, Any]
    rows: Mapping[str, Sequence[str]]


def lerobot_rows(chunk: int, side: int) -> dict[str, list[str]]:
    """Return LeRobot's policies, small: {name: options}.

    Args:
        chunk: Steps of a chunk, of which all are executed: a quarter of an episode, as a hundred
            are of ACT's own.
        side: Of a picture, in pixels.
    """
    chunks = [f"--policy.chunk_size={chunk}", f"--policy.n_action_steps={chunk}"]
    # Learning rates are those of training from nothing; the published ones are for weights that
    # have been trained before, or for a hundred times as many steps.
    return {
        "ACT": [
            "--policy.type=act", *chunks, "--policy.dim_model=128", "--policy.n_heads=4",
            "--policy.dim_feedforward=512", "--policy.pretrained_backbone_weights=null",
            "--policy.optimizer_lr=1e-4", "--policy.optimizer_lr_backbone=1e-4",
        ],
        "Diffusion Policy": [
            "--policy.type=diffusion", "--policy.horizon=16", "--policy.n_action_steps=8",
            "--policy.down_dims=[64,128,256]", "--policy.pretrained_backbone_weights=null",
            "--policy.use_group_norm=true", "--policy.noise_scheduler_type=DDIM",
            "--policy.num_inference_steps=10", "--policy.scheduler_warmup_steps=50",
            f"--policy.crop_shape=[{side * 7 // 8},{side * 7 // 8}]", "--policy.optimizer_lr=3e-4",
        ],
        "SmolVLA": [
            "--policy.type=smolvla", *chunks, "--policy.num_vlm_layers=4",
            "--policy.train_expert_only=false", "--policy.freeze_vision_encoder=false",
            f"--policy.resize_imgs_with_padding=[{VLM_SIDE},{VLM_SIDE}]",
            "--policy.optimizer_lr=1e-3",
            "--policy.scheduler_warmup_steps=50",
        ],
    }  # fmt: skip


PLANS = {
    "metaworld": Plan(
        Path("configs/demo.yaml"),
        600,
        {
            "env": "metaworld",
            "tasks": ("button-press-topdown-v3", "drawer-close-v3", "window-close-v3"),
            "fps": 40,
            "max_steps": 50,
            "options": {"start": "above"},
            "ensemble": "none",
            "n_action_steps": 1,
        },
        lerobot_rows(12, 112),
    ),
    "libero": Plan(
        Path("configs/libero_tiny.yaml"),
        1000,
        {"env": "libero", "tasks": ("object/0",), "ensemble": "none", "n_action_steps": 2},
        lerobot_rows(25, 112),
    ),
}


def run(
    dataset: Dataset,
    out: Out,
    env: Simulated = "metaworld",
    steps: Steps = None,
    seed: Seeds = None,
    episodes: Episodes = 40,
    row: Rows = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the config, for our backbone")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="of lerobot-train, after the plan's own")
    ] = None,
) -> None:
    """Train and try what is missing, and print the table after each seed."""
    plan = PLANS[env]
    quiet()
    names = [TEXT, *heads.HEADS, *plan.rows]
    if unknown := [name for name in row or () if name not in names]:
        raise SystemExit(f"expected a row of {names}; got '{unknown[0]}'")
    for own in seed or [0, 1, 2]:
        for name in names:
            if row and name not in row:
                continue
            try:
                tried(plan, name, own, dataset, out, steps, episodes, set_ or (), option or ())
            except InputError as error:
                raise SystemExit(f"{name}, seed {own}: {error}") from None
        console.print(table(out, names))
    console.print(facts(out, names))


def tried(
    plan: Plan,
    name: str,
    seed: int,
    dataset: Path,
    out: Path,
    steps: int | None,
    episodes: int,
    overrides: Sequence[str],
    options: Sequence[str],
) -> None:
    """Train a row with a seed and evaluate it, as far as that is not done."""
    folder = out / f"{file_of(name)}-{seed}"
    own = [f"logging.output_dir={folder}", f"data.dataset={dataset}", f"training.seed={seed}"]
    own += [f"model.tiny.seed={seed}", f"training.num_steps={steps or plan.steps}"]
    own += [f"logging.save_every_n_steps={steps or plan.steps}", *overrides]
    config = read_config(TrainConfig, plan.config, own)
    settings = EvalConfig(episodes=episodes, **plan.settings)
    result = out / f"{file_of(name)}-{seed}-eval"
    note = note_of(out, name, seed)
    console.print(f"[bold]{name}, seed {seed}[/bold]")
    trained = folder / PLACES.get(name, LEROBOT_PLACE)
    asked: Any = json.loads(json.dumps(recorded(config, 1)))
    del asked["logging"]
    if name in plan.rows:
        asked = [*plan.rows[name], *options, f"--seed={seed}"]
        asked += [f"--batch_size={config.training.batch_size}"]
        asked += [f"--num_workers={config.data.num_workers}"]
    if note.exists():
        if json.loads(note.read_text())["asked"] != asked:
            expected = f"the settings of the training in '{note}'"
            raise InputError(expected, "others", "choose another --out")
    else:
        # What is left of a training that was interrupted does not tell how long it took.
        shutil.rmtree(folder, ignore_errors=True)
        if name in plan.rows:
            seconds = lerobot_trained(asked, dataset, folder, text_seconds(out, seed))
        else:
            started = time.monotonic()
            training.main(config) if name == TEXT else heads.train(config, name)
            seconds = time.monotonic() - started
        found = {"train_s": round(seconds, 1), "weights": stored(trained / heads.WEIGHTS)}
        found |= {"threads": torch.get_num_threads(), "asked": asked}
        write_whole(note, json.dumps(found) + "\n")
    if name == TEXT:
        experiment.trial(str(trained), settings, result)
    elif name in heads.HEADS:
        model, prompt = heads.load(config, name)
        mark = fingerprint(model, prompt.spec)
        predict = heads.predictor(model, prompt)
        policy = foreign.Foreign(predict, prompt.spec.chunk_size, None, None, mark)
        foreign.trial(policy, name, settings, result)
    else:
        policy = foreign.load(f"lerobot:{trained}", simulator(settings.env), {}, None)
        own_recipe = ("n_action_steps", "ensemble", "image_size")
        foreign.trial(policy, name, settings, result, own_recipe)


def note_of(out: Path, name: str, seed: int | str) -> Path:
    """Return the file of what a training took, which is there once it has ended."""
    return out / f"{file_of(name)}-{seed}.json"


def text_seconds(out: Path, seed: int) -> float:
    """Return the seconds that the text of a seed was trained for."""
    note = note_of(out, TEXT, seed)
    if not note.exists():
        got = f"no '{note}'"
        raise InputError("the seconds that the text took", got, f"--row {TEXT} first")
    return json.loads(note.read_text())["train_s"]


def lerobot_trained(options: Sequence[str], dataset: Path, folder: Path, limit_s: float) -> float:
    """Train a policy of LeRobot's for about `limit_s` seconds, as its users do.

    Returns:
        The seconds of its steps. Starting does not count.
    """
    if "--policy.type=smolvla" in options:
        options = [*options, f"--policy.vlm_model_name={small_vlm(folder.parent / FAMILY)}"]
    taken = []
    for steps in CALIBRATION:
        started = time.monotonic()
        lerobot_train(options, dataset, folder, steps, save=False)
        taken.append(time.monotonic() - started)
    a_step = (taken[1] - taken[0]) / (CALIBRATION[1] - CALIBRATION[0])
    steps = max(1, round(limit_s / a_step))
    console.print(f"{a_step:.2f} s a step, {steps} steps in {limit_s:.0f} s")
    started = time.monotonic()
    lerobot_train(options, dataset, folder, steps, save=True)
    return time.monotonic() - started - (taken[0] - CALIBRATION[0] * a_step)


def lerobot_train(
    options: Sequence[str], dataset: Path, folder: Path, steps: int, save: bool
) -> None:
    """Run `lerobot-train`; raise InputError with the last words of one that fails."""
    shutil.rmtree(folder, ignore_errors=True)
    words = [
        *options, f"--dataset.repo_id=local/{dataset.name}", f"--dataset.root={dataset}",
        f"--output_dir={folder}", f"--steps={steps}", f"--save_freq={steps}",
        f"--save_checkpoint={str(save).lower()}", f"--log_freq={max(1, steps // 10)}",
        "--policy.device=cpu", "--policy.push_to_hub=false", "--wandb.enable=false",
    ]  # fmt: skip
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lerobot-train")), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = folder.with_name(f"{folder.name}.log")
    log.write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        got = (done.stdout.strip().splitlines() or ["nothing"])[-1][:300]
        raise InputError("lerobot-train to end", got, f"see '{log}'")


def small_vlm(folder: Path) -> Path:
    """Write SmolVLM's architecture at the size of our tiny models, with random weights."""
    if not folder.exists():
        processor = tiny_processor(
            ["button drawer window press close push pick place"],
            family=FAMILY,
            side=VLM_SIDE,
        )
        model = tiny_model(processor, vision_width=192, vision_heads=6)
        # LeRobot freezes an output layer of its own, as SmolVLM2 has one.
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.config.save_pretrained(folder)  # SmolVLA takes no weights
        processor.save_pretrained(folder)
    return folder


def stored(file: Path) -> int:
    """Count the weights in a file."""
    with safe_open(file, "pt") as weights:
        shapes = [weights.get_slice(key).get_shape() for key in list(weights.keys())]
    return sum(int(np.prod(shape)) for shape in shapes)


def facts(out: Path, names: Sequence[str]) -> Table:
    """Return a table of the notes of what trainings took, by row."""
    result = Table("row", "weights, millions", "training, minutes")
    for name in names:
        notes = [
            json.loads(f.read_text()) for f in sorted(out.glob(note_of(out, name, "[0-9]*").name))
        ]
        if notes:
            minutes = ", ".join(f"{note['train_s'] / 60:.1f}" for note in notes)
            result.add_row(name, f"{notes[0]['weights'] / 1e6:.2f}", minutes)
    return result


if __name__ == "__main__":
    typer.run(run)
