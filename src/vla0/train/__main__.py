"""`torchrun -m vla0.train --config ...` is `vla0 train --config ...`, in each of its processes."""

import runpy
import sys

sys.argv.insert(1, "train")
runpy.run_module("vla0", run_name="__main__")
