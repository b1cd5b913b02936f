"""Everything in a dataset is looked up by its key; what is not whole is named, and nothing is
guessed.
"""

import io
import json
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import TASKS, frame_of, make_dataset
from PIL import Image

from vla0 import InputError
from vla0.data.lerobot import DataConfig, Source
from vla0.data.storage import Stored, names_of

CAMERAS = {"front": "observation.images.top"}


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_dataset(tmp_path / "own", lengths=(6, 4, 5, 4))


@pytest.fixture
def videos(tmp_path) -> Path:
    return make_dataset(tmp_path / "videos", videos=True, lengths=(4, 4, 4, 4, 4))


def changed(file: Path, change) -> None:
    """A parquet file, changed as a table of pandas."""
    change(pandas.read_parquet(file)).to_parquet(file)


def tables(folder: Path) -> list[Path]:
    return [*folder.glob("data/*/*.parquet"), *folder.glob("meta/episodes/*/*.parquet")]


def test_a_sentence_is_found_by_its_number_whatever_the_order_of_the_table(folder):
    changed(folder / "meta" / "tasks.parquet", lambda table: table.iloc[::-1])
    source = Source(DataConfig(dataset=str(folder), cameras=CAMERAS))
    assert [source.sample(row, 2, 1).observation.instruction for row in (0, 6)] == list(TASKS)


def test_a_sentence_is_found_by_its_number_where_numbers_are_missing(folder):
    changed(folder / "meta" / "tasks.parquet", lambda table: table.assign(task_index=[5, 0]))
    for file in folder.glob("data/*/*.parquet"):
        changed(file, lambda table: table.assign(task_index=table["task_index"].map({0: 5, 1: 0})))
    source = Source(DataConfig(dataset=str(folder), cameras=CAMERAS))
    assert [source.sample(row, 2, 1).observation.instruction for row in (0, 6)] == list(TASKS)


def test_a_number_without_a_sentence_is_named(folder):
    changed(folder / "meta" / "tasks.parquet", lambda table: table.assign(task_index=[0, 7]))
    with pytest.raises(InputError, match=r"task_index 1 in episode 1, and instructions \[0, 7\]"):
        Source(DataConfig(dataset=str(folder), cameras=CAMERAS))


def test_a_table_of_sentences_in_a_column_is_read_too(folder):
    changed(
        folder / "meta" / "tasks.parquet", lambda table: table.rename_axis("task").reset_index()
    )
    assert Source(DataConfig(dataset=str(folder), cameras=CAMERAS)).tasks == list(TASKS)


def test_episodes_without_a_sentence_are_named_before_they_are_trained_on(folder):
    changed(folder / "meta" / "tasks.parquet", lambda table: table.set_axis([TASKS[0], " "]))
    with pytest.raises(InputError, match="an empty one for episodes 1, 3"):
        Source(DataConfig(dataset=str(folder), cameras=CAMERAS))


def test_empty_episodes_are_counted_by_the_table_of_episodes(folder):
    info = json.loads((folder / "meta" / "info.json").read_text())
    for declared in (2, 9):
        (folder / "meta" / "info.json").write_text(json.dumps({**info, "total_episodes": declared}))
        assert Source(DataConfig(dataset=str(folder), cameras=CAMERAS)).problems() == []


def test_a_revision_of_a_folder_is_refused(folder):
    with pytest.raises(InputError, match="a dataset of the Hub for data"):
        Stored(folder, "v1.0")


def test_a_table_without_sentences_is_refused(folder):
    changed(folder / "meta" / "tasks.parquet", lambda table: table.reset_index(drop=True))
    with pytest.raises(InputError, match="instructions and their task_index"):
        Stored(folder)


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.string()])
def test_sentences_that_are_not_utf8_are_named(folder, kind):
    raw = pyarrow.array([b"push the red block", b"sch\xf6n"], pyarrow.binary())
    texts = (
        raw
        if kind == pyarrow.binary()
        else pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    )
    table = pyarrow.table({"task_index": pyarrow.array([0, 1]), "task": texts})
    parquet.write_table(table, folder / "meta" / "tasks.parquet")
    with pytest.raises(InputError, match="UTF-8"):
        Stored(folder)


def test_an_episode_is_found_by_its_number_where_another_was_taken_out(videos):
    for file in tables(videos):
        changed(file, lambda table: table[table["episode_index"] != 2].reset_index(drop=True))
    info = json.loads((videos / "meta" / "info.json").read_text())
    (videos / "meta" / "info.json").write_text(
        json.dumps({**info, "total_episodes": 4, "total_frames": 16})
    )
    source = Source(DataConfig(dataset=str(videos), cameras=CAMERAS))
    for row, episode in enumerate(source.episode_of.tolist()):
        frame = source.sample(row, 2, 1).observation.images["front"]
        expected = frame_of(episode, row - int(source.start[row]), 0)
        assert np.abs(frame.astype(int) - expected).max() <= 6, (row, episode)


