"""One command, `vla0`, and its subcommands. What they need is imported when they run, so that `--help` is quick."""

import dataclasses
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from vla0.spec import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A vision-language model as a robot policy: it writes actions as text",
)
console = Console()

CONTROLS = ("blank", "random", "untrained")


@app.command()
def collect(
    env: Annotated[str, typer.Argument(help="metaworld")],
    task: Annotated[list[str], typer.Option(help="task to demonstrate; give it several times for several tasks")],
    out: Annotated[Path, typer.Option(help="new folder for the LeRobot dataset")],
    episodes: Annotated[int, typer.Option(help="solved episodes for each task")] = 40,
    seed: Annotated[int, typer.Option(help="first seed of each task")] = 0,
    image_size: Annotated[int, typer.Option(help="side of the camera's picture, pixels")] = 112,
    start: Annotated[str, typer.Option(help="where the hand starts: stock, Meta-World's one place, or above")] = "stock",
    fps: Annotated[int, typer.Option(help="decisions a second; an action is repeated in between")] = 80,
    noise_share: Annotated[float, typer.Option(help="share of the steps whose action is disturbed")] = 0.3,
    noise_scale: Annotated[float, typer.Option(help="standard deviation of the disturbance")] = 0.3,
    workers: Annotated[int | None, typer.Option(help="processes; default one a core")] = None,
) -> None:
    """Let a scripted expert show a task, and store what it saw and did as a LeRobot dataset."""
    if env != "metaworld":
        raise InputError("env: metaworld", f"'{env}'", "it is the one simulator with an expert here")
    from vla0.collect import collect as run

    quiet()
    failures = run(task, episodes, out, seed, image_size, start, fps, noise_share, noise_scale, workers)
    for name, count in failures.items():
        console.print(f"{name}: {episodes} episodes, {count} failures of the expert left out")
    console.print(f"dataset: {out}")


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="recipe, e.g. configs/demo.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="fields of the recipe, dots go deeper")
    ] = None,
) -> None:
    """Fine-tune a VLM on a LeRobot dataset. The same command again goes on where it stopped."""
    from vla0.recipe import read_config
    from vla0.train import TrainConfig, main

    quiet()
    recipe = read_config(TrainConfig, config, overrides or [])
    last = main(recipe, measured(recipe.simulator))
    console.print(f"checkpoint: {last}")


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str, typer.Option(help="checkpoint folder or Hub id")],
    task: Annotated[list[str], typer.Option(help="task to try; give it several times for several tasks")],
    env: Annotated[str, typer.Option(help="metaworld")] = "metaworld",
    episodes: Annotated[int, typer.Option(help="episodes for each task, on unseen seeds")] = 20,
    out: Annotated[Path | None, typer.Option(help="folder of the results; default beside the checkpoint")] = None,
    replan: Annotated[int, typer.Option(help="steps executed per query")] = 1,
    ensemble: Annotated[str, typer.Option(help="none, mean, v1 or v2:w: weights of overlapping chunks by age")] = "v1",
    control: Annotated[list[str] | None, typer.Option(help=f"also evaluate a control: {', '.join(CONTROLS)}")] = None,
    workers: Annotated[int | None, typer.Option(help="environments at once; default 8 a core")] = None,
    max_steps: Annotated[int, typer.Option(help="steps after which an episode has failed")] = 150,
    image_size: Annotated[int, typer.Option(help="side of the camera's picture, pixels")] = 112,
    start: Annotated[str, typer.Option(help="where the hand starts: stock, Meta-World's one place, or above")] = "stock",
    device: Annotated[str | None, typer.Option(help="torch device; default the GPU where there is one")] = None,
) -> None:
    """Try a checkpoint in a simulator: a table, videos and a report. The same command again goes on where it stopped."""
    from vla0.evaluate import EvalConfig, table
    from vla0.evaluate import evaluate as run
    from vla0.policy import VLA0
    from vla0.report import write_report

    settings = EvalConfig(
        tuple(task), env, episodes, replan=replan, ensemble=ensemble, max_steps=max_steps, image_size=image_size, start=start
    )
    quiet()
    policy = VLA0.from_pretrained(checkpoint, device)
    settings = dataclasses.replace(settings, fps=policy.spec.fps)
    if out is None:
        beside = Path(checkpoint).resolve() if Path(checkpoint).is_dir() else Path("runs") / checkpoint.replace("/", "_")
        out = beside.with_name(f"{beside.name}-eval")
    lines = run(controls(policy, control or []), policy.spec.horizon, settings, out, workers)
    console.print(table(lines))
    console.print(f"report: {write_report(out, f'{checkpoint} on {env}')}")
    unfinished = len(task) * episodes * (1 + len(control or [])) - sum(line["error"] is None for line in lines)
    if unfinished > 0:
        raise InputError("every episode to end", f"{unfinished} given up after crashes", f"see the error lines in '{out}'")


def quiet() -> None:
    """No progress bars of other libraries for what takes a moment; the Trainer's own stays."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if importlib.util.find_spec("datasets"):
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()


def controls(policy, names: list[str]) -> dict:
    """{name: predict} of the policy and the controls asked for."""
    from vla0.evaluate import blanked, random_actions
    from vla0.model import untrained
    from vla0.policy import VLA0

    result = {"policy": policy.predict_batch}
    for name in names:
        if name == "blank":
            result[name] = blanked(policy.predict_batch)
        elif name == "random":
            result[name] = random_actions(policy.spec.low, policy.spec.high, policy.spec.horizon)
        elif name == "untrained":
            result[name] = VLA0(untrained(policy.model), policy.processor, policy.spec).predict_batch
        else:
            raise InputError(f"a control of {CONTROLS}", f"'{name}'", "choose one of those")
    return result


def measured(simulator):
    """What a recipe's `simulator` asks to be measured at each save; None where it asks nothing."""
    if simulator is None:
        return None
    from vla0.evaluate import EvalConfig, mean_success, summary
    from vla0.evaluate import evaluate as run
    from vla0.recipe import build

    settings = build(EvalConfig, simulator, "simulator")

    def measure(policy, out):
        own = dataclasses.replace(settings, fps=policy.spec.fps)
        lines = run({"policy": policy.predict_batch}, policy.spec.horizon, own, out)
        return {"success": mean_success(summary(lines)["policy"])}

    return measure


def main() -> None:
    """The entry point: bad input is one line and exit code 2; VLA0_DEBUG=1 shows where it came from."""
    debug = bool(os.environ.get("VLA0_DEBUG"))
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("vla0").setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        app()
    except InputError as error:
        if debug:
            raise
        print(f"vla0: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("vla0: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
