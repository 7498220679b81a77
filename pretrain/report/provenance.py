"""Which code made a result, by which settings: package versions and, in a git checkout, the commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

from pretrain.config.reading import dump_config
from pretrain.config.tree import Config

_PACKAGES = ("dualstream", "torch", "deepspeed", "open_clip_torch", "transformers", "peft", "numpy", "pillow")


def package_versions() -> dict[str, str | None]:
    """Versions by distribution name; None for one that runs from a checkout without being installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_commit() -> str | None:
    """The commit of the code's checkout, `-dirty` behind it where files differ; None outside of one."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        here = Path(__file__).resolve().parent
        asked = subprocess.run(words, cwd=here, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def resolved(config: Config) -> str:
    """The settings as YAML, with the code's commit and the packages' versions as comments."""
    versions = [f"{name} {version}" for name, version in package_versions().items()]
    return f"# commit {git_commit()}\n# {', '.join(versions)}\n{dump_config(config)}"
