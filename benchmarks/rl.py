"""What learning from success adds, and what as many minutes more of training would have added.

python benchmarks/rl.py --dataset runs/demo/dataset --out runs/rl_demo

For each seed: the demo's config stopped early (`start`), reinforcement learning from there for some
minutes (`rl`), and training from there on the demonstrations for as many minutes (`control`). All
are tried on the same unseen seeds, and the result also with its pictures blanked. Each step is a
`vla0` command, which is printed; the same command again goes on where it stopped.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from ablation import Dataset, Episodes, Out, Seeds, console, table, vla0

from vla0.files import write_whole

TASKS = ["button-press-topdown-v3", "drawer-close-v3", "window-close-v3"]
# As configs/rl_demo.yaml acts.
ACTING = ["--n-action-steps", 2, "--ensemble", "none", "--option", "start=above"]
ROWS = ("start", "rl", "control")


def run(
    dataset: Dataset,
    out: Out,
    steps: Annotated[int, typer.Option(help="of the training that is stopped early")] = 600,
    minutes: Annotated[float, typer.Option(help="of reinforcement learning, and of control")] = 30,
    seed: Seeds = None,
    episodes: Episodes = 40,
    task: Annotated[
        list[str] | None, typer.Option(help="of the dataset; the demo's where none is named")
    ] = None,
    max_steps: Annotated[int, typer.Option(help="of an episode")] = 50,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of configs/rl_demo.yaml")
    ] = None,
) -> None:
    """Train, learn and try what is missing, and print the table after each seed."""
    tasks = task or TASKS
    acting = [*ACTING, "--max-steps", max_steps]
    acting += [word for name in tasks for word in ("--task", name)]
    acting += ["--episodes", episodes]
    for own in seed or [0, 1, 2]:
        start, learned, control = (out / f"{row}-{own}" for row in ROWS)
        begun = [f"training.seed={own}", f"model.tiny.seed={own}"]
        took = trained(dataset, start, steps, begun, out)
        tried(out, "start", own, start / "last", acting)
        settings = [f"checkpoint={start / 'last'}", f"logging.output_dir={learned}"]
        settings += [f"seed={own}", f"max_minutes={minutes}"]
        settings += [f"simulator.tasks=[{','.join(tasks)}]", f"simulator.max_steps={max_steps}"]
        settings += set_ or ()
        vla0("rl", "--config", "configs/rl_demo.yaml", *settings)
        tried(out, "rl", own, learned / "best", acting, blank=True)
        more = round(60 * minutes * steps / took)
        anew = [f"model.name={start / 'last'}", f"training.seed={100 + own}"]
        trained(dataset, control, more, anew, out)
        tried(out, "control", own, control / "last", acting)
        console.print(table(out, list(ROWS)))


def tried(
    out: Path, row: str, seed: int, checkpoint: Path, acting: list[Any], blank: bool = False
) -> None:
    """Try a checkpoint on unseen seeds, and with its pictures blanked where that is asked."""
    words: list[Any] = ["--checkpoint", checkpoint, *acting]
    words += ["--baseline", "blank"] if blank else []
    vla0("eval", *words, "--out", out / f"{row}-{seed}-eval")


def trained(dataset: Path, folder: Path, steps: int, settings: list[str], out: Path) -> float:
    """Train the demo's config, unless that is done, and return the seconds that it took."""
    note = out / f"{folder.name}.json"
    if not note.exists():
        # What is left of a training that was interrupted does not tell how long it took.
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        words = [f"data.dataset={dataset}", f"logging.output_dir={folder}", *settings]
        words += [f"{key}={steps}" for key in ("training.num_steps", "logging.save_every_n_steps")]
        vla0("train", "--config", "configs/demo.yaml", *words)
        seconds = time.monotonic() - started
        write_whole(note, json.dumps({"train_s": round(seconds, 1), "steps": steps}) + "\n")
    return json.loads(note.read_text())["train_s"]


if __name__ == "__main__":
    typer.run(run)
