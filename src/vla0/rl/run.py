"""Play, compare, learn: rounds of reinforcement learning from a config, to `last` and `best`."""

import dataclasses
import json
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from vla0.checkpoint import io as models
from vla0.checkpoint.io import fingerprint
from vla0.checkpoint.location import locate
from vla0.core.ensemble import TemporalEnsemble
from vla0.core.spec import MAIN, Spec, embodiments
from vla0.errors import InputError, said
from vla0.files import held, read_json, settle, write_whole
from vla0.policy import VLA0
from vla0.rl import processes
from vla0.rl.config import RLConfig
from vla0.rl.demonstrations import Demonstrations, fitting
from vla0.rl.play import Player, remembered
from vla0.rl.report import write_report
from vla0.rl.rollouts import RolloutPool, drawing
from vla0.rl.successes import Successes
from vla0.rl.update import DTYPES, Learner, learning
from vla0.rl.weights import weighed
from vla0.sim.evaluate import EvalConfig, Past, world
from vla0.sim.experiment import fit, following
from vla0.sim.results import mend, wilson
from vla0.sim.simulator import simulator
from vla0.sim.workers import RolloutConfig
from vla0.train.checkpoints import FINISHED, measured, point, prune, rank
from vla0.train.config import build
from vla0.train.lora import adapted, merged, plain
from vla0.train.model_card import card
from vla0.train.resume import DAMAGED, refuse_dangling, refuse_other_config, saved

logger = logging.getLogger(__name__)

CONFIG, ROUNDS, EPISODES = "rl_config.json", "rounds.jsonl", "episodes.jsonl"
# Keys of a config that may change when a run resumes.
FREE = ("logging.", "rollouts.workers", "num_rounds", "max_minutes", "update.batch_size")
OTHER = "choose another logging.output_dir, or remove that folder"


@dataclass
class State:
    """How far a run is.

    Args:
        rounds: Rounds that have ended.
        starts: Initial states that have been used.
        tried: {task: [episodes that succeeded, all]} so far; those long ago count less.
        minutes: Minutes that it took.
        nodes: Guesses of a row in one pass, as measured at the start; they change the last bits.
        solved: Whether every episode of the last round succeeded.
    """

    rounds: int = 0
    starts: int = 0
    tried: dict[str, list[float]] = field(default_factory=dict)
    minutes: float = 0.0
    nodes: int = 0
    solved: bool = False


def main(config: RLConfig) -> Path:
    """Run reinforcement learning, or go on where the same config stopped.

    Returns:
        The folder `last`.

    Raises:
        InputError: When the config, the checkpoint and the simulator do not fit, when nothing can
            be learned because no episode or every episode succeeds, or memory is short.
    """
    output = Path(config.logging.output_dir)
    settings = build(EvalConfig, config.simulator, "simulator")
    settings = dataclasses.replace(settings, tasks=tuple(dict.fromkeys(settings.tasks)))
    simulator(settings.env).ready()
    rank, _ = processes.joined()
    # The first of several processes locks the folder for all of them.
    with held(output, "training") if rank == 0 else nullcontext():
        run = Run(config, settings, output)
        try:
            return run.go()
        finally:
            run.pool.close()
            processes.left()


