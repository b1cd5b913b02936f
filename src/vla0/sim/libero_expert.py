"""A scripted expert for LIBERO's tasks.

It reads the poses of the objects from the simulator and looks at no picture.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from vla0.core.spec import Observation
from vla0.errors import InputError
from vla0.sim.libero_files import has_expert
from vla0.sim.libero_furniture import close_drawer, drawers, open_drawer, swept, turn_knob
from vla0.sim.libero_hand import (
    CLOSED,
    GAIN,
    OPEN,
    STIFF,
    Hand,
    flat,
    middle,
    narrowest,
    turned,
    up,
)
from vla0.sim.libero_microwave import close_door, open_door, put_in

WIDEST = 0.07  # m that fit well between the fingers; a wider object is held at its rim
KNOB = 0.035  # m; an object that ends on top in something no wider is held there
ABOVE = 0.10  # m that the hand is above an object before it goes down
CARRY = 0.2  # m by which an object is lifted
# Knobs first, since what is put down may hide them; drawers are shut when all lies in them.
ORDER = {"turnon": 0, "turnoff": 0, "open": 1, "in": 2, "on": 2, "close": 3}
FURNITURE = {
    "turnon": turn_knob,
    "turnoff": turn_knob,
    "open": open_drawer,
    "close": close_drawer,
}
MICROWAVE = {"open": open_door, "in": put_in, "close": close_door}


class LiberoExpert:
    """Fulfils one goal after another: turns knobs, pulls and pushes drawers, picks and places.

    Args:
        env: A LiberoEnv.

    Raises:
        InputError: When the task asks for something else (see `has_expert`).
    """

    def __init__(self, env: Any):
        self.env, self.hand = env, Hand(env)
        goals: list[list[str]] = env.world.parsed_problem["goal_state"]
        # Where something goes into a drawer, that has to be open.
        filled = [goal[2] for goal in goals if goal[0] == "in" and "cabinet" in goal[2]]
        goals = goals + [["open", place] for place in filled if ["open", place] not in goals]
        self.goals = sorted(goals, key=lambda goal: ORDER.get(goal[0], 0))
        if not has_expert(env.task):
            expected = "a task of knobs, drawers, picking and placing"
            raise InputError(expected, f"{env.task}", "choose another task")

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
        hand = self.hand
        self.down = hand.rotation
        begun = False  # something that may be in the hand's way
        for goal in self.goals:
            for attempt in range(3):
                kinds = MICROWAVE if "microwave" in goal[-1] else FURNITURE
                if (make := kinds.get(goal[0])) is not None:
                    if self._done(goal):
                        break
                    if goal[0] == "open" and kinds is FURNITURE:
                        yield from self._put_aside(goal[1])
                        begun = True
                    yield from make(hand, goal, self.down)
                    continue
                hand.gain = GAIN
                # The hand first goes above the object: on a slanting path down, it would drag the
                # wall of a basket along.
                if begun or attempt:
                    grip, _, rotation = self._grasp(goal[1], 0)
                    over = np.append(grip[:2], hand.position[2])
                    yield from hand.move(over, rotation, OPEN, 0.05)
                begun = True
                if "plate" in goal[1] and "table" in goal[2]:  # too wide to be carried among others
                    yield from self._drag(goal[1], self._spot(goal[1], goal[2])[0][:2], 0.012)
                else:
                    yield from self._pick(goal[1])
                    yield from self._place(goal[1], goal[2])
                if self._done(goal):
                    break
                for _ in range(10):  # wait until a dropped object comes to rest
                    yield hand.towards(hand.position + up(0.02), self.down, OPEN)
        while True:
            yield hand.towards(hand.position + up(0.05), self.down, OPEN)

    def _done(self, goal: list[str]) -> bool:
        """Return whether a goal is fulfilled."""
        return self.env.world._eval_predicate(goal)

    def _put_aside(self, place: str) -> Iterator[np.ndarray]:
        """Yield actions that drag what goes into a drawer from where that, opened, would hide it.

        That takes less time than to carry it.
        """
        hand, (area, frame) = self.hand, swept(self.hand, place)
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        ways = np.stack([np.cos(angles), np.sin(angles)], 1)

        def clear(points: np.ndarray) -> float:
            """Return how far points (N, 2) are from the opened drawer at least, in m."""
            apart = points @ frame - np.clip(points @ frame, *area)
            return float(np.linalg.norm(apart, axis=1).min())

        def room(spot: np.ndarray, thing: str, corners: np.ndarray) -> float:
            """Return how much room in m the hand has there, at the better side of a bowl's rim."""
            axis, radius = flat(self.down[:, 0]), np.ptp(corners[:, 0]) / 2
            found = [0.0]
            for side in (axis, -axis):
                grip = np.append(spot + side * (radius - 0.01), corners[:, 2].max() - 0.025)
                palm = grip[:2] + side * np.linspace(-0.1, 0.1, 5)[:, None]
                if hand.fits(grip, turned(self.down, axis)):
                    others = min(self._room(thing, point) for point in [spot, *palm[2:]])
                    found.append(min(clear(palm) - 0.036, others - 0.03, 0.05))
            return max(found)

        for thing in [goal[1] for goal in self.goals if goal[0] == "in" and goal[2] == place]:
            corners = hand.corners(thing)
            centre = middle(corners)[:2]
            if narrowest(corners[:, :2] - centre)[1] <= WIDEST:
                continue  # the hand needs less room around it, and within it nothing to pull at
            spots = [
                centre,
                *(centre + far * way for far in (0.06, 0.08, 0.1, 0.12) for way in ways),
            ]
            rooms = [room(spot, thing, corners) for spot in spots]
            spot = spots[int(np.argmax(rooms))]  # the nearest of the best
            if spot is not centre:
                yield from self._drag(thing, spot, 0.03)

    def _drag(self, thing: str, spot: np.ndarray, depth: float) -> Iterator[np.ndarray]:
        """Yield actions that drag a bowl or a plate to a spot (2,).

        Closed fingers, `depth` m above its lowest part, pull at its rim from within.
        """
        hand = self.hand
        corners = hand.corners(thing)
        centre, radius = middle(corners)[:2], np.ptp(corners[:, :2], axis=0).max() / 2
        low = np.append(centre, corners[:, 2].min() + depth)
        hand.gain = STIFF
        yield from hand.move(low + up(ABOVE), self.down, CLOSED, 0.02)
        yield from hand.move(low, self.down, CLOSED, 0.01, limit=30)
        first = (spot - centre) / np.linalg.norm(spot - centre)
        left: list[float] = []
        for _ in range(60):
            now = middle(hand.corners(thing))[:2]
            way = (spot - now) / np.linalg.norm(spot - now)
            left.append(float((spot - now) @ first))
            # there, or stuck: then it would only tip over
            if left[-1] < 0.008 or (len(left) > 7 and left[-4] - left[-1] < 0.002):
                break
            yield hand.towards(np.append(now + radius * way, low[2]), self.down, CLOSED)
        yield from hand.move(hand.position + up(ABOVE), self.down, CLOSED, 0.03)

    def _pick(self, thing: str) -> Iterator[np.ndarray]:
        """Yield actions that grasp and lift an object, in up to four attempts."""
        hand = self.hand
        before = hand.corners(thing)[:, 2].min()
        for attempt in range(4):
            grip, top, self.turned = self._grasp(thing, attempt)
            yield from hand.move(np.append(grip[:2], top + ABOVE), self.turned, OPEN, 0.01)
            yield from hand.move(grip, self.turned, OPEN, 0.006, limit=30)
            # Here the palm stands on a neighbour of the object.
            if hand.position[2] > grip[2] + 0.02 and hand.position[2] > top - 0.01:
                yield from hand.move(hand.position + up(ABOVE / 2), self.turned, OPEN, 0.03)
                continue
            # The hand rises a little, because fingers that press on the surface do not close.
            grasp_position = hand.position + up(0.003)
            yield from hand.close(grasp_position, self.turned)
            yield from hand.move(grasp_position + up(CARRY), self.turned, CLOSED, 0.03)
            if hand.corners(thing)[:, 2].min() > before + CARRY / 3:
                return

    def _grasp(self, thing: str, attempt: int) -> tuple[np.ndarray, float, np.ndarray]:
        """Return where the hand closes (3,), the height of the object, and the hand's rotation.

        Each attempt takes another place.
        """
        corners = self.hand.corners(thing)
        centre, low, high = middle(corners), corners[:, 2].min(), corners[:, 2].max()
        axis, width = narrowest(corners[:, :2] - centre[:2])
        if width > WIDEST:
            return self._grasp_wide(thing, corners, attempt)
        # Later attempts shift the hand along the object, past a neighbour that the palm hits.
        along = np.array([-axis[1], axis[0]])
        across = (
            along * (0, 1, -1, 1)[attempt] * max(0.02, np.ptp(corners[:, :2] @ along) / 2 - 0.01)
        )
        # At a tall object, a deeper grip would make the palm stand on its top.
        height = max((low + high) / 2, high - 0.03)
        grip = np.append(centre[:2] + across, max(height, low + 0.012))
        return grip, high, turned(self.down, axis)

    def _grasp_wide(
        self, thing: str, corners: np.ndarray, attempt: int
    ) -> tuple[np.ndarray, float, np.ndarray]:
        """Do what `_grasp` says, for an object that is held at its rim, or at a knob on top."""
        centre, low, high = middle(corners), corners[:, 2].min(), corners[:, 2].max()
        tip = corners[corners[:, 2] > high - 0.015]
        if np.ptp(tip[:, :2], axis=0).max() < KNOB:
            axis, _ = narrowest(tip[:, :2] - middle(tip)[:2])
            return np.append(middle(tip)[:2], high - 0.012), high, turned(self.down, axis)
        # The hand grips the rim on the side of its axis, so that it need not turn.
        axis = flat(self.down[:, 0])
        nearer = axis if axis @ (self.hand.position[:2] - centre[:2]) > 0 else -axis
        roomier = max(
            (nearer, -nearer),
            key=lambda side: min(
                0.05, *(self._room(thing, centre[:2] + far * side) for far in (0.07, 0.11, 0.15))
            ),
        )
        side = roomier * (1, -1, 1, -1)[attempt]
        across = side * (((corners[:, :2] - centre[:2]) @ side).max() - 0.01)
        grip = np.append(centre[:2] + across, max(high - 0.025, low + 0.012))
        rotation = turned(self.down, axis)
        if self.hand.fits(grip, rotation):
            return grip, high, rotation
        # In a drawer, say: another place of the rim, the nearest to the side on which it lies open.
        choices = sorted(self._rim(corners), key=lambda choice: choice[0])
        return (*choices[attempt % len(choices)][1:],) if choices else (grip, high, rotation)

    def _rim(self, corners: np.ndarray) -> Iterator[tuple[float, np.ndarray, float, np.ndarray]]:
        """Yield a cost and a grasp, as `_grasp` has it, for each place of a rim where it fits."""
        centre, low, high = middle(corners), corners[:, 2].min(), corners[:, 2].max()
        first = [flat(self.down[:, 0])]
        if (out := drawers(self.hand)) is not None:
            first.append(flat(out))
        for axis in [axis for one in first for axis in (one, np.array([-one[1], one[0]]))]:
            reach = np.abs((corners[:, :2] - centre[:2]) @ axis).max() - 0.01
            for depth in (0.025, 0.014):  # the upper one keeps the palm above a drawer's walls
                for side in (1, -1):
                    for aside in (0, 0.015, -0.015, 0.03, -0.03):
                        along = side * np.sqrt(max(reach**2 - aside**2, 0))
                        place = centre[:2] + along * axis + aside * np.array([-axis[1], axis[0]])
                        grip = np.append(place, max(high - depth, low + 0.012))
                        rotation = turned(self.down, axis)
                        if self.hand.fits(grip, rotation):
                            yield abs(aside) - depth, grip, high, rotation

    def _room(self, thing: str, point: np.ndarray) -> float:
        """Return the distance in m from a point (2,) to the centre of the nearest other object."""
        other_bodies = [
            body
            for name, body in self.env.world.obj_body_id.items()
            if name != thing and name in self.env.world.objects_dict
        ]
        return min(
            np.linalg.norm(self.hand.data.body_xpos[other_bodies][:, :2] - point, axis=1),
            default=np.inf,
        )

    def _place(self, thing: str, place: str) -> Iterator[np.ndarray]:
        """Yield actions that carry the held object to a place and let it go there."""
        hand = self.hand
        hanging = hand.position[2] - hand.corners(thing)[:, 2].min()
        spot, top = self._spot(thing, place)
        offset, height = np.full(2, np.inf), max(top + hanging + 0.08, hand.position[2])
        over = np.append(hand.position[:2], height)
        yield from hand.move(over, self.turned, CLOSED, 0.03)
        while True:
            # From the hand to the object's centre. It may turn in the fingers on the way.
            now = middle(hand.corners(thing))[:2] - hand.position[:2]
            if np.linalg.norm(now - offset) < 0.01:
                break
            offset = now
            over = np.append(spot[:2] - offset, height)
            for action in hand.move(over, self.turned, CLOSED, 0.015):
                if hand.position[2] - hand.corners(thing)[:, 2].min() > hanging + 0.08:
                    return  # the object has slipped out of the hand
                yield action
        lowered = np.append(over[:2], top + hanging + 0.015)
        yield from hand.move(lowered, self.turned, CLOSED, 0.01, limit=25)
        width = hand.width
        for _ in range(8):
            yield hand.towards(hand.position, self.turned, OPEN)
            if hand.width > width + 0.005:
                break
        yield from hand.move(hand.position + up(0.12), self.turned, OPEN, 0.03)

    def _spot(self, thing: str, place: str) -> tuple[np.ndarray, float]:
        """Return the position (3,) of a place for an object, and the height of the surface there.

        Several objects for one place stand behind each other: two pots on a stove.
        """
        hand = self.hand
        if place not in self.env.world.object_sites_dict:
            corners = hand.corners(place)
            return middle(corners), float(corners[:, 2].max())
        position = hand.data.get_site_xpos(place).copy()
        things = [goal[1] for goal in self.goals if len(goal) == 3 and goal[2] == place]
        if len(things) > 1 and "cook" in place:
            body = hand.data.body_xpos[self.env.world.obj_body_id[thing]]
            position[:2] += middle(hand.corners(thing))[:2] - body[:2]
            position[0] += ((len(things) - 1) / 2 - things.index(thing)) * 0.096
        return position, float(position[2])
