"""Each attack of `make soak` for seconds, and always the same ones: `make soak` draws them anew."""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
from conftest import grpc_of, make_spec, serving
from soak import Until, arm, messages, network

from vla0 import VLA0
from vla0.serve.listen import ServerLimits


@pytest.fixture
def here(policy):
    """Servers in this process: what starts them in others is tested where the command is."""
    pytest.importorskip("vla_eval", reason="vla-eval is not installed")
    from vla0.serve.vla_eval import VlaEvalServer

    named = VLA0(policy.model, policy.processor, make_spec(state_names=("a", "b")))

    @contextmanager
    def serve(folder, *words):
        with ExitStack() as stack:
            if "lerobot" in words:
                address = f"127.0.0.1:{stack.enter_context(grpc_of(named))}"
            elif "vla-eval" in words:
                address = stack.enter_context(serving(named, VlaEvalServer, ensemble="v1"))[0]
            else:
                address = stack.enter_context(serving(named, limits=ServerLimits(rate=1e5)))[0]
            yield SimpleNamespace(
                address=address.removeprefix("ws://"), ended=lambda: False, megabytes=lambda: 0.0
            )

    return serve


def held(bars, at_least: int) -> None:
    """Nothing went wrong, and enough was tried."""
    assert {bar.name: bar.wrong[:3] for bar in bars if bar.wrong} == {}
    assert all(bar.done >= at_least for bar in bars)


def test_no_command_is_late_out_of_bounds_or_after_the_stop(tmp_path):
    held(arm.episodes(Until(tries=200), 0, tmp_path), 200)


def test_whatever_message_comes_each_is_answered_and_an_honest_client_notices_nothing(
    tmp_path, here
):
    held(messages.mutated(Until(tries=2400), 0, tmp_path, here), 800)


def test_nobody_is_lost_or_answered_otherwise_beside_a_hostile_client(tmp_path, here):
    """How long they wait is not for a test: `make soak` measures it."""
    answers, _ = network.clients(Until(tries=1), 0, tmp_path, here, 4.0)
    held([answers], 64)
