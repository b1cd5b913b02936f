"""vla0: an unmodified vision-language model as a robot policy. It writes its actions as text."""

import os
from typing import TYPE_CHECKING, Any

from vla0.core.spec import Observation, Spec
from vla0.errors import InputError

if TYPE_CHECKING:
    from vla0.policy import VLA0

__all__ = ["VLA0", "InputError", "Observation", "Spec"]
__version__ = "0.1.0"

# OpenMP's threads spin where they wait for each other. Beside a busy process the one that is waited
# for has no core then, and torch takes many times as long; threads that sleep at once take longer
# where they are alone. benchmarks/shared_cores.py tells how this was chosen. It is read when torch
# is loaded, here and in processes that are started from here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def __getattr__(name: str) -> Any:
    """VLA0 on first use: a robot's side that needs the nouns alone does not wait for torch."""
    if name == "VLA0":
        from vla0.policy import VLA0

        return VLA0
    raise AttributeError(f"module 'vla0' has no attribute '{name}'")
