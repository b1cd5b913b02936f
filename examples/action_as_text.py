"""The picture of the README: what the policy sees, what it writes, and what the arm then does."""

from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer

from vla0.data.lerobot import DataConfig, Source
from vla0.policy import VLA0


def draw(
    checkpoint: Annotated[Path, typer.Option()] = Path("runs/demo/train/last"),
    dataset: Annotated[Path, typer.Option()] = Path("runs/demo/dataset"),
    row: Annotated[int, typer.Option(help="of the dataset")] = 3028,
    out: Annotated[Path, typer.Option()] = Path("docs/action_as_text.png"),
) -> None:
    """Draw one row of a dataset with what the policy writes for it; dimensions that stay as they
    are, as grey numbers only.
    """
    policy = VLA0.from_pretrained(checkpoint)
    keys = {camera: f"observation.images.{camera}" for camera in policy.spec.cameras}
    source = Source(DataConfig(dataset=str(dataset), cameras=keys, state="observation.state"))
    if row >= len(source):
        raise typer.BadParameter(f"the dataset has {len(source)} rows", param_hint="--row")
    observation = source.sample(row, policy.spec.chunk_size, policy.spec.history).observation
    chunk = policy.predict_batch([observation])[0]
    levels = policy.codec.encode(chunk)
    names = policy.spec.action_names or [f"dimension {d}" for d in range(policy.spec.dimensions)]
    moving = [d for d in range(policy.spec.dimensions) if len(set(levels[:, d].tolist())) > 1]
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.1), width_ratios=(1, 1.45, 1.3), layout="constrained"
    )
    left.imshow(observation.images[policy.spec.cameras[0]])
    left.set_title(f"“{observation.instruction}”", fontsize=10)
    left.axis("off")
    middle.axis("off")
    middle.set_title("what the model writes", fontsize=10)
    tab10 = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    colours = [
        tab10[moving.index(d)] if d in moving else "#9aa5b8" for d in range(policy.spec.dimensions)
    ]
    for d, name in enumerate(names):
        middle.text(
            0.02 + 0.25 * d, 0.9, name, fontsize=10, color=colours[d], transform=middle.transAxes
        )
        for step, line in enumerate(levels):
            place = (0.02 + 0.25 * d, 0.72 - 0.8 * step / len(levels))
            middle.text(
                *place,
                str(line[d]),
                fontsize=19,
                family="monospace",
                color=colours[d],
                transform=middle.transAxes,
            )
    for d in moving:
        values = [*chunk[:, d], chunk[-1, d]]
        right.step(
            range(policy.spec.chunk_size + 1),
            values,
            where="post",
            color=colours[d],
            lw=2,
            label=names[d],
        )
    right.set(xlabel="control step", xticks=range(policy.spec.chunk_size + 1))
    right.margins(y=0.1)
    if moving:
        right.legend(
            frameon=False,
            fontsize=9,
            ncols=len(moving),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
        )
    right.set_title("what the arm does", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    typer.run(draw)
