"""A decoder that is somebody else's server: any that speaks OpenAI's chat API and keeps to a
regular expression.

vLLM, SGLang and llama.cpp do. The model being unmodified, they need nothing of vla0; the picture is
sent as the model was trained on it, without loss, and what comes back is read as strictly as
everything else.
"""

import base64
import io
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
from PIL import Image

from vla0.core.codec import ActionCodec, numerals
from vla0.core.images import compose
from vla0.core.prompt import words
from vla0.core.spec import Observation, Spec
from vla0.errors import InputError

ENGINES = ("vllm", "sglang", "llama.cpp")
LEAST = 56 * 56  # pixels: Qwen2.5-VL's processor enlarges smaller pictures
REMEDY = "look at the server's log"


@dataclass(frozen=True)
class Chat:
    """What is sent for one observation."""

    messages: list[dict[str, Any]]
    prefix: str  # of the answer, a space at its end


MARK = re.compile(
    r"<\|[^|<>]*\|>|</?(s|bos|eos|pad|image|video|tool_call|(start|end)_of_\w+)>|\[/?INST\]|<\uff5c"
)


class ChatPrompt:
    """Observations → chats, as `Prompt` makes tokens of them: the same pictures, words and
    turns.
    """

    def __init__(self, spec: Spec):
        if spec.image_size**2 < LEAST:
            raise InputError(
                "pictures of 56 pixels a side or more",
                f"{spec.image_size}",
                "such servers would enlarge them",
            )
        self.spec = spec

    def observe(
        self, observations: Sequence[Observation], prefixes: Sequence[str] | None = None
    ) -> list[Chat]:
        """One for each."""
        return [
            self._chat(*pair)
            for pair in zip(observations, prefixes or [""] * len(observations), strict=True)
        ]

    def _chat(self, observation: Observation, prefix: str) -> Chat:
        content: list[dict[str, Any]] = []
        for picture in compose(observation, self.spec):
            content.append({"type": "image_url", "image_url": {"url": _url(picture)}})
        said = words(observation, self.spec)
        if found := MARK.search(said):  # the server's template and tokenizer would take it for one
            raise InputError(
                "words without tokens of a model's",
                repr(found[0]),
                "leave them out of the instruction",
            )
        content.append({"type": "text", "text": said})
        system = {"role": "system", "content": self.spec.system_text()}
        return Chat([system, {"role": "user", "content": content}], prefix)


