"""Keys and signals with which an operator stops a robot: keys, Ctrl-C, a hang-up."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

STOP_KEYS = ("space", "esc", "q")
VERDICTS = {"s": True, "f": False}  # end the episode, which succeeded or failed
KEYS = (
    "space, esc or q stops the robot; right ends the episode; s ends it as a success, f as a "
    "failure; left ends it and forgets it"
)


class Flag:
    """An event that a signal handler may set.

    threading.Event is not safe there: its `set` may wait for a lock that the signal interrupted.
    """

    def __init__(self):
        self.up = False

    def set(self) -> None:
        """Set the flag."""
        self.up = True

    def clear(self) -> None:
        """Clear the flag."""
        self.up = False

    def is_set(self) -> bool:
        """Tell whether the flag is set."""
        return self.up

    def wait(self, seconds: float) -> bool:
        """Wait until the flag is set, at most some seconds; return whether it is set."""
        until = time.monotonic() + seconds
        while not self.up and time.monotonic() < until:
            time.sleep(min(0.02, seconds))
        return self.up


@contextlib.contextmanager
def listening(session: Any) -> Iterator[None]:
    """Pass keys and signals to a session, for as long as the context lasts.

    Keys are read if there is a terminal. SIGTERM and a hang-up do the same as Ctrl-C.

    Args:
        session: The RobotSession; its `key` and `stop` are called.
    """
    from lerobot.utils.keyboard_input import create_key_listener

    pressed: list[float] = []

    def interrupt(number: int, frame: Any) -> None:
        pressed.append(time.monotonic())
        session.stop(signal.Signals(number).name)
        if session.saving and len(pressed) < 4:
            # the signal may have interrupted a write to the same stream
            with contextlib.suppress(RuntimeError):
                session.told(
                    f"the robot has stopped, and the episode is being saved; {4 - len(pressed)} "
                    f"times more give it up"
                )
        elif pressed[-1] - pressed[0] > 1.0:  # the loop has not ended by itself
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    kinds = (
        (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)) if main else ()
    )
    before = {kind: signal.signal(kind, interrupt) for kind in kinds}
    listener = create_key_listener(session.key, controls_help=KEYS)
    try:
        yield
    finally:
        if listener is not None:
            listener.stop()
        for kind, handler in before.items():
            signal.signal(kind, handler)
