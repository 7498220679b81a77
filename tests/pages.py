"""The READMEs: their code blocks, and a folder in which these run as a user would have it."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import yaml

import tiny
from packing import ROOT, data_tools, jpeg, photo_folder

PAGES = (
    "README.md",
    "data_tools/README.md",
    "launch/README.md",
    "pretrain/README.md",
    "pretrain/ADDING.md",
    "configs/README.md",
)
NOT_RUN = "# not run by the tests: "  # the first line of a block that tests leave out, and why
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_KINDS = ("daisy", "rose")


@dataclass(frozen=True)
class Block:
    """One fenced block; `line`: where its first line of code stands."""

    page: str
    line: int
    language: str
    code: str

    @property
    def runs(self) -> bool:
        """Whether tests run it as pasted."""
        return self.language in ("bash", "python") and not self.code.startswith(NOT_RUN)


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page of the repository."""
    text = (ROOT / page).read_text()
    return [Block(page, text[: m.start(2)].count("\n") + 1, m[1], m[2]) for m in _BLOCK.finditer(text)]


def make_world(folder: Path) -> Path:
    """A checkout with what the pages take as given: photos, tables, tars of another tool, packed flowers."""
    for name in ("data_tools", "pretrain", "launch", "configs"):
        (folder / name).mkdir(parents=True)
        for path in (ROOT / name).iterdir():
            (folder / name / path.name).symlink_to(path)
    photo_folder(folder / "photos")
    for number in range(80):
        kind = folder / "classes" / _KINDS[number % 2]
        kind.mkdir(parents=True, exist_ok=True)
        (kind / f"{number}.jpg").write_bytes(jpeg(number))
    names = [f"classes/{_KINDS[number % 2]}/{number}.jpg" for number in range(80)]
    captions = [
        {"image": name, "caption": f"a {_KINDS[n % 2]} of {word}", "split": "val" if n < 16 else "train"}
        for n, name in enumerate(names)
        for word in tiny.WORDS[:2]
    ]
    _write_csv(folder / "captions.csv", captions)
    labels = [
        {"image": name, "label": _KINDS[n % 2], "split": "test" if n < 16 else "train"} for n, name in enumerate(names)
    ]
    _write_csv(folder / "labels.csv", labels)
    for split in ("train", "test"):
        data_tools(
            "pack",
            folder / "labels.csv",
            folder / "data/flowers" / split,
            "--label-column",
            "label",
            "--where",
            f"split={split}",
        )
    for number in range(4):
        _foreign_tar(folder / f"other-{number:06}.tar", number)
    _coco(folder / "coco")
    return folder


def edit_config(path: Path, folder: Path) -> None:
    """What the pages ask a user to change in a copied config, and towers that train in seconds."""
    (folder / "tiny.json").write_text(json.dumps(tiny.MODEL_CFG))
    config = yaml.safe_load(path.read_text())
    config["run"]["dir"] = "runs/mine"
    config["data"]["train"] = [{"urls": "data/mine"}]
    config["eval"]["every"] = "100 steps"
    config["evaluators"]["retrieval"]["data"] = "data/val"
    config["model"]["name"] = "tiny.json"
    config["train"] |= {"global_batch": 16, "duration": "5 epochs"}
    config["checkpoint"]["every"] = "40 steps"
    path.unlink()
    path.write_text(yaml.safe_dump(config))


def _write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _coco(folder: Path) -> None:
    photo_folder(folder / "val2017", 3)
    images = [{"id": number, "file_name": f"photo.{number}.jpg"} for number in range(3)]
    annotations = [{"image_id": number, "caption": f"a picture of {number}"} for number in range(3)]
    (folder / "annotations").mkdir()
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "annotations/captions_val2017.json").write_text(content)


def _foreign_tar(path: Path, number: int) -> None:
    with tarfile.open(path, "w") as tar:
        for sample in range(4):
            for extension, data in (("jpg", jpeg(number * 4 + sample)), ("txt", b"a photo")):
                member = tarfile.TarInfo(f"{number:03}{sample:05}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
