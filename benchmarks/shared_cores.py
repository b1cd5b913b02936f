"""Training and acting on cores that others use too: what OpenMP's threads do while they wait, alone and beside busy processes.

python benchmarks/shared_cores.py

Each setting has a process that stays; they take turns, round after round, so that whatever else the machine does meets all of
them. A rate is the median of the rounds. "as it comes" is OpenMP's own default, which vla0 sets aside.
"""

import json
import os
import subprocess
import sys
import time
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

AS_IT_COMES = "as it comes"
SETTINGS: dict[str, dict[str, str]] = {
    AS_IT_COMES: {},
    "vla0's": {},
    "GOMP_SPINCOUNT=100": {"GOMP_SPINCOUNT": "100"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
OURS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
WIDTHS = (64, 256, 1024)
WORKS = (*(f"40 linear layers of {width}, trained" for width in WIDTHS), "the tiny model, trained", "the tiny model, acting")


def work() -> None:
    """A process that is measured: for each line [work, seconds] of its input a line of calls a second.

    vla0 sets nothing once torch is there, so whoever starts this imports one of them first.
    """
    import torch

    from vla0.bench.inputs import chosen, moving_pictures
    from vla0.decode import Fast

    policy = chosen("tiny", "cpu")
    assert isinstance(policy.decoder, Fast)
    policy.decoder.width = 16
    episode = moving_pictures(policy.spec)(0)
    observations = [next(episode) for _ in range(8)]

    def stack(width: int) -> Any:
        layers = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(40)))
        optimizer, rows = torch.optim.SGD(layers.parameters(), 1e-3), torch.randn(64, width)
        return stepping(optimizer, lambda: layers(rows).square().mean())

    def stepping(optimizer: Any, loss: Any) -> Any:
        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    batch = policy.prompt.observe(observations)
    optimizer = torch.optim.SGD(policy.model.parameters(), 1e-9)
    training = stepping(optimizer, lambda: policy.model(**batch, logits_to_keep=40, use_cache=False).logits.square().mean())
    calls = [*map(stack, WIDTHS), training, lambda: policy.predict_batch(observations[:1])]
    for line in sys.stdin:
        which, seconds = json.loads(line)
        calls[which]()
        done, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            calls[which]()
            done += 1
        print(done / passed, flush=True)


def run(
    rounds: Annotated[int, typer.Option()] = 5,
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 2.0,
    busy: Annotated[int, typer.Option(help="busy processes beside")] = 1,
    setting: Annotated[list[str] | None, typer.Option(help="of the settings, those only; several times")] = None,
) -> None:
    """Print calls a second, and what is left of the default's alone."""
    names = setting or list(SETTINGS)
    members = {name: _member(name) for name in names}
    rates: dict[tuple[str, int, bool], list[float]] = {}
    try:
        for _ in range(rounds):
            for which in range(len(WORKS)):
                for beside in (False, True):
                    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy * beside)]
                    try:
                        for name, member in members.items():
                            print(json.dumps([which, seconds]), file=member.stdin, flush=True)
                            rates.setdefault((name, which, beside), []).append(float(member.stdout.readline()))
                    finally:
                        for other in others:
                            other.kill()
                            other.wait()
    finally:
        for member in members.values():
            member.kill()
    _show(names, rates, busy)


def _member(name: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if key not in OURS} | SETTINGS[name]
    first = "torch" if name == AS_IT_COMES else "vla0"
    here = os.path.dirname(os.path.abspath(__file__))
    code = f"import sys; sys.path.insert(0, {here!r}); import {first}; from shared_cores import work; work()"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _show(names: list[str], rates: dict[tuple[str, int, bool], list[float]], busy: int) -> None:
    for which, title in enumerate(WORKS):
        table = Table("setting", "alone, calls a second", f"beside {busy} busy", "share that is left", title=title)
        for name in names:
            alone, beside = (float(np.median(rates[name, which, shared])) for shared in (False, True))
            table.add_row(name, f"{alone:.3g}", f"{beside:.3g}", f"{beside / alone:.0%}")
        Console().print(table)


if __name__ == "__main__":
    typer.run(run)
