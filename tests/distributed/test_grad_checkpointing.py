"""Activation checkpointing: the same gradients from fewer saved bytes, for every kind of tower and engine."""

import copy
from dataclasses import replace

import pytest
import torch

import tiny
from data_tools.errors import UserError
from pretrain.engine.engine import Engine
from pretrain.plan.memory import activation_bytes
from pretrain.process.runtime import start
from pretrain.towers.adapt.grad_checkpointing import GradCheckpointing
from pretrain.towers.build import DualEncoder, attention_kernel
from ranks import run_ranks

PAIRS = 16
BITS = tiny.patch_bits(7, 3, range(PAIRS))
# ZeRO stage, precision, micro-batches
ENGINES = [(0, "fp32", 1), (0, "bf16", 4), (1, "bf16", 1), (2, "fp32", 4), (3, "fp32", 1), (3, "bf16", 4)]
PATCHES = {"image_size": 32, "patch_size": 8, "patch_dropout": 0.5}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
FULL_TEXT = {"no_causal_mask": True, "pool_type": "last"}  # a tower that is not cut


def build(towers, vision_cfg=PATCHES, text_cfg=None):
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["vision_cfg"] = vision_cfg if "timm_model_name" in vision_cfg else cfg["vision_cfg"] | vision_cfg
    cfg["text_cfg"] |= text_cfg or {}
    torch.manual_seed(0)
    model = DualEncoder(replace(tiny.SPEC, model_cfg={**cfg, "custom_text": text_cfg is not None}), text_buckets=2)
    GradCheckpointing(towers).apply(model)
    return model


def micro_batches(model, rows, size):
    images, tokens = tiny.batch(model, PAIRS)
    return tiny.micro_batches(model, images[rows], tokens[rows], size, BITS[rows])


def gaps(rank, world_size):
    """For each row of ENGINES the largest relative difference that checkpointing makes to a gradient."""
    runtime = start(distributed=True)
    torch.set_num_threads(1)
    return {row: gap(runtime, *row) for row in ENGINES}


def gap(runtime, stage, precision, parts):
    from deepspeed.utils import safe_get_full_grad

    local = PAIRS // runtime.world_size
    rows, grads = slice(runtime.rank * local, (runtime.rank + 1) * local), []
    for towers in ((), ("image", "text")):
        model = build(towers)
        engine = Engine(model, *tiny.settings(PAIRS, stage, precision), runtime)
        tiny.backward(engine, micro_batches(model, rows, local // parts))
        grads.append({name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()})
    plain, checkpointed = grads
    found = [float((checkpointed[name] - grad).norm() / grad.norm()) for name, grad in plain.items()]
    return torch.tensor(found).max().item()  # which is NaN where one is


def test_gradients_are_the_same_bit_for_bit():
    for of_rank in run_ranks(2, gaps, timeout=300):
        assert of_rank == dict.fromkeys(ENGINES, 0.0)


def grads_of(model):
    torch.manual_seed(5)
    (part,) = micro_batches(model, slice(None), PAIRS)
    with attention_kernel(torch.device("cpu")):
        tiny.loss(model(part)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("towers", "vision_cfg", "text_cfg", "share"),
    [
        (["image"], PATCHES, None, 0.75),
        (["text"], PATCHES, None, 0.55),
        (["image"], {**TIMM, "patch_dropout": 0.25}, None, 0.65),
        (["text"], PATCHES, FULL_TEXT, 0.55),
        (["image", "text"], PATCHES, "transformers", 0.3),
    ],
)
def test_a_tower_keeps_less_for_the_same_gradients(towers, vision_cfg, text_cfg, share, tmp_path):
    """`share`: of the bytes saved for the backward that is left at most."""
    if text_cfg == "transformers":
        text_cfg = roberta(tmp_path)
    plain, checkpointed = build((), vision_cfg, text_cfg), build(towers, vision_cfg, text_cfg)
    want, got = grads_of(plain), grads_of(checkpointed)
    assert all(torch.equal(got[name], grad) for name, grad in want.items())
    kept, all_kept = (activation_bytes(model, tiny.rows(model), {}, bf16=False) for model in (checkpointed, plain))
    assert kept < share * all_kept


def roberta(folder):
    """Settings of a text tower of transformers."""
    from transformers import RobertaConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    RobertaConfig(vocab_size=49408, max_position_embeddings=20, pad_token_id=0, **sizes).save_pretrained(folder)
    return {"hf_model_name": str(folder), "hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}


def test_a_tower_that_cannot_is_refused():
    model = tiny.build()
    model.clip.visual = torch.nn.Identity()
    with pytest.raises(UserError, match="image tower cannot checkpoint"):
        GradCheckpointing(["image"]).apply(model)
