"""What a pair of towers is: architecture, preprocessing and tokenizer, all from files on this machine."""

from __future__ import annotations

import copy
import difflib
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import torch
from open_clip.transform import PreprocessCfg

from data_tools.errors import UserError

CACHED_WORDS = 1 << 17  # some 20 to 30 MB in each process


@dataclass(frozen=True)
class ModelSpec:
    """An open_clip architecture with its preprocessing; enough to rebuild the towers, the transform and the tokenizer.

    `model_cfg` is the architecture JSON verbatim; `preprocess_cfg` has size, mean, std, interpolation, resize_mode.
    """

    name: str
    model_cfg: dict
    preprocess_cfg: dict

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
    _built: object = field(default=None, repr=False, compare=False)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        if self._built is None:
            self._built = _build_tokenizer(self.text_cfg, self.context_length)
        return self._built(texts)

    def __getstate__(self) -> dict:
        return {"text_cfg": self.text_cfg, "context_length": self.context_length, "_built": None}


def tokenizer_of(spec: ModelSpec) -> Tokenizer:
    """The tokenizer of `spec`; raises UserError where its files are not on this machine."""
    text_cfg = spec.model_cfg["text_cfg"]
    hub_name = text_cfg.get("hf_tokenizer_name")
    if hub_name and not Path(hub_name).is_dir():
        raise UserError(
            f"the tokenizer of model {spec.name} is not on this machine",
            got=f"hf_tokenizer_name {hub_name!r}",
            expected="a local folder with the tokenizer's files",
            remedy="download it once and put its path into a copy of the model's JSON",
        )
    return Tokenizer(json.dumps(text_cfg, sort_keys=True), spec.context_length)


class _WordCache(dict):
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
def _build_tokenizer(text_cfg: str, context_length: int):
    cfg = json.loads(text_cfg)
    extra = cfg.get("tokenizer_kwargs", {})
    if cfg.get("hf_tokenizer_name"):
        return open_clip.tokenizer.HFTokenizer(cfg["hf_tokenizer_name"], context_length=context_length, **extra)
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=context_length, **extra)
    tokenizer.cache = _WordCache(tokenizer.cache, CACHED_WORDS)
    return tokenizer


def resolve_spec(name: str) -> ModelSpec:
    """The spec of an open_clip architecture name or of the path of an architecture JSON.

    Raises:
        UserError: unknown name (naming the nearest), unreadable JSON, parts that only a hub has, models that are not
            plain dual encoders.
    """
    path = Path(name)
    if path.suffix == ".json":
        model_cfg, name = _read_json(path), path.stem
    else:
        model_cfg = open_clip.get_model_config(name)
        if model_cfg is None:
            near = difflib.get_close_matches(name, open_clip.list_models(), 3)
            raise UserError(
                f"model {name!r} is unknown",
                expected="an open_clip architecture or the path of its JSON",
                remedy=f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()",
            )
    model_cfg = copy.deepcopy(model_cfg)
    _check_parts(name, model_cfg)
    size = model_cfg["vision_cfg"].get("image_size", 224)
    preprocess = PreprocessCfg(**{**model_cfg.pop("preprocess_cfg", {}), "size": size})
    return ModelSpec(name, model_cfg, {k: _plain(getattr(preprocess, k)) for k in _PREPROCESS_KEYS})


_PREPROCESS_KEYS = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _read_json(path: Path) -> dict:
    try:
        model_cfg = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"model file {path} cannot be read", got=error.strerror, remedy="check model.name") from None
    except json.JSONDecodeError as error:
        raise UserError(f"model file {path} is not JSON", got=str(error)) from None
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(model_cfg)
    if missing:
        raise UserError(f"model file {path} is not an open_clip architecture", got=f"no {', '.join(sorted(missing))}")
    return model_cfg


def _check_parts(name: str, model_cfg: dict) -> None:
    if "multimodal_cfg" in model_cfg or "audio_cfg" in model_cfg:
        raise UserError(f"model {name} is not a plain dual encoder", expected="an image and a text tower")
    size = model_cfg["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int) and size[0] != size[1]:
        raise UserError(f"model {name} takes images that are not square", got=size)
    hub_name = model_cfg["text_cfg"].get("hf_model_name")
    if hub_name and not Path(hub_name).is_dir():
        raise UserError(
            f"the text tower of model {name} is not on this machine",
            got=f"hf_model_name {hub_name!r}",
            expected="a local folder with its config and weights",
            remedy="download it once and put its path into a copy of the model's JSON",
        )
