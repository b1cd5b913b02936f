"""Write the files that LeRobot needs to open a checkpoint with `--policy.path=FOLDER`.

packages/lerobot_policy_vla0 is the policy that it then loads.
"""

import json
from pathlib import Path
from typing import Any

from vla0.core.spec import Spec


def describe(folder: Path, spec: Spec) -> None:
    """Add LeRobot's keys to config.json, and write its processing steps, which change no number.

    Images are expected under LeRobot's own names, `observation.images.CAMERA`; its option
    --rename_map maps others to them.

    Args:
        folder: Checkpoint folder with the config.json of transformers.
        spec: The Spec of the checkpoint.
    """
    side = [3, spec.image_size, spec.image_size]
    inputs: dict[str, Any] = {
        f"observation.images.{camera}": {"type": "VISUAL", "shape": side} for camera in spec.cameras
    }
    if spec.state is not None:
        inputs["observation.state"] = {"type": "STATE", "shape": [len(spec.state[0])]}
    outputs = {"action": {"type": "ACTION", "shape": [spec.dimensions]}}
    policy_config = {
        "type": "vla0",
        "chunk_size": spec.chunk_size,
        "input_features": inputs,
        "output_features": outputs,
    }
    file = folder / "config.json"
    _write(file, json.loads(file.read_text(encoding="utf-8")) | policy_config)
    unchanged = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY")
    device = ("device_processor", {"device": "cpu", "float_dtype": None})
    before = [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        device,
        (
            "normalizer_processor",
            {"eps": 1e-8, "features": inputs | outputs, "norm_map": unchanged},
        ),
    ]
    after = [
        ("unnormalizer_processor", {"eps": 1e-8, "features": outputs, "norm_map": unchanged}),
        device,
    ]
    for name, steps in {"policy_preprocessor": before, "policy_postprocessor": after}.items():
        content = [{"registry_name": step, "config": config} for step, config in steps]
        _write(folder / f"{name}.json", {"name": name, "steps": content})


def _write(file: Path, content: Any) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
