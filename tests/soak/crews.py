"""Kills of an evaluation: of its processes while they play and film, and of the one that employs
them.
"""

import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from soak import Bar, Until, moments
from soak.runs import Runs
from vla0.files import held
from vla0.sim.results import read_episodes, summary
from vla0.sim.workers import ATTEMPTS

TASKS, EPISODES = ("left", "right", "far/away", "near"), 5  # by two policies: forty
KILLS = 6  # of a chain: then it runs to its end


def evaluation(until: Until, seed: int, folder: Path) -> list[Bar]:
    """Evaluations whose processes are killed, and that are killed, and gone on with, against one
    that was left alone.
    """
    folder = folder.absolute()
    rng, runs = random.Random(seed), Runs(folder)
    bar = Bar("kills of an evaluation, nothing lost or doubled", 20)
    counted: dict[str, Any] = {}
    for how in ("lines", "seconds"):  # each an evaluation that nobody kills
        whole = folder / f"whole-{how}"
        shutil.rmtree(whole, ignore_errors=True)
        runs.ended(
            runs.start(moments.evaluates, whole, TASKS, EPISODES, runs.note, None, folder / how)
        )
        found = json.loads((folder / how).read_text())
        # lines take time: seconds are counted apart
        counted |= found if how == "lines" else {how: found[how]}
    began, workers, parents = time.monotonic(), 0, 0
    for number in itertools.count():
        output, story, where, hit = (
            folder / f"chain-{number}",
            [],
            f"seed {seed}, chain {number}",
            0,
        )
        try:
            for attempt in itertools.count():
                plan, of_workers = None, 0
                if attempt < KILLS and until.goes_on(bar.done):
                    plan, of_workers = plan_of(rng, counted), rng.choice((0, 0, 1, 2))
                run = runs.start(moments.evaluates, output, TASKS, EPISODES, runs.note, plan, None)
                for _ in range(of_workers):
                    time.sleep(rng.uniform(0.3, 1.5))
                    if killed_worker(rng, run.pid, output):
                        hit, workers, bar.done = hit + 1, workers + 1, bar.done + 1
                        story.append(f"{attempt}: a worker")
                if plan and "outside" in plan:
                    run.join(plan["outside"])
                    run.kill()
                if runs.ended(run) == 0:
                    break
                parents, bar.done = parents + 1, bar.done + 1
                story.append(f"{attempt}: {runs.place() or 'at its beginning'}")
                with held(output, "look"):  # free at once
                    pass
            runs.left_alone()
            wrong = differing(whole, output, hit)
        except (RuntimeError, ValueError) as error:
            wrong = [str(error)]
        if wrong:
            bar.wrong.append(f"{where}: {'; '.join(wrong[:6])}; after {story}")
        else:
            shutil.rmtree(output)
        if not until.goes_on(bar.done):
            break
    each = (time.monotonic() - began) / max(bar.done, 1)
    bar.remark = (
        f"{workers} of workers, {parents} of the parent; {number + 1} evaluations, "
        f"{each:.1f} s a kill"
    )
    return [bar]


def plan_of(rng: random.Random, counted: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Where the next evaluation is killed."""
    if rng.random() < 0.3:
        return {"outside": rng.uniform(0, sum(counted["seconds"].values()))}
    kind, how = rng.choice(("play", "begin", "hear", "hear")), rng.choice(moments.HOW)
    return {"kind": kind, how: rng.uniform(0, 0.4 * counted[how].get(kind, 0))}


def killed_worker(rng: random.Random, parent: int, output: Path) -> bool:
    """Kills one of the processes that play, if no episode was killed so often that once more were
    the last time.
    """
    lines = read_episodes(output / "episodes.jsonl")
    failed = [(e["policy"], e["task"], e["seed"]) for e in lines if e["error"] is not None]
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        players = [
            pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        if not players or any(failed.count(job) >= ATTEMPTS - 1 for job in failed):
            return False
        os.kill(int(rng.choice(players)), signal.SIGKILL)
        return True
    except OSError:  # all has ended
        return False


def differing(whole: Path, output: Path, hit: int) -> list[str]:
    """What an evaluation left otherwise than the one that was left alone, in words.

    hit: how many workers were killed.
    """
    wrong, expected, lines = (
        [],
        read_episodes(whole / "episodes.jsonl"),
        read_episodes(output / "episodes.jsonl"),
    )
    written = (output / "episodes.jsonl").read_text().splitlines()
    errors = [line["error"] for line in lines if line["error"] is not None]
    if len(written) != len(lines) or len(lines) - len(errors) != len(expected):
        wrong.append(
            f"{len(written)} lines, {len(lines) - len(errors)} ended episodes and {len(errors)} "
            f"errors of {len(expected)}"
        )
    if len(errors) > hit or any("process" not in error for error in errors):
        wrong.append(f"errors where {hit} workers were killed: {errors}")
    if told(lines) != told(expected):
        wrong.append(
            f"other results: "
            f"{[pair for pair in zip(told(lines), told(expected), strict=False) if pair[0] != pair[1]][:3]}"
        )
    tables = [
        [
            (t, row["episodes"], row["successes"])
            for rows in summary(each).values()
            for t, row in rows.items()
        ]
        for each in (lines, expected)
    ]
    if tables[0] != tables[1]:
        wrong.append(f"another table: {tables[0]} instead of {tables[1]}")
    for line in (line for line in lines if line["error"] is None):
        for seen, other in zip(
            shown(output / line["video"]), shown(whole / line["video"]), strict=True
        ):
            if not np.array_equal(seen, other):
                wrong.append(f"another {line['video']}, or its actions")
    files, others = (
        sorted(file.name for file in run.rglob("*") if file.name != ".owner")
        for run in (output, whole)
    )
    if files != others:
        wrong.append(f"other files: {set(files) ^ set(others)}")
    return wrong


def told(lines: list[dict[str, Any]]) -> list[tuple]:
    """What came of each episode that ended, in order."""
    return sorted(
        (e["policy"], e["task"], e["seed"], e["success"], e["steps"])
        for e in lines
        if e["error"] is None
    )


def shown(video: Path) -> tuple[np.ndarray, ...]:
    """(frames, actions, chunks) of an episode. Raises ValueError where a file is not whole."""
    import av

    try:
        with av.open(str(video)) as film:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])
        with np.load(video.with_suffix(".npz")) as arrays:
            return frames, arrays["actions"], arrays["chunks"]
    except Exception as error:  # whatever av, zipfile and numpy say of half a file
        raise ValueError(f"'{video.name}' is not whole: {type(error).__name__}: {error}") from error
