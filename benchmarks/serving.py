"""A server under load: many clients at once, then thousands of damaged messages beside one who goes
on working.

python benchmarks/serving.py --checkpoint runs/demo/train/last
"""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vla0.core.spec import Observation, Spec
from vla0.serve.client import RemotePolicy
from vla0.serve.msgpack_numpy import pack


def run(
    checkpoint: Annotated[Path, typer.Option()],
    clients: Annotated[int, typer.Option()] = 64,
    seconds: Annotated[float, typer.Option()] = 60.0,
    messages: Annotated[int, typer.Option(help="damaged ones")] = 10_000,
) -> None:
    """Print what was answered, how fast, and what the server's memory did."""
    command = [
        sys.executable,
        "-m",
        "vla0",
        "serve",
        "--checkpoint",
        str(checkpoint),
        "--port",
        "0",
        "--rate",
        "10000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        url = process.stdout.readline().strip()
        spec = Spec.load(checkpoint)
        crowd(url, spec, clients, seconds)
        hostile(url, spec, messages, process.pid)
    finally:
        process.terminate()
        code = process.wait(30)
    print(f"the server ended with code {code}")


def observation_of(spec: Spec, seed: int) -> Observation:
    """A picture of noise for each camera."""
    rng = np.random.default_rng(seed)
    images = {
        camera: rng.integers(0, 256, (112, 112, 3), dtype=np.uint8) for camera in spec.cameras
    }
    return Observation(
        images, "push the window closed", None if spec.state is None else np.array(spec.state[0])
    )


def crowd(url: str, spec: Spec, clients: int, seconds: float) -> None:
    """All clients ask as fast as they are answered; each answer has to be its own."""
    found: list[list[float]] = [[] for _ in range(clients)]
    wrong = [0] * clients
    until = time.monotonic() + seconds + 5

    def work(number: int) -> None:
        remote, observation = (
            RemotePolicy(url, timeout_s=60, patience_s=60),
            observation_of(spec, number),
        )
        expected = None
        while time.monotonic() < until:
            started = time.monotonic()
            chunk = remote.predict(observation)
            found[number].append(time.monotonic() - started)
            expected = chunk if expected is None else expected
            wrong[number] += not np.array_equal(chunk, expected)
        remote.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ms = np.concatenate([np.array(own) for own in found]) * 1e3
    p50, p95, p99 = np.percentile(ms, [50, 95, 99])
    least = min(map(len, found))
    print(f"{clients} clients, {len(ms)} answers in {seconds + 5:.0f} s, at least {least} each")
    print(f"{sum(wrong)} answers unlike the first of their client")
    print(f"latency ms: median {p50:.0f}, 95 % {p95:.0f}, 99 % {p99:.0f}, most {ms.max():.0f}")


def hostile(url: str, spec: Spec, messages: int, pid: int) -> None:
    """Damaged messages from one side while another works on."""
    observation = observation_of(spec, 0)
    pictures = {f"observation/{camera}": frame for camera, frame in observation.images.items()}
    state = {} if observation.state is None else {"state": observation.state}
    good = pack({**pictures, "prompt": observation.instruction, **state})
    bystander = RemotePolicy(url, timeout_s=60)
    expected, rng = bystander.predict(observation), np.random.default_rng(0)
    sent = errors = answers = closed = 0
    before = memory(pid)
    while sent < messages:
        try:
            with connect(url, compression=None, max_size=None) as rude:
                rude.recv()
                while sent < messages:
                    damaged = bytearray(good)
                    for _ in range(rng.integers(1, 8)):
                        if rng.random() < 0.1:
                            del damaged[rng.integers(0, len(damaged)) :]
                            break
                        where = (
                            rng.integers(0, 100)
                            if rng.random() < 0.8
                            else rng.integers(0, len(damaged))
                        )
                        damaged[min(where, len(damaged) - 1)] = rng.integers(0, 256)
                    sent += 1
                    rude.send(bytes(damaged))
                    told = isinstance(rude.recv(), str)
                    errors, answers = errors + told, answers + (not told)
        except ConnectionClosed:
            closed += 1
        if not np.array_equal(bystander.predict(observation), expected):
            raise SystemExit("the bystander was given something else")
    after = memory(pid)
    print(
        f"{sent} damaged messages: {errors} answered with an error, {answers} still understood, "
        f"{closed} times shown out"
    )
    print(f"memory of the server: {before:.0f} MiB before, {after:.0f} MiB after")


def memory(pid: int) -> float:
    """MiB that a process holds."""
    (line,) = [
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    typer.run(run)
