"""One command, `vla0`, and its subcommands. What they need is imported when they run, so that `--help` is quick."""

import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from vla0.bench.commands import app as bench_app
from vla0.bench.commands import hush
from vla0.spec import MAIN, InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A vision-language model as a robot policy: it writes actions as text",
)
console = Console()


@app.command()
def collect(
    env: Annotated[str, typer.Argument(help="metaworld or libero")],
    out: Annotated[Path, typer.Option(help="new folder for the LeRobot dataset")],
    task: Annotated[list[str] | None, typer.Option(help="task to demonstrate; give it several times for several tasks")] = None,
    suite: Annotated[str | None, typer.Option(help="LIBERO: all tasks of spatial, object, goal, long or all four")] = None,
    episodes: Annotated[int, typer.Option(help="solved episodes for each task")] = 40,
    seed: Annotated[int | None, typer.Option(help="first seed of each task")] = None,
    image_size: Annotated[int | None, typer.Option(help="side of a picture, pixels; default 112, LIBERO 256")] = None,
    start: Annotated[str, typer.Option(help="Meta-World: where the hand starts: stock, its one place, or above")] = "stock",
    fps: Annotated[int, typer.Option(help="Meta-World: decisions a second; an action is repeated in between")] = 80,
    noise_share: Annotated[float | None, typer.Option(help="share of the steps whose action is disturbed")] = None,
    noise_scale: Annotated[float | None, typer.Option(help="standard deviation of the disturbance")] = None,
    quick: Annotated[bool, typer.Option(help="LIBERO: no shadows and reflections; faster on a CPU, other pictures")] = False,
    videos: Annotated[bool, typer.Option(help="store pictures as videos: smaller, slower to write")] = False,
    assets: Annotated[Path | None, typer.Option(help="LIBERO: folder of its meshes")] = None,
    workers: Annotated[int | None, typer.Option(help="processes; default one a core")] = None,
) -> None:
    """Let a scripted expert show a task, and store what it saw and did as a LeRobot dataset."""
    from vla0.collect import CollectConfig
    from vla0.collect import collect as run
    from vla0.envs import named

    quiet()
    tasks = named(env, task, suite, assets)
    found = run(
        CollectConfig(
            tasks, env, episodes, seed, image_size, start, fps, quick, noise_share, noise_scale, videos
        ), out, workers
    )  # fmt: skip
    for name, (solved, failed) in found.items():
        console.print(f"{name}: {solved} episodes, {failed} failures of the expert left out")
    console.print(f"dataset: {out}")


