import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_recipe

from vla0 import InputError, cli


@pytest.fixture
def vla0(monkeypatch, capsys):
    """Runs the command; (exit code, what it said on either stream)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vla0", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def refused(result, *words):
    code, _, err = result
    assert code == 2
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("vla0: expected ")
    assert all(word in last for word in words), last


def test_help_names_the_subcommands(vla0):
    code, out, _ = vla0("--help")
    assert code == 0
    assert all(name in out for name in ("collect", "train", "eval"))


def test_train_then_eval_refuses_what_does_not_fit(vla0, dataset, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe(dataset, tmp_path / "run")))
    code, out, _ = vla0("train", "--config", recipe, "training.num_steps=2")
    assert code == 0
    assert "checkpoint:" in out
    last = tmp_path / "run" / "last"
    refused(
        vla0("train", "--config", recipe, "training.num_steps=3"),
        "training.num_steps: 3 instead of 2",
    )
    refused(
        vla0("eval", "--checkpoint", last, "--task", "reach-v3"),
        "actions of 4 numbers",
        "3 in the checkpoint",
    )
    refused(
        vla0("eval", "--checkpoint", last, "--task", "reach-v3", "--suite", "object"),
        "suite",
        "--env libero",
    )
    refused(vla0("eval", "--checkpoint", last), "--task or --suite")
    spec = json.loads((last / "vla0.json").read_text())
    (last / "vla0.json").write_text(
        json.dumps(spec | {"low": [-1.0] * 4, "high": [1.0] * 4, "max_step_change": None})
    )
    refused(
        vla0("eval", "--checkpoint", last, "--task", "reach-v3", "--n-action-steps", "9"),
        "n_action_steps",
    )
    refused(
        vla0("eval", "--checkpoint", last, "--task", "reach-v3", "--n-action-steps", "0"),
        "n_action_steps in 1..",
    )  # not the default
    refused(
        vla0("eval", "--checkpoint", last, "--task", "reach-v3", "--n-action-steps", "2"),
        "would do nothing",
    )
    refused(
        vla0("eval", "--checkpoint", last, "--task", "reach-v3", "--baseline", "dark"),
        "a baseline of",
    )
    refused(
        vla0("eval", "--checkpoint", last, "--task", "reach-v3", "--approximate", "dark"), "mode"
    )
    (last / "vla0.json").unlink()
    refused(vla0("eval", "--checkpoint", last, "--task", "reach-v3"), "vla0.json", "vla0 train")


def test_bad_input_is_one_line_and_exit_code_2(vla0, dataset, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe(dataset, tmp_path / "run")))
    refused(vla0("train", "--config", tmp_path / "none.yaml"), "configs/")
    refused(
        vla0("train", "--config", recipe, "learning_rat=1"),
        "did you mean 'training.learning_rate'?",
    )
    refused(vla0("train", "--config", recipe, "action.action_bins=1"), "bins", "1000")
    refused(vla0("train", "--config", recipe, "data.action=actoin"), "key 'actoin'")
    refused(vla0("train", "--config", recipe, "training.lr_scheduler=cosinus"), "cosinus")
    refused(vla0("train", "--config", recipe, "data.dataset=/nowhere"), "a folder that is there")
    refused(vla0("train", "--config", recipe, "simulator.task=[a]"), "did you mean 'tasks'?")
    refused(
        vla0("eval", "--checkpoint", "/nowhere", "--task", "reach-v3"),
        "checkpoint folder or Hub id",
    )
    refused(
        vla0("collect", "metaworld", "--task", "make-coffee", "--out", tmp_path / "data"),
        "Meta-World task",
    )
    refused(vla0("collect", "gazebo", "--task", "x", "--out", tmp_path / "data"), "metaworld")
    assert not (tmp_path / "run" / "last").exists()


def test_inspect_makes_the_pages_folder_and_writes_a_recipe_for_train(vla0, dataset, tmp_path):
    own, page = tmp_path / "mine.yaml", tmp_path / "new" / "page.html"
    code, out, _ = vla0("inspect", dataset, "--write-config", own, "--out", page)
    assert code == 0
    assert page.is_file()
    said = " ".join(out.split())
    assert f"config: {own}" in said
    assert "for another: --config FILE" in said
    refused(vla0("inspect", dataset, "--write-config", own), "mine.yaml", "name another")
    refused(
        vla0("inspect", dataset, "--write-config", tmp_path / "b.yaml", "--config", own),
        "--write-config",
        "both",
    )


def test_usage_errors_have_exit_code_2(vla0):
    assert vla0("train")[0] == 2
    assert vla0("fly")[0] == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            "eval --checkpoint x --task touch-cube --env arm --option start=above",
            "no options for arm",
        ),
        ("eval --checkpoint x --task drawer-close-v3 --option start=below", "start of"),
        ("eval --checkpoint x --task drawer-close-v3 --option start", "--option KEY=VALUE"),
        ("eval --checkpoint x --task drawer-close-v3 --option quick=true", "unknown key 'quick'"),
        ("eval --checkpoint x --task drawer-close-v3 --separate y", "--ablation for --separate"),
        (
            "eval --checkpoint x --task drawer-close-v3 --ablation --n-action-steps 2",
            "no --ablation",
        ),
        ("collect arm --task touch-cube --out x --fps 40", "no fps for arm"),
        (
            "collect metaworld --task drawer-close-v3 --out x --option quick=true",
            "unknown key 'quick'",
        ),
        ("serve --checkpoint x --n-action-steps 2", "--ensemble for --n-action-steps"),
        ("serve --checkpoint x --tls-key x", "--tls-cert for --tls-key"),
        ("serve --checkpoint x --engine vllm", "--base-url for --engine"),
        ("serve --checkpoint x --base-url http://x --device cpu", "no --base-url"),
        ("serve --checkpoint x --protocol vla-eval --rate 3", "--protocol openpi"),
        ("robot --instruction go --weights mean", "--mode ensemble for --weights"),
        ("robot --instruction go --mode ensemble --n-action-steps 2", "--mode sync or async"),
        ("robot --instruction go --resample", "--fps for --resample"),
        ("robot --instruction go --out x", "--live and --record for --out"),
        ("bench decode --out x", "--certify for --out"),
        ("bench decode --certify 2 --chunks 3", "no --certify"),
        ("bench decode --calibrate --batch 3", "no --calibrate"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(vla0, words, named):
    refused(vla0(*words.split()), named)


HEAVY = ("torch", "transformers", "lerobot", "datasets")
TOLD = f"""
import sys
from vla0 import InputError, cli
try:
    cli.main()
