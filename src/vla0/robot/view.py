"""Shows a robot in rerun: camera pictures, joint positions, predicted actions, sent commands."""

import atexit
import logging
import socket
import sys
import time
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vla0.errors import InputError, said
from vla0.robot.lerobot_robot import INSTALL, LeRobotBody
from vla0.robot.loop import Tick

logger = logging.getLogger(__name__)

LINES = {"is": (140, 140, 140), "predicted": (80, 160, 255), "sent": (255, 150, 40)}
PORT = 9876  # default port of rerun's viewer


class View:
    """Sends the steps of a loop to rerun.

    rerun waits without end for a viewer that is slow, gone or closed. A thread of its own therefore
    calls it, so that the loop and the end of a session do not wait.

    Args:
        to: "window" opens rerun's viewer, FILE.rrd is a file to write, rerun+http://... is the
            address of a viewer elsewhere.
        body: The robot.
        fps: Steps a second.

    Raises:
        InputError: rerun is not installed, `to` is none of these, or no viewer answers.
    """

    def __init__(self, to: str, body: LeRobotBody, fps: float):
        try:
            import rerun
        except ImportError as error:
            raise InputError("rerun", str(error), INSTALL) from None
        self.rerun, self.body, self.fps = rerun, body, fps
        self.waiting: Queue[Any] = Queue(64)
        self.missed = 0
        self.stream = rerun.RecordingStream("vla0 robot")
        atexit.unregister(rerun.rerun_shutdown)  # it would also wait without end
        layout = self._layout()
        if to.endswith(".rrd"):
            Path(to).parent.mkdir(parents=True, exist_ok=True)
            self.stream.save(to, default_blueprint=layout)
        elif to == "window" or "://" in to:
            address = f"rerun+http://127.0.0.1:{PORT}/proxy" if to == "window" else to
            if to == "window":
                self._open()
            _refuse_absent(address, 10.0 if to == "window" else 2.0)
            self.stream.connect_grpc(address, default_blueprint=layout)
        else:
            raise InputError(
                "window, FILE.rrd or the URL of a viewer", f"'{to}'", "choose one of those"
            )
        self.thread = Thread(target=self._work, daemon=True, name="view")
        self.thread.start()

    def tick(self, tick: Tick, began: float = 0.0) -> None:
        """Show a step, or skip it if the viewer is behind.

        Args:
            tick: The step.
            began: Seconds at which its episode started.
        """
        try:
            self.waiting.put_nowait((tick, began + tick.step / self.fps, self.body.position()))
        except Full:
            self.missed += 1

    def close(self, patience_s: float = 5.0) -> None:
        """Wait until every step is sent, at most some seconds; the rest is given up."""
        until = time.monotonic() + patience_s
        while self.thread.is_alive() and time.monotonic() < until:
            try:
                self.waiting.put(None, timeout=0.1)
                break
            except Full:
                continue
        self.thread.join(max(0.0, until - time.monotonic()))
        if left := self.missed + self.waiting.qsize() + self.thread.is_alive():
            logger.warning(
                "rerun's viewer has not taken everything: %d steps or more were left out", left
            )

    def _work(self) -> None:
        """Send the steps that wait, in the thread, until the view is closed."""
        for name in self.body.actions:
            for line, colour in LINES.items():
                self.stream.log(
                    f"joint/{name}/{line}",
                    self.rerun.SeriesLines(colors=colour, widths=2),
                    static=True,
                )
        while (shown := self.waiting.get()) is not None:
            self._show(*shown)
        try:
            self.stream.flush(timeout_sec=60)
            self.stream.disconnect()
        except RuntimeError as error:
            self.missed += 1
            logger.debug("rerun: %s", error)

    def _show(self, tick: Tick, at: float, position: np.ndarray | None) -> None:
        """Send one step to rerun."""
        rerun, stream = self.rerun, self.stream
        stream.set_time("time", duration=at)
        for camera, frame in tick.observation.images.items():
            newest = np.asarray(frame if frame.ndim == 3 else frame[-1])
            kind = (
                rerun.DepthImage(newest.squeeze())
                if newest.shape[-1] == 1
                else rerun.Image(newest).compress()
            )
            stream.log(f"camera/{camera}", kind)
        for line, values in zip(LINES, (position, tick.action, tick.command), strict=True):
            for name, value in zip(
                self.body.actions, [] if values is None else values, strict=False
            ):
                stream.log(f"joint/{name}/{line}", rerun.Scalars(float(value)))

    def _layout(self) -> Any:
        """Return the layout of the viewer: cameras on the left, joints on the right."""
        from rerun import blueprint

        cameras = [
            blueprint.Spatial2DView(origin=f"camera/{camera}", name=camera)
            for camera in self.body.cameras
        ]
        joints = [
            blueprint.TimeSeriesView(origin=f"joint/{name}", name=name)
            for name in self.body.actions
        ]
        parts = blueprint.Horizontal(
            blueprint.Vertical(*cameras), blueprint.Grid(*joints), column_shares=[1, 2]
        )
        return blueprint.Blueprint(parts, collapse_panels=True)

    def _open(self) -> None:
        """Open rerun's viewer."""
        beside = Path(sys.executable).with_name("rerun")
        path = str(beside) if beside.exists() else None
        try:
            self.rerun.spawn(
                port=PORT,
                connect=False,
                memory_limit="1GB",
                executable_path=path,
                recording=self.stream,
            )
        except RuntimeError as error:
            raise InputError("rerun's viewer", said(error), "give --view FILE.rrd") from None


def _refuse_absent(address: str, patience_s: float) -> None:
    """Raise InputError if no viewer listens at an address within some seconds."""
    parts, until = urlsplit(address), time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((parts.hostname or "", parts.port or PORT), timeout=2).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > until:
                remedy = "open one there (`rerun`); where there is no screen give --view FILE.rrd"
                raise InputError(
                    f"a viewer of rerun's at '{address}'", str(error), remedy
                ) from None
        time.sleep(0.1)
