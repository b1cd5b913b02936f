"""What a scripted hand does with LIBERO's microwave and its door."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from vla0.sim.libero_furniture import tilted
from vla0.sim.libero_hand import CLOSED, OPEN, STIFF, Hand, flat, turned, up

DEPTH = 0.1  # m of the region's middle behind the front
INSIDE = 0.045  # m from the front to the axis of a mug, whose handle then still looks out
ASIDE = -0.034  # m from the microwave's middle: here the palm fits between the walls
FLOOR = 0.072  # m of the region's middle above the floor, and below the roof


@dataclass
class Mug:
    """Where a mug is.

    Args:
        axis: (2,) its middle without the handle, in m.
        towards: (2,) the unit vector from there to the handle.
        grip: (3,) where fingers hold the handle from above.
        bottom: Height in m of the lowest part.
        height: Of the mug, in m.
    """

    axis: np.ndarray
    towards: np.ndarray
    grip: np.ndarray
    bottom: float
    height: float


def mug(hand: Hand, thing: str) -> Mug:
    """Find a mug's handle, which is its part that is farthest from the middle of all parts."""
    boxes = hand.boxes(hand.parts([thing]))
    parts = boxes.mean(1)
    axis = np.median(parts[:, :2], axis=0)
    away = np.linalg.norm(parts[:, :2] - axis, axis=1)
    bar = parts[away.argmax()]
    towards = (bar[:2] - axis) / away.max()
    bottom, top = boxes[..., 2].min(), boxes[..., 2].max()
    grip = np.append(bar[:2] - 0.006 * towards, top - 0.03)
    return Mug(axis, towards, grip, bottom, top - bottom)


def put_in(hand: Hand, goal: list[str], down: np.ndarray) -> Iterator[np.ndarray]:
    """Yield actions that put a mug into a microwave, and push it in as far as the door needs.

    Args:
        hand: The hand.
        goal: ("in", the mug, the microwave's region).
        down: The rotation (3, 3) of the hand that points down.
    """
    middle = hand.data.get_site_xpos(goal[2]).copy()
    frame = hand.data.get_site_xmat(goal[2]).reshape(3, 3)
    out, side = -frame[:, 1], frame[:, 0]
    hand.gain = STIFF
    door = Door(hand, hand.env.world.object_sites_dict[goal[2]].parent_name)
    if door.along() @ side > -0.1:  # the hand needs room beside it
        yield from widen(hand, door, down, lambda: door.along() @ side < -0.25)
    found = mug(hand, goal[1])
    straddling = turned(down, np.array([-found.towards[1], found.towards[0]]))
    yield from hand.move(found.grip + up(0.1), straddling, OPEN, 0.01)
    yield from hand.move(found.grip, straddling, OPEN, 0.006, limit=30)
    yield from hand.close(hand.position, straddling)
    hanging = hand.position[2] - found.bottom
    reach = np.linalg.norm(hand.position[:2] - found.axis)
    lift = min(0.015, FLOOR - found.height / 2)
    height = middle[2] - FLOOR + hanging + lift
    yield from hand.move(np.append(hand.position[:2], height), straddling, CLOSED, 0.01)
    # The handle comes to look out of the door.
    cross = found.towards[0] * out[1] - found.towards[1] * out[0]
    yaw = Rotation.from_euler("z", np.arctan2(cross, found.towards @ out[:2])).as_matrix()
    inserting = yaw @ straddling
    place = middle + out * (DEPTH - INSIDE + reach) + side * ASIDE
    place[2] = height
    yield from hand.move(place + out * 0.12, inserting, CLOSED, 0.012, limit=90)
    yield from hand.move(place, inserting, CLOSED, 0.008, limit=40)
    yield from hand.move(place - up(lift), inserting, CLOSED, 0.006, limit=15)
    for _ in range(6):
        yield hand.towards(hand.position, inserting, OPEN)
    yield from hand.move(place + out * 0.1, inserting, OPEN, 0.02)
    # A leaning fist reaches in below the roof.
    leaning = tilted(turned(down, flat(side)), out, np.pi / 3)
    found = mug(hand, goal[1])
    start = np.append(found.grip[:2], middle[2] - FLOOR + 0.06)
    yield from hand.move(start + out * 0.07, leaning, CLOSED, 0.015)
    yield from hand.move(start - out * INSIDE, leaning, CLOSED, 0.01, limit=30)
    yield from hand.move(start + out * 0.1, leaning, CLOSED, 0.02)
    yield from hand.move(hand.position + up(0.15), down, CLOSED, 0.04)


