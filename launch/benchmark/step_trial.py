"""One measurement of `benchmark.py step`, as a rank of its own: `python -m launch.benchmark.step_trial JSON FILE`."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from launch.benchmark.memory_trial import micro_batches, warm_up
from launch.benchmark.peak import peak, reset_peak
from pretrain.config.tree import ModelConfig, OptimConfig, TrainConfig
from pretrain.engine.backward import backward
from pretrain.engine.engine import Engine
from pretrain.engine.groups import parameter_groups
from pretrain.engine.optimizers import make_optimizer
from pretrain.objectives.objective import build
from pretrain.process.precision import is_bf16
from pretrain.process.runtime import Runtime, finish, start
from pretrain.tasks import ContrastiveConfig
from pretrain.tasks.contrastive import make_model
from pretrain.towers.build import DualEncoder
from pretrain.towers.model import Inputs, to_device

Forward = Callable[[], torch.Tensor]
_WARM_UP = 3  # steps that do not count; the first makes the optimizer's states, or compiles
_WORDS = ("a", "the", "on", "of", "with", "red", "dog", "man", "tree", "street", "small", "standing", "near")
_LENGTHS = (8, 24)  # words of a caption, which are about as many tokens
_LR = 1e-4


@dataclass(frozen=True)
class StepTrial:
    """A training step at world size 1, data given. `who`: dualstream (with its engine), bare (its towers, its loss and
    torch's optimizer alone) or open_clip (its model and its loss, likewise alone)."""

    who: str
    model: str
    batch: int
    precision: str
    steps: int
    zero_stage: int = 1
    micro_batch: int | None = None
    text_buckets: int = 4
    grad_checkpointing: Sequence[str] = ()
    compile: bool = False

    def config(self) -> ContrastiveConfig:
        """The settings that train so."""
        train = TrainConfig(
            global_batch=self.batch,
            micro_batch=self.micro_batch,
            precision=self.precision,
            zero_stage=self.zero_stage,
            grad_checkpointing=list(self.grad_checkpointing),
            compile=self.compile,
        )
        return ContrastiveConfig(model=ModelConfig(self.model, text_buckets=self.text_buckets), train=train)


def measure(trial: StepTrial) -> dict:
    """FLOPs of a step, median seconds of one, and its peak bytes above what the imports took."""
    runtime = start(distributed=True)
    flops = _flops(trial, runtime.device)
    warm_up(trial.config().train, runtime)
    before = reset_peak(runtime.device)
    step = _MAKERS[trial.who](trial, runtime)
    seconds = []
    for _ in range(_WARM_UP + trial.steps):
        started = time.perf_counter()
        step()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    finish()
    return {"flops": flops, "seconds": statistics.median(seconds[_WARM_UP:]), "peak": peak(runtime.device) - before}


def _flops(trial: StepTrial, device: torch.device) -> int:
    """FLOPs that the mathematics of a step takes: forward and backward once, whatever runs again."""
    who = "open_clip" if trial.who == "open_clip" else "bare"
    plain = replace(trial, who=who, micro_batch=None, grad_checkpointing=(), compile=False)
    _, forward = _FORWARDS[who](plain, device)
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    return counter.get_total_flops()


def _pairs(model: DualEncoder, trial: StepTrial) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures and captions."""
    g, draw = torch.Generator().manual_seed(0), random.Random(0)
    size = model.spec.image_size
    images = torch.randint(0, 256, (trial.batch, 3, size, size), generator=g, dtype=torch.uint8)
    captions = [" ".join(draw.choices(_WORDS, k=draw.randint(*_LENGTHS))) for _ in range(trial.batch)]
    return images, model.tokenize(captions)


def _parts(model: DualEncoder, trial: StepTrial, device: torch.device) -> list[Inputs]:
    found = micro_batches(model, *_pairs(model, trial), trial.micro_batch or trial.batch)
    return [to_device(part, device) for part in found]


def _dualstream(trial: StepTrial, runtime: Runtime) -> Callable[[], None]:
    config = trial.config()
    model = make_model(config)
    engine = Engine(model, config.optim, config.train, runtime)
    parts = _parts(model, trial, runtime.device)
    objectives = build(config.objectives)

    def step() -> None:
        backward(engine, parts, objectives, samples_seen=0)
        engine.update(_LR)

    return step


def _bare(trial: StepTrial, device: torch.device) -> tuple[nn.Module, Forward]:
    config = trial.config()
    model = make_model(config).to(device)
    (part,) = _parts(model, trial, device)
    (loss,) = build(config.objectives).values()

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(trial.precision)):
            outputs = model(part)
        return loss.objective.loss(outputs["rows"], outputs["shared"], {})

    return model, forward


def _open_clip(trial: StepTrial, device: torch.device) -> tuple[nn.Module, Forward]:
    from open_clip.loss import ClipLoss

    ours = make_model(trial.config())
    images, tokens = _pairs(ours, trial)
    model, loss = ours.clip.to(device), ClipLoss()
    pixels = ours.to(device)._pixels(images.to(device))  # as its loader gives them: normalised floats
    tokens = tokens.to(device)
    if ours.patch_dropout is not None:
        ours.patch_dropout.take({"patch_bits": torch.arange(trial.batch, device=device)})

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(trial.precision)):
            return loss(*model(pixels, tokens)[:3])

    return model, forward


def _alone(trial: StepTrial, runtime: Runtime) -> Callable[[], None]:
    model, forward = _FORWARDS[trial.who](trial, runtime.device)
    optim = OptimConfig()
    optimizer = make_optimizer(parameter_groups(model, optim), optim, runtime.device)

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


_FORWARDS = {"bare": _bare, "open_clip": _open_clip}
_MAKERS = {"dualstream": _dualstream, "bare": _alone, "open_clip": _alone}


def main() -> None:
    """Measure the trial of the command line and write its result into the file named there."""
    Path(sys.argv[2]).write_text(json.dumps(measure(StepTrial(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
