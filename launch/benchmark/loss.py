"""`benchmark.py loss`: FLOPs, peak memory and time of the losses beside open_clip's, forward and backward, in turn."""

from __future__ import annotations

import argparse
import dataclasses
import time
from importlib.metadata import version

import torch

from launch.benchmark.loss_trial import PEERS, LossTrial
from launch.benchmark.report import show_table, spread, write_report
from launch.benchmark.train import announce
from launch.benchmark.trainers import run_trial

_MIB = 2**20
_DEFINITION = (
    "one forward and backward at world size 1 in a fresh process, features given in fp32: FLOPs counted on a small "
    "batch and divided by B^2 d; the peak memory above the features; the seconds"
)


def run_loss(args: argparse.Namespace) -> int:
    """Measure what `args` (see cli.py) ask for, print a table and write report.json; returns the exit code."""
    folder = args.work_dir.resolve() / time.strftime("loss-%Y%m%d-%H%M%S")
    results: dict[LossTrial, list[dict]] = {}
    for number, trial in enumerate(trials(args)):
        announce(f"{trial.loss} of {trial.who}, {trial.pairs} pairs")
        results.setdefault(trial, []).append(run_trial("loss_trial", trial, folder / str(number)))
    rows = [dataclasses.asdict(trial) | _summary(found) for trial, found in results.items()]
    show_table(
        f"d = {args.dim}, {torch.get_num_threads()} threads, forward and backward: FLOPs by B^2 d, peak MiB, median "
        "seconds, their range, and times ours",
        ("loss", "pairs", "whose", "FLOPs", "MiB", "seconds", "range", "times"),
        [_cells(row, rows) for row in rows],
    )
    report = {"kind": "loss", "definition": _DEFINITION, "rows": rows, "open_clip": version("open_clip_torch")}
    write_report(folder / "report.json", report)
    print(f"report: {folder / 'report.json'}")
    return 0


def trials(args: argparse.Namespace) -> list[LossTrial]:
    """`rounds` rounds over sizes and losses, ours and the peer's in turn, who is first changing; then ours alone."""
    found = []
    for number in range(args.rounds):
        for pairs in args.pairs:
            for loss in args.losses:
                who = ["dualstream", "open_clip"] if loss in PEERS else ["dualstream"]
                found += [LossTrial(name, loss, pairs, args.dim) for name in (who if number % 2 == 0 else who[::-1])]
    return found + [LossTrial("dualstream", loss, pairs, args.dim) for pairs in args.alone for loss in args.losses]


def _summary(found: list[dict]) -> dict:
    """What the trials of one kind say together."""
    same = {name: found[0][name] for name in ("flops_by_b2d", "loss_value")}
    return same | {"peak": max(one["peak"] for one in found), "seconds": spread([one["seconds"] for one in found])}


def _cells(row: dict, rows: list[dict]) -> tuple[str, ...]:
    seconds = row["seconds"]
    place = ("dualstream", row["loss"], row["pairs"])
    ours = next(other for other in rows if (other["who"], other["loss"], other["pairs"]) == place)
    return (
        row["loss"],
        str(row["pairs"]),
        "ours" if row["who"] == "dualstream" else PEERS[row["loss"]],
        f"{row['flops_by_b2d']:.1f}",
        f"{row['peak'] / _MIB:.0f}",
        f"{seconds['median']:.2f}",
        f"{seconds['min']:.2f} to {seconds['max']:.2f}",
        f"{seconds['median'] / ours['seconds']['median']:.2f}",
    )
