"""Model folders from anywhere: what they ask of open_clip, timm and transformers is on a list, or refused."""

import copy
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import BertConfig, BertTokenizer, RobertaConfig

import checkpoints
import tiny
from data_tools.errors import UserError
from model_files import WORDS, write_tokenizer
from pretrain.engine.weights import describe, load_trained
from pretrain.export.writer import export_model
from pretrain.towers.allowed import Architecture, check_model
from pretrain.towers.build import build_model
from pretrain.towers.hf_text import allowed_folder
from pretrain.towers.spec import resolve_spec

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import BertTokenizerFast
class Evil(BertTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    export_model(tiny.build(), folder, ["open_clip"], verify=False)
    return folder


@pytest.fixture
def export(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "export")


def change(path, *keys, value):
    """Set what a JSON says at `keys`."""
    whole = json.loads(path.read_text())
    inside = whole
    for key in keys[:-1]:
        inside = inside.setdefault(key, {})
    inside[keys[-1]] = value
    path.write_text(json.dumps(whole))


# ---- code -----------------------------------------------------------------------------------------------------------


def plant(folder, marker):
    """A tokenizer that transformers runs Python for, if it is allowed to."""
    write_tokenizer(folder)
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    change(folder / "tokenizer_config.json", "auto_map", value={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    change(folder / "tokenizer_config.json", "tokenizer_class", value="Evil")


def test_the_attack_runs_code_where_open_clip_is_asked_alone(export, tmp_path):
    """The same folder through open_clip itself: the tests below would notice."""
    plant(export, tmp_path / "ran")
    change(export / "open_clip_config.json", "model_cfg", "text_cfg", "hf_tokenizer_name", value="x")
    change(
        export / "open_clip_config.json", "model_cfg", "text_cfg", "tokenizer_kwargs", value={"trust_remote_code": True}
    )
    open_clip.get_tokenizer(f"local-dir:{export}")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kwargs", [None, {}, {"trust_remote_code": True}, {"code_revision": "main"}])
@pytest.mark.parametrize("way", ["export", "checkpoint", "json"])
def test_no_code_of_a_model_folder_is_run(export, tmp_path, way, kwargs):
    plant(export, tmp_path / "ran")
    text_cfg = {"hf_tokenizer_name": str(export), "tokenizer_kwargs": kwargs, "pool_type": "last"}
    for key, value in text_cfg.items():
        change(export / "open_clip_config.json", "model_cfg", "text_cfg", key, value=value)
    description = copy.deepcopy(describe(tiny.SPEC))
    description["spec"]["model_cfg"]["text_cfg"] |= text_cfg
    run = checkpoints.write(tmp_path / "run", 1, description=description)
    open_it = {
        "export": lambda: load_trained(export),
        "checkpoint": lambda: load_trained(run),
        "json": lambda: build_model(str(export / "open_clip_config.json"), 0),
    }
    with pytest.raises(UserError, match=r"tokenizer_kwargs|auto_map"):
        open_it[way]()
    assert not (tmp_path / "ran").exists()


# ---- settings -------------------------------------------------------------------------------------------------------

REFUSED = {
    ("vision_cfg", "timm_model_name"): [
        "hf-hub:timm/vit",
        "hf_hub:timm/vit",
        "local-dir:/x",
        "a/b",
        "",
        3,
        "no_such_model",
    ],
    ("vision_cfg", "timm_model_path"): ["x"],
    ("vision_cfg", "width"): [0, -32, 3.5, "32", True, None, 1 << 40, [32], math_nan := float("nan")],
    ("vision_cfg", "head_width"): [0, 24, 64],
    ("vision_cfg", "layers"): [0, 10**9, [1, 2, 3]],
    ("vision_cfg", "patch_size"): [0, 64, [16, 16, 16]],
    ("vision_cfg", "image_size"): [0, 8, -1, 10**6, [32, 64], "32"],
    ("vision_cfg", "patch_dropout"): [1, 1.0, -0.1],
    ("vision_cfg", "pool_type"): ["none", "cls"],
    ("vision_cfg", "act_kwargs"): [{"inplace": True}, {"approximate": "fast"}, "tanh"],
    ("text_cfg", "norm_kwargs"): [{"eps": 0}, {"device": "cuda"}, {"eps": math_nan}],
    ("text_cfg", "width"): [0, 33],
    ("text_cfg", "heads"): [0, 5],
    ("text_cfg", "vocab_size"): [0, 10, 49407, 10**12],
    ("text_cfg", "context_length"): [0, 2, 10**9],
    ("text_cfg", "pool_type"): ["none", "max"],
    ("text_cfg", "tokenizer_kwargs"): [
        *({"trust_remote_code": True}, {"bpe_path": "/etc/hostname"}, {"reduction_mask": "syntax"}),
        *(
            {"additional_special_tokens": ["(a+)+$"]},
            {"clean": "x"},
            {"cache_dir": "x"},
            ["clean"],
            {"use_fast": False},
        ),
    ],
    ("text_cfg", "tokenizer_mode"): ["bert_clips"],
    ("text_cfg", "hf_tokenizer_name"): ["hf-hub:a/b", "bert-base-uncased", "", 3, "a\0b"],
    ("text_cfg", "hf_model_name"): ["roberta-base", "hf-hub:a/b", 3],
    ("text_cfg", "hf_pooler_type"): ["max_pooler"],
    ("text_cfg", "run"): [1],
    ("text_cfg", "embed_cls"): [True],
    ("text_cfg", "proj_type"): ["none", "mlp"],
    ("vision_cfg",): [None, [], "ViT", {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32}],
    ("embed_dim",): [0, "24", None, 1 << 40],
    ("quick_gelu",): [1, "yes"],
    ("init_logit_scale",): [math_nan, 1e9, "2"],
    ("multimodal_cfg",): [{}],
    ("cast_dtype",): ["fp16"],
}


@pytest.mark.parametrize("keys", REFUSED, ids=".".join)
def test_what_no_file_may_set_is_named(tmp_path, keys):
    for number, value in enumerate(REFUSED[keys]):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(tiny.MODEL_CFG))
        change(path, *keys, value=value)
        with pytest.raises(UserError) as caught:
            build_model(str(path), 0)
        assert "Traceback" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", ["size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color", "run"])
def test_preprocessing_too(export, key):
    odd = {"mean": [0.5], "std": [0, 1, 1], "size": 0, "mode": "L", "interpolation": "random", "resize_mode": "longest"}
    change(export / "open_clip_config.json", "preprocess_cfg", key, value=odd.get(key, "x"))
    with pytest.raises(UserError, match=f"preprocess_cfg.{key}"):
        load_trained(export)


def test_the_type_of_an_architecture_has_the_settings_that_a_file_may_set():
    """A type checker believes `Architecture`; what `check_model` lets through is another list."""
    with pytest.raises(UserError) as caught:
        check_model({"no_such": 1}, "a file")
    allowed = str(caught.value).split("a file may set ")[1]
    assert set(allowed.split(", ")) == set(Architecture.__annotations__)


def test_every_architecture_of_open_clip_is_allowed():
    """The lists are right where they let all of them through that are two towers and need nothing from a hub."""
    refused = []
    for name in open_clip.list_models():
        try:
            resolve_spec(name)
        except UserError as error:
            refused.append((name, str(error)))
    assert all("not a plain dual encoder" in words or "is not on this machine" in words for _, words in refused)
    assert len(open_clip.list_models()) - len(refused) > 100


# ---- text towers of transformers ------------------------------------------------------------------------------------


def text_model(folder, config, **text_cfg):
    config.save_pretrained(folder)
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["text_cfg"] = {"hf_model_name": str(folder), "hf_proj_type": "linear", "context_length": 8, **text_cfg}
    (folder / "model.json").write_text(json.dumps(cfg))
    return folder / "model.json"


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModel": "evil.Evil"}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("model_type", "evil"),
        ("model_type", "llama"),
        ("model_type", None),
        ("hidden_size", 10**9),
        ("num_hidden_layers", -1),
        ("hidden_act", "evil"),
        ("vocab_size", "many"),
    ],
)
def test_a_text_config_that_asks_for_more_is_refused(tmp_path, key, value):
    path = text_model(tmp_path, RobertaConfig(vocab_size=49408, pad_token_id=0, **SIZES))
    assert build_model(str(path), 0).clip.text.config.model_type == "roberta"
    change(tmp_path / "config.json", key, value=value)
    with pytest.raises(UserError):
        build_model(str(path), 0)


