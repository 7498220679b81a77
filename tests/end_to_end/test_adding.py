"""The page that adds an objective is true: what it says, done to a copy of the project as it is written, is exact."""

import os
import re
import shutil
import subprocess
import sys

import pages
from packing import ROOT

_PLACE = re.compile(r"# (\S+?)(?:, (before|in) (\w+))?\n")


def add(copy, code):
    """Do what a block of the page says: a whole file, or what stands before or in a table of one."""
    path, where, table = _PLACE.match(code).groups()
    body, file = code.split("\n", 1)[1], copy / path
    if where is None:
        assert not file.exists()
        file.write_text(body)
        return
    text = file.read_text()
    (head,) = re.findall(rf"^{table}(?:: .+)? = {{\n", text, re.MULTILINE)
    file.write_text(text.replace(head, f"{body}\n\n{head}" if where == "before" else head + body))


def test_an_objective_is_added_as_the_page_says(tmp_path):
    for folder in ("pretrain", "data_tools", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", ".ruff.toml"):
        shutil.copy(ROOT / name, tmp_path)
    blocks = [block.code for block in pages.blocks("pretrain/ADDING.md") if block.language == "py"]
    assert len(blocks) == 5
    for code in blocks:
        add(tmp_path, code)
    ours = [line for code in blocks[:3] for line in code.splitlines()[1:] if line.strip()]
    assert len(ours) <= 40
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/distributed/test_objectives_exact.py"]
    found = subprocess.run(
        [*run, "-k", "registered or [2]"],
        cwd=tmp_path,
        env=os.environ | {"EXACT": "alignment"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-3000:]
    assert re.search(r"\b2 passed", found.stdout)
    new = ["pretrain/objectives", "tests/plain_losses.py"]
    assert not subprocess.run(["ruff", "check", *new], cwd=tmp_path, capture_output=True, text=True).returncode
    assert not subprocess.run(["ruff", "format", "--check", *new], cwd=tmp_path, capture_output=True).returncode
