"""LeRobot's own steps around the policy; none of them changes a number."""

from typing import Any

from lerobot.processor import make_default_pre_post_processors


def make_vla0_pre_post_processors(config: Any, dataset_stats: Any = None) -> tuple[Any, Any]:
    """(preprocessor, postprocessor): names, batches and devices; pictures, states and actions as
    they are.
    """
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