def test_what_a_text_config_says_besides_does_not_reach_transformers(tmp_path):
    path = text_model(tmp_path, BertConfig(vocab_size=49408, **SIZES))
    change(tmp_path / "config.json", "attn_implementation", value="someone/kernels")
    change(tmp_path / "config.json", "_name_or_path", value="someone/else")
    with allowed_folder(str(tmp_path)) as folder:
        kept = BertConfig.from_pretrained(folder)
        assert set(json.loads((Path(folder) / "config.json").read_text())) <= kept.to_dict().keys() | {"is_decoder"}
        assert {"attn_implementation", "_name_or_path", "architectures"}.isdisjoint(
            json.loads((Path(folder) / "config.json").read_text())
        )
    assert kept.hidden_size == 32
    assert build_model(str(path), 0).clip.text.config.hidden_size == 32


# ---- towers, tokenizer and machine that do not fit ------------------------------------------------------------------


def with_tokenizer(folder, words=WORDS, vocab_size=None, **text_cfg):
    """The tiny towers with a BERT-like tokenizer."""
    write_tokenizer(folder, words)
    cfg = copy.deepcopy(tiny.MODEL_CFG)
    cfg["text_cfg"] |= {"hf_tokenizer_name": str(folder), "vocab_size": vocab_size or len(words), **text_cfg}
    cfg["custom_text"] = "embed_cls" in text_cfg
    (folder / "architecture.json").write_text(json.dumps(cfg))
    return str(folder / "architecture.json")