except SystemExit as end:
    print(end.code, [name for name in {HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize(
    "words",
    [
        "train --config configs/demo.yaml traning.num_steps=3",
        "train --config configs/demo.yaml training.num_steps=many",
        "train --config configs/demo.yaml simulator.task=[a]",
        "train --config configs/demo.yaml data.dataset=/nowhere",
        "rl --config configs/rl_demo.yaml rolouts.groups=2",
        "rl --config configs/rl_demo.yaml rollouts.temperature=0",
        "rl --config configs/rl_demo.yaml checkpoint=/nowhere",
        "rl --config configs/rl_offline.yaml --offline /nowhere",
        "rl --config configs/rl_offline.yaml --offline /nowhere episodes=good",
        "eval --checkpoint /nowhere --task drawer-close-v3",
        "eval --checkpoint x --env gazebo --task x",
        "serve --checkpoint /nowhere",
        "serve --checkpoint x --key front",
        "inspect --config configs/demo.yaml data.camera=x",
        "inspect /nowhere/at/all",
        "collect gazebo --out x",
        "robot --instruction go --limits /nowhere",
        "bench decode --config /nowhere",
    ],
)
def test_what_is_wrong_with_a_command_is_told_before_anything_heavy_is_imported(words):
    found = subprocess.run(
        [sys.executable, "-c", TOLD, *words.split()],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert found.stdout.splitlines()[-1] == "2 []"
    assert found.stderr.startswith("vla0: expected ")
    assert len(found.stderr.strip().splitlines()) == 1


def test_libraries_that_talk_of_themselves_are_not_heard(tmp_path):
    """In processes that are started from here, too."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    for name in ("one", "other", "third"):
        (tmp_path / f"{name}.py").write_text(f'"""invalid {chr(92)}. escape"""')

    def said(code):
        found = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        return found.returncode, found.stdout, found.stderr

    child = "subprocess.run([sys.executable, '-c', 'import other'])"
    assert said(f"import subprocess, sys, vla0.quiet; vla0.quiet.hush(); import one; {child}") == (
        0,
        "",
        "",
    )
    assert "SyntaxWarning" in said("import third")[2]  # as it would be without


@pytest.mark.parametrize(
    ("words", "now"),
    [
        ("eval --checkpoint x --replan 8", "--n-action-steps"),
        ("eval --checkpoint x --replan=8", "--n-action-steps"),
        ("eval --checkpoint x --inexact int8", "--approximate"),
        ("eval --checkpoint x --control blank", "--baseline"),
        ("robot --way sync", "--mode"),
        ("bench decode --recipe x.yaml", "--config"),
        ("eval --checkpoint x --start above", "--option start="),
        ("collect libero --quick", "--option quick=true"),
        ("eval --checkpoint x --assets y", "pip install 'vla0[libero]'"),
        ("bench train", "benchmarks/training.py"),
        ("bench data", "benchmarks/reading.py"),
        ("download libero-assets", "pip install 'vla0[libero]'"),
    ],
)
def test_a_flag_of_before_is_refused_with_its_name_of_now(vla0, words, now):
    refused(vla0(*words.split()), now)


def test_a_baseline_of_before_is_refused_with_its_name_of_now(vla0, dataset, tmp_path):
    refused(
        vla0("eval", "--checkpoint", tmp_path, "--task", "reach-v3", "--baseline", "exchanged"),
        "called 'swapped' now",
    )


def test_a_config_of_before_is_refused_with_its_names_of_now(vla0, dataset, tmp_path):
    config = make_recipe(dataset, tmp_path / "run")
    config["data"]["relative"] = [0]
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    refused(
        vla0("train", "--config", tmp_path / "config.yaml"),
        "'relative'",
        "called 'relative_dims' now",
    )


@pytest.mark.parametrize("turned_into", [None, ImportError, InputError])
def test_an_interrupt_is_one_whatever_a_module_that_is_being_loaded_makes_of_it(
    vla0, monkeypatch, turned_into
):
    """pybind11 raises ImportError from it, and that may look like a missing package."""

    def loading(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            if turned_into is None:
                raise
            if turned_into is ImportError:
                raise ImportError("initialization failed") from error
            raise InputError("torchao, for int8", "none installed", "install it") from None

    monkeypatch.setattr(cli, "app", loading)
    code, _, err = vla0("train")
    assert code == 130
    assert err == "vla0: interrupted; the same command goes on where it stopped\n"


def test_a_package_that_cannot_be_loaded_is_no_interrupt(vla0, monkeypatch):
    def loading(*_, **__):
        raise ImportError("libGL.so.1")

    monkeypatch.setattr(cli, "app", loading)
    with pytest.raises(ImportError, match="libGL"):
        vla0("train")
