"""Kills of a training and of an evaluation, at random and where they hurt: what goes on must end as
if never killed.
"""

import hashlib
import itertools
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

from soak import Bar, Until, moments
from soak.crews import evaluation
from soak.runs import Runs

__all__ = ["evaluation", "training"]

MOMENTS = {
    "step": "anywhere between the others",
    "save": "the Trainer's own writing",
    "publish": "a clean folder, and `last`",
    "best": "metrics.jsonl and `best`",
    "prune": "folders are removed",
    "card": "README.md and training.png",
}
# Seven steps of ten rows in twos: into a second epoch. The rate is so high that `best` is not
# `last`.
RECIPE = {"num_steps": 7, "save_every_n_steps": 1, "keep_last": 2, "learning_rate": 0.02}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": RECIPE,
    "LoRA": {**RECIPE, "lora": {"rank": 4}, "precision": "bf16"},
    "in parts": {
        **RECIPE,
        "gradient_accumulation_steps": 2,
        "num_steps": 6,
        "save_every_n_steps": 2,
    },
    "workers": {**RECIPE, "workers": 1},
}
# keys that transformers adds to what it loaded
OF_LOADING = ("dtype", "is_local", "model_specific_special_tokens")
KILLS = 10  # of a chain: then it runs to its end


def training(until: Until, seed: int, folder: Path) -> list[Bar]:
    """Trainings killed about ten times each, and gone on with by the same command, against such as
    were never killed.
    """
    folder = folder.absolute()
    rng, runs = random.Random(seed), Runs(folder)
    every = Bar("kills of a training, resumed bit-equal", 50)
    bars = {kind: Bar(f"  {kind}: {words}", 3) for kind, words in MOMENTS.items()}
    if not (folder / "data").exists():
        runs.ended(runs.start(moments.makes_data, folder / "data"))
    known: dict[str, tuple[dict, dict]] = {}
    outside, began = 0, time.monotonic()
    for number, name in enumerate(itertools.cycle(RECIPES)):
        if name not in known:
            known[name] = reference(runs, folder, name)
        expected, counted = known[name]
        output, story, kind = folder / f"chain-{number}", [], "step"
        where = f"seed {seed}, chain {number} ({name})"
        try:
            for attempt in itertools.count():
                plan = None
                if attempt < KILLS and until.goes_on(every.done):
                    plan = plan_of(rng, counted, bars)
                run = runs.start(
                    moments.trains, folder / "data", output, RECIPES[name], runs.note, plan, None
                )
                if plan and "outside" in plan:
                    run.join(plan["outside"])
                    run.kill()
                if runs.ended(run) == 0:
                    break
                kind = runs.place().partition(",")[0] or "step"
                every.done, outside = every.done + 1, outside + bool(plan and "outside" in plan)
                bars[kind].done += 1
                story.append(f"{attempt}: {runs.place() or 'at its beginning'}")
            runs.left_alone()
            runs.ended(runs.start(moments.loads, output))
            if wrong := differing(expected, state_of(output)):
                every.wrong.append(f"{where}: {'; '.join(wrong)}; after {story}")
        except RuntimeError as error:
            bars[kind].wrong.append(f"{where}: after {story}: {error}")
        if not any(text.startswith(where) for bar in (every, *bars.values()) for text in bar.wrong):
            shutil.rmtree(output)
        if not until.goes_on(every.done):
            break
    counts = ", ".join(f"{bar.done} {kind}" for kind, bar in bars.items())
    each = (time.monotonic() - began) / max(every.done, 1)
    every.remark = f"{counts}; {outside} from outside; {number + 1} trainings, {each:.1f} s a kill"
    return [every, *bars.values()]


def plan_of(
    rng: random.Random, counted: dict[str, dict[str, float]], bars: dict[str, Bar]
) -> dict[str, Any]:
    """Where the next run is killed: within what it does for its first two saves, mostly where the
    fewest were.
    """
    if rng.random() < 0.15:
        return {"outside": rng.uniform(0, sum(counted["seconds"].values()))}
    few = min(bars, key=lambda kind: bars[kind].done)
    kind, how = rng.choice((few, rng.choice(list(bars)))), rng.choice(moments.HOW)
    return {"kind": kind, how: rng.uniform(0, 2 / RECIPE["num_steps"] * counted[how].get(kind, 0))}


def reference(runs: Runs, folder: Path, name: str) -> tuple[dict, dict]:
    """(what a training leaves that was never killed, what its moments hold): of two, which leave
    the same.
    """
    left, counted = [], {}
    for counts in ("lines", "seconds"):
        output, file = folder / f"{name}-{counts}", folder / counts
        shutil.rmtree(output, ignore_errors=True)
        runs.ended(
            runs.start(
                moments.trains, folder / "data", output, RECIPES[name], runs.note, None, file
            )
        )
        left.append(state_of(output))
        found = json.loads(file.read_text())
        counted |= found if counts == "lines" else {counts: found[counts]}
    if wrong := differing(*left):
        raise RuntimeError(f"two trainings '{name}' that nobody killed differ: {wrong}")
    return left[0], counted


def state_of(output: Path) -> dict[str, str]:
    """What a training leaves, by name: of files their digests, of links where they lead."""
    found = {}
    for file in sorted(output.rglob("*")):
        name = str(file.relative_to(output))
        if name.split("/")[0] in (".owner", "tensorboard", "train_config.json") or name.endswith(
            "training_args.bin"
        ):
            continue  # of times, processes and paths
        if file.is_symlink():
            found[name] = f"to {file.readlink()}"
        elif file.suffix == ".json":
            try:
                found[name] = json.dumps(_told(json.loads(file.read_text())), sort_keys=True)
            except ValueError:
                found[name] = f"no JSON: {file.read_text()[:60]!r}"
        elif file.is_file():
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def _told(content: Any) -> Any:
    """What a JSON file says, but whether a model was loaded or made, how long things took, and what
    was measured beside.
    """
    if isinstance(content, dict):
        loss_lines = {
            "log_history": [line for line in content.get("log_history", ()) if "loss" in line]
        }
        content = content | loss_lines if "log_history" in content else content
        return {key: _told(value) for key, value in content.items() if key not in OF_LOADING}
    return [_told(value) for value in content] if isinstance(content, list) else content


def differing(expected: dict[str, str], got: dict[str, str]) -> list[str]:
    """What is not as it should be, in words; none where all is."""
    names = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    return [
        f"{name}: {got.get(name, 'none')[:100]} instead of {expected.get(name, 'none')[:100]}"
        for name in names[:6]
    ]