LAST = ("[PAD]", "[UNK]", "[CLS]", "[MASK]", "a", "dog", "red", "cat", "[SEP]")


@pytest.mark.parametrize(
    ("words", "text_cfg", "fits"),
    [
        (WORDS, {}, "eos with text_cfg.eos_id = 3"),  # pooled at the largest id: of "a cat" and "red cat" at "cat"
        (WORDS, {"pool_type": "eos", "eos_id": 2}, "token 3"),  # [CLS], with which every text begins
        (WORDS, {"pool_type": "eos"}, "token 3"),  # open_clip's default, 2
        (WORDS, {"pool_type": "eos", "eos_id": 8}, "token 3"),
        (WORDS, {"pool_type": "first"}, "argmax, eos or last"),
        (WORDS, {"pool_type": "eos", "eos_id": 3, "vocab_size": 8}, "more than its largest, 8"),
        (WORDS, {"embed_cls": True, "pad_id": 1}, "0"),
        (WORDS, {"embed_cls": True}, None),
        (WORDS, {"pool_type": "eos", "eos_id": 3}, None),
        (WORDS, {"pool_type": "last", "no_causal_mask": True}, None),
        (WORDS, {"pool_type": "first", "no_causal_mask": True}, None),
        (WORDS, {"pool_type": "eos", "eos_id": 3, "vocab_size": 100}, None),
        (LAST, {}, None),
        (LAST, {"pool_type": "eos", "eos_id": 8}, None),
    ],
)
@torch.no_grad()
def test_a_tower_that_pools_elsewhere_than_its_tokenizer_ends_texts_is_refused(tmp_path, words, text_cfg, fits):
    path = with_tokenizer(tmp_path, words, **text_cfg)
    if fits is not None:
        with pytest.raises(UserError, match="does not fit its tokenizer") as caught:
            build_model(path, 0)
        assert f"expected {fits}" in str(caught.value)
        return
    model = build_model(path, 0).eval()
    features = model.encode_text(model.tokenize(["a red dog", "a cat dog", "a dog dog", "cat"]))
    assert (features @ features.T - torch.eye(4)).max() < 1 - 1e-5


def test_open_clips_own_tokenizer_is_held_to_the_same(tmp_path):
    for text_cfg, fits in (
        ({"pool_type": "eos"}, "token 49407"),
        ({"pool_type": "first"}, "argmax, eos or last"),
        ({"vocab_size": 49407}, "more than its largest, 49407"),
    ):
        path = tmp_path / "model.json"
        path.write_text(json.dumps(tiny.MODEL_CFG | {"text_cfg": tiny.MODEL_CFG["text_cfg"] | text_cfg}))
        with pytest.raises(UserError, match=fits):
            build_model(str(path), 0)


@pytest.mark.parametrize(
    ("config", "text_cfg", "fits"),
    [
        ({"vocab_size": 8}, {}, "more than its largest, 8"),
        ({"pad_token_id": 1}, {}, "0, its padding"),  # padding would be attended to, and [UNK] would not
        ({"max_position_embeddings": 8}, {"context_length": 9}, "at most 8"),
        ({}, {"hf_tokenizer_name": None}, "more than its largest, 49407"),
        ({}, {}, None),
    ],
)
def test_so_are_text_towers_of_transformers(tmp_path, config, text_cfg, fits):
    write_tokenizer(tmp_path)
    sizes = {"vocab_size": 9, "pad_token_id": 0, **SIZES} | config
    path = text_model(tmp_path, BertConfig(**sizes), **{"hf_tokenizer_name": str(tmp_path)} | text_cfg)
    if fits is None:
        build_model(str(path), 0)
        return
    with pytest.raises(UserError, match=f"does not fit its tokenizer.*{fits}"):
        build_model(str(path), 0)


def test_the_files_are_a_tokenizer_of_transformers(tmp_path):
    write_tokenizer(tmp_path)
    assert BertTokenizer.from_pretrained(tmp_path)("a red dog").input_ids == [2, 5, 7, 6, 3]


def test_a_tokenizer_without_padding_is_said_to_lack_it(tmp_path):
    path = with_tokenizer(tmp_path, pool_type="last")
    change(tmp_path / "tokenizer_config.json", "pad_token", value=None)
    with pytest.raises(UserError, match="with a padding token"):
        build_model(path, 0)


def test_a_model_larger_than_memory_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(tiny.MODEL_CFG))
    change(path, "vision_cfg", value={"image_size": 32, "layers": 500, "width": 65536, "patch_size": 16})
    with pytest.raises(UserError, match=r"larger than this machine's memory; got 96,\d+\.\d GiB"):
        build_model(str(path), 0)


def test_looking_at_the_memory_draws_no_random_numbers():
    torch.manual_seed(3)
    want = open_clip.CLIP(**tiny.MODEL_CFG).state_dict()
    got = tiny.build(3).export_state()
    assert all(torch.equal(want[key], got[key]) for key in want)
