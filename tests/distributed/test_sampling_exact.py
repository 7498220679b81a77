"""Random numbers inside the towers: patch dropout is the same at any world size, other dropout is off."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from pretrain.engine.engine import Engine
from pretrain.process.runtime import start
from pretrain.towers.build import DualEncoder
from ranks import run_ranks

PAIRS = 16
IDS = np.random.default_rng(0).integers(0, 2**64, PAIRS, dtype=np.uint64)
TIMM = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}


def build(vision_cfg, dropout=0.0):
    """The tiny towers with another image tower, always of the same weights. `dropout`: switched on behind its back."""
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["vision_cfg"] = vision_cfg if "timm_model_name" in vision_cfg else cfg["vision_cfg"] | vision_cfg
    torch.manual_seed(0)
    model = DualEncoder(replace(tiny.SPEC, model_cfg=cfg), text_buckets=2)
    for module in model.modules():
        if dropout and isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def micro_batches(model, rows, size):
    images, tokens = tiny.batch(model, PAIRS)
    return tiny.micro_batches(model, images[rows], tokens[rows], size, tiny.patch_bits(7, 3, IDS)[rows])


def gradients(rank, world_size, vision_cfg, configurations, dropout=0.0):
    """Full gradients for every (stage, micro-batch), and of a second forward of the same batch."""
    from deepspeed.utils import safe_get_full_grad

    runtime = start(distributed=True)
    torch.set_num_threads(1)
    local = PAIRS // world_size
    rows, results = slice(rank * local, (rank + 1) * local), []
    for stage, micro in configurations:
        model = build(vision_cfg, dropout)
        engine = Engine(model, *tiny.settings(PAIRS, stage), runtime)
        torch.manual_seed(100 + rank)  # what the rank's own generator holds must not matter
        tiny.backward(engine, micro_batches(model, rows, micro or local))
        results.append({name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()})
    return results


def whole_batch(model, parts):
    """Gradients of plain autograd: every part forward with its graph, in order, then one loss and one backward."""
    outputs = [model(part) for part in parts]
    rows = {field: torch.cat([output["rows"][field] for output in outputs]) for field in ("image", "text")}
    tiny.loss({"rows": rows, "shared": outputs[0]["shared"]}).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def close(got, want):
    for name, grad in got.items():
        error = (grad - want[name]).norm() / want[name].norm().clamp_min(1e-12)
        assert error < 1e-5, f"{name} is off by {error:.1e}"


PATCHES = {"image_size": 32, "patch_size": 8, "patch_dropout": 0.5}  # keeps 8 of 16


@pytest.fixture(scope="module")
def want():
    return whole_batch(model := build(PATCHES), micro_batches(model, slice(None), PAIRS))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_patch_dropout_is_the_same_at_any_world_size_and_micro_batch(world_size, want):
    configurations = [(1, None), (3, 2)]
    (results, *_) = run_ranks(world_size, gradients, PATCHES, configurations)
    for got in results:
        close(got, want)
    undropped = whole_batch(model := build({**PATCHES, "patch_dropout": 0.0}), micro_batches(model, slice(None), PAIRS))
    with pytest.raises(AssertionError, match="is off by"):
        close(results[0], undropped)


DROPPED = {**TIMM, "timm_drop": 0.2, "timm_drop_path": 0.1, "patch_dropout": 0.25}


@pytest.mark.parametrize("world_size", [1, 2])
def test_dropout_that_a_tower_brings_changes_no_gradient(world_size):
    (results, *_) = run_ranks(world_size, gradients, DROPPED, [(1, None), (3, 2)])
    plain = build({**TIMM, "patch_dropout": 0.25})
    want = whole_batch(plain, micro_batches(plain, slice(None), PAIRS))
    for got in results:
        close(got, want)


def test_random_numbers_are_replayed_under_the_cache():
    """Exact: the gradients of an uncached forward of the same micro-batches that draws the same random numbers."""
    ((cached, again),) = run_ranks(1, gradients, DROPPED, [(1, 4), (0, 4)], 0.2)
    model = build(DROPPED, 0.2)
    torch.manual_seed(100)
    uncached = whole_batch(model, micro_batches(model, slice(None), 4))
    close(cached, uncached)
    close(again, uncached)
    torch.manual_seed(101)
    other = whole_batch(model := build(DROPPED, 0.2), micro_batches(model, slice(None), 4))
    with pytest.raises(AssertionError, match="is off by"):
        close(cached, other)
