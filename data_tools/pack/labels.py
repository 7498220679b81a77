"""Class names: what a label may be, when two are the same, and in which order they are numbered."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from data_tools.errors import UserError, shown
from data_tools.media.captions import clean

_NUMBER = re.compile(r"([+-]?\d+)(\.\d+)?")
_UNSEEN = re.compile(
    "[\u00ad\u200b\u2060\ufeff]"
)  # soft hyphen, spaces of no width: names that differ by them print alike
_LONGEST = 1000  # characters of a class name
_MISSING = ("nan", "<na>")  # how numpy and pandas write that there is none
_SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|dev|eval(uation)?|test(ing)?)([-_ ]?(set|data|images|split))?[-_ ]?\d*"
)


def class_name(value: object) -> str:
    """The class that a label names, "" for none; one spelling (NFC, single spaces) for names that print alike.

    A whole number is a name whether it is written 1, 1.0 or "1.0". Raises ValueError for what names no class: other
    numbers, lists, objects, bytes.
    """
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, (list, tuple, dict, set, bytes, bytearray)):
        kind = {dict: "an object", bytes: "bytes", bytearray: "bytes"}.get(type(value), "a list")
        raise ValueError(f"a label is one name or whole number, got {kind}")
    if isinstance(value, str) and len(value) > _LONGEST:
        raise ValueError(f"a label is one name or whole number, got a text of {len(value)} characters")
    text = clean(unicodedata.normalize("NFC", " ".join(_UNSEEN.sub("", str(value)).split())))
    if text.lower() in _MISSING:
        return ""
    number = _NUMBER.fullmatch(text)
    if (isinstance(value, float) and not value.is_integer()) or (number and number[2] and float(number[2])):
        raise ValueError(f"a label is one name or whole number, got {shown(text, 60)}")
    if isinstance(value, float):
        return str(int(value))
    return str(int(number[1])) if number and number[2] else text


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Class names by name; numbers by value, so that labels 0..9 keep their numbers."""
    names = {label for label in labels if label}
    if all(label.isdecimal() for label in names):
        return tuple(sorted(names, key=lambda label: (int(label), label)))
    return tuple(sorted(names))


def folder_class(name: str) -> str:
    """The class of a folder: its name as it is, in the one spelling (NFC)."""
    return clean(unicodedata.normalize("NFC", name))


def folder_classes(labels: Iterable[str], root: Path) -> tuple[str, ...]:
    """The classes of a folder by name. Raises UserError when all are called as splits are, for then the classes lie one
    folder deeper."""
    names = tuple(sorted(set(labels)))
    if names and all(_SPLIT.fullmatch(name.lower()) for name in names):
        raise UserError(
            f"the sub-folders of {root} are splits, not classes",
            got=", ".join(names),
            expected="one sub-folder per class",
            remedy=f"pack each split by itself, such as {root / names[0]}",
        )
    return names


def counted(classes: Iterable[str], counts: dict[str, int], most: int = 20) -> str:
    """The classes with their samples for a summary, those with the most samples where not all have room."""
    names = list(classes)
    listed = names if len(names) <= most else sorted(names, key=lambda name: -counts.get(name, 0))[:most]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{shown(name, 60)} {counts.get(name, 0)}" for name in listed) + more
