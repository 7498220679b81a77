"""Both sides in one process, on the same batches: FLOPs of a step, and the loss curves from the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import open_clip
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_tools.corpus import open_corpus
from data_tools.progress import Progress
from launch.benchmark.trainers import Trial
from pretrain.config.tree import DataConfig, ModelConfig, OptimConfig, TrainConfig
from pretrain.engine.backward import backward
from pretrain.engine.engine import Engine
from pretrain.engine.schedule import Schedule
from pretrain.objectives import InfoNCEConfig
from pretrain.objectives.objective import build
from pretrain.process.runtime import Runtime
from pretrain.stream.batches import Batch
from pretrain.stream.fields.image import Image, image_settings
from pretrain.stream.fields.text import Text
from pretrain.stream.loader import StreamSettings, TrainStream
from pretrain.towers.build import MAX_LOGIT_SCALE, DualEncoder, build_model
from pretrain.towers.cut import parts_of
from pretrain.towers.model import Outputs

_BUCKETS = ModelConfig.text_buckets


class Peer:
    """open_clip's towers, loss and optimizer groups as its trainer 3.3.0 puts them together, started from `model`."""

    def __init__(self, model: DualEncoder, trial: Trial):
        cfg = copy.deepcopy(model.spec.model_cfg)
        self.clip = type(model.clip)(**_without_flags(cfg), output_dict=True).to(model.pixel_mean.device)
        self.clip.load_state_dict(model.export_state())
        self.clip.train()
        self.loss = open_clip.ClipLoss()
        vectors = [p for n, p in self.clip.named_parameters() if _never_decays(n, p)]
        rest = [p for n, p in self.clip.named_parameters() if not _never_decays(n, p)]
        groups = [{"params": vectors, "weight_decay": 0.0}, {"params": rest, "weight_decay": trial.weight_decay}]
        self.optimizer = torch.optim.AdamW(groups, lr=trial.lr, betas=(0.9, 0.98), eps=1e-6)
        self._mean, self._std = model.pixel_mean.clone(), model.pixel_std.clone()

    def backward(self, images: torch.Tensor, texts: torch.Tensor) -> float:
        """Loss and gradients of uint8 `images` `[n, 3, h, w]` and `texts` `[n, context]` at full length."""
        self.optimizer.zero_grad()
        loss = self.loss(**self.clip((images - self._mean) / self._std, texts), output_dict=True)["contrastive_loss"]
        loss.backward()
        return float(loss.detach())

    def update(self, lr: float) -> None:
        """One step at `lr`, then the clamp."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def loss_curves(trial: Trial, runtime: Runtime) -> dict:
    """Train both in fp32 from the same weights on the same batches; `trial.steps_per_epoch` steps, one process.

    Returns both curves and the largest difference between them, overall and relative to the loss.
    """
    model = build_model(trial.model, trial.seed, _BUCKETS)
    model.train()
    peer = Peer(model, trial)
    optim = OptimConfig(lr=trial.lr, weight_decay=trial.weight_decay, decay_embeddings=True)
    engine = Engine(model, optim, TrainConfig(global_batch=trial.global_batch, precision="fp32"), runtime)
    total = trial.steps_per_epoch * trial.global_batch
    schedule = Schedule("cosine", trial.lr, trial.warmup * trial.global_batch, total)
    ours, theirs, objectives = [], [], build({"infonce": InfoNCEConfig()})
    with Progress("both trainers", trial.steps_per_epoch, "steps") as progress:
        for batch in _batches(trial, model, trial.steps_per_epoch):
            images = batch.inputs["image"]["pixels"].to(runtime.device)
            texts = batch.inputs["text"]["tokens"]
            lr = schedule.lr(batch.step * trial.global_batch, trial.global_batch)
            inputs = {"image": {"pixels": images}, "text": model.text_rows(texts)}
            ours.append(float(backward(engine, [inputs], objectives, samples_seen=0)["loss"]))
            engine.update(lr)
            theirs.append(peer.backward(images, texts.to(runtime.device)))
            peer.update(lr)
            progress.update(len(ours))
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    relative = max(gap / loss for gap, loss in zip(gaps, theirs, strict=True))
    return {"dualstream": ours, "open_clip": theirs, "largest_gap": max(gaps), "largest_relative_gap": relative}


def step_flops(trial: Trial, pairs: int) -> dict:
    """FLOPs of forward, loss and backward over the first `pairs` of the stream, as `FlopCounterMode` counts
    them: ours (texts cut in buckets, one-sweep loss) and open_clip's (texts at full length, ClipLoss)."""
    model = build_model(trial.model, trial.seed, _BUCKETS)
    peer = Peer(model, trial)
    batch = next(_batches(trial, model, 1))
    images, texts = batch.inputs["image"]["pixels"][:pairs], batch.inputs["text"]["tokens"][:pairs]
    inputs = {"image": {"pixels": images}, "text": model.text_rows(texts)}
    ours = _count(lambda: _backward(model(inputs)))
    theirs = _count(lambda: peer.backward(images, texts))
    return {
        "pairs": pairs,
        "dualstream": ours,
        "open_clip": theirs,
        "ratio": theirs / ours,
        "text_tokens": {
            "dualstream": sum(part.numel() for part in parts_of(inputs["text"])),
            "open_clip": texts.numel(),
        },
    }


def _backward(outputs: Outputs) -> None:
    (infonce,) = build({"infonce": InfoNCEConfig()}).values()
    infonce.objective.loss(outputs["rows"], outputs["shared"], {}).backward()


def _batches(trial: Trial, model: DualEncoder, count: int) -> Iterator[Batch]:
    settings = StreamSettings(
        fields=lambda *_: {"text": Text(model.tokenize), "image": Image(image_settings(model.spec))},
        seed=trial.seed,
        global_batch=trial.global_batch,
        window=DataConfig.window,
        workers=trial.workers,
    )
    stream = TrainStream(open_corpus(trial.source), settings)
    for number, batch in enumerate(stream.iterate(0), 1):
        yield batch
        if number == count:
            return


def _count(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def _without_flags(cfg: dict) -> dict:
    return {name: value for name, value in cfg.items() if name != "custom_text"}


def _never_decays(name: str, parameter: nn.Parameter) -> bool:
    """The trainer's own rule, substrings included."""
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
