"""vla0: an unmodified vision-language model as a robot policy. It writes its actions as text."""

import os
from typing import Any

from vla0.errors import InputError
from vla0.spec import Observation, Spec

__all__ = ["VLA0", "InputError", "Observation", "Spec"]
__version__ = "0.1.0"

# OpenMP's threads spin where they wait for each other. Beside a busy process the one that is waited for has no core then, and
# torch takes ten times as long and more (benchmarks/shared_cores.py). Read when torch is loaded, so it is said before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    """VLA0 on first use: a robot's side that needs the nouns alone does not wait for torch."""
    if name == "VLA0":
        from vla0.policy import VLA0

        return VLA0
    raise AttributeError(f"module 'vla0' has no attribute '{name}'")
