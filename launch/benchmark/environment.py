"""The peer's own environment: made on first use, checked on every use, never mixed with ours.

open_clip's trainer needs an older webdataset than ours, so it lives in a virtual environment of its own. torch and
torchvision are the releases that ours has: the comparison is about the trainers.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

from data_tools.errors import UserError

OPEN_CLIP = "3.3.0"
NEWEST_WEBDATASET = (0, 2, 86)  # the trainer breaks on the end-of-file marker of later ones (open_clip#935)
_PACKAGES = ("open_clip_torch", "webdataset", "torch", "torchvision")
_ASK = (
    "import importlib.metadata as m, json\n"
    "names = {d.metadata['Name'].lower().replace('-', '_'): d.version for d in m.distributions()}\n"
    f"print(json.dumps({{name: names.get(name) for name in {_PACKAGES!r}}}))"
)


def peer_python(folder: Path) -> Path:
    """The interpreter of the peer's environment in `folder`, which is made or completed where needed.

    Raises:
        UserError: the packages cannot be installed, or `folder` holds other versions that pip does not replace.
    """
    python = folder / "bin" / "python"
    if python.exists() and not _faults(peer_versions(python)):
        return python
    print(f"making the environment of open_clip {OPEN_CLIP} in {folder} (once)", file=sys.stderr, flush=True)
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(folder)], folder)
    same = [f"{name}=={_public(importlib.metadata.version(name))}" for name in ("torch", "torchvision")]
    newest = ".".join(map(str, NEWEST_WEBDATASET))
    wanted = [f"open_clip_torch[training]=={OPEN_CLIP}", f"webdataset<={newest}", *same]
    _call([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], folder)
    if faults := _faults(peer_versions(python)):
        raise UserError(
            f"the peer's environment {folder} does not fit", got=", ".join(faults), remedy=f"remove {folder}"
        )
    return python


def peer_versions(python: Path) -> dict[str, str | None]:
    """Versions of the packages that matter in the environment of `python`; None where one is missing."""
    answer = subprocess.run([str(python), "-c", _ASK], capture_output=True, text=True, check=False)
    return json.loads(answer.stdout) if answer.returncode == 0 else dict.fromkeys(_PACKAGES)


def _faults(found: dict[str, str | None]) -> list[str]:
    """What keeps an environment from being the peer of this one; empty: nothing."""
    have = {name: version for name, version in found.items() if version is not None}
    if len(have) < len(_PACKAGES):
        return [f"{name} missing" for name in _PACKAGES if name not in have]
    faults = []
    if have["open_clip_torch"] != OPEN_CLIP:
        faults.append(f"open_clip_torch {have['open_clip_torch']} (wanted {OPEN_CLIP})")
    if tuple(int(part) for part in have["webdataset"].split(".")[:3]) > NEWEST_WEBDATASET:
        faults.append(f"webdataset {have['webdataset']} is too new for open_clip's trainer")
    for name in ("torch", "torchvision"):
        ours = _public(importlib.metadata.version(name))
        if _public(have[name]) != ours:
            faults.append(f"{name} {have[name]} (ours is {ours})")
    return faults


def _public(version: str) -> str:
    return version.partition("+")[0]  # without a build tag such as +cpu


def _call(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            f"the peer's environment {folder} could not be made",
            got=lines[-1] if lines else f"exit code {done.returncode}",
            remedy="check that pip can install packages here, then run again",
        )
