"""Simulators, experts in them, and evaluation."""

import os
import sys

# Read when mujoco is imported, which the modules here do.
os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
# Mesa in software: a thread beside each simulator only slows it down
os.environ.setdefault("LP_NUM_THREADS", "0")
