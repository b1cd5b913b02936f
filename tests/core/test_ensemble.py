import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla0 import InputError
from vla0.core.ensemble import NONE, TemporalEnsemble, ensemble_actions, weights_by_age


def chunks_of(chunk_size, count, dimensions=2):
    return np.random.default_rng(0).normal(size=(count, chunk_size, dimensions)).astype(np.float32)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["mean", "v1", "v2:0.8"]),
    st.integers(1, 20),
)
def test_an_action_is_the_weighted_mean_of_all_predictions_for_its_instant(
    chunk_size, n_action_steps, name, steps
):
    if -(-chunk_size // n_action_steps) < 2 or n_action_steps > chunk_size:
        with pytest.raises(InputError):
            TemporalEnsemble(chunk_size, n_action_steps, name)
        return
    chunks = chunks_of(chunk_size, steps)
    ensemble = TemporalEnsemble(chunk_size, n_action_steps, name)
    weights = weights_by_age(name, -(-chunk_size // n_action_steps))
    for step in range(steps):
        if step % n_action_steps == 0:
            ensemble.add(chunks[step], step)
        newest = step - step % n_action_steps
        pairs = [
            (chunks[q][step - q], weights[age])
            for age, q in enumerate(range(newest, -1, -n_action_steps))
            if step - q < chunk_size
        ]
        expected = sum(row.astype(np.float64) * w for row, w in pairs) / sum(w for _, w in pairs)
        np.testing.assert_allclose(ensemble.action(step), expected, rtol=1e-5, atol=1e-6)


def test_weights_by_age_are_the_published_ones():
    assert weights_by_age("v1", 4) == (1, 0.5, 0.5, 0.5)
    assert weights_by_age("v2:0.5", 3) == (1, 0.5, 0.25)
    assert weights_by_age("mean", 3) == (1, 1, 1)
    assert weights_by_age(NONE, 3) == (1,)


@pytest.mark.parametrize(
    "name", ["v3", "v2:", "v2:0", "v2:nan", "v2:2", "", [], [0.0, 1.0], [1.0, -1.0], [1.0] * 9]
)
def test_unknown_weights_are_refused(name):
    with pytest.raises(InputError):
        weights_by_age(name, 4)


@pytest.mark.parametrize("weights", ["v1", "mean", "v2:0.9", [1.0]])
def test_ensembling_that_would_do_nothing_is_refused(weights):
    with pytest.raises(InputError, match="would do nothing"):
        TemporalEnsemble(8, 8, weights)
    TemporalEnsemble(8, 8, NONE)


@pytest.mark.parametrize("n_action_steps", [0, 9])
def test_a_replan_beyond_the_chunk_is_refused(n_action_steps):
    with pytest.raises(InputError):
        TemporalEnsemble(8, n_action_steps, NONE)


def test_without_ensembling_the_newest_chunk_alone_acts():
    chunks = chunks_of(4, 9)
    ensemble = TemporalEnsemble(4, 2, NONE)
    for step in range(9):
        if step % 2 == 0:
            ensemble.add(chunks[step], step)
        np.testing.assert_array_equal(ensemble.action(step), chunks[step - step % 2][step % 2])


def test_reset_forgets_all():
    ensemble = TemporalEnsemble(4)
    ensemble.add(chunks_of(4, 1)[0], 0)
    ensemble.reset()
    with pytest.raises(InputError):
        ensemble.action(0)


def test_time_does_not_run_backwards():
    ensemble = TemporalEnsemble(4)
    ensemble.add(chunks_of(4, 1)[0], 5)
    with pytest.raises(InputError):
        ensemble.add(chunks_of(4, 1)[0], 5)
    with pytest.raises(InputError):
        ensemble.action(9)


@given(st.integers(1, 12), st.integers(1, 8), st.sampled_from(["v1", "mean"]))
def test_ensemble_actions_is_the_temporal_ensemble_of_successive_queries(count, k, weights):
    chunks = chunks_of(8, count)
    ensemble = TemporalEnsemble(8, 1, weights_by_age(weights, k) if k > 1 else NONE)
    for step, chunk in enumerate(chunks):
        ensemble.add(chunk, step)
    np.testing.assert_allclose(
        ensemble_actions(list(chunks), k, weights), ensemble.action(count - 1), rtol=1e-5, atol=1e-6
    )


def test_ensemble_actions_refuses_nothing_and_k_below_one():
    with pytest.raises(InputError):
        ensemble_actions([])
    with pytest.raises(InputError):
        ensemble_actions(list(chunks_of(8, 2)), k=0)
