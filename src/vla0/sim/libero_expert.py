"""A scripted expert for LIBERO's pick-and-place tasks.

It reads the poses of the objects from the simulator and looks at no picture.
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
WIDEST = 0.07  # m that fit well between the fingers; a wider object is held at its rim
ABOVE = 0.10  # m that the hand is above an object before it goes down
CARRY = 0.2  # m by which an object is lifted
GAIN, TURN = 25.0, 2.0  # gains of the proportional control, per m and per rad


class LiberoExpert:
    """Picks each object of the goals and puts it where it belongs, one goal after another.

    Args:
        env: A LiberoEnv.

    Raises:
        InputError: When the task asks for something else, such as opening, closing or turning on
            (see `has_expert`).
    """

    def __init__(self, env: Any):
        self.env = env
        self.goals: list[list[str]] = env.world.parsed_problem["goal_state"]
        if not has_expert(env.task):
            raise InputError("a task of picking and placing", f"{env.task}", "choose another task")

    def reset(self) -> None:
        """Forget the episode."""
        self.plan: Iterator[np.ndarray] | None = None

    def act(self, observation: Observation) -> np.ndarray:
        """Return the expert's next action: (7,) float32 in [-1, 1]."""
        if self.plan is None:
            self.plan = self._episode()
        return next(self.plan)

    def _episode(self) -> Iterator[np.ndarray]:
        """Yield the actions of an episode: up to three attempts at each goal, then waiting."""
        self.down = self._rotation()
        for number, goal in enumerate(self.goals):
            for attempt in range(3):
                # The hand first goes above the object: on a slanting path down, it would drag the
                # wall of a basket along.
                if number + attempt:
                    grip, _, rotation = self._grasp(goal[1], 0)
                    yield from self._move(
                        np.append(grip[:2], self._hand()[2]), rotation, OPEN, 0.05
                    )
                yield from self._pick(goal[1])
                yield from self._place(goal[1], goal[2])
                if self.env.world._eval_predicate(goal):
                    break
                for _ in range(10):  # wait until a dropped object comes to rest
                    yield self._towards(self._hand() + _up(0.02), self.down, OPEN)
        while True:
            yield self._towards(self._hand() + _up(0.05), self.down, OPEN)

    def _pick(self, thing: str) -> Iterator[np.ndarray]:
        """Yield actions that grasp and lift an object, in up to four attempts."""
        before = self._corners(thing)[:, 2].min()
        for attempt in range(4):
            grip, top, self.turned = self._grasp(thing, attempt)
            yield from self._move(np.append(grip[:2], top + ABOVE), self.turned, OPEN, 0.01)
            yield from self._move(grip, self.turned, OPEN, 0.006, limit=30)
            # Here the palm stands on a neighbour of the object.
            if self._hand()[2] > grip[2] + 0.02 and self._hand()[2] > top - 0.01:
                yield from self._move(self._hand() + _up(ABOVE / 2), self.turned, OPEN, 0.03)
                continue
            # The hand rises a little, because fingers that press on the surface do not close.
            grasp_position = self._hand() + _up(0.003)
            yield from self._close(grasp_position)
            yield from self._move(grasp_position + _up(CARRY), self.turned, CLOSED, 0.03)
            if self._corners(thing)[:, 2].min() > before + CARRY / 3:
                return

    def _close(self, hand_position: np.ndarray) -> Iterator[np.ndarray]:
        """Yield actions that close the fingers, until they have moved and then come to rest.

        It stops right then: a policy never leaves a pause in which nothing that it sees changes.
        """
        open_width = width = self._width()
        for _ in range(14):
            yield self._towards(hand_position, self.turned, CLOSED)
            before, width = width, self._width()
            if before - width < 0.0005 and open_width - width > 0.003:
                return

    def _grasp(self, thing: str, attempt: int) -> tuple[np.ndarray, float, np.ndarray]:
        """Return where the hand closes (3,), the height of the object, and the hand's rotation.

        Each attempt takes another place.
        """
        corners = self._corners(thing)
        centre, low, high = _middle(corners), corners[:, 2].min(), corners[:, 2].max()
        axis, width = _narrowest(corners[:, :2] - centre[:2])
        if width <= WIDEST:
            # Later attempts shift the hand along the object, past a neighbour that the palm hits.
            along = np.array([-axis[1], axis[0]])
            across = (
                along
                * (0, 1, -1, 1)[attempt]
                * max(0.02, np.ptp(corners[:, :2] @ along) / 2 - 0.01)
            )
            # At a tall object, a deeper grip would make the palm stand on its top.
            height = max((low + high) / 2, high - 0.03)
        else:  # The hand grips the rim on the side of its axis, so that it need not turn.
            axis = _flat(self.down[:, 0])
            nearer = axis if axis @ (self._hand()[:2] - centre[:2]) > 0 else -axis
            roomier = max(
                (nearer, -nearer),
                key=lambda side: min(self._room(thing, centre[:2] + 0.07 * side), 0.05),
            )
            side = roomier * (1, -1, 1, -1)[attempt]
            across = side * (((corners[:, :2] - centre[:2]) @ side).max() - 0.01)
            height = high - 0.025
        return (
            np.append(centre[:2] + across, max(height, low + 0.012)),
            high,
            _turned(self.down, axis),
        )

    def _room(self, thing: str, point: np.ndarray) -> float:
        """Return the distance in m from a point (2,) to the centre of the nearest other object."""
        other_bodies = [
            body
            for name, body in self.env.world.obj_body_id.items()
            if name != thing and name in self.env.world.objects_dict
        ]
        return min(
            np.linalg.norm(self._data.body_xpos[other_bodies][:, :2] - point, axis=1),
            default=np.inf,
        )

    def _place(self, thing: str, place: str) -> Iterator[np.ndarray]:
        """Yield actions that carry the held object to a place and let it go there."""
        corners = self._corners(thing)
        offset = _middle(corners)[:2] - self._hand()[:2]  # from the hand to the object's centre
        hanging = self._hand()[2] - corners[:, 2].min()
        spot, top = self._spot(place)
        over = np.append(spot[:2] - offset, max(top + hanging + 0.08, self._hand()[2]))
        over_here = np.append(self._hand()[:2], over[2])
        for action in chain(
            self._move(over_here, self.turned, CLOSED, 0.03),
            self._move(over, self.turned, CLOSED, 0.015),
        ):
            if self._hand()[2] - self._corners(thing)[:, 2].min() > hanging + 0.08:
                return  # the object has slipped out of the hand
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
        """Yield at most `limit` actions that move and turn the hand.

        They end when the hand is turned and less than `within` m from the target, or is stuck.
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
        """Return the (7,) action that moves and turns the hand towards a target."""
        shift = GAIN * (target - self._hand())
        turn = TURN * Rotation.from_matrix(rotation @ self._rotation().T).as_rotvec()
        # Actions are rounded to tenths. No picture shows finer differences, and a policy that has
        # to write them learns little else.
        return np.clip(np.concatenate([shift, turn, [gripper]]), -1, 1).round(1).astype(np.float32)

    @property
    def _data(self) -> Any:
        """The state of the simulation."""
        return self.env.env.sim.data

    def _hand(self) -> np.ndarray:
        """Return the position (3,) of the hand in m."""
        return self._data.get_site_xpos("gripper0_grip_site").copy()

    def _width(self) -> float:
        """Return the distance between the fingers in m."""
        left, right = self.env.raw["robot0_gripper_qpos"]
        return left - right

    def _rotation(self) -> np.ndarray:
        """Return the rotation (3, 3) of the hand."""
        return self._data.get_site_xmat("gripper0_grip_site").reshape(3, 3).copy()

    def _spot(self, place: str) -> tuple[np.ndarray, float]:
        """Return the position (3,) of a place, and the height of the surface there."""
        if place in self.env.world.object_sites_dict:
            position = self._data.get_site_xpos(place).copy()
            return position, float(position[2])
        corners = self._corners(place)
        return _middle(corners), float(corners[:, 2].max())

    def _corners(self, thing: str) -> np.ndarray:
        """Return world positions (N, 3) of corners of the boxes around an object's solid parts."""
        model, root = self.env.env.sim.model._model, self.env.world.obj_body_id[thing]
        parts = {root}
        for body in range(root + 1, model.nbody):  # a child comes after its parent
            if model.body_parentid[body] in parts:
                parts.add(body)
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
        corners = []
        for geom in range(model.ngeom):
            if model.geom_bodyid[geom] in parts and model.geom_contype[geom]:
                box = model.geom_aabb[geom]
                rotation = self._data.geom_xmat[geom].reshape(3, 3)
                position = self._data.geom_xpos[geom]
                corners.append(position + (box[:3] + signs * box[3:]) @ rotation.T)
        return np.concatenate(corners)


