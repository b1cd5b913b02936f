from matplotlib.figure import Figure

from vla0.train.plots import chart


def test_the_loss_has_plain_numbers_on_a_logarithmic_axis(tmp_path, monkeypatch):
    drawn = []
    saved = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **more: (saved(self, *args, **more), drawn.append(self)),
    )
    losses = [{"step": step, "loss": 4 / step, "token_accuracy": 0.5} for step in range(1, 9)]
    chart(losses, [{"step": "step-4", "held_out_loss": 1.2}], tmp_path / "training.png")
    (figure,) = drawn
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    labels = [
        label.get_text() for minor in (False, True) for label in axes.get_yticklabels(minor=minor)
    ]
    assert {"0.5", "1", "2"} <= set(labels)
    assert not [label for label in labels if "^" in label]
