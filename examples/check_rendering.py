"""Exit code 0 where MuJoCo can draw without a screen."""

import os
import sys

os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")

try:
    import mujoco

    context = mujoco.GLContext(64, 64)  # type: ignore[attr-defined]
    context.make_current()
    context.free()
except Exception as error:  # a missing library shows itself in as many ways as there are drivers
    print(f"headless rendering does not work yet: {type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)
