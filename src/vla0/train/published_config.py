"""Translate a config in the spelling of the method's public write-up into ours.

That spelling has sections in capitals, DATALOADER and fp16.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from vla0.errors import InputError

logger = logging.getLogger(__name__)

SECTIONS = {"dataloader": "data", "dataset": "data"}  # theirs → ours
# keys of ROBOVERSE that say where the data are
PLACES = ("dataset_path", "data_path", "dataset_dir", "data_dir", "path", "root", "repo_id")
# keys of our data section that ROBOVERSE may have
OWN = ("dataset", "cameras", "action", "state", "num_workers", "revision")
# one option of cfg_opts, which reads like "IMAGE.crop_img:0.875:IMAGE.img_size:224"
OPTION = re.compile(r"([A-Z]+\.\w+):(.*?)(?=:[A-Z]+\.\w+:|$)")
# an option of cfg_opts → our section, our key, and its type
MEANT: dict[str, tuple[str, str, Any]] = {
    "IMAGE.crop_img": ("spec", "crop", float),
    "IMAGE.img_size": ("spec", "image_size", int),
    "LEROBOT.repo_id": ("data", "dataset", str),
    "LEROBOT.action_key": ("data", "action", str),
    "LEROBOT.state_key": ("data", "state", str),
}


def ours(content: Any) -> Any:
    """Translate a config to our names.

    The log says which key is taken for which of ours, and which has no meaning here.

    Args:
        content: The content of the config file. Anything but a mapping is returned as it is.

    Raises:
        InputError: When two sections become one and contradict each other.
    """
    if not isinstance(content, Mapping):
        return content
    translated: dict[str, Any] = {}
    for name, section in content.items():
        lower = str(name).lower()
        section_name = SECTIONS.get(lower, lower)
        if isinstance(section, Mapping):
            section = {
                str(key).lower() if str(key).isupper() else key: value
                for key, value in section.items()
            }
            before = translated.get(section_name, {})
            if twice := [key for key in section if key in before and before[key] != section[key]]:
                raise InputError(
                    f"one value of {section_name}.{twice[0]}",
                    f"{before[twice[0]]} and {section[twice[0]]}",
                    "remove one",
                )
            section = {**before, **section}
        translated[section_name] = section
    for translate in (_data, _precision):
        translate(translated)
    return translated


def _data(translated: dict[str, Any]) -> None:
    """Translate the settings of their data loader, as far as they mean something here."""
    data = translated.get("data")
    if not isinstance(data, dict) or not ("roboverse" in data or "batch_size" in data):
        return
    if "batch_size" in data:
        translated.setdefault("training", {}).setdefault("batch_size", data.pop("batch_size"))
    for key, value in (data.pop("roboverse", None) or {}).items():
        name = f"DATALOADER.ROBOVERSE.{key}"
        if key in OWN:
            data.setdefault(key, value)
        elif key in PLACES and "dataset" not in data:
            logger.info("%s is taken for data.dataset", name)
            data["dataset"] = value
        elif key == "cfg_opts":
            _options(translated, name, str(value))
        else:
            logger.warning(
                "%s has no meaning here: its data are a LeRobot dataset, data.dataset", name
            )


def _options(translated: dict[str, Any], name: str, options: str) -> None:
    """Translate the options in the text of cfg_opts."""
    for option, value in OPTION.findall(options):
        if option not in MEANT:
            logger.warning("%s: %s has no meaning here", name, option)
            continue
        section, key, kind = MEANT[option]
        try:
            translated.setdefault(section, {}).setdefault(key, kind(value))
        except ValueError:
            raise InputError(
                f"{option} as {kind.__name__} in {name}", f"'{value}'", "correct it"
            ) from None
        logger.info("%s: %s is taken for %s.%s", name, option, section, key)


def _precision(translated: dict[str, Any]) -> None:
    """Translate the keys fp16 and bf16, which are those of transformers."""
    training = translated.get("training")
    if not isinstance(training, dict):
        return
    fp16, bf16 = training.pop("fp16", None), training.pop("bf16", None)
    if fp16:
        logger.warning(
            "training.fp16 is taken as mixed precision, in bf16: with fp16 the method was found "
            "to diverge"
        )
    if fp16 or bf16:
        training.setdefault("precision", "bf16")
    elif fp16 is False or bf16 is False:
        training.setdefault("precision", "fp32")
        logger.info("training.fp16 or bf16 is off: precision %s", training["precision"])
