"""A folder of transformers' CLIPModel as towers of open_clip: architecture, preprocessing, tokenizer, weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from open_clip import SimpleTokenizer

from data_tools.errors import UserError
from pretrain.towers.allowed import check_clip_config
from pretrain.towers.files import is_number, read_json
from pretrain.towers.spec import ModelSpec, refuse_code, spec_of

CONFIG = "config.json"
_SPECIAL = {"<|startoftext|>": "<start_of_text>", "<|endoftext|>": "<end_of_text>"}  # transformers' name: open_clip's
_TANH = ("gelu_new", "gelu_pytorch_tanh")  # names of one activation
_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_OLD_END = 2  # configs from before transformers 4.31 name a wrong end token; of these it pools at the largest


def read_transformers_clip(folder: Path) -> tuple[ModelSpec, list[str]]:
    """The spec of a transformers CLIP folder, and warnings about what it leaves open.

    Raises:
        UserError: another model than CLIP, code of its own, or settings that open_clip's towers do not have.
    """
    path = folder / CONFIG
    refuse_code(path)
    text, vision, embed_dim = _config(read_json(path), str(path))
    if text["hidden_act"] != vision["hidden_act"]:
        got = f"{vision['hidden_act']} for images, {text['hidden_act']} for texts"
        raise UserError(f"{path} has two activations", got=got, expected="one for both towers")
    act_kwargs = {"act_kwargs": {"approximate": "tanh"}} if text["hidden_act"] in _TANH else {}
    tokenizer, notes = _tokenizer(folder, text["vocab_size"])
    model_cfg = {
        "embed_dim": embed_dim,
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": _divided(path, "vision_config", vision),
            **_tower(vision, act_kwargs),
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "heads": text["num_attention_heads"],
            **_tower(text, act_kwargs),
            **tokenizer,
        },
    }
    if tokenizer and text["eos_token_id"] != _OLD_END:
        model_cfg["text_cfg"] |= {"pool_type": "eos", "eos_id": text["eos_token_id"]}
    preprocess, more = _preprocess(folder, vision["image_size"])
    return spec_of(folder.absolute().name, model_cfg, preprocess, str(folder)), notes + more


def _config(config: dict, where: str) -> tuple[dict, dict, int]:
    """(text settings, image settings, width of the embedding), with transformers' own defaults for what is not said."""
    if config.get("model_type") != "clip" or config.get("architectures") not in (None, [], ["CLIPModel"]):
        raise UserError(
            f"{where} is not of a CLIP model of transformers",
            got=f"model_type {config.get('model_type')!r}, architectures {config.get('architectures')!r}",
            expected="model_type 'clip', architectures ['CLIPModel']: an image and a text tower",
        )
    from transformers import CLIPTextConfig, CLIPVisionConfig  # late: a second that other models do not need

    whole = []
    for name, defaults in (("text_config", CLIPTextConfig()), ("vision_config", CLIPVisionConfig())):
        parts = [config.get(key) or {} for key in (name, f"{name}_dict")]  # old configs have either, or both
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{where} has no {name}", got=config.get(name), expected="settings by name")
        whole.append(check_clip_config(defaults.to_dict() | parts[0] | parts[1], f"{where}: {name}"))
    return (*whole, config.get("projection_dim", 512))


def _tower(values: dict, act_kwargs: dict) -> dict:
    eps = {} if values["layer_norm_eps"] == 1e-5 else {"norm_kwargs": {"eps": values["layer_norm_eps"]}}
    width, inner = values["hidden_size"], values["intermediate_size"]
    ratio = inner / width
    if int(width * ratio) != inner:  # as open_clip counts
        ratio = math.nextafter(ratio, math.inf)
    return {"width": width, "layers": values["num_hidden_layers"], "mlp_ratio": ratio, **act_kwargs, **eps}


def _divided(path: Path, name: str, values: dict) -> int:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise UserError(f"{path}: {name} has no whole heads", got=f"{heads} heads", expected=f"a divisor of {width}")
    return width // heads


def _tokenizer(folder: Path, vocab_size: int) -> tuple[dict, list[str]]:
    """Settings of the tokenizer: none where the folder has CLIP's own, which open_clip brings along."""
    clips = SimpleTokenizer().encoder
    vocabulary = _vocabulary(folder)
    if vocabulary is None:
        return {}, [f"{folder} has no tokenizer: CLIP's own is taken"]
    if {_SPECIAL.get(token, token): number for token, number in vocabulary.items()} == clips:
        return {}, []
    return {"hf_tokenizer_name": str(folder)}, [f"{folder} has a tokenizer of its own, which is taken"]


def _vocabulary(folder: Path) -> dict | None:
    for name in ("vocab.json", "tokenizer.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            model = values.get("model")
            found = values if name == "vocab.json" else model.get("vocab") if isinstance(model, dict) else None
            return found if isinstance(found, dict) else {}  # of other kinds of tokenizers it is a list
    return {} if (folder / "tokenizer_config.json").is_file() else None


def _preprocess(folder: Path, size: int) -> tuple[dict, list[str]]:
    values = _image_processor(folder)
    if values is None:
        return {}, [f"{folder} does not say how pictures are made ready: as CLIP's are"]
    crop, resized = (_side(values.get(key, size)) for key in ("crop_size", "size"))
    squash = not values.get("do_center_crop", True)
    if crop != size and not squash:
        raise UserError(f"{folder} crops pictures to another size than its towers take", got=crop, expected=size)
    notes = [] if resized == size else [f"{folder} resizes pictures to {resized} before it crops {size}: not followed"]
    resample = values.get("resample", 3)
    filters = _FILTERS.get(resample) if is_number(resample) else None
    if filters is None:
        raise UserError(f"{folder} resizes pictures in a way that is not known here", got=resample)
    kept = {key: values[f"image_{key}"] for key in ("mean", "std") if values.get(f"image_{key}") is not None}
    if values.get("do_normalize") is False:
        kept = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1
    if not isinstance(factor, int | float) or abs(255 * factor - 1) > 1e-3:
        got = f"do_rescale {values.get('do_rescale', True)}, rescale_factor {values.get('rescale_factor')}"
        raise UserError(f"{folder} scales pixels in a way that is not known here", got=got, expected="1/255")
    if values.get("do_resize") is False:
        notes.append(f"{folder} does not resize pictures before it crops {size}: not followed, they are resized")
    return {**kept, "interpolation": filters, "resize_mode": "squash" if squash else "shortest"}, notes


def _image_processor(folder: Path) -> dict | None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            inside = values.get("image_processor")
            return inside if isinstance(inside, dict) else values
    return None


def _side(size: object) -> object:
    """The pixels that a processor's size means: a number, the shortest edge, or a square."""
    if not isinstance(size, dict):
        return size
    square = size.get("height") if size.get("height") == size.get("width") else None
    return size.get("shortest_edge", square)


def is_transformers(state: dict[str, torch.Tensor]) -> bool:
    """Whether tensors have the names that transformers gives those of a CLIP."""
    return any(key.startswith(("vision_model.", "text_model.")) for key in state)
