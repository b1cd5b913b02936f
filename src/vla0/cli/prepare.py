"""The subcommands for data, checkpoints and this machine."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vla0.cli.screen import app, console, options_given, say
from vla0.errors import InputError, refuse_idle
from vla0.quiet import quiet


@app.command()
def collect(
    env: Annotated[str, typer.Argument(help="metaworld, libero or arm")],
    out: Annotated[Path, typer.Option(help="new folder for the LeRobot dataset")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="task to demonstrate; give it several times for several tasks"),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="LIBERO: all tasks of spatial, object, goal, long or all four"),
    ] = None,
    episodes: Annotated[int, typer.Option(help="solved episodes for each task")] = 40,
    seed: Annotated[int | None, typer.Option(help="first seed of each task")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="side of a picture, pixels; default 112, LIBERO 256")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE of this simulator alone: Meta-World start=above, LIBERO quick=true"
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Meta-World: decisions a second, default 80; an action is repeated in between"
        ),
    ] = None,
    noise_share: Annotated[
        float | None, typer.Option(help="share of the steps whose action is disturbed")
    ] = None,
    noise_scale: Annotated[
        float | None, typer.Option(help="standard deviation of the disturbance")
    ] = None,
    videos: Annotated[
        bool, typer.Option(help="store pictures as videos: smaller, slower to write")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="processes; default one a core")] = None,
) -> None:
    """Let a scripted expert show a task, and store what it saw and did as a LeRobot dataset."""
    from vla0.sim.simulator import tasks_of

    tasks = tasks_of(env, task or [], suite)
    from vla0.sim.collect import CollectConfig
    from vla0.sim.collect import collect as run

    quiet()
    counts = run(
        CollectConfig(
            tasks=tasks,
            env=env,
            episodes=episodes,
            seed=seed,
            image_size=image_size,
            options=options_given(option),
            fps=fps,
            noise_share=noise_share,
            noise_scale=noise_scale,
            videos=videos,
        ),
        out,
        workers,
    )
    for name, (solved, failed) in counts.items():
        say(f"{name}: {solved} episodes, {failed} failures of the expert left out")
    say(f"dataset: {out}")


@app.command()
def inspect(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="LeRobot dataset, default the config's; and key=value"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="config; default the published settings, all cameras, no state"),
    ] = None,
    out: Annotated[Path, typer.Option(help="page to write")] = Path("inspect.html"),
    write_config: Annotated[
        Path | None, typer.Option(help="new config of this dataset to write, as configs/own.yaml")
    ] = None,
) -> None:
    """Look at a dataset before training on it.

    The page shows what is in it, what is lost in writing, and what the model will see.
    """
    from vla0.inspect.own import config_to_inspect, write_own_config

    if write_config is not None:
        if config is not None:
            raise InputError("--config or --write-config", "both", "leave one out")
        write_own_config(words or [], write_config)
        say(
            f"config: {write_config}, for vla0 train --config {write_config} "
            f"logging.output_dir=runs/mine"
        )
        config = write_config
    settings = config_to_inspect(words or [], config)
    # These imports take long, so they come after the config has been read.
    from vla0.inspect.examine import examine
    from vla0.inspect.page import facts, page, survey_table

    quiet()
    survey = examine(settings, config)
    for name, text in facts(survey):
        console.print(f"[bold]{name}[/bold]  {escape(text)}", highlight=False)
    console.print(survey_table(survey))
    for text in survey.problems:
        console.print(f"[red]{escape(text)}[/red]")
    page(survey, out)
    say(f"page: {out}")


@app.command()
def download(
    name: Annotated[
        str,
        typer.Argument(help="libero, libero-images, or a LeRobot dataset owner/name"),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="folder; default data/NAME"),
    ] = None,
) -> None:
    """Fetch a public LeRobot dataset from the Hub."""
    from vla0.checkpoint.hub import download as run

    say(f"in {run(name, out)}")


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder, e.g. runs/mine/best")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub")],
    private: Annotated[bool, typer.Option(help="a new model is seen by its owner alone")] = False,
) -> None:
    """Upload a checkpoint to the Hub, with its model card.

    VLA0.from_pretrained("owner/name") then loads it.
    """
    from vla0.checkpoint.hub import push as run

    quiet()
    say(run(checkpoint, repo, private))


@app.command()
def convert(
    run: Annotated[
        Path,
        typer.Argument(
            help="run of the official VLA-0 code (folder or Hub id), or adapters of lerobot-train "
            "--peft"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="new checkpoint folder")],
    vision_id: Annotated[
        bool, typer.Option(help='"Picture 1: " before an image; the released weights know none')
    ] = False,
    crop: Annotated[
        float | None, typer.Option(help="where the run's config.yaml does not say, e.g. 0.875")
    ] = None,
) -> None:
    """Turn a run folder of the official VLA-0 code into a checkpoint, or merge LeRobot's adapters.

    The weights of an official run stay as they are.
    """
    quiet()
    if (run / "adapter_config.json").is_file():
        try:
            from lerobot_policy_vla0.merging import merge
        except ImportError as error:
            raise InputError(
                "the LeRobot plugin", str(error), "install packages/lerobot_policy_vla0"
            ) from None
        refuse_idle({"--vision-id": vision_id, "--crop": crop}, "a run of the official code")
        spec = merge(run, out)
    else:
        from vla0.checkpoint.convert import convert as run_convert

        spec = run_convert(run, out, vision_id, crop)
    say(
        f"checkpoint: {out}, {spec.chunk_size} steps of {spec.dimensions} numbers in 0..{spec.bins}"
    )


@app.command()
def doctor(
    job: Annotated[
        str | None, typer.Option("--for", help="what is to run here: train, eval or serve")
    ] = None,
) -> None:
    """Say what works on this machine, and the remedy for what does not.

    The exit code is 1 when the job cannot run.
    """
    from vla0.doctor import JOBS, diagnose, findings_table

    if job is not None and job not in JOBS:
        raise InputError(f"--for with one of {JOBS}", f"'{job}'", "choose one of those")
    findings = diagnose()
    console.print(findings_table(findings))
    hindered = [line.name for line in findings if not line.fine and job in line.jobs]
    if hindered:
        console.print(f"[red]{job} cannot run here: {', '.join(hindered)}[/red]")
        raise typer.Exit(1)
