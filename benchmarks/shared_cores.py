"""Training and acting on cores that others use too: how many threads, and what OpenMP's do while
they wait.

python benchmarks/shared_cores.py --checkpoint runs/demo/train/best

Each setting has a process of its own, with its environment, that stays; they take turns, alone and
beside busy processes, round after round. A rate is the median of the rounds, a share is of "unset"
alone in the same run. "unset" is OpenMP's own default; "vla0" is what vla0 makes of it where the
user has set nothing. What others do on this machine would be measured too: it waits until they are
quiet, and a measurement in which they were not is not counted.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

UNSET, VLA0 = "unset", "vla0"
SPINS = (300, 1000, 3000, 10_000)
SETTINGS: dict[str, dict[str, str]] = {
    UNSET: {},
    VLA0: {},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in SPINS},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
# nothing of these comes from outside
READ = {key for setting in SETTINGS.values() for key in setting}
WIDTHS = (64, 256, 1024)
WORKS = (
    *(f"40 layers of {width}, a step" for width in WIDTHS),
    "training, a step",
    "acting, a chunk",
)
ROWS = 16  # of a training step of the policy
WIDTH = 16  # of decoding's tree; what is measured by itself differs between settings
BUSY = [sys.executable, "-c", "while True: pass"]
QUIET, LOOK_S = 0.1, 0.3  # cores that others may use; seconds over which that is looked at


def run(
    checkpoint: Annotated[str, typer.Option(help="the policy; tiny has random weights")] = "tiny",
    rounds: Annotated[int, typer.Option()] = 6,
    seconds: Annotated[float, typer.Option(help="of each measurement, at least one call")] = 0.5,
    busy: Annotated[int, typer.Option(help="busy processes beside")] = 1,
    minutes: Annotated[float, typer.Option(help="after which it shows what it has")] = 30.0,
) -> None:
    """Print calls a second alone and beside, and their shares, as a table of each work."""
    until = time.monotonic() + 60 * minutes
    rates: dict[tuple[int, bool, str], list[float]] = {}
    members = {name: _member(name, checkpoint) for name in SETTINGS}
    turns = [
        (which, beside, name)
        for which in range(len(WORKS))
        for beside in (False, True)
        for name in SETTINGS
    ]
    try:
        for turn in turns * rounds:
            rate = None
            while rate is None and time.monotonic() < until:
                rate = _measured(members[turn[2]], turn[0], seconds, busy * turn[1])
            if rate is not None:
                rates.setdefault(turn, []).append(rate)
    finally:
        for member in members.values():
            member.kill()
    for which, title in enumerate(WORKS):
        print(
            f"\n| {title} | alone, 1/s | beside {busy} busy, 1/s | alone | beside | measured "
            f"|\n|---|---|---|---|---|---|"
        )
        whole = np.median(rates.get((which, False, UNSET), [np.nan]))
        for name in SETTINGS:
            both = [rates.get((which, beside, name), [np.nan]) for beside in (False, True)]
            alone, beside = map(np.median, both)
            shares = f"{alone / whole:.0%} | {beside / whole:.0%} | {min(map(len, both))} times"
            print(f"| {name} | {alone:.3g} | {beside:.3g} | {shares} |")


def _measured(member: Any, which: int, seconds: float, busy: int) -> float | None:
    """Calls a second beside `busy` busy processes, in a quiet moment; None where it was none."""
    if _cores_of_others(lambda: time.sleep(LOOK_S), []) > QUIET:
        return None
    others = [subprocess.Popen(BUSY) for _ in range(busy)]
    found: list[float] = []

    def ask() -> None:
        print(json.dumps([which, seconds]), file=member.stdin, flush=True)
        found.append(float(member.stdout.readline()))

    try:
        used = _cores_of_others(ask, [member.pid, *(other.pid for other in others)])
    finally:
        for other in others:
            other.kill()
            other.wait()
    return found[0] if used < QUIET else None


def _cores_of_others(do: Callable[[], object], own: list[int]) -> float:
    """How many cores were used, while something was done, by processes that are not named."""

    def used() -> float:
        whole = psutil.cpu_times()
        ours = [psutil.Process(pid).cpu_times() for pid in own]
        # steal is of others too
        return sum(whole[:3]) + sum(whole[5:8]) - sum(own.user + own.system for own in ours)

    started, before = time.perf_counter(), used()
    do()
    return (used() - before) / (time.perf_counter() - started)


def _member(name: str, checkpoint: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if key not in READ} | SETTINGS[
        name
    ]
    first = "torch" if name == UNSET else "vla0"  # once torch is loaded vla0 sets nothing
    code = (
        f"import sys, {first}; sys.path.insert(0, sys.argv[1]); from shared_cores import "
        f"work; work(sys.argv[2])"
    )
    words = [sys.executable, "-c", code, str(Path(__file__).parent), checkpoint]
    return subprocess.Popen(
        words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def work(checkpoint: str) -> None:
    """What a measured process does: for each line [work, seconds] of its input a line of calls a
    second.
    """
    import torch

    from vla0.bench.inputs import chosen, moving_pictures
    from vla0.decode import SpeculativeDecoder

    policy = chosen(checkpoint, "cpu")
    assert isinstance(policy.decoder, SpeculativeDecoder)
    policy.decoder.tree_size = WIDTH
    episode = moving_pictures(policy.spec)(0)
    observations = [next(episode) for _ in range(ROWS)]
    batch = policy.prompt.observe(observations)

    def trained(model: Any, loss: Callable[[], Any]) -> Callable[[], object]:
        optimizer = torch.optim.SGD(model.parameters(), 1e-9)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    def stack(width: int) -> Callable[[], object]:
        layers = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(40)))
        rows = torch.randn(64, width)
        return trained(layers, lambda: layers(rows).square().mean())

    def answers() -> Any:
        return policy.model(**batch, logits_to_keep=40, use_cache=False).logits.square().mean()

    calls = [
        *map(stack, WIDTHS),
        trained(policy.model, answers),
        lambda: policy.predict_batch(observations[:1]),
    ]
    for line in sys.stdin:
        which, seconds = json.loads(line)
        calls[which]()
        done, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            calls[which]()
            done += 1
        print(done / passed, flush=True)


if __name__ == "__main__":
    typer.run(run)
