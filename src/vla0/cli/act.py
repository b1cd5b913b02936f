"""The subcommands that act: `vla0 serve` and `vla0 robot`."""

import importlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vla0.cli.screen import app, console, pairs_of, say
from vla0.core.spec import MAIN, Spec
from vla0.errors import InputError, given, nearest, refuse_idle
from vla0.quiet import quiet

PROTOCOLS = ("openpi", "lerobot", "vla-eval")


@app.command()
def serve(
    checkpoint: Annotated[str, typer.Option(help="checkpoint folder or Hub id")],
    host: Annotated[
        str, typer.Option(help="address to listen on; any but this machine's own needs a key")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="file of the key that clients have to know")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="certificate (PEM), with its key unless --tls-key is given")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="the certificate's private key (PEM)")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(help="CAMERA=NAME of its picture in messages; several times")
    ] = None,
    ensemble: Annotated[
        str, typer.Option(help="none: whole chunks; mean, v1 or v2:w: ensembled steps")
    ] = "none",
    n_action_steps: Annotated[
        int | None,
        typer.Option(help="steps a client executes per query, where they are ensembled; default 1"),
    ] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="a web page that may ask, https://...; default none")
    ] = None,
    embodiment: Annotated[
        str, typer.Option(help="of a checkpoint trained on a mixture: whose robot acts")
    ] = MAIN,
    device: Annotated[
        str | None, typer.Option(help="torch device; default the GPU where there is one")
    ] = None,
    clients: Annotated[int | None, typer.Option(help="at most, at once; default 128")] = None,
    rate: Annotated[
        float | None, typer.Option(help="messages a second of one client, at most; default 200")
    ] = None,
    message_mib: Annotated[
        float | None,
        typer.Option(help="size of a message, at most; default full HD of each camera"),
    ] = None,
    side: Annotated[
        int | None, typer.Option(help="pixels of a picture's side, at most; default 4096")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="compile first: minutes, then faster, on a GPU")
    ] = False,
    protocol: Annotated[
        str, typer.Option(help="openpi; lerobot, its robot_client's gRPC; or vla-eval, a harness")
    ] = "openpi",
    base_url: Annotated[
        str | None, typer.Option(help="of another engine that serves the checkpoint: OpenAI's API")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="of --base-url: vllm (default), sglang or llama.cpp")
    ] = None,
) -> None:
    """Act for robots elsewhere, over openpi's websocket protocol or another.

    On Ctrl-C the server finishes the answers that it has begun, and then stops.
    """
    from vla0.checkpoint.location import locate
    from vla0.serve.listen import ServerLimits, refuse_open, refuse_taken, secret_of, served, shown
    from vla0.serve.messages import refuse_other_cameras

    secret = secret_of(api_key_file)
    pairs = pairs_of("--key", key or [])
    message_bytes = None if message_mib is None else int(message_mib * 2**20)
    limits = ServerLimits(
        **given(side=side, clients=clients, rate=rate, message_bytes=message_bytes)
    )
    if protocol not in PROTOCOLS:
        raise InputError(f"--protocol of {PROTOCOLS}", f"'{protocol}'", "choose one of those")
    refuse_open(host, secret, protocol)
    refuse_taken(host, port)
    if protocol != "openpi" and (secret or tls_cert):
        raise InputError(
            f"--protocol {protocol} without a key or TLS", "one of them", "its clients know none"
        )
    if protocol != "vla-eval" and ensemble == "none":
        refuse_idle({"--n-action-steps": n_action_steps}, "--ensemble")
    if protocol != "openpi":
        refuse_idle({"--origin": origin, "--rate": rate}, "--protocol openpi")
    if tls_cert is None:
        refuse_idle({"--tls-key": tls_key}, "--tls-cert")
    if base_url is None:
        refuse_idle({"--engine": engine}, "--base-url")
    else:
        idle = {"--device": device, "--compiled": compiled}
        refuse_idle(idle, "no --base-url, whose engine has its own,")
    if protocol == "lerobot" and ensemble != "none":
        raise InputError(
            "--protocol lerobot without --ensemble",
            ensemble,
            "its client averages by itself (aggregate_fn_name)",
        )
    spec = Spec.load(locate(checkpoint, weights=False), embodiment)
    refuse_other_cameras(pairs, spec)  # this comes before a large model is loaded
    from vla0.policy import VLA0
    from vla0.serve.batches import warm_up
    from vla0.serve.server import Server

    quiet()
    if base_url is not None:
        policy = VLA0.remote(base_url, spec, **given(engine=engine))
    else:
        policy = VLA0.from_pretrained(checkpoint, device, embodiment=embodiment)
        if compiled:
            policy.compile()
            say("compiling; fewer --clients take less time")
        warm_up(policy, min(limits.batch, limits.clients) if compiled else 1)
    if protocol == "openpi":
        server = Server(
            policy,
            limits,
            pairs,
            secret,
            ensemble=ensemble,
            origins=origin or (),
            **given(n_action_steps=n_action_steps),
        )
        scheme = "wss" if tls_cert else "ws"
        ready = lambda bound: say(f"{shown(policy.spec)}\n{scheme}://{host}:{bound}")  # noqa: E731
        served(server, host, port, tls_cert, tls_key, ready)
        return
    module_name = protocol.replace("-", "_")
    try:
        module = importlib.import_module(f"vla0.serve.{module_name}")
    except ImportError as error:
        extra = "robot" if protocol == "lerobot" else "vla-eval"
        raise InputError(
            f"what --protocol {protocol} needs", str(error), f"pip install 'vla0[{extra}]'"
        ) from None
    address = "--server_address=" if protocol == "lerobot" else "ws://"
    announce = lambda bound: say(f"{shown(policy.spec)}\n{address}{host}:{bound}")  # noqa: E731
    if protocol == "lerobot":
        module.serve_lerobot(module.LeRobotServer(policy, limits, pairs), host, port, announce)
    else:
        served(
            module.VlaEvalServer(
                policy,
                pairs,
                ensemble=ensemble,
                limits=limits,
                **given(n_action_steps=n_action_steps),
            ),
            host,
            port,
            ready=announce,
        )


