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
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chunk_siz": 8}))
    with pytest.raises(InputError, match="did you mean 'chunk_size'"):
        Spec.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 99}', '{"version": 1}'])
def test_a_damaged_spec_is_refused(tmp_path, content):
    (tmp_path / "vla0.json").write_text(content)
    with pytest.raises(InputError):
        Spec.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"bins": 1}, {"bins": 10.5}, {"bins": True}, {"chunk_size": 0}, {"crop": 0.0}, {"crop": 1.1}, {"fps": 0.0}, {"fps": float("nan")},
        {"cameras": ()}, {"cameras": ("a", "a")}, {"image_size": 5}, {"history": 0}, {"low": (0.0,)}, {"low": (9.0, 9.0, 9.0)},
        {"low": (float("nan"), 0.0, 0.0)}, {"relative_dims": (3,)}, {"relative_dims": (0, 0)}, {"system": "{unknown}"}, {"state": ((0.0,),)},
    ],
)  # fmt: skip
def test_an_incoherent_spec_is_refused_on_construction(change):
    with pytest.raises(InputError):
        make_spec(**change)


def test_the_system_text_is_the_published_one():
    spec = make_spec(system=Spec.system, chunk_size=8, bins=1000, low=(0.0,) * 7, high=(1.0,) * 7)
    assert spec.system_text() == (
        "Analyze the input image and predict robot actions for the next 8 timesteps. Each action "
        "has 7 dimensions. "
        "Output a single sequence of 56 integers (0-1000 each), representing the 8 timesteps "
        "sequentially. "
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
    spec = make_spec(relative_dims=(1,))
    observation = make_observation(0)
    assert offset(observation, spec).tolist() == [0.0, observation.state[1], 0.0]
    assert offset(observation, make_spec()).tolist() == [0.0, 0.0, 0.0]


VERSION_1 = """{
  "version": 1, "low": [-1.0, 0.0], "high": [1.0, 2.0], "fps": 20.0, "cameras": ["front"], "base_model": "tiny",
  "horizon": 5, "bins": 100, "image_size": 56, "crop": 1.0, "tile": true, "history": 1, "vision_id": false,
  "state": [[0.0, 0.0], [1.0, 1.0]], "relative": [1], "periodic": [], "depth": [],
  "system": "Write {numbers} integers (0-{bins}), {horizon} steps of {dimensions}.", "ensemble_k": 2,
  "action_names": ["a", "b"], "state_names": null, "most_change": [0.25, 0.5]
}"""


def test_a_checkpoint_of_version_1_means_what_it_meant(tmp_path):
    (tmp_path / "vla0.json").write_text(VERSION_1)
    spec = Spec.load(tmp_path)
    assert (spec.chunk_size, spec.relative_dims, spec.max_step_change) == (5, (1,), (0.25, 0.5))
    assert spec.system_text() == "Write 10 integers (0-100), 5 steps of 2."
    assert Spec.parse(spec.text()) == spec
    assert json.loads(spec.text())["version"] == 2


def test_a_key_of_before_is_refused_with_its_name_of_now():
    content = json.loads(VERSION_1) | {"version": 2}
    with pytest.raises(InputError, match="unknown key 'horizon'; it is called 'chunk_size' now"):
        Spec.parse(json.dumps(content))
