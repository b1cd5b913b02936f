"""A policy behind somebody else's server: a small one of ours that speaks OpenAI's chat API and
keeps to what it is told.
"""

import base64
import io
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import regex
import torch
from conftest import make_observation, make_spec
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vla0 import VLA0, InputError
from vla0.checkpoint.tiny import tiny_model, tiny_processor
from vla0.core.codec import SYMBOLS, ChunkError, numerals
from vla0.decode.remote import _gbnf, _regex


class Engine:
    """Greedy text of a model under a regular expression, from messages alone: it knows nothing of
    vla0's prompts.
    """

    def __init__(self, policy):
        self.model, self.processor, self.symbols = (
            policy.model,
            policy.processor,
            policy.prompt.symbol_ids,
        )
        self.requests, self.lock = [], threading.Lock()

    @torch.inference_mode()
    def write(self, request):
        going_on = request.get("continue_final_message", False)
        images, messages = [], []
        for message in request["messages"]:
            content = message["content"]
            if isinstance(content, str):  # as vLLM gives it to templates that take lists
                content = [{"type": "text", "text": content}]
            else:
                urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
                images += [
                    Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
                    for url in urls
                ]
                content = [
                    {"type": "image"} if part["type"] == "image_url" else part for part in content
                ]
            messages.append({"role": message["role"], "content": content})
        text = self.processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not going_on,
            continue_final_message=going_on,
            **request.get("chat_template_kwargs", {}),
        )
        inputs = dict(self.processor(text=[text], images=images, return_tensors="pt"))
        pattern, written = regex.compile(request["structured_outputs"]["regex"]), ""
        while len(written) < request["max_tokens"]:
            scores = self.model(**inputs, use_cache=False).logits[0, -1][self.symbols]
            fits = [
                pattern.fullmatch(written + symbol, partial=True) is not None for symbol in SYMBOLS
            ]
            allowed = torch.tensor([*fits, pattern.fullmatch(written) is not None])
            chosen = int(scores.masked_fill(~allowed, float("-inf")).argmax())
            if chosen == len(SYMBOLS):
                return
            written += SYMBOLS[chosen]
            yield SYMBOLS[chosen]
            token = torch.tensor([[self.symbols[chosen]]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = torch.cat(
                    [inputs["mm_token_type_ids"], torch.zeros_like(token)], dim=1
                )


@contextmanager
def engine(policy, answer=None, repeats=False, once=False):
    """(base_url, engine). answer: instead of the model's, (status, body) of any request.

    As llama.cpp does: repeats what was begun; answers but `once` on a connection.
    """
    own = Engine(policy)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        answered = 0

        def log_message(self, *args):
            pass

        def reply(self, status, content, kind="application/json"):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            self.reply(200, json.dumps({"data": [{"id": "the-model"}]}).encode())

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answered += 1
            if once and self.answered > 1:
                self.close_connection = True
                return None
            own.requests.append((dict(self.headers), request))
            if answer is not None:
                return self.reply(answer[0], answer[1].encode())
            with own.lock:
                written = list(own.write(request))
            if not request.get("stream"):
                last = request["messages"][-1]
                text = (
                    last["content"] if repeats and last["role"] == "assistant" else ""
                ) + "".join(written)
                return self.reply(
                    200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                )
            lines = [
                f"data: {json.dumps({'choices': [{'delta': {'content': symbol}}]})}\n\n"
                for symbol in written
            ]
            return self.reply(
                200, "".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream"
            )

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", own
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def both(policy):
    """(the policy here, the same one behind a server, the server)."""
    with engine(policy) as (url, own):
        yield policy, VLA0.remote(url, policy.spec), own


def test_a_remote_policy_writes_what_the_local_one_does(both):
    here, there, _ = both
    seen = [make_observation(seed) for seed in range(3)]
    np.testing.assert_array_equal(there.predict_batch(seen), here.predict_batch(seen))
    np.testing.assert_array_equal(there.predict_batch(seen, 2), here.predict_batch(seen, 2))
    np.testing.assert_array_equal(
        there.predict(seen[0].images, seen[0].instruction, seen[0].state),
        here.predict(seen[0].images, seen[0].instruction, seen[0].state),
    )
    for steps in (None, 1, 2):
        np.testing.assert_array_equal(
            list(there.predict_stream(seen[0], steps)), list(here.predict_stream(seen[0], steps))
        )


def test_a_remote_chunk_goes_on_from_what_is_committed(both):
    here, there, own = both
    chunk = here.predict_batch([make_observation(0)])[0]
    for count in (1, 2):
        seen = replace(make_observation(0), action_prefix=chunk[:count] + np.float32(0.2))
        np.testing.assert_array_equal(there.predict_batch([seen]), here.predict_batch([seen]))
        np.testing.assert_array_equal(
            list(there.predict_stream(seen)), list(here.predict_stream(seen))
        )
    assert own.requests[-1][1]["continue_final_message"]


def test_a_server_may_repeat_what_was_begun(policy):
    chunk = policy.predict_batch([make_observation(0)])[0]
    seen = replace(make_observation(0), action_prefix=chunk[:1] + np.float32(0.2))
    with engine(policy, repeats=True) as (url, _):
        np.testing.assert_array_equal(
            VLA0.remote(url, policy.spec).predict_batch([seen]), policy.predict_batch([seen])
        )
    other = json.dumps({"choices": [{"message": {"content": "7 7"}}]})
    with engine(policy, (200, other)) as (url, _), pytest.raises(InputError, match="goes on after"):
        VLA0.remote(url, policy.spec).predict_batch([seen])


def test_a_connection_that_the_server_ends_costs_no_answer(policy):
    with engine(policy, once=True) as (url, _):
        there, expected = VLA0.remote(url, policy.spec), policy.predict_batch([make_observation(0)])
        for _ in range(3):
            np.testing.assert_array_equal(there.predict_batch([make_observation(0)]), expected)


def test_a_remote_policy_acts_in_the_loop(both):
    here, there, _ = both
    for policy in (here, there):
        policy.reset()
    for seed in range(4):
        np.testing.assert_array_equal(
            there.act(make_observation(seed)), here.act(make_observation(seed))
        )
    here.reset()


@pytest.mark.parametrize(
    "changes", [{"tile": False, "vision_id": True}, {"state": None}, {"bins": 255, "chunk_size": 2}]
)
def test_every_look_of_a_spec_is_sent_as_it_was_trained(policy, changes):
    here = VLA0(policy.model, policy.processor, make_spec(**changes))
    with engine(here) as (url, _):
        there = VLA0.remote(url, here.spec)
        np.testing.assert_array_equal(
            there.predict_batch([make_observation(1)]), here.predict_batch([make_observation(1)])
        )


def test_nothing_of_a_checkpoints_sampling_settings_is_used(both):
    _, there, own = both
    there.predict_batch([make_observation(0)])
    headers, request = own.requests[-1]
    assert request["model"] == "the-model"
    assert (request["temperature"], request["repetition_penalty"]) == (0.0, 1.0)
    assert "Authorization" not in headers


@pytest.mark.parametrize(("name", "field"), [("sglang", "regex"), ("llama.cpp", "grammar")])
def test_other_engines_are_told_in_their_own_words(policy, name, field):
    with engine(
        policy, (200, json.dumps({"choices": [{"message": {"content": "0 " * 8 + "0"}}]}))
    ) as (url, own):
        there = VLA0.remote(f"{url}/v1/", policy.spec, engine=name, key="secret", extra={"seed": 3})
        assert there.predict_batch([make_observation(0)]).shape == (1, 3, 3)
        headers, request = own.requests[-1]
    assert field in request
    assert "structured_outputs" not in request
    assert request["seed"] == 3
    assert headers["Authorization"] == "Bearer secret"


@given(st.integers(2, 3000), st.integers(0, 4000))
def test_numerals_are_those_of_the_range(bins, number):
    pattern = re.compile(
        "|".join("".join(f"[{low}-{high}]" for low, high in digits) for digits in numerals(bins))
    )
    assert (pattern.fullmatch(str(number)) is not None) == (number <= bins)
    assert pattern.fullmatch(f"0{number}") is None


@given(
    st.integers(2, 1200),
    st.lists(st.integers(0, 1300), min_size=1, max_size=6),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
)
def test_the_expression_admits_exactly_so_many_numbers(bins, numbers, count, after, closed):
    text = " " * after + " ".join(map(str, numbers)) + " " * (not closed)
    expected = len(numbers) == count and max(numbers) <= bins
    assert (re.fullmatch(_regex(bins, count, after, closed), text) is not None) == expected


def test_the_grammar_of_llama_cpp_says_the_same():
    assert (
        _gbnf(10, 3, False, True)
        == 'root ::= number (" " number){2}\nnumber ::= [0] | [1-9] | [1] [0]\n'
    )
    assert (
        _gbnf(10, 2, True, False)
        == 'root ::= (" " number){2} " "\nnumber ::= [0] | [1-9] | [1] [0]\n'
    )


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((200, '{"choices": [{"message": {"content": "1 2 3"}}]}'), ChunkError, "3 x 3 = 9 numbers"),
        ((200, '{"choices": [{"message": {"content": "1 2 3 4 5 6 7 8 101"}}]}'), ChunkError, "whole numbers in 0..100"),
        ((200, '{"choices": [{"message": {"content": "I am a robot"}}]}'), ChunkError, "whole numbers"),
        ((200, '{"choices": []}'), InputError, "a completion as OpenAI's"),
        ((200, '{"choices": [{"message": {"content": null}}]}'), InputError, "a completion as "
                                                                             "OpenAI's"),
        ((200, "no json"), InputError, "a completion as OpenAI's"),
        ((400, '{"error": "regex"}'), InputError, "400: .*regex"),
        ((503, "busy"), InputError, "503: busy"),
    ],
)  # fmt: skip
def test_what_is_no_chunk_never_becomes_an_action(policy, answer, error, message):
    with engine(policy, answer) as (url, _):
        there = VLA0.remote(url, policy.spec)
        with pytest.raises(error, match=message):
            there.predict_batch([make_observation(0)])


