"""Training, evaluation, and acting for others."""

from pathlib import Path
from typing import Annotated

import typer

from vla0.cli.screen import app, console, quiet
from vla0.errors import InputError
from vla0.spec import MAIN


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
def serve(
    checkpoint: Annotated[str, typer.Option(help="checkpoint folder or Hub id")],
    host: Annotated[str, typer.Option(help="address to listen on; any but this machine's own needs a key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="file of the key that clients have to know")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="certificate (PEM), with its key unless --tls-key is given")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="the certificate's private key (PEM)")] = None,
    key: Annotated[list[str] | None, typer.Option(help="CAMERA=NAME of its picture in messages; several times")] = None,
    ensemble: Annotated[str, typer.Option(help="none: whole chunks; mean, v1 or v2:w: ensembled steps")] = "none",
    replan: Annotated[int, typer.Option(help="steps a client executes per query, where they are ensembled")] = 1,
    embodiment: Annotated[str, typer.Option(help="of a checkpoint trained on a mixture: whose robot acts")] = MAIN,
    device: Annotated[str | None, typer.Option(help="torch device; default the GPU where there is one")] = None,
    clients: Annotated[int, typer.Option(help="at most, at once")] = 128,
    rate: Annotated[float, typer.Option(help="messages a second of one client, at most")] = 200.0,
    message_mib: Annotated[float, typer.Option(help="size of a message, at most")] = 32.0,
    side: Annotated[int, typer.Option(help="pixels of a picture's side, at most")] = 4096,
    protocol: Annotated[str, typer.Option(help="openpi, or lerobot for LeRobot's own robot_client (gRPC)")] = "openpi",
) -> None:
    """Act for robots elsewhere, over openpi's websocket protocol or LeRobot's. Ctrl-C finishes what was begun."""
    from vla0.policy import VLA0
    from vla0.serve.door import refuse_open, secret_of, served
    from vla0.serve.server import Limits, Server, shown

    quiet()
    secret = secret_of(api_key_file)
    refuse_open(host, secret)
    pairs = {camera: name for camera, _, name in (pair.partition("=") for pair in key or [])}
    if not all(pairs.values()):
        raise InputError("--key CAMERA=NAME", f"{key}", "give both")
    limits = Limits(int(message_mib * 2**20), side, clients, rate)
    if protocol not in ("openpi", "lerobot"):
        raise InputError("--protocol openpi or lerobot", f"'{protocol}'", "choose one of those")
    if protocol == "lerobot" and (ensemble != "none" or secret or tls_cert):
        raise InputError("--protocol lerobot without --ensemble, keys and TLS", "one of them", "its client knows none of it")
    policy = VLA0.from_pretrained(checkpoint, device, embodiment=embodiment)
    if protocol == "lerobot":
        try:
            from vla0.serve.lerobot import LeRobotServer, serve_lerobot
        except ImportError as error:
            raise InputError("LeRobot with its gRPC", str(error), "pip install 'vla0[robot]'") from None
        say = lambda bound: console.print(f"{shown(policy.spec)}\n--server_address={host}:{bound}")  # noqa: E731
        serve_lerobot(LeRobotServer(policy, limits, pairs), host, port, say)
        return
    server = Server(policy, limits, pairs, secret, replan, ensemble)
    scheme = "wss" if tls_cert else "ws"
    ready = lambda bound: console.print(f"{shown(policy.spec)}\n{scheme}://{host}:{bound}")  # noqa: E731
    served(server, host, port, tls_cert, tls_key, ready)
