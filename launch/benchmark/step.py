"""`benchmark.py step`: one training step, data given: ours with its engine at every stage and with each lever, the same
towers and loss without the engine, and open_clip's; in fresh processes, in turn."""

from __future__ import annotations

import argparse
import dataclasses
import time
from importlib.metadata import version

import torch

from data_tools.errors import UsageError
from launch.benchmark.report import show_table, spread, write_report
from launch.benchmark.step_trial import StepTrial
from launch.benchmark.train import announce, resolved_precision
from launch.benchmark.trainers import run_trial

_MIB, _TERA = 2**20, 1e12
_PEAK_TFLOPS = {  # dense bf16, by the makers' data sheets
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}
_DEFINITION = (
    "seconds: of a step, the median of a process, then of the rounds; flops: of the forward and backward, counted by "
    "torch, without what runs again; peak: bytes above what the process held after its imports; mfu: flops by seconds "
    "and the device's peak"
)


def run_step(args: argparse.Namespace) -> int:
    """Measure what `args` (see cli.py) ask for, print a table and write report.json; returns the exit code."""
    if "cached" in args.variants and args.batch % args.micro_batch:
        raise UsageError("--micro-batch does not divide --batch", got=args.micro_batch, expected=f"of {args.batch}")
    args.precision = resolved_precision(args.precision)
    folder = args.work_dir.resolve() / time.strftime("step-%Y%m%d-%H%M%S")
    found: dict[str, list[dict]] = {name: [] for name in args.variants}
    for number in range(args.rounds):
        for name in args.variants if number % 2 == 0 else args.variants[::-1]:
            announce(f"{name}, round {number + 1}")
            found[name].append(run_trial("step_trial", variant(name, args), folder / f"{name}-{number}"))
    peak = args.peak_tflops or known_peak()
    rows = [summary(name, results, args.batch, peak) for name, results in found.items()]
    show_table(
        f"{args.model}, batch {args.batch}, {args.precision}, one rank: {args.rounds} rounds of {args.steps} steps",
        ("variant", "ms", "lowest", "highest", "samples/s", "times the first", "GFLOP", "MFU %", "MiB"),
        [_cells(row, rows[0]) for row in rows],
    )
    report = {"kind": "step", "definition": _DEFINITION, "precision": args.precision, "rows": rows, "peak_tflops": peak}
    report |= {"deepspeed": version("deepspeed"), "open_clip": version("open_clip_torch")}
    write_report(folder / "report.json", report)
    print(f"report: {folder / 'report.json'}")
    return 0


def variant(name: str, args: argparse.Namespace) -> StepTrial:
    """The trial that `name` (see `VARIANTS` in cli.py) stands for."""
    who = name if name in ("bare", "open_clip") else "dualstream"
    plain = StepTrial(who=who, model=args.model, batch=args.batch, precision=args.precision, steps=args.steps)
    levers: dict[str, dict] = {
        "one-bucket": {"text_buckets": 1},
        "cached": {"micro_batch": args.micro_batch},
        "checkpointed": {"grad_checkpointing": ("image", "text")},
        "compiled": {"compile": True},
        **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
    }
    return dataclasses.replace(plain, **levers.get(name, {}))


def known_peak() -> float | None:
    """TFLOP/s of the first GPU in bf16, where its name is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


def summary(name: str, results: list[dict], batch: int, peak_tflops: float | None) -> dict:
    """What the rounds of one variant say together."""
    seconds = spread([result["seconds"] for result in results])
    flops = results[0]["flops"]
    return {
        "variant": name,
        "seconds": seconds,
        "samples_per_second": batch / seconds["median"],
        "flops": flops,
        "mfu": None if peak_tflops is None else flops / seconds["median"] / (peak_tflops * _TERA),
        "peak": max(result["peak"] for result in results),
    }


def _cells(row: dict, first: dict) -> tuple[str, ...]:
    seconds = row["seconds"]
    return (
        row["variant"],
        *(f"{1000 * seconds[key]:.0f}" for key in ("median", "min", "max")),
        f"{row['samples_per_second']:.1f}",
        f"{seconds['median'] / first['seconds']['median']:.2f}",
        f"{row['flops'] / 1e9:.0f}",
        "" if row["mfu"] is None else f"{100 * row['mfu']:.1f}",
        f"{row['peak'] / _MIB:.0f}",
    )
