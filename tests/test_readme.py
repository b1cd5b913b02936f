"""What the README shows is true."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import make_spec

from vla0.policy import VLA0
from vla0.rl.config import OfflineConfig, RLConfig
from vla0.train.config import TrainConfig, build, read_config, read_yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs(policy, processor, tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    VLA0(
        policy.model, processor, make_spec(cameras=("front",), state=None, chunk_size=4)
    ).save_pretrained(tmp_path / "checkpoint")
    names = {}
    exec(example.replace("runs/demo/train/last", str(tmp_path / "checkpoint")), names)
    assert names["action"].shape == (3,)


def test_the_line_count_is_what_its_command_says():
    claimed, command = re.search(r"The method itself is ([\d,]+) lines: `(.*?)`", README).groups()
    counted = int(
        subprocess.run(
            ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    )
    assert abs(int(claimed.replace(",", "")) - counted) <= 50


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml"), key=str))
def test_recipes_are_understood(recipe):
    if recipe.name.startswith("rl_"):
        offline = recipe.name == "rl_offline.yaml"
        kind, more = (OfflineConfig, ["data.dataset=x"]) if offline else (RLConfig, [])
        build(kind, read_yaml(recipe, more), recipe.name)
        return
    teacher = ["model.teacher=somewhere"] if "teacher: ???" in recipe.read_text() else []
    read_config(TrainConfig, recipe, ["data.dataset=somewhere", *teacher])


def test_every_command_is_there_after_make_install():
    """In the environment that README says to activate; `uv` is not on a bare machine's path."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [
        line
        for block in blocks
        for line in block.splitlines()
        if line and not line.startswith((" ", "#"))
    ]
    words = {line.split()[0] for line in lines}
    assert words <= {
        "make",
        "vla0",
        "python",
        "pip",
        "lerobot-train",
        "lerobot-eval",
        "lerobot-rollout",
    }
    assert README.index("source .venv/bin/activate") < README.index("vla0 inspect")
    assert "uv run" not in README


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
