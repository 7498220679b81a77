"""What learning from a teacher says of simple batches, what it costs, and what it does with what is absent."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import tiny
from data_tools.errors import UsageError
from plain_losses import plain
from pretrain.config.reading import load_config
from pretrain.objectives import (
    FeatureDistillationConfig,
    InteractiveContrastiveConfig,
    RelationalDistillationConfig,
    tiles,
)
from pretrain.objectives.distill import one_way_infonce, relational_distillation
from pretrain.objectives.infonce import infonce
from pretrain.objectives.objective import build
from pretrain.tasks import ContrastiveConfig
from pretrain.towers.heads import ProjectionConfig
from pretrain.towers.heads.equip import Equipment

DIM, TEACHERS = 8, 12
SETTINGS = {
    "features": FeatureDistillationConfig(),
    "relations": RelationalDistillationConfig(teacher_temperature=0.1),
    "interactive": InteractiveContrastiveConfig(),
}


def unit(pairs, dim, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(pairs, dim, generator=g, dtype=dtype), dim=-1)


def batch(pairs, dtype=torch.float64):
    """Outputs of a model, of which the student's rows and the scale ask for gradients."""
    student = {"image": DIM, "text": DIM, "image_to_teacher_image": TEACHERS, "text_to_teacher_text": TEACHERS}
    rows = {name: unit(pairs, dim, seed, dtype).requires_grad_() for seed, (name, dim) in enumerate(student.items())}
    rows |= {name: unit(pairs, TEACHERS, seed, dtype) for seed, name in enumerate(("teacher_image", "teacher_text"), 9)}
    shared = {"logit_scale": torch.tensor([14.0], dtype=dtype, requires_grad=True)}
    return {"rows": rows, "shared": shared, "local": {}}


def loss(settings, outputs, inputs):
    """Ours, as the gradient path calls it in one process."""
    (ours,) = (one.objective for one in build({"it": settings}).values())
    if hasattr(ours, "count"):
        return ours.loss(outputs, inputs) / max(int(ours.count(inputs)), 1)
    return ours.loss(outputs["rows"], outputs["shared"], inputs)


def values(outputs):
    """The teacher's rows as the inputs that they are."""
    return {name: {"values": rows} for name, rows in outputs["rows"].items() if name.startswith("teacher")} | {
        "image": {},
        "text": {},
    }


def gradients(by, settings, absent=()):
    """Value and gradients of a batch of 70 pairs, in which `absent` fields lack some."""
    outputs = batch(70)
    inputs = values(outputs)
    for number, field in enumerate(absent, 3):
        inputs[field]["present"] = torch.arange(70) % number != 1
    value = by(settings, outputs, inputs).sum()
    value.backward()
    leaves = {**outputs["rows"], **outputs["shared"]}
    return value.item(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.any()}


@pytest.mark.parametrize("absent", [(), ("teacher_image",), ("text", "teacher_text"), ("image", "teacher_image")])
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_their_definitions(name, absent, monkeypatch):
    """In tiles that hold a part of the columns; the teacher gets no gradient."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1)
    (ours, grads), (value, want) = gradients(loss, SETTINGS[name], absent), gradients(plain, SETTINGS[name], absent)
    assert ours == pytest.approx(value, rel=1e-12)
    assert grads.keys() == want.keys()
    assert all(torch.allclose(grads[leaf], grad, rtol=1e-10, atol=1e-14) for leaf, grad in want.items())
    assert bool(name == "features") == ("logit_scale" not in grads)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_absent_counts_for_nothing_whatever_stands_there(name):
    outputs = batch(70)
    inputs = values(outputs) | {"image": {"present": torch.arange(70) % 3 != 1}}
    want = loss(SETTINGS[name], outputs, inputs).item()
    with torch.no_grad():
        for row in ("image", "image_to_teacher_image"):
            outputs["rows"][row][1] = math.nan
    value = loss(SETTINGS[name], outputs, inputs)
    value.backward()
    assert value.item() == want
    assert all(leaf.grad.isfinite().all() for leaf in outputs["rows"].values() if leaf.grad is not None)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_of_which_all_is_absent_has_no_loss(name):
    outputs = batch(6)
    absent = {"present": torch.zeros(6, dtype=torch.bool)}
    inputs = {name: rows | absent for name, rows in values(outputs).items()}
    value = loss(SETTINGS[name], outputs, inputs)
    value.backward()
    assert value.item() == 0
    assert not any(leaf.grad.any() for leaf in outputs["rows"].values() if leaf.grad is not None)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_not_a_number_shows_in_the_loss(name):
    outputs = batch(70)
    with torch.no_grad():
        for row in ("image", "image_to_teacher_image"):
            outputs["rows"][row][40] = math.nan
    assert loss(SETTINGS[name], outputs, values(outputs)).isnan()


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    image, text, scale = unit(70, DIM, 1).requires_grad_(), unit(70, DIM, 2), torch.tensor([20.0], dtype=torch.float64)
    value = relational_distillation(image, text, scale, image.detach(), text, 20.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert image.grad.abs().max() < 1e-12


def test_both_ways_are_infonce():
    image, text, scale = unit(70, DIM, 1), unit(70, DIM, 2), torch.tensor([20.0], dtype=torch.float64)
    both = (one_way_infonce(image, text, scale) + one_way_infonce(text, image, scale)) / 2
    assert both.item() == pytest.approx(infonce(image, text, scale).item(), rel=1e-12)


def test_an_absent_key_is_far_from_nobody():
    """Where the only pair there is stands opposite each other, a key of zeros would be e^100 times as near."""
    anchor, present = torch.eye(2).requires_grad_(), torch.tensor([True, False])
    loss = one_way_infonce(anchor, torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), torch.tensor([100.0]), present=present)
    loss.backward()
    assert loss.item() == 0
    assert not anchor.grad.any()


def test_flops():
    """Of pairs^2: the student's matrix twice and two products, the teacher's three times; one way has no second
    product."""
    pairs = 512
    want = {"features": 0, "relations": 8 * DIM + 6 * TEACHERS, "interactive": 2 * 6 * TEACHERS}
    for name, settings in SETTINGS.items():
        outputs = batch(pairs, torch.float32)
        with FlopCounterMode(display=False) as counter:
            loss(settings, outputs, values(outputs)).sum().backward()
        assert counter.get_total_flops() == want[name] * pairs**2, name


def test_no_matrix_of_the_batch_is_held(monkeypatch):
    """Of what forward and backward make the largest is a tile or the features of the batch."""
    pairs = 2048
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 2**17)
    for settings in SETTINGS.values():
        outputs = batch(pairs, torch.float32)
        with Largest() as seen:
            loss(settings, outputs, values(outputs)).sum().backward()
        assert pairs * DIM <= seen.elements <= 2**17


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """How many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(one.numel() for one in (out if isinstance(out, tuple) else [out])
                                              if isinstance(one, torch.Tensor))])  # fmt: skip
        return out


