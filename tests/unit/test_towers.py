"""The towers: text cutting against open_clip's own forward, strict initialisation, clear refusals."""

import copy
import json
import pickle
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import tiny
from data_tools.errors import UserError
from pretrain.towers import spec
from pretrain.towers.build import DualEncoder, build_model
from pretrain.towers.cut import TextRule, parts_of
from pretrain.towers.initialise import initialise
from pretrain.towers.spec import ModelSpec, resolve_spec
from pretrain.towers.text import text_features
from pretrain.towers.weights_file import read_weights

CAPTIONS = [
    "a dog",
    "a photo of a cat sitting on a bench near a river",
    "x",
    "the very large tree on the small house",
] * 3


def custom(**text_cfg):
    """The tiny architecture with another text tower."""
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["text_cfg"] |= text_cfg
    return DualEncoder(ModelSpec("custom", {**cfg, "custom_text": True}, tiny.SPEC.preprocess_cfg)).eval()


@pytest.mark.parametrize("buckets", [1, 3, 50])
@torch.no_grad()
def test_cut_text_equals_open_clip_at_full_length(buckets):
    model = build_model("configs/models/vit_micro_32.json", seed=0, text_buckets=buckets).eval()
    tokens = model.tokenize(CAPTIONS)
    parts = parts_of(model.text_rows(tokens))
    assert sum(part.numel() for part in parts) < 0.3 * tokens.numel()
    assert len(parts) == min(buckets, len(CAPTIONS))
    want = model.clip.encode_text(tokens, normalize=True)
    assert (model.encode_text(tokens) - want).abs().max() < 1e-6


@torch.no_grad()
def test_cut_text_is_exact_in_fp64():
    model = tiny.build(text_buckets=4).double().eval()
    tokens = model.tokenize(CAPTIONS)
    want = model.clip.encode_text(tokens, normalize=True)
    got = text_features(model.clip, model.rule(tokens), model.rule)
    assert (torch.nn.functional.normalize(got, dim=-1) - want).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("text_cfg", "cuts"),
    [
        ({}, True),
        ({"pool_type": "eos", "eos_id": 49407}, True),
        ({"no_causal_mask": True, "pool_type": "last"}, False),
        ({"pool_type": "last"}, False),
    ],
)
@torch.no_grad()
def test_a_tower_is_cut_only_where_that_is_exact(text_cfg, cuts):
    model = custom(**text_cfg)
    tokens = model.tokenize(CAPTIONS)
    assert (sum(part.numel() for part in parts_of(model.text_rows(tokens))) < tokens.numel()) == cuts
    want = model.clip.encode_text(tokens, normalize=True)
    assert (model.encode_text(tokens) - want).abs().max() < 1e-6


def test_a_rule_sorts_and_cuts_without_a_tower():
    tokens = torch.tensor([[5, 9, 0, 0, 0, 0], [5, 6, 7, 9, 0, 0], [5, 6, 9, 0, 0, 0], [9, 0, 0, 0, 0, 0]])
    rule = pickle.loads(pickle.dumps(TextRule(causal=True, eos=9, buckets=2)))
    rows = rule(tokens)
    assert {name: row.tolist() for name, row in rows.items()} == {
        "tokens.0": [[9, 0], [5, 9]], "tokens.1": [[5, 6, 9, 0], [5, 6, 7, 9]], "restore": [1, 3, 2, 0]
    }  # fmt: skip
    assert [part.shape[1] for part in parts_of(replace(rule, multiple=3)(tokens))] == [3, 6]
    assert [part.shape[1] for part in parts_of(TextRule(pad=0, buckets=9)(tokens))] == [1, 2, 3, 4]
    assert torch.equal(parts_of(TextRule()(tokens))[0], tokens)
    assert parts_of({"tokens": tokens}) == [tokens]


@torch.no_grad()
def test_a_text_longer_than_the_context_keeps_its_end():
    model = tiny.build().eval()
    tokens = model.tokenize(["tree " * 100])
    assert model.rule(tokens)["tokens.0"].shape == (1, 16)
    assert (model.encode_text(tokens) - model.clip.encode_text(tokens, normalize=True)).abs().max() < 1e-6


