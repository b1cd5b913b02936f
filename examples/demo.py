"""The whole of VLA-0 on a laptop: collect → train → evaluate, then results.json, plot.png and
report.html.

Each stage is a `vla0` command that you could type yourself; it is printed before it runs. Run again
after an interruption: finished stages are kept.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vla0.checkpoint.tiny import FAMILY, TINY, family_of
from vla0.checkpoint.tiny_families import FAMILIES
from vla0.errors import InputError
from vla0.sim.results import mean_success, read_episodes, summary, table
from vla0.train.plots import plain_log

TASKS = ("button-press-topdown-v3", "drawer-close-v3", "window-close-v3")
START = ("--option", "start=above")  # of the hand: from there no task is solved without looking
FPS = 40  # decisions a second, half of Meta-World's own: half the pictures to draw
STEPS = 50  # 1.25 s; the expert needs up to 46
BASELINES = ("blank", "untrained", "random")
PACKAGES = ("torch", "transformers", "lerobot", "metaworld", "mujoco", "numpy")
ENDING_S = 10.0  # that an interrupted command may take to end
console = Console()


def run(
    out: Annotated[Path, typer.Option(help="folder of the demo")] = Path("runs/demo"),
    config: Annotated[Path, typer.Option(help="config")] = Path("configs/demo.yaml"),
    task: Annotated[list[str], typer.Option(help="Meta-World task")] = list(TASKS),  # noqa: B006
    demonstrations: Annotated[int, typer.Option(help="for each task")] = 80,
    episodes: Annotated[int, typer.Option(help="for each task and baseline, on unseen seeds")] = 20,
    steps: Annotated[int | None, typer.Option(help="of training; default the config's")] = None,
    backbone: Annotated[str, typer.Option(help="family of the tiny model")] = FAMILY,
    dataset: Annotated[
        Path | None, typer.Option(help="demonstrations; default in the demo's folder")
    ] = None,
    install_s: Annotated[
        float, typer.Option(help="seconds the installation took, for the record")
    ] = 0.0,
) -> None:
    """Run the demo, or what is missing of it."""
    try:
        settings = family_settings(backbone)
        stages(
            out, config, task, demonstrations, episodes, steps, settings,
            dataset or out / "dataset", install_s,
        )  # fmt: skip
    except InputError as error:
        console.print(f"demo: {error}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted: run again to go on")
        sys.exit(130)


def stages(
    out: Path,
    config: Path,
    task: list[str],
    demonstrations: int,
    episodes: int,
    steps: int | None,
    family: list[str],
    dataset: Path,
    install_s: float,
) -> None:
    """One after another; a stage that is done is not done again.

    Raises KeyboardInterrupt where one was interrupted.
    """
    out.mkdir(parents=True, exist_ok=True)
    seconds = Seconds(out / "seconds.json")
    seconds.add("install", install_s)
    tasks = [word for name in task for word in ("--task", name)]
    if not dataset.exists():
        command = [
            "collect",
            "metaworld",
            *tasks,
            "--episodes",
            demonstrations,
            *START,
            "--fps",
            FPS,
            "--out",
            dataset,
        ]
        seconds.time("collect", command)
    overrides = [f"logging.output_dir={out / 'train'}", f"data.dataset={dataset}", *family]
    overrides += [f"training.num_steps={steps}"] if steps else []
    seconds.time("train", ["train", "--config", config, *overrides])
    baselines = [word for name in BASELINES for word in ("--baseline", name)]
    acting = [*START, "--n-action-steps", 1, "--ensemble", "none", "--max-steps", STEPS]
    command = [
        "eval",
        "--checkpoint",
        out / "train" / "last",
        *tasks,
        "--episodes",
        episodes,
        *acting,
        *baselines,
    ]
    seconds.time("evaluate", [*command, "--out", out / "eval"])
    lines = read_episodes(out / "eval" / "episodes.jsonl")
    found = results(lines, seconds.all)
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plot(found, out / "train", out / "plot.png")
    console.print(table(lines))
    minutes = sum(seconds.all.values()) / 60
    console.print(
        f"{minutes:.1f} minutes in all. See {out}/results.json, {out}/plot.png and "
        f"{out}/eval/report.html"
    )


def family_settings(name: str) -> list[str]:
    """What the config takes of a family: the model, and pictures of which each has 16 tokens."""
    if name == FAMILY:
        return []
    family = FAMILIES[family_of(f"{TINY}:{name}") or FAMILY]
    return [f"model.name={TINY}:{name}", f"spec.image_size={family.side}"]


class Seconds:
    """How long each stage took, over all runs of the demo in one folder."""

    def __init__(self, file: Path):
        self.file = file
        self.all: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    def add(self, stage: str, seconds: float) -> None:
        """Adds to a stage's time and writes it down."""
        self.all[stage] = round(self.all.get(stage, 0.0) + seconds, 1)
        self.file.write_text(json.dumps(self.all))

    def time(self, stage: str, words: list) -> None:
        """Runs a `vla0` command and adds its time; ends the demo where it fails."""
        console.print(f"[bold]vla0 {' '.join(map(str, words))}[/bold]")
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "vla0", *map(str, words)])
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # a terminal's Ctrl-C reaches the command too, and it puts away what it has
            try:
                process.wait(ENDING_S)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
            raise
        finally:
            self.add(stage, time.monotonic() - started)
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if code:
            sys.exit(code)


