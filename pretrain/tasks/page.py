"""configs/README.md, written from the tree: `python -m pretrain.tasks.page`."""

from __future__ import annotations

import inspect
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from data_tools.format.commit import atomic_write
from pretrain.config.check import within
from pretrain.config.declare import rule_of
from pretrain.config.registry import Entry, registry_of
from pretrain.tasks import TASKS, TaskConfig

PAGE = Path(__file__).resolve().parents[2] / "configs" / "README.md"
_HEAD = """# Settings

A run is one YAML file, `--config FILE`; `section.key=value` words behind it win over the file. What neither says has
the default below. `--dry-run` shows what a run would be, all settings included; `run.dir/config.yaml` keeps them.

```bash
# not run by the tests: takes the corpus that launch/quickstart.sh makes
python launch/pretrain.py --config configs/quickstart.yaml --dry-run optim.lr=5e-4 data.train=data/scenes/shards/train
```

| file | what it trains |
|-|-|
| [quickstart.yaml](quickstart.yaml) | small towers on generated scenes, in minutes on two cores |
| [photos_cpu.yaml](photos_cpu.yaml) | photos with five captions each; the start for a corpus of your own |
| [photos_recipe.yaml](photos_recipe.yaml) | what was found to learn most from these photos in 15 minutes of two cores |
| [photos_match.yaml](photos_match.yaml) | these photos with a head that tells pairs from hard negatives |
| [pairs_and_texts.yaml](pairs_and_texts.yaml) | pairs and texts alone in one run, by InfoNCE and masked words |
| [distill.yaml](distill.yaml) | a model that learns from a larger one as well, whose features lie in the tars |
| [finetune/](finetune) | classifiers from a run or an export |
| [models/](models) | small architectures, in open_clip's JSON |
| [templates/](templates) | zero-shot prompts, one a line |

A duration is a number and `epochs`, `steps` or `samples` (`"2 epochs"`, `"1e6 samples"`). `null` is no value. A list in
YAML is `[a, b]`; `NAME` stands for a key of a map. A setting without a default must be given. `x` stands for the value.

This page is written by `python -m pretrain.tasks.page` from `pretrain/config/tree.py`; a test keeps it up to date.
"""


def page() -> str:
    """The whole page, in Markdown."""
    parts = [_HEAD.rstrip(), *_section("Every task", TaskConfig, "")]
    for name, task in TASKS.items():
        parts += _section(f"`task: {name}`", task.settings, "", TaskConfig, f", `task: {name}`")
    return "\n".join(parts) + "\n"


def _section(
    title: str, kind: type, prefix: str, base: type | None = None, of: str = "", types: Iterable[str] = ()
) -> Iterator[str]:
    """A heading and the table of a section, then those of the sections within it. Without what stands in the `base`
    that it extends: it has been shown. `of`: what the headings within it end with; `types`: what `type` may be."""
    hints, comments = get_type_hints(kind), comments_of(kind)
    shown = get_type_hints(base) if base else {}
    about = inspect.cleandoc(kind.__doc__ or "").replace("\n", " ")
    about = re.sub(" +", " ", about)
    yield f"\n{'###' if prefix else '##'} {title}\n\n{about}"
    rows: list[str] = []
    inside: list[tuple[str, type, str, type | None, Iterable[str]]] = []
    for one in fields(kind):
        name, hint = f"{prefix}{one.name}", hints[one.name]
        if hint == shown.get(one.name):
            continue
        inner, step = within(hint)
        before, _ = within(shown.get(one.name))
        if inner is not None:
            inside.append((f"{name}.{step}".rstrip("."), inner, f"{name}.{step}", before, list(dict(_things(one)))))
            inside += [(f"{name}.{it}", entry.settings, f"{name}.{it}.", inner, [it]) for it, entry in _things(one)]
        if (inner is None or step) and one.name not in shown:
            rows.append(_row(name, one, hint, comments[one.name], types))
    if rows:
        yield "\n| setting | default | allowed | effect |\n|-|-|-|-|"
        yield from rows
    for heading, inner, deeper, before, names in inside:
        yield from _section(f"`{heading}`{of}", inner, deeper, before, of, names)


def _things(one: Field) -> Iterable[tuple[str, Entry]]:
    return (registry_of(one) or {}).items()


def _row(name: str, one: Field, hint: Any, effect: str, types: Iterable[str]) -> str:
    cells = [f"`{name}`", _default(one), _allowed(one, hint, types), effect]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _default(one: Field) -> str:
    value = one.default if one.default_factory is MISSING else one.default_factory()
    return "" if value == "???" else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {{}}' for name in value)}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _allowed(one: Field, hint: Any, types: Iterable[str]) -> str:
    inner, step = within(hint)
    if hint is str and one.name in ("task", "type"):
        return ", ".join(TASKS if one.name == "task" else types)
    if inner is not None:
        return "a map, as below" if step == "NAME." else "a list, as below"
    rule, null = rule_of(one), ", null" if type(None) in get_args(hint) else ""
    if rule is not None:
        return f"{rule}{null}"
    return "true, false" if hint is bool else f"text{null}" if "str" in str(hint) else ""


def comments_of(kind: type) -> dict[str, str]:
    """What stands in the source beside each field of a dataclass, or in the lines above it."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if is_dataclass(one):
            found |= _own_comments(one)
    return found


def _own_comments(kind: type) -> dict[str, str]:
    source = inspect.getsource(kind)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    lines, found = source.splitlines(), {}
    for number, line in enumerate(lines, 1):
        match = re.match(r"    (\w+): ", line)
        if not match or match[1] not in kind.__dataclass_fields__:  # type: ignore[attr-defined]
            continue
        first = number
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        above = [comments[place] for place in range(first, number)]
        found[match[1]] = _in_a_cell(" ".join([*above, comments.get(number, "")]).strip())
    return found


def _in_a_cell(text: str) -> str:
    """Without the marks of a sentence at its ends."""
    first, _, rest = text.rstrip(".").partition(" ")
    return f"{first.lower() if first.istitle() else first} {rest}".strip()


def main() -> None:
    """Write the page."""
    with atomic_write(PAGE) as file:
        file.write(page().encode())


if __name__ == "__main__":
    main()
