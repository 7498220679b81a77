"""Paths in settings and on command lines, looked at before torch is imported: a typing error is told within a second.

Only whether something is there, and could be meant, is asked: whether it is whole is left to those who open it, and so
are the URLs of corpora.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from data_tools.errors import UsageError, UserError
from data_tools.remote.urls import expand_braces, is_remote
from pretrain.config.tree import TEMPLATE_NAMES


def check_corpus(urls: str) -> None:
    """Raises UserError where a local corpus is missing: the folder, one of its tars, or what a pattern matches."""
    if is_remote(urls):
        return
    from data_tools.corpus.sources import find, missing  # late: it imports numpy

    for tar in (tar for found in find(urls) for tar in found.tars):
        if not tar.exists():
            raise missing(tar)


def check_model(name: str) -> None:
    """Raises UserError where `name` leads to no model."""
    from pretrain.engine.located import locate  # late: it imports numpy

    locate(name)


def check_architecture(name: str) -> None:
    """Raises UserError where the JSON of an architecture is missing; open_clip's own names are left to open_clip."""
    if name.endswith(".json"):
        check_file("model file", name, "an open_clip architecture name, or the path of its JSON")


def check_templates(name: str) -> None:
    """Raises UserError where `name` is no set of templates and no file."""
    if name not in TEMPLATE_NAMES:
        check_file("template file", name, f"{', '.join(TEMPLATE_NAMES)} or a file with one template a line")


def check_file(what: str, path: str | Path | None, expected: str | None = None) -> None:
    """Raises UserError where there is no file to read; None is none that is asked for."""
    if path is not None and not os.path.isfile(path):
        got = "a folder" if os.path.isdir(path) else "No such file"
        raise UserError(f"{what} {path} cannot be read", got=got, expected=expected)


def check_present(what: str, path: str) -> None:
    """Raises UserError where neither a file nor a folder nor a tar of a pattern is there."""
    if not is_remote(path) and not any(os.path.exists(one) or glob.glob(one) for one in expand_braces(path)):
        raise UserError(f"{what} {path} is missing", remedy="check the path")


def check_output(flag: str, path: str | Path | None, folder: bool = False) -> None:
    """Raises UsageError where a result could not be written to `path`: a folder in place of a file or the reverse, or
    below something that is none."""
    if path is None:
        return
    if os.path.isdir(path) and not folder:
        raise UsageError(f"{flag} is a folder", got=path, expected="a file")
    above = next(part for part in (Path(path).absolute(), *Path(path).absolute().parents) if part.exists())
    if not above.is_dir() and (folder or above != Path(path).absolute()):
        raise UsageError(f"{flag} cannot be written", got=f"{above}, which is no folder")
    if not os.access(above, os.W_OK):
        raise UsageError(f"{flag} cannot be written", got=f"no right to write to {above}")
