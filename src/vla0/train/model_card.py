"""Write the model card of a checkpoint, which is its page on the Hub.

The text of the card is in model_card.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from vla0.checkpoint.location import restricted
from vla0.core.spec import MAIN, Spec

TEMPLATE = Path(__file__).with_suffix(".md")


def card(
    specs: Mapping[str, tuple[str, Spec]],
    step: int,
    metrics: Mapping[str, float],
    remarks: Sequence[str] = (),
) -> str:
    """Write a card that says what a checkpoint was trained on, what it takes and how to use it.

    Args:
        specs: {embodiment: (dataset, Spec)}.
        step: The training step of the checkpoint.
        metrics: What was measured, by name.
        remarks: Sentences about its data.

    Returns:
        The card, in Markdown.
    """
    dataset, spec = specs[MAIN]
    licence = restricted(spec.base_model)
    public = dataset.count("/") == 1 and not Path(dataset).exists()
    data = ModelCardData(
        library_name="vla0",
        pipeline_tag="robotics",
        tags=["robotics", "VLA-0", "LeRobot"],
        base_model=spec.base_model if "/" in spec.base_model else None,
        datasets=[dataset] if public else None,
    )
    made = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        spec=spec,
        dataset=dataset if public else Path(dataset).name,
        licence=licence,
        step=step,
        gives=spec_line(spec),
        others={
            name: spec_line(other_spec) for name, (_, other_spec) in specs.items() if name != MAIN
        },
        remarks=list(remarks),
        metrics=dict(metrics),
        images=", ".join(f'"{camera}": {camera}' for camera in spec.cameras),
        state="" if spec.state is None else ", state=state",
    )
    return made.content


def spec_line(spec: Spec) -> str:
    """Describe in words what a policy predicts."""
    return f"{spec.chunk_size} actions of {spec.dimensions} numbers at {spec.fps:g} a second"