def _up(height: float) -> np.ndarray:
    """Return the vector (3,) that points up by so many m."""
    return np.array([0.0, 0.0, height])


def _middle(corners: np.ndarray) -> np.ndarray:
    """Return the centre (3,) of the box around corners (N, 3)."""
    return (corners.min(0) + corners.max(0)) / 2


def _flat(axis: np.ndarray) -> np.ndarray:
    """Return the horizontal direction (2,) of an axis (3,)."""
    return axis[:2] / np.linalg.norm(axis[:2])


def _narrowest(corners: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the direction (2,) in which points (N, 2) extend least, and that extent."""
    angles = np.radians(np.arange(0, 180, 5))
    axes = np.stack([np.cos(angles), np.sin(angles)], 1)
    extents = np.ptp(corners @ axes.T, axis=0)
    best = int(extents.argmin())
    return axes[best], float(extents[best])


def _turned(rotation: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Turn the hand about the vertical as little as makes its fingers close along an axis (2,)."""
    hand_axis = _flat(rotation[:, 0])
    angle = np.arctan2(hand_axis[0] * axis[1] - hand_axis[1] * axis[0], hand_axis @ axis)
    angle = (angle + np.pi / 2) % np.pi - np.pi / 2  # the two fingers are interchangeable
    return Rotation.from_euler("z", angle).as_matrix() @ rotation
