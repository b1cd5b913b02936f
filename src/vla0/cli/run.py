"""The subcommands that train and evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from vla0.cli.screen import app, console, options_given, pairs_of, say
from vla0.core.spec import MAIN, Spec
from vla0.errors import InputError, given, refuse_idle
from vla0.quiet import quiet


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="config, e.g. configs/demo.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="fields of the train_config, dots go deeper"),
    ] = None,
) -> None:
    """Fine-tune a VLM on a LeRobot dataset. The same command again continues where it stopped."""
    from vla0.data.storage import refuse_missing
    from vla0.sim.evaluate import EvalConfig
    from vla0.train.config import TrainConfig, build, read_config

    train_config = read_config(TrainConfig, config, overrides or [])
    for dataset in train_config.data.all().values():
        refuse_missing(dataset.dataset)
    if train_config.simulator is not None:
        build(EvalConfig, train_config.simulator, "simulator")
    # These imports take long, so they come after the checks of the config.
    from vla0.sim.experiment import measured
    from vla0.train.run import main

    quiet()
    last = main(train_config, measured(train_config.simulator))
    say(f"checkpoint: {last}")


@app.command()
def rl(
    config: Annotated[Path, typer.Option(help="config, e.g. configs/rl_demo.yaml")],
    offline: Annotated[
        str | None,
        typer.Option(help="learn one round from this dataset of judged episodes, and play none"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="fields of the config, dots go deeper"),
    ] = None,
) -> None:
    """Go on from a checkpoint by its success in a simulator (reinforcement learning, GRPO).

    The same command again continues where it stopped.
    """
    if offline is not None:
        _offline(config, [*(overrides or []), f"data.dataset={offline}"])
        return
    from vla0.checkpoint.location import locate
    from vla0.rl.config import RLConfig
    from vla0.sim.evaluate import EvalConfig
    from vla0.sim.simulator import tasks_of
    from vla0.train.config import build, read_yaml

    rl_config = build(RLConfig, read_yaml(config, overrides or []), str(config))
    settings = build(EvalConfig, rl_config.simulator, "simulator")
    tasks_of(settings.env, settings.tasks, None)
    Spec.load(locate(rl_config.checkpoint, weights=False))
    # This import takes long, so it comes after the checks of the config.
    from vla0.rl.run import main

    quiet()
    last = main(rl_config)
    say(f"checkpoint: {last}")
    say(f"report: {last.parent / 'report.html'}")


def _offline(config: Path, overrides: list[str]) -> None:
    """Learn from a dataset of judged episodes."""
    from vla0.checkpoint.location import locate
    from vla0.data.storage import refuse_missing
    from vla0.rl.config import OfflineConfig
    from vla0.train.config import build, read_yaml

    rl_config = build(OfflineConfig, read_yaml(config, overrides), str(config))
    refuse_missing(rl_config.data.dataset)
    Spec.load(locate(rl_config.checkpoint, weights=False))
    # This import takes long, so it comes after the checks of the config.
    from vla0.rl.offline import offline

    quiet()
    last = offline(rl_config)
    say(f"checkpoint: {last}")


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str | None, typer.Option(help="checkpoint folder or Hub id")] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="another's in its place: lerobot:DIR_OR_ID, or ws://HOST:PORT of openpi's protocol"
        ),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option(
            help="CAMERA=PICTURE, or state=NAME, of --policy, where it has names of its own"
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file of the key of --policy's server")
    ] = None,
    embodiment: Annotated[
        str, typer.Option(help="of a checkpoint trained on a mixture: whose robot acts")
    ] = MAIN,
    task: Annotated[
        list[str] | None, typer.Option(help="task to try; give it several times for several tasks")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="LIBERO: all tasks of spatial, object, goal, long or all four"),
    ] = None,
    env: Annotated[str, typer.Option(help="metaworld, libero or arm")] = "metaworld",
    episodes: Annotated[int, typer.Option(help="episodes for each task, on unseen seeds")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="folder of the results; default beside the checkpoint")
    ] = None,
    n_action_steps: Annotated[
        int | None, typer.Option(help="steps executed per query; default 1")
    ] = None,
    ensemble: Annotated[
        str | None,
        typer.Option(
            help="none, mean, v1 or v2:w: weights of overlapping chunks by age; default v1"
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="also: blank, swapped, random or untrained")
    ] = None,
    approximate: Annotated[
        list[str] | None,
        typer.Option(help="beside it: relaxed, int8 or nf4, faster or smaller"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="environments at once; default 8 a core")
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(help="steps after which an episode has failed; default 150, LIBERO's caps"),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="side of a picture, pixels; default 112, LIBERO 256")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE of this simulator alone: Meta-World start=above, LIBERO quick=true"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="torch device; default the GPU where there is one")
    ] = None,
    render: Annotated[
        bool, typer.Option(help="film every step, not only those that the policy looks at")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="spread over a Ray cluster: its address, or local to start one here"),
    ] = None,
    ablation: Annotated[
        bool,
        typer.Option(help="the published rows: ensembling on and off, steps executed per query"),
    ] = False,
    separate: Annotated[
        str | None, typer.Option(help="a checkpoint trained with tile: false, for the ablation")
    ] = None,
) -> None:
    """Try a policy in a simulator: a table, videos and a report.

    The same command again continues where it stopped.
    """
    from vla0.checkpoint.location import locate
    from vla0.sim.evaluate import EvalConfig
    from vla0.sim.report import refuse_unknown_baselines
    from vla0.sim.results import ablation_table, table
    from vla0.sim.simulator import tasks_of

    if (checkpoint is None) == (policy is None):
        got = "none" if checkpoint is None else "both"
        raise InputError("--checkpoint, or --policy for another's", got, "give one of them")
    if policy is None:
        refuse_idle({"--key": key, "--api-key-file": api_key_file}, "--policy")
    else:
        embodied = None if embodiment == MAIN else embodiment
        others = {"--approximate": approximate, "--ray": ray, "--ablation": ablation}
        others |= {"--embodiment": embodied}
        refuse_idle(others, "--checkpoint")
    if ablation:
        refuse_idle(
            {"--n-action-steps": n_action_steps, "--ensemble": ensemble},
            "no --ablation, whose rows have their own,",
        )
    else:
        refuse_idle({"--separate": separate}, "--ablation")
    settings = EvalConfig(
        tasks=tasks_of(env, task or [], suite),
        env=env,
        episodes=episodes,
        max_steps=max_steps,
        image_size=image_size,
        options=options_given(option),
        **given(n_action_steps=n_action_steps, ensemble=ensemble),
    )
    refuse_unknown_baselines(baseline or [])
    if policy is not None:
        from vla0.serve.client import NoAnswerError
        from vla0.serve.evaluated import served
        from vla0.serve.listen import secret_of
        from vla0.sim import foreign
        from vla0.sim.simulator import simulator

        quiet()
        free = {"n_action_steps": n_action_steps, "ensemble": ensemble, "image_size": image_size}
        own = [name for name, value in free.items() if value is None]
        target, names = simulator(env), pairs_of("--key", key or [])
        if policy.startswith(("ws://", "wss://")):
            refuse_idle({"--device": device}, "a policy that runs here")
            try:
                sentence = target.instruction(settings.tasks[0])
                secret = secret_of(api_key_file)
                other = served(policy, target, names, sentence, key=secret)
            except NoAnswerError as error:
                raise InputError(f"an answer of {policy}", str(error), "see its log") from None
        else:
            refuse_idle({"--api-key-file": api_key_file}, "--policy ws://HOST:PORT")
            other = foreign.load(policy, target, names, device)
        place = policy.partition(":")[2].strip("/").replace(":", "-")
        out = out or Path("runs") / f"{'_'.join(Path(place).parts[-3:])}-eval"
        lines = foreign.trial(other, policy, settings, out, own, baseline or [], workers, render)
        console.print(table(lines))
        say(f"report: {out / 'report.html'}")
        return
    assert checkpoint is not None
    Spec.load(locate(checkpoint, weights=False), embodiment)
    # These imports take long, so they come after the checks of the options.
    from vla0.sim.experiment import ablation as run_ablation
    from vla0.sim.experiment import trial

    quiet()
    if out is None:
        beside = (
            Path(checkpoint).resolve()
            if Path(checkpoint).is_dir()
            else Path("runs") / checkpoint.replace("/", "_")
        )
        out = beside.with_name(f"{beside.name}-{'ablation' if ablation else 'eval'}")
    others = {
        "embodiment": embodiment,
        "baseline": baseline or [],
        "approximate": approximate or [],
        "workers": workers,
        "device": device,
        "render": render,
        "ray": ray,
    }
    if ablation:
        console.print(ablation_table(run_ablation(checkpoint, separate, settings, out, **others)))
        say(f"reports: {out}/*/report.html")
    else:
        console.print(table(trial(checkpoint, settings, out, **others)))
        say(f"report: {out / 'report.html'}")


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(help="without it: what there is")] = None,
    model: Annotated[
        str | None, typer.Option(help="the checkpoint, where it is here: a folder, or another id")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="of the figures, e.g. libero_goal; default all")
    ] = None,
    episodes: Annotated[
        int | None, typer.Option(help="episodes for each task; default as published")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the results; default runs/reproduce/NAME")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="environments at once; default 8 a core")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="torch device; default the GPU where there is one")
    ] = None,
) -> None:
    """Evaluate a published checkpoint by its protocol, and say whether the figure holds.

    The same command again continues where it stopped.
    """
    from vla0.sim import reproduce as reproduction

    if name is None:
        refuse_idle({"--model": model, "--part": part, "--out": out}, "a NAME")
        console.print(reproduction.listing())
        return
    quiet()
    entry = reproduction.find(name)
    out = out or Path("runs") / "reproduce" / name
    result = reproduction.reproduce(name, out, model, part or [], episodes, workers, device)
    console.print(reproduction.table(result))
    say(f"published: {entry.source}")
    for what, stated, here in result.differing:
        say(f"differs: {what}: {stated} there, {here} here")
    for remark in entry.remarks:
        say(f"known: {remark}")
    say(f"reports: {out}/*/report.html; {out / 'reproduction.json'}")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="folders that `vla0 eval` wrote")],
    out: Annotated[Path, typer.Option(help="page to write")] = Path("comparison.html"),
) -> None:
    """Put evaluations side by side: intervals, and pairs of the same task and seed."""
    from vla0.sim.compare import compare as run
    from vla0.sim.compare import tables, write_page

    if out.is_dir():
        raise InputError("a page to write", f"the folder '{out}'", "give --out FILE.html")
    comparison = run(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    if comparison.left_out:
        say(f"{comparison.left_out} episodes are left out: not all have them")
    for shown in tables(comparison):
        console.print(shown)
    write_page(comparison, out)
    say(f"page: {out}")
