"""Libraries that log each step of a normal load, held to silence while they are at work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No log below an error, and no bars of transformers'."""
    from transformers.utils import logging as transformers_logging

    before, bar = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if bar:
            transformers_logging.enable_progress_bar()
