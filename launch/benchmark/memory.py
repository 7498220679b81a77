"""`benchmark.py memory`: the peak memory of a training step beside what `--dry-run` promises, by ZeRO stage, ranks,
micro-batch and checkpointed towers. Every figure is taken in fresh processes."""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch

from data_tools.errors import UsageError
from launch.benchmark.memory_trial import MemoryTrial
from launch.benchmark.peak import MALLOC
from launch.benchmark.report import show_table, write_report
from launch.benchmark.train import announce, resolved_precision
from launch.benchmark.trainers import run_trial

_MIB = 2**20
_DEFINITION = (
    "bytes of the rank that takes most, from before the model is built to the end of the second step, above what the "
    "process held after its imports: the largest resident size on CPUs, the largest allocated on GPUs"
)


def run_memory(args: argparse.Namespace) -> int:
    """Measure what `args` (see cli.py) ask for, print a table and write report.json; returns the exit code."""
    args.precision = resolved_precision(args.precision)
    folder = args.work_dir.resolve() / time.strftime("memory-%Y%m%d-%H%M%S")
    rows = []
    for number, trial in enumerate(trials(args)):
        announce(", ".join(_place(dataclasses.asdict(trial))))
        measured = run_trial("memory_trial", trial, folder / str(number), trial.world_size, MALLOC)
        rows.append(dataclasses.asdict(trial) | measured)
    title = f"{args.model}, {args.precision}, {args.pairs} pairs per rank: peak MiB per rank"
    columns = ("stage", "ranks", "micro-batch", "checkpointed", "measured", "formula", "ratio")
    show_table(title, columns, [(*_place(row), *_figures(row)) for row in rows])
    write_report(folder / "report.json", {"kind": "memory", "definition": _DEFINITION, "rows": rows})
    print(f"report: {folder / 'report.json'}")
    return 0


def trials(args: argparse.Namespace) -> list[MemoryTrial]:
    """Whole batches at every stage and number of ranks; then, at the first of both, the ways to save activations."""
    if args.pairs % args.micro_batch:
        raise UsageError("--micro-batch does not divide --pairs", got=args.micro_batch, expected=f"of {args.pairs}")
    gpus = torch.cuda.device_count()
    if gpus and max(args.world_sizes) > gpus:
        raise UsageError("more ranks than GPUs", got=max(args.world_sizes), expected=f"at most {gpus}")
    whole = MemoryTrial(
        model=args.model,
        zero_stage=args.zero_stages[0],
        world_size=args.world_sizes[0],
        pairs=args.pairs,
        micro_batch=None,
        grad_checkpointing=(),
        precision=args.precision,
    )
    states = [
        dataclasses.replace(whole, zero_stage=stage, world_size=size)
        for size in args.world_sizes
        for stage in args.zero_stages
    ]
    both, size = ("image", "text"), args.micro_batch
    savings = [(None, ("image",)), (None, ("text",)), (None, both), (size, ()), (size, both)]
    return states + [
        dataclasses.replace(whole, micro_batch=micro, grad_checkpointing=towers) for micro, towers in savings
    ]


def _place(row: dict) -> tuple[str, ...]:
    ranks, micro_batch = row["world_size"], row["micro_batch"] or "whole"
    return f"ZeRO-{row['zero_stage']}", str(ranks), str(micro_batch), "+".join(row["grad_checkpointing"]) or "none"


def _figures(row: dict) -> tuple[str, ...]:
    measured, formula = row["measured"], row["formula"]["total"]
    return f"{measured / _MIB:.0f}", f"{formula / _MIB:.0f}", f"{measured / formula:.2f}"
