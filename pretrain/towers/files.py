"""Reading the small files beside a model's weights, whoever wrote them."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

from data_tools.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")  # of files of weights
_LARGEST_JSON = 64 << 20  # bytes; a tokenizer's vocabulary is the largest that a model has


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        UserError: no file, too large a one, not JSON, or no object.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device would never end
            raise UserError(f"{path} is not a file")
        if found.st_size > _LARGEST_JSON:
            raise UserError(f"{path} is too large", got=f"{found.st_size} bytes", expected=f"<= {_LARGEST_JSON}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read", got=error.strerror) from None
    except RecursionError:
        raise UserError(f"{path} is not JSON that can be read", got="too many brackets in each other") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON", got=error) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", got=type(value).__name__)
    return value


def is_number(value: object) -> TypeGuard[int]:
    """Whether a value of a JSON is a whole number: there true and 1.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def few(names: Sequence[str]) -> str:
    """The first of `names`, for a message; "none" of none."""
    return "none" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def weights_files(folder: Path) -> list[Path]:
    """The files with weights of a model's folder, the preferred one first: all of them parts if it is an index.

    Raises:
        UserError: an index that names files outside the folder.
    """
    for name in _WEIGHTS:
        path = folder / name
        if path.is_file() and path.suffix == ".json":
            parts = read_json(path).get("weight_map")
            names = sorted(set(parts.values())) if isinstance(parts, dict) and all(map(_plain, parts.values())) else []
            if not names:
                raise UserError(f"{path} is no index of weights", expected="names of files beside it")
            return [folder / part for part in names]
        if path.is_file():
            return [path]
    return []


def _plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


# open_clip's own names before those of transformers: an export for both has both.
_WEIGHTS = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth"),
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pth", "model.pth"),
)