class Run:
    """One run, with its model, its worlds and its folder."""

    def __init__(self, config: RLConfig, settings: EvalConfig, output: Path):
        self.config, self.output = config, output
        folder = locate(config.checkpoint)
        spec = Spec.load(folder)
        fit(spec, settings.env)
        self.settings = following(settings, spec)
        self.target = simulator(settings.env)
        dtype = DTYPES[config.update.precision]
        self.first = processes.joined()[0] == 0  # the process that writes
        vlm, self.processor = models.load(folder, None, dtype)
        source = fitting(config.data, spec, config.checkpoint) if config.data else None
        identity = {"began with": fingerprint(vlm, spec), "versions": self.target.provenance()}
        identity["demonstrations"] = source.fingerprint() if source else None
        self.recorded = json.loads(json.dumps(dataclasses.asdict(config) | identity))
        self._refuse_others()
        acting = (
            spec.chunk_size,
            settings.n_action_steps,
            settings.ensemble,
            spec.ensemble_k,
            self.settings.periodic,
        )
        TemporalEnsemble(*acting)  # raises InputError for bad settings before anything is written
        start = models.load(folder, None, dtype)[0].eval() if config.update.kl else None
        torch.manual_seed(config.seed)  # of LoRA's first weights
        self.model = adapted(vlm.eval(), config.update.lora, False).eval()
        self.policy = VLA0(plain(self.model), self.processor, spec)
        self.specs = {name: Spec.load(folder, name) for name in embodiments(folder)}
        self.learner = Learner(
            self.model, self.policy.prompt, config.update, config.rollouts.temperature, start
        )
        drawing(self.policy)
        share, prompt = config.update.demonstrations, self.policy.prompt
        self.demonstrations = Demonstrations(source, prompt, share) if source else None
        heavy = self.target.heavy
        rollout = RolloutConfig(
            make_env=world(self.settings, Past(spec.history)),
            acting=acting,
            keep=1 if heavy else len(settings.tasks),
        )
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        count = config.rollouts.workers or (1 if heavy else 8) * max(1, cores)
        self.pool = RolloutPool(rollout, count)
        self.player = Player(config, self.settings, self.target.seeds, self.policy, self.pool)
        place = output / "state" / "successes"
        self.successes = Successes(place, config.update.replay_rounds)
        self.state = State()

    def go(self) -> Path:
        """Do the rounds that are missing."""
        output, config = self.output, self.config
        self._resume()
        decoder = drawing(self.policy)
        self.state.nodes = processes.of_the_first(
            self.state.nodes or decoder.nodes(decoder.engine.held(self.pool.count))
        )
        decoder.tree_size, decoder.chosen = self.state.nodes, {}
        if self.first:
            for name in ("state", "tensorboard"):
                (output / name).mkdir(parents=True, exist_ok=True)
            write_whole(output / CONFIG, json.dumps(self.recorded, indent=2) + "\n")
            place = str(output / "tensorboard")
            self.board = SummaryWriter(place, purge_step=self.state.rounds + 1)
        if processes.of_the_first(not (output / "last").exists()):
            self._save()
        self._finish()
        self.rounds_before, self.minutes_before = self.state.rounds, self.state.minutes
        self.began = time.monotonic() - 60 * self.state.minutes
        while (reason := self._over()) is None:
            self._round()
            self.state.minutes = processes.of_the_first((time.monotonic() - self.began) / 60)
            if self.state.rounds % config.logging.measure_every_n_rounds == 0 or self._over():
                self._save()
                self._finish()
        if processes.of_the_first(self._name() != (output / "last").resolve().name):
            self._save()
            self._finish()
        if self.first:
            logger.log(logging.WARNING if self._fall() else logging.INFO, "ended: %s", reason)
            write_report(output)
        return output / "last"

    def _share(self) -> float:
        """Return the share of the learning rate at which the next round learns."""
        config, state = self.config, self.state
        if config.update.lr_scheduler == "constant":
            return 1.0
        done = [0.0]
        done += [state.rounds / config.num_rounds] if config.num_rounds else []
        done += [state.minutes / config.max_minutes] if config.max_minutes else []
        return max(0.0, 1 - max(done))

    def _over(self) -> str | None:
        """Return why the run is over, or None."""
        config, state = self.config, self.state
        if state.solved:
            return "every episode of a round succeeded"
        if fall := processes.of_the_first(self._fall()):
            return fall
        if config.num_rounds is not None and state.rounds >= config.num_rounds:
            return f"{state.rounds} rounds"
        if config.max_minutes is not None and state.minutes >= config.max_minutes:
            return f"{state.minutes:.0f} minutes"
        return None

    def _fall(self) -> str | None:
        """Return what to say where held-out success has fallen too far, or None."""
        below, every = self.config.logging.stop_below_best, measured(self.output)
        if below is None or len(every) < 2:
            return None
        best, last = max(line["success"] for line in every[:-1]), every[-1]["success"]
        if last >= best - below:
            return None
        return (
            f"held-out success fell to {last:.0%}, from {best:.0%} before; `best` is that one. A "
            "smaller update.learning_rate, or update.kl=0.05, may hold it"
        )

    def _name(self) -> str:
        """Return the name of the folder of a checkpoint of now."""
        return f"step-{self.state.rounds:06d}"

    def _round(self) -> None:
        """Play, learn, and record both."""
        number = self.state.rounds + 1
        result = self.player.play(number, self.state.starts, self.state.tried)
        self.state.starts += result.groups
        self.state.tried = remembered(self.state.tried, result.lines)
        solved = sum(bool(line["success"]) for line in result.lines)
        total = len(result.lines)
        if not total:
            raise InputError(
                "episodes that end", "none: all were given up after crashes", "see the log"
            )
        line: dict[str, Any] = {
            "round": number,
            "success": solved / total,
            "episodes": total,
            "groups": result.groups,
            "useful": result.useful,
            **result.seconds,
        }
        if self.player.imitates:
            self.successes.add(number, result.own)
        if not result.useful or solved == total:
            self._nothing_to_learn(solved, total)
        else:
            update, seed = self.config.update, [self.config.seed, number]
            queries = (
                self.successes.draw(seed) if self.player.imitates else weighed(result.own, update)
            )
            if self.demonstrations is not None:
                queries += self.demonstrations.beside(len(queries), seed)
            with learning(update):
                line |= self.learner.learn(queries, seed, self._share())
        self.state.rounds = number
        if self.first:
            self._record(line, result.lines, solved)

    def _record(self, line: dict[str, Any], lines: list[dict[str, Any]], solved: int) -> None:
        """Write and say what came of a round."""
        number, total = line["round"], line["episodes"]
        with (self.output / EPISODES).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"round": number, **each}) + "\n" for each in lines)
        with (self.output / ROUNDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for key, value in line.items():
            self.board.add_scalar(f"rl/{key}", value, number)
        low, high = wilson(solved, total)
        logger.info(
            "round %d: %d of %d solved (%.0f to %.0f %%), %d of %d groups count; "
            "%.0f s playing, %.0f s learning; about %s left",
            number,
            solved,
            total,
            100 * low,
            100 * high,
            line["useful"],
            line["groups"],
            line["play_s"],
            line.get("update_s", 0.0),
            self._left(),
        )

    def _left(self) -> str:
        """Return how long the run will go on, in words."""
        minutes, config = (time.monotonic() - self.began) / 60, self.config
        left = [] if config.max_minutes is None else [config.max_minutes - minutes]
        if config.num_rounds is not None:
            here = self.state.rounds - self.rounds_before
            left.append(
                (config.num_rounds - self.state.rounds) * (minutes - self.minutes_before) / here
            )
        return f"{max(0.0, min(left)):.0f} minutes"

    def _nothing_to_learn(self, solved: int, total: int) -> None:
        """Say that no group is of use; at the start, raise InputError if all or none succeeded."""
        got = f"{solved} of {total} solved, no group with both success and failure"
        first = self.state.rounds == 0
        if solved == 0 and first:
            remedy = (
                "begin with a checkpoint that succeeds at times (more demonstrations or steps), "
                "easier tasks, a larger rollouts.temperature or rollouts.group_size"
            )
            raise InputError("episodes that succeed", got, remedy)
        if solved == total and first:
            remedy = "there is nothing to learn: choose harder tasks, or a larger temperature"
            raise InputError("episodes that fail", got, remedy)
        self.state.solved = solved == total
        logger.warning("nothing was learned in this round: %s", got)

    def _save(self) -> None:
        """Write the training state and a checkpoint, and point `last` to it."""
        if not self.first:
            return
        folder, output = self.output / self._name(), self.output
        state = output / "state" / f"checkpoint-{self.state.rounds}"
        state.mkdir(parents=True, exist_ok=True)
        torch.save(self.learner.state(), state / "learner.pt")
        write_whole(state / "state.json", json.dumps(dataclasses.asdict(self.state)))
        model = plain(self.model)
        models.save(
            folder, model, self.processor, self.specs, merged(self.model)
        )  # fmt: skip
        for place in (state, folder):
            settle(place)
        point(output / "last", folder.name)
        self.successes.prune(self.state.rounds)

    def _finish(self) -> None:
        """Measure the checkpoint `last`, rank it, prune and draw, unless that is done."""
        name, output = self._name(), self.output
        if processes.of_the_first((output / name / FINISHED).is_file()):
            return
        metrics = self.player.measure()
        if self.first:
            self._publish(name, metrics)

    def _publish(self, name: str, metrics: dict[str, float]) -> None:
        """Write what was measured of a checkpoint."""
        output = self.output
        logger.info(
            "%s: %.1f %% of %d held-out episodes solved",
            name,
            100 * metrics["success"],
            metrics["episodes"],
        )
        remark = f"It went on from '{Path(self.config.checkpoint).name}' by its success there."
        text = card(
            {MAIN: (self.settings.env, self.policy.spec)}, self.state.rounds, metrics, [remark]
        )
        write_whole(output / name / "README.md", text)
        rank(output, name, metrics)
        prune(output, self.state.rounds, self.config.logging.keep_last)
        write_report(output)
        write_whole(output / name / FINISHED, (output / FINISHED).read_bytes())
        self.board.add_scalar("rl/held_out_success", metrics["success"], self.state.rounds)

    def _refuse_others(self) -> None:
        """Raise InputError where another run is in the folder."""
        file = self.output / CONFIG
        refuse_dangling(self.output / "last")
        if file.exists():
            refuse_other_config(self.output, read_json(file, DAMAGED), self.recorded, FREE)
            return
        for name in ("last", EPISODES, "train_config.json"):
            if (self.output / name).exists():
                got = f"another's '{name}'"
                raise InputError(f"a run of vla0 rl in '{self.output}', or nothing", got, OTHER)

    def _resume(self) -> None:
        """Take over the state of the checkpoint `last`, and forget what came after it."""
        last = self.output / "last"
        if not last.exists():
            for name in (EPISODES, ROUNDS) if self.first else ():
                (self.output / name).unlink(missing_ok=True)
            return
        folder = (
            self.output / "state" / f"checkpoint-{int(last.resolve().name.removeprefix('step-'))}"
        )
        self.state = State(**read_json(folder / "state.json", DAMAGED))
        content = saved(folder / "learner.pt", self.policy.model.device)
        try:
            self.learner.load(content)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            expected = f"a training state of this model in '{folder}'"
            raise InputError(expected, said(error), DAMAGED) from None
        if self.player.imitates:
            self.successes.load(self.state.rounds)
        for name in (EPISODES, ROUNDS) if self.first else ():
            file = self.output / name
            mend(file)
            if file.exists():
                lines = [json.loads(line) for line in file.read_text().splitlines()]
                kept = [line for line in lines if line["round"] <= self.state.rounds]
                write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))
