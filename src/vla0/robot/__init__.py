"""Acts in real time and safely: pacing, limits, watchdog, stop.

This package imports no torch: the model may run on another machine.
"""
