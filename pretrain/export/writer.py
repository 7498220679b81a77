"""Export: the folder is written aside, checked by loading it, and renamed; it is whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import UsageError, UserError
from data_tools.shards.commit import sync_folder
from pretrain.export.card import model_card
from pretrain.export.open_clip_format import write_open_clip
from pretrain.export.transformers_format import check_transformers, write_transformers
from pretrain.export.verify import verify_export
from pretrain.towers.build import DualEncoder

FORMATS: dict[str, Callable[[DualEncoder, Path], None]] = {
    "open_clip": write_open_clip,
    "transformers": write_transformers,
}


def export_model(
    model: DualEncoder,
    out_dir: str | Path,
    formats: Sequence[str] = tuple(FORMATS),
    training: Mapping | None = None,
    metrics: Mapping[str, float] | None = None,
    verify: bool = True,
) -> dict[str, float]:
    """Write `model` (whole, fp32, on the CPU) to `out_dir` for the clients in `formats`. One process calls it.

    Args:
        out_dir: must not exist, or be empty.
        training: facts for the model card (data digest, samples seen, ...).
        metrics: of an evaluation of these weights, for the model card.
        verify: load the folder through each client and compare features before it gets its name.

    Returns:
        Differences by client (see `verify_export`); empty without `verify`.

    Raises:
        UserError: an unknown format, a folder with content, towers that a format cannot express, a client that computes
            something else. Nothing is left behind.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UsageError("unknown export format", got=", ".join(unknown) or "none", expected=", ".join(FORMATS))
    if "transformers" in formats:
        check_transformers(model)
    with staged_folder(Path(out_dir)) as folder:
        for name in dict.fromkeys(formats):
            FORMATS[name](model, folder)
        differences = verify_export(model, folder, formats) if verify else {}
        card = model_card(model.spec, formats, training or {}, metrics or {}, differences)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return differences


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
