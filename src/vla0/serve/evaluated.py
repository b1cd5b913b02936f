"""A server's policy in the evaluator: any server of openpi's protocol."""

import hashlib
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from vla0.core.spec import Observation
from vla0.errors import InputError
from vla0.serve.client import RemotePolicy
from vla0.sim.evaluate import Past
from vla0.sim.foreign import Foreign
from vla0.sim.simulator import Simulator
from vla0.sim.workers import NoChunkError

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # for an answer: a server may compile at the first question
MOST = 1000  # steps of a chunk
MOST_PAST = 64  # pictures of a camera
MISSED = 3  # answers in a row that do not come, after which the evaluation ends


def served(
    url: str,
    target: Simulator,
    names: Mapping[str, str],
    instruction: str,
    timeout_s: float = TIMEOUT_S,
    key: str | None = None,
) -> Foreign:
    """Connect to a server, and ask it once, with black pictures, how long its chunks are.

    An answer that is late, does not come, or has another shape becomes an error line of its
    episode, which is tried again. It is never a failure of the policy. Where several in a row do
    not come, InputError ends the evaluation, which the same command continues.

    Args:
        url: Address of the server, ws://host:port or wss://host:port.
        target: The simulator in which it will act.
        names: {camera, or "state": its name in messages}. Without any, the pictures go under
            "images" by the simulator's names, and the state under "state".
        instruction: Any sentence of the simulator's.
        timeout_s: Seconds that an answer may take.
        key: The key of the server, if it has one.

    Raises:
        InputError: When it is no such server, refuses the key, or its answer does not fit the
            simulator.
        NoAnswerError: When it does not answer.
    """
    if unknown := [name for name in names if name not in (*target.cameras, "state")]:
        expected = f"--key of {(*target.cameras, 'state')}"
        raise InputError(expected, f"'{unknown[0]}'", "correct it")
    remote = RemotePolicy(url, key, timeout_s, names=names)
    if remote.metadata.get("ensemble") not in (None, "none"):
        raise InputError(
            "a server that sends whole chunks",
            f"one that ensembles ({remote.metadata['ensemble']}), over the episodes of all workers",
            "serve with --ensemble none; give --ensemble here",
        )
    # only our servers have policies that see the past, and say so
    past = remote.metadata.get("history", 1)
    if not isinstance(past, int) or not 1 <= past <= MOST_PAST:
        raise InputError(
            f"a history of 1 to {MOST_PAST} pictures from {url}", f"{past!r}"[:80], "look at it"
        )
    side, states = target.image_size, len(target.states)
    before = (past,) if past > 1 else ()
    black = {camera: np.zeros((*before, side, side, 3), np.uint8) for camera in target.cameras}
    first = remote.predict(
        Observation(black, instruction, np.zeros(states, np.float32) if states else None)
    )
    if first.shape[1] != len(target.actions) or len(first) > MOST:
        raise InputError(
            f"at most {MOST} actions of {len(target.actions)} numbers, as the simulator takes",
            f"shape {first.shape} from {url}",
            "serve a policy that was trained for it",
        )

    missed = 0

    def predict(observations: Sequence[Observation]) -> list[np.ndarray | Exception]:
        nonlocal missed
        answers = []
        for observation in observations:
            answers.append(answer := _answer(remote, observation, first.shape))
            missed = missed + 1 if isinstance(answer, _MissedError) else 0
            if missed >= MISSED:
                raise InputError(
                    f"answers of {url}",
                    f"none to {missed} observations in a row: {answer}",
                    "start it again; the same command goes on",
                )
        return answers

    said = sorted((str(key), str(value)) for key, value in remote.metadata.items())
    if not remote.metadata.get("checkpoint"):
        logger.warning(
            "%s does not say which weights it has: evaluate into another folder (--out) when it "
            "has loaded others",
            url,
        )
    mark = f"{url} {hashlib.sha256(repr((said, sorted(names.items()))).encode()).hexdigest()[:8]}"
    # Ours says how many steps it would send with an ensemble, which is no recipe for whole chunks.
    steps = None if remote.metadata.get("extensions") else remote.metadata.get("n_action_steps")
    steps = steps if isinstance(steps, int) else None
    return Foreign(predict, len(first), steps, None, mark, Past(past))


class _MissedError(NoChunkError):
    """Raised where an answer did not come."""


def _answer(
    remote: RemotePolicy, observation: Observation, shape: tuple[int, ...]
) -> np.ndarray | Exception:
    """Return a chunk, or what was wrong with it."""
    try:
        chunk = remote.predict(observation)
    except TimeoutError as error:
        remote.close()  # over a new connection no late answer can be taken for the next one
        return _MissedError(str(error))
    except InputError as error:
        return NoChunkError(str(error))
    if chunk.shape == shape:
        return chunk
    return NoChunkError(f"{remote.url} answered {chunk.shape}, and {shape} at first")
