"""Run `vla0 train --config ...` in each process of `torchrun -m vla0.train --config ...`."""

import runpy
import sys

sys.argv.insert(1, "train")
runpy.run_module("vla0", run_name="__main__")
