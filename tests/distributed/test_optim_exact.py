"""Rates by tower and layer, locked towers, all optimizers: updates on real ranks against a plain one in one process."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.optim import Lamb, Lion, Muon

import tiny
from pretrain.config.tree import OptimConfig, PartConfig
from pretrain.engine.engine import Engine
from pretrain.engine.groups import parameter_groups
from pretrain.objectives.infonce import infonce
from pretrain.process.runtime import start
from pretrain.towers.adapt.lock import Lock
from pretrain.towers.parts import tower_of
from ranks import run_ranks

PAIRS, STEPS, LR = 16, 3, 1e-3
PARTS = {"image": PartConfig(lr=3e-4), "text": PartConfig(weight_decay=0.5)}
RATES = {"lr": LR, "parts": PARTS, "layer_decay": 0.5}
STAGES = {"adamw": (0, 1, 2, 3), "lion": (0, 1, 2, 3), "lamb": (0,), "muon": (0,)}


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=OptimConfig.betas, eps=OptimConfig.eps),
    "lion": lambda groups: Lion(groups, betas=OptimConfig.betas),
    "lamb": lambda groups: Lamb(groups, betas=OptimConfig.betas, eps=OptimConfig.eps, max_grad_norm=None),
    "muon": lambda groups: Muon(groups, betas=OptimConfig.betas),
}


def reference(locked, name):
    """Weights after STEPS updates of one process in fp64."""
    model = tiny.build().double()
    Lock(locked).apply(model)
    groups = [
        {key: value for key, value in group.items() if key != "lr_scale"} | {"lr": LR * group["lr_scale"]}
        for group in parameter_groups(model, OptimConfig(name=name, **RATES))
    ]
    optimizer = OPTIMIZERS[name](groups)
    images, tokens = tiny.batch(model, PAIRS)
    for _ in range(STEPS):
        image = F.normalize(model.clip.encode_image(model._pixels(images)), dim=-1)
        text = F.normalize(model.clip.encode_text(tokens), dim=-1)
        optimizer.zero_grad()
        infonce(image, text, model.clip.logit_scale.exp()).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def updated(rank, world_size, locked, name):
    """For each stage and number of micro-batches this rank's fragments of the weights after STEPS updates."""
    runtime = start(distributed=True)
    local = PAIRS // world_size
    rows, results = slice(rank * local, (rank + 1) * local), {}
    for stage, parts in itertools.product(STAGES[name], (1, 4)):
        model = tiny.build()
        Lock(locked).apply(model)
        engine = Engine(model, *tiny.settings(PAIRS, stage, name=name, **RATES), runtime)
        images, tokens = tiny.batch(model, PAIRS)
        for _ in range(STEPS):
            tiny.backward(engine, tiny.micro_batches(model, images[rows], tokens[rows], local // parts))
            engine.update(LR)
        fragments = engine.fragments()
        results[stage, parts] = [(f.name, f.start, f.values["weight"].double().clone()) for f in fragments]
    return results


@pytest.mark.parametrize(
    ("locked", "optimizer"),
    [([], "adamw"), (["image"], "adamw"), (["text"], "adamw"), ([], "lion"), ([], "lamb"), ([], "muon")],
)
def test_updates_equal_one_process(locked, optimizer):
    fresh = {name: p.detach().double() for name, p in tiny.build().named_parameters()}
    want, ranks = reference(locked, optimizer), run_ranks(2, updated, locked, optimizer, timeout=300)
    for key in itertools.product(STAGES[optimizer], (1, 4)):
        got = {name: value.clone().flatten() for name, value in fresh.items()}
        for name, first, values in itertools.chain(*(results[key] for results in ranks)):
            got[name][first : first + len(values)] = values
        for name, before in fresh.items():
            moved = (want[name] - before).norm()
            assert (moved == 0) == (tower_of(name) in locked)
            if name.endswith("in_proj_bias"):  # the keys' gradients are nothing but rounding, of which both make much
                continue
            error = (got[name] - want[name].flatten()).norm()
            bound = 0.1 if optimizer == "lion" else 2e-2  # Lion takes the sign, also of what is next to nothing
            assert error <= bound * moved, f"{key}: {name} is {error:.1e} off, it moved {moved:.1e}"


def test_muon_has_the_matrices_of_layers():
    model = tiny.build()
    groups = parameter_groups(model, OptimConfig(name="muon"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    muons = {names[p] for group in groups if group["use_muon"] for p in group["params"]}
    inner = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert muons == {name for name in names.values() if ".resblocks." in name and name.endswith(inner)}
    assert len(muons) == 2 * 2 * 4  # towers, layers, matrices


CLIP, STEEP = 0.01, 1e4  # a clipping that bites; with so large an eps AdamW moves by the gradient over eps


def clipped(rank, world_size):
    """For each stage and number of micro-batches the gradient norm that is logged, and this rank's fragments after a
    clipped update."""
    runtime = start(distributed=True)
    local = PAIRS // world_size
    rows, results = slice(rank * local, (rank + 1) * local), {}
    for stage, parts in itertools.product(range(4), (1, 4)):
        model = tiny.build()
        settings = tiny.settings(PAIRS, stage, grad_clip=CLIP, eps=STEEP, weight_decay=0.0)
        engine = Engine(model, *settings, runtime)
        images, tokens = tiny.batch(model, PAIRS)
        tiny.backward(engine, tiny.micro_batches(model, images[rows], tokens[rows], local // parts))
        engine.update(STEEP)
        fragments = engine.fragments()
        values = [(f.name, f.start, f.values["weight"].double().clone()) for f in fragments]
        results[stage, parts] = engine.grad_norm, values
    return results


def test_clipping_takes_the_norm_of_the_whole_gradient():
    """One process in fp64; AdamW with a usual eps would hide a factor of the gradient."""
    model = tiny.build().double()
    images, tokens = tiny.batch(model, PAIRS)
    image = F.normalize(model.clip.encode_image(model._pixels(images)), dim=-1)
    text = F.normalize(model.clip.encode_text(tokens), dim=-1)
    infonce(image, text, model.clip.logit_scale.exp()).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
    assert norm > 2 * CLIP
    fresh = {name: p.detach().double().flatten() for name, p in tiny.build().named_parameters()}
    want = torch.cat([grads[name].flatten() * CLIP / norm for name in fresh])
    ranks = run_ranks(2, clipped, timeout=300)
    for key in ranks[0]:
        got = {name: value.clone() for name, value in fresh.items()}
        for logged, fragments in (results[key] for results in ranks):
            assert logged == pytest.approx(float(norm), rel=1e-4)
            for name, first, values in fragments:
                got[name][first : first + len(values)] = values
        moved = torch.cat([fresh[name] - got[name] for name in fresh])
        assert (moved - want).norm() <= 1e-3 * want.norm(), key
