"""VLA-0 as a LeRobot policy. LeRobot imports this, and finds the rest by name."""

from lerobot_policy_vla0.configuration_vla0 import VLA0Config
from lerobot_policy_vla0.libero_states import write_states

__all__ = ["VLA0Config"]

write_states()
