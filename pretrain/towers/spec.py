"""What a pair of towers is: architecture, preprocessing and tokenizer, all from files on this machine."""

from __future__ import annotations

import copy
import difflib
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg

from data_tools.errors import UserError
from pretrain.towers.allowed import Architecture, Preprocess, check_model, check_preprocess
from pretrain.towers.files import read_json

_LONGEST_NAME = 255
CACHED_WORDS = 1 << 17  # some 20 to 30 MB in each process


@dataclass(frozen=True)
class ModelSpec:
    """An open_clip architecture with its preprocessing; enough to rebuild the towers, the transform and the tokenizer.

    `model_cfg` is the architecture JSON verbatim. What comes from a file becomes a spec through `spec_of` alone.
    """

    name: str
    model_cfg: Architecture
    preprocess_cfg: Preprocess

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        size = self.preprocess_cfg["size"]
        return size if isinstance(size, int) else size[0]

    @property
    def context_length(self) -> int:
        """Tokens of a text, start and end included."""
        return self.model_cfg["text_cfg"].get("context_length", 77)


@dataclass
class Tokenizer:
    """The architecture's tokenizer: `list[str]` -> int64 `[n, context_length]`. Each process builds its own."""

    text_cfg: str  # JSON, so that the value hashes
    context_length: int
    _built: SimpleTokenizer | HFTokenizer | None = field(default=None, repr=False, compare=False)

    @property
    def library(self) -> SimpleTokenizer | HFTokenizer:
        """open_clip's tokenizer behind this one. Raises UserError where it cannot be read."""
        if self._built is None:
            self._built = _build_tokenizer(self.text_cfg, self.context_length)
        return self._built

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return self.library(texts)

    def __getstate__(self) -> dict:
        return {"text_cfg": self.text_cfg, "context_length": self.context_length, "_built": None}


def tokenizer_of(spec: ModelSpec, look: bool = True) -> Tokenizer:
    """The tokenizer of `spec`; raises UserError where its files are not on this machine, once it is used or, with
    `look`, at once."""
    text_cfg = spec.model_cfg["text_cfg"]
    hub_name = text_cfg.get("hf_tokenizer_name")
    if look and hub_name and not Path(hub_name).is_dir():
        raise UserError(
            f"the tokenizer of model {spec.name} is not on this machine",
            got=f"hf_tokenizer_name {hub_name!r}",
            expected="a local folder with the tokenizer's files",
            remedy="download it once and put its path into a copy of the model's JSON",
        )
    return Tokenizer(json.dumps(text_cfg, sort_keys=True), spec.context_length)


class _WordCache(dict[str, str]):
    """What SimpleTokenizer remembers of every word it met, emptied when it is full: captions never run out of words."""

    def __init__(self, special: dict[str, str], size: int):
        super().__init__(special)
        self._special, self._size = dict(special), size

    def __setitem__(self, word: str, pieces: str) -> None:
        if len(self) >= self._size:
            self.clear()
            self.update(self._special)
        super().__setitem__(word, pieces)


@functools.lru_cache(maxsize=4)
def _build_tokenizer(text_cfg: str, context_length: int) -> SimpleTokenizer | HFTokenizer:
    cfg = json.loads(text_cfg)
    clean = (cfg.get("tokenizer_kwargs") or {}).get("clean")
    extra = {} if clean is None else {"clean": clean}
    if cfg.get("hf_tokenizer_name"):
        return _from_folder(Path(cfg["hf_tokenizer_name"]), cfg, context_length, extra)
    tokenizer = SimpleTokenizer(context_length=context_length, **extra)
    tokenizer.cache = _WordCache(tokenizer.cache, CACHED_WORDS)
    return tokenizer


