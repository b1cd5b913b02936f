"""All attacks, one after another: python -m soak --minutes 60 (from tests/)."""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from soak import Bar, Until

PARTS = {  # name → share of the time, module, function
    "arm": (0.1, "arm", "episodes"),
    "messages": (0.15, "messages", "mutated"),
    "network": (0.25, "network", "clients"),
    "training": (0.35, "kills", "training"),
    "evaluation": (0.15, "kills", "evaluation"),
}


def main() -> int:
    """0 where nothing went wrong, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="all together")
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="these alone; all of the time is theirs"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=None,
        help="of what is thrown; printed, so that it can be given again",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    seed = time.time_ns() % 2**31 if given.seed is None else given.seed
    parts = given.part or list(PARTS)
    whole, wrong = sum(PARTS[name][0] for name in parts), 0
    console, began = Console(width=120), time.monotonic()
    print(f"seed {seed}, {given.minutes:g} minutes: {', '.join(parts)}", flush=True)
    for name in parts:
        share, module, function = PARTS[name]
        seconds = 60 * given.minutes * share / whole
        left = 60 * given.minutes - (time.monotonic() - began)
        print(f"{name}: {seconds / 60:.1f} minutes; all ends in {left / 60:.0f}", flush=True)
        folder = given.out / f"{name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        # here, for they need different things
        part = getattr(importlib.import_module(f"soak.{module}"), function)
        bars: list[Bar] = part(Until(seconds), seed, folder)
        table = Table("law", "tried", "for the bar", "wrong", "", box=SIMPLE_HEAD)
        for bar in bars:
            table.add_row(
                bar.name, f"{bar.done:,}", f"{bar.wanted:,}", str(len(bar.wrong)), bar.remark
            )
            wrong += len(bar.wrong)
            for text in bar.wrong[:10]:
                print(f"WRONG, {bar.name}: {text}", flush=True)
            with (given.out / "soak.jsonl").open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"part": name, "seed": seed, "minutes": given.minutes, **vars(bar)})
                    + "\n"
                )
        console.print(table)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
