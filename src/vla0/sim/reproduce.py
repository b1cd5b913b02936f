"""Evaluate a published checkpoint by its protocol, and say whether the published figure holds."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vla0.checkpoint.convert import FETCHED, convert
from vla0.checkpoint.location import locate
from vla0.core.spec import SPEC_FILE
from vla0.errors import InputError, nearest
from vla0.files import held, read_json, write_whole
from vla0.sim import foreign
from vla0.sim.evaluate import EvalConfig
from vla0.sim.experiment import trial
from vla0.sim.published import CHECKPOINTS, Published
from vla0.sim.results import summary, together, wilson
from vla0.sim.simulator import simulator, tasks_of

# A difference of so much is of interest. Where its interval is wider, more episodes are needed.
MARGIN = 0.05
SAME, LOWER, HIGHER, UNCLEAR = "as published", "lower", "higher", "too few episodes to say"
KEPT = "reproduction.json"
MADE_OF = ".made-of"  # in a converted checkpoint: of which run
RECORDED = ("torch", "transformers", "lerobot")  # beside what the simulator records


@dataclass(frozen=True)
class Outcome:
    """What came of a part of a published result.

    Args:
        name: Name of the part, such as "libero_goal", or "all".
        stated: Published success, from 0 to 1.
        stated_episodes: Episodes behind the published figure.
        successes: Episodes solved here.
        episodes: Episodes here.
    """

    name: str
    stated: float
    stated_episodes: int
    successes: int
    episodes: int

    @property
    def difference(self) -> tuple[float, float, float]:
        """Our success less the published one, and the ends of its 95 % interval.

        By R. G. Newcombe, Statistics in Medicine 17 (1998), method 10: two independent rates, each
        with Wilson's interval.
        """
        ours = self.successes / self.episodes
        low, high = wilson(self.successes, self.episodes)
        solved = round(self.stated * self.stated_episodes)
        stated_low, stated_high = wilson(solved, self.stated_episodes)
        apart = ours - self.stated
        return (
            apart,
            apart - math.hypot(ours - low, stated_high - self.stated),
            apart + math.hypot(high - ours, self.stated - stated_low),
        )

    @property
    def verdict(self) -> str:
        """Whether the published figure holds, as far as these episodes tell."""
        _, low, high = self.difference
        if high < 0:
            return LOWER
        if low > 0:
            return HIGHER
        return SAME if high - low <= 2 * MARGIN else UNCLEAR


@dataclass(frozen=True)
class Reproduction:
    """What came of a published result.

    Args:
        outcomes: Of each part that was evaluated, and of all of them together where they are more.
        differing: What differs in this installation: (what, where it was published, here).
        versions: {package: version} here.
    """

    outcomes: tuple[Outcome, ...]
    differing: tuple[tuple[str, str, str], ...]
    versions: Mapping[str, str]


def find(name: str) -> Published:
    """Return the published checkpoint with a name, or raise InputError."""
    if name not in CHECKPOINTS:
        expected = f"one of {', '.join(CHECKPOINTS)}"
        raise InputError(expected, f"'{name}'", nearest(name, CHECKPOINTS))
    return CHECKPOINTS[name]


def reproduce(
    name: str,
    out: Path,
    model: str | None = None,
    parts: Sequence[str] = (),
    episodes: int | None = None,
    workers: int | None = None,
    device: str | None = None,
) -> Reproduction:
    """Evaluate a published checkpoint by the protocol of its figures.

    Each part has its own folder in `out`, in which an interrupted evaluation continues. Parts that
    were evaluated before, of the same checkpoint and as many episodes, are in the result too.

    Args:
        name: A key of `CHECKPOINTS`.
        out: Folder of the results.
        model: The checkpoint, where it is here already: a folder, or another id on the Hub. None
            fetches the published one.
        parts: Names of the parts to evaluate. None means all.
        episodes: Of each task. None takes as many as were published; fewer tell less.
        workers: Number of simulator processes.
        device: Where the model runs.

    Raises:
        InputError: When the name or a part is unknown, the checkpoint cannot be had, or it does not
            fit the simulator.
    """
    entry = find(name)
    if episodes is not None and episodes < 1:
        raise InputError("--episodes of 1 or more", f"{episodes}", "leave it out for as published")
    if unknown := [part for part in parts if part not in entry.parts]:
        expected = f"parts of {tuple(entry.parts)}"
        raise InputError(expected, f"'{unknown[0]}'", nearest(unknown[0], entry.parts))
    target = simulator(entry.env)
    tasks = {
        part: tasks_of(entry.env, stated.tasks, stated.suite)
        for part, stated in entry.parts.items()
        if part in (parts or entry.parts)
    }
    settings = {
        part: EvalConfig(
            tasks=tasks[part],
            env=entry.env,
            episodes=episodes or entry.episodes,
            n_action_steps=entry.n_action_steps,
            ensemble=entry.ensemble,
            max_steps=entry.parts[part].max_steps,
        )
        for part in tasks
    }
    run = _player(entry, model or entry.model, out, workers, device)
    asked = {"model": model or entry.model, "episodes": episodes or entry.episodes}
    known = _before(out / KEPT, asked)
    for part, config in settings.items():
        first = config.first_seed or 0
        lines = [
            line
            for line in run(config, out / part)
            if first <= line["seed"] < first + config.episodes
        ]
        ours = together(summary(lines)["policy"].values())
        known[part] = Outcome(
            part,
            entry.parts[part].percent / 100,
            entry.episodes * len(tasks[part]),
            ours["successes"],
            ours["episodes"],
        )
    outcomes = [known[part] for part in entry.parts if part in known]
    if len(outcomes) > 1:
        outcomes.append(_all(outcomes))
    versions = {str(key): str(value) for key, value in target.provenance().items()}
    versions |= {package: _version(package) for package in RECORDED}
    versions["device"] = _device(device)
    differing = [
        (package, expected, versions.get(package, "none"))
        for package, expected in entry.versions.items()
        if versions.get(package) != expected
    ]
    if episodes is not None and episodes != entry.episodes:
        differing.append(("episodes of each task", str(entry.episodes), str(episodes)))
    if model is not None:
        differing.append(("checkpoint", entry.model, model))
    result = Reproduction(tuple(outcomes), tuple(differing), versions)
    write_whole(out / KEPT, _written(name, entry, result, asked))
    return result


def _before(file: Path, asked: Mapping[str, Any]) -> dict[str, Outcome]:
    """Return {part: outcome} that a file keeps of the same checkpoint and as many episodes."""
    if not file.exists():
        return {}
    content = read_json(file, "remove it: the episodes are kept beside it")
    if any(content.get(key) != value for key, value in asked.items()):
        return {}
    names = [field.name for field in fields(Outcome)]
    kept = [Outcome(**{name: part[name] for name in names}) for part in content["parts"]]
    return {outcome.name: outcome for outcome in kept if outcome.name != "all"}


def _all(outcomes: Sequence[Outcome]) -> Outcome:
    """Sum the outcomes of several parts up; the published mean is that of the parts."""
    stated_episodes, successes, episodes = (
        sum(getattr(outcome, key) for outcome in outcomes)
        for key in ("stated_episodes", "successes", "episodes")
    )
    stated = sum(outcome.stated * outcome.stated_episodes for outcome in outcomes)
    return Outcome("all", stated / stated_episodes, stated_episodes, successes, episodes)


def _player(
    entry: Published, model: str, out: Path, workers: int | None, device: str | None
) -> Any:
    """Bring a checkpoint, and return what evaluates it: settings and folder → lines."""
    if entry.lerobot:
        name = f"{foreign.LEROBOT}{model}"
        policy = foreign.load(name, simulator(entry.env), entry.keys, device)
        return lambda config, folder: foreign.trial(
            policy, name, config, folder, own=("image_size",), workers=workers
        )
    looked = locate(model, only=(SPEC_FILE, *FETCHED))
    checkpoint = model
    if not (looked / SPEC_FILE).is_file():  # a run of the official code
        checkpoint = str(out / "checkpoint")
        with held(out, "conversion"):
            made = out / "checkpoint" / MADE_OF
            if not made.exists() or made.read_text() != str(looked):
                convert(looked, checkpoint)
                write_whole(made, str(looked))
    return lambda config, folder: trial(checkpoint, config, folder, workers=workers, device=device)


def _device(device: str | None) -> str:
    """Return what the model runs on, in words."""
    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    return torch.cuda.get_device_name(device) if on_gpu else device or "cpu"


def _version(package: str) -> str:
    """Return the installed version of a package, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _written(name: str, entry: Published, result: Reproduction, asked: Mapping[str, Any]) -> str:
    """Return what is kept of a reproduction, as JSON."""
    return json.dumps(
        {
            "name": name,
            **asked,
            "source": entry.source,
            "parts": [
                {
                    **vars(outcome),
                    "difference": outcome.difference,
                    "verdict": outcome.verdict,
                }
                for outcome in result.outcomes
            ],
            "differing": result.differing,
            "versions": result.versions,
            "remarks": entry.remarks,
        },
        indent=2,
    )


