"""vla0: an unmodified vision-language model as a robot policy. It writes its actions as text."""

from typing import Any

from vla0.errors import InputError
from vla0.spec import Observation, Spec

__all__ = ["VLA0", "InputError", "Observation", "Spec"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """VLA0 on first use: a robot's side that needs the nouns alone does not wait for torch."""
    if name == "VLA0":
        from vla0.policy import VLA0

        return VLA0
    raise AttributeError(f"module 'vla0' has no attribute '{name}'")
