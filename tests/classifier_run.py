"""A fine-tuned classifier's run folder, as the trainer saves it, and a classifier without one."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

import tiny
from pretrain.engine.checkpoint import Checkpoints, Extras
from pretrain.engine.engine import Engine
from pretrain.engine.state import TrainState
from pretrain.engine.weights import describe
from pretrain.process.runtime import start
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier

CLASSES = ("cat", "dog", "red bus")


def build(towers: DualEncoder | None = None, classes: tuple[str, ...] = CLASSES, scale: float = 14.3) -> Classifier:
    """A classifier with a random head on the tiny towers, every tensor random, so that a forgotten one shows."""
    towers = towers or tiny.build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    head = torch.randn(len(classes), towers.spec.model_cfg["embed_dim"], generator=generator)
    return Classifier(towers, classes, F.normalize(head, dim=1), scale).eval()


def save(rank: int, world_size: int, folder: Path) -> None:
    """Save it as step 3 of the run `folder`; all ranks call it."""
    runtime, model = start(distributed=True), build()
    engine = Engine(model, *tiny.settings(8, stage=1), runtime)
    state = TrainState(step=3, samples_seen=24, position={"manifest_digest": "0123abcd", "seed": 7})
    head = {"classes": list(model.classes), "scale": model.scale}
    Checkpoints(folder, runtime).save(engine, state, Extras(describe(model.spec, head=head), "seed: 7\n"))