def open_door(hand: Hand, goal: list[str], down: np.ndarray) -> Iterator[np.ndarray]:
    """Yield actions that pull a microwave's door open by its handle.

    The hand keeps its direction, and the round handle turns between the fingers.

    Args:
        hand: The hand.
        goal: ("open", the microwave).
        down: The rotation (3, 3) of the hand that points down.
    """
    door = Door(hand, goal[1])
    out = -door.shutting()
    number = ((door.boxes().mean(1) - door.hinge) @ out).argmax()  # of the handle
    level = tilted(turned(down, flat(np.cross(out, up(1.0)))), out, np.pi / 2)
    bar = lambda: door.boxes()[number].mean(0)  # noqa: E731
    hand.gain = STIFF
    yield from hand.move(bar() + out * 0.15, level, OPEN, 0.02, limit=90)
    yield from hand.move(bar(), level, OPEN, 0.008, limit=40)
    yield from hand.close(hand.position, level)
    for _ in range(60):
        if hand.width < 0.008 or door.shutting() @ out > -0.6:  # slipped, or far enough for a fist
            break
        yield hand.towards(bar() - 0.03 * door.shutting(), level, CLOSED)
    for _ in range(4):
        yield hand.towards(hand.position, level, OPEN)
    yield from hand.move(hand.position + out * 0.1, level, OPEN, 0.02)
    yield from hand.move(hand.position + up(0.15), down, CLOSED, 0.04)
    yield from widen(hand, door, down, lambda: hand.env.world._eval_predicate(goal))


def widen(
    hand: Hand, door: "Door", down: np.ndarray, enough: Callable[[], bool]
) -> Iterator[np.ndarray]:
    """Yield actions that push a door from within, at its upper edge, until that is enough."""
    yield from hand.move(door.before(-0.08) + up(0.1), down, CLOSED, 0.03)
    yield from hand.move(door.before(-0.06), down, CLOSED, 0.02)
    for _ in range(60):
        if enough():
            break
        yield hand.towards(door.before(0.03), down, CLOSED)
    yield from hand.move(hand.position + up(0.1), down, CLOSED, 0.03)


def close_door(hand: Hand, goal: list[str], down: np.ndarray) -> Iterator[np.ndarray]:
    """Yield actions that push a microwave's door shut, at its upper edge.

    Args:
        hand: The hand.
        goal: ("close", the microwave).
        down: The rotation (3, 3) of the hand that points down.
    """
    door = Door(hand, goal[1])
    hand.gain = STIFF
    yield from hand.move(door.before(0.09) + up(0.15), down, CLOSED, 0.03, limit=90)
    yield from hand.move(door.before(0.09), down, CLOSED, 0.02)
    for _ in range(120):
        if hand.env.world._eval_predicate(goal):
            break
        yield hand.towards(door.before(-0.02), down, CLOSED)
    yield from hand.move(hand.position + up(0.1), down, CLOSED, 0.03)


class Door:
    """The door of a microwave.

    Args:
        hand: The hand.
        microwave: The microwave's name.
    """

    def __init__(self, hand: Hand, microwave: str):
        joint = hand.joint(microwave)
        self.hand, self.body = hand, {int(hand.model.jnt_bodyid[joint])}
        self.hinge, self.axis = hand.data.xanchor[joint].copy(), hand.data.xaxis[joint].copy()

    def boxes(self) -> np.ndarray:
        """Return the corners (N, 8, 3) of the boxes around its parts."""
        return self.hand.boxes(self.body)

    def along(self) -> np.ndarray:
        """Return the level direction (3,) from its hinge to its other edge."""
        boxes = self.boxes()
        flat_box = boxes[np.ptp(boxes, axis=1).prod(1).argmax()]  # the largest: without the handle
        along = flat_box.mean(0) - self.hinge
        along[2] = 0
        return along / np.linalg.norm(along)

    def shutting(self) -> np.ndarray:
        """Return the level direction (3,) in which it moves where it is shut."""
        return np.cross(self.axis, self.along())

    def before(self, distance: float) -> np.ndarray:
        """Return a point (3,) at its upper edge, so many m before it, on the side of the handle."""
        point = self.hinge + 0.19 * self.along() - distance * self.shutting()
        return np.append(point[:2], self.boxes()[..., 2].max() - 0.015)
