"""Checkpoints as a run commits them, without a run."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

import tiny
from pretrain.engine import committed
from pretrain.engine.committed import Retention
from pretrain.engine.fragments import saved_parameters
from pretrain.engine.state import TrainState
from pretrain.engine.weights import describe


def write(run: Path, step: int, model=None, ranks: int = 2, description: dict | None = None) -> Path:
    """Commit the weights of `model` as the checkpoint of `step` of `run`; each parameter is split over the ranks."""
    model = tiny.build() if model is None else model
    final = committed.step_folder(run / committed.FOLDER, step)
    temporary = committed.temporary_folder(final)
    committed.prepare(temporary)
    entries = []
    for rank in range(ranks):
        tensors, index = {}, {}
        for name, parameter in saved_parameters(model):
            flat = parameter.detach().flatten()
            first, last = (len(flat) * number // ranks for number in (rank, rank + 1))
            tensors[f"{name}|weight"] = flat[first:last].clone()
            index[name] = {"start": first, "numel": last - first, "shape": list(parameter.shape)}
        path = temporary / f"rank-{rank:05d}-of-{ranks:05d}.safetensors"
        save_file(tensors, path, metadata={"fragments": json.dumps(index)})
        entries.append(committed.file_entry(path))
    small = {
        "state.json": json.dumps(TrainState(step=step, samples_seen=8 * step).to_dict()),
        "model.json": json.dumps(description or describe(model.spec)),
        "config.yaml": "seed: 0\n",
    }
    committed.commit(temporary, final, entries, small, Retention(keep=100))
    return final


def sign(checkpoint: Path) -> None:
    """Write the manifest anew: it vouches for whatever lies in the folder now."""
    paths = sorted(path for path in checkpoint.iterdir() if path.name != committed.MANIFEST)
    files = [committed.file_entry(path) for path in paths]
    (checkpoint / committed.MANIFEST).write_text(json.dumps({"files": files}))
