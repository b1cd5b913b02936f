"""What others have published: success, of which weights, by which protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, field

LEROBOT_DOCS = "https://huggingface.co/docs/lerobot"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a published result, such as a suite of LIBERO.

    Args:
        percent: Published success.
        tasks: Names of its tasks. Empty where `suite` names them all.
        suite: The suite that it is, or None.
        max_steps: Steps after which an episode had failed. None takes the simulator's.
    """

    percent: float
    tasks: tuple[str, ...] = ()
    suite: str | None = None
    max_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint, how it was evaluated, and what came of it.

    Args:
        model: Its id on the Hub.
        source: Where figures and protocol are stated.
        parts: {name of a part: its tasks and success}.
        episodes: Of each task.
        n_action_steps: Steps executed per query.
        ensemble: How overlapping chunks are averaged, in our words.
        env: The simulator.
        lerobot: Whether LeRobot loads it. Otherwise it is a run of the official VLA-0 code or a
            checkpoint of ours.
        keys: {camera: the policy's name of its picture}, where a policy of LeRobot's has its own.
        versions: {package: version} by which the figures were made, as far as is known.
        remarks: What else is known of the figures, and of how they differ from what is done here.
    """

    model: str
    source: str
    parts: Mapping[str, Part]
    episodes: int
    n_action_steps: int
    ensemble: str
    env: str = "libero"
    lerobot: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def _four(
    spatial: float, goods: float, goal: float, long: float, spatial_steps: int | None = None
) -> dict[str, Part]:
    """Return the four suites of LIBERO with their successes."""
    return {
        "libero_spatial": Part(percent=spatial, suite="spatial", max_steps=spatial_steps),
        "libero_object": Part(percent=goods, suite="object"),
        "libero_goal": Part(percent=goal, suite="goal"),
        "libero_10": Part(percent=long, suite="long"),
    }


# LeRobot ends an episode of libero_spatial after 280 steps, the official protocol after 220.
LEROBOT_SPATIAL = 280
RENDERING = {"mujoco": "3.3.2"}  # later ones draw LIBERO darker

CHECKPOINTS = {
    "vla0-libero": Published(
        model="ankgoyal/vla0-libero",
        source="arXiv 2510.13054; https://github.com/NVlabs/vla0",
        parts=_four(97.0, 97.8, 96.2, 87.6),
        episodes=50,
        n_action_steps=1,
        ensemble="v1",
        versions=RENDERING,
        remarks=(
            "others measured 92.7 % with these weights and the official code (its issue 29)",
            "the weights may not be used commercially (CC BY-NC 4.0, and Qwen's research licence)",
        ),
    ),
    "pi05-libero": Published(
        model="lerobot/pi05_libero_finetuned",
        source=f"{LEROBOT_DOCS}/libero",
        parts=_four(97.0, 99.0, 98.0, 96.0, LEROBOT_SPATIAL),
        episodes=10,
        n_action_steps=10,
        ensemble="none",
        lerobot=True,
        versions=RENDERING,
    ),
    "pi0fast-libero": Published(
        model="lerobot/pi0fast-libero",
        source=f"{LEROBOT_DOCS}/pi0fast",
        parts=_four(70.0, 100.0, 100.0, 60.0, LEROBOT_SPATIAL),
        episodes=1,
        n_action_steps=10,
        ensemble="none",
        lerobot=True,
        keys={
            "agentview": "observation.images.base_0_rgb",
            "wrist": "observation.images.left_wrist_0_rgb",
        },
        versions=RENDERING,
    ),
}

# What is shown beside LIBERO's suites: the published success of VLA-0 and, on LIBERO-PRO, that of
# π0.5 (its README of 2026-11; the mean over the sixteen is 53.3 %).
BESIDE = {
    suite: f"VLA-0: {part.percent} %" for suite, part in CHECKPOINTS["vla0-libero"].parts.items()
} | {
    f"libero_{suite}_{change}": f"π0.5: {percent} %"
    for suite, percents in {
        "goal": (97, 97, 38, 0),
        "spatial": (97, 97, 20, 1),
        "10": (93, 92, 8, 1),
        "object": (96, 98, 17, 1),
    }.items()
    for change, percent in zip(("lan", "object", "swap", "task"), percents, strict=True)
}
# The ablation of VLA-0's paper: means over the four suites.
ABLATION = {"ensembling mean": 94.7, "no ensembling": 92.0, "separate images": 94.5}
