"""The robot as rerun shows it: what the cameras see, where the joints are, what was predicted and what was sent."""

from pathlib import Path

import numpy as np

from vla0.errors import InputError
from vla0.robot.arm import INSTALL, LeRobotBody
from vla0.robot.loop import Tick

LINES = {"is": (140, 140, 140), "predicted": (80, 160, 255), "sent": (255, 150, 40)}


class View:
    """to: "window" opens rerun's viewer, FILE.rrd is written, rerun+http://... is a viewer elsewhere."""

    def __init__(self, to: str, body: LeRobotBody, fps: float):
        try:
            import rerun
            from rerun import blueprint
        except ImportError as error:
            raise InputError("rerun", str(error), INSTALL) from None
        self.rerun, self.body, self.fps = rerun, body, fps
        cameras = [blueprint.Spatial2DView(origin=f"camera/{camera}", name=camera) for camera in body.cameras]
        joints = [blueprint.TimeSeriesView(origin=f"joint/{name}", name=name) for name in body.actions]
        parts = blueprint.Horizontal(blueprint.Vertical(*cameras), blueprint.Grid(*joints), column_shares=[1, 2])
        layout = blueprint.Blueprint(parts, collapse_panels=True)
        self.stream = rerun.RecordingStream("vla0 robot")
        if to == "window":
            self.stream.spawn(memory_limit="1GB", default_blueprint=layout)
        elif to.endswith(".rrd"):
            Path(to).parent.mkdir(parents=True, exist_ok=True)
            self.stream.save(to, default_blueprint=layout)
        elif "://" in to:
            self.stream.connect_grpc(to, default_blueprint=layout)
        else:
            raise InputError("window, FILE.rrd or the URL of a viewer", f"'{to}'", "choose one of those")

        for name in body.actions:
            for line, colour in LINES.items():
                self.stream.log(f"joint/{name}/{line}", rerun.SeriesLines(colors=colour, widths=2), static=True)

    def tick(self, tick: Tick, began: float = 0.0) -> None:
        """Shows a step. began: seconds of the recording at which its episode started."""
        rerun, stream = self.rerun, self.stream
        stream.set_time("time", duration=began + tick.step / self.fps)
        for camera, frame in tick.observation.images.items():
            newest = np.asarray(frame if frame.ndim == 3 else frame[-1])
            kind = rerun.DepthImage(newest.squeeze()) if newest.shape[-1] == 1 else rerun.Image(newest).compress()
            stream.log(f"camera/{camera}", kind)
        position = self.body.position()
        for line, values in zip(LINES, (position, tick.action, tick.command), strict=True):
            for name, value in zip(self.body.actions, [] if values is None else values, strict=False):
                stream.log(f"joint/{name}/{line}", rerun.Scalars(float(value)))

    def close(self) -> None:
        """Everything is out."""
        self.stream.flush(timeout_sec=5)
        self.stream.disconnect()