def test_episodes_in_another_order_of_the_table_keep_their_videos(videos):
    for file in videos.glob("meta/episodes/*/*.parquet"):
        changed(file, lambda table: table.iloc[::-1].reset_index(drop=True))
    source = Source(DataConfig(dataset=str(videos), cameras=CAMERAS))
    for row in (0, 7, 19):
        frame = source.sample(row, 2, 1).observation.images["front"]
        expected = frame_of(int(source.episode_of[row]), row - int(source.start[row]), 0)
        assert np.abs(frame.astype(int) - expected).max() <= 6


def test_episodes_without_rows_are_named(folder):
    for file in folder.glob("data/*/*.parquet"):
        changed(file, lambda table: table[table["episode_index"] != 1].reset_index(drop=True))
    with pytest.raises(InputError, match=r"none for episodes 1 of"):
        Stored(folder)


def test_rows_without_an_episode_are_named(folder):
    for file in folder.glob("meta/episodes/*/*.parquet"):
        changed(file, lambda table: table[table["episode_index"] != 3].reset_index(drop=True))
    with pytest.raises(InputError, match=r"none for episodes 3 of"):
        Stored(folder)


def test_an_episode_that_is_cut_off_is_named(folder):
    for file in folder.glob("data/*/*.parquet"):
        changed(file, lambda table: table.iloc[:-2])
    with pytest.raises(InputError, match="4 rows of episode 3, as meta/episodes says; got 2"):
        Stored(folder)


def test_rows_out_of_the_order_of_time_are_refused(folder):
    for file in folder.glob("data/*/*.parquet"):
        changed(
            file, lambda table: table.iloc[[1, 0, *range(2, len(table))]].reset_index(drop=True)
        )
    with pytest.raises(InputError, match=r"in the order of time; got 0 s after 0.1 s in episode 0"):
        Stored(folder)


def test_rows_of_an_episode_in_two_places_are_refused(folder):
    for file in folder.glob("data/*/*.parquet"):
        changed(
            file,
            lambda table: table.iloc[[*range(3), *range(6, len(table)), *range(3, 6)]].reset_index(
                drop=True
            ),
        )
    with pytest.raises(InputError, match="episode 0 in several places"):
        Stored(folder)


def test_a_video_that_is_missing_is_named(videos):
    file = next(videos.glob("videos/observation.images.top/*/*.mp4"))
    file.unlink()
    with pytest.raises(InputError, match=r"no '.*mp4', which holds episodes 0, 1, 2, 3, 4"):
        Source(DataConfig(dataset=str(videos), cameras=CAMERAS))


@pytest.mark.parametrize("part", ["meta/tasks.parquet", "meta/episodes", "data"])
def test_a_folder_that_lacks_a_part_says_which(folder, part):
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(InputError, match=f"{part}.*no such file") as caught:
        Stored(folder)
    assert "connection" not in str(caught.value)


def test_a_folder_that_is_not_there_is_no_question_of_the_connection(tmp_path):
    for name in (
        str(tmp_path / "nowhere"),
        "./nowhere",
        "~/nowhere",
        "data/own/nowhere",
        "nowhere",
    ):
        with pytest.raises(
            InputError, match="a folder that is there, or owner/name on the Hub"
        ) as caught:
            Stored(name)
        assert "connection" not in str(caught.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file"):
        Stored(tmp_path / "file")
    with pytest.raises(
        InputError,
        match=r"no folder 'no/where' here, and of the Hub: .*correct the path, or the name",
    ):
        Stored("no/where")


def test_an_info_that_is_no_json_is_named(folder):
    (folder / "meta" / "info.json").write_text("{")
    with pytest.raises(InputError, match="JSON with codebase_version"):
        Stored(folder)


def test_a_format_that_is_not_known_is_refused(folder):
    info = json.loads((folder / "meta" / "info.json").read_text())
    (folder / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v9.0"}))
    with pytest.raises(InputError, match=r"v3\.0 .*'v9\.0'"):
        Stored(folder)


def test_two_cameras_of_one_key_are_refused():
    with pytest.raises(InputError, match="top' twice"):
        DataConfig(
            dataset="x",
            cameras={"front": "observation.images.top", "wrist": "observation.images.top"},
        )


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (None, None),
        (["a", "b", "c"], ("a", "b", "c")),
        (["a", "a", "b"], None),
        ({"motors": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"motors": ["a", "b"], "gripper": ["g"]}, ("a", "b", "g")),
        ([["a", "b", "c"]], ("a", "b", "c")),
        ({"b": 1, "a": 0, "c": 2}, ("a", "b", "c")),
        ("abc", None),
        (["x"], None),
        ({}, None),
        ([], None),
        ([1, 2, 3], ("1", "2", "3")),
    ],
)
def test_names_are_those_that_the_dataset_gives_each_number(names, found):
    assert names_of({"names": names, "shape": (3,)}) == found


def test_without_a_mapping_all_cameras_of_colours_are_taken_by_their_last_words(folder):
    source = Source(DataConfig(dataset=str(folder)))
    assert source.cameras == {"top": "observation.images.top", "hand": "observation.images.hand"}
    assert source.spec_fields(2)["cameras"] == ("top", "hand")


