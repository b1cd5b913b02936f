"""Dimensions that wrap obey the laws of the others, on a circle."""

import numpy as np
import pytest
from conftest import make_observation, make_spec
from hypothesis import given
from hypothesis import strategies as st

from vla0 import InputError
from vla0.core.codec import ActionCodec
from vla0.core.ensemble import TemporalEnsemble, ensemble_actions, weighted_mean
from vla0.core.relative import from_written, shortest, to_written, wrapped
from vla0.core.spec import Observation
from vla0.data.lerobot import DataConfig, Source
from vla0.robot.limits import ActionLimits
from vla0.robot.resample import sampled

TURNS = ((1, -180.0, 180.0),)
ANGLES = st.floats(-180, 179.999)


def apart(one, other) -> float:
    """Degrees between two angles."""
    return abs((one - other + 180) % 360 - 180)


def wrist(**changes):
    """A Spec whose second dimension is an angle, given as a difference from the state."""
    fields = {"low": (-1.0, -8.0), "high": (1.0, 8.0), "relative_dims": (1,), "periodic": TURNS}
    return make_spec(
        **{**fields, "state": ((0.0, -180.0), (1.0, 180.0)), "chunk_size": 1, **changes}
    )


@given(ANGLES, st.floats(-7.9, 7.9))
def test_what_is_written_of_an_angle_reads_back_over_the_seam(state, step):
    spec = wrist(bins=1000)
    observation = Observation({}, "turn", np.array([0.5, state]))
    action = wrapped(np.array([[0.25, state + step]]), TURNS)
    codec = ActionCodec(spec)
    values = to_written(action, observation, spec)
    assert abs(values[0, 1] - step) < 1e-6
    back = from_written(codec.decode(codec.encode(values)), observation, spec)
    assert apart(back[0, 1], action[0, 1]) <= 16 / 1000 / 2 + 1e-4
    assert -180 <= back[0, 1] <= 180


@given(st.lists(ANGLES, min_size=1, max_size=4), st.floats(-180, 180))
def test_a_mean_of_angles_turns_with_them(angles, turned):
    near = [angles[0] + (angle % 40 - 20) for angle in angles]  # within a half turn of each other
    rows = [np.array([1.0, wrapped(np.array([0, a]), TURNS)[1]]) for a in near]
    moved = [wrapped(row + np.array([0, turned]), TURNS) for row in rows]
    weights = [1.0] + [0.5] * (len(rows) - 1)
    mean, other = weighted_mean(rows, weights, TURNS), weighted_mean(moved, weights, TURNS)
    assert apart(mean[1] + turned, other[1]) < 1e-3
    assert mean[0] == 1.0


def test_the_mean_of_179_and_minus_179_degrees_is_180_and_not_0():
    chunks = [np.array([[0.0, 0.0], [0.0, 179.0]]), np.array([[0.0, -179.0], [0.0, 0.0]])]
    assert apart(ensemble_actions(chunks, weights="mean", periodic=TURNS)[1], 180) < 1e-4
    plan = TemporalEnsemble(2, 1, "mean", periodic=TURNS)
    plan.add(chunks[0], 0)
    plan.add(chunks[1], 1)
    assert apart(plan.action(1)[1], 180) < 1e-4


def test_a_policy_averages_angles_as_angles(policy, processor):
    from vla0.policy import VLA0

    spec = make_spec(low=(-1.0, -180.0, -0.5), high=(1.0, 180.0, 0.5), periodic=TURNS)
    own = VLA0(policy.model, processor, spec)
    chunks = [np.tile(np.float32([0, angle, 0]), (3, 1)) for angle in (179, -179)]
    assert apart(own.ensemble_actions(chunks, weights="mean")[1], 180) < 1e-4
    assert own._acting.ensemble.periodic == spec.periodic


@given(ANGLES, ANGLES)
def test_between_two_angles_lies_the_shorter_way(one, other):
    found = sampled(np.array([[0.0, one], [0.0, other]]), 10.0, 20.0, 3, TURNS)
    assert apart(found[1, 1], one) == pytest.approx(apart(one, other) / 2, abs=1e-6)
    assert apart(found[1, 1], other) == pytest.approx(apart(one, other) / 2, abs=1e-6)


@given(ANGLES, ANGLES, st.floats(0.5, 20))
def test_a_command_goes_over_the_seam_within_its_bounds_and_its_change(last, wanted, most):
    limits = ActionLimits(low=(-1.0, -179.8), high=(1.0, 179.9), step=(1.0, most), periodic=TURNS)
    last = float(np.clip(last, -179.8, 179.9))
    command = limits.safe(np.array([0.0, wanted]), np.array([0.0, last]), 0.1)
    assert -179.8 <= command[1] <= 179.9
    assert apart(command[1], last) <= most + 1e-9
    # never further off; the seam's own width aside
    assert apart(command[1], wanted) <= apart(last, wanted) + 0.3


