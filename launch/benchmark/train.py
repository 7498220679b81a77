"""`benchmark.py train`: whole trainings of this project and of open_clip's trainer on the same shards and towers."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from data_tools.corpus import Corpus, ShardReader, open_corpus
from data_tools.errors import UserError
from launch.benchmark import throughput
from launch.benchmark.environment import peer_python, peer_versions
from launch.benchmark.report import show_table, write_report
from launch.benchmark.trainers import Layout, Trial
from pretrain.process.precision import AUTO, BF16, FP32, resolve

_DEFINITION = "samples over seconds of all steps but the first {}; a step lasts from the end of the one before it"


def run_train(args: argparse.Namespace) -> int:
    """Measure what `args` (see cli.py) ask for, print a table and write report.json; returns the exit code."""
    corpus = open_corpus(args.shards)
    check_captions(corpus, args.shards)
    folder = args.work_dir.resolve() / time.strftime("train-%Y%m%d-%H%M%S")
    trial = _trial(args, corpus)
    if args.loss_curve:
        report = _loss_curve(trial)
    else:
        python = peer_python(args.peer_env.absolute())
        bench = throughput.Bench(folder, python, announce, 60 * args.run_minutes)
        measure = _recall if args.recall else _speed
        report = measure(args, bench, trial) | {"peer": peer_versions(python)}
    write_report(folder / "report.json", report | {"trial": vars(trial)})
    print(f"report: {folder / 'report.json'}")
    return 0


def _trial(args: argparse.Namespace, corpus: Corpus) -> Trial:
    whole = corpus.num_samples // args.global_batch
    if args.recall and not whole:
        raise UserError(
            "the corpus is smaller than a global batch",
            got=f"{corpus.num_samples} samples",
            expected=f"{args.global_batch} or more",
            remedy="--global-batch",
        )
    return Trial(
        source=str(Path(args.shards).absolute()),
        shards=corpus.paths,
        model=args.model,
        global_batch=args.global_batch,
        steps_per_epoch=whole if args.recall else args.steps,
        epochs=args.epochs if args.recall else 1,
        lr=args.lr,
        weight_decay=args.weight_decay,
        warmup=args.warmup,
        workers=args.workers,
        device="cuda" if torch.cuda.is_available() else "cpu",
        save_epochs=args.curve,
    )


def _layouts(args: argparse.Namespace, trial: Trial) -> tuple[Layout, list[Layout]]:
    """Our layout and the peer's candidates: all cores shared evenly among the ranks; where --precision leaves it open,
    and the device is not one that is made for bf16, the peer in both precisions."""
    cores = len(os.sched_getaffinity(0))
    ranks = args.ranks or torch.cuda.device_count() or min(2, cores)
    choices = {args.peer_ranks} if args.peer_ranks else {ranks} if trial.device == "cuda" else {1, ranks}
    for count in {ranks, *choices}:
        if trial.global_batch % count:
            raise UserError(f"the global batch of {trial.global_batch} does not divide among {count} ranks")
    most = max(choices) * max(1, trial.workers)
    if len(trial.shards) < most:
        raise UserError(
            "open_clip's trainer needs a shard per loader process",
            got=f"{len(trial.shards)} shards",
            expected=f"{most} or more",
            remedy="pack the corpus into smaller shards, or use fewer --workers or --peer-ranks",
        )
    precision = resolved_precision(args.precision)
    both = args.precision == AUTO and trial.device == "cpu"
    precisions = (FP32, BF16) if both else (precision,)
    candidates = [Layout(n, max(1, cores // n), one) for n in sorted(choices) for one in precisions]
    return Layout(ranks, max(1, cores // ranks), precision), candidates


def _speed(args: argparse.Namespace, bench: throughput.Bench, trial: Trial) -> dict:
    from launch.benchmark.inside import step_flops

    ours, candidates = _layouts(args, trial)
    theirs, probes = throughput.fastest_layout(bench, trial, candidates, args.skip_steps)
    results = throughput.alternate(bench, trial, ours, theirs, args.pairs)
    figures = throughput.summary(results, trial.global_batch, args.skip_steps)
    counted = trial.global_batch // ours.ranks  # pairs: a share, because this process holds all of their activations
    flops = step_flops(trial, counted)
    rows = [
        (name, str(layout), *(figures[name][key] for key in ("median", "min", "max")), flops[name] / counted / 1e9)
        for name, layout in (("dualstream", ours), ("open_clip", theirs))
    ]
    title = f"samples/s, batch {trial.global_batch}, {args.pairs} alternating pairs"
    show_table(title, ("trainer", "processes x threads, precision", "median", "lowest", "highest", "GFLOP/pair"), rows)
    pair = figures["ratio_per_pair"]
    print(f"ratio of the medians {figures['ratio_of_medians']:.2f} (per pair {pair['min']:.2f} to {pair['max']:.2f})")
    print(f"ratio of the FLOPs   {flops['ratio']:.2f}")
    layouts = {"dualstream": str(ours), "open_clip": str(theirs), "open_clip_probes": probes}
    definition = _DEFINITION.format(args.skip_steps)
    return {"kind": "train speed", "definition": definition, "layouts": layouts, "speed": figures, "flops": flops}


def _recall(args: argparse.Namespace, bench: throughput.Bench, trial: Trial) -> dict:
    from launch.benchmark.recall import METRICS, compare_recall, mean_recall
    from pretrain.process.runtime import start

    ours, candidates = _layouts(args, trial)
    layouts = (ours, replace(candidates[-1], precision=ours.precision))  # alike: it is not speed that is compared
    rows = compare_recall(bench, trial, layouts, args.seeds, args.val, start(distributed=False))
    means = mean_recall(rows, trial.epochs)
    table = [(name, *(100 * means[name][metric] for metric in METRICS)) for name in means]
    samples = trial.epochs * trial.steps_per_epoch * trial.global_batch
    show_table(f"recall (%) after {samples} samples, mean of {len(args.seeds)} seeds", ("trainer", *METRICS), table)
    return {"kind": "train recall", "val": args.val, "seeds": args.seeds, "mean": means, "rows": rows}


def _loss_curve(trial: Trial) -> dict:
    from launch.benchmark.inside import loss_curves
    from pretrain.process.runtime import finish, start

    curves = loss_curves(trial, start(distributed=True))
    finish()
    steps = trial.steps_per_epoch
    every = max(1, steps // 20)
    marks = sorted({0, *range(every - 1, steps, every), steps - 1})
    rows = [(str(step + 1), *(f"{curves[name][step]:.6f}" for name in ("dualstream", "open_clip"))) for step in marks]
    show_table("fp32 loss, same weights, same batches", ("step", "dualstream", "open_clip"), rows)
    behind = max(0, steps - trial.warmup)
    print(f"{steps} steps, {behind} of them behind the warmup of {trial.warmup}")
    if behind < steps / 2:
        print("warning: most of the curve lies within the warmup, where updates are small: give more --steps")
    print(f"largest difference {curves['largest_gap']:.2e} (relative {curves['largest_relative_gap']:.2e})")
    return {"kind": "train loss curve", "curves": curves}


def check_captions(corpus: Corpus, source: str) -> None:
    """The peer trains on `.txt` alone: with several captions in `.json` the two would not see the same pairs."""
    reader = ShardReader(corpus)
    sample = reader.read(0, 0)
    reader.close()
    captions = json.loads(sample.members.get("json", b"{}")).get("captions", [])
    if len(captions) > 1 or "txt" not in sample.members:
        raise UserError(
            f"the samples of {source} are not pairs",
            got=f"{len(captions)} captions in the first" if captions else "no .txt in the first",
            expected="one caption a sample, which is what open_clip's trainer reads",
            remedy="pack it with `python -m data_tools pack --pairs`",
        )


def resolved_precision(asked: str) -> str:
    """The precision that `asked`, the value of --precision, comes to on this machine; it is said."""
    resolved = resolve(asked, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for line in resolved.lines:
        announce(line)
    return resolved.precision


def announce(text: str) -> None:
    """Say on stderr what starts now."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
