"""Compiled towers: the gradients of the plain ones on real ranks; few shapes."""

import shutil

import pytest
import torch

import tiny
from data_tools.errors import UserError
from pretrain.engine.engine import Engine
from pretrain.process.runtime import start
from pretrain.towers.adapt import compiling
from ranks import run_ranks

PAIRS = 16
TIMM = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiling._COMPILERS)), reason="needs a C++ compiler, as train.compile does"
)


def gap(rank, world_size, stage, precision, micro, changes):
    """The largest relative difference that compiling makes to a gradient."""
    from deepspeed.utils import safe_get_full_grad

    runtime = start(distributed=True)
    torch.set_num_threads(1)
    local = PAIRS // world_size
    rows, grads = slice(rank * local, (rank + 1) * local), []
    for compiled in (False, True):
        model = tiny.build(**changes)
        if compiled:
            compiling.Compile().apply(model)
        engine = Engine(model, *tiny.settings(PAIRS, stage, precision), runtime)
        images, tokens = tiny.batch(model, PAIRS)
        torch.manual_seed(5)
        tiny.backward(engine, tiny.micro_batches(model, images[rows], tokens[rows], micro))
        grads.append({name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()})
    plain, other = grads
    found = [float((other[name] - grad).norm() / grad.norm()) for name, grad in plain.items()]
    return torch.tensor(found).max().item()  # which is NaN where one is


@needs_compiler
def test_gradients_are_those_of_the_plain_towers():
    """Two ranks, and micro-batches whose forward runs twice."""
    for of_rank in run_ranks(2, gap, 1, "fp32", 4, {"vision_cfg": TIMM}, timeout=600):
        assert 0 < of_rank < 2e-5


def test_texts_come_in_few_lengths_and_evaluation_stays_plain(monkeypatch):
    def compile_(forward, **options):
        return lambda *args: seen.append(tuple(args[0].shape)) or forward(*args)

    seen = []
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    text_cfg = tiny.MODEL_CFG["text_cfg"] | {"context_length": 40}
    plain, model = (tiny.build(text_cfg=text_cfg, text_buckets=3) for _ in range(2))
    compiling.Compile().apply(model)
    tokens = torch.zeros(9, 40, dtype=torch.int64)
    for row, length in enumerate((3, 5, 16, 17, 18, 31, 33, 39, 40)):
        tokens[row, :length] = torch.arange(1, length + 1)
        tokens[row, length - 1] = 49407
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        inputs = tiny.inputs(images) | {"text": model.rule(tokens)}
        got = [model(inputs)["rows"], model.eval()(inputs)["rows"]]
        want = plain(tiny.inputs(images) | {"text": plain.rule(tokens)})["rows"]
    assert seen == [(2, 3, 32, 32), (3, 16), (3, 32), (3, 40)]
    for rows in got:
        torch.testing.assert_close(rows["image"], want["image"])
        torch.testing.assert_close(rows["text"], want["text"], rtol=0, atol=1e-6)


def test_a_machine_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"train.compile needs a compiler on every host"):
        compiling.Compile().apply(tiny.build())