def test_a_command_does_not_go_where_no_demonstration_went():
    limits = ActionLimits(low=(-1.0, -170.0), high=(1.0, 170.0), step=(1.0, 5.0), periodic=TURNS)
    # the long way round
    assert limits.safe(np.array([0.0, -169.0]), np.array([0.0, 169.0]), 0.1)[1] == 164.0


@given(ANGLES, st.integers(-2, 2), st.floats(-180, 170), st.floats(5, 350))
def test_a_command_is_the_nearest_of_its_bounds_on_the_circle(wanted, turns, low, width):
    """Bounds 0 to 350 of a dataset whose angles go from 0 to 360, and a policy that gives back -90:
    270, and not 0.
    """
    limits = ActionLimits(low=(-1.0, low), high=(1.0, low + width), periodic=TURNS)
    command = limits.safe(np.array([0.0, wanted + 360 * turns]), None, 0.1)[1]
    assert low <= command <= low + width
    nearest = (
        0.0
        if (wanted - low) % 360 <= width
        else min(apart(wanted, low), apart(wanted, low + width))
    )
    assert apart(command, wanted) == pytest.approx(nearest, abs=1e-6)


@pytest.fixture(scope="module")
def turning(tmp_path_factory):
    """A dataset of a wrist that turns by three degrees a step, over the seam."""
    pytest.importorskip("lerobot", reason="the base package alone has no lerobot")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder = tmp_path_factory.mktemp("data") / "turning"
    features = {
        "observation.images.top": {
            "dtype": "image",
            "shape": (28, 28, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "wrist"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["x", "wrist"]},
    }
    dataset = LeRobotDataset.create("local/turning", 10, features, root=folder, use_videos=False)
    for _ in range(2):
        for step in range(60):
            state = np.array([step / 60, (100 + 3 * step + 180) % 360 - 180], np.float32)
            action = np.array([step / 60, (103 + 3 * step + 180) % 360 - 180], np.float32)
            picture = np.zeros((28, 28, 3), np.uint8)
            dataset.add_frame(
                {
                    "observation.images.top": picture,
                    "observation.state": state,
                    "action": action,
                    "task": "turn",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return folder


def test_bounds_of_a_wrist_that_wraps_are_told_of_and_those_of_a_periodic_one_are_its_steps(
    turning,
):
    fields = {"dataset": str(turning), "state": "observation.state", "relative_dims": [1]}
    plain = Source(DataConfig(**fields))
    spec = make_spec(base_model="tiny", **{**plain.spec_fields(4), "chunk_size": 4})
    assert (spec.low[1], spec.high[1]) == (-357.0, 12.0)
    assert "data.periodic={DIMENSION: [-180, 180]}" in " ".join(plain.problems(spec))
    source = Source(DataConfig(**fields, periodic={1: (-180, 180)}))
    found = source.spec_fields(4)
    assert (found["low"][1], found["high"][1]) == (3.0, 12.0)
    assert found["max_step_change"][1] == pytest.approx(3.0)
    assert not source.problems(make_spec(base_model="tiny", **{**found, "chunk_size": 4}))


def test_angles_outside_of_what_is_said_of_them_are_told_of(turning):
    source = Source(DataConfig(dataset=str(turning), periodic={1: (0, 360)}))
    assert "outside of its data.periodic, 0 to 360" in " ".join(source.problems())
    with pytest.raises(InputError, match=r"dimensions of actions, 0\.\.1; got 9"):
        Source(DataConfig(dataset=str(turning), periodic={9: (0, 360)})).spec_fields(4)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        *(("periodic", given) for given in (5, None, [1], {1: 180}, {1: [0]}, {1: ["a", "b"]})), ("depth", 5),
        ("depth", {"top": 1}), ("mixture", 5), ("relative_dims", 5), ("relative_dims", None), ("num_workers", -1),
    ],
)  # fmt: skip
def test_what_is_no_setting_of_data_is_refused_in_words(field, given):
    with pytest.raises(InputError, match=f"expected {field}"):
        DataConfig(dataset="x", cameras={"top": "k"}, **{field: given})


def test_a_dimension_named_on_the_command_line_is_a_number():
    assert DataConfig(dataset="x", periodic={"1": [-180, 180]}).periodic == {1: (-180, 180)}


def test_only_what_a_circle_can_be_is_taken():
    with pytest.raises(InputError, match="system, a text"):
        make_spec(system=5)
    for turns in (
        [[9, -180, 180]],
        [[1, 180, -180]],
        [[1, -180]],
        [[1, 0, 1], [1, 0, 2]],
        [[1, 0, float("inf")]],
    ):
        with pytest.raises(InputError, match="periodic"):
            make_spec(periodic=turns)
    observation = make_observation(0)
    np.testing.assert_array_equal(
        to_written(np.ones((3, 3)), observation, make_spec()), np.ones((3, 3))
    )
    np.testing.assert_array_equal(shortest(np.array([0.0, 350.0]), TURNS), [0, -10])
