"""Pictures that are drawn when somebody looks at them, as a policy does once per query."""

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from vla0.errors import InputError


class Pictures(Mapping[str, np.ndarray]):
    """The pictures {camera: (h, w, 3) uint8} of one instant, drawn when they are first looked at.

    On a CPU drawing takes most of a step's time, and a policy that executes several steps per query
    looks at few. They must be looked at before the next step.

    Args:
        cameras: The names of the cameras.
        draw: Draws the present picture of a camera.
        instant: Returns a number that changes with each step and reset.
    """

    def __init__(
        self,
        cameras: Collection[str],
        draw: Callable[[str], np.ndarray],
        instant: Callable[[], int],
    ):
        self.cameras, self.draw, self.instant = cameras, draw, instant
        self.taken, self.drawn = instant(), {}

    def __getitem__(self, camera: str) -> np.ndarray:
        """Return a picture; raise InputError when its instant has passed."""
        if camera not in self.cameras:
            raise KeyError(camera)
        if camera not in self.drawn:
            if self.instant() != self.taken:
                raise InputError(
                    "pictures of the present",
                    f"{camera} of a step that has passed",
                    "look before you act",
                )
            self.drawn[camera] = self.draw(camera)
        return self.drawn[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(self.cameras)

    def __len__(self) -> int:
        return len(self.cameras)

    def __reduce__(self):
        return dict, (dict(self),)  # draws all pictures, because another process cannot
