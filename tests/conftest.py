"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing under test may reach for the hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other's core take ten times as long

REPO_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder of setup.py."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photos beside the repository, which are not part of it: tests that need them skip where they are absent."""
    folder = REPO_ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the development photos in ../shared/data, which are not here")
    return folder
