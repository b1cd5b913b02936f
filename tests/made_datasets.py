"""LeRobot datasets that tests read, and their older layouts."""

import json
import shutil
from pathlib import Path

from vla0.data.config import DataConfig
from vla0.data.lerobot import Source

CAMERAS = {"front": "observation.images.top", "wrist": "observation.images.hand"}


def source_of(dataset: Path, **changes) -> Source:
    return Source(
        DataConfig(
            **{"dataset": str(dataset), "cameras": CAMERAS, "state": "observation.state", **changes}
        )
    )


def downgraded(folder: Path) -> Path:
    """The dataset in the layout of v2.1: a file an episode, metadata in JSON lines."""
    import pandas as pd
    import pyarrow.parquet as pq

    meta = folder / "meta"
    info = json.loads((meta / "info.json").read_text())
    episodes = pd.concat(
        [pd.read_parquet(file) for file in sorted((meta / "episodes").rglob("*.parquet"))]
    )
    tasks = pd.read_parquet(meta / "tasks.parquet")
    data = next((folder / "data").rglob("*.parquet"))
    table = pq.read_table(data)
    data.unlink()
    for _, episode in episodes.iterrows():
        index, first, last = (
            int(episode["episode_index"]),
            int(episode["dataset_from_index"]),
            int(episode["dataset_to_index"]),
        )
        pq.write_table(
            table.slice(first, last - first),
            folder / "data" / "chunk-000" / f"episode_{index:06d}.parquet",
        )
    listed = [
        {"episode_index": int(e.episode_index), "tasks": list(e.tasks), "length": int(e.length)}
        for e in episodes.itertuples()
    ]
    named = [
        {"task_index": int(row.task_index), "task": str(task)} for task, row in tasks.iterrows()
    ]
    plain = lambda value: value.tolist() if hasattr(value, "tolist") else value  # noqa: E731
    stats = []
    for _, episode in episodes.iterrows():
        own = {}
        for key in episode.index[[name.startswith("stats/") for name in episode.index]]:
            _, feature, name = key.split("/")
            value = plain(episode[key])
            own.setdefault(feature, {})[name] = json.loads(json.dumps(value, default=plain))
        stats.append({"episode_index": int(episode["episode_index"]), "stats": own})
    for name, rows in {"episodes": listed, "tasks": named, "episodes_stats": stats}.items():
        (meta / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for gone in ("data_files_size_in_mb", "video_files_size_in_mb"):
        info.pop(gone, None)
    info |= {"codebase_version": "v2.1", "total_chunks": 1, "total_videos": 0, "chunks_size": 1000}
    info |= {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": None,
    }
    (meta / "info.json").write_text(json.dumps(info))
    (meta / "tasks.parquet").unlink()
    shutil.rmtree(meta / "episodes")
    return folder
