"""Acting in real time, safely: pacing, limits, watchdog, stop.

Imports no torch: the model may be elsewhere.
"""
