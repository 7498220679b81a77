"""The traps of each export layout: activation, keys, tokenizer, logit scale, towers that have no transformers form."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

import checkpoints
import tiny
from data_tools.errors import UsageError, UserError
from pretrain.engine.weights import describe, load_trained
from pretrain.export import cli as export_cli
from pretrain.export.command import history
from pretrain.export.formats import DUAL_ENCODER
from pretrain.export.probes import PLAIN, TEXTS, TOLERANCE
from pretrain.export.verify import verify_export
from pretrain.export.writer import export_model
from pretrain.towers.build import MAX_LOGIT_SCALE, DualEncoder
from pretrain.towers.heads import FusionConfig
from pretrain.towers.heads.equip import Equipment
from pretrain.towers.spec import resolve_spec


def _model(preprocess: dict | None = None, text: dict | None = None, vision: dict | None = None, **changes):
    """Small towers whose every tensor is random, so that a forgotten one shows."""
    cfg = copy.deepcopy(tiny.MODEL_CFG) | changes
    cfg["text_cfg"] |= {"context_length": 40} | (text or {})
    cfg["vision_cfg"] |= vision or {}
    torch.manual_seed(0)
    spec = replace(tiny.SPEC, model_cfg=cfg, preprocess_cfg=tiny.SPEC.preprocess_cfg | (preprocess or {}))
    model = DualEncoder(spec, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"quick_gelu": False},
        {"quick_gelu": True},
        {"custom_text": True},
        {"text": {"context_length": 77, "vocab_size": 49500, "mlp_ratio": 3.0}},
        {"preprocess": {"resize_mode": "squash", "interpolation": "bilinear"}},
        {"init_logit_scale": 6.0},
    ],
    ids=lambda changes: json.dumps(changes),
)
def test_round_trip_through_both_clients(tmp_path, changes):
    model = _model(**changes)
    differences = export_model(model, tmp_path / "out")
    assert set(differences) == {f"{client} {part}" for client in ("open_clip", "transformers") for part in _PARTS}
    assert max(differences.values()) <= TOLERANCE
    images, tokens = tiny.batch(model, 8)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    with torch.no_grad():
        pixels = (images - model.pixel_mean) / model.pixel_std
        torch.testing.assert_close(theirs.eval().encode_image(pixels, True), model.encode_image(images))
        torch.testing.assert_close(theirs.encode_text(tokens, True), model.encode_text(tokens))


_PARTS = ("image", "text", "logit_scale")


def test_the_other_activation_would_be_noticed(tmp_path):
    model = _model(quick_gelu=True)
    export_model(model, tmp_path / "out")
    for name, change in (("open_clip_config.json", _to_gelu_native), ("config.json", _to_gelu)):
        file = tmp_path / "out" / name
        before = file.read_text()
        file.write_text(json.dumps(change(json.loads(before))))
        with pytest.raises(UserError, match="other features"):
            verify_export(model, tmp_path / "out", ["open_clip", "transformers"])
        file.write_text(before)
    verify_export(model, tmp_path / "out", ["open_clip", "transformers"])


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("open_clip_config.json", lambda config: config["preprocess_cfg"].update(interpolation="bilinear")),
        ("open_clip_config.json", lambda config: config["preprocess_cfg"].update(resize_mode="squash")),
        ("preprocessor_config.json", lambda config: config.update(resample=2)),
        ("preprocessor_config.json", lambda config: config.update(size={"height": 32, "width": 32})),
    ],
)
def test_another_resize_would_be_noticed(tmp_path, file, change):
    model = _model()
    export_model(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / file).read_text())
    change(config)
    (tmp_path / "out" / file).write_text(json.dumps(config))
    with pytest.raises(UserError, match="resizes pictures in another way"):
        verify_export(model, tmp_path / "out", ["open_clip", "transformers"])


def _to_gelu_native(config):
    config["model_cfg"]["quick_gelu"] = False
    return config


def _to_gelu(config):
    config["text_config"]["hidden_act"] = config["vision_config"]["hidden_act"] = "gelu"
    return config


@pytest.mark.parametrize(("quick", "tag"), [(False, "gelu"), (True, "quick_gelu")])
def test_the_activation_is_written_everywhere(tmp_path, quick, tag):
    export_model(_model(quick_gelu=quick), tmp_path / "out", verify=False)
    config = CLIPConfig.from_pretrained(tmp_path / "out")
    assert config.text_config.hidden_act == config.vision_config.hidden_act == tag
    assert json.loads((tmp_path / "out/open_clip_config.json").read_text())["model_cfg"]["quick_gelu"] is quick
    for name in ("open_clip_model.safetensors", "model.safetensors"):
        assert safe_open(tmp_path / "out" / name, "pt").metadata() == {"format": "pt", "activation": tag}


def test_the_logit_scale_is_a_capped_scalar(tmp_path):
    model = _model()
    with torch.no_grad():
        model.clip.logit_scale.fill_(7.0)
    export_model(model, tmp_path / "out")
    for name in ("open_clip_model.safetensors", "model.safetensors"):
        scale = load_file(tmp_path / "out" / name)["logit_scale"]
        assert scale.shape == ()
        assert float(scale) == pytest.approx(MAX_LOGIT_SCALE)


def test_transformers_finds_neither_missing_nor_unexpected_keys(tmp_path):
    export_model(_model(), tmp_path / "out", ["transformers"], verify=False)
    _, report = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not (tmp_path / "out/open_clip_config.json").exists()


def test_custom_text_weights_load_into_the_plain_class(tmp_path):
    export_model(_model(custom_text=True), tmp_path / "out", ["open_clip"])
    keys = load_file(tmp_path / "out/open_clip_model.safetensors").keys()
    assert "text_projection" in keys
    assert not any(key.startswith("text.") for key in keys)


def test_token_ids_agree_with_open_clips(tmp_path):
    export_model(_model(), tmp_path / "out", ["transformers"], verify=False)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.model_max_length, theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (40, 49406, 49407, 49408)
    mine = open_clip.SimpleTokenizer(context_length=40)
    for text in TEXTS[PLAIN]:
        ids = theirs(text, truncation=True).input_ids
        wanted = mine([text])[0].tolist()
        assert ids == wanted[: len(ids)]
        assert ids[-1] == 49407
        assert not any(wanted[len(ids) :])


def test_auto_processor_reads_the_folder(tmp_path):
    export_model(_model(), tmp_path / "out", ["transformers"], verify=False)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor, CLIPProcessor)
    assert processor.image_processor.crop_size["height"] == 32
    assert list(processor.image_processor.image_mean) == [0.5, 0.5, 0.5]


def test_the_export_is_a_model_to_start_from(tmp_path):
    model = _model(quick_gelu=True)
    export_model(model, tmp_path / "out", ["open_clip"])
    again = load_trained(tmp_path / "out")
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    export_model(again, tmp_path / "second")
    first, second = (load_file(tmp_path / name / "open_clip_model.safetensors") for name in ("out", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_logit_bias": -10.0}, "logit_bias"),
        ({"text": {"no_causal_mask": True}}, "text_cfg.no_causal_mask = True"),
        ({"text": {"pool_type": "last"}}, "text_cfg.pool_type = 'last'"),
        ({"vision": {"pool_type": "avg"}}, "vision_cfg.pool_type = 'avg'"),
        ({"vision": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value = 0.1"),
        ({"preprocess": {"resize_mode": "longest"}}, "preprocess_cfg.resize_mode = 'longest'"),
        ({"text": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "text_cfg.tokenizer_kwargs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_towers_without_a_transformers_form_are_refused(tmp_path, changes, named):
    model = _model(**changes)
    with pytest.raises(UserError, match=re.escape(named)) as caught:
        export_model(model, tmp_path / "out")
    assert "--formats open_clip" in str(caught.value)
    assert not list(tmp_path.iterdir())
    if "preprocess" not in changes:
        assert max(export_model(model, tmp_path / "out", ["open_clip"]).values()) <= TOLERANCE


def test_a_timm_tower_exports_for_open_clip_only(tmp_path):
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["vision_cfg"] = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    (tmp_path / "timm.json").write_text(json.dumps(cfg))
    model = DualEncoder(resolve_spec(str(tmp_path / "timm.json"))).eval()
    with pytest.raises(UserError, match="timm_model_name = 'test_vit'"):
        export_model(model, tmp_path / "out")
    assert max(export_model(model, tmp_path / "out", ["open_clip"]).values()) <= TOLERANCE


def test_unknown_formats_and_full_folders_are_refused(tmp_path):
    model = _model()
    for formats in (["open_clip", "onnx"], []):
        with pytest.raises(UsageError, match="unknown export format"):
            export_model(model, tmp_path / "out", formats)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="exists"):
        export_model(model, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    export_model(model, tmp_path / "empty", ["open_clip"], verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_failed_verification_leaves_nothing(tmp_path, monkeypatch):
    whole = DUAL_ENCODER["open_clip"]

    def damaged(model, folder):
        whole.write(model, folder)
        weights = load_file(folder / "open_clip_model.safetensors")
        weights["visual.proj"][0, 0] += 1e-2
        save_file(weights, folder / "open_clip_model.safetensors")

    monkeypatch.setitem(DUAL_ENCODER, "open_clip", replace(whole, write=damaged))
    with pytest.raises(UserError, match="open_clip image"):
        export_model(_model(), tmp_path / "out", ["open_clip"])
    assert not list(tmp_path.iterdir())


def test_not_a_number_does_not_pass_for_equal(tmp_path):
    model = _model()
    export_model(model, tmp_path / "out", ["open_clip"])
    with torch.no_grad():
        model.clip.visual.proj[0, 0] = float("nan")
    with pytest.raises(UserError, match="open_clip image nan"):
        verify_export(model, tmp_path / "out", ["open_clip"])


_KILLED = """
import os, signal, sys, pathlib
import tiny
from pretrain.export import writer
real = os.rename
os.rename = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
writer.export_model(tiny.build(), sys.argv[1], ["open_clip"], verify=False)
"""


def test_a_kill_before_the_rename_leaves_no_export_and_does_not_hinder_the_next(tmp_path, repo_root):
    paths = os.pathsep.join(map(str, (repo_root, repo_root / "tests")))
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "out")], env=os.environ | {"PYTHONPATH": paths}, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    export_model(_model(), tmp_path / "out", ["open_clip"], verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_says_what_is_known(tmp_path):
    facts = {"training data": "digest `abc`", "samples seen": 12}
    export_model(_model(), tmp_path / "out", training=facts, metrics={"image_to_text_recall@1": 0.25}, verify=False)
    card = (tmp_path / "out/README.md").read_text()
    for words in ("digest `abc`", "image_to_text_recall@1 | 0.25", "local-dir:", "CLIPProcessor", "Not verified"):
        assert words in card
    export_model(_model(), tmp_path / "bare", ["open_clip"])
    card = (tmp_path / "bare/README.md").read_text()
    assert "CLIPProcessor" not in card
    assert "open_clip logit_scale" in card


def test_heads_stay_behind_and_the_command_and_the_card_say_so(tmp_path, capsys):
    model, equipment = _model(), Equipment(heads={"fusion": FusionConfig(layers=1), "second": FusionConfig(layers=1)})
    equipment.give(model, seed=0)
    checkpoints.write(tmp_path / "run", 3, model, description=describe(model.spec, **equipment.described()))
    checkpoints.write(tmp_path / "bare", 3, _model(), description=describe(model.spec))
    said = {}
    for run in ("run", "bare"):
        assert export_cli.main([str(tmp_path / run), str(tmp_path / f"{run}-export"), "--no-verify"]) == 0
        said[run] = capsys.readouterr().out, (tmp_path / f"{run}-export/README.md").read_text()
        files = {path.name for path in (tmp_path / f"{run}-export").glob("*.safetensors")}
        assert not any("fusion" in key for name in files for key in load_file(tmp_path / f"{run}-export" / name))
    for text in said["run"]:
        (line,) = [line for line in text.splitlines() if "stay behind" in line]
        assert line.startswith("Heads that stay behind: fusion, second.")
        assert "the run and its checkpoints keep them" in line
    assert not any("stay behind" in text for text in said["bare"])


def test_the_metrics_of_a_card_are_those_of_the_step(tmp_path):
    folder = tmp_path / "checkpoints/step-000000002"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"step": 2, "samples_seen": 32, "position": {"seed": 5}}')
    log = tmp_path / "metrics.jsonl"
    rows = [{"kind": "eval", "step": 1, "recall": 0.1}, {"kind": "eval", "step": 2, "recall": 0.2}]
    log.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"kind": "eval", "step": 3}, {}]))
    facts, metrics = history(folder, ema=False)
    assert (facts["samples seen"], facts["seed"], metrics) == (32, 5, {"recall": 0.2})
    log.write_text("[]\n")
    with pytest.raises(UserError, match="line 1 is not a result"):
        history(folder, ema=False)
