"""A pair of towers small enough for exactness tests, and batches for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch

from pretrain.config.tree import OptimConfig, TrainConfig
from pretrain.engine.backward import backward as backward_of
from pretrain.engine.engine import Engine
from pretrain.objectives import InfoNCEConfig
from pretrain.objectives.infonce import infonce
from pretrain.objectives.objective import build as build_objectives
from pretrain.stream.draw import Draw, Purpose
from pretrain.stream.fields.image import Image, image_settings
from pretrain.stream.fields.text import Text
from pretrain.stream.samples import padding_of
from pretrain.towers.build import DualEncoder
from pretrain.towers.model import Inputs, Outputs
from pretrain.towers.spec import ModelSpec

MODEL_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SPEC = ModelSpec(
    "tiny",
    MODEL_CFG,
    {
        "size": 32,
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    },
)
WORDS = tuple("red blue green dog cat tree house runs sits on under a the small large very".split())  # noqa: SIM905


def build(seed: int = 0, text_buckets: int = 2, **changes) -> DualEncoder:
    """The tiny towers; a small vocabulary would need another tokenizer, so the embedding is the real one's size.
    `changes` of the architecture."""
    torch.manual_seed(seed)
    return DualEncoder(replace(SPEC, model_cfg=MODEL_CFG | changes), text_buckets)


def batch(model: DualEncoder, pairs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images `[pairs, 3, 32, 32]` and tokens `[pairs, 16]` of captions of 2 to 9 words."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (pairs, 3, 32, 32), generator=g, dtype=torch.uint8)
    lengths = torch.randint(2, 10, (pairs,), generator=g)
    captions = [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=g)) for n in lengths]
    return images, model.tokenize(captions)


def micro_batches(
    model: DualEncoder, images: torch.Tensor, tokens: torch.Tensor, size: int, bits: torch.Tensor | None = None
) -> list[Inputs]:
    """The rank's batch as the model takes it, `size` pairs at a time. `bits`: what its patch dropout draws from."""
    rows = [slice(i, i + size) for i in range(0, len(images), size)]
    return [inputs(images[r], None if bits is None else bits[r]) | {"text": model.rule(tokens[r])} for r in rows]


def patch_bits(seed: int, epoch: int, ids: Iterable[int]) -> torch.Tensor:
    """What the kept patches of each sample follow from, int64 `[n]`."""
    return torch.tensor([Draw(seed, epoch, int(id)).signed(Purpose.PATCHES) for id in ids])


def inputs(images: torch.Tensor, bits: torch.Tensor | None = None) -> Inputs:
    """Images as the model takes them."""
    return {"image": {"pixels": images} | ({} if bits is None else {"patch_bits": bits})}


def rows(model: DualEncoder) -> Callable[[int], Inputs]:
    """n -> what the fields of pairs give of n samples that are not there."""
    share = model.patch_dropout and model.patch_dropout.prob
    fields = {"text": Text(model.tokenize), "image": Image(image_settings(model.spec), patch_dropout=share or None)}
    return partial(padding_of, fields)


def loss(outputs: Outputs) -> torch.Tensor:
    """InfoNCE of what the model gave, this rank's share."""
    return infonce(outputs["rows"]["image"], outputs["rows"]["text"], outputs["shared"]["logit_scale"])


def backward(engine: Engine, parts: list[Inputs]) -> torch.Tensor:
    """Gradients of InfoNCE over the global batch; returns this rank's share of the loss."""
    return backward_of(engine, parts, build_objectives({"infonce": InfoNCEConfig()}), samples_seen=0)["loss"]


def settings(pairs: int, stage: int, precision: str = "fp32", **optim) -> tuple[OptimConfig, TrainConfig]:
    """Engine settings for a global batch of `pairs`."""
    return OptimConfig(**optim), TrainConfig(global_batch=pairs, zero_stage=stage, precision=precision)
