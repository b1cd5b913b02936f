"""What each choice of a config is worth: the same config trained with one thing changed, several
seeds, and tried.

python benchmarks/ablation.py --env metaworld --dataset DATASET --out runs/ablation
python benchmarks/ablation.py --env libero --dataset DATASET --out runs/ablation_libero

Each row is trained and tried by `vla0` commands, which are printed; the same command again goes on
where it stopped. Rows do not know of each other: `--row` and `--seed` share them out over several
processes.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vla0.sim.results import mean_success, read_episodes, summary, wilson

BASE = "masked numbers"
MASKS = {BASE: ["augmentation.mask=number"], "masked characters": ["augmentation.mask=character"]}
MASKS |= {"no masking": ["augmentation.mask=none"]}
ACTED = {"ensembling v1": ["--ensemble", "v1"], "ensembling mean": ["--ensemble", "mean"]}
console = Console()

# Options of a benchmark that trains and tries rows with seeds.
Dataset = Annotated[Path, typer.Option()]
Out = Annotated[Path, typer.Option()]
Simulated = Annotated[str, typer.Option("--env", help="metaworld or libero")]
Steps = Annotated[int | None, typer.Option(help="of training, instead of the plan's")]
Seeds = Annotated[
    list[int] | None, typer.Option(help="several times for several; default 0, 1 and 2")
]
Episodes = Annotated[int, typer.Option(help="for each task and seed")]
Rows = Annotated[list[str] | None, typer.Option(help="only this row; several times for several")]


@dataclass(frozen=True)
class Plan:
    """One environment's share of it."""

    config: Path
    steps: int  # of training: fewer than the config's, so that rows can differ
    tasks: list[str]
    acting: list[str]
    overrides: list[str]  # of all rows
    rows: dict[str, list[str]]  # row: what differs from the config
    acted: dict[str, list[str]]  # how the first row acts otherwise; rows act by the newest chunk


STATE = "data.state=observation.state"
PLANS = {
    "metaworld": Plan(
        config=Path("configs/demo.yaml"),
        steps=600,
        tasks=["button-press-topdown-v3", "drawer-close-v3", "window-close-v3"],
        # as the demo does
        acting=["--n-action-steps", "1", "--option", "start=above", "--max-steps", "50"],
        overrides=[],
        rows={
            **MASKS,
            "with the state": [STATE],
            "with the state, relative": [STATE, "data.relative_dims=[0,1,2]"],
        },
        acted=ACTED,
    ),
    "libero": Plan(
        config=Path("configs/libero_tiny.yaml"),
        steps=1000,
        tasks=["object/0"],
        acting=["--env", "libero", "--n-action-steps", "2", "--workers", "1"],
        overrides=["training.precision=bf16"],  # 1.6 times faster on a CPU that has it
        rows={
            **MASKS,
            "without the state": ["data.state=null"],
            "relative to the state": ["data.relative_dims=[0,1,2]"],
        },
        # Its chunks have two steps: to overlap, each has to be left after one.
        acted={
            name: [*words, "--n-action-steps", "1"]
            for name, words in {"newest chunk of each step": [], **ACTED}.items()
        },
    ),
}


def run(
    dataset: Dataset,
    out: Out,
    env: Simulated = "metaworld",
    steps: Steps = None,
    seed: Seeds = None,
    episodes: Episodes = 20,
    row: Rows = None,
) -> None:
    """Train and try what is missing, and print the table after each seed."""
    plan = PLANS[env]
    for own in seed or [0, 1, 2]:
        for name, overrides in plan.rows.items():
            if row and name not in row:
                continue
            folder = out / f"{file_of(name)}-{own}"
            settings = [
                f"logging.output_dir={folder}",
                f"data.dataset={dataset}",
                f"training.seed={own}",
            ]
            settings += [
                f"{key}={steps or plan.steps}"
                for key in ("training.num_steps", "logging.save_every_n_steps")
            ]
            vla0("train", "--config", plan.config, *settings, *plan.overrides, *overrides)
            for how, acting in {name: [], **(plan.acted if name == BASE else {})}.items():
                tasks = [word for task in plan.tasks for word in ("--task", task)]
                words = [
                    *tasks,
                    "--episodes",
                    episodes,
                    *plan.acting,
                    "--ensemble",
                    "none",
                    *acting,
                ]
                vla0(
                    "eval",
                    "--checkpoint",
                    folder / "last",
                    *words,
                    "--out",
                    out / f"{file_of(how)}-{own}-eval",
                )
        console.print(table(out, [*plan.rows, *plan.acted]))


def file_of(row: str) -> str:
    """A row's name in a folder's."""
    return row.replace(",", "").replace(" ", "-")


def vla0(*words: object) -> None:
    """Runs a `vla0` command; ends where it fails."""
    console.print(f"vla0 {' '.join(map(str, words))}", style="bold", markup=False)
    code = subprocess.run(
        [sys.executable, "-m", "vla0", *map(str, words)], env={**os.environ, "TQDM_DISABLE": "1"}
    ).returncode
    if code:
        sys.exit(code)


def table(out: Path, rows: list[str]) -> Table:
    """Success of each row by task, each seed's mean, and all episodes with their Wilson 95 %
    interval.
    """
    result: Table | None = None
    for row in rows:
        runs = [
            summary(read_episodes(file))
            for file in sorted(out.glob(f"{file_of(row)}-[0-9]*-eval/episodes.jsonl"))
        ]
        if not runs:
            continue
        tried_rows = [run["policy"] for run in runs]
        tasks = list(tried_rows[0])
        result = result or Table("row", *tasks, "mean of each seed", "all", "95 %")
        solved = [
            (sum(r[t]["successes"] for r in tried_rows), sum(r[t]["episodes"] for r in tried_rows))
            for t in tasks
        ]
        good, tried = (sum(pair[i] for pair in solved) for i in (0, 1))
        low, high = wilson(good, tried)
        means = ", ".join(f"{mean_success(r):.0%}" for r in tried_rows)
        shares = (f"{a} of {b}" for a, b in solved)
        result.add_row(row, *shares, means, f"{good / tried:.1%}", f"{low:.0%} to {high:.0%}")
    return result or Table()


if __name__ == "__main__":
    typer.run(run)