def _from_folder(folder: Path, cfg: dict, context_length: int, extra: dict) -> HFTokenizer:
    """The tokenizer that transformers reads from a folder: never from a hub, and no code that lies there is run."""
    refuse_code(folder / "tokenizer_config.json")
    mode, strip = cfg.get("tokenizer_mode"), (cfg.get("tokenizer_kwargs") or {}).get("strip_sep_token", False)
    extra |= {"tokenizer_mode": mode, "strip_sep_token": strip}
    try:
        tokenizer = HFTokenizer(
            str(folder), context_length=context_length, trust_remote_code=False, local_files_only=True, **extra
        )
        tokenizer(["a"])
    except Exception as error:  # transformers' and tokenizers' faults share no class
        raise UserError(
            f"the tokenizer in {folder} cannot be used",
            got=f"{type(error).__name__}: {error}",
            expected="the files that transformers' AutoTokenizer reads, with a padding token",
        ) from None
    return tokenizer


def refuse_code(config: Path) -> None:
    """Raises UserError where the JSON `config` of a transformers folder asks for Python of its own; no file: none."""
    values = read_json(config) if config.is_file() else {}
    for name in ("auto_map", "custom_pipelines", "quantization_config"):
        if values.get(name):
            raise UserError(
                f"{config} needs code that is not transformers' own", got=f"{name} {values[name]!r}", expected="none"
            )


def resolve_spec(name: str) -> ModelSpec:
    """The spec of an open_clip architecture name or of the path of an architecture JSON.

    Raises:
        UserError: unknown name (naming the nearest), unreadable JSON, settings that no file may set, parts that only a
            hub has, models that are not plain dual encoders.
    """
    path = Path(name)
    if path.suffix == ".json":
        model_cfg, name = read_json(path), path.stem
        if "model_cfg" in model_cfg:  # the open_clip_config.json of an export
            preprocess = model_cfg.get("preprocess_cfg", {})
            return spec_of(path.absolute().parent.name, model_cfg["model_cfg"], preprocess, f"model file {path}")
        where = f"model file {path}"
    else:
        model_cfg, where = copy.deepcopy(open_clip.get_model_config(name)), f"model {name}"
        if model_cfg is None:
            near = difflib.get_close_matches(name, open_clip.list_models(), 3)
            raise UserError(
                f"model {name!r} is unknown",
                expected="an open_clip architecture or the path of its JSON",
                remedy=f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()",
            )
    preprocess = model_cfg.pop("preprocess_cfg", {})
    return spec_of(name, model_cfg, preprocess, where)


def spec_of(name: object, model_cfg: object, preprocess_cfg: object, where: str) -> ModelSpec:
    """The spec of what a file says; `where`: the file, for messages. `preprocess_cfg` may lack settings.

    Raises:
        UserError: settings that no file may set (allowed.py), parts that are not here, models that are not plain dual
            encoders.
    """
    if not isinstance(name, str) or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise UserError(f"{where} has a name that cannot be printed", got=repr(name))
    if isinstance(model_cfg, dict) and ("multimodal_cfg" in model_cfg or "audio_cfg" in model_cfg):
        raise UserError(f"{where} is not a plain dual encoder", expected="an image and a text tower")
    model, given = check_model(model_cfg, where), check_preprocess(preprocess_cfg, where)
    size = model["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int) and size[0] != size[1]:
        raise UserError(f"{where} takes images that are not square", got=size)
    hub_name = model["text_cfg"].get("hf_model_name")
    if hub_name and not Path(hub_name).is_dir():
        raise UserError(
            f"the text tower of {where} is not on this machine",
            got=f"hf_model_name {hub_name!r}",
            expected="a local folder with its config and weights",
            remedy="download it once and put its path into a copy of the model's JSON",
        )
    said = {key: value for key, value in given.items() if value is not None}
    return ModelSpec(name, model, _preprocess({**said, "size": size}))  # as in open_clip, the tower's size counts


def _preprocess(said: dict[str, Any]) -> Preprocess:
    """With open_clip's defaults for what is not said, and lists as a JSON has them."""
    cfg = PreprocessCfg(**said)
    return {
        "size": list(cfg.size) if isinstance(cfg.size, tuple) else cfg.size,
        "mode": cfg.mode,
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "interpolation": cfg.interpolation,
        "resize_mode": cfg.resize_mode,
        "fill_color": list(cfg.fill_color) if isinstance(cfg.fill_color, tuple) else cfg.fill_color,
    }
