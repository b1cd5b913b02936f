"""What each choice of a recipe is worth: the same recipe trained with one thing changed, several seeds, and tried.

python benchmarks/ablation.py --dataset runs/demo/dataset --out runs/ablation

Each row is trained and tried by `vla0` commands, which are printed; the same command again goes on where it stopped.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vla0.table import mean_success, read_episodes, summary, wilson

STATE = "data.state=observation.state"
TRAINED = {  # row: what differs from the recipe
    "masked numbers": ["augmentation.mask=number"],
    "masked characters": ["augmentation.mask=character"],
    "no masking": ["augmentation.mask=none"],
    "with the state": [STATE],
    "with the state, relative": [STATE, "data.relative=[0,1,2]"],
}
ACTED = {"ensembling v1": "v1", "ensembling mean": "mean"}  # how the first row acts otherwise; rows act by the newest chunk
ACTING = ["--replan", 1, "--start", "above", "--max-steps", 50]  # as the demo does
TASKS = ["button-press-topdown-v3", "drawer-close-v3", "window-close-v3"]
console = Console()


def run(
    dataset: Annotated[Path, typer.Option()],
    out: Annotated[Path, typer.Option()],
    config: Annotated[Path, typer.Option()] = Path("configs/demo.yaml"),
    steps: Annotated[int, typer.Option(help="of training: fewer than the demo's, so that rows can differ")] = 600,
    seeds: Annotated[int, typer.Option()] = 3,
    episodes: Annotated[int, typer.Option(help="for each task and seed")] = 20,
) -> None:
    """Train and try what is missing, and print the table after each seed."""
    for seed in range(seeds):
        for row, overrides in TRAINED.items():
            folder = out / f"{row.replace(',', '').replace(' ', '-')}-{seed}"
            settings = [f"logging.output_dir={folder}", f"data.dataset={dataset}", f"logging.save_every_n_steps={steps}"]
            settings += [f"training.num_steps={steps}", f"training.seed={seed}"]
            vla0("train", "--config", config, *settings, *overrides)
            others = ACTED if row == next(iter(TRAINED)) else {}
            for name, ensemble in {row: "none", **others}.items():
                file = out / f"{name.replace(',', '').replace(' ', '-')}-{seed}-eval"
                tasks = [word for task in TASKS for word in ("--task", task)]
                words = [*tasks, "--episodes", episodes, *ACTING, "--ensemble", ensemble, "--out", file]
                vla0("eval", "--checkpoint", folder / "last", *words)
        console.print(table(out, seed + 1))


def vla0(*words: object) -> None:
    """Runs a `vla0` command; ends where it fails."""
    console.print(f"[bold]vla0 {' '.join(map(str, words))}[/bold]")
    code = subprocess.run(
        [sys.executable, "-m", "vla0.cli", *map(str, words)], env={**os.environ, "TQDM_DISABLE": "1"}
    ).returncode
    if code:
        sys.exit(code)


def table(out: Path, seeds: int) -> Table:
    """Success of each row by task, each seed's mean, and all episodes with their Wilson 95 % interval."""
    result = Table("row", *TASKS, "mean of each seed", "all", "95 %")
    for row in [*TRAINED, *ACTED]:
        runs = [
            summary(read_episodes(out / f"{row.replace(',', '').replace(' ', '-')}-{seed}-eval" / "episodes.jsonl"))
            for seed in range(seeds)
        ]
        rows = [run["policy"] for run in runs]
        solved = {task: (sum(r[task]["successes"] for r in rows), sum(r[task]["episodes"] for r in rows)) for task in TASKS}
        good, tried = (sum(pair[i] for pair in solved.values()) for i in (0, 1))
        low, high = wilson(good, tried)
        means = ", ".join(f"{mean_success(r):.0%}" for r in rows)
        result.add_row(
            row, *(f"{a} of {b}" for a, b in solved.values()), means, f"{good / tried:.1%}", f"{low:.0%} to {high:.0%}"
        )
    return result


if __name__ == "__main__":
    typer.run(run)
