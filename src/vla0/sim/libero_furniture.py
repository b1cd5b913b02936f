"""What a scripted hand does with LIBERO's drawers and knobs."""

from collections.abc import Iterator

import numpy as np
from scipy.spatial.transform import Rotation

from vla0.sim.libero_hand import CLOSED, OPEN, STIFF, Hand, flat, turned, up


def turn_knob(hand: Hand, goal: list[str], down: np.ndarray) -> Iterator[np.ndarray]:
    """Yield actions that turn a stove's knob: the fingers hold its ridge, and the hand turns.

    Args:
        hand: The hand.
        goal: ("turnon" or "turnoff", the stove).
        down: The rotation (3, 3) of the hand that points down.
    """
    sign = 1 if goal[0] == "turnon" else -1
    joint = hand.joint(goal[1])
    centre, axis = hand.data.xanchor[joint].copy(), hand.data.xaxis[joint].copy()
    corners = hand.boxes({hand.model.jnt_bodyid[joint]}).reshape(-1, 3)
    top = corners[:, 2].max()
    ridge = corners[corners[:, 2] > top - 0.01] - centre
    along = ridge[np.linalg.norm(ridge[:, :2], axis=1).argmax()]
    straddling = turned(down, flat(np.cross(axis, along)))
    grip = np.append(centre[:2], top - 0.012)
    hand.gain = STIFF
    yield from hand.move(grip + up(0.1), straddling, OPEN, 0.015)
    yield from hand.move(grip, straddling, OPEN, 0.008, limit=30)
    yield from hand.close(hand.position, straddling)
    further = Rotation.from_rotvec(axis * 1.3 * sign).as_matrix() @ straddling
    for _ in range(25):
        if hand.env.world._eval_predicate(goal):
            break
        yield hand.towards(grip, further, CLOSED)
    for _ in range(4):
        yield hand.towards(hand.position, hand.rotation, OPEN)
    yield from hand.move(hand.position + up(0.1), hand.rotation, OPEN, 0.03)


def open_drawer(hand: Hand, goal: list[str], down: np.ndarray) -> Iterator[np.ndarray]:
    """Yield actions that pull a drawer open by its handle, which the fingers hold from the front.

    Args:
        hand: The hand.
        goal: ("open", the region in the drawer).
        down: The rotation (3, 3) of the hand that points down.
    """
    bar, out = handle(hand, goal[1])
    level = tilted(turned(down, flat(out)), out, np.pi / 2)
    hand.gain = STIFF
    yield from hand.move(bar + out * 0.16 + up(0.04), level, OPEN, 0.03, limit=80)
    for _ in range(4):  # the handle may slip out of the fingers
        bar, _ = handle(hand, goal[1])
        yield from hand.move(bar + out * 0.06, level, OPEN, 0.012, limit=30)
        for _ in range(25):
            if (hand.position - bar) @ out < 0.007:
                break
            yield hand.towards(bar - out * 0.012, level, OPEN)
        yield from hand.close(hand.position, level)
        for _ in range(40):
            if hand.env.world._eval_predicate(goal) or hand.width < 0.008:
                break
            aside = handle(hand, goal[1])[0] - hand.position
            aside -= (aside @ out) * out
            yield hand.towards(hand.position + aside + out * 0.012, level, CLOSED)
        for _ in range(4):
            yield hand.towards(hand.position, level, OPEN)
        if hand.env.world._eval_predicate(goal):
            break
    yield from hand.move(hand.position + out * 0.08, level, OPEN, 0.02)
    # Towards the robot: an arm that is stretched by then would stay so.
    back = hand.position + out * 0.02 + np.array([-0.1, 0.0, 0.1])
    yield from hand.move(back, down, OPEN, 0.04)


def close_drawer(hand: Hand, goal: list[str], down: np.ndarray) -> Iterator[np.ndarray]:
    """Yield actions that push a drawer shut, with closed fingers that lean against its handle.

    They lean, since an upright hand would push against the handles above.

    Args:
        hand: The hand.
        goal: ("close", the region in the drawer).
        down: The rotation (3, 3) of the hand that points down.
    """
    bar, out = handle(hand, goal[1])
    upright = turned(down, flat(np.cross(out, up(1.0))))
    leaning = tilted(upright, out, np.pi / 3)
    hand.gain = STIFF
    above = np.append(hand.position[:2], bar[2] + 0.25)
    yield from hand.move(above, hand.rotation, CLOSED, 0.03, limit=30)
    yield from hand.move(bar + out * 0.12 + up(0.2), upright, CLOSED, 0.04, limit=80)
    yield from hand.move(bar + out * 0.14 + up(0.06), leaning, CLOSED, 0.03)
    yield from hand.move(bar + out * 0.07, leaning, CLOSED, 0.015)
    for _ in range(60):
        if hand.env.world._eval_predicate(goal):
            break
        yield hand.towards(handle(hand, goal[1])[0] - out * 0.05, leaning, CLOSED)
    yield from hand.move(hand.position + out * 0.08 + up(0.05), leaning, CLOSED, 0.03)


def handle(hand: Hand, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle (3,) of the handle of a drawer, and the direction (3,) in which it opens.

    Args:
        hand: The hand.
        place: The region in the drawer.
    """
    model, joint = hand.model, hand.joint(place)
    low, high = model.jnt_range[joint]
    out = hand.data.xaxis[joint] * (1 if high > -low else -1)
    boxes = hand.boxes({model.jnt_bodyid[joint]})
    return boxes[(boxes @ out).min(1).argmax()].mean(0), out


def swept(hand: Hand, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Return what a drawer covers from above when it is opened.

    Args:
        hand: The hand.
        place: The region in the drawer.

    Returns:
        (2, 2) the least and most, in m, of two coordinates, and the matrix (2, 2) that gives them
        for points (..., 2).
    """
    model, joint = hand.model, hand.joint(place)
    along = flat(handle(hand, place)[1])
    frame = np.stack([along, [-along[1], along[0]]], 1)
    covered = hand.boxes({model.jnt_bodyid[joint]}).reshape(-1, 3)[:, :2] @ frame
    most = np.abs(model.jnt_range[joint]).max()
    return np.stack([covered.min(0), covered.max(0) + np.array([most, 0.0])]), frame


def drawers(hand: Hand) -> np.ndarray | None:
    """Return the direction (3,) in which the drawers of a scene open, or None without drawers."""
    for name, site in hand.env.world.object_sites_dict.items():
        if any("level" in joint for joint in getattr(site, "joints", None) or ()):
            return handle(hand, name)[1]
    return None


def tilted(rotation: np.ndarray, out: np.ndarray, angle: float) -> np.ndarray:
    """Tilt a hand that points down towards the direction from which `out` comes."""
    side = np.cross([0.0, 0.0, -1.0], -out)
    return Rotation.from_rotvec(side / np.linalg.norm(side) * angle).as_matrix() @ rotation
