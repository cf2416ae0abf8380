"""Pictures of a run."""

from pathlib import Path

from matplotlib.figure import Figure


def draw_losses(log_history: list[dict], path: Path) -> None:
    """Training and evaluation loss over the steps, from a trainer's log."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for key, label in (("loss", "training (under VRL)"), ("eval_loss", "evaluation (every visual token)")):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            axis.plot(*zip(*points), label=label, marker="o" if len(points) < 20 else None)
    axis.set(xlabel="step", ylabel="loss on the answers", yscale="log")
    if axis.lines:  # a run may end before it logs
        axis.legend()
    figure.savefig(path, dpi=110)
