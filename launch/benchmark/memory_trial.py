"""One measurement of `benchmark.py memory`, a rank each: `python -m launch.benchmark.memory_trial JSON FILE`."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from launch.benchmark.peak import peak, reset_peak
from pretrain.config.tree import ModelConfig, OptimConfig, TrainConfig
from pretrain.engine.backward import backward
from pretrain.engine.engine import Engine
from pretrain.objectives.objective import build
from pretrain.plan.memory import memory
from pretrain.process.collectives import gather
from pretrain.process.runtime import Runtime, finish, start
from pretrain.stream.fields.image import Image, image_settings
from pretrain.stream.fields.text import Text
from pretrain.stream.samples import padding_of
from pretrain.tasks import ContrastiveConfig
from pretrain.tasks.contrastive import make_model
from pretrain.towers.build import DualEncoder
from pretrain.towers.model import Inputs

_STEPS = 2  # the first makes the optimizer's states, the second has gradients beside them


@dataclass(frozen=True)
class MemoryTrial:
    """A training step to measure; `pairs` and `micro_batch` are a rank's."""

    model: str
    zero_stage: int
    world_size: int
    pairs: int
    micro_batch: int | None
    grad_checkpointing: Sequence[str]
    precision: str

    def config(self) -> ContrastiveConfig:
        """The settings that train so."""
        train = TrainConfig(
            global_batch=self.pairs * self.world_size,
            micro_batch=self.micro_batch,
            precision=self.precision,
            zero_stage=self.zero_stage,
            grad_checkpointing=list(self.grad_checkpointing),
        )
        return ContrastiveConfig(model=ModelConfig(self.model), train=train)


def measure(trial: MemoryTrial, runtime: Runtime) -> int:
    """Peak bytes of the rank that takes most. All ranks must call it."""
    config = trial.config()
    warm_up(config.train, runtime)
    before = reset_peak(runtime.device)
    model = make_model(config)
    engine = Engine(model, config.optim, config.train, runtime)
    batch = micro_batches(model, *_pairs(model, trial.pairs), trial.micro_batch or trial.pairs)
    objectives = build(config.objectives)
    for _ in range(_STEPS):
        backward(engine, batch, objectives, samples_seen=0)
        engine.update(1e-4)
    return max(gather(peak(runtime.device) - before))


def warm_up(train: TrainConfig, runtime: Runtime) -> None:
    """A step of a model of no size, so that what the first engine imports and sets up is not counted."""
    engine = Engine(torch.nn.Linear(8, 8), OptimConfig(), train, runtime)
    engine.backward(engine(torch.ones(2, 8, device=runtime.device)).sum())
    engine.update(0.0)
    del engine
    gc.collect()


def _pairs(model: DualEncoder, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and texts of full length."""
    size, context = model.spec.image_size, model.spec.context_length
    images = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8)
    tokens = torch.zeros(pairs, context, dtype=torch.long)
    tokens[:, -1] = model.spec.model_cfg["text_cfg"].get("vocab_size", 49408) - 1
    return images, tokens


def micro_batches(model: DualEncoder, images: torch.Tensor, tokens: torch.Tensor, size: int) -> list[Inputs]:
    """What the towers' forward takes of `images` `[n, 3, h, w]` and `tokens` `[n, context]`, `size` pairs at a time."""
    bits = torch.arange(len(images))  # what patch dropout draws from, where the towers have it
    rows = [slice(first, first + size) for first in range(0, len(images), size)]
    return [{"image": {"pixels": images[r], "patch_bits": bits[r]}, "text": model.rule(tokens[r])} for r in rows]


def main() -> None:
    """Measure the trial of the command line; rank 0 writes the result into the file named there."""
    trial = MemoryTrial(**json.loads(sys.argv[1]))
    runtime, config = start(distributed=True), trial.config()
    measured = measure(trial, runtime)
    if runtime.is_main:
        model, objectives = make_model(config), build(config.objectives)
        fields = {"image": Image(image_settings(model.spec)), "text": Text(model.tokenize)}
        figures = {
            "measured": measured,
            "formula": memory(config, model, partial(padding_of, fields), objectives, runtime),
        }
        Path(sys.argv[2]).write_text(json.dumps(figures))
    finish()


if __name__ == "__main__":
    main()
