"""Every family of models: the same method, by the model's and the processor's own means."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TASKS, make_observation, make_recipe, make_spec
from other_families import aya_model, aya_processor, hybrid_model, next_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vla0 import InputError
from vla0.backbones import image_options, of_processor, render, template_style, turns_of
from vla0.checkpoint.tiny import tiny_model, tiny_processor
from vla0.checkpoint.tiny_families import FAMILIES
from vla0.core.codec import ActionCodec, Grammar
from vla0.core.greedy import decode
from vla0.core.images import compose
from vla0.core.prompt import IGNORE, Prompt, words
from vla0.decode import GreedyDecoder, SpeculativeDecoder, decoder
from vla0.decode.engine import Engine
from vla0.decode.fused_engine import FusedEngine
from vla0.decode.probe import Trial, tried
from vla0.policy import VLA0
from vla0.train.config import Lora, TrainConfig, build
from vla0.train.lora import adapted, lora_layers, merged
from vla0.train.loss import answered, summed
from vla0.train.run import main
from vla0.train.trainer import sharded

WORDS = ["State: ", "Write integers.", *TASKS]
SMALL = {"width": 48, "layers": 2, "heads": 3, "vision_width": 32, "vision_layers": 2}
SMALL |= {"vision_heads": 2}
UNKNOWN = "aya_vision"  # is named nowhere in vla0
SIDES = {"qwen2_5_vl": 56, "qwen3_vl": 64}  # others' processors make images of one size


@pytest.fixture(scope="module", params=[*FAMILIES, UNKNOWN])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def own_processor(family):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    if family == UNKNOWN:
        return aya_processor(WORDS)
    return tiny_processor(WORDS, family=family)


def model_of(processor, seed=0):
    """A tiny model with the weights of a seed."""
    made = tiny_model if of_processor(processor).name else aya_model
    return made(processor, seed=seed, **SMALL)


@pytest.fixture(scope="module")
def own_policy(family, own_processor):
    spec = make_spec(image_size=SIDES.get(family, 56), tile=False, chunk_size=2)
    return VLA0(model_of(own_processor, seed=3), own_processor, spec)


def messages_of(observation, spec):
    """The chat of an observation, with its images, as a user of transformers would write it."""
    images = [{"type": "image", "image": image} for image in compose(observation, spec)]
    text = {"type": "text", "text": words(observation, spec)}
    system = {"type": "text", "text": spec.system_text()}
    return [
        {"role": "system", "content": [system]},
        {"role": "user", "content": [*images, text]},
    ]


def test_a_batch_is_what_the_processor_makes_of_the_chats(own_policy):
    prompt, spec = own_policy.prompt, own_policy.spec
    observations = [
        replace(make_observation(seed), instruction="push" + " again" * seed) for seed in range(3)
    ]
    batch = prompt.observe(observations)
    expected = prompt.processor.apply_chat_template(
        [messages_of(observation, spec) for observation in observations],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={
            "padding": True,
            "padding_side": "left",
            **image_options(prompt.processor),
        },
    )
    opening = len(prompt.processor.tokenizer.encode(prompt.opening, add_special_tokens=False))
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        given = batch[name]
        if value.shape == expected["input_ids"].shape and opening:
            given = given[:, :-opening]
        torch.testing.assert_close(given, value, rtol=0, atol=0, check_dtype=False)


def test_an_answer_is_what_the_tokenizer_makes_of_the_whole_chat(own_policy):
    """Appended tokens are those of the template's assistant turn, to its end."""
    prompt, spec = own_policy.prompt, own_policy.spec
    answer = ActionCodec(spec).write(np.arange(6).reshape(2, 3) * 17)
    observation = make_observation(0)
    batch = prompt.observe([observation], [answer])
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    expected = prompt.processor.apply_chat_template(
        [*messages_of(observation, spec), turn],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=image_options(prompt.processor),
    )["input_ids"]
    length = batch["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"], expected[:, :length])
    assert batch["labels"][0, -len(answer) - 1 :].tolist() == [
        *(prompt.ids[character] for character in answer),
        prompt.end_id,
    ]
    assert (batch["labels"][0, : -len(answer) - 1] == IGNORE).all()