@app.command("robot", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def robot(
    context: typer.Context,
    instruction: Annotated[str, typer.Option(help="what the robot shall do")],
    policy_url: Annotated[str, typer.Option(help="of `vla0 serve`")] = "ws://127.0.0.1:8000",
    kind: Annotated[
        str | None,
        typer.Option("--robot", help="LeRobot's type of it, e.g. so101; sim is a simulated arm"),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="really move; without it nothing is sent")
    ] = False,
    mode: Annotated[str, typer.Option(help="sync, async or ensemble")] = "async",
    n_action_steps: Annotated[
        int | None, typer.Option(help="steps executed of a chunk; default half of it")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="of --mode ensemble, by age: mean, v1 (default) or v2:w")
    ] = None,
    limits: Annotated[
        Path | None, typer.Option(help="YAML: low, high, step, velocity; default the data's")
    ] = None,
    camera: Annotated[
        list[str] | None, typer.Option(help="CAMERA=NAME, the robot's name of it")
    ] = None,
    episodes: Annotated[int, typer.Option()] = 1,
    seconds: Annotated[float, typer.Option(help="an episode at most")] = 30.0,
    reset_s: Annotated[
        float, typer.Option(help="between episodes, or until the right arrow")
    ] = 10.0,
    fps: Annotated[float | None, typer.Option(help="of the loop; default the checkpoint's")] = None,
    resample: Annotated[
        bool, typer.Option("--resample", help="admit another --fps: linear between positions")
    ] = False,
    hold_s: Annotated[float, typer.Option(help="without a command for so long: hold")] = 0.2,
    stop_s: Annotated[float, typer.Option(help="without a command for so long: stop")] = 2.0,
    timeout_s: Annotated[float, typer.Option(help="for an answer of the policy")] = 2.0,
    out: Annotated[
        Path | None, typer.Option(help="new folder of the recording; default runs/robot/TIME")
    ] = None,
    record: Annotated[bool, typer.Option(help="record what was done live")] = True,
    view: Annotated[
        str | None, typer.Option(help="rerun: window, FILE.rrd or a viewer's URL")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="file of the server's key")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="certificate (PEM) that a wss:// server was signed with")
    ] = None,
) -> None:
    """Run a policy on a robot of LeRobot's, or on a simulated arm. Only --live moves the robot.

    The robot is described as for lerobot-record: --robot.type=so101_follower
    --robot.port=/dev/ttyACM0 --robot.cameras="{front: {type: opencv, index_or_path: 0, width: 640,
    height: 480, fps: 30}}". Space, esc, q or Ctrl-C stops it. The right arrow ends an episode, and
    the left arrow also discards it. A limits file says for example `step: 3` for all actions,
    `velocity: [30, 30, 30, 30, 30, 90]`, or `low: {gripper.pos: 10}`.
    """
    from vla0.serve.listen import secret_of

    if mode == "ensemble":
        refuse_idle(
            {"--n-action-steps": n_action_steps},
            "--mode sync or async: an ensemble asks as often as answers come,",
        )
    else:
        refuse_idle({"--weights": weights}, "--mode ensemble")
    if fps is None:
        refuse_idle({"--resample": resample}, "--fps")
    if not (live and record):
        refuse_idle({"--out": out}, "--live and --record")
    words = robot_words(
        context.args, [parameter.opts[0] for parameter in context.command.params], kind
    )
    secret = secret_of(api_key_file)
    # These imports take long, so they come after the checks of the options.
    from vla0.robot.lerobot_robot import make_robot
    from vla0.robot.session import RobotSession, SessionConfig
    from vla0.serve.client import NoAnswerError, RemotePolicy

    folder = (out or Path(f"runs/robot/{datetime.now():%Y-%m-%d_%H-%M-%S}")) if record else None
    config = SessionConfig(
        instruction=instruction,
        live=live,
        mode=mode,
        n_action_steps=n_action_steps,
        fps=fps,
        resample=resample,
        episodes=episodes,
        seconds=seconds,
        reset_s=reset_s,
        hold_s=hold_s,
        stop_s=stop_s,
        out=folder,
        view=view,
        **given(weights=weights),
    )
    pairs, narrowed = pairs_of("--camera", camera or []), _limits(limits)
    arm = make_robot(words)
    say(f"asking {policy_url}")
    try:
        policy = RemotePolicy(policy_url, secret, timeout_s, certificate=tls_ca)
    except NoAnswerError as error:
        raise InputError(str(error)) from None
    try:
        session = RobotSession(config, arm, policy, pairs, narrowed, say)
        console.print(_table(session.body.actions, session.limits))
        if not live:
            console.print(
                "dry run: nothing is sent to the robot; give --live once what you see is right"
            )
        reports = session.run()
    finally:
        policy.close()
    latencies = sorted(latency for report in reports for latency in report.latency_s)
    if latencies:
        say(f"{len(latencies)} chunks, {latencies[len(latencies) // 2] * 1e3:.0f} ms in the median")
    if reports and reports[-1].stopped is not None:
        raise typer.Exit(130 if reports[-1].stopped.startswith("SIG") else 1)


