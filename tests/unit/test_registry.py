"""Entries of registries: named without an import, loaded when asked for."""

import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction

import pytest

from pretrain.config.registry import Entry
from pretrain.objectives import OBJECTIVES
from pretrain.tasks import TASKS


@dataclass(frozen=True)
class Settings:
    """Of nothing."""


def test_an_entry_loads_what_it_names():
    assert Entry(Settings, "fractions:Fraction").load() is Fraction


def test_an_entry_imports_nothing_until_then():
    script = "import sys; from pretrain.config.registry import Entry; Entry(int, 'colorsys:x'); "
    script += "assert 'colorsys' not in sys.modules and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_settings_of_all_tasks_are_read_without_what_takes_long_to_import(repo_root):
    script = "import sys; from pretrain.config.reading import load_task; from pretrain.tasks import TASKS; "
    script += "load_task(TASKS, 'configs/quickstart.yaml', ['objectives.sigmoid.weight=2'], 'contrastive'); "
    script += "assert {'torch', 'numpy', 'pyarrow', 'open_clip'}.isdisjoint(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=repo_root).returncode == 0


@pytest.mark.parametrize("registry", [OBJECTIVES, TASKS])
def test_every_entry_is_there_and_its_settings_know_its_name(registry):
    for name, entry in registry.items():
        settings = entry.settings()
        assert name == (settings.task if registry is TASKS else settings.type)
        assert callable(entry.load())