def test_a_large_picture_is_not_cut_into_tiles(family, own_policy):
    """It has as many tokens as a small one, where the processor makes images of one size."""
    if family in SIDES:
        assert own_policy.prompt.options == {"do_resize": False}
        return
    lengths = {
        Prompt(replace(own_policy.spec, image_size=side), own_policy.processor)
        .observe([make_observation(0)])["input_ids"]
        .shape[1]
        for side in (56, 448)
    }
    assert len(lengths) == 1


def test_what_tiles_cost_is_said_where_no_option_turns_them_off(caplog):
    """Of 4 x 4 tokens whole, and as many again as a tile, with one at the end of each row."""
    prompt = Prompt(replace(make_spec(), image_size=56), next_processor(["0 1"]))
    assert "one of 56 x 56 pixels takes 36 tokens" in caplog.text
    assert "see image_grid_pinpoints in the model's preprocessor_config.json" in caplog.text
    caplog.clear()
    Prompt(prompt.spec, aya_processor(["0 1"]))  # it has max_patches too, which are off
    assert "tiles" not in caplog.text


def test_the_loss_is_the_models_own(own_policy):
    spec, model = own_policy.spec, own_policy.model
    answers = [ActionCodec(spec).write(np.full((2, 3), 11 * row)) for row in range(3)]
    observations = [make_observation(seed) for seed in range(3)]
    batch = own_policy.prompt.observe(observations, answers)
    with torch.no_grad():
        expected = model.eval()(**batch).loss
        _, logits, targets = answered(model, batch)
        ours = summed(logits, targets).sum() / (targets != IGNORE).sum()
        torch.testing.assert_close(ours, expected)
        alone = [
            answered(model, own_policy.prompt.observe([observation], [answer]))
            for observation, answer in zip(observations, answers, strict=True)
        ]
        rows = torch.cat([summed(logits, targets) for _, logits, targets in alone])
        torch.testing.assert_close(summed(logits, targets), rows, rtol=1e-4, atol=1e-4)


def test_words_that_spell_special_tokens_are_plain_text(own_policy):
    prompt = own_policy.prompt
    tokenizer = prompt.processor.tokenizer
    plain = prompt.observe([make_observation(0)])["input_ids"][0].tolist()
    for token in tokenizer.get_added_vocab():
        hostile = replace(make_observation(0), instruction=f"push {token} the block")
        ids = prompt.observe([hostile])["input_ids"][0].tolist()
        special = set(tokenizer.added_tokens_decoder)
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
        assert token in tokenizer.decode(ids)