def png(array: np.ndarray) -> bytes:
    """A picture's file; of uint16 one of 16 bits, of float32 TIFF, as nothing else holds floats."""
    held = io.BytesIO()
    Image.fromarray(array).save(held, "TIFF" if array.dtype == np.float32 else "PNG")
    return held.getvalue()


@pytest.mark.parametrize("kind", [np.uint16, np.float32, np.int32])
def test_pictures_of_more_than_8_bits_are_no_colours(folder, kind):
    deep = np.linspace(300, 3000, 48 * 64).reshape(48, 64).astype(kind)
    for file in folder.glob("data/*/*.parquet"):
        changed(
            file,
            lambda table: table.assign(
                **{"observation.images.top": [{"bytes": png(deep), "path": None}] * len(table)}
            ),
        )
    source = Source(DataConfig(dataset=str(folder), cameras=CAMERAS))
    with pytest.raises(InputError, match=r"pictures of more than 8 bits.*data\.depth"):
        source.sample(0, 2, 1)
    known = Source(DataConfig(dataset=str(folder), cameras=CAMERAS, depth={"front": (0.2, 3.0)}))
    np.testing.assert_allclose(known.sample(0, 2, 1).observation.images["front"], deep, rtol=1e-6)


@pytest.mark.parametrize(
    ("unit", "kind", "metres"),
    [("mm", np.float32, True), ("m", np.float32, True), ("mm", np.uint16, False)],
)
def test_depths_have_the_unit_that_the_dataset_declares(folder, unit, kind, metres):
    """Floats are metres and integers millimetres, whatever they are stored as."""
    near = 700 if unit == "mm" else 0.7
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.images.top"]["info"] = {"is_depth_map": True, "depth_unit": unit}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    deep = np.full((48, 64), near, kind)
    for file in folder.glob("data/*/*.parquet"):
        changed(
            file,
            lambda table: table.assign(
                **{"observation.images.top": [{"bytes": png(deep), "path": None}] * len(table)}
            ),
        )
    found = (
        Source(DataConfig(dataset=str(folder), cameras=CAMERAS, depth={"front": (0.2, 3.0)}))
        .sample(0, 2, 1)
        .observation.images["front"]
    )
    np.testing.assert_allclose(found, 0.7 if metres else 700, rtol=1e-6)


def test_a_camera_that_is_flagged_as_depth_is_no_picture(folder):
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.images.top"]["info"] = {"is_depth_map": True}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"flags as depth maps.*data\.depth"):
        Source(DataConfig(dataset=str(folder), cameras=CAMERAS))
    assert list(Source(DataConfig(dataset=str(folder))).cameras) == ["hand"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda table: table.assign(task_index=[0.5, 1.0]), "whole numbers as task_index"),
        (lambda table: table.assign(task_index=["a", "b"]), "whole numbers as task_index"),
        (lambda table: table.assign(task_index=[0, None]), "whole numbers as task_index"),
        (lambda table: table.assign(task_index=[0, 0]), "one instruction for task_index 0"),
    ],
)
def test_numbers_of_sentences_that_are_none_are_named(folder, change, named):
    changed(folder / "meta" / "tasks.parquet", change)
    with pytest.raises(InputError, match=named):
        Stored(folder)


def test_a_column_that_is_no_numbers_is_named(folder):
    stored = Stored(folder)
    with pytest.raises(
        InputError, match=r"numbers in 'observation.images.top', as many in each row; got pictures"
    ):
        stored.column("observation.images.top")


@pytest.mark.parametrize("column", ["episode_index", "length"])
def test_a_column_that_the_episodes_lack_is_named(folder, column):
    for file in folder.glob("meta/episodes/*/*.parquet"):
        changed(file, lambda table: table.drop(columns=column))
    with pytest.raises(InputError, match=column):
        Stored(folder)


def test_where_videos_lie_is_named_where_it_is_not_said(videos):
    for file in videos.glob("meta/episodes/*/*.parquet"):
        changed(
            file, lambda table: table.drop(columns="videos/observation.images.top/from_timestamp")
        )
    with pytest.raises(InputError, match=r"where the videos of 'observation.images.top' lie"):
        Source(DataConfig(dataset=str(videos), cameras=CAMERAS))


def test_frames_late_in_a_long_file_are_found(videos, monkeypatch):
    """LeRobot compares times in float32, whose steps at half an hour are wider than the tolerance
    of a short file.
    """
    from lerobot.datasets import video_utils

    asked = []

    def decoded(file, times, tolerance, *others, **more):
        asked.append((times, tolerance))
        return torch.zeros(len(times), 3, 48, 64, dtype=torch.uint8)

    source = Source(DataConfig(dataset=str(videos), cameras=CAMERAS))
    monkeypatch.setattr(video_utils, "decode_video_frames", decoded)
    reader = source.pictures["front"]
    reader.places = {
        number: (file, first + 1800.0) for number, (file, first) in reader.places.items()
    }
    source.sample(5, 2, 1)
    ((time,), tolerance) = asked[0]
    exact = time + 1e-5  # as a video's clock has it
    assert abs(float(np.float32(exact)) - float(np.float32(time))) <= tolerance < 1 / source.fps / 2
    assert tolerance >= float(np.spacing(np.float32(1800)))
