"""Adapters that `lerobot-train --peft` learned → an ordinary checkpoint."""

from pathlib import Path

from lerobot.configs import PreTrainedConfig
from peft import PeftConfig, PeftModel

from lerobot_policy_vla0.modeling_vla0 import VLA0Policy
from vla0.checkpoint import io as models
from vla0.core.spec import Spec
from vla0.errors import InputError
from vla0.train.lora import merged


def merge(adapters: str | Path, out: str | Path) -> Spec:
    """Writes the checkpoint `out` of a `pretrained_model` with adapters, and gives its Spec."""
    config = PreTrainedConfig.from_pretrained(adapters)
    learned = PeftConfig.from_pretrained(str(adapters))
    if config.type != "vla0" or not learned.base_model_name_or_path:
        raise InputError(
            "adapters of a vla0 policy, and the name of its model",
            f"'{adapters}'",
            "train with --policy.type=vla0",
        )
    config.device = "cpu"
    policy = VLA0Policy.from_pretrained(learned.base_model_name_or_path, config=config)
    wrapped = PeftModel.from_pretrained(policy, str(adapters))
    weights = {
        name.removeprefix("model."): weight for name, weight in (merged(wrapped) or {}).items()
    }
    models.save(out, policy.model, policy.vla.processor, policy.vla.specs, weights)
    return policy.vla.spec
