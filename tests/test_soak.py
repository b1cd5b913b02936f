"""Each attack of `make soak` for seconds, and always the same ones: `make soak` draws them anew."""

from soak import Until, arm


def held(bars, at_least: int) -> None:
    """Nothing went wrong, and enough was tried."""
    assert {bar.name: bar.wrong[:3] for bar in bars if bar.wrong} == {}
    assert all(bar.done >= at_least for bar in bars)


def test_no_command_is_late_out_of_bounds_or_after_the_stop(tmp_path):
    held(arm.episodes(Until(tries=200), 0, tmp_path), 200)
