"""How an entry point ends: one line for the user, an exit code for the scheduler, no rank left waiting."""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
from collections.abc import Callable

from data_tools.errors import UserError

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def run_entry(main: Callable[[list[str]], int], arguments: list[str] | None = None) -> int:
    """Run an entry point and turn what it raises into one line on stderr and an exit code.

    A fault that all ranks meet is printed once; an unexpected exception keeps its traceback. On failure the process
    ends at once, without waiting for collectives that other ranks will never join.
    """
    try:
        return main(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        _print_once(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except Exception:
        _print_once(f"error on rank {os.environ.get('RANK', '0')}:\n{traceback.format_exc()}")
        code = EXIT_FAILED
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _print_once(text: str) -> None:
    dist = sys.modules.get("torch.distributed")  # where it was never imported, no rank knows of the others
    if dist is not None and dist.is_initialized() and dist.get_world_size() > 1:
        store = dist.distributed_c10d._get_default_store()
        key = "reported/" + hashlib.sha256(text.encode()).hexdigest()
        try:
            if store.add(key, 1) > 1:
                return
        except (RuntimeError, dist.DistError):  # the store went with another rank: then say it here
            pass
    elif os.environ.get("RANK", "0") != "0":
        return
    print(text, file=sys.stderr, flush=True)