@app.command()
def inspect(
    words: Annotated[list[str] | None, typer.Argument(help="LeRobot dataset, default the recipe's; and key=value")] = None,
    config: Annotated[Path | None, typer.Option(help="recipe; default the published settings, all cameras, no state")] = None,
    out: Annotated[Path, typer.Option(help="page to write")] = Path("inspect.html"),
) -> None:
    """Look at a dataset before training on it: what is in it, what is lost in writing, what the model will see."""
    from vla0.inspect.examine import examine, recipe
    from vla0.inspect.page import facts, page, screen

    quiet()
    survey = examine(recipe(words or [], config))
    for name, text in facts(survey):
        console.print(f"[bold]{name}[/bold]  {text}", highlight=False)
    console.print(screen(survey))
    for text in survey.problems:
        console.print(f"[red]{text}[/red]")
    page(survey, out)
    console.print(f"page: {out}")


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="recipe, e.g. configs/demo.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="fields of the recipe, dots go deeper")
    ] = None,
) -> None:
    """Fine-tune a VLM on a LeRobot dataset. The same command again goes on where it stopped."""
    from vla0.recipe import TrainConfig, read_config
    from vla0.train import main
    from vla0.trial import measured

    quiet()
    recipe = read_config(TrainConfig, config, overrides or [])
    last = main(recipe, measured(recipe.simulator))
    console.print(f"checkpoint: {last}")


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str, typer.Option(help="checkpoint folder or Hub id")],
    embodiment: Annotated[str, typer.Option(help="of a checkpoint trained on a mixture: whose robot acts")] = MAIN,
    task: Annotated[list[str] | None, typer.Option(help="task to try; give it several times for several tasks")] = None,
    suite: Annotated[str | None, typer.Option(help="LIBERO: all tasks of spatial, object, goal, long or all four")] = None,
    env: Annotated[str, typer.Option(help="metaworld or libero")] = "metaworld",
    episodes: Annotated[int, typer.Option(help="episodes for each task, on unseen seeds")] = 20,
    out: Annotated[Path | None, typer.Option(help="folder of the results; default beside the checkpoint")] = None,
    replan: Annotated[int, typer.Option(help="steps executed per query")] = 1,
    ensemble: Annotated[str, typer.Option(help="none, mean, v1 or v2:w: weights of overlapping chunks by age")] = "v1",
    control: Annotated[list[str] | None, typer.Option(help="also: blank, exchanged, random or untrained")] = None,
    inexact: Annotated[list[str] | None, typer.Option(help="beside it: relaxed, fp8 or fp8-weights, faster decoding")] = None,
    workers: Annotated[int | None, typer.Option(help="environments at once; default 8 a core")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="steps after which an episode has failed; default 150, LIBERO's caps")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="side of a picture, pixels; default 112, LIBERO 256")] = None,
    start: Annotated[str, typer.Option(help="Meta-World: where the hand starts: stock, its one place, or above")] = "stock",
    quick: Annotated[bool, typer.Option(help="LIBERO: no shadows and reflections; faster on a CPU, other pictures")] = False,
    assets: Annotated[Path | None, typer.Option(help="LIBERO: folder of its meshes")] = None,
    device: Annotated[str | None, typer.Option(help="torch device; default the GPU where there is one")] = None,
    render: Annotated[bool, typer.Option(help="film every step, not only those that the policy looks at")] = False,
    ray: Annotated[str | None, typer.Option(help="spread over a Ray cluster: its address, or local to start one here")] = None,
    ablation: Annotated[bool, typer.Option(help="the published rows: ensembling on and off, steps executed per query")] = False,
    separate: Annotated[str | None, typer.Option(help="a checkpoint trained with tile: false, for the ablation")] = None,
) -> None:
    """Try a checkpoint in a simulator: a table, videos and a report. The same command again goes on where it stopped."""
    from vla0.envs import named
    from vla0.evaluate import EvalConfig
    from vla0.table import ablation_table, table
    from vla0.trial import ablation as run_ablation
    from vla0.trial import trial

    settings = EvalConfig(
        named(env, task, suite, assets), env, episodes, None, replan, ensemble, max_steps, image_size, start, quick=quick
    )
    quiet()
    if out is None:
        beside = Path(checkpoint).resolve() if Path(checkpoint).is_dir() else Path("runs") / checkpoint.replace("/", "_")
        out = beside.with_name(f"{beside.name}-{'ablation' if ablation else 'eval'}")
    others = {
        "embodiment": embodiment,
        "control": control or [],
        "inexact": inexact or [],
        "workers": workers,
        "device": device,
        "render": render,
        "ray": ray,
    }
    if ablation:
        console.print(ablation_table(run_ablation(checkpoint, separate, settings, out, **others)))
        console.print(f"reports: {out}/*/report.html")
    else:
        console.print(table(trial(checkpoint, settings, out, **others)))
        console.print(f"report: {out / 'report.html'}")


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="libero-assets, libero, libero-images, or a LeRobot dataset owner/name")],
    out: Annotated[Path | None, typer.Option(help="folder; default data/NAME, for the meshes where LIBERO looks")] = None,
) -> None:
    """Fetch LIBERO's meshes or a public LeRobot dataset from the Hub."""
    from vla0.download import download as run

    console.print(f"in {run(name, out)}")


@app.command()
def convert(
    run: Annotated[Path, typer.Argument(help="run folder of the official VLA-0 code")],
    out: Annotated[Path, typer.Argument(help="new checkpoint folder")],
    vision_id: Annotated[bool, typer.Option(help='"Picture 1: " before an image; the released weights know none')] = False,
    crop: Annotated[float | None, typer.Option(help="where the run's config.yaml does not say, e.g. 0.875")] = None,
) -> None:
    """Turn a run folder of the official VLA-0 code into a checkpoint; the weights are not touched."""
    from vla0.convert import convert as run_convert

    quiet()
    spec = run_convert(run, out, vision_id, crop)
    console.print(f"checkpoint: {out}, {spec.horizon} steps of {spec.dimensions} numbers in 0..{spec.bins}")


app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench() -> None:
    """Measure on this machine."""
    quiet()


@app.command()
def doctor(
    job: Annotated[str | None, typer.Option("--for", help="what is to run here: train, eval or serve")] = None,
) -> None:
    """Say what works on this machine, and the remedy for what does not. Exit code 1 where the job cannot run."""
    from vla0.doctor import JOBS, examine, screen

    if job is not None and job not in JOBS:
        raise InputError(f"--for with one of {JOBS}", f"'{job}'", "choose one of those")
    found = examine()
    console.print(screen(found))
    hindered = [line.name for line in found if not line.fine and job in line.jobs]
    if hindered:
        console.print(f"[red]{job} cannot run here: {', '.join(hindered)}[/red]")
        raise typer.Exit(1)


def quiet() -> None:
    """No progress bars of other libraries for what takes a moment; the Trainer's own stays."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if importlib.util.find_spec("datasets"):
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()


def command(*words: str) -> None:
    """The entry point, `words` before those of the command line: bad input is one line and exit code 2.

    VLA0_DEBUG=1 shows where it came from.
    """
    debug = bool(os.environ.get("VLA0_DEBUG"))
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", handlers=[handler])
    hush()
    logging.getLogger("vla0").setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        app([*words, *sys.argv[1:]])
    except InputError as error:
        if debug:
            raise
        print(f"vla0: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("vla0: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)


def main() -> None:
    """`vla0`."""
    command()


if __name__ == "__main__":
    main()
