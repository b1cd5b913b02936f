from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_observation, make_spec

from vla0 import InputError
from vla0.core.ensemble import ensemble_actions
from vla0.policy import VLA0


def test_predict_gives_a_chunk_inside_the_bounds(policy, observation):
    chunk = policy.predict(observation.images, observation.instruction, observation.state)
    assert chunk.shape == (3, 3)
    assert chunk.dtype == np.float32
    assert (chunk >= np.float32(policy.spec.low)).all()
    assert (chunk <= np.float32(policy.spec.high)).all()


def test_predict_is_pure(policy, observation):
    first, second = (
        policy.predict(observation.images, observation.instruction, observation.state)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_predict_batch_is_predict_for_each(policy):
    observations = [make_observation(seed) for seed in range(4)]
    alone = [policy.predict(o.images, o.instruction, o.state) for o in observations]
    np.testing.assert_array_equal(policy.predict_batch(observations), alone)


def test_chunk_size_gives_the_first_steps(policy, observation):
    whole = policy.predict(observation.images, observation.instruction, observation.state)
    part = policy.predict(
        image=observation.images,
        instruction=observation.instruction,
        state=observation.state,
        num_steps=2,
    )
    np.testing.assert_array_equal(part, whole[:2])
    for size in (0, 4, 1.0, True, "2"):
        with pytest.raises(InputError, match="num_steps"):
            policy.predict(
                observation.images, observation.instruction, observation.state, num_steps=size
            )


def test_one_image_is_enough_for_one_camera_and_refused_for_two(policy, processor, observation):
    with pytest.raises(InputError, match="wrist"):
        policy.predict(observation.images["front"], "go", observation.state)
    single = VLA0(policy.model, processor, make_spec(cameras=("front",)))
    chunk = single.predict(observation.images["front"], "go", observation.state)
    np.testing.assert_array_equal(
        chunk, single.predict({"front": observation.images["front"]}, "go", observation.state)
    )


def test_relative_actions_come_back_absolute(policy, processor, observation):
    plain = VLA0(policy.model, processor, make_spec())
    relative = VLA0(policy.model, processor, make_spec(relative_dims=(0,)))
    difference = relative.predict_batch([observation]) - plain.predict_batch([observation])
    np.testing.assert_allclose(difference[0, :, 0], observation.state[0], atol=1e-6)
    np.testing.assert_array_equal(difference[0, :, 1:], 0)


def test_act_is_the_ensemble_of_what_predict_gave(policy):
    policy.acting(n_action_steps=1, weights="v1").reset()
    chunks = []
    for seed in range(5):
        observation = make_observation(seed)
        chunks.append(
            policy.predict(observation.images, observation.instruction, observation.state)
        )
        expected = policy.ensemble_actions(chunks, k=3)
        np.testing.assert_allclose(policy.act(observation), expected, rtol=1e-6)
        np.testing.assert_array_equal(expected, ensemble_actions(chunks, 3))


def test_reset_forgets_all(policy, observation):
    policy.acting(n_action_steps=1, weights="v1").reset()
    first = policy.act(observation)
    policy.act(make_observation(1))
    policy.reset()
    np.testing.assert_array_equal(policy.act(observation), first)


def test_ensembling_that_would_do_nothing_is_refused(policy):
    with pytest.raises(InputError, match="would do nothing"):
        policy.acting(n_action_steps=policy.spec.chunk_size, weights="v1")


def test_the_published_example_runs(policy, processor, observation, tmp_path):
    VLA0(policy.model, processor, make_spec(cameras=("front",), state=None)).save_pretrained(
        tmp_path / "checkpoint"
    )
    model = VLA0.from_pretrained(str(tmp_path / "checkpoint"))
    model.eval()
    buffer = []
    for _ in range(3):
        buffer.append(
            model.predict(
                image=observation.images["front"], instruction="push the red block", num_steps=3
            )
        )
    assert model.ensemble_actions(buffer, k=5).shape == (3,)


@pytest.mark.parametrize(
    "change",
    [{"state": None}, {"state": np.array([np.nan, 0])}, {"images": {}}, {"instruction": ""}],
)
def test_a_broken_observation_is_refused(policy, observation, change):
    with pytest.raises(InputError):
        policy.predict_batch([replace(observation, **change)])
    with pytest.raises(InputError):
        policy.predict_batch([])


@pytest.fixture(params=["fast", "reference"])
def decoded(request, policy):
    """The policy with each decoder."""
    from vla0.decode import GreedyDecoder, SpeculativeDecoder

    other = VLA0(policy.model, policy.processor, policy.spec)
    if request.param == "reference":
        other.decoder = GreedyDecoder(policy.model, other.prompt)
    assert isinstance(
        other.decoder, GreedyDecoder if request.param == "reference" else SpeculativeDecoder
    )
    return other


@pytest.mark.parametrize("steps", [1, 2])
def test_a_chunk_that_begins_as_the_model_would_is_the_models(decoded, steps):
    """Steps that are committed to are the beginning of the text; what follows is what would have
    followed.
    """
    for seed in range(4):
        observation = make_observation(seed)
        whole = decoded.predict_batch([observation])[0]
        begun = replace(observation, action_prefix=whole[:steps])
        np.testing.assert_array_equal(decoded.predict_batch([begun])[0], whole)
        np.testing.assert_array_equal(np.stack(list(decoded.predict_stream(begun))), whole)


def test_both_decoders_go_on_alike_from_what_the_model_would_not_have_begun(policy):
    """In a batch where others begin from nothing, and of guesses that are wrong."""
    from vla0.decode import GreedyDecoder

    rng = np.random.default_rng(0)
    plain = VLA0(policy.model, policy.processor, policy.spec)
    plain.decoder = GreedyDecoder(policy.model, plain.prompt)
    low, high = map(np.array, (policy.spec.low, policy.spec.high))
    seen, rest = [], []
    for seed in range(6):
        action_prefix = None if seed % 3 == 0 else rng.uniform(low, high, (seed % 3, 3))
        seen.append(
            replace(
                make_observation(seed),
                action_prefix=action_prefix,
                draft_actions=rng.uniform(low, high, (3, 3)),
            )
        )
        rest.append(action_prefix)
    chunks = policy.predict_batch(seen)
    np.testing.assert_array_equal(chunks, plain.predict_batch(seen))
    for chunk, action_prefix in zip(chunks, rest, strict=True):
        if action_prefix is not None:  # within half a level
            assert (
                np.abs(chunk[: len(action_prefix)] - action_prefix)
                <= (high - low) / policy.spec.bins / 2 + 1e-6
            ).all()
    np.testing.assert_array_equal(policy.predict_batch(seen, 2 + 1), chunks)


def test_a_commitment_that_leaves_nothing_to_say_is_refused(policy):
    for action_prefix in (np.zeros((3, 3)), np.zeros((1, 2)), np.zeros(3), np.full((1, 3), np.nan)):
        with pytest.raises(InputError):
            policy.predict_batch([replace(make_observation(0), action_prefix=action_prefix)])


def test_settings_that_are_refused_change_nothing(policy):
    before = policy.settings
    with pytest.raises(InputError, match="do nothing"):
        policy.acting(3, "v1")
    assert policy.settings == before


def test_a_state_that_changes_nothing_is_said_once(policy, processor, caplog):
    own = VLA0(policy.model, processor, make_spec(state=None))
    images = make_observation(0).images
    own.predict(images, "go")
    assert not caplog.records
    for _ in range(2):
        own.predict(images, "go", state=np.ones(2))
    assert [record.getMessage() for record in caplog.records] == [
        "state= changes nothing: this checkpoint was trained without one"
    ]


def test_threads_that_share_a_policy_get_what_each_would_get_alone(policy):
    seen = [make_observation(seed) for seed in range(24)]
    alone = [policy.predict_batch([own])[0] for own in seen]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda own: policy.predict_batch([own])[0], seen))
        streamed = list(threads.map(lambda own: _streamed(policy, own), seen))
    np.testing.assert_array_equal(alone, together)
    for own, found in zip(alone, streamed, strict=True):
        # one stream at a time: others are told so
        assert found is None or np.array_equal(own, found)
    assert any(found is not None for found in streamed)


def _streamed(policy, observation):
    try:
        return np.stack(list(policy.predict_stream(observation)))
    except InputError as error:
        if "one stream at a time" not in str(error):
            raise
        return None


def test_acting_averages_where_chunks_overlap_and_not_where_they_cannot(policy):
    try:
        assert policy.acting(1).settings == (1, "v1")
        assert policy.acting(policy.spec.chunk_size).settings == (policy.spec.chunk_size, "none")
        for steps in (0, policy.spec.chunk_size + 1):
            with pytest.raises(InputError, match="n_action_steps in"):
                policy.acting(steps)
    finally:
        policy.acting()
