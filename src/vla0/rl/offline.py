"""Learn from recorded episodes that a person or a simulator has judged, without a simulator.

Advantage-weighted imitation: chunks of episodes that went better than others of their task count
more (X. B. Peng et al., arXiv 1910.00177), or those of failures not at all.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from vla0.checkpoint import io as models
from vla0.checkpoint.location import locate
from vla0.core.prompt import Prompt
from vla0.core.spec import MAIN, Spec, embodiments
from vla0.data.lerobot import Source
from vla0.errors import InputError
from vla0.files import held, write_whole
from vla0.rl.config import OfflineConfig
from vla0.rl.demonstrations import Recorded, fitting
from vla0.rl.update import DTYPES, Learner, learning
from vla0.rl.weights import Weighed
from vla0.train.checkpoints import point
from vla0.train.lora import adapted, merged, plain
from vla0.train.model_card import card

logger = logging.getLogger(__name__)

SUCCESS = "next.success"  # LeRobot's column: whether the task is done after this step
# That of `vla0 robot` (vla0.robot.record): whether somebody gave a verdict. Without it all are.
JUDGED = "judged"
NAME = "step-000001"  # of the checkpoint


def verdicts(source: Source) -> dict[int, bool]:
    """Return {episode: whether it succeeded}, of the episodes that were judged.

    Raises:
        InputError: When the dataset has no verdicts, or none that differ from nothing.
    """
    dataset = source.dataset
    if SUCCESS not in dataset.features:
        raise InputError(
            f"'{SUCCESS}' in '{source.config.dataset}'",
            "no such column",
            "record with `vla0 robot --live`, where s and f give a verdict",
        )
    succeeded = dataset.column(SUCCESS)[:, 0] > 0
    judged = np.ones(len(succeeded), bool)
    if JUDGED in dataset.features:
        judged = dataset.column(JUDGED)[:, 0] > 0
    found = {
        int(episode): bool(succeeded[source.episode_of == episode].any())
        for episode in np.unique(source.episode_of)
        if judged[source.episode_of == episode].any()
    }
    if not found:
        got = f"none in {len(np.unique(source.episode_of))} episodes"
        raise InputError("episodes with a verdict", got, "press s or f at the end of an episode")
    return found


def weights_of(
    verdict: Mapping[int, bool], task_of: Mapping[int, int], how: str, temperature: float
) -> dict[int, float]:
    """Return how much each episode counts, 1 in the mean; those that do not count are missing.

    Args:
        verdict: {episode: whether it succeeded}.
        task_of: {episode: number of its instruction}.
        how: "filter" or "weighted".
        temperature: Of "weighted".

    Raises:
        InputError: When no episode succeeded.
    """
    if not any(verdict.values()):
        raise InputError(
            "an episode that succeeded", f"none of {len(verdict)}", "record some that do"
        )
    if how == "filter":
        return {episode: 1.0 for episode, success in verdict.items() if success}
    rates = {
        task: np.mean([verdict[episode] for episode in verdict if task_of[episode] == task])
        for task in {task_of[episode] for episode in verdict}
    }
    weights = {
        episode: float(np.exp((success - rates[task_of[episode]]) / temperature))
        for episode, success in verdict.items()
    }
    mean = float(np.mean(list(weights.values())))
    return {episode: weight / mean for episode, weight in weights.items()}


def offline(config: OfflineConfig) -> Path:
    """Learn one round from recorded episodes.

    Returns:
        The folder `last`.

    Raises:
        InputError: When the dataset does not fit the checkpoint or has no verdicts, the folder
            holds a result, or memory is short.
    """
    output = Path(config.output_dir)
    if (output / "last").exists():
        got = f"'{output / 'last'}', which exists"
        raise InputError("a new output_dir", got, "choose another, or remove that folder")
    folder = locate(config.checkpoint)
    spec = Spec.load(folder)
    source = fitting(config.data, spec, config.checkpoint)
    verdict = verdicts(source)
    starts = source.dataset.starts
    task_of = {int(source.episode_of[row]): int(source.task_of[row]) for row in starts}
    weights = weights_of(verdict, task_of, config.episodes, config.temperature)
    with held(output, "training"), learning(config.update):
        vlm, processor = models.load(folder, None, DTYPES[config.update.precision])
        start = None
        if config.update.kl:
            start = models.load(folder, None, DTYPES[config.update.precision])[0].eval()
        torch.manual_seed(config.seed)  # of LoRA's first weights
        model = adapted(vlm.eval(), config.update.lora, False).eval()
        prompt = Prompt(spec, processor)
        queries = [
            Weighed(Recorded(source, row, prompt), weights[episode], imitated=True)
            for row, episode in enumerate(map(int, source.episode_of))
            if episode in weights and row < source.first_held_out
        ]
        logger.info(
            "%d of %d episodes succeeded, %d have no verdict; %d chunks of %d episodes are learned",
            sum(verdict.values()),
            len(verdict),
            len(starts) - len(verdict),
            len(queries),
            len(weights),
        )
        learner = Learner(model, prompt, config.update, 1.0, start)
        told = learner.learn(queries, [config.seed])
        remark = (
            f"It went on from '{Path(config.checkpoint).name}' by {len(weights)} judged episodes."
        )
        specs = {name: Spec.load(folder, name) for name in embodiments(folder)}
        models.save(output / NAME, plain(model), processor, specs, merged(model))
        text = card({MAIN: (config.data.dataset, spec)}, 1, {}, [remark])
        write_whole(output / NAME / "README.md", text)
        point(output / "last", NAME)
    logger.info("%.0f tokens, %.0f s", told["tokens"], told["update_s"])
    return output / "last"
