"""Retrieval of both trainers' weights after the same number of samples, by one evaluation: ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launch.benchmark.throughput import Bench
from launch.benchmark.trainers import Layout, Outcome, Trial, run_open_clip, run_ours
from pretrain.engine.committed import FOLDER
from pretrain.engine.weights import load_trained
from pretrain.evaluate import RetrievalConfig
from pretrain.evaluate.bench import Bench as EvaluationBench
from pretrain.evaluate.retrieval import Retrieval
from pretrain.process.runtime import Runtime
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.initialise import initialise
from pretrain.towers.weights_file import read_weights

METRICS = ("image_to_text_recall@10", "text_to_image_recall@10", "image_to_text_recall@1", "text_to_image_recall@1")


def compare_recall(
    bench: Bench, trial: Trial, layouts: tuple[Layout, Layout], seeds: Sequence[int], val: str, runtime: Runtime
) -> list[dict]:
    """Train both by `layouts` (ours, theirs) for every seed; one row per seed, trainer and evaluated epoch."""
    rows = []
    for seed in seeds:
        this = replace(trial, seed=seed)
        bench.announce(f"dualstream, seed {seed}")
        ours = run_ours(this, layouts[0], bench.folder / f"dualstream-seed-{seed}", bench.limit)
        bench.announce(f"open_clip, seed {seed}")
        theirs = run_open_clip(this, layouts[1], bench.folder / f"open_clip-seed-{seed}", bench.limit, bench.python)
        for outcome, load in ((ours, _our_weights), (theirs, _their_weights)):
            rows += _evaluated(outcome, load, this, val, runtime)
    return rows


def mean_recall(rows: Sequence[dict], epoch: int) -> dict[str, dict[str, float]]:
    """Mean over seeds of each metric after `epoch`, by trainer."""
    return {
        trainer: {
            metric: statistics.mean(row[metric] for row in rows if row["trainer"] == trainer and row["epoch"] == epoch)
            for metric in METRICS
        }
        for trainer in ("dualstream", "open_clip")
    }


def _evaluated(
    outcome: Outcome, load: Callable[[Trial, Path, int], DualEncoder], trial: Trial, val: str, runtime: Runtime
) -> list[dict]:
    epochs = range(1, trial.epochs + 1) if trial.save_epochs else [trial.epochs]
    rows = []
    for epoch in epochs:
        metrics = _retrieval(load(trial, outcome.folder / "run", epoch), val, runtime)
        samples = epoch * trial.steps_per_epoch * trial.global_batch
        place = {"trainer": outcome.trainer, "seed": trial.seed, "epoch": epoch, "samples": samples}
        rows.append(place | {name: metrics[name] for name in METRICS})
    return rows


def _our_weights(trial: Trial, run: Path, epoch: int) -> DualEncoder:
    return load_trained(run / FOLDER / f"step-{epoch * trial.steps_per_epoch:09d}")


def _their_weights(trial: Trial, run: Path, epoch: int) -> DualEncoder:
    path = run / "checkpoints" / f"epoch_{epoch}.pt"
    model = build_model(trial.model, trial.seed)
    initialise(model, read_weights(path), str(path))
    return model.eval()


def _retrieval(model: DualEncoder, val: str, runtime: Runtime) -> dict[str, float]:
    evaluator = Retrieval(RetrievalConfig(data=val), EvaluationBench(runtime, model.spec, model.rule))
    return evaluator(model.to(runtime.device)).metrics
