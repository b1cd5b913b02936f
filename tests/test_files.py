"""Laws of folders that are written completely or not at all."""

import os

import pytest

from vla0.errors import InputError
from vla0.files import unfinished, whole_folder


def test_a_folder_appears_when_its_writing_has_ended_and_not_before(tmp_path):
    place = tmp_path / "deep" / "out"
    with whole_folder(place) as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
        assert not place.exists()
    assert (place / "a").read_text() == "1"
    assert os.listdir(place.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, error):
    place = tmp_path / "out"
    place.mkdir()
    (place / "mark").write_text("old")
    with pytest.raises(error), whole_folder(place, "mark") as partial:  # noqa: PT012
        partial.mkdir()
        (partial / "mark").write_text("new")
        raise error
    assert (place / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_only_a_folder_with_the_marker_is_replaced(tmp_path):
    place = tmp_path / "out"
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    for marker in ("mark", None):
        with pytest.raises(InputError, match="name another"), whole_folder(place, marker):
            raise AssertionError("refused before anything is written")
    (place / "mark").touch()
    with whole_folder(place, "mark") as partial:
        partial.mkdir()
    assert list(place.iterdir()) == []


def test_files_that_come_while_the_folder_is_written_are_not_overwritten(tmp_path):
    place = tmp_path / "out"
    refused = pytest.raises(InputError, match="other files")
    with refused, whole_folder(place, "mark") as partial:
        partial.mkdir()
        place.mkdir()
        (place / "thesis.tex").write_text("years of work")
    assert (place / "thesis.tex").read_text() == "years of work"


def test_what_a_kill_leaves_is_found_by_the_name_of_its_folder(tmp_path):
    for name in (".out.partial-17", ".out.old-17", ".out.partial", ".outer.partial-1", "out"):
        (tmp_path / name).mkdir()
    found = sorted(folder.name for folder in unfinished(tmp_path, "out"))
    assert found == [".out.old-17", ".out.partial", ".out.partial-17"]
