"""Every command of the READMEs, pasted as it stands, page after page, in a checkout of a user with data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pages import PAGES, blocks, edit_config, make_world
from runs import ENV


def _paste(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and output; where it does not end, nothing of it stays."""
    process = subprocess.Popen(
        words, cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.timeout(900)
def test_commands_run_as_pasted(tmp_path):
    world = make_world(tmp_path)
    config = world / "configs/mine.yaml"
    edited = False
    for block in (block for page in PAGES for block in blocks(page) if block.runs):
        words = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        code, output = _paste([*words, block.code], world)
        assert code == 0, f"{block.page}:{block.line}\n{block.code}\n{output}"
        if config.exists() and not edited:
            edit_config(config, world)
            edited = True
    assert edited
