"""A scripted expert for LIBERO's pick-and-place tasks: sees the poses in the simulator, not the
picture.
"""

from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from vla0.core.spec import Observation
from vla0.errors import InputError
from vla0.sim.libero_files import has_expert

OPEN, CLOSED = -1.0, 1.0
WIDEST = 0.07  # m between the fingers, some to spare; what is wider is held at its rim
ABOVE = 0.10  # m above an object before the hand goes down
CARRY = 0.2  # m that an object is lifted
GAIN, TURN = 25.0, 2.0  # of the proportional control, per m and per rad


class LiberoExpert:
    """Picks each object of the goal and puts it where it belongs, goal by goal.

    Raises InputError for a task with something else to do (open, close, turn on): see `has_expert`.
    """

    def __init__(self, env: Any):  # a LiberoEnv
        self.env = env
        self.goals: list[list[str]] = env.world.parsed_problem["goal_state"]
        if not has_expert(env.task):
            raise InputError("a task of picking and placing", f"{env.task}", "choose another task")

    def reset(self) -> None:
        """Forgets the episode."""
        self.plan: Iterator[np.ndarray] | None = None

    def act(self, observation: Observation) -> np.ndarray:
        """(7,) float32 in [-1, 1]: what the expert does now."""
        if self.plan is None:
            self.plan = self._episode()
        return next(self.plan)

    def _episode(self) -> Iterator[np.ndarray]:
        self.down = self._rotation()
        for number, goal in enumerate(self.goals):
            for attempt in range(3):
                # on its way down at once, the hand would take a basket's wall along
                if number + attempt:
                    grip, _, rotation = self._grasp(goal[1], 0)
                    yield from self._move(
                        np.append(grip[:2], self._hand()[2]), rotation, OPEN, 0.05
                    )
                yield from self._pick(goal[1])
                yield from self._place(goal[1], goal[2])
                if self.env.world._eval_predicate(goal):
                    break
                for _ in range(10):  # what was dropped comes to rest
                    yield self._towards(self._hand() + _up(0.02), self.down, OPEN)
        while True:
            yield self._towards(self._hand() + _up(0.05), self.down, OPEN)

    def _pick(self, thing: str) -> Iterator[np.ndarray]:
        before = self._corners(thing)[:, 2].min()
        for attempt in range(4):
            grip, top, self.turned = self._grasp(thing, attempt)
            yield from self._move(np.append(grip[:2], top + ABOVE), self.turned, OPEN, 0.01)
            yield from self._move(grip, self.turned, OPEN, 0.006, limit=30)
            # the palm stands on a neighbour
            if self._hand()[2] > grip[2] + 0.02 and self._hand()[2] > top - 0.01:
                yield from self._move(self._hand() + _up(ABOVE / 2), self.turned, OPEN, 0.03)
                continue
            # not pressing on what it lies on: pressed fingers do not close
            held = self._hand() + _up(0.003)
            yield from self._close(held)
            yield from self._move(held + _up(CARRY), self.turned, CLOSED, 0.03)
            if self._corners(thing)[:, 2].min() > before + CARRY / 3:
                return

    def _close(self, held: np.ndarray) -> Iterator[np.ndarray]:
        """Until the fingers, once under way, rest.

        No longer: a policy never leaves a pause in which nothing that it sees changes.
        """
        wide = width = self._width()
        for _ in range(14):
            yield self._towards(held, self.turned, CLOSED)
            before, width = width, self._width()
            if before - width < 0.0005 and wide - width > 0.003:
                return

    def _grasp(self, thing: str, attempt: int) -> tuple[np.ndarray, float, np.ndarray]:
        """Where the hand closes (3,), how high the object is, and the hand's rotation; another
        place at each attempt.
        """
        corners = self._corners(thing)
        centre, low, high = _middle(corners), corners[:, 2].min(), corners[:, 2].max()
        axis, width = _narrowest(corners[:, :2] - centre[:2])
        if width <= WIDEST:
            along = np.array([-axis[1], axis[0]])  # past a neighbour that the palm stands on
            across = (
                along
                * (0, 1, -1, 1)[attempt]
                * max(0.02, np.ptp(corners[:, :2] @ along) / 2 - 0.01)
            )
            # deeper, and the palm stands on what is tall
            height = max((low + high) / 2, high - 0.03)
        else:  # at the rim, on the side of the hand's own axis: no need to turn
            axis = _flat(self.down[:, 0])
            nearer = axis if axis @ (self._hand()[:2] - centre[:2]) > 0 else -axis
            first = max(
                (nearer, -nearer),
                key=lambda side: min(self._room(thing, centre[:2] + 0.07 * side), 0.05),
            )
            side = first * (1, -1, 1, -1)[attempt]
            across = side * (((corners[:, :2] - centre[:2]) @ side).max() - 0.01)
            height = high - 0.025
        return (
            np.append(centre[:2] + across, max(height, low + 0.012)),
            high,
            _turned(self.down, axis),
        )

    def _room(self, thing: str, point: np.ndarray) -> float:
        """Metres from a point (2,) to the middle of the nearest other object."""
        others = [
            body
            for name, body in self.env.world.obj_body_id.items()
            if name != thing and name in self.env.world.objects_dict
        ]
        return min(
            np.linalg.norm(self._data.body_xpos[others][:, :2] - point, axis=1), default=np.inf
        )

    def _place(self, thing: str, place: str) -> Iterator[np.ndarray]:
        corners = self._corners(thing)
        held = _middle(corners)[:2] - self._hand()[:2]  # where the object hangs
        hanging = self._hand()[2] - corners[:, 2].min()
        spot, top = self._spot(place)
        over = np.append(spot[:2] - held, max(top + hanging + 0.08, self._hand()[2]))
        over_here = np.append(self._hand()[:2], over[2])
        for action in chain(
            self._move(over_here, self.turned, CLOSED, 0.03),
            self._move(over, self.turned, CLOSED, 0.015),
        ):
            if self._hand()[2] - self._corners(thing)[:, 2].min() > hanging + 0.08:
                return  # it has slipped out
            yield action
        yield from self._move(
            np.append(over[:2], top + hanging + 0.015), self.turned, CLOSED, 0.01, limit=25
        )
        width = self._width()
        for _ in range(8):
            yield self._towards(self._hand(), self.turned, OPEN)
            if self._width() > width + 0.005:
                break
        yield from self._move(self._hand() + _up(0.12), self.turned, OPEN, 0.03)

    def _move(
        self,
        target: np.ndarray,
        rotation: np.ndarray,
        gripper: float,
        within: float,
        limit: int = 60,
    ) -> Iterator[np.ndarray]:
        """Actions until the hand is within so many metres of the target, and turned, or stuck; at
        most `limit`.
        """
        places = deque(maxlen=6)
        for _ in range(limit):
            places.append(self._hand())
            if len(places) == 6 and np.ptp(places, axis=0).max() < 0.003:
                return
            error = np.linalg.norm(Rotation.from_matrix(rotation @ self._rotation().T).as_rotvec())
            if np.linalg.norm(target - self._hand()) < within and error < 0.1:
                return
            yield self._towards(target, rotation, gripper)

    def _towards(self, target: np.ndarray, rotation: np.ndarray, gripper: float) -> np.ndarray:
        shift = GAIN * (target - self._hand())
        turn = TURN * Rotation.from_matrix(rotation @ self._rotation().T).as_rotvec()
        # In tenths: what is finer no picture tells, and a policy that has to write it learns little
        # else.
        return np.clip(np.concatenate([shift, turn, [gripper]]), -1, 1).round(1).astype(np.float32)

    @property
    def _data(self) -> Any:
        return self.env.env.sim.data

    def _hand(self) -> np.ndarray:
        return self._data.get_site_xpos("gripper0_grip_site").copy()

    def _width(self) -> float:
        """Metres between the fingers."""
        left, right = self.env.raw["robot0_gripper_qpos"]
        return left - right

    def _rotation(self) -> np.ndarray:
        return self._data.get_site_xmat("gripper0_grip_site").reshape(3, 3).copy()

    def _spot(self, place: str) -> tuple[np.ndarray, float]:
        """Where an object goes: (x, y, z), and the height of what it comes to lie on."""
        if place in self.env.world.object_sites_dict:
            at = self._data.get_site_xpos(place).copy()
            return at, float(at[2])
        corners = self._corners(place)
        return _middle(corners), float(corners[:, 2].max())

    def _corners(self, thing: str) -> np.ndarray:
        """(N, 3): the corners of the boxes around an object's colliding parts, in the world."""
        model, root = self.env.env.sim.model._model, self.env.world.obj_body_id[thing]
        inside = {root}
        for body in range(root + 1, model.nbody):  # a child comes after its parent
            if model.body_parentid[body] in inside:
                inside.add(body)
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        found = []
        for geom in range(model.ngeom):
            if model.geom_bodyid[geom] in inside and model.geom_contype[geom]:
                box = model.geom_aabb[geom]
                rotation = self._data.geom_xmat[geom].reshape(3, 3)
                found.append(self._data.geom_xpos[geom] + (box[:3] + signs * box[3:]) @ rotation.T)
        return np.concatenate(found)


def _up(height: float) -> np.ndarray:
    return np.array([0.0, 0.0, height])


def _middle(corners: np.ndarray) -> np.ndarray:
    return (corners.min(0) + corners.max(0)) / 2


def _flat(axis: np.ndarray) -> np.ndarray:
    return axis[:2] / np.linalg.norm(axis[:2])


def _narrowest(corners: np.ndarray) -> tuple[np.ndarray, float]:
    """The direction (2,) in which points (N, 2) extend least, and that extent."""
    angles = np.radians(np.arange(0, 180, 5))
    axes = np.stack([np.cos(angles), np.sin(angles)], 1)
    extents = np.ptp(corners @ axes.T, axis=0)
    best = int(extents.argmin())
    return axes[best], float(extents[best])


def _turned(rotation: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """The hand's rotation, turned about the vertical by the least so that its fingers close along
    the axis (2,).
    """
    own = _flat(rotation[:, 0])
    angle = np.arctan2(own[0] * axis[1] - own[1] * axis[0], own @ axis)
    angle = (angle + np.pi / 2) % np.pi - np.pi / 2  # the fingers are alike
    return Rotation.from_euler("z", angle).as_matrix() @ rotation
