"""Result records: strict JSON, one line each, appended so that a crash or a second writer loses nothing.

A record carries what is needed to compare it (task, dataset and model digests, settings, versions) and a `key` over
exactly the parts that determine the numbers, by which `--skip-existing` knows it again.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash

from data_tools.errors import UserError
from pretrain.report.provenance import git_commit, package_versions
from pretrain.towers.classifier import Classifier

VERSION = 1  # of the record; raised whenever a metric changes its meaning


def model_digest(state: Mapping[str, torch.Tensor], model_cfg: Mapping, preprocess_cfg: Mapping) -> str:
    """Hex xxh3-128 of weights, architecture and preprocessing: the same for a run folder and for its export."""
    digest = xxhash.xxh3_128()
    explicit = {"quick_gelu": False, **model_cfg}  # an export always writes the activation
    digest.update(json.dumps([explicit, preprocess_cfg], sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tensor.numel()}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def classifier_digest(model: Classifier) -> str:
    """The same of a fine-tuned classifier, its head, scale and class names included."""
    spec = model.towers.spec
    head = {"classes": list(model.classes), "scale": model.scale}
    return model_digest(model.state_dict(), {**spec.model_cfg, "head": head}, spec.preprocess_cfg)


def result_key(task: str, model: str, dataset: str, settings: Mapping) -> str:
    """Hex key of what determines the numbers: task, digests of model and dataset, settings, record version."""
    parts = json.dumps([VERSION, task, model, dataset, settings], sort_keys=True, allow_nan=False)
    return xxhash.xxh3_128_hexdigest(parts.encode())


def environment() -> dict:
    """Package versions and, where the code stands in a git repository, its commit."""
    return {"packages": package_versions(), "git_commit": git_commit()}


def to_line(record: Mapping) -> bytes:
    """The record as one line of strict JSON with sorted keys.

    Raises:
        UserError: a number that JSON does not have (NaN, infinity), named by its path.
    """
    bad = _not_json(record, "")
    if bad:
        raise UserError(f"result {bad} is not a finite number", remedy="no record was written")
    return json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"


def _not_json(value: object, path: str) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    if isinstance(value, Mapping):
        items = [(f"{path}.{name}" if path else str(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    else:
        return None
    return next((found for name, item in items if (found := _not_json(item, name))), None)


def append_record(path: str | Path, record: Mapping) -> None:
    """Append `record` to the .jsonl at `path`: under a lock, in one write, fsynced.

    A crash can leave the beginning of a line at most: readers ignore it, the next writer cuts it off.

    Raises:
        UserError: the file cannot be written, or ends in something that is no beginning of a record.
    """
    line = to_line(record)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            whole = _whole_lines(content)
            if whole != content and not content[len(whole) :].startswith(b"{"):
                remedy = "give another --output"
                raise UserError(f"{path} is no file of results", got=repr(content[-40:]), remedy=remedy)
            file.truncate(len(whole))
            file.write(line if whole.endswith(b"\n") or not whole else b"\n" + line)
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"results file {path} cannot be written", got=error.strerror) from None


def read_records(path: str | Path) -> list[dict]:
    """The records of a .jsonl in order, none where the file is missing; a line cut by a crash is not a record.

    Raises:
        UserError: a whole line that is no JSON object, with its number.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(_whole_lines(path.read_bytes()).splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not a result", got=str(error)) from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is not a result", got=line, expected="a JSON object")
        records.append(record)
    return records


def _whole_lines(content: bytes) -> bytes:
    """All but the beginning of a line at the end; a record that only lacks its line break is whole."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except ValueError:
        return content[:end]
    return content
