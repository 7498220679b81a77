"""The command-line parser of every entry point."""

import argparse
from typing import NoReturn

from data_tools.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UsageErrors: one line, printed by one rank."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UsageError(message, remedy=f"see `{self.prog} --help`")
