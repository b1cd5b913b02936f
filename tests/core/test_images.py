from dataclasses import replace

import numpy as np
import pytest
from conftest import make_observation, make_spec
from hypothesis import given
from hypothesis import strategies as st

from vla0 import InputError, Observation
from vla0.core.images import compose


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([28, 56, 112]),
    st.booleans(),
)
def test_shapes_are_those_of_the_spec(cameras, history, tile, size, training):
    names = tuple(f"camera{i}" for i in range(cameras))
    spec = make_spec(cameras=names, history=history, tile=tile, image_size=size)
    shape = (40, 60, 3) if history == 1 else (history, 40, 60, 3)
    observation = Observation({name: np.zeros(shape, np.uint8) for name in names}, "go")
    images = compose(observation, spec, np.random.default_rng(0) if training else None)
    expected = (
        [(size, size * cameras * history, 3)] if tile else [(size, size, 3)] * (cameras * history)
    )
    assert [image.shape for image in images] == expected
    assert all(image.dtype == np.uint8 for image in images)


def test_a_frame_of_the_right_size_passes_untouched_without_crop():
    spec = make_spec(crop=1.0, cameras=("front",), image_size=56)
    frame = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    np.testing.assert_array_equal(compose(Observation({"front": frame}, "go"), spec)[0], frame)


def test_acting_crops_the_centre():
    spec = make_spec(crop=0.5, cameras=("front",), image_size=28)
    frame = np.zeros((56, 56, 3), np.uint8)
    frame[14:42, 14:42] = 200
    assert (compose(Observation({"front": frame}, "go"), spec)[0] == 200).all()


def test_cameras_stand_in_the_order_of_the_spec_and_frames_oldest_first():
    spec = make_spec(cameras=("b", "a"), history=2, crop=1.0, image_size=28)
    stack = {"a": [30, 40], "b": [10, 20]}
    images = {
        name: np.stack([np.full((28, 28, 3), v, np.uint8) for v in values])
        for name, values in stack.items()
    }
    tiled = compose(Observation(images, "go"), spec)[0]
    assert [tiled[0, i * 28, 0] for i in range(4)] == [10, 20, 30, 40]
    apart = compose(Observation(images, "go"), replace(spec, tile=False))
    assert [image[0, 0, 0] for image in apart] == [10, 20, 30, 40]


def test_training_is_random_and_repeatable_and_acting_is_neither(observation, spec):
    one, same, other = (
        compose(observation, spec, np.random.default_rng(seed))[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_array_equal(compose(observation, spec)[0], compose(observation, spec)[0])


def test_without_crop_and_jitter_training_sees_what_acting_sees(observation):
    spec = make_spec(crop=1.0)
    np.testing.assert_array_equal(
        compose(observation, spec, np.random.default_rng(3), jitter=(0, 0, 0, 0))[0],
        compose(observation, spec)[0],
    )


def test_frames_of_one_camera_are_cropped_and_coloured_alike():
    spec = make_spec(cameras=("front",), history=2, image_size=28)
    frame = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    tiled = compose(
        Observation({"front": np.stack([frame, frame])}, "go"), spec, np.random.default_rng(0)
    )[0]
    np.testing.assert_array_equal(tiled[:, :28], tiled[:, 28:])


def test_inputs_are_never_changed(observation, spec):
    before = {name: frame.copy() for name, frame in observation.images.items()}
    compose(observation, spec, np.random.default_rng(0))
    for name, frame in before.items():
        np.testing.assert_array_equal(frame, observation.images[name])


@pytest.mark.parametrize(
    ("front", "message"),
    [
        (np.zeros((48, 64), np.uint8), "shape"), (np.zeros((3, 48, 64), np.uint8), "shape"), (np.zeros((48, 64, 4), np.uint8), "shape"),
        (np.zeros((2, 48, 64, 3), np.uint8), "shape"), (np.zeros((0, 64, 3), np.uint8), "shape"),
        (np.zeros((48, 64, 3), np.float32), "multiply"), (np.full((48, 64, 3), 2.5), "data.depth"), (np.full((48, 64, 3), 700, np.uint16), "data.depth"), (np.zeros((48, 64, 3), np.int64), "uint8"), (None, "shape"), ("file.png", "shape"),
    ],
)  # fmt: skip
def test_frames_of_a_wrong_shape_or_dtype_are_refused(spec, front, message):
    with pytest.raises(InputError, match=message):
        compose(
            replace(make_observation(0), images={**make_observation(0).images, "front": front}),
            spec,
        )


def test_a_missing_camera_is_named(spec):
    with pytest.raises(InputError, match="camera 'wrist'"):
        compose(Observation({"front": np.zeros((48, 64, 3), np.uint8)}, "go"), spec)
