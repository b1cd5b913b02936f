"""How fast rows are read here: vla0's Source against LeRobotDataset with a chunk query, on the same
dataset.
"""

import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from vla0.core.spec import Observation, Sample, Spec
from vla0.data.lerobot import DataConfig, Source
from vla0.errors import InputError
from vla0.quiet import quiet

BASELINE = "plain"
SIZE, DIMENSIONS, INSTRUCTION = 256, 7, "move the red block"


def made(folder: Path, videos: bool = False, episodes: int = 4, frames: int = 50) -> Path:
    """A LeRobot dataset in the form of LIBERO's: two cameras of 256 x 256 at 20 Hz, 7 numbers, a
    state of 8.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    picture = {
        "dtype": "video" if videos else "image",
        "shape": (SIZE, SIZE, 3),
        "names": ["height", "width", "channels"],
    }
    features = {f"observation.images.{camera}": picture for camera in ("image", "image2")}
    for key, count in {"observation.state": 8, "action": DIMENSIONS}.items():
        features[key] = {"dtype": "float32", "shape": (count,), "names": None}
    dataset = LeRobotDataset.create(
        "local/made", 20, features, root=folder, use_videos=videos, video_backend="pyav"
    )
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        pictures = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        for step in range(frames):
            frame: dict[str, Any] = {"task": INSTRUCTION}
            for camera, own in zip(("image", "image2"), pictures, strict=True):
                moved = np.roll(np.kron(own, np.ones((16, 16, 1), np.uint8)), 2 * step, axis=1)
                # a camera's: without it files are smaller than real ones
                noise = rng.integers(-4, 5, moved.shape)
                frame[f"observation.images.{camera}"] = np.clip(moved + noise, 0, 255).astype(
                    np.uint8
                )
            frame["observation.state"] = rng.random(8).astype(np.float32)
            dataset.add_frame({**frame, "action": rng.random(DIMENSIONS).astype(np.float32)})
        dataset.save_episode()
    dataset.finalize()
    return folder


class Stock(torch.utils.data.Dataset):
    """The same Samples as a Source gives, read by LeRobotDataset with a chunk query, as its own
    policies are trained.
    """

    def __init__(self, source: Source, spec: Spec):
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        self.config, self.cameras = source.config, source.cameras
        chunk = {self.config.action: [step / source.fps for step in range(spec.chunk_size)]}
        root = source.dataset.root
        self.dataset: Any = LeRobotDataset(
            f"local/{root.name}", root, delta_timestamps=chunk, video_backend="pyav"
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, row: int) -> Sample:
        """A row's Sample."""
        item = self.dataset[row]
        images = {
            camera: (item[key].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            for camera, key in self.cameras.items()
        }
        state = None if self.config.state is None else item[self.config.state].numpy()
        valid = ~item[f"{self.config.action}_is_pad"].numpy()
        return Sample(
            Observation(images, item["task"], state), item[self.config.action].numpy(), valid
        )

    def __getitem__(self, row: int) -> tuple[Sample, tuple[int, ...], int]:
        return self.sample(row), (0, 0, row), 0


def bench(dataset: Path | str, chunk_size: int, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Rows {way, samples_per_s}: the median of rounds in which the ways take turns, each reading
    the same rows.
    """
    if min(chunk_size, rows, rounds) < 1:
        raise InputError(
            "chunk_size, rows and rounds >= 1",
            f"{chunk_size}, {rows} and {rounds}",
            "give whole numbers from 1",
        )
    source = Source(DataConfig(dataset=str(dataset)))
    spec = Spec(base_model="none", chunk_size=chunk_size, **source.spec_fields(chunk_size))
    stock = Stock(source, spec)
    ways: Mapping[str, Callable[[int], Sample]] = {
        BASELINE: stock.sample,
        "vla0": lambda row: source.sample(row, chunk_size, 1),
    }
    rng, seconds = np.random.default_rng(0), {way: [] for way in ways}
    for _ in track(range(rounds), "reading", transient=True):
        picks = rng.integers(0, len(source), rows).tolist()
        for way, read in ways.items():
            started = time.perf_counter()
            for row in picks:
                read(row)
            seconds[way].append(time.perf_counter() - started)
    return [
        {"way": way, "samples_per_s": rows / float(np.median(own))} for way, own in seconds.items()
    ]


@contextmanager
def dataset_or_made(dataset: str | None, videos: bool = False) -> Iterator[str | None]:
    """The dataset, or one that is made for the moment; None where LeRobot is not installed."""
    if dataset is not None or importlib.util.find_spec("lerobot") is None:
        yield dataset
        return
    with TemporaryDirectory() as folder:
        yield str(made(Path(folder) / "made", videos))


def show(rows: list[dict[str, Any]], file: Path | None) -> None:
    """A table of rows that begin with way and samples_per_s, and a file of them."""
    names = [name for name in rows[0] if name != "way"]
    columns = [Column(name.replace("_", " "), justify="right") for name in (*names, "faster")]
    table = Table(Column("way", no_wrap=True), *columns)
    for row in rows:
        cells = [f"{row[name]:.3g}" for name in names]
        table.add_row(row["way"], *cells, f"{row['samples_per_s'] / rows[0]['samples_per_s']:.2f}")
    Console().print(table)
    if file is not None:
        file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def main(
    dataset: Annotated[
        str | None,
        typer.Option(help="LeRobot dataset; default one made up in the form of LIBERO's"),
    ] = None,
    videos: Annotated[
        bool, typer.Option(help="of the made-up one, videos instead of images")
    ] = False,
    chunk_size: Annotated[int, typer.Option(help="steps of a chunk")] = 8,
    rows: Annotated[int, typer.Option(help="read by each way in each round")] = 100,
    rounds: Annotated[int, typer.Option(help="the ways take turns; the median counts")] = 5,
    out: Annotated[Path | None, typer.Option(help="file for the rows, JSON")] = None,
) -> None:
    """Time reading rows against LeRobot's own reader with a chunk query."""
    quiet()
    with dataset_or_made(dataset, videos) as folder:
        if folder is None:
            raise InputError(
                "lerobot, to read datasets", "not installed", "pip install 'vla0[lerobot]'"
            )
        show(bench(folder, chunk_size, rows, rounds), out)


if __name__ == "__main__":
    typer.run(main)
