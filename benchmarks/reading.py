"""How fast training rows are read: vla0's Source against LeRobotDataset with a chunk query, on the same image dataset.

python benchmarks/reading.py runs/demo/dataset
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vla0.source import DataConfig, Source, open_dataset


def measure(
    dataset: Annotated[Path, typer.Argument(help="folder of a LeRobot dataset")],
    horizon: Annotated[int, typer.Option()] = 8,
    rows: Annotated[int, typer.Option(help="read by each way in each round")] = 100,
    rounds: Annotated[int, typer.Option(help="the ways take turns; the median counts")] = 5,
) -> None:
    """Print samples per second for both, and their ratio."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    opened = open_dataset(dataset)
    cameras = {key.rsplit(".", 1)[-1]: key for key in opened.meta.camera_keys}
    source = Source(DataConfig(str(dataset), cameras))
    chunk = {"action": [step / opened.fps for step in range(horizon)]}
    stock = LeRobotDataset(opened.repo_id, root=dataset, delta_timestamps=chunk, video_backend="pyav")
    rng, seconds = np.random.default_rng(0), {"vla0": [], "lerobot": []}
    for _ in range(rounds):
        picks = rng.integers(0, len(source), rows)
        for name, read in (("vla0", lambda row: source.sample(row, horizon, 1)), ("lerobot", lambda row: stock[row])):
            started = time.perf_counter()
            for row in picks:
                read(int(row))
            seconds[name].append(time.perf_counter() - started)
    ours, stocks = (rows / float(np.median(values)) for values in seconds.values())
    print(f"vla0 {ours:.0f} samples/s, lerobot {stocks:.0f} samples/s: {ours / stocks:.1f} times")


if __name__ == "__main__":
    typer.run(measure)
