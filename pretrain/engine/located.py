"""What a path means where a model is asked for."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from data_tools.errors import UserError
from pretrain.engine.committed import BEST, FOLDER, LATEST, MANIFEST, STATE
from pretrain.towers.files import SUFFIXES, read_json, weights_files

OPEN_CLIP = "open_clip_config.json"
TRANSFORMERS = "config.json"
TAKEN = (
    "a run, checkpoint or export folder, a folder of open_clip or of transformers' CLIP, or an open_clip weights file "
    f"({', '.join(SUFFIXES)})"
)
_LONGEST_NAME = 100
_LOCAL, _HUB = "local-dir:", ("hf-hub:", "hf_hub:", "http://", "https://", "s3://")


class Kind(Enum):
    """What lies at a path."""

    RUN = "run"
    CHECKPOINT = "checkpoint"
    OPEN_CLIP = "open_clip folder"
    TRANSFORMERS = "transformers folder"
    WEIGHTS = "weights file"


class Located(NamedTuple):
    """A place from which a model can be read: a folder, or of a bare weights file the file."""

    kind: Kind
    path: Path


def locate(name: str | Path) -> Located:
    """What the model `name` is: a path, with or without open_clip's `local-dir:`.

    Raises:
        UserError: nothing there, or nothing that holds a model; it says what was found instead.
    """
    text = str(name)
    if text.startswith(_HUB):
        raise UserError(
            f"model {text} is not on this machine",
            expected=TAKEN,
            remedy="nothing is fetched: download it once and give its folder",
        )
    path = Path(text.removeprefix(_LOCAL))
    if os.path.isdir(path):  # not the Path's own, which raises for a name that is too long
        return _folder(path)
    if path.name in (LATEST, BEST) and os.path.isfile(path) and path.parent.name == FOLDER:
        with path.open(errors="replace") as file:
            name = file.read(_LONGEST_NAME).strip()
        if Path(name).name != name or not name or "\0" in name or not os.path.isdir(path.parent / name):
            got = name or "nothing"
            raise UserError(
                f"{path} names no checkpoint", got=got, remedy=f"give one beside it, or {path.parent.parent}"
            )
        return _folder(path.parent / name)
    if os.path.isfile(path) and path.suffix.lower() in SUFFIXES:
        if path.name.startswith("rank-") and (path.parent / MANIFEST).is_file():
            raise UserError(f"{path} is one rank's part of a checkpoint", remedy=f"give the folder {path.parent}")
        return Located(Kind.WEIGHTS, path)
    if not os.path.exists(path):
        raise UserError(f"{path} is missing", expected=TAKEN)
    raise UserError(f"{path} is no file of weights", expected=TAKEN)


def _folder(path: Path) -> Located:
    if (path / MANIFEST).is_file() and (path / STATE).is_file():
        return Located(Kind.CHECKPOINT, path)
    if path.name == FOLDER and any(path.glob("step-*")):
        return Located(Kind.RUN, path.parent)
    if (path / FOLDER).is_dir():
        return Located(Kind.RUN, path)
    if (path / OPEN_CLIP).is_file():
        return Located(Kind.OPEN_CLIP, path)
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} is an adapter of peft", remedy="merge it into its model, and give the model's folder")
    if (path / TRANSFORMERS).is_file():
        return Located(Kind.TRANSFORMERS, path)
    files = weights_files(path)
    if len(files) == 1:
        return Located(Kind.WEIGHTS, files[0])
    raise UserError(f"{path} holds no model", got=_instead(path), expected=TAKEN)


def _instead(path: Path) -> str:
    if (path / "modules.json").is_file():
        inside = sorted(config.parent.name for config in path.glob(f"*/{TRANSFORMERS}"))
        return "a folder of sentence-transformers" + (f"; its CLIP lies in {inside[0]}" if inside else "")
    if (path / MANIFEST).is_file() and "shards" in _keys(path / MANIFEST):
        return "a corpus of shards"
    weights = sorted(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if weights:
        return f"the files {', '.join(weights[:3])} without an {OPEN_CLIP}: name one of them"
    return f"no committed checkpoint, no {OPEN_CLIP}, no {TRANSFORMERS} and no weights"


def _keys(path: Path) -> set[str]:
    try:
        return set(read_json(path))
    except UserError:
        return set()
