"""The command behind `launch/export.py`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data_tools.errors import UserError
from pretrain.engine.committed import FOLDER, STATE
from pretrain.engine.located import Kind, locate
from pretrain.engine.opening import open_model, resolve_checkpoint
from pretrain.engine.weights import load_classifier
from pretrain.evaluate.results import read_records
from pretrain.export.card import left_behind
from pretrain.export.probes import TOLERANCE
from pretrain.export.writer import export_model
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier

_ROW = ("kind", "step", "samples", "seconds")  # what a row of metrics.jsonl has beside its metrics


def export(options: argparse.Namespace) -> int:
    """Export what the command line names; prints the verification; returns the exit code."""
    found = locate(options.model)
    source = found.path
    if found.kind in (Kind.RUN, Kind.CHECKPOINT):
        source = resolve_checkpoint(source)  # once, so that the card speaks of the very weights
    formats = options.formats and [name.strip() for name in options.formats.split(",") if name.strip()]
    classifier = load_classifier(source)
    if classifier is not None and options.ema:
        raise UserError(f"{source} is a fine-tuned classifier", got="--ema", expected="a moving average: it has none")
    model: DualEncoder | Classifier
    if classifier is not None:
        model = classifier
    else:
        model, report = open_model(source, options.ema, options.architecture)
        print(report, flush=True)
    differences = export_model(model, options.output, formats, *history(source, options.ema), verify=options.verify)
    if left := left_behind(model):
        print(left)
    for name, value in differences.items():
        print(f"verified {name:<24} largest difference {value:.1e} (at most {TOLERANCE:g})")
    if not differences:
        print("not verified (--no-verify)")
    print(f"wrote {options.output}")
    return 0


def history(source: Path, ema: bool) -> tuple[dict, dict]:
    """(facts of the training, metrics of the run's own evaluation of these weights) of a checkpoint folder, for the
    model card; empty where they are not known, as for an export folder. `ema`: of the moving average."""
    if not (source / STATE).is_file():
        return {}, {}
    state = json.loads((source / STATE).read_text())
    position = state["position"]
    facts = {
        "samples seen": state["samples_seen"],
        "updates": state["step"],
        "training data": f"digest `{position.get('manifest_digest', 'unknown')}`",
        "seed": position.get("seed", "unknown"),
    }
    metrics = _metrics_at(source.absolute().parent, state["step"])
    averaged = {name: value for name, value in metrics.items() if name.startswith("ema_")}
    if ema:
        average = {name.removeprefix("ema_"): value for name, value in averaged.items()}
        return facts | {"weights": "their exponential moving average"}, average
    return facts, {name: value for name, value in metrics.items() if name not in averaged}


def _metrics_at(folder: Path, step: int) -> dict:
    log = folder.parent / "metrics.jsonl"
    if folder.name != FOLDER or not log.is_file():
        return {}
    found = [row for row in read_records(log) if row.get("kind") == "eval" and row.get("step") == step]
    return {name: value for name, value in found[-1].items() if name not in _ROW} if found else {}