def table(result: Reproduction) -> Table:
    """Return a rich table of published figures beside ours."""
    shown = Table("", "published", "here", "95 %", "difference", "95 %", "verdict", box=SIMPLE_HEAD)
    for outcome in result.outcomes:
        low, high = wilson(outcome.successes, outcome.episodes)
        apart, least, most = outcome.difference
        shown.add_row(
            outcome.name,
            f"{outcome.stated:.1%} of {outcome.stated_episodes}",
            f"{outcome.successes / outcome.episodes:.1%} of {outcome.episodes}",
            f"{low:.0%} to {high:.0%}",
            f"{apart:+.1%}",
            f"{least:+.1%} to {most:+.1%}",
            outcome.verdict,
            style="bold" if outcome.name == "all" else None,
        )
    return shown


def listing() -> Table:
    """Return a rich table of the published checkpoints that can be reproduced."""
    shown = Table("name", "published", "protocol", box=SIMPLE_HEAD)
    for name, entry in CHECKPOINTS.items():
        mean = sum(part.percent for part in entry.parts.values()) / len(entry.parts)
        protocol = (
            f"{entry.episodes} episodes a task, {entry.n_action_steps} steps executed per query, "
            f"ensemble {entry.ensemble}"
        )
        shown.add_row(name, f"{mean:.1f} %, {entry.env}", f"{protocol}\n{entry.source}")
    return shown
