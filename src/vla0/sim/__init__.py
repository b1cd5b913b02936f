"""Simulators, experts in them, and evaluation."""

import os
import sys

# mujoco reads this when the modules here import it.
os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
# When Mesa draws in software, a drawing thread beside each simulator only slows it down.
os.environ.setdefault("LP_NUM_THREADS", "0")
