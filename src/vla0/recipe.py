"""YAML and `key=value` → a frozen dataclass. Unknown keys are errors that name the nearest known one."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vla0.spec import InputError, refuse_unknown


def read_config(cls: type, file: str | Path, overrides: Sequence[str] = ()) -> Any:
    """A config of a YAML file with `key=value` overrides (dots go deeper). Raises InputError for an unknown key."""
    try:
        merged = OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except FileNotFoundError:
        raise InputError("a recipe (YAML)", f"'{file}', which is not there", "see configs/") from None
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise InputError(f"YAML in '{file}' and key=value", str(error).splitlines()[0], "correct it") from None
    return build(cls, content, str(file))


def build(cls: type, content: Any, where: str) -> Any:
    """A frozen dataclass of a mapping, dataclasses inside it too. Raises InputError for what does not fit."""
    if not isinstance(content, Mapping):
        raise InputError(f"a mapping in {where}", f"{content!r}", f"give keys of {cls.__name__}")
    types = typing.get_type_hints(cls)
    refuse_unknown(map(str, content), types, where)
    values = {}
    for key, value in content.items():
        kind = types[key]
        if dataclasses.is_dataclass(kind):
            value = build(typing.cast(type, kind), value, f"{where}: {key}")
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif kind in (int, float, str, bool) and type(value) is not kind:
            raise InputError(f"{key} as {kind.__name__} in {where}", f"{value!r}", "correct the recipe")
        values[key] = value
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for name in needed:
        if name not in values:
            raise InputError(f"'{name}' in {where}", "nothing", f"add {name}: {types[name]}")
    return cls(**values)
