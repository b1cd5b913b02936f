"""Laws of distillation: a student learns a teacher's probabilities of the symbols."""

import numpy as np
import pytest
import torch
from conftest import make_recipe
from safetensors.torch import load_file

from vla0 import InputError
from vla0.core.prompt import IGNORE
from vla0.core.spec import MAIN
from vla0.data.config import Augmentation, DataConfig
from vla0.data.dataset import Samples, collator
from vla0.data.lerobot import Source
from vla0.policy import VLA0
from vla0.train.config import TrainConfig, build
from vla0.train.loss import answered
from vla0.train.run import main
from vla0.train.teacher import INPUT, divergence, load_teacher


def config_of(dataset, output, **changes):
    return build(TrainConfig, make_recipe(dataset, output, **changes), "test")


@pytest.fixture(scope="module")
def taught(dataset, tmp_path_factory):
    """The folder of a model that has learned a little."""
    return main(config_of(dataset, tmp_path_factory.mktemp("teacher") / "run"))


def samples_of(dataset, spec):
    """Three rows, as a run draws them."""
    source = Source(
        DataConfig(
            dataset=str(dataset),
            cameras={"front": "observation.images.top"},
            state="observation.state",
        )
    )
    samples = Samples(source, spec)
    return [samples[row] for row in (0, 5, 9)]


def apart(dataset, student, folder):
    """How far a student's probabilities are from a teacher's, on three rows."""
    rows = samples_of(dataset, student.spec)
    teacher = load_teacher(str(folder), {MAIN: student.spec}, torch.float32)
    _, logits, targets = answered(student.model, collator([student.prompt], None)(rows))
    probabilities = teacher.probabilities(collator(teacher.prompts, None)(rows))
    with torch.no_grad():
        return divergence(logits[..., student.prompt.symbol_ids], targets, probabilities).sum()


def test_the_divergence_is_that_of_the_definition_over_labelled_tokens():
    torch.manual_seed(0)
    logits, other = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    probabilities = other.softmax(-1)
    targets = torch.tensor([[IGNORE, 4, 5], [1, IGNORE, IGNORE]])
    p, q = probabilities.double().numpy(), logits.double().softmax(-1).numpy()
    each = (p * np.log(p / q)).sum(-1)
    expected = [each[0, 1] + each[0, 2], each[1, 0]]
    np.testing.assert_allclose(divergence(logits, targets, probabilities), expected, rtol=1e-5)
    same = divergence(other, targets, probabilities)
    torch.testing.assert_close(same, torch.zeros(2), atol=1e-5, rtol=0)


def test_a_teacher_sees_the_same_crops_colours_and_hidden_digits(dataset, taught):
    policy, prompt = VLA0.from_pretrained(taught), VLA0.from_pretrained(taught).prompt
    rows = samples_of(dataset, policy.spec)
    batch = collator([policy.prompt], Augmentation(), [prompt], INPUT)(rows)
    others = {name.removeprefix(INPUT) for name in batch if name.startswith(INPUT)}
    assert others == {name for name in batch if not name.startswith(INPUT)}
    assert all(torch.equal(batch[name], batch[INPUT + name]) for name in others)


def test_from_itself_a_student_has_nothing_to_learn(dataset, taught):
    assert apart(dataset, VLA0.from_pretrained(taught), taught) < 1e-4


def student_of(dataset, output, taught, measure=None, **changes):
    settings = {"teacher": str(taught), "teacher_weight": 1.0, "learning_rate": 3e-3}
    return main(config_of(dataset, output, **settings | changes), measure)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_a_student_of_any_family_comes_nearer_to_its_teacher(dataset, taught, tmp_path, family):
    settings = {"name": f"tiny:{family}", "save_every_n_steps": 40}
    few, many = (
        VLA0.from_pretrained(
            student_of(dataset, tmp_path / str(steps), taught, num_steps=steps, **settings)
        )
        for steps in (1, 40)
    )
    assert apart(dataset, many, taught) < apart(dataset, few, taught) / 2


def test_a_student_resumes_as_if_it_had_not_been_killed(dataset, taught, tmp_path):
    class KilledError(Exception):
        pass

    def kill(policy, folder):
        raise KilledError

    whole = student_of(dataset, tmp_path / "whole", taught)
    with pytest.raises(KilledError):
        student_of(dataset, tmp_path / "parts", taught, kill)
    parts = student_of(dataset, tmp_path / "parts", taught)
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    alone = load_file(main(config_of(dataset, tmp_path / "alone")) / "model.safetensors")
    assert any(not torch.equal(weight, alone[name]) for name, weight in one.items())


def test_a_teacher_that_writes_actions_otherwise_is_refused(dataset, taught, tmp_path):
    def refused(match, **changes):
        with pytest.raises(InputError, match=match):
            student_of(dataset, tmp_path / "run", taught, **changes)

    refused("whose bins is that of the run, 50", action={"chunk_size": 2, "action_bins": 50})
    refused("whose chunk_size", action={"chunk_size": 3, "action_bins": 100})
    data = make_recipe(dataset, tmp_path)["data"]
    refused("cameras", data={**data, "cameras": {"hand": "observation.images.hand"}})
    refused("whose state", data={key: data[key] for key in ("dataset", "cameras")})
    refused("checkpoint folder or Hub id", teacher=str(tmp_path / "nobody"))
    refused("model.teacher with training.teacher_weight", teacher=None)
    for weight in (0, 1.5, float("nan")):
        refused("teacher_weight in 0..1", teacher_weight=weight)
