"""The command behind `launch/predict.py`: load, classify batch by batch, write, say what could not be read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from data_tools.errors import UserError, shown
from data_tools.progress import Progress
from data_tools.redaction import redact_source
from pretrain.engine.weights import load_classifier
from pretrain.evaluate.results import classifier_digest
from pretrain.predict.pictures import BatchBuilder, PictureBatch, open_pictures
from pretrain.predict.table import column_names, open_table
from pretrain.process.precision import is_bf16, resolve
from pretrain.process.runtime import start
from pretrain.report.provenance import git_commit, package_versions
from pretrain.stream.fields.image import image_settings
from pretrain.stream.transform import ImageTransform
from pretrain.stream.workers import BatchIterator
from pretrain.towers.classifier import Classifier

_BAD_SHOWN = 5


def predict(options: argparse.Namespace) -> int:
    """Write the predictions that the command line asks for; returns the exit code."""
    pictures = open_pictures(options.input, options.image_column, options.image_root)
    model = _classifier(options.model)
    device = start(distributed=False).device
    options.precision = resolve(options.precision, device).precision
    transform = ImageTransform(image_settings(model.spec))
    top_k = min(options.top_k, len(model.classes))
    metadata = _metadata(options, model)
    model.to(device)
    batches = -(-len(pictures) // options.batch)
    build = BatchBuilder(pictures, transform, options.batch)
    bad: list[tuple[str, str]] = []
    with (
        open_table(Path(options.output), column_names(model.classes, top_k), metadata) as table,
        BatchIterator(build, range(batches), options.workers, pin_memory=device.type == "cuda") as loader,
        Progress("predicting", len(pictures), "images") as bar,
    ):
        done = 0
        for batch in loader:
            table.write(_columns(batch, _probabilities(model, batch, device, options.precision), model.classes, top_k))
            bad += [(name, error) for name, error in zip(batch.ids, batch.errors, strict=True) if error is not None]
            done += len(batch.ids)
            bar.update(done)
        if len(bad) == len(pictures):
            name, error = bad[0]
            raise UserError(f"none of the {len(bad)} pictures can be read", got=f"{name}: {error}")
    _report(options.output, len(pictures), bad)
    return 0


def _classifier(path: str) -> Classifier:
    model = load_classifier(path)
    if model is None:
        raise UserError(
            f"{path} is no fine-tuned classifier",
            expected="a run or checkpoint folder of launch/finetune.py",
            remedy="fine-tune this model, or evaluate it zero-shot with launch/evaluate.py --task classification",
        )
    return model


@torch.no_grad()
def _probabilities(model: Classifier, batch: PictureBatch, device: torch.device, precision: str) -> torch.Tensor:
    """fp32 `[n, classes]` on the host, each row with the sum 1."""
    with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(precision)):
        scores = model.scores(batch.images.to(device, non_blocking=True))
    if not torch.isfinite(scores).all():
        raise UserError("the model's scores are not finite", remedy="predict with an earlier checkpoint")
    return scores.float().softmax(dim=1).cpu()


def _columns(batch: PictureBatch, probabilities: torch.Tensor, classes: tuple[str, ...], top_k: int) -> dict:
    """The rows of a batch as columns, in the order of `column_names`; equal probabilities in the order of the
    classes."""
    good = [error is None for error in batch.errors]

    def given(values: list) -> list:
        return [value if keep else None for value, keep in zip(values, good, strict=True)]

    order = probabilities.sort(dim=1, descending=True, stable=True)
    values, places = order.values[:, :top_k], order.indices[:, :top_k]
    columns: dict[str, list] = {"id": batch.ids}
    for place in range(top_k):
        behind = f"_{place + 1}" if place else ""
        columns[f"prediction{behind}"] = given([classes[number] for number in places[:, place].tolist()])
        columns[f"probability{behind}"] = given(values[:, place].tolist())
    columns["error"] = batch.errors
    return columns | {
        f"p_{name}": given(column.tolist()) for name, column in zip(classes, probabilities.T, strict=True)
    }


def _metadata(options: argparse.Namespace, model: Classifier) -> dict:
    return {
        "model": {"path": options.model, "name": model.spec.name, "digest": classifier_digest(model)},
        "classes": list(model.classes),
        "input": redact_source(options.input),
        "precision": options.precision,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": package_versions(),
        "git_commit": git_commit(),
    }


def _report(output: str, total: int, bad: list[tuple[str, str]]) -> None:
    for line in _bad_lines(total, bad):
        print(line)
    print(f"wrote {output}: {total - len(bad)} predictions")


def _bad_lines(total: int, bad: list[tuple[str, str]]) -> Iterator[str]:
    if not bad:
        return
    yield f"{len(bad)} of {total} pictures cannot be read; their rows have no prediction and say why in `error`:"
    yield from (f"  {shown(name)}: {shown(error)}" for name, error in bad[:_BAD_SHOWN])
    if len(bad) > _BAD_SHOWN:
        yield f"  and {len(bad) - _BAD_SHOWN} more"
