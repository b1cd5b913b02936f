"""Attacks that go on for as long as one likes: `make soak MINUTES=60`, and for seconds in
tests/test_soak.py.

Each part is a function of an Until, a seed and a folder of its own, and gives Bars: how much it
tried, and what went wrong.
"""

import time
from dataclasses import dataclass, field


@dataclass
class Bar:
    """One law under attack.

    wanted: tries after which it counts as shown; wrong: each violation, with how to find it again.
    """

    name: str
    wanted: int
    done: int = 0
    wrong: list[str] = field(default_factory=list)
    remark: str = ""  # what was measured beside


@dataclass
class Until:
    """When a part has done enough: after so many seconds, or so many tries, whichever comes first;
    once at least.
    """

    seconds: float = float("inf")
    tries: float = float("inf")
    began: float = field(default_factory=time.monotonic)

    def goes_on(self, done: int) -> bool:
        """Whether to try once more."""
        return done == 0 or (done < self.tries and time.monotonic() - self.began < self.seconds)
