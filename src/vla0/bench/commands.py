"""`vla0 bench`: its subcommands."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vla0.spec import InputError

app = typer.Typer(no_args_is_help=True)


@app.command()
def decode(
    model: Annotated[str, typer.Option(help="tiny or 3b (random weights), or a checkpoint folder or Hub id")] = "tiny",
    batch: Annotated[list[int] | None, typer.Option(help="observations decoded together; several times for several")] = None,
    replan: Annotated[list[int] | None, typer.Option(help="steps executed between queries; several times for several")] = None,
    chunks: Annotated[int, typer.Option(help="decodes of each kind")] = 20,
    way: Annotated[list[str] | None, typer.Option(help="of the ways, those only; several times for several")] = None,
    inexact: Annotated[list[str] | None, typer.Option(help="also: relaxed, fp8 or fp8-weights")] = None,
    device: Annotated[str | None, typer.Option(help="torch device; default the GPU where there is one")] = None,
    recipe: Annotated[Path | None, typer.Option(help="see its dataset's pictures, not made-up ones")] = None,
    calibrate: Annotated[bool, typer.Option(help="measure anew how many guesses a pass should check, and no more")] = False,
    json: Annotated[Path | None, typer.Option(help="file for the rows")] = None,
) -> None:
    """Time the ways of decoding on the same inputs, and compare their tokens."""
    from vla0.bench import decode as benchmark
    from vla0.bench.inputs import chosen, recorded
    from vla0.decode import Fast
    from vla0.decode.width import width

    console = Console()
    policy = chosen(model, device)
    if not isinstance(policy.decoder, Fast):
        raise InputError("a model that the fast decoder drives", f"'{model}', decoded plainly", "nothing to compare here")
    if calibrate:
        console.print(f"{width(policy.decoder.engine, fresh=True)} nodes a pass")
        return
    batches, replans = batch or [1, 8, 32], replan or sorted({1, policy.spec.horizon})
    ways = (*(way or benchmark.WAYS), *(inexact or ()))
    benchmark.refuse(batches, replans, chunks, policy.spec.horizon, ways)
    episodes = None
    if recipe is not None:
        from vla0.recipe import TrainConfig, read_config

        episodes = recorded(read_config(TrainConfig, recipe, []).data, policy.spec)
    rows = benchmark.bench(policy, batches, replans, chunks, ways, episodes)
    for table in benchmark.tables(rows):
        console.print(table)
    if json is not None:
        benchmark.write(rows, json)
