"""`benchmark.py dedup`: seconds and memory of the search for near-copies, by number of hashes and radius."""

from __future__ import annotations

import argparse
import dataclasses
import time

from launch.benchmark.dedup_trial import DedupTrial
from launch.benchmark.report import show_table, write_report
from launch.benchmark.train import announce
from launch.benchmark.trainers import run_trial

_GIB = 2**30
_CHECKED = 100_000  # hashes, up to which what is found is compared with comparing all with all
_DEFINITION = (
    "hashes of 64 bits drawn at random, of which 1 % are copies with some bits turned, half of them mirrored; skewed: "
    "5 % more are one hash and 1 % lie within 8 bits of another. Seconds from the hashes in memory to what goes; peak: "
    "the largest sum of the proportional set sizes of all processes; faults: near pairs that both stay and pictures "
    f"that go for one out of reach, by comparing all with all, up to {_CHECKED} hashes"
)


def run_dedup(args: argparse.Namespace) -> int:
    """Measure what `args` (see cli.py) ask for, print a table and write report.json; returns the exit code."""
    folder = args.work_dir.resolve() / time.strftime("dedup-%Y%m%d-%H%M%S")
    rows = []
    for number, trial in enumerate(trials(args)):
        announce(f"{trial.hashes:,} hashes, radius {trial.radius}{', skewed' if trial.skewed else ''}")
        rows.append(dataclasses.asdict(trial) | run_trial("dedup_trial", trial, folder / str(number)))
    show_table(
        f"{args.workers} workers: seconds, GiB of all processes, what goes",
        ("hashes", "set", "radius", "blocks", "candidates", "goes", "seconds", "GiB", "faults"),
        [_cells(row) for row in rows],
    )
    write_report(folder / "report.json", {"kind": "dedup", "definition": _DEFINITION, "rows": rows})
    print(f"report: {folder / 'report.json'}")
    return 0


def trials(args: argparse.Namespace) -> list[DedupTrial]:
    """Every size at every radius, evenly drawn and skewed."""
    return [
        DedupTrial(hashes, radius, args.workers, skewed, checked=hashes <= _CHECKED)
        for hashes in args.hashes
        for radius in args.radii
        for skewed in (False, True)
    ]


def _cells(row: dict) -> tuple[str, ...]:
    return (
        f"{row['hashes']:,}",
        "skewed" if row["skewed"] else "even",
        str(row["radius"]),
        str(row["blocks"]),
        f"{row['candidates']:.1g}",
        f"{row['goes']:,}",
        f"{row['seconds']:.1f}",
        f"{row['peak'] / _GIB:.2f}",
        "not asked" if row["faults"] is None else str(row["faults"]),
    )