def test_a_projection_is_a_linear_map_to_the_size_of_a_teacher():
    model = tiny.build()
    Equipment({"teacher_image": "stored"}, {"teacher_image": 7}, {"it": ProjectionConfig()}).give(model, seed=0)
    weights = dict(model.heads.named_parameters())
    rows = unit(5, 24, 1, torch.float32)
    got = model.heads["it"]({"rows": {"image": rows}}, {})
    want = F.normalize(rows @ weights["it.linear.weight"].T + weights["it.linear.bias"], dim=-1)
    assert got.shape == (5, 7)
    assert torch.allclose(got, want, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.heads["it"]({"rows": {"image": rows}}, {}), got)


def test_a_projection_between_equal_sizes_is_nothing():
    model = tiny.build()
    settings = ProjectionConfig(of="text", to="teacher_text")
    Equipment({"teacher_text": "stored"}, {"teacher_text": 24}, {"it": settings}).give(model, seed=0)
    assert list(model.heads.parameters()) == []
    rows = unit(5, 24, 1)
    assert model.heads["it"]({"rows": {"text": rows}}, {}) is rows


def test_objectives_say_what_they_need():
    features = FeatureDistillationConfig(fields=("text", "lake"))
    assert features.needs() == (
        {"text_to_lake": {"type": "projection", "of": "text", "to": "lake"}},
        {"lake": "embedding"},
    )
    heads, fields = InteractiveContrastiveConfig().needs()
    assert heads.keys() == build({"it": InteractiveContrastiveConfig()})["it"].objective.wants
    assert fields == RelationalDistillationConfig().needs()[1] == dict.fromkeys(
        ("teacher_image", "teacher_text"), "embedding"
    )  # fmt: skip
    assert RelationalDistillationConfig().needs()[0] == {}


TAUGHT = "data.train=x run.dir=run objectives={distill: {type: relational_distillation}}"
IMAGE, TEXT = (f"fields.teacher_{name}={{type: embedding, size: 768}}" for name in ("image", "text"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "fields.*settings of teacher_image with size.*fields.teacher_image='{type: embedding, size: ...}'"),
        ([IMAGE, "fields.teacher_text={type: embedding}"], "fields.teacher_text.size.*how many numbers"),
        ([IMAGE, TEXT, "fields.teacher_text.size=0"], "fields.teacher_text.size.*1 <= value"),
        ([IMAGE, TEXT, "fields.teacher_text.size=512"], "objectives.distill.teachers.*one size.*768 and 512"),
        ([IMAGE, TEXT, "objectives.distill.teachers=[image, text]"], "objectives.distill.teachers.*two stored fields"),
        ([IMAGE, TEXT, "objectives.distill.fields=[text, text]"], "objectives.distill.fields.*two different"),
        ([IMAGE, TEXT, "objectives.distill.teacher_temperature=0"], "teacher_temperature.*0.001 <= value"),
        (
            ["objectives={feature_distillation: {fields: [teacher_image, image]}}"],
            "objectives.feature_distillation.fields.*what learns and a stored field",
        ),
        (
            ["objectives=feature_distillation", "fields.teacher={type: embedding, size: 3}"],
            "fields.*objectives read: teacher_image",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(words, message, tmp_path):
    (tmp_path / "config.yaml").write_text("task: contrastive")
    with pytest.raises(UsageError, match=message):
        load_config(ContrastiveConfig, tmp_path / "config.yaml", [*re.split(r" (?=\w+[.=])", TAUGHT), *words])


def test_the_shipped_settings_are_those_of_the_paper(repo_root):
    config = load_config(ContrastiveConfig, repo_root / "configs" / "distill.yaml")
    assert {name: one.weight for name, one in config.objectives.items()} == {
        "infonce": 1,
        "image_features": 2000,
        "text_features": 2000,
        "relational_distillation": 1,
        "interactive_contrastive": 1,
    }
    assert {name: (one.of, one.to) for name, one in config.needs.heads.items()} == {
        f"{field}_to_teacher_{field}": (field, f"teacher_{field}") for field in ("image", "text")
    }
