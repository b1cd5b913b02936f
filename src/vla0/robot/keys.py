"""What stops a robot from where its operator sits: keys, Ctrl-C, a hang-up."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

STOP_KEYS = ("space", "esc", "q")
KEYS = "space, esc or q stops the robot; right ends the episode; left ends it and forgets it"


@contextlib.contextmanager
def listening(session: Any) -> Iterator[None]:
    """Keys, where there is a terminal; and a hang-up or SIGTERM is as good as Ctrl-C."""
    from lerobot.utils.keyboard_input import create_key_listener

    pressed: list[float] = []

    def interrupt(number: int, frame: Any) -> None:
        pressed.append(time.monotonic())
        session.stop(signal.Signals(number).name)
        if session.saving and len(pressed) < 4:
            session.told(f"the robot has stopped, and the episode is being saved; {4 - len(pressed)} times more give it up")
        elif pressed[-1] - pressed[0] > 1.0:  # the loop has not ended by itself
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    kinds = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)) if main else ()
    before = {kind: signal.signal(kind, interrupt) for kind in kinds}
    listener = create_key_listener(session.key, controls_help=KEYS)
    try:
        yield
    finally:
        if listener is not None:
            listener.stop()
        for kind, handler in before.items():
            signal.signal(kind, handler)
