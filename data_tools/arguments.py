"""The command-line parser of every entry point."""

import argparse
import os
import select
import sys
from typing import NoReturn

from data_tools.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UsageErrors: one line, printed by one rank."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise UsageError(message, remedy=f"see `{self.prog} --help`")


def at_least(options: argparse.Namespace, **least: int) -> None:
    """Raises UsageError for the first of these options, by their names in `options`, whose number is too small; those
    left out are not."""
    for name, number in least.items():
        found = getattr(options, name)
        if found is not None and found < number:
            raise UsageError(f"--{name.replace('_', '-')} is too small", got=found, expected=f"{number} or more")


def check_shard_name(name: str) -> None:
    """Raises UsageError for a --name that shards cannot have."""
    if not name or set(name) & set("./{}") or name.startswith("-"):
        raise UsageError("bad --name", got=repr(name), expected="a file name without dots, slashes and braces")


def leave_stdout() -> bool:
    """Whether the reader of this process's output has gone, as `head` does; then nothing more is written there."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # the kernel tells of errors unasked
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
