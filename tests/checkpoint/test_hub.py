"""Fetching by name; the Hub itself is not reached here, its answer is a folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_dataset
from made_datasets import downgraded, source_of

from vla0 import InputError
from vla0.checkpoint.hub import KNOWN, download, push


@pytest.fixture
def hub(monkeypatch):
    """What the Hub holds: {id: folder}."""
    import huggingface_hub

    holds: dict[str, Path] = {}

    def fetch(repo_id, repo_type, local_dir):
        assert repo_type == "dataset"
        shutil.copytree(holds[repo_id], local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return holds


@pytest.mark.parametrize("name", ["libero", "libero-images", "nobody/nothing"])
def test_offline_is_one_line_that_says_what_to_do(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vla0", "download", name, "--out", str(tmp_path / "x")],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert KNOWN.get(name, name) in done.stderr
    assert "the same command goes on" in done.stderr


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'libero-images'"):
        download("libero-image")


def test_a_dataset_of_v21_is_converted_where_it_lies(hub, tmp_path):
    hub["somebody/old"] = downgraded(make_dataset(tmp_path / "old", lengths=(3, 4)))
    whole = source_of(make_dataset(tmp_path / "whole", lengths=(3, 4)))
    folder = download("somebody/old", tmp_path / "here")
    np.testing.assert_array_equal(source_of(folder).actions, whole.actions)


def test_a_dataset_of_v20_is_converted_too(hub, tmp_path):
    old = hub["somebody/older"] = downgraded(make_dataset(tmp_path / "old", lengths=(3, 4)))
    (old / "meta" / "episodes_stats.jsonl").unlink()
    info, stats = (
        json.loads((old / "meta" / name).read_text()) for name in ("info.json", "stats.json")
    )
    (old / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v2.0"}))
    known = ("min", "max", "mean", "std")
    plain = {key: {name: own[name] for name in known} for key, own in stats.items()}
    (old / "meta" / "stats.json").write_text(json.dumps(plain))
    whole = source_of(make_dataset(tmp_path / "whole", lengths=(3, 4)))
    source = source_of(download("somebody/older", tmp_path / "here"))
    np.testing.assert_array_equal(source.actions, whole.actions)
    for name in known:
        for key in ("action", "observation.state"):
            np.testing.assert_allclose(
                source.dataset.meta.stats[key][name], stats[key][name], rtol=1e-5
            )


def test_what_is_no_dataset_or_too_old_is_refused(hub, tmp_path):
    hub["somebody/thing"] = tmp_path / "thing"
    (tmp_path / "thing" / "meta").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no meta/info\.json"):
        download("somebody/thing", tmp_path / "one")
    (tmp_path / "thing" / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v1.6"}))
    with pytest.raises(InputError, match=r"got v1\.6"):
        download("somebody/thing", tmp_path / "two")


def test_a_checkpoint_is_pushed_whole_and_without_pickles(policy, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    policy.save_pretrained(tmp_path / "step-000001")
    (tmp_path / "last").symlink_to("step-000001")
    (tmp_path / "last" / "optimizer.pt").write_bytes(b"pickle")
    made, sent = [], []
    monkeypatch.setattr(
        HfApi,
        "create_repo",
        lambda self, repo, private, exist_ok: made.append((repo, private, exist_ok)),
    )

    def upload(self, repo_id, folder_path, ignore_patterns, commit_message):
        from huggingface_hub.utils import filter_repo_objects

        names = [file.name for file in Path(folder_path).iterdir()]
        sent.extend(filter_repo_objects(names, ignore_patterns=ignore_patterns))
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert push(tmp_path / "last", "me/arm", private=True) == "https://huggingface.co/me/arm"
    assert made == [("me/arm", True, True)]
    assert {"model.safetensors", "vla0.json", "tokenizer.json"} <= set(sent)
    assert "optimizer.pt" not in sent


def test_what_cannot_be_pushed_is_one_line(policy, tmp_path):
    policy.save_pretrained(tmp_path / "good")
    for folder, message in (
        (tmp_path, "checkpoint folder"),
        (tmp_path / "good", "leave to write 'me/arm'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "vla0", "push", str(folder), "me/arm"],
            capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert message in done.stderr
