"""The picture of `benchmark.py chaos`: two loss curves, one over the other, and the difference between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt

_COLORS = {1: "tab:green", 2: "tab:blue", 4: "tab:orange", 8: "tab:purple"}


def draw(
    path: Path,
    undisturbed: Mapping[int, float],
    lives: Sequence[Mapping],
    kills: Sequence[Mapping],
    control: Mapping[int, float],
    title: str,
) -> None:
    """Write a PNG. `lives`: `ranks` and `losses` by step of each start; `kills`: the `step` after which each died;
    `control`: the relative difference by step of a run that only its world size tells from the undisturbed one."""
    figure, (top, below) = plt.subplots(
        2, 1, figsize=(9, 5.5), height_ratios=(3, 1), sharex=True, constrained_layout=True
    )
    top.set_title(title)
    labelled = set()
    for life in lives:
        color = _COLORS.get(life["ranks"], "tab:red")
        label = None if life["ranks"] in labelled else f"killed and resumed, {life['ranks']} rank(s)"
        labelled.add(life["ranks"])
        steps = sorted(life["losses"])
        top.plot(steps, [life["losses"][s] for s in steps], color=color, linewidth=5, alpha=0.5, label=label)
        gaps = [abs(life["losses"][s] - undisturbed[s]) / abs(undisturbed[s]) for s in steps]
        below.plot(steps, [max(gap, 1e-9) for gap in gaps], color=color, linewidth=1)
    steps = sorted(undisturbed)
    top.plot(steps, [undisturbed[s] for s in steps], color="black", linewidth=0.9, label="undisturbed")
    for number, kill in enumerate(kills):
        for axes in (top, below):
            label = "SIGKILL of a rank" if number == 0 and axes is top else None
            axes.axvline(kill["step"], color="tab:red", linewidth=0.8, linestyle=":", label=label)
    steps = sorted(control)
    values = [max(control[step], 1e-9) for step in steps]
    below.plot(steps, values, color="black", linewidth=0.7, linestyle="--", label="undisturbed, another world size")
    below.legend(frameon=False, loc="lower right")
    below.set(yscale="log", xlabel="optimizer step", ylabel="relative\ndifference")
    top.set_ylabel("loss")
    top.legend(frameon=False)
    figure.savefig(path, dpi=90)
    plt.close(figure)
