"""Prompt templates of zero-shot classification. `{c}` stands for the class name."""

from __future__ import annotations

from pathlib import Path

from data_tools.errors import UserError
from pretrain.config.tree import TEMPLATE_NAMES

PHOTO = ("a photo of a {c}.",)


def load_templates(name: str) -> tuple[str, ...]:
    """The templates of `photo`, of open_clip's `simple` (7) or `openai` (80), or of a file with one template a line.

    Raises:
        UserError: unknown name, empty file, a line without `{c}` (with its number).
    """
    if name == "photo":
        return PHOTO
    if name in TEMPLATE_NAMES:
        from open_clip import zero_shot_metadata as lists

        chosen = lists.SIMPLE_IMAGENET_TEMPLATES if name == "simple" else lists.OPENAI_IMAGENET_TEMPLATES
        return tuple(template("{c}") for template in chosen)
    return _read_templates(Path(name))


def load_classes(path: str | Path) -> tuple[str, ...]:
    """Class names of a file, one a line, in the order of the labels.

    Raises UserError where it is missing or empty, and for a blank line among the names: the labels behind it would be
    of other classes.
    """
    lines = _lines(Path(path), "class file")
    expected = "one class name a line, in the order of the labels"
    if not lines:
        raise UserError(f"class file {path} is empty", expected=expected)
    gap = next((place for place, (number, _) in enumerate(lines, 1) if number != place), None)
    if gap:
        raise UserError(f"{path}, line {gap}: no class name", got="a blank line", expected=expected)
    return tuple(line for _, line in lines)


def _read_templates(path: Path) -> tuple[str, ...]:
    lines = _lines(path, "template file", f"{', '.join(TEMPLATE_NAMES)} or a file with one template a line")
    for number, line in lines:
        if "{c}" not in line:
            raise UserError(f"{path}, line {number}: a template without the class", got=line, expected="{c} in it")
    if not lines:
        raise UserError(f"template file {path} is empty", expected="one template a line, with {c} for the class")
    return tuple(line for _, line in lines)


def _lines(path: Path, what: str, expected: str | None = None) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Python makes one line end of all three there are
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read", got=str(error), expected=expected) from None
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
