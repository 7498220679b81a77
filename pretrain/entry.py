"""How an entry point ends: one line for the user, an exit code for the scheduler, no rank left waiting."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from data_tools.errors import UserError
from data_tools.redaction import redact_text

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
_LINGER = 5.0  # seconds that the rank with the store stays for ranks that meet the same fault a little later


def run_entry(main: Callable[[list[str]], int], arguments: list[str] | None = None) -> int:
    """Run an entry point and turn what it raises into one line on stderr and an exit code.

    A fault that all ranks meet is printed once; an unexpected exception keeps its traceback. On failure the process
    ends without waiting for collectives that other ranks will never join.
    """
    try:
        return main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        _print_once(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except Exception:
        _print_once(f"error on rank {os.environ.get('RANK', '0')}:\n{redact_text(traceback.format_exc())}")
        code = EXIT_FAILED
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _print_once(text: str) -> None:
    dist = sys.modules.get("torch.distributed")  # where it was never imported, no rank knows of the others
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1:
        if os.environ.get("RANK", "0") == "0":
            print(text, file=sys.stderr, flush=True)
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        first = store.add("reported/" + hashlib.sha256(text.encode()).hexdigest(), 1) == 1
    except (RuntimeError, dist.DistError):  # the store went with another rank: then say it here
        first = True
    if first:
        print(text, file=sys.stderr, flush=True)
    _linger(store, dist)


def _linger(store: Any, dist: Any) -> None:
    """Rank 0 holds the store that the others ask whether a fault was printed: it leaves last, if they come in time."""
    deadline = time.monotonic() + _LINGER
    try:
        ended = store.add("ended", 1)
        while dist.get_rank() == 0 and ended < dist.get_world_size() and time.monotonic() < deadline:
            time.sleep(0.02)
            ended = store.add("ended", 0)
    except (RuntimeError, dist.DistError):
        return
