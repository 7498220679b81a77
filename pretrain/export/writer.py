"""Export: the folder is written aside, checked by loading it, and renamed; it is whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import UsageError, UserError
from data_tools.format.commit import sync_folder
from pretrain.export.card import model_card
from pretrain.export.formats import Format, formats_of
from pretrain.export.verify import Verification, verify_export
from pretrain.towers.build import DualEncoder
from pretrain.towers.classifier import Classifier


def export_model(
    model: DualEncoder | Classifier,
    out_dir: str | Path,
    formats: Sequence[str] | None = None,
    training: Mapping | None = None,
    metrics: Mapping[str, float] | None = None,
    verify: bool = True,
) -> dict[str, float]:
    """Write `model` (whole, fp32, on the CPU) to `out_dir` for the clients in `formats`. One process calls it.

    Args:
        out_dir: must not exist, or be empty.
        formats: names in `formats_of(model)`; None: all of them.
        training: facts for the model card (data digest, samples seen, ...).
        metrics: of an evaluation of these weights, for the model card.
        verify: load the folder through each client and compare what it computes before it gets its name.

    Returns:
        Differences by client (see `verify_export`); empty without `verify`.

    Raises:
        UserError: an unknown format, a folder with content, a model that a format cannot express, a client that
            computes something else. Nothing is left behind.
    """
    chosen = choose(model, formats)
    with staged_folder(Path(out_dir)) as folder:
        for form in chosen.values():
            form.write(model, folder)
        found = verify_export(model, folder, list(chosen)) if verify else Verification()
        how = {name: form.how for name, form in chosen.items()}
        card = model_card(model, how, training or {}, metrics or {}, found.differences, found.divergences)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return found.differences


def choose(model: DualEncoder | Classifier, names: Sequence[str] | None) -> dict[str, Format]:
    """The layouts of these names, in their order; raises UserError for one that is unknown or that the model has no
    form in."""
    known = formats_of(model)
    names = list(known) if names is None else names
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = "a classifier" if isinstance(model, Classifier) else "a dual encoder"
        got = ", ".join(unknown) or "none"
        raise UsageError(f"unknown export format for {what}", got=got, expected=", ".join(known))
    chosen = {name: form for name, form in known.items() if name in names}
    obstacles = {name: form.obstacle(model) for name, form in chosen.items()}
    for name, reason in obstacles.items():
        if reason:
            free = [other for other in known if known[other].obstacle(model) is None]
            raise UserError(
                f"model {model.spec.name} has no {name} form",
                got=reason,
                expected=_expressible(model),
                remedy=f"export with --formats {','.join(free)}" if free else None,
            )
    return chosen


def _expressible(model: DualEncoder | Classifier) -> str:
    image = "open_clip's own ViT"
    return image if isinstance(model, Classifier) else f"{image} and causal text transformer with the CLIP tokenizer"


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that becomes `path` at a clean end, durably; else it is removed.

    What a killed writer left is removed first.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists", expected="a new or empty folder", remedy="choose another one or remove it")
    staging = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written", got=error.strerror) from None
    try:
        yield staging
        for file in staging.iterdir():
            with file.open("rb") as content:
                os.fsync(content.fileno())
        sync_folder(staging)
        os.rename(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(path.parent)
