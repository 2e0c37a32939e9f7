"""The loss curve of a run: drawn in the terminal, and as a PNG beside its metrics."""

from fastlm.data.disk import cause
from fastlm.training.listener import Listener
from fastlm.training.metrics import read_metrics


class Curve(Listener):
    """Draws OUT/loss.png when the run is at its end."""

    def finished(self, trainer):
        if trainer.done:
            rows, path = read_metrics(trainer.out / "metrics.jsonl"), trainer.out / "loss.png"
            try:
                save_png(rows, path, title=str(trainer.out))
            except OSError as error:  # the model is saved: no reason to fail
                trainer.tell("say", f"{path} could not be drawn ({cause(error)}); the model is in {trainer.out}")
            else:
                trainer.tell("say", f"the model, its metrics and loss.png are in {trainer.out}")


def save_png(rows, path, *, baselines=None, title="loss"):
    """Draws the losses of metrics rows over steps into a PNG; baselines {name: loss} become dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for key, label, colour in (("train_loss", "training text", "#9aa5b1"), ("val_loss", "held-out text", "#1f6feb")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot(*zip(*points), label=label, color=colour, linewidth=2) if points else None
    for (name, loss), colour in zip((baselines or {}).items(), ("#d1622b", "#7d4ba3")):
        axes.axhline(loss, label=f"{name} {loss:.2f}", color=colour, linestyle="--", linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)


def draw(rows, *, width=76, height=16, baselines=None):
    """The held-out loss over steps as lines of text for a terminal."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    points = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if points:
        plotext.plot(*map(list, zip(*points)), label="held-out loss")
    for name, loss in (baselines or {}).items():
        last = points[-1][0] if points else 1
        plotext.plot([0, last], [loss, loss], label=f"{name} {loss:.2f}", marker="-")
    plotext.xlabel("step")
    return plotext.uncolorize(plotext.build())
