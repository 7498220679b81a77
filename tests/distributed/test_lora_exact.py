"""Low-rank matrices beside all layers of both towers: every gradient against one process in fp64, at every ZeRO stage,
with and without a gradient cache, on real ranks."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import pretrain.engine.engine
import tiny
from pretrain.engine.engine import Engine
from pretrain.objectives.infonce import infonce
from pretrain.process.runtime import start
from pretrain.towers.adapt import LoraConfig
from pretrain.towers.adapt.grad_checkpointing import GradCheckpointing
from pretrain.towers.adapt.lora import Lora
from pretrain.towers.adapt.order import adapt
from ranks import run_ranks
from test_objectives_exact import BOUND, cutting

PAIRS = 16
STAGES = (0, 1, 2, 3, "3, all cut")  # the last keeps no parameter whole, however small
# stage, micro-batches, precision, whether layers run again in the backward
ROWS = [(*row, "fp32", False) for row in itertools.product(STAGES, (1, 4))]
ROWS += [("3, all cut", 4, "fp32", True), (1, 1, "bf16", False), ("3, all cut", 4, "bf16", False)]
OF_ONE_RANK = [(stage, parts, "fp32", False) for stage, parts in zip(STAGES, (1, 4, 1, 4, 1), strict=True)]


def rows_of(world_size):
    return OF_ONE_RANK if world_size == 1 else ROWS


def build(again=False):
    """Adapted towers whose matrices are all in use: B starts at 0, and A then has no gradient."""
    model = tiny.build()
    towers = ["image", "text"]
    adapt(
        model, [Lora(LoraConfig(parts=towers, rank=3, alpha=4.0), 7), *([GradCheckpointing(towers)] if again else [])]
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def reference(autocast=False):
    """Gradients of one process, plain autograd, texts at full length; fp64, or fp32 under autocast."""
    model = build() if autocast else build().double()
    images, tokens = tiny.batch(model, PAIRS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        image, text = model.clip.encode_image(model._pixels(images)), model.clip.encode_text(tokens)
    image, text = (F.normalize(rows.float() if autocast else rows, dim=-1) for rows in (image, text))
    infonce(image, text, model.clip.logit_scale.exp()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gradients(rank, world_size):
    """For each row the gradients of the global batch, of what learns."""
    from deepspeed.utils import safe_get_full_grad

    runtime = start(distributed=True)
    torch.set_num_threads(1)
    plain, found, local = pretrain.engine.engine.deepspeed_config, {}, PAIRS // world_size
    rows = slice(rank * local, (rank + 1) * local)
    for stage, parts, precision, again in rows_of(world_size):
        pretrain.engine.engine.deepspeed_config = cutting(plain) if stage == "3, all cut" else plain
        model = build(again)
        engine = Engine(model, *tiny.settings(PAIRS, int(str(stage)[0]), precision), runtime)
        images, tokens = tiny.batch(model, PAIRS)
        tiny.backward(engine, tiny.micro_batches(model, images[rows], tokens[rows], local // parts))
        learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        found[stage, parts, precision, again] = {name: safe_get_full_grad(p).clone() for name, p in learning}
    return found


def errors(got, want):
    return {
        name: float((got[name].double() - grad.double()).norm() / grad.double().norm()) for name, grad in want.items()
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_equal_one_process(world_size):
    want = {name: grad for name, grad in reference().items() if grad is not None}
    assert len(want) == 2 * 2 * 4 * 2 + 1  # towers, layers, linear layers of each, A and B; the logit scale
    autocast = 1.5 * max(errors(reference(autocast=True), want).values())
    for of_rank in run_ranks(world_size, gradients, timeout=300):
        assert list(of_rank) == rows_of(world_size)
        for row, got in of_rank.items():
            assert got.keys() == want.keys()
            for name, error in errors(got, want).items():
                assert error <= (BOUND if row[2] == "fp32" else autocast), f"{row}: {name} is off by {error:.1e}"
