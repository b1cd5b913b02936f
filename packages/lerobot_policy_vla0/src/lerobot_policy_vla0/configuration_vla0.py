"""What `--policy.*` may say, beside what LeRobot gives every policy."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from vla0.core.ensemble import NONE
from vla0.core.spec import SYSTEM, Spec
from vla0.data.config import Augmentation


@PreTrainedConfig.register_subclass("vla0")
@dataclass(kw_only=True)
class VLA0Config(PreTrainedConfig):
    """Defaults are the published ones."""

    # Hub id or folder of the model that is fine-tuned
    model_name: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    chunk_size: int = Spec.chunk_size
    n_action_steps: int | None = None  # executed of a chunk; None: all
    temporal_ensemble: str = NONE  # weights by age: mean, v1 or v2:w
    action_bins: int = Spec.bins
    image_size: int = Spec.image_size
    crop: float = Spec.crop
    tile: bool = Spec.tile
    system: str = SYSTEM
    use_state: bool = False  # in the prompt, as integers
    freeze_vision_encoder: bool = False
    gradient_checkpointing: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimizer_lr: float = 5e-6
    optimizer_weight_decay: float = 1e-10
    optimizer_grad_clip_norm: float = 0.0
    # vla0.json, once it is known: what acting has to agree on with training
    spec: str | None = None
    # of lerobot-rollout; here the committed steps are exact and need no settings
    rtc_config: RTCConfig | None = None

    # vla0 maps actions and states to integers by its own Spec, so that LeRobot has nothing to
    # normalise.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(
            ("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY
        )
    )

    @property
    def observation_delta_indices(self) -> None:
        """The present alone."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """The chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """None are used."""
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW, as published."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> None:
        """A constant rate, as published."""
        return None

    def validate_features(self) -> None:
        """Raises ValueError without a picture or an action."""
        if not self.image_features or self.action_feature is None:
            raise ValueError(
                "vla0 needs a camera and an action: see input_features and output_features"
            )


def _reading(read: Any) -> Any:
    """LeRobot's reader of config.json refuses unknown keys.

    In a checkpoint of vla0 those of transformers stand beside its own: of such a file it is given
    its own alone. (No decoder of draccus' can do that: a choice may not have one.)
    """

    def from_pretrained(cls: type, pretrained_name_or_path: str | Path, **settings: Any) -> Any:
        asked = {
            name: settings[name]
            for name in ("revision", "cache_dir", "token", "local_files_only")
            if name in settings
        }
        local = Path(pretrained_name_or_path).is_dir()
        file = Path(pretrained_name_or_path) / CONFIG_NAME
        if not local:
            file = Path(hf_hub_download(str(pretrained_name_or_path), CONFIG_NAME, **asked))
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if content.get("type") != "vla0" or "model_type" not in content:
            return read(cls, pretrained_name_or_path, **settings)
        known = {"type", *(field.name for field in fields(VLA0Config))}
        with TemporaryDirectory() as folder:
            own = {key: value for key, value in content.items() if key in known}
            (Path(folder) / CONFIG_NAME).write_text(json.dumps(own), encoding="utf-8")
            return read(
                cls,
                folder,
                **{name: value for name, value in settings.items() if name not in asked},
            )

    return classmethod(from_pretrained)


PreTrainedConfig.from_pretrained = _reading(PreTrainedConfig.from_pretrained.__func__)
