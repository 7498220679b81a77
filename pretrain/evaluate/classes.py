"""Class names: matched between a model and a corpus, whose labels may stand in another order."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

import torch

from data_tools.errors import UserError
from data_tools.errors import shown as printable

_SHOWN, _LONGEST = 5, 60  # names in a message, characters of each
_BY_FILE = (
    "pack the corpus with the model's names, or give those of its labels 0, 1, ... to launch/evaluate.py, one a line "
    "(--classes FILE)"
)


def shown(names: Sequence[str]) -> str:
    """The first names, for a message or a line of output."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name, _LONGEST) for name in names[:_SHOWN]) + more


def class_numbers(
    found: Sequence[str], known: Sequence[str], what: str, whose: str = "the model", remedy: str = _BY_FILE
) -> torch.Tensor:
    """int64 `[len(found)]`: the number among `known` of each class name of a corpus, whatever its order there.

    Composed and decomposed spellings of a name are one. `what`, `whose`: how a message calls the corpus, and what has
    the known names; `remedy`: of names that are not known, after a spelling that may be meant.

    Raises:
        UserError: a name that is not known, or two that are one.
    """
    number = {_same(name): place for place, name in enumerate(known)}
    unknown = [name for name in found if _same(name) not in number]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        likely = f"is {shown(unknown[:1])} {whose}'s {shown(near)}? " if near else ""
        raise UserError(
            f"{what} has classes that {whose} does not know",
            got=f"{len(unknown)} of {len(found)}: {shown(unknown)}",
            expected=f"names among {whose}'s {len(known)}: {shown(known)}",
            remedy=f"{likely}{remedy}",
        )
    if len({_same(name) for name in found}) < len(found):
        raise UserError(f"{what} has a class name twice", got=shown(found), expected="each name once")
    return torch.tensor([number[_same(name)] for name in found], dtype=torch.int64)


def renumber(labels: torch.Tensor, numbers: torch.Tensor | None) -> torch.Tensor:
    """`labels` int64 `[n]` of a corpus as the model numbers them; those outside of `numbers` become -1. None: as they
    are."""
    if numbers is None:
        return labels
    fits = (labels >= 0) & (labels < len(numbers))
    return torch.where(fits, numbers[labels.clamp(0, len(numbers) - 1)], -1)


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()
