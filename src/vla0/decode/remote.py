"""Decode on another server that has OpenAI's chat API and can be held to a regular expression.

vLLM, SGLang and llama.cpp are such servers. They need nothing of vla0, because the model is
unmodified. The picture is sent losslessly and as the model was trained on it. The answer is read
with the same strict grammar as everywhere else.
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
    """The messages that are sent for one observation."""

    messages: list[dict[str, Any]]
    prefix: str  # beginning of the answer, with a space at its end; may be empty


# special tokens of the models' templates
MARK = re.compile(
    r"<\|[^|<>]*\|>|</?(s|bos|eos|pad|image|video|tool_call|(start|end)_of_\w+)>|\[/?INST\]|<\uff5c"
)


class ChatPrompt:
    """Turns observations into chats with the pictures, words and turns that `Prompt` tokenises.

    Args:
        spec: The Spec of the checkpoint that the server has loaded.

    Raises:
        InputError: When the Spec's pictures are so small that a server would enlarge them.
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
        """Make a chat for each observation.

        Args:
            observations: B observations.
            prefixes: The beginning of each answer, with a space at its end, or "".

        Raises:
            InputError: When an instruction contains a special token of a model.
        """
        return [
            self._chat(*pair)
            for pair in zip(observations, prefixes or [""] * len(observations), strict=True)
        ]

    def _chat(self, observation: Observation, prefix: str) -> Chat:
        """Make the chat for one observation."""
        content: list[dict[str, Any]] = []
        for picture in compose(observation, self.spec):
            content.append({"type": "image_url", "image_url": {"url": _url(picture)}})
        text = words(observation, self.spec)
        if mark := MARK.search(text):  # the server would take it for a special token
            raise InputError(
                "words without tokens of a model's",
                repr(mark[0]),
                "leave them out of the instruction",
            )
        content.append({"type": "text", "text": text})
        system = {"role": "system", "content": self.spec.system_text()}
        return Chat([system, {"role": "user", "content": content}], prefix)


class Remote:
    """A decoder that sends each chat to a server.

    Args:
        base_url: Where the server is, with or without /v1.
        spec: The Spec of the checkpoint that the server has loaded.
        model: The server's name of the model. None takes the first model that it lists.
        key: The API key, if the server wants one.
        engine: The kind of server, one of ENGINES. It decides how a request states the grammar.
        timeout_s: Seconds to wait for the server.
        extra: Further fields of each request.
        opening: What the model's chat template writes before an answer, see
            `vla0.backbones.answer_turn`.

    Raises:
        InputError: When the engine is unknown or there is no such server.
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
        opening: str = "",
    ):
        if engine not in ENGINES:
            raise InputError(f"an engine of {ENGINES}", f"'{engine}'", "choose one of those")
        self.spec, self.engine, self.extra = spec, engine, extra or {}
        self.opening = opening
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        try:
            # No connection is kept open: servers close a connection after a time or a hundred
            # requests, some of them in the middle of the next request.
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
        """Decode all chats at the same time.

        Args:
            batch: B chats.
            num_steps: Decode only this many steps. None decodes all H.
            guesses: Not used.
            prefixes: Not used; a chat has its own prefix.

        Returns:
            (B, H, D) int64 levels, or (B, num_steps, D).

        Raises:
            InputError: When the server refuses a request or does not keep to the grammar.
            TimeoutError: When the server does not answer in time.
            ConnectionError: When the connection fails.
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
        """Decode one chat as `decode` does, and yield whenever another step is finished.

        Yields:
            A list with the levels (H', D) of the finished steps. The last item has all steps.
        """
        (chat,) = batch
        steps, answer, steps_yielded = num_steps or self.spec.chunk_size, "", 0
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
                    answer += choice["delta"].get("content") or ""
                text = self._whole(chat, answer)
                finished = text.count(" ") // self.spec.dimensions
                if steps_yielded < finished < steps:
                    steps_yielded = finished
                    numbers = text.split(" ")[: finished * self.spec.dimensions]
                    yield [self._read(" ".join(numbers), finished)]
        yield [self._read(self._whole(chat, answer), steps)]

    def _answer(self, chat: Chat, num_steps: int | None) -> np.ndarray:
        """Ask the server for the answer to one chat, and read its levels (H, D)."""
        steps = num_steps or self.spec.chunk_size
        with self._explained():
            reply = self._json(
                self.client.post(f"{self.url}/chat/completions", json=self._request(chat, steps))
            )
            answer = reply["choices"][0]["message"]["content"]
            return self._read(self._whole(chat, answer), steps)

    def _request(self, chat: Chat, steps: int) -> dict[str, Any]:
        """Make a request for greedy decoding of exactly the numbers that are missing.

        It overrides the sampling settings of the checkpoint.
        """
        left = steps * self.spec.dimensions - chat.prefix.count(" ")
        # An answer that does not end the chunk ends with a space, as if it continued, so that an
        # early stop changes none of its numbers.
        closed = steps == self.spec.chunk_size
        opening = "" if chat.prefix else self.opening
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
                "grammar": _gbnf(self.spec.bins, left, bool(chat.prefix), closed, opening),
            }
        else:
            regex = re.escape(opening) + _regex(self.spec.bins, left, bool(chat.prefix), closed)
            request |= (
                {"structured_outputs": {"regex": regex}}
                if self.engine == "vllm"
                else {"regex": regex}
            )
        if self.spec.vision_id:
            request["chat_template_kwargs"] = {"add_vision_id": True}
        return request | self.extra

    def _whole(self, chat: Chat, answer: str) -> str:
        """Return the text of an answer from its first number on."""
        text = _joined(chat.prefix, answer)
        return text if chat.prefix else text.removeprefix(self.opening)

    def _read(self, text: str, steps: int) -> np.ndarray:
        """Read levels, or raise ChunkError where a server did not keep to the grammar."""
        text = text.removesuffix(" ") if steps < self.spec.chunk_size else text
        return ActionCodec(replace(self.spec, chunk_size=steps, ensemble_k=None)).read(text)

    def _json(self, response: httpx.Response) -> Any:
        """Return the JSON of a response, or raise InputError where its status is not 200."""
        if response.status_code != 200:
            got = f"{response.status_code}: {' '.join(response.text.split())[:300]}"
            raise InputError(f"an answer of {self.url}", got, REMEDY)
        return response.json()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn httpx's errors and malformed replies into errors that name the server."""
        try:
            yield
        except httpx.TimeoutException as error:
            # After a TimeoutError, the robot's loop goes on.
            raise TimeoutError(
                f"no answer of {self.url} in time ({type(error).__name__})"
            ) from None
        except httpx.HTTPError as error:
            raise ConnectionError(f"{self.url}: {type(error).__name__}: {error}") from None
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise InputError(
                "a completion as OpenAI's", f"{type(error).__name__}: {error}", REMEDY
            ) from None


