import json
import pickle

import numpy as np
import pytest
from conftest import make_observation, make_spec

from vla0 import InputError, Spec
from vla0.core.relative import offset, state_of


def test_load_inverts_save(tmp_path, spec):
    spec.save(tmp_path)
    assert Spec.load(tmp_path) == spec


def test_a_folder_without_spec_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"vla0\.json"):
        Spec.load(tmp_path)


def test_an_unknown_key_is_refused_and_the_nearest_named(tmp_path, spec):
    spec.save(tmp_path)
    file = tmp_path / "vla0.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"horizn": 8}))
    with pytest.raises(InputError, match="did you mean 'horizon'"):
        Spec.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 99}', '{"version": 1}'])
def test_a_damaged_spec_is_refused(tmp_path, content):
    (tmp_path / "vla0.json").write_text(content)
    with pytest.raises(InputError):
        Spec.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"bins": 1}, {"bins": 10.5}, {"bins": True}, {"horizon": 0}, {"crop": 0.0}, {"crop": 1.1}, {"fps": 0.0}, {"fps": float("nan")},
        {"cameras": ()}, {"cameras": ("a", "a")}, {"image_size": 5}, {"history": 0}, {"low": (0.0,)}, {"low": (9.0, 9.0, 9.0)},
        {"low": (float("nan"), 0.0, 0.0)}, {"relative": (3,)}, {"relative": (0, 0)}, {"system": "{unknown}"}, {"state": ((0.0,),)},
    ],
)  # fmt: skip
def test_an_incoherent_spec_is_refused_on_construction(change):
    with pytest.raises(InputError):
        make_spec(**change)


def test_the_system_text_is_the_published_one():
    spec = make_spec(system=Spec.system, horizon=8, bins=1000, low=(0.0,) * 7, high=(1.0,) * 7)
    assert spec.system_text() == (
        "Analyze the input image and predict robot actions for the next 8 timesteps. Each action has 7 dimensions. "
        "Output a single sequence of 56 integers (0-1000 each), representing the 8 timesteps sequentially. "
        "Provide only space separated numbers. Nothing else."
    )


def test_an_error_says_expected_got_remedy_and_crosses_processes():
    error = pickle.loads(pickle.dumps(InputError("a", "b", "c")))
    assert str(error) == "expected a; got b; c"


def test_a_state_that_is_missing_or_broken_is_refused(spec):
    from dataclasses import replace

    observation = make_observation(0)
    for state in (None, np.zeros(3), np.array([np.nan, 0.0]), np.zeros((2, 1))):
        with pytest.raises(InputError):
            state_of(replace(observation, state=state), spec, 2)


def test_only_relative_dimensions_are_offset():
    spec = make_spec(relative=(1,))
    observation = make_observation(0)
    assert offset(observation, spec).tolist() == [0.0, observation.state[1], 0.0]
    assert offset(observation, make_spec()).tolist() == [0.0, 0.0, 0.0]