def robot_words(arguments: list[str], options: list[str], kind: str | None) -> list[str]:
    """Return the `--robot.*` words of the command line, with = between an option and its value.

    Args:
        arguments: The words that are not options of `vla0 robot`.
        options: The options of `vla0 robot`.
        kind: LeRobot's type of the robot, which becomes the first word. None leaves it out.

    Raises:
        InputError: When there is another word. The message names the nearest option.
    """
    words: list[str] = [f"--robot.type={kind}"] if kind else []
    open_word = False
    for word in arguments:
        if word.startswith("--robot."):
            words.append(word)
        elif open_word and not word.startswith("--"):
            words[-1] += f"={word}"
        else:
            remedy = nearest(word, options, otherwise="remove it")
            raise InputError("an option of `vla0 robot`, or --robot.*", f"'{word}'", remedy)
        open_word = "=" not in words[-1]
    return words


def _limits(file: Path | None) -> Any:
    """Read the file of limits, or return None without one."""
    if file is None:
        return None
    from vla0.train.config import read_yaml

    if not file.is_file():
        raise InputError(
            "a file of limits", f"'{file}', which is not there", "write one: `vla0 robot --help`"
        )
    return read_yaml(file)


def _table(actions: list[str], limits: Any) -> Table:
    """Return a table of the limits of each action."""
    from vla0.robot.limits import NEVER

    table = Table("action", "low", "high", "most a step", "most a second")
    for d, name in enumerate(actions):
        bounds = [
            None if value is None else value[d]
            for value in (limits.low, limits.high, limits.step, limits.velocity)
        ]
        table.add_row(
            name, *("" if value is None or value >= NEVER else f"{value:.4g}" for value in bounds)
        )
    return table