def _joined(prefix: str, answer: str) -> str:
    """Join prefix and answer; llama.cpp repeats the prefix where it does not stream."""
    if not isinstance(answer, str):
        raise TypeError(f"no text but {answer!r}")
    prefix = prefix.rstrip(" ")
    if not prefix or answer.startswith(f"{prefix} "):
        return answer
    if answer and not answer.startswith(" "):
        raise InputError(
            f"an answer that goes on after '{prefix}'",
            f"'{answer[:100]}'",
            "use another version of the server",
        )
    return prefix + answer


def _regex(bins: int, count: int, after: bool, closed: bool) -> str:
    """Return a regular expression for numbers.

    Args:
        bins: The highest level.
        count: How many numbers there are.
        after: Whether other numbers stand before them.
        closed: Whether they end the chunk. Otherwise a space follows.
    """
    number = "(" + "|".join("".join(map(_class, digits)) for digits in numerals(bins)) + ")"
    first, remaining = ("", count) if after else (number, count - 1)
    return first + (f"( {number}){{{remaining}}}" if remaining else "") + ("" if closed else " ")


def _gbnf(bins: int, count: int, after: bool, closed: bool, opening: str = "") -> str:
    """Return the grammar of `_regex` in the notation of llama.cpp; `opening` stands before it."""
    number = " | ".join(" ".join(map(_class, digits)) for digits in numerals(bins))
    first, remaining = ("", count) if after else ("number ", count - 1)
    rest = f'(" " number){{{remaining}}}' if remaining else ""
    end = "" if closed else ' " "'
    first = f"{json.dumps(opening)} {first}" if opening else first
    return f"root ::= {first}{rest}{end}\nnumber ::= {number}\n"


def _class(digit: tuple[int, int]) -> str:
    """Return a character class for a range of digits."""
    return f"[{digit[0]}-{digit[1]}]" if digit[0] < digit[1] else f"[{digit[0]}]"


def _url(picture: np.ndarray) -> str:
    """Return a URL that holds a picture itself, as a lossless PNG."""
    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