def results(lines: list[dict], seconds: dict[str, float]) -> dict:
    """What results.json holds."""
    rows = summary(lines)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "mean_success": {policy: round(mean_success(own), 4) for policy, own in rows.items()},
        "tasks": rows,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "commit": commit or "unknown",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "system": platform.system(),
        },
    }


def plot(found: dict, training: Path, file: Path) -> None:
    """The loss over training, and success by task for the policy and each baseline with 95 %
    intervals.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    states = sorted(
        (training / "state").glob("checkpoint-*/trainer_state.json"),
        key=lambda f: f.stat().st_mtime,
    )
    history = [e for e in json.loads(states[-1].read_text())["log_history"] if "loss" in e]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), width_ratios=(1, 1.6), layout="constrained"
    )
    left.plot([e["step"] for e in history], [e["loss"] for e in history], color="#3b6fd4")
    left.set(
        xlabel="training step",
        ylabel="loss per token",
        title="A tiny vision-language model learns to write actions",
    )
    plain_log(left)
    colours = {"policy": "#3b6fd4", "blank": "#9aa5b8", "untrained": "#c4cad6", "random": "#dfe3ea"}
    names = {
        "policy": "trained",
        "blank": "trained, image blanked",
        "untrained": "untrained",
        "random": "random actions",
    }
    first = next(iter(found["tasks"].values()))
    for i, (policy, rows) in enumerate(found["tasks"].items()):
        x = [j + (i - 1.5) * 0.2 for j in range(len(rows))]
        rates = [row["successes"] / max(row["episodes"], 1) for row in rows.values()]
        error = [
            [r - row["low"] for r, row in zip(rates, rows.values(), strict=True)],
            [row["high"] - r for r, row in zip(rates, rows.values(), strict=True)],
        ]
        right.bar(
            x,
            rates,
            0.19,
            yerr=error,
            color=colours[policy],
            label=names[policy],
            error_kw={"lw": 0.8, "ecolor": "#5b6472"},
        )
        for place, row in zip(x, rows.values(), strict=True):
            if not row["successes"]:  # a bar that one does not see
                right.text(
                    place,
                    row["high"] + 0.01,
                    f"0/{row['episodes']}",
                    ha="center",
                    fontsize=7,
                    color="#5b6472",
                )
    right.set_xticks(range(len(first)), [name.removesuffix("-v3") for name in first])
    right.set(ylim=(0, 1.05), ylabel="success", title="Meta-World, unseen seeds, 95 % intervals")
    right.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    typer.run(run)
