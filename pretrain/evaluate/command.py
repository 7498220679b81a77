"""The command behind `launch/evaluate.py`: load, evaluate on all ranks, record, show."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from datetime import UTC, datetime

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools.corpus import Corpus, open_corpus
from data_tools.errors import UserError
from data_tools.errors import shown as short
from data_tools.media.members import parse_fields
from data_tools.progress import Progress
from data_tools.redaction import redact_source
from pretrain.engine.opening import open_model
from pretrain.engine.weights import load_classifier
from pretrain.evaluate.classes import class_numbers, shown
from pretrain.evaluate.features import encoder
from pretrain.evaluate.overlap import remark, training_corpus
from pretrain.evaluate.pair_loss import PairLoss
from pretrain.evaluate.pairs import read_pairs
from pretrain.evaluate.picture import write_retrieval_picture
from pretrain.evaluate.results import (
    append_record,
    classifier_digest,
    environment,
    model_digest,
    read_records,
    result_key,
)
from pretrain.evaluate.runner import (
    Outcome,
    evaluate_classification,
    evaluate_classifier,
    evaluate_pairs,
    evaluate_retrieval,
)
from pretrain.evaluate.templates import load_classes, load_templates
from pretrain.process.agree import gather, raise_on_all_ranks
from pretrain.process.precision import FP32, ability, is_bf16, settle
from pretrain.process.runtime import Runtime, finish, start
from pretrain.stream.eval_reader import EvalReader, eval_fields
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier

_TEXT_BUCKETS = 4  # captions of a batch are sorted by length and cut to the longest of each bucket
_LONG_BREAKDOWN = 20  # rows; longer ones are in the record only


def evaluate(options: argparse.Namespace) -> int:
    """Run the task of the command line on all ranks; returns the exit code."""
    runtime = start()
    options.precision = _settle_precision(options.precision, runtime)
    corpus = open_corpus(options.data)
    model = load_classifier(options.model)
    if model is None:
        model, report = open_model(options.model, options.ema, options.architecture)
        if runtime.is_main:
            print(f"model: {report}", flush=True)
    else:
        _check_classifier(options)
    record = _describe(options, model, corpus)
    if options.skip_existing and _known(options.output, record["key"], runtime):
        if runtime.is_main:
            print(f"{options.output} has this result already (key {record['key']})")
        finish()
        return 0
    if runtime.is_main and (warning := remark(options.data, corpus, training_corpus(options.model))):
        print(warning, flush=True)
    started = time.monotonic()
    model.to(runtime.device)
    outcome = _run_task(options, model, corpus, runtime)
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
        (lambda: _finish_main(options, corpus, outcome, record)) if runtime.is_main else lambda: None, "the report"
    )
    finish()
    return 0


def _settle_precision(asked: str, runtime: Runtime) -> str:
    settled = settle(asked, runtime.device)
    if runtime.is_main and settled.precision != FP32:
        print("\n".join(settled.lines), flush=True)
    return settled.precision


def _check_classifier(options: argparse.Namespace) -> None:
    """Raises UserError for what a fine-tuned classifier cannot be asked."""
    wrong = {"--task": options.task != "classification" and options.task, "--templates": options.templates}
    wrong["--architecture"] = options.architecture
    wrong["--ema"] = options.ema and "a moving average of its weights"
    for option, asked in wrong.items():
        if asked:
            raise UserError(
                f"{options.model} is a fine-tuned classifier, and {option} belongs to dual encoders",
                got=asked,
                expected="--task classification, without --templates, --architecture and --ema",
                remedy="give the pretraining run it started from",
            )


def _run_task(
    options: argparse.Namespace, model: DualEncoder | Classifier, corpus: Corpus, runtime: Runtime
) -> Outcome:
    tokenize = None if options.task == "classification" else model.tokenize
    place = (options.batch, runtime.rank, runtime.world_size, options.workers)
    mapping = parse_fields(None, options.captions)
    reader = EvalReader(corpus, eval_fields(corpus, model.spec, tokenize, mapping), *place)
    what = options.task if runtime.world_size == 1 else f"{options.task} (rank 0 of {runtime.world_size})"
    with Progress(what, -(-corpus.num_samples // runtime.world_size), "images") as bar:
        progress = bar.update if runtime.is_main else None
        if isinstance(model, Classifier):
            numbers = _numbers(options, model, corpus)
            if numbers is None and runtime.is_main:
                print(f"the data name no classes: labels are taken for the model's, 0 for {shown(model.classes[:1])}")
            with torch.autocast(runtime.device.type, torch.bfloat16, enabled=is_bf16(options.precision)):
                return evaluate_classifier(model.scores, reader, model.classes, runtime, numbers, progress)
        model.rule = replace(model.rule, buckets=_TEXT_BUCKETS)
        encode = encoder(model, runtime.device, options.precision)
        if options.task == "retrieval":
            scale = math.exp(model.export_state()["logit_scale"])
            loss = PairLoss(scale)
            return evaluate_retrieval(encode, reader, runtime, corpus.num_samples, loss, options.loss_batch, progress)
        if options.task == "pairs":
            return evaluate_pairs(encode, reader, read_pairs(corpus), runtime, corpus.num_samples, progress)
        classes, templates = _prompts(options, corpus)
        return evaluate_classification(encode, model.tokenize, reader, classes, templates, runtime, progress)


def _prompts(options: argparse.Namespace, corpus: Corpus) -> tuple[tuple[str, ...], tuple[str, ...]]:
    classes = load_classes(options.classes) if options.classes else corpus.classes
    return classes, load_templates(options.templates or "photo")


def _numbers(options: argparse.Namespace, model: Classifier, corpus: Corpus) -> torch.Tensor | None:
    """What the classifier calls each label of the corpus; None where that names none: they are the model's numbers."""
    names = load_classes(options.classes) if options.classes else corpus.classes
    return class_numbers(names, model.classes, f"--data {options.data}") if names else None


def _describe(options: argparse.Namespace, model: DualEncoder | Classifier, corpus: Corpus) -> dict:
    """The part of the record that is known beforehand; all that determines the numbers goes into its key."""
    spec = model.spec
    trained = isinstance(model, Classifier)
    digest = (
        classifier_digest(model) if trained else model_digest(model.export_state(), spec.model_cfg, spec.preprocess_cfg)
    )
    settings = {"precision": options.precision}
    if options.task == "retrieval":
        settings["loss_batch"] = options.loss_batch
    if options.captions:
        settings["captions"] = options.captions
    decisive = dict(settings)
    if trained:
        numbers = _numbers(options, model, corpus)
        decisive["numbers"] = None if numbers is None else numbers.tolist()
    elif options.task == "classification":
        settings["templates"] = options.templates or "photo"
        decisive["prompts"] = _prompts(options, corpus)
    return {
        "task": options.task,
        "model": {"path": options.model, "ema": options.ema, "name": spec.name, "digest": digest},
        "dataset": {"path": redact_source(options.data), "digest": corpus.digest},
        "settings": settings,
        "seed": options.seed,
        "key": result_key(options.task, digest, corpus.digest, decisive),
    }


def _known(output: str, key: str, runtime: Runtime) -> bool:
    found = any(record.get("key") == key for record in read_records(output)) if runtime.is_main else None
    return gather(found)[0]


def _finish_main(options: argparse.Namespace, corpus: Corpus, outcome: Outcome, record: dict) -> None:
    if options.output:
        append_record(options.output, record)
    if options.picture:
        fields = parse_fields(None, options.captions)
        write_retrieval_picture(options.picture, outcome.features, corpus, seed=options.seed, fields=fields)
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