def test_a_server_that_is_gone_or_silent_is_told_from_one_that_refuses(policy):
    with engine(policy) as (url, _):
        there = VLA0.remote(url, policy.spec, timeout_s=1e-4, model="x")
        with pytest.raises(TimeoutError):
            there.predict_batch([make_observation(0)])
        there = VLA0.remote(url, policy.spec)
    with pytest.raises(ConnectionError):
        there.predict_batch([make_observation(0)])
    for make in (
        lambda: VLA0.remote(url, policy.spec),
        lambda: VLA0.remote("nowhere", policy.spec),
        lambda: VLA0.remote(url, policy.spec, engine="mine"),
        lambda: VLA0.remote(url, make_spec(image_size=28)),
        lambda: there.save_pretrained("x"),
        lambda: there.approximate("relaxed"),
    ):
        with pytest.raises(InputError):
            make()


def test_what_a_template_writes_before_an_answer_is_written_by_the_server_too(tmp_path):
    """SmolVLM2's puts a space between "Assistant:" and the answer."""
    pytest.importorskip("num2words")
    own = tiny_processor(["State: ", "Write integers."], family="smolvlm")
    small = {"width": 48, "layers": 2, "heads": 3, "vision_width": 32, "vision_layers": 2}
    spec = make_spec(tile=False, chunk_size=2, state=None)
    policy = VLA0(tiny_model(own, **small, vision_heads=2), own, spec)
    policy.save_pretrained(tmp_path / "checkpoint")
    with engine(policy) as (url, served):
        remote = VLA0.remote(url, tmp_path / "checkpoint")
        observations = [make_observation(seed) for seed in range(2)]
        for observation in observations:
            expected = policy.predict_batch([observation])
            np.testing.assert_array_equal(remote.predict_batch([observation]), expected)
            *_, streamed = remote.decoder.stream(remote.prompt.observe([observation]))
            np.testing.assert_array_equal(policy.codec.decode(streamed[0]), expected[0])
            begun = replace(observation, action_prefix=expected[0, :1])
            np.testing.assert_array_equal(
                remote.predict_batch([begun]), policy.predict_batch([begun])
            )
        assert served.requests[0][1]["structured_outputs"]["regex"].startswith("\\ ")
