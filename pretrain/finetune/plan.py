"""`finetune.py --dry-run`: everything that can be known of a fine-tune before it starts."""

from __future__ import annotations

import torch

from pretrain import assemble
from pretrain.config.batch import local_batch
from pretrain.evaluate.classes import shown
from pretrain.finetune.job import Prepared
from pretrain.plan.dry_run import print_plan
from pretrain.plan.memory import bytes_of_one, kept_bytes
from pretrain.process.precision import is_bf16
from pretrain.process.runtime import Runtime, start
from pretrain.tasks import ClassifyConfig
from pretrain.towers.classifier import SCORES, Classifier


def dry_run(config: ClassifyConfig) -> int:
    """Resolve the settings, open the shards, build the classifier from `init`, and print what would run and how much
    memory it takes.

    Raises:
        UserError: whatever would end the run at its start.
    """
    runtime = start(distributed=False)
    config = assemble.settle_precision(config, runtime)
    reader = assemble.find_checkpoint(config, runtime)
    parts = Prepared(config, reader, runtime)
    assemble.start_state(reader, config, parts.description, parts.stream, runtime)
    if runtime.is_main:
        model = parts.model
        model.towers.compiled = None  # activations are counted on plain towers: compiling takes minutes
        notes = [*parts.lines, f"classes:  {len(model.classes)}: {shown(model.classes)}"]
        name = f"{model.towers.spec.name} with a head"
        print_plan(config, runtime, parts.stream, name, model, notes, memory(config, model, runtime))
    return 0


def memory(config: ClassifyConfig, model: Classifier, runtime: Runtime) -> dict[str, int]:
    """Bytes per rank by what they hold; activations are counted on a forward of two images in the run's precision."""
    size, device = model.towers.spec.image_size, model.towers.pixel_mean.device

    def forward(images: int) -> object:
        pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=device)
        return model({"image": {"pixels": pixels, "patch_bits": torch.arange(images, device=device)}}, SCORES)

    parts = kept_bytes(config, model, runtime)
    micro = config.train.micro_batch or local_batch(config, runtime.world_size)
    parts["activations of a micro-batch"] = bytes_of_one(forward, is_bf16(config.train.precision)) * micro
    return {**parts, "total": sum(parts.values())}
