"""Entries of registries: named without an import, loaded when asked for."""

import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction

from pretrain.config.registry import Entry


@dataclass(frozen=True)
class Settings:
    """Of nothing."""


def test_an_entry_loads_what_it_names():
    assert Entry(Settings, "fractions:Fraction").load() is Fraction


def test_an_entry_imports_nothing_until_then():
    script = "import sys; from pretrain.config.registry import Entry; Entry(int, 'colorsys:x'); "
    script += "assert 'colorsys' not in sys.modules and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
