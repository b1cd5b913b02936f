"""RemotePolicy against servers that do not do what they should: nothing stale, nothing misshapen,
every step as it comes.
"""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import make_observation
from websockets.sync.server import serve

from vla0 import InputError
from vla0.serve.client import NoAnswerError, RemotePolicy
from vla0.serve.msgpack_numpy import pack, unpack

OURS = {
    "extensions": ["stream", "reset", "number", "action_prefix"],
    "chunk_size": 3,
    "dimensions": 2,
}


@contextmanager
def faked(answers, metadata=OURS, key=None):
    """A server whose answers to (how many messages there were, message) are a list of what is sent;
    its address.
    """

    def admit(connection, request):
        if key is not None and request.headers.get("Authorization") != f"Api-Key {key}":
            return connection.respond(401, "no key\n")
        return None

    def talk(connection):
        connection.send(pack(metadata))
        for count, message in enumerate(connection, 1):
            for answer in answers(count, unpack(message)):
                if isinstance(answer, float):
                    time.sleep(answer)
                else:
                    connection.send(answer if isinstance(answer, str) else pack(answer))

    with serve(talk, "127.0.0.1", 0, process_request=admit) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def marked(number: int, message: dict) -> dict:
    """An answer whose numbers say what it answers."""
    own = {"vla0/number": message["vla0/number"]} if "vla0/number" in message else {}
    return {"actions": np.full((1, 2), number, np.float32), **own}


def answered(policy: RemotePolicy, count: int) -> list[int]:
    found = []
    for _ in range(count):
        found.append(int(policy.predict(make_observation(0))[0, 0]))
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("metadata", [OURS, {}], ids=["vla0", "openpi"])
def test_a_server_that_answers_twice_shifts_nothing(metadata):
    with faked(lambda count, message: [marked(count, message)] * 2, metadata) as url:
        policy = RemotePolicy(url)
        assert answered(policy, 6) == [1, 2, 3, 4, 5, 6]
        assert policy.dropped >= 5
        policy.close()


def test_an_answer_that_comes_too_late_is_dropped_and_counted():
    with faked(lambda count, message: [0.3 if count == 2 else 0.0, marked(count, message)]) as url:
        policy = RemotePolicy(url, timeout_s=0.15)
        assert answered(policy, 1) == [1]
        with pytest.raises(NoAnswerError):
            policy.predict(make_observation(0))
        time.sleep(0.2)
        assert answered(policy, 2) == [3, 4]
        assert policy.dropped == 1
        policy.close()


def test_an_answer_to_a_number_that_was_never_asked_is_dropped():
    def answers(count, message):
        return [
            {**marked(99, message), "vla0/number": 77},
            {**marked(98, message), "vla0/number": [1]},
            marked(count, message),
        ]

    with faked(answers) as url:
        policy = RemotePolicy(url)
        assert answered(policy, 3) == [1, 2, 3]
        assert policy.dropped == 6
        policy.close()


@pytest.mark.parametrize(
    "actions",
    [
        np.zeros((1007, 2)), np.zeros((4, 2)), np.zeros((3, 5)), np.zeros((0, 2)), np.zeros((1, 3, 2)), np.zeros(2), np.float32(1),
        np.full((3, 2), np.nan), np.full((3, 2), np.inf), ["a", "b"], None, "text", {"x": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_could_not_be_executed_is_refused_by_the_servers_name(actions):
    with faked(lambda count, message: [{**marked(count, message), "actions": actions}]) as url:
        policy = RemotePolicy(url)
        with pytest.raises(InputError, match=f"at most 3 actions of 2 finite numbers from {url}"):
            policy.predict(make_observation(0))
        policy.close()


def test_each_step_of_a_stream_is_given_as_it_comes():
    came, seen = 0, threading.Condition()

    def answers(count, message):
        own = {"vla0/number": message["vla0/number"]}
        for step in range(3):
            yield {"vla0/step": step, "action": np.full(2, step, np.float32), **own}
            with seen:  # a client that waits for the whole never sees the first
                assert seen.wait_for(lambda upto=step: came > upto, 20)
        yield {"actions": np.zeros((3, 2), np.float32), **own}

    with faked(answers) as url:
        policy = RemotePolicy(url, timeout_s=20)
        for step, action in enumerate(policy.predict_stream(make_observation(0))):
            assert action.tolist() == [step, step]
            with seen:
                came += 1
                seen.notify()
        assert came == 3
        policy.close()


@pytest.mark.parametrize(
    "odd",
    [
        {"chunk_size": "3"},
        {"dimensions": 0},
        {"extensions": 1},
        {"cameras": {"front": 3}},
        {"cameras": []},
    ],
)
def test_what_a_server_says_of_itself_is_refused_by_its_name_where_it_cannot_be(odd):
    with (
        faked(lambda count, message: [], OURS | odd) as url,
        pytest.raises(InputError, match=next(iter(odd))),
    ):
        RemotePolicy(url)


@pytest.mark.parametrize("number", [[1], np.array([1, 1]), {"a": 1}, "1", None, True, 1.0])
def test_an_answer_whose_number_is_none_is_dropped(number):
    """Also in a stream."""
    answers = [{"vla0/step": 0, "action": np.ones(2, np.float32), "vla0/number": number}]
    answers += [{"actions": np.ones((1, 2), np.float32), "vla0/number": number}]
    with faked(lambda count, message: [*answers, marked(7, message)]) as url:
        policy = RemotePolicy(url)
        assert policy.predict(make_observation(0)).tolist() == [[7, 7]]
        assert list(policy.predict_stream(make_observation(0))) == []
        policy.close()


def test_a_flood_of_answers_to_nothing_ends_with_the_deadline():
    flood = [{"actions": np.ones((1, 2), np.float32), "vla0/number": -1}] * 100_000
    with faked(lambda count, message: flood) as url:
        policy, began = RemotePolicy(url), time.monotonic()
        with pytest.raises(NoAnswerError):
            policy.predict(make_observation(0), timeout_s=0.3)
        assert time.monotonic() - began < 2
        policy.close()


def test_an_answer_of_many_megabytes_is_not_taken_in():
    with faked(
        lambda count, message: [{"actions": np.zeros((5_000_000, 2), np.float32), **message}]
    ) as url:
        policy = RemotePolicy(url)
        with pytest.raises(InputError, match="answers of at most"):
            policy.predict(make_observation(0), timeout_s=5.0)
        policy.close()


@pytest.mark.parametrize("other", [{"chunk_size": 9}, {"spec": "another"}, {"n_action_steps": 2}])
def test_another_policy_behind_the_same_address_is_refused(other):
    """A server that was begun anew with another checkpoint: limits and pace of the robot were those
    of the first.
    """
    told = dict(OURS)

    def talk(connection):
        connection.send(pack(told))
        told.update(other)
        connection.recv()
        connection.close()

    with serve(talk, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        policy = RemotePolicy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}")
        with pytest.raises(InputError, match=f"another, by its {next(iter(other))}"):
            policy.predict(make_observation(0), timeout_s=3.0)
        server.shutdown()