class Remote:
    """The decoder.

    engine: whose name for a regular expression is used; extra: further fields of each request.
    """

    def __init__(
        self,
        base_url: str,
        spec: Spec,
        model: str | None = None,
        key: str | None = None,
        engine: str = "vllm",
        timeout_s: float = 30.0,
        extra: dict[str, Any] | None = None,
    ):
        if engine not in ENGINES:
            raise InputError(f"an engine of {ENGINES}", f"'{engine}'", "choose one of those")
        self.spec, self.engine, self.extra = spec, engine, extra or {}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        try:
            # No connection is kept: servers close those after a time or a hundred requests, some in
            # the middle of the next.
            self.client = httpx.Client(
                headers=headers, timeout=timeout_s, limits=httpx.Limits(max_keepalive_connections=0)
            )
            self.model = model or self._json(self.client.get(f"{self.url}/models"))["data"][0]["id"]
        except (httpx.HTTPError, httpx.InvalidURL, LookupError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f"a server of OpenAI's chat API at {base_url}",
                reason,
                "start one, e.g. vllm serve DIR",
            ) from None

    def decode(
        self,
        batch: Sequence[Chat],
        num_steps: int | None = None,
        guesses: Sequence[np.ndarray | None] | None = None,
        prefixes: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Levels (B, H, D) int64; the first `num_steps` steps of them where given.

        All are asked for at once.
        """
        with ThreadPoolExecutor(len(batch)) as threads:
            return np.stack(list(threads.map(lambda chat: self._answer(chat, num_steps), batch)))

    def stream(
        self,
        batch: Sequence[Chat],
        num_steps: int | None = None,
        guesses: Sequence[np.ndarray | None] | None = None,
        prefixes: Sequence[np.ndarray] | None = None,
    ) -> Iterator[list[np.ndarray]]:
        """The steps so far, whenever there is one more. Of one observation."""
        (chat,) = batch
        steps, told, given = num_steps or self.spec.chunk_size, "", 0
        request = self._request(chat, steps) | {"stream": True}
        with (
            self._explained(),
            self.client.stream("POST", f"{self.url}/chat/completions", json=request) as response,
        ):
            if response.status_code != 200:
                response.read()
                self._json(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                for choice in json.loads(line.removeprefix("data: ")).get("choices", ()):
                    told += choice["delta"].get("content") or ""
                text = _joined(chat.prefix, told)
                whole = text.count(" ") // self.spec.dimensions
                if given < whole < steps:
                    given = whole
                    yield [
                        self._read(" ".join(text.split(" ")[: whole * self.spec.dimensions]), whole)
                    ]
        yield [self._read(_joined(chat.prefix, told), steps)]

    def _answer(self, chat: Chat, num_steps: int | None) -> np.ndarray:
        steps = num_steps or self.spec.chunk_size
        with self._explained():
            reply = self._json(
                self.client.post(f"{self.url}/chat/completions", json=self._request(chat, steps))
            )
            return self._read(
                _joined(chat.prefix, reply["choices"][0]["message"]["content"]), steps
            )

    def _request(self, chat: Chat, steps: int) -> dict[str, Any]:
        """Greedy, nothing of the checkpoint's sampling settings, and exactly the numbers that are
        missing.
        """
        left = steps * self.spec.dimensions - chat.prefix.count(" ")
        # What does not end the chunk ends with a space, as if it went on: where one stops changes
        # no number before.
        closed = steps == self.spec.chunk_size
        request: dict[str, Any] = {
            "model": self.model,
            "messages": chat.messages,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": left * (len(str(self.spec.bins)) + 1) + 1,
        }
        if chat.prefix:
            request["messages"] = [
                *chat.messages,
                {"role": "assistant", "content": chat.prefix.rstrip(" ")},
            ]
            request |= {"add_generation_prompt": False, "continue_final_message": True}
        if self.engine == "llama.cpp":
            request |= {
                "repeat_penalty": 1.0,
                "grammar": _gbnf(self.spec.bins, left, bool(chat.prefix), closed),
            }
        else:
            regex = _regex(self.spec.bins, left, bool(chat.prefix), closed)
            request |= (
                {"structured_outputs": {"regex": regex}}
                if self.engine == "vllm"
                else {"regex": regex}
            )
        if self.spec.vision_id:
            request["chat_template_kwargs"] = {"add_vision_id": True}
        return request | self.extra

    def _read(self, text: str, steps: int) -> np.ndarray:
        """Raises ChunkError where a server did not keep to the expression."""
        text = text.removesuffix(" ") if steps < self.spec.chunk_size else text
        return ActionCodec(replace(self.spec, chunk_size=steps, ensemble_k=None)).read(text)

    def _json(self, response: httpx.Response) -> Any:
        """What a server says, where it says yes."""
        if response.status_code != 200:
            got = f"{response.status_code}: {' '.join(response.text.split())[:300]}"
            raise InputError(f"an answer of {self.url}", got, REMEDY)
        return response.json()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            # a TimeoutError is what the robot's loop goes on after
            raise TimeoutError(
                f"no answer of {self.url} in time ({type(error).__name__})"
            ) from None
        except httpx.HTTPError as error:
            raise ConnectionError(f"{self.url}: {type(error).__name__}: {error}") from None
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise InputError(
                "a completion as OpenAI's", f"{type(error).__name__}: {error}", REMEDY
            ) from None


def _joined(prefix: str, told: str) -> str:
    """The whole text; llama.cpp repeats what was begun, where it does not stream."""
    if not isinstance(told, str):
        raise TypeError(f"no text but {told!r}")
    prefix = prefix.rstrip(" ")
    if not prefix or told.startswith(f"{prefix} "):
        return told
    if told and not told.startswith(" "):
        raise InputError(
            f"an answer that goes on after '{prefix}'",
            f"'{told[:100]}'",
            "use another version of the server",
        )
    return prefix + told


def _regex(bins: int, count: int, after: bool, closed: bool) -> str:
    """Of `count` numbers; after: something stands before them. closed: they end the chunk."""
    number = "(" + "|".join("".join(map(_class, digits)) for digits in numerals(bins)) + ")"
    first, others = ("", count) if after else (number, count - 1)
    return first + (f"( {number}){{{others}}}" if others else "") + ("" if closed else " ")


def _gbnf(bins: int, count: int, after: bool, closed: bool) -> str:
    """The same as llama.cpp writes grammars."""
    number = " | ".join(" ".join(map(_class, digits)) for digits in numerals(bins))
    first, others = ("", count) if after else ("number ", count - 1)
    rest = f'(" " number){{{others}}}' if others else ""
    end = "" if closed else ' " "'
    return f"root ::= {first}{rest}{end}\nnumber ::= {number}\n"


def _class(digit: tuple[int, int]) -> str:
    return f"[{digit[0]}-{digit[1]}]" if digit[0] < digit[1] else f"[{digit[0]}]"


def _url(picture: np.ndarray) -> str:
    """A picture without loss, in the message itself."""
    held = io.BytesIO()
    Image.fromarray(picture).save(held, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
