"""The hand of LIBERO's robot, moved by what the simulator knows: how scripted experts act."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

OPEN, CLOSED = -1.0, 1.0
GAIN, TURN = 25.0, 2.0  # gains of the proportional control, per m and per rad
STIFF = 60.0  # gain per m against drawers and knobs, which push back
HALVES = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
# Half the length of the hand along the axis on which its fingers close, half its width, and the
# height above the grip from which it is so large, in m: of the palm, and of the open fingers.
HAND = ((0.104, 0.036, 0.022), (0.052, 0.012, -0.01))


class Hand:
    """Moves the hand of a LiberoEnv and measures what is around it.

    Positions are in m, in the world's frame. A rotation's first column is the axis on which the
    fingers close, its third the way that they point.

    Args:
        env: The LiberoEnv.
    """

    def __init__(self, env: Any):
        self.env, self.gain = env, GAIN

    def move(
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
            places.append(self.position)
            if len(places) == 6 and np.ptp(places, axis=0).max() < 0.003:
                return
            error = np.linalg.norm(Rotation.from_matrix(rotation @ self.rotation.T).as_rotvec())
            if np.linalg.norm(target - self.position) < within and error < 0.1:
                return
            yield self.towards(target, rotation, gripper)

    def towards(self, target: np.ndarray, rotation: np.ndarray, gripper: float) -> np.ndarray:
        """Return the (7,) action that moves and turns the hand towards a target."""
        shift = self.gain * (target - self.position)
        turn = TURN * Rotation.from_matrix(rotation @ self.rotation.T).as_rotvec()
        # Actions are rounded to tenths. No picture shows finer differences, and a policy that has
        # to write them learns little else.
        return np.clip(np.concatenate([shift, turn, [gripper]]), -1, 1).round(1).astype(np.float32)

    def close(self, position: np.ndarray, rotation: np.ndarray) -> Iterator[np.ndarray]:
        """Yield actions that close the fingers, until they have moved and then come to rest.

        It stops right then: a policy never leaves a pause in which nothing that it sees changes.
        """
        open_width = width = self.width
        for _ in range(14):
            yield self.towards(position, rotation, CLOSED)
            before, width = width, self.width
            if before - width < 0.0005 and open_width - width > 0.003:
                return

    @property
    def data(self) -> Any:
        """The state of the simulation."""
        return self.env.env.sim.data

    @property
    def model(self) -> Any:
        """The model of the simulation, as MuJoCo has it."""
        return self.env.env.sim.model._model

    def joint(self, thing: str) -> int:
        """Return the number of the joint of a knob, a door or a drawer, whose region is named."""
        return self.env.env.sim.model.joint_name2id(self.env.world.get_object(thing).joints[0])

    @property
    def position(self) -> np.ndarray:
        """The position (3,) of the hand, between its finger tips."""
        return self.data.get_site_xpos("gripper0_grip_site").copy()

    @property
    def rotation(self) -> np.ndarray:
        """The rotation (3, 3) of the hand."""
        return self.data.get_site_xmat("gripper0_grip_site").reshape(3, 3).copy()

    @property
    def width(self) -> float:
        """The distance between the fingers."""
        left, right = self.env.raw["robot0_gripper_qpos"]
        return left - right

    def boxes(self, bodies: set[int]) -> np.ndarray:
        """Return the corners (N, 8, 3) of the boxes around the solid parts of bodies."""
        model, boxes = self.model, []
        for geom in range(model.ngeom):
            solid = model.geom_contype[geom] or model.geom_conaffinity[geom]
            if model.geom_bodyid[geom] in bodies and solid:
                box, rotation = model.geom_aabb[geom], self.data.geom_xmat[geom].reshape(3, 3)
                boxes.append(self.data.geom_xpos[geom] + (box[:3] + HALVES * box[3:]) @ rotation.T)
        return np.array(boxes).reshape(-1, 8, 3)

    def corners(self, thing: str) -> np.ndarray:
        """Return the corners (N, 3) of the boxes around an object's solid parts."""
        return self.boxes(self.parts([thing])).reshape(-1, 3)

    def parts(self, things: list[str]) -> set[int]:
        """Return the bodies of objects and of what moves with or in them."""
        parts = {self.env.world.obj_body_id[thing] for thing in things}
        for body in range(self.model.nbody):  # a child comes after its parent
            if self.model.body_parentid[body] in parts:
                parts.add(body)
        return parts

    def fits(self, grip: np.ndarray, rotation: np.ndarray) -> bool:
        """Return whether the hand, coming from above, touches no furniture when it grips there."""
        world = self.env.world
        furniture = [
            name
            for name in world.fixtures_dict
            if name in world.obj_body_id and "table" not in name and "floor" not in name
        ]
        axis = flat(rotation[:, 0])
        frame = np.stack([axis, [-axis[1], axis[0]]], 1)
        for box in self.boxes(self.parts(furniture)):
            places, top = (box[:, :2] - grip[:2]) @ frame, box[:, 2].max()
            for *halves, height in HAND:
                apart = (places.min(0) > halves) | (places.max(0) < np.negative(halves))
                if top > grip[2] + height and not apart.any():
                    return False
        return True


def up(height: float) -> np.ndarray:
    """Return the vector (3,) that points up by so many m."""
    return np.array([0.0, 0.0, height])


def middle(corners: np.ndarray) -> np.ndarray:
    """Return the centre (3,) of the box around corners (N, 3)."""
    return (corners.min(0) + corners.max(0)) / 2


def flat(axis: np.ndarray) -> np.ndarray:
    """Return the horizontal direction (2,) of an axis (3,)."""
    return axis[:2] / np.linalg.norm(axis[:2])


def narrowest(corners: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the direction (2,) in which points (N, 2) extend least, and that extent."""
    angles = np.radians(np.arange(0, 180, 5))
    axes = np.stack([np.cos(angles), np.sin(angles)], 1)
    extents = np.ptp(corners @ axes.T, axis=0)
    best = int(extents.argmin())
    return axes[best], float(extents[best])


def turned(rotation: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Turn the hand about the vertical as little as makes its fingers close along an axis (2,)."""
    hand_axis = flat(rotation[:, 0])
    angle = np.arctan2(hand_axis[0] * axis[1] - hand_axis[1] * axis[0], hand_axis @ axis)
    angle = (angle + np.pi / 2) % np.pi - np.pi / 2  # the two fingers are interchangeable
    return Rotation.from_euler("z", angle).as_matrix() @ rotation