@torch.no_grad()
def test_pixels_are_normalised_as_open_clip_does():
    model = tiny.build().eval()
    images, _ = tiny.batch(model, 2)
    mean, std = (torch.tensor(model.spec.preprocess_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    want = model.clip.encode_image((images / 255 - mean) / std, normalize=True)
    assert (model.encode_image(images) - want).abs().max() < 1e-6


def test_the_scale_is_clamped_straight_through():
    model = tiny.build()
    with torch.no_grad():
        model.clip.logit_scale.fill_(5.0)
    scale = model({})["shared"]["logit_scale"]
    assert scale.item() == pytest.approx(100, rel=1e-5)
    scale.backward()
    assert model.clip.logit_scale.grad.item() == pytest.approx(100, rel=1e-5)
    assert model.export_state()["logit_scale"].exp().item() == pytest.approx(100, rel=1e-5)


def test_same_seed_same_weights():
    first, second, other = (build_model("configs/models/vit_micro_32.json", seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.clip.visual.conv1.weight, other.clip.visual.conv1.weight)


def test_the_tokenizer_travels_to_workers():
    model = tiny.build()
    assert torch.equal(pickle.loads(pickle.dumps(model.tokenize))(CAPTIONS), model.tokenize(CAPTIONS))
    assert torch.equal(model.tokenize(CAPTIONS), open_clip.SimpleTokenizer(context_length=16)(CAPTIONS))


def test_the_tokenizer_forgets_words_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(spec, "CACHED_WORDS", 50)
    cfg = tiny.SPEC.model_cfg
    cfg = {**cfg, "text_cfg": {**cfg["text_cfg"], "context_length": 19}}  # a tokenizer that no other test has built
    tokenize = spec.tokenizer_of(ModelSpec("small", cfg, tiny.SPEC.preprocess_cfg))
    theirs = open_clip.SimpleTokenizer(context_length=19)
    for number in range(40):
        texts = [f"word{chr(97 + number % 26)}{chr(97 + number // 26)}{word} <end_of_text>" for word in tiny.WORDS]
        assert torch.equal(tokenize(texts), theirs(texts))
        assert len(tokenize._built.cache) <= 50
    assert len(theirs.cache) > 500


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_files_of_open_clip_load(tmp_path, suffix):
    source = tiny.build(seed=1)
    path = tmp_path / f"weights{suffix}"
    state = {key: value.clone() for key, value in source.export_state().items()}
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        save_file(state, path)
    model = tiny.build(seed=2)
    report = initialise(model, read_weights(path), str(path))
    assert "none missing" in str(report)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_position_embeddings_are_resized_and_said_so():
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["vision_cfg"]["image_size"] = 64
    larger = DualEncoder(ModelSpec("larger", cfg, {**tiny.SPEC.preprocess_cfg, "size": 64}))
    report = initialise(larger, tiny.build().export_state(), "tiny")
    assert report.resized == ["visual.positional_embedding"]
    assert "1 resized (visual.positional_embedding)" in str(report)


def test_weights_that_do_not_fit_are_refused_by_name():
    state = tiny.build().export_state()
    wrong = dict(state)
    del wrong["visual.proj"]
    wrong["head.weight"] = torch.zeros(2)
    wrong["ln_final.bias"] = torch.zeros(5)
    model = tiny.build(seed=1)
    before = model.clip.visual.proj.clone()
    with pytest.raises(UserError, match=r"missing visual\.proj, unexpected head\.weight, other shape ln_final\.bias"):
        initialise(model, wrong, "wrong")
    assert torch.equal(model.clip.visual.proj, before)
    report = initialise(
        model, {k: v for k, v in state.items() if k != "visual.proj"}, "partial", may_miss=["visual.proj"]
    )
    assert report.missing == ["visual.proj"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("ViT-B32", ("unknown", "did you mean ViT-B-32")),
        ("xlm-roberta-base-ViT-B-32", ("text tower", "not on this machine", "local folder")),
        ("ViT-B-16-SigLIP", ("tokenizer", "not on this machine")),
        ("coca_ViT-B-32", ("not a plain dual encoder",)),
        ("RN50", ("batch normalisation", "visual.bn1, visual.bn2")),
        ("none.json", ("cannot be read",)),
    ],
)
def test_models_that_cannot_be_built_say_why(name, parts):
    with pytest.raises(UserError) as caught:
        build_model(name, 0)
    for part in parts:
        assert part in str(caught.value)


def test_a_json_that_is_no_architecture(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"embed_dim": 3}))
    with pytest.raises(UserError, match="no text_cfg, vision_cfg"):
        resolve_spec(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        resolve_spec(str(tmp_path / "b.json"))
