"""The one way in for trained towers: what people call a model is opened, said, and computes what it should."""

import copy
import json
import re
import shutil
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

import checkpoints
import tiny
from data_tools.errors import UsageError, UserError
from model_files import architecture_with, config_with, weights
from pretrain.engine.opening import open_model, open_weights
from pretrain.export.writer import export_model
from pretrain.tasks.contrastive import load_init, make_model
from pretrain.towers.build import DualEncoder
from pretrain.towers.guess import architectures_of

CAPTIONS = ["a photo of a dog.", "two red circles above a blue square", "x"]


def features(model, images, tokens):
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(tokens)


def same_as(want, got):
    for one, other in zip(want, got, strict=True):
        assert (one - other).abs().max() < 1e-6  # texts are cut into other buckets


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """The JSON of the tiny towers."""
    return architecture_with(tmp_path_factory.mktemp("architecture") / "tiny.json")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same weights in every form: name -> what a user would write."""
    root, model = tmp_path_factory.mktemp("models"), tiny.build(5)
    step = checkpoints.write(root / "run", 3, model)
    export_model(model, root / "export", verify=False)
    config = (root / "export/open_clip_config.json").read_text()
    state = weights(model)
    torch.save(state, root / "flat.bin")
    torch.save(
        {"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}}, root / "epoch_3.pt"
    )
    torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, root / "compiled.pth")
    save_file(state, root / "weights.safetensors")
    for name, file in (("bin", "open_clip_pytorch_model.bin"), ("own", "open_clip_model.safetensors")):
        (root / name).mkdir()
        (root / name / "open_clip_config.json").write_text(config)
        (save_file if file.endswith("safetensors") else torch.save)(state, root / name / file)
    (root / "bare").mkdir()
    torch.save(state, root / "bare/open_clip_pytorch_model.bin")
    shutil.copytree(root / "export", root / "transformers", ignore=shutil.ignore_patterns("open_clip*"))
    described = (
        "run",
        "run/checkpoints",
        f"run/checkpoints/{step.name}",
        "run/checkpoints/latest",
        "export",
        "own",
        "bin",
    )
    described += ("bin/open_clip_pytorch_model.bin", "own/open_clip_model.safetensors", "export/model.safetensors")
    described += ("transformers", "transformers/model.safetensors")
    bare = ("flat.bin", "epoch_3.pt", "compiled.pth", "weights.safetensors", "bare")
    return model, {name: str(root / name) for name in described}, {name: str(root / name) for name in bare}


def test_every_form_gives_the_same_features_as_model_and_as_init(places, architecture):
    model, described, bare = places
    images, tokens = tiny.batch(model, 4)
    want = features(model.eval(), images, tokens)
    for name, path in {**described, **bare}.items():
        for spelling in (path, f"local-dir:{path}"):
            opened, report = open_model(spelling, architecture=architecture if name in bare else None)
            assert re.match(r"initialised from \S.*: \d+ tensors loaded, none resized, none missing", str(report)), name
            same_as(want, features(opened, images, tokens))
        config = config_with(path, architecture)
        started = make_model(config)
        assert "none missing" in str(load_init(started, config))
        same_as(want, features(started.eval(), images, tokens))


def test_a_spelling_says_what_was_taken(places):
    _, described, _ = places
    for name, words in {
        "run": r"checkpoint \S+/step-000000003",
        "bin": r"open_clip folder \S+ \(open_clip_pytorch_model.bin\)",
        "transformers": r"transformers folder \S+ \(model.safetensors, converted\)",
    }.items():
        assert re.search(words, str(open_model(described[name])[1]))


def test_a_newer_checkpoint_that_is_damaged_is_said(tmp_path):
    for step in (1, 2):
        newest = checkpoints.write(tmp_path, step)
    (newest / "config.yaml").write_text("torn")
    report = str(open_model(tmp_path)[1])
    assert "step-000000001" in report.splitlines()[0]
    assert "warning: checkpoint" in report
    assert "step-000000002 is damaged" in report


# ---- transformers ---------------------------------------------------------------------------------------------------


def clip_of_transformers(folder, text=None, vision=None, resize=None, **save):
    sizes = {"hidden_size": 32, "intermediate_size": 61, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"max_position_embeddings": 24} | (text or {})
    vision = sizes | {"image_size": 32, "patch_size": 16, "num_attention_heads": 4} | (vision or {})
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    CLIPImageProcessor(**(resize or {"size": {"shortest_edge": 32}, "crop_size": 32})).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("settings", "save"),
    [
        ({}, {}),
        ({"hidden_act": "gelu", "layer_norm_eps": 1e-6}, {"max_shard_size": "100KB"}),
        ({"hidden_act": "gelu_new"}, {"pickle": True}),
        ({"hidden_act": "gelu_pytorch_tanh", "intermediate_size": 96}, {}),
    ],
)
def test_features_are_those_of_transformers(tmp_path, settings, save):
    pickled = save.pop("pickle", False)
    theirs = clip_of_transformers(tmp_path, settings, settings, **save)
    if pickled:
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    ours, report = open_model(tmp_path)
    assert "converted" in str(report)
    images, _ = tiny.batch(ours, 3)
    tokens = ours.tokenize(CAPTIONS)
    got = features(ours, images, tokens)
    with torch.no_grad():
        pixels = (images - ours.pixel_mean) / ours.pixel_std
        whole = theirs(input_ids=tokens, pixel_values=pixels)
    want = whole.image_embeds, whole.text_embeds
    for one, other in zip(got, want, strict=True):
        assert (one - F.normalize(other, dim=-1)).abs().max() < 1e-5
    assert ours.export_state()["logit_scale"] == theirs.logit_scale


def test_a_tokenizer_of_its_own_travels_along(tmp_path):
    """Another vocabulary, and the end of text at another place in it than the largest."""
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in ("a", "dog", "cat", "red"))]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    )
    theirs = clip_of_transformers(tmp_path, {"vocab_size": 6, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1})
    ours, report = open_model(tmp_path)
    assert "has a tokenizer of its own" in str(report)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    captions = ["a", "a a", "a a a a"]
    inputs = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        want = theirs.get_text_features(**inputs)
        want = F.normalize(getattr(want, "pooler_output", want), dim=-1)
        assert (ours.encode_text(ours.tokenize(captions)) - want).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("resize", "mode", "filters"),
    [
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2}, "squash", "bilinear"),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, "shortest", "bicubic"),
    ],
)
def test_preprocessing_is_read(tmp_path, resize, mode, filters):
    clip_of_transformers(tmp_path, resize=resize | {"image_mean": [0.1, 0.2, 0.3]})
    cfg = open_model(tmp_path)[0].spec.preprocess_cfg
    assert (cfg["resize_mode"], cfg["interpolation"], cfg["mean"]) == (mode, filters, [0.1, 0.2, 0.3])


def test_pictures_are_normalised_as_the_folder_says(tmp_path):
    clip_of_transformers(
        tmp_path,
        resize={
            "do_normalize": False,
            "size": {"shortest_edge": 32},
            "crop_size": 32,
            "rescale_factor": 0.003921568859368563,
        },
    )
    pixels = torch.arange(3 * 32 * 32, dtype=torch.uint8).view(32, 32, 3)
    want = CLIPImageProcessor.from_pretrained(tmp_path)(pixels.numpy(), return_tensors="pt")["pixel_values"]
    model = open_model(tmp_path)[0]
    assert (model._pixels(pixels.permute(2, 0, 1)[None]) - want).abs().max() < 1e-5
    clip_of_transformers(tmp_path, resize={"do_resize": False, "size": {"shortest_edge": 32}, "crop_size": 32})
    assert "does not resize pictures" in str(open_model(tmp_path)[1])


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "architectures", 5),
        ("config.json", "architectures", ["CLIPForImageClassification"]),
        ("config.json", "projection_dim", "wide"),
        ("config.json", "text_config", [1]),
        ("config.json", "vision_config", {"hidden_size": 0}),
        ("config.json", "vision_config", {"num_attention_heads": 5}),
        ("config.json", "auto_map", {"AutoModel": "evil.Evil"}),
        ("preprocessor_config.json", "resample", [3]),
        ("preprocessor_config.json", "resample", 0),
        ("preprocessor_config.json", "image_std", [0, 0, 0]),
        ("preprocessor_config.json", "do_rescale", False),
        ("preprocessor_config.json", "rescale_factor", 1.0),
        ("preprocessor_config.json", "rescale_factor", "1/255"),
        ("tokenizer.json", "model", {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]]}),
        ("preprocessor_config.json", "crop_size", {"height": 24, "width": 24}),
    ],
)
def test_odd_settings_of_transformers_are_one_line(tmp_path, file, key, value):
    clip_of_transformers(tmp_path)
    whole = json.loads((tmp_path / file).read_text()) if (tmp_path / file).is_file() else {}
    (tmp_path / "vocab.json").unlink(missing_ok=True)  # tokenizer.json is looked at where it is alone
    (tmp_path / file).write_text(json.dumps(whole | {key: value}))
    with pytest.raises(UserError):
        open_model(tmp_path)


def test_another_model_of_transformers_is_named(tmp_path):
    from transformers import BertConfig, CLIPVisionConfig, SiglipConfig

    for config, word in ((BertConfig(), "bert"), (CLIPVisionConfig(), "clip_vision_model"), (SiglipConfig(), "siglip")):
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"not of a CLIP model.*{word}"):
            open_model(tmp_path)


# ---- nothing there, or something else -------------------------------------------------------------------------------


def test_what_lies_there_instead_is_said(tmp_path, places, architecture):
    _, described, bare = places
    for name in ("empty", "shards", "adapter", "sentences/0_CLIPModel", "several"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "shards/manifest.json").write_text('{"shards": []}')
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    (tmp_path / "sentences/modules.json").write_text("[]")
    (tmp_path / "sentences/0_CLIPModel/config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    for name in ("one.pt", "two.pt"):
        torch.save({}, tmp_path / "several" / name)
    for path, words in {
        "none": "is missing; expected a run",
        "none.pt": "is missing",
        "empty": "holds no model",
        "shards": "a corpus of shards",
        "adapter": "an adapter of peft",
        "sentences": "sentence-transformers; its CLIP lies in 0_CLIPModel",
        "several": "one.pt, two.pt without",
        "notes.txt": "no file of weights",
    }.items():
        with pytest.raises(UserError, match=words):
            open_model(tmp_path / path)
    for path, words in {
        "hf-hub:timm/vit": "nothing is fetched",
        "https://host/model.pt": "nothing is fetched",
        f"{described['run']}/checkpoints/step-000000003/rank-00000-of-00002.safetensors": "one rank's part",
        bare["flat.bin"]: "the architecture of weights file .* is not known; got tensors of none",
    }.items():
        with pytest.raises(UserError, match=words):
            open_model(path)
    with pytest.raises(UsageError, match="which has its own"):
        open_model(described["export"], architecture=architecture)
    with pytest.raises(UserError, match="expected a run or checkpoint"):
        open_model(described["export"], ema=True)


def test_a_bare_file_fits_what_its_tensors_fit():
    with torch.device("meta"):
        of = {name: open_clip.CLIP(**open_clip.get_model_config(name)) for name in ("ViT-B-32", "ViT-B-32-256")}
    found = {name: architectures_of(model.state_dict()) for name, model in of.items()}
    assert found == {"ViT-B-32": ["ViT-B-32", "ViT-B-32-quickgelu"], "ViT-B-32-256": ["ViT-B-32-256"]}


@pytest.mark.parametrize("said", [None, "gelu", "quick_gelu"])
def test_an_architecture_is_guessed_where_it_is_one(tmp_path, monkeypatch, said):
    """`ViT-S-32` would do; the tiny towers stand in for two architectures that differ in what weights do not tell."""
    cfgs = {"small": tiny.MODEL_CFG, "small-quickgelu": tiny.MODEL_CFG | {"quick_gelu": True}}
    monkeypatch.setattr(open_clip, "list_models", lambda: list(cfgs))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(cfgs[name]))
    path = tmp_path / "weights.safetensors"
    save_file(weights(tiny.build()), path, metadata={"activation": said} if said else None)
    if said is None:
        with pytest.raises(UserError, match=r"tensors that fit small, small-quickgelu; .* --architecture NAME"):
            open_model(path)
        return
    model, report = open_model(path)
    assert model.spec.name == {"gelu": "small", "quick_gelu": "small-quickgelu"}[said]
    assert "fit one architecture of open_clip alone" in str(report)


# ---- what weights do not tell ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"quick_gelu": True},
        {"vision_cfg__head_width": 8},
        {"text_cfg__heads": 4},
        {"text_cfg__no_causal_mask": True, "custom_text": True},
        {"text_cfg__pool_type": "last"},
        {"vision_cfg__pool_type": "avg"},
        {"vision_cfg__norm_kwargs": {"eps": 1e-6}},
        {"text_cfg__act_kwargs": {"approximate": "tanh"}},
        {"text_cfg__tokenizer_kwargs": {"clean": "canonicalize"}},
    ],
    ids=str,
)
def test_weights_that_say_how_they_compute_start_nothing_that_computes_otherwise(tmp_path, places, change):
    _, described, _ = places
    other = architecture_with(tmp_path / "other.json", **change)
    for name in ("run", "export", "bin", "transformers"):
        config = config_with(described[name], other)
        with pytest.raises(UserError, match="would compute other features"):
            load_init(make_model(config), config)


def test_a_file_that_names_its_activation_is_held_to_it(tmp_path, architecture):
    quick = architecture_with(tmp_path / "quick.json", quick_gelu=True)
    path = tmp_path / "weights.safetensors"
    for said, fits, not_fits in (("gelu", architecture, quick), ("quick_gelu", quick, architecture)):
        save_file(weights(tiny.build()), path, metadata={"activation": said})
        assert "warning" not in str(open_model(path, architecture=fits)[1])
        with pytest.raises(UserError, match="another activation"):
            open_model(path, architecture=not_fits)
        config = config_with(str(path), not_fits)
        with pytest.raises(UserError, match="another activation"):
            load_init(make_model(config), config)


def test_a_file_that_does_not_name_it_is_warned_of(tmp_path, architecture):
    torch.save(weights(tiny.build()), tmp_path / "weights.pt")
    config = config_with(str(tmp_path / "weights.pt"), architecture)
    for report in (open_model(config.model.init, architecture=architecture)[1], load_init(make_model(config), config)):
        assert "warning: weights file" in str(report)
        assert "does not say with which activation" in str(report)


def test_an_export_that_contradicts_itself_is_refused(tmp_path):
    export_model(tiny.build(), tmp_path / "out", ["open_clip"], verify=False)
    path = tmp_path / "out/open_clip_config.json"
    path.write_text(path.read_text().replace('"quick_gelu": false', '"quick_gelu": true'))
    with pytest.raises(UserError, match="another activation"):
        open_model(tmp_path / "out")


def test_other_preprocessing_is_warned_of(tmp_path, places):
    _, described, _ = places
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**tiny.MODEL_CFG, "preprocess_cfg": tiny.SPEC.preprocess_cfg | {"mean": [0.1] * 3}}))
    config = config_with(described["run"], str(path))
    assert "warning: checkpoint" in str(load_init(make_model(config), config))


def test_the_bias_of_the_sigmoid_loss_may_be_missing_still(places, architecture):
    _, described, _ = places
    config = config_with(described["export"], architecture, "sigmoid")
    model = make_model(config)
    assert load_init(model, config).missing == ["logit_bias"]
    assert isinstance(model, DualEncoder)
    assert open_weights(described["export"]).state.keys() == tiny.build().export_state().keys()


def test_towers_of_another_size_are_resized_and_said(tmp_path, places):
    _, described, _ = places
    larger = architecture_with(tmp_path / "larger.json", vision_cfg__image_size=64, text_cfg__context_length=20)
    path = json.loads((tmp_path / "larger.json").read_text())
    path["preprocess_cfg"] = {**tiny.SPEC.preprocess_cfg, "size": 64}
    (tmp_path / "larger.json").write_text(json.dumps(path))
    config = config_with(described["run"], larger)
    report = load_init(make_model(config), config)
    assert report.resized == ["positional_embedding", "visual.positional_embedding"]
    assert replace(report, notes=[]).missing == []
