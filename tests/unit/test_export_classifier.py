"""A fine-tuned classifier in timm and transformers: the same scores, names and pixels, by each client's own loader."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import timm
import torch
from transformers import AutoModelForImageClassification, pipeline

import classifier_run
import tiny
from data_tools.errors import UsageError, UserError
from packing import picture
from pretrain.export import cli, timm_format
from pretrain.export.probes import TOLERANCE
from pretrain.export.writer import export_model
from pretrain.towers.build import DualEncoder
from pretrain.towers.spec import resolve_spec
from ranks import run_ranks


def model(vision: dict | None = None, preprocess: dict | None = None, **changes):
    cfg = copy.deepcopy(tiny.MODEL_CFG) | changes
    cfg["vision_cfg"] |= vision or {}
    spec = replace(tiny.SPEC, model_cfg=cfg, preprocess_cfg=tiny.SPEC.preprocess_cfg | (preprocess or {}))
    return classifier_run.build(DualEncoder(spec))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quick_gelu": True},
        {"embed_dim": 31},
        {"embed_dim": 32},  # as wide as the tower: there is no room beside what the norm takes away
        {"embed_dim": 75},
        {"vision": {"mlp_ratio": 2.5, "head_width": 8, "layers": 1}},
        {"preprocess": {"resize_mode": "squash", "interpolation": "bilinear"}},
    ],
    ids=json.dumps,
)
def test_scores_are_those_of_the_trainer_in_both_clients(tmp_path, changes):
    trained = model(**changes)
    differences = export_model(trained, tmp_path / "out")
    assert set(differences) == {"timm scores", "transformers scores"}
    assert max(differences.values()) <= TOLERANCE
    pixels = tiny.batch(trained.towers, 16)[0]
    normalised = (pixels - trained.towers.pixel_mean) / trained.towers.pixel_std
    with torch.no_grad():
        wanted = trained.scores(pixels)
        theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(normalised)
        other = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()(normalised).logits
    assert wanted.abs().max() > 1
    assert wanted.std(dim=0).min() > 1e-3  # the pictures are not all one to it
    torch.testing.assert_close(theirs, wanted, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(other, wanted, atol=1e-5, rtol=1e-6)


def test_an_architecture_narrower_than_its_features_exports(tmp_path):
    trained = classifier_run.build(DualEncoder(resolve_spec("configs/models/vit_micro_8.json")))
    assert trained.spec.model_cfg["embed_dim"] > trained.spec.model_cfg["vision_cfg"]["width"]
    assert max(export_model(trained, tmp_path / "out", ["timm"]).values()) <= TOLERANCE


def test_bf16_is_close(tmp_path):
    """The layer that holds large numbers does not overflow, as in fp16 it would."""
    trained = model()
    export_model(trained, tmp_path / "out", ["timm"], verify=False)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval().to(torch.bfloat16)
    pixels = tiny.batch(trained.towers, 16)[0]
    normalised = (pixels - trained.towers.pixel_mean) / trained.towers.pixel_std
    with torch.no_grad():
        difference = (
            theirs(normalised.to(torch.bfloat16)).float() - trained.scores(pixels)
        ).abs().max() / trained.scale
    assert difference < 0.2


def test_the_command_and_what_a_user_types(tmp_path, capsys):
    run_ranks(1, classifier_run.save, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 3, "top1": 0.875}) + "\n")
    assert cli.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("verified ") == 2
    card = (tmp_path / "out/README.md").read_text()
    for words in (
        "pipeline_tag: image-classification",
        '- 2: "red bus"',
        "| top1 | 0.875 |",
        "local-dir:",
        "pipeline(",
    ):
        assert words in card
    image = picture(3).resize((90, 60))
    found = pipeline("image-classification", model=str(tmp_path / "out"))(image, top_k=3)
    assert {row["label"] for row in found} == set(classifier_run.CLASSES)
    trained = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(trained), is_training=False)
    with torch.no_grad():
        wanted = trained(transform(image)[None]).softmax(dim=1)[0]
    scores = {row["label"]: row["score"] for row in found}
    assert [scores[name] for name in classifier_run.CLASSES] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert cli.main([str(tmp_path / "run"), str(tmp_path / "b"), "--ema"]) == 1
    assert "it has none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vision": {"pool_type": "avg"}}, "vision_cfg.pool_type = 'avg'"),
        ({"vision": {"mlp_ratio": 1.0}}, "vision_cfg.mlp_ratio = 1.0, too small for 24 features"),
        ({"preprocess": {"resize_mode": "longest"}}, "preprocess_cfg.resize_mode = 'longest'"),
    ],
    ids=str,
)
def test_towers_without_such_a_form_say_why(tmp_path, changes, named):
    with pytest.raises(UserError, match=f"has no timm form; got {named}"):
        export_model(model(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_formats_of_the_other_kind_are_unknown(tmp_path):
    with pytest.raises(UsageError, match="unknown export format for a classifier; got open_clip; expected timm, trans"):
        export_model(model(), tmp_path / "out", ["open_clip"])


@pytest.mark.parametrize(
    "name", ["blocks.2.mlp.fc1.bias", "cls_token", "blocks.0.attn.qkv.weight", "norm_pre.bias", "head.bias"]
)
def test_a_wrong_tensor_would_be_noticed(tmp_path, monkeypatch, name):
    def damaged(trained):
        state = exact(trained)
        state[name] = state[name] + 0.1 * torch.linspace(-1, 1, state[name].numel()).view(state[name].shape)
        return state

    exact = timm_format.timm_state
    monkeypatch.setattr(timm_format, "timm_state", damaged)
    with pytest.raises(UserError, match="computes other"):
        export_model(model(), tmp_path / "out", ["timm"])
