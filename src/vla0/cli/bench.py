"""The subcommands of `vla0 bench`."""

from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vla0.errors import InputError, refuse_idle
from vla0.quiet import quiet

app = typer.Typer(no_args_is_help=True)


@app.command()
def decode(
    model: Annotated[
        str,
        typer.Option(
            help="tiny, tiny:FAMILY or 3b (random weights), or a checkpoint folder or Hub id"
        ),
    ] = "tiny",
    batch: Annotated[
        list[int] | None,
        typer.Option(help="observations decoded together; several times for several"),
    ] = None,
    n_action_steps: Annotated[
        list[int] | None,
        typer.Option(help="steps executed between queries; several times for several"),
    ] = None,
    chunks: Annotated[int | None, typer.Option(help="decodes of each kind; default 20")] = None,
    way: Annotated[
        list[str] | None, typer.Option(help="of the ways, those only; several times for several")
    ] = None,
    approximate: Annotated[
        list[str] | None, typer.Option(help="also: relaxed, int8 or nf4")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="torch device; default the GPU where there is one")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="see its dataset's pictures, not made-up ones")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="measure anew how many guesses a pass should check, and no more")
    ] = False,
    certify: Annotated[
        int | None, typer.Option(help="compare so many chunks with one token a pass, and no more")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="with --certify: file for the certificate")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="file for the rows")] = None,
) -> None:
    """Time the ways of decoding on the same inputs, and compare their tokens."""
    timed = {"--chunks": chunks, "--way": way, "--approximate": approximate, "--json": json}
    if certify is None:
        refuse_idle({"--out": out}, "--certify")
    else:
        refuse_idle({**timed, "--calibrate": calibrate}, "no --certify")
    if calibrate:
        refuse_idle(
            {**timed, "--batch": batch, "--n-action-steps": n_action_steps, "--config": config},
            "no --calibrate",
        )
    chunks, read = 20 if chunks is None else chunks, None
    if config is not None:
        from vla0.train.config import TrainConfig, read_config

        read = read_config(TrainConfig, config, [])
    # These imports take long, so they come after the checks of the options.
    from vla0.bench import decode as benchmark
    from vla0.bench.inputs import chosen, recorded
    from vla0.decode import SpeculativeDecoder
    from vla0.decode.tree_size import measured_tree_size

    quiet()
    console = Console()
    policy = chosen(model, device)
    if not isinstance(policy.decoder, SpeculativeDecoder):
        raise InputError(
            "a model that the fast decoder drives",
            f"'{model}', decoded plainly",
            "nothing to compare here",
        )
    if calibrate:
        console.print(f"{measured_tree_size(policy.decoder.engine, fresh=True)} nodes a pass")
        return
    episodes = None
    if read is not None:
        episodes = recorded(read.data, policy.spec)
    if certify is not None:
        _certify(policy, certify, batch or [1], n_action_steps or [1], episodes, out)
        return
    batches = batch or [1, 8, 32]
    steps_per_query = n_action_steps or sorted({1, policy.spec.chunk_size})
    ways = (*(way or benchmark.WAYS), *(approximate or ()))
    benchmark.refuse(batches, steps_per_query, chunks, policy.spec.chunk_size, ways)
    rows = benchmark.bench(policy, batches, steps_per_query, chunks, ways, episodes)
    for table in benchmark.tables(rows):
        console.print(table)
    if json is not None:
        write(json, [asdict(row) for row in rows])


def _certify(
    policy: Any,
    chunks: int,
    batches: list[int],
    steps_per_query: list[int],
    episodes: Any,
    out: Path | None,
) -> None:
    """Compute a certificate, print it, and write it to a file."""
    from vla0.bench.certificate import certificate

    if len(batches) > 1 or len(steps_per_query) > 1:
        raise InputError(
            "one --batch and one --n-action-steps with --certify",
            f"{batches}, {steps_per_query}",
            "certify each on its own",
        )
    certified = certificate(policy, chunks, batches[0], steps_per_query[0], episodes)
    if out is not None:
        write(out, certified)
    console = Console()
    console.print(
        f"{certified['identical']} of {certified['chunks']} chunks identical to one token a pass"
    )
    console.print(
        f"{certified['passes']:.1f} passes a chunk; {certified['dtype']}, {certified['device']}, "
        f"{certified['versions']}"
    )
    for difference in certified["differing"]:
        console.print(
            f"chunk {difference['chunk']}: {difference['numbers']} numbers differ; "
            f"margin where it parts {difference['margin']:.3g}"
        )


def write(file: Path, rows: Any) -> None:
    """Write the rows to a file as JSON."""
    file.write_text(dumps(rows, indent=2) + "\n", encoding="utf-8")
