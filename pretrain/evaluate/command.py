"""The command behind `launch/evaluate.py`: load, evaluate on all ranks, record, show."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools.corpus import open_corpus
from data_tools.errors import UserError
from data_tools.errors import shown as short
from data_tools.redaction import redact_source
from pretrain.engine.opening import open_model
from pretrain.engine.weights import load_classifier
from pretrain.evaluate import OF_CLASSIFIERS, EvaluatorConfig
from pretrain.evaluate.bench import Bench, in_precision
from pretrain.evaluate.evaluator import Evaluator, Outcome, build_evaluator
from pretrain.evaluate.overlap import remark, training_corpus
from pretrain.evaluate.results import (
    append_record,
    classifier_digest,
    environment,
    model_digest,
    read_records,
    result_key,
)
from pretrain.process.collectives import gather, raise_on_all_ranks
from pretrain.process.precision import FP32, ability, resolve
from pretrain.process.runtime import Runtime, finish, start
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier

_TEXT_BUCKETS = 4  # captions of a batch are sorted by length and cut to the longest of each bucket
_LONG_BREAKDOWN = 20  # rows; longer ones are in the record only


def evaluate(options: argparse.Namespace, settings: EvaluatorConfig) -> int:
    """Run the evaluator of these settings, as the command line asks for, on all ranks; returns the exit code."""
    runtime = start()
    options.precision = _resolve_precision(options.precision, runtime)
    open_corpus(settings.data)  # what is wrong with it is told before a model is loaded
    model = _open(options, settings, runtime)
    evaluator = build_evaluator(settings, _bench(options, model, runtime))
    record = _describe(options, model, evaluator)
    if options.skip_existing and _known(options.output, record["key"], runtime):
        if runtime.is_main:
            print(f"{options.output} has this result already (key {record['key']})")
        finish()
        return 0
    overlap = remark(options.data, evaluator.corpus, training_corpus(options.model))
    if runtime.is_main and (remarks := [*evaluator.remarks, *filter(None, [overlap])]):
        print("\n".join(remarks), flush=True)
    started = time.monotonic()
    model.to(runtime.device)
    outcome = evaluator(in_precision(model, runtime.device, options.precision))
    record |= {
        "metrics": outcome.metrics,
        "chance": outcome.chance,
        "n": outcome.counts,
        "breakdown": outcome.breakdown,
        "seconds": round(time.monotonic() - started, 3),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {
            **environment(),
            "device": runtime.device.type,
            "processor": ability(runtime.device).name,
            "world_size": runtime.world_size,
        },
    }
    raise_on_all_ranks(
        (lambda: _finish_main(options, evaluator, outcome, record)) if runtime.is_main else lambda: None, "the report"
    )
    finish()
    return 0


def _open(options: argparse.Namespace, settings: EvaluatorConfig, runtime: Runtime) -> DualEncoder | Classifier:
    classifier = load_classifier(options.model)
    if classifier is not None:
        _check_classifier(options, settings)
        return classifier
    model, report = open_model(options.model, options.ema, options.architecture)
    if runtime.is_main:
        print(f"model: {report}", flush=True)
    return model


def _resolve_precision(asked: str, runtime: Runtime) -> str:
    resolved = resolve(asked, runtime.device)
    if runtime.is_main and resolved.precision != FP32:
        print("\n".join(resolved.lines), flush=True)
    return resolved.precision


def _check_classifier(options: argparse.Namespace, settings: EvaluatorConfig) -> None:
    """Raises UserError for what a fine-tuned classifier cannot be asked."""
    wrong = {"--task": not settings.OF_CLASSIFIERS and options.task, "--templates": options.templates}
    wrong["--architecture"] = options.architecture
    wrong["--ema"] = options.ema and "a moving average of its weights"
    for option, asked in wrong.items():
        if asked:
            raise UserError(
                f"{options.model} is a fine-tuned classifier, and {option} belongs to dual encoders",
                got=asked,
                expected=f"--task {' or '.join(OF_CLASSIFIERS)}, without --templates, --architecture and --ema",
                remedy="give the pretraining run it started from",
            )


def _bench(options: argparse.Namespace, model: DualEncoder | Classifier, runtime: Runtime) -> Bench:
    towers = model.towers if isinstance(model, Classifier) else model
    rule = replace(towers.rule, buckets=_TEXT_BUCKETS)
    classes = model.classes if isinstance(model, Classifier) else ()
    place = (runtime, model.spec, rule, options.batch, options.workers)
    return Bench(*place, classes=classes, heads=frozenset(towers.heads), bars=True)


def _describe(options: argparse.Namespace, model: DualEncoder | Classifier, evaluator: Evaluator) -> dict:
    """The part of the record that is known beforehand; all that determines the numbers goes into its key."""
    spec, corpus = model.spec, evaluator.corpus
    digest = (
        classifier_digest(model)
        if isinstance(model, Classifier)
        else model_digest(model.export_state(), spec.model_cfg, spec.preprocess_cfg)
    )
    precision = {"precision": options.precision}
    return {
        "task": options.task,
        "model": {"path": options.model, "ema": options.ema, "name": spec.name, "digest": digest},
        "dataset": {"path": redact_source(options.data), "digest": corpus.digest},
        "settings": precision | evaluator.shown,
        "seed": options.seed,
        "key": result_key(options.task, digest, corpus.digest, precision | evaluator.decisive),
    }


def _known(output: str, key: str, runtime: Runtime) -> bool:
    found = any(record.get("key") == key for record in read_records(output)) if runtime.is_main else None
    return gather(found)[0]


def _finish_main(options: argparse.Namespace, evaluator: Evaluator, outcome: Outcome, record: dict) -> None:
    if options.output:
        append_record(options.output, record)
    if options.picture:
        evaluator.draw(outcome, options.picture, options.seed)
    console = Console()
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in record["n"].items())
    console.print(f"{options.task}: {counts}", soft_wrap=True, highlight=False, markup=False)
    console.print(_table(record))
    if outcome.breakdown and len(outcome.breakdown) <= _LONG_BREAKDOWN:
        console.print(_breakdown(outcome.breakdown))
    for path in filter(None, (options.output, options.picture)):
        console.print(f"wrote {short(path)}", soft_wrap=True, highlight=False, markup=False)


def _table(record: dict) -> Table:
    table = Table()
    for column in ("metric", "value", "chance"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in record["metrics"].items():
        table.add_row(name, _number(name, value), _number(name, record["chance"].get(name)))
    return table


def _breakdown(rows: list[dict]) -> Table:
    table = Table()
    for name in rows[0]:
        table.add_column(name.replace("_", " "))  # wraps at spaces where the terminal is narrow
    for row in rows:
        table.add_row(*(_number(name, value) for name, value in row.items()))
    return table


def _number(name: str, value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else escape(short(value))  # names of classes may look like rich's markup
    return f"{value:.4g}" if "rank" in name or "loss" in name else f"{100 * value:.2f} %"
