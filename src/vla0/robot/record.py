"""Records what a robot did, and what the policy had wanted, as a LeRobot dataset."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from vla0.errors import InputError
from vla0.robot.lerobot_robot import LeRobotBody
from vla0.robot.loop import Tick

SUCCESS, JUDGED = "next.success", "judged"


class Recorder:
    """Writes a LeRobotDataset v3.0 with the robot's own features and these of each step.

    - `action` (D,): the command that was passed on, or the last one, which the robot keeps.
    - `prediction` (D,): what the policy wanted, before the limits.
    - `chunk` (H * D,): the policy's newest chunk.
    - `chunk_age` (1,): steps since the first of that chunk.
    - `next.success` (1,): whether somebody said at the end that the episode succeeded, in its last
      step; False elsewhere. The name is LeRobot's.
    - `judged` (1,): whether somebody gave a verdict, in the last step; False elsewhere.

    An episode begins with its first command. A step that the loop skipped is a copy of the step
    before.

    Args:
        folder: Where the dataset is written; it must not exist.
        body: The robot.
        fps: Steps a second, a whole number.
        chunk_size: Steps of a chunk.

    Raises:
        InputError: The folder exists or cannot be made, or `fps` is not a whole number.
    """

    def __init__(self, folder: Path, body: LeRobotBody, fps: float, chunk_size: int):
        from datasets.utils.logging import disable_progress_bar
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
        from lerobot.utils.feature_utils import hw_to_dataset_features

        from vla0.data.frames import video_backend

        os.environ.setdefault("SVT_LOG", "1")  # hides the video encoder's greeting
        disable_progress_bar()
        if folder.exists():
            raise InputError(
                "a new folder for the recording",
                f"'{folder}', which exists",
                "name another with --out",
            )
        if fps != round(fps):
            raise InputError(
                "a whole number of steps a second, as LeRobot's datasets have",
                f"{fps}",
                "--no-record",
            )
        self.body, self.chunk_size = body, chunk_size
        dimensions = len(body.actions)
        features = hw_to_dataset_features(body.robot.observation_features, "observation")
        action = {"dtype": "float32", "shape": (dimensions,), "names": list(body.actions)}
        steps = [f"{name}+{step}" for step in range(chunk_size) for name in body.actions]
        features |= {
            "action": action,
            "prediction": action,
            "chunk": {"dtype": "float32", "shape": (len(steps),), "names": steps},
            "chunk_age": {"dtype": "float32", "shape": (1,), "names": ["steps"]},
            SUCCESS: {"dtype": "bool", "shape": (1,), "names": None},
            JUDGED: {"dtype": "bool", "shape": (1,), "names": None},
        }
        try:
            self.dataset: Any = LeRobotDataset.create(
                f"local/{folder.name}",
                round(fps),
                features,
                root=folder,
                robot_type=body.robot.name,
                image_writer_threads=4 * max(1, len(body.cameras)),
                video_backend=video_backend(),
            )
        except OSError as error:
            raise InputError(
                "a folder that can be made for the recording", f"{error}", "name another with --out"
            ) from None
        self.features = features
        self.frame: dict[str, Any] | None = None
        self.step = self.frames = self.episodes = 0

    def tick(self, tick: Tick) -> None:
        """Record a step, and copies of the last one for steps that the loop skipped."""
        if tick.command is None and self.frame is None:
            return
        if self.frame is not None:
            for _ in range(tick.step - self.step):
                self._add(self.frame)
        # The last frame is held back until it is known whether it is the episode's last.
        self.frame, self.step = self._frame(tick), tick.step

    def _frame(self, tick: Tick) -> dict[str, Any]:
        """Return the dataset's frame of a step."""
        from lerobot.utils.feature_utils import build_dataset_frame

        frame: dict[str, Any] = build_dataset_frame(self.features, self.body.seen, "observation")
        last = self.frame or {}
        action = (
            last.get("action") if tick.command is None else np.asarray(tick.command, np.float32)
        )
        chunk = (
            np.zeros((self.chunk_size, len(self.body.actions)))
            if tick.chunk is None
            else tick.chunk
        )
        frame |= {
            "action": action,
            "prediction": last.get("prediction", action)
            if tick.action is None
            else np.asarray(tick.action, np.float32),
            "chunk": np.asarray(chunk, np.float32).reshape(-1),
            "chunk_age": np.array([tick.age], np.float32),
            "task": tick.observation.instruction,
        }
        return frame

    def _add(self, frame: dict[str, Any], verdict: bool | None = None) -> None:
        said = {SUCCESS: np.array([verdict is True]), JUDGED: np.array([verdict is not None])}
        self.dataset.add_frame(frame | said)
        self.frames += 1

    def save(self, verdict: bool | None = None) -> int:
        """End the episode, and save it if it has any frames.

        Args:
            verdict: Whether it succeeded, where somebody said so.

        Returns:
            The number of its frames; 0 for an episode without a command.
        """
        if self.frame is not None:
            self._add(self.frame, verdict)
        count, self.frame, self.frames = self.frames, None, 0
        if count:
            self.dataset.save_episode()
            self.episodes += 1
        return count

    def discard(self) -> None:
        """End the episode without saving it."""
        self.dataset.clear_episode_buffer()
        self.frame, self.frames = None, 0

    def close(self) -> None:
        """Complete the dataset, so that it can be read."""
        self.dataset.finalize()