def test_lora_finds_every_linear_layer_of_tower_and_language_model(family, own_processor):
    model = model_of(own_processor)
    names = set(lora_layers(model, freeze_vision=False))
    every = {n for n, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    left = {name for name in every - names if "lm_head" not in name}
    assert all("projector" in name or "connector" in name for name in left), left
    tower = {n for n in names if n not in lora_layers(model, freeze_vision=True)}
    assert len(tower) >= 2 * 4
    model = adapted(model, Lora(rank=2), freeze_vision=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    weights = merged(model)
    fresh = model_of(own_processor)
    before = fresh.state_dict()
    changed = {name for name in before if not torch.equal(before[name], weights[name])}
    assert changed == {f"{name}.weight" for name in names}


def test_a_frozen_tower_is_frozen_whole(own_processor):
    model = adapted(model_of(own_processor), Lora(), freeze_vision=True)
    assert not any(p.requires_grad for p in model.get_encoder(modality="image").parameters())
    assert all(p.requires_grad for p in model.get_decoder().parameters())


def test_shards_are_split_at_layers_that_the_model_has(own_processor):
    model = model_of(own_processor)
    wrapped = sharded(model)["fsdp_config"]["transformer_layer_cls_to_wrap"]
    names = [type(part).__name__ for part in model.modules()]
    assert sum(name in wrapped for name in names) >= 4  # the layers of both parts
    assert all(name in names for name in wrapped)


@pytest.fixture(scope="module")
def reads_datasets():
    pytest.importorskip("lerobot", reason="the base package alone has no lerobot")


@pytest.mark.usefixtures("reads_datasets")
def test_a_run_learns_resumes_and_leaves_what_transformers_loads(
    family, own_processor, request, tmp_path
):
    """Killed after two of four steps, it ends in the weights of a run that was not."""
    dataset, name = request.getfixturevalue("dataset"), f"tiny:{family}"
    if family == UNKNOWN:
        name = str(tmp_path / "base")
        model_of(own_processor).save_pretrained(name)
        own_processor.save_pretrained(name)

    def config_of(run):
        recipe = make_recipe(dataset, tmp_path / run, name=name)
        recipe["model"]["tiny"] = {} if family == UNKNOWN else SMALL
        recipe["spec"] = recipe.get("spec", {}) | {"image_size": SIDES.get(family, 56)}
        return build(TrainConfig, recipe, "test")

    class KilledError(Exception):
        pass

    def kill(policy, folder):
        raise KilledError

    ends = {"whole": main(config_of("whole"))}
    with pytest.raises(KilledError):
        main(config_of("parts"), kill)
    ends["parts"] = main(config_of("parts"))
    model = AutoModelForImageTextToText.from_pretrained(ends["whole"])
    resumed = AutoModelForImageTextToText.from_pretrained(ends["parts"]).state_dict()
    assert all(torch.equal(weight, resumed[name]) for name, weight in model.state_dict().items())
    assert type(AutoProcessor.from_pretrained(ends["whole"])) is type(own_processor)
    policy = VLA0.from_pretrained(ends["whole"])
    observation = replace(make_observation(0), state=np.zeros(len(policy.spec.state[0])))
    assert np.isfinite(policy.predict_batch([observation])).all()


def test_a_model_without_a_chat_template_is_refused(own_processor, spec):
    processor = type("Bare", (), vars(own_processor) | {"chat_template": None})()
    template = processor.tokenizer.chat_template
    try:
        processor.tokenizer.chat_template = None
        with pytest.raises(InputError, match="chat template"):
            Prompt(replace(spec, image_size=448), processor)
    finally:
        processor.tokenizer.chat_template = template


def test_numbered_images_are_refused_where_the_template_does_not_number_them(family, own_processor):
    spec = make_spec(image_size=448, vision_id=True, tile=False)
    if "qwen" in family:
        Prompt(spec, own_processor)
    else:
        with pytest.raises(InputError, match="does not number images"):
            Prompt(spec, own_processor)


def same_as_plain(policy, rounds, rows):
    """How many chunks the fast decoder wrote, all as the plain one did."""
    fast = SpeculativeDecoder(policy.model, policy.prompt, tree_size=16)
    rng, chunks = np.random.default_rng(0), 0
    for number in range(rounds):
        batch = policy.prompt.observe([make_observation(10 * number + row) for row in range(rows)])
        expected = decode(policy.model, batch, policy.prompt)
        wrong = rng.integers(0, policy.spec.bins + 1, expected.shape)
        for guesses in (None, list(expected), list(wrong), [None, *wrong[1:]]):
            np.testing.assert_array_equal(fast.decode(batch, guesses=guesses), expected)
            chunks += rows
        assert fast.passes < 2 * policy.spec.numbers  # at least two tokens a number
    return chunks


@pytest.mark.parametrize("rows", [1, 4])
def test_the_fast_decoder_writes_what_the_plain_one_does(own_policy, rows):
    assert isinstance(own_policy.decoder, SpeculativeDecoder)
    same_as_plain(own_policy, 2, rows)


@pytest.mark.slow
def test_200_chunks_of_the_fast_decoder_are_the_plain_ones(own_policy):
    assert same_as_plain(own_policy, 6, 1) + same_as_plain(own_policy, 6, 8) >= 200


def test_windows_of_attention_shorter_than_the_prompt_are_kept(own_processor, family):
    """Prompts here have some 80 tokens, and a window of 24."""
    if family != "gemma3":
        pytest.skip("has no windows")
    model = model_of(own_processor, seed=5)
    model.config.text_config.sliding_window = 24
    for layer in model.get_decoder().layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 24
    policy = VLA0(model, own_processor, make_spec(image_size=56, tile=False, chunk_size=2))
    assert isinstance(policy.decoder, SpeculativeDecoder)
    same_as_plain(policy, 2, 3)


class Spoilt(Engine):
    """An engine of which something is wrong."""

    what = ""

    def _hidden(self, cache, start, accepted, seen, tokens, places, paths):
        nodes = torch.arange(tokens.shape[1])
        if self.what == "flat positions":
            places = places[:, :1] + nodes
        elif self.what == "masks that let siblings see each other":
            paths = torch.minimum(nodes, nodes[:, None]).expand_as(paths)
        elif self.what == "padding that is seen":
            seen = torch.ones_like(seen)
        elif self.what == "positions that are not read":
            places = places[:, :1].expand_as(places)
        return super()._hidden(cache, start, accepted, seen, tokens, places, paths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_passes_what_is_right_and_nothing_else(own_policy, dtype):
    model = type(own_policy.model)(own_policy.model.config)
    model.load_state_dict(own_policy.model.state_dict())
    model = model.to(dtype).eval()
    prompt, grammar = own_policy.prompt, Grammar(100, 6)
    assert tried(Engine(model, prompt.symbol_ids, grammar, False), prompt).fault(dtype) is None
    for what in (
        "flat positions",
        "masks that let siblings see each other",
        "padding that is seen",
        "positions that are not read",
    ):
        engine = Spoilt(model, prompt.symbol_ids, grammar, False)
        engine.what = what
        assert tried(engine, prompt).fault(dtype), what


def test_a_model_that_fails_the_trial_is_decoded_plainly_and_the_log_says_why(
    own_policy, monkeypatch, caplog
):
    if isinstance(own_policy.decoder.engine, FusedEngine):
        pytest.skip("is known, and not tried")
    monkeypatch.setattr("vla0.decode.probe.tried", lambda *_: Trial(0.3, {}))
    chosen = decoder(own_policy.model, own_policy.prompt)
    assert isinstance(chosen, GreedyDecoder)
    assert "0.3 off plain passes" in caplog.text


def test_a_hybrid_is_decoded_plainly_and_the_log_says_why(caplog):
    """Over recurrent layers four tokens at once are not four tokens one after another."""
    processor = tiny_processor(WORDS, family="qwen3_vl")
    spec = make_spec(image_size=64, tile=False, chunk_size=2)
    policy = VLA0(hybrid_model(processor, **SMALL), processor, spec)
    assert isinstance(policy.decoder, GreedyDecoder)
    assert "layers of linear_attention" in caplog.text
    assert np.isfinite(policy.predict_batch([make_observation(0)])).all()


class Tokens:
    """A tokenizer of which only the pieces are known."""

    def __init__(self, pieces, dummy=()):
        self.pieces, self.dummy = sorted(pieces, key=len, reverse=True), list(dummy)

    def encode(self, text, add_special_tokens=False):
        ids = list(self.dummy)
        while text:
            piece = next(piece for piece in self.pieces if text.startswith(piece))
            ids.append(10 + sorted(self.pieces).index(piece))
            text = text[len(piece) :]
        return ids


PIECES = [*"0123456789", " ", "?"]


def test_digits_and_the_space_are_one_token_each_or_the_model_is_refused(caplog):
    from vla0.backbones import symbol_tokens

    characters = "".join(PIECES)
    plain = symbol_tokens(Tokens(PIECES), characters, 1)
    assert len(set(plain.values())) == 12
    assert not caplog.text
    # a mark before the first word, as SentencePiece writes it
    assert symbol_tokens(Tokens(PIECES, dummy=[5]), characters, 1) == plain
    # merged digits are said, and written one by one all the same
    merged = symbol_tokens(Tokens([*PIECES, "10", "100"]), characters, 1)
    assert len(set(merged.values())) == 12
    assert "several digits" in caplog.text
    with pytest.raises(InputError, match="two are the same"):
        symbol_tokens(Tokens(PIECES), characters, plain["0"])

    class Bytes(Tokens):
        def encode(self, text, add_special_tokens=False):
            return [byte for character in text for byte in (1, ord(character))]

    with pytest.raises(InputError, match="one token each"):
        symbol_tokens(Bytes(PIECES), characters, 1)


def test_a_model_that_takes_no_pictures_is_refused_in_one_line(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from vla0.checkpoint import io

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match=r"^expected a model that takes pictures and writes text"):
        io.load(tmp_path / "llama")


def test_a_first_query_measures_the_tree_on_a_machine_that_has_not_yet(
    own_policy, tmp_path, monkeypatch
):
    """Before the trial has read anything, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    batch = own_policy.prompt.observe([make_observation(0)])
    fast = SpeculativeDecoder(own_policy.model, own_policy.prompt)
    expected = decode(own_policy.model, batch, own_policy.prompt)
    np.testing.assert_array_equal(fast.decode(batch), expected)
    assert (tmp_path / "vla0" / "decode.json").is_file()


def test_a_trial_that_raises_leaves_plain_decoding_and_no_approximate_one(
    own_policy, monkeypatch, caplog
):
    if isinstance(own_policy.decoder.engine, FusedEngine):
        pytest.skip("is known, and not tried")

    def broken(*_):
        raise AttributeError("no such cache")

    monkeypatch.setattr("vla0.decode.probe.tried", broken)
    assert isinstance(decoder(own_policy.model, own_policy.prompt), GreedyDecoder)
    assert "a trial of trees ended in AttributeError: no such cache" in caplog.text
    with pytest.raises(InputError, match="no such cache"):
        own_policy.approximate("relaxed")


SYSTEM, USER = "{{ m.content }}", "{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}"


def template(system, user, answer=None):
    """A chat template whose turns write their content in these ways."""
    return (
        "{% for m in messages %}{% if m.role == 'system' %}"
        + system
        + "{% elif m.role == 'user' %}"
        + user
        + "{% else %}"
        + (answer or user)
        + "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )


@pytest.mark.parametrize(
    ("text", "style"),
    [
        (template(USER, USER), "parts"),
        (template(SYSTEM, USER, SYSTEM), "strings"),
        (template("{{ raise_exception('no system role') }}", USER), "user"),
        (template("", USER), "user"),
        (template("", "only <image>", USER), None),
        (template(SYSTEM, USER, "{{ m.content.x.y }}"), None),
    ],
)
def test_a_template_writes_all_that_it_is_given_or_is_refused(text, style):
    processor = tiny_processor(WORDS)
    processor.chat_template = text
    if style is None:
        with pytest.raises(InputError, match="chat template that writes"):
            template_style(processor, "Write 6 integers.")
    else:
        assert template_style(processor, "Write 6 integers.") == style


def test_a_template_with_a_clock_writes_the_same_every_day():
    processor = tiny_processor(WORDS)
    clock = "{% if not date_string %}{% set date_string = strftime_now('%S') %}{% endif %}"
    processor.chat_template = clock + "{{ date_string }}" + template(USER, USER)
    turns = turns_of("parts", "Write.", "push", 1)
    assert render(processor, turns).startswith("01 Jan 2025")


def test_a_vision_tower_that_is_not_apart_is_not_frozen_in_silence(own_processor, monkeypatch):
    model = model_of(own_processor)
    monkeypatch.setattr(type(model), "get_encoder", lambda self, modality=None: self)
    for lora in (Lora(), Lora(rank=2)):
        with pytest.raises(InputError, match="vision tower apart"):
            adapted(model, lora, freeze_vision=not lora.rank)


def test_in_16_bits_it_is_said_that_guesses_may_decide_between_equals(own_policy, caplog):
    model = type(own_policy.model)(own_policy.model.config).to(torch.bfloat16).eval()
    chosen = decoder(model, own_policy.prompt)
    assert isinstance(chosen, SpeculativeDecoder)
    known = isinstance(chosen.engine, FusedEngine)
    assert ("may depend on other guesses" in caplog.text) is not known
