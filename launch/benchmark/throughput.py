"""Samples per second of both trainers, in alternating pairs, so that a machine that slows down slows both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.benchmark.report import spread
from launch.benchmark.trainers import Layout, Outcome, Trial, run_open_clip, run_ours

_PROBE_STEPS = 6  # of each layout of the peer, to find its fastest


@dataclass(frozen=True)
class Bench:
    """Where and how runs are made. `announce` is told what starts; `limit`: seconds that one run may take."""

    folder: Path
    python: Path
    announce: Callable[[str], None]
    limit: float


def fastest_layout(bench: Bench, trial: Trial, layouts: Sequence[Layout], skip: int) -> tuple[Layout, dict[str, float]]:
    """The layout in which open_clip's trainer makes most samples per second, and what each makes."""
    if len(layouts) == 1:
        return layouts[0], {}
    probe = dataclasses.replace(trial, steps_per_epoch=skip + _PROBE_STEPS, epochs=1)
    rates = {}
    for layout in layouts:
        bench.announce(f"open_clip, probing {layout} (processes x threads)")
        folder = bench.folder / f"probe-{layout.ranks}-{layout.precision}"
        outcome = run_open_clip(probe, layout, folder, bench.limit, bench.python)
        rates[layout] = outcome.samples_per_second(trial.global_batch, skip)
    return max(rates, key=rates.__getitem__), {str(layout): rate for layout, rate in rates.items()}


def alternate(bench: Bench, trial: Trial, ours: Layout, theirs: Layout, pairs: int) -> list[tuple[Outcome, Outcome]]:
    """`pairs` times (ours, theirs), the order within a pair changing from one to the next (ABBA)."""
    results = []
    for number in range(pairs):
        results.append(_pair(bench, trial, ours, theirs, number))
    return results


def summary(results: Sequence[tuple[Outcome, Outcome]], global_batch: int, skip: int) -> dict:
    """Rates of each run, their medians and ranges, and the ratio of ours to theirs: of the medians, and per pair."""
    rates = [tuple(outcome.samples_per_second(global_batch, skip) for outcome in pair) for pair in results]
    ours, theirs = [a for a, _ in rates], [b for _, b in rates]
    return {
        "runs": {"dualstream": ours, "open_clip": theirs},
        "dualstream": spread(ours),
        "open_clip": spread(theirs),
        "ratio_of_medians": spread(ours)["median"] / spread(theirs)["median"],
        "ratio_per_pair": spread([a / b for a, b in rates]),
    }


def _pair(bench: Bench, trial: Trial, ours: Layout, theirs: Layout, number: int) -> tuple[Outcome, Outcome]:
    def run(trainer: str) -> Outcome:
        bench.announce(f"{trainer}, pair {number + 1}")
        folder = bench.folder / f"{trainer}-{number}"
        if trainer == "dualstream":
            return run_ours(trial, ours, folder, bench.limit)
        return run_open_clip(trial, theirs, folder, bench.limit, bench.python)

    order = ("dualstream", "open_clip") if number % 2 == 0 else ("open_clip", "dualstream")
    done = {trainer: run(trainer) for trainer in order}
    return done["dualstream"], done["open_clip"]
