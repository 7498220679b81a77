"""How an entry point ends: one line for the user, an exit code for the scheduler, no rank left waiting."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from data_tools.arguments import leave_stdout
from data_tools.errors import UsageError, UserError, disk_error, printable, shown
from data_tools.redaction import redact_text

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 75, 130
_LINGER = 5.0  # seconds that the rank with the store stays for ranks that meet the same fault a little later
_LINE = 1000  # characters of a traceback's line
# (number of processes, number of this one), as they are called by what starts processes without telling torch of them.
_BARE_WORLDS = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("srun", "SLURM_NTASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)


def run_entry(main: Callable[[list[str]], int], arguments: list[str] | None = None) -> int:
    """Run an entry point and turn what it raises into one line on stderr and an exit code.

    A fault that all ranks meet is printed once; an unexpected exception keeps its traceback. On failure the process
    ends without waiting for collectives that other ranks will never join.
    """
    code = EXIT_FAILED
    try:
        try:
            return main(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # here, so that a reader that has gone is noticed here
    except UserError as error:
        _print_once(f"error: {error}", everywhere=not isinstance(error, UsageError))
        code = error.exit_code
    except KeyboardInterrupt:
        _print_once("interrupted")
        code = EXIT_INTERRUPTED
    except BrokenPipeError as error:
        if not leave_stdout():
            _print_once(_unexpected(error))
    except OSError as error:
        refused = disk_error(error)
        _print_once(f"error: {refused}" if refused else _unexpected(error))
    except Exception as error:
        _print_once(_unexpected(error))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        for stream in (sys.stdout, sys.stderr):
            _flush(stream)
        os._exit(code)
    return code


def reason_of(error: BaseException) -> str:
    """An exception in words that are never empty: its text, with its type where the text alone says little."""
    text = str(error) if isinstance(error, UserError) else shown(error)
    if text and isinstance(error, UserError | OSError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def refuse_bare_world() -> None:
    """Raises UsageError in a process that srun or mpirun has started beside others, without a word of its rank for
    torch: each would train alone, and all into one folder. So it does where that word makes no sense."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        if odd := _odd_numbers():
            raise UsageError(
                "the environment numbers this process in a way that makes no sense",
                got=odd,
                expected="RANK below WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as deepspeed and torchrun set them",
                remedy="start it by one of these, or unset RANK and WORLD_SIZE for a single process",
            )
        return
    for launcher, size, _ in _bare_worlds():
        raise UsageError(
            f"{launcher} started {size} processes that do not know of each other",
            got=f"no RANK and WORLD_SIZE in the environment of process {_number()} of {size}",
            expected="one process per GPU, or two on CPUs, started by a launcher that numbers them",
            remedy=f"let {launcher} start one launcher a node: {launcher} ... torchrun --nnodes N --nproc_per_node M "
            "--rdzv_backend c10d --rdzv_endpoint HOST:29500 launch/pretrain.py ..., or deepspeed --hostfile; for a "
            "single process set RANK=0 WORLD_SIZE=1",
        )


def _odd_numbers() -> str | None:
    """What is wrong with the numbers that the environment gives this process for torch; None: nothing."""
    said = {
        name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") if name in os.environ
    }
    number = {name: int(text) if text.isascii() and text.isdecimal() else -1 for name, text in said.items()}
    rank, size = number.get("RANK", 0), number.get("WORLD_SIZE", 1)
    needed = () if size == 1 else ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [f"no {name}" for name in needed if name not in os.environ]
    fits = min(number.values(), default=0) >= 0 and rank < size and number.get("MASTER_PORT", 0) < 1 << 16
    return None if fits and not missing else ", ".join([*(f"{name}={text}" for name, text in said.items()), *missing])


def refuse_ranks(command: str) -> None:
    """Raises UsageError where a launcher has started several ranks of a command that runs in one process."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise UsageError(f"{command} runs in one process", got=f"{size} ranks", remedy="use python")


def _bare_worlds() -> Iterator[tuple[str, int, str]]:
    """(launcher, processes, variable of their number) of each kind of start that has several processes."""
    step = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    for launcher, size, number in _BARE_WORLDS:
        found = os.environ.get(size, "")
        if size == "SLURM_NTASKS" and step.isdecimal():
            continue  # of the whole allocation; this step may have fewer
        if found.isdecimal() and int(found) > 1:
            yield launcher, int(found), number


def _number() -> str:
    """The number of this process among those that start together; "0" where nothing says one."""
    named = [number for _, _, number in _bare_worlds()]
    return next((os.environ[name] for name in ("RANK", *named) if name in os.environ), "0")


def _unexpected(error: BaseException) -> str:
    lines = redact_text("".join(traceback.format_exception(error))).splitlines()
    return f"error on rank {_number()}:\n" + "\n".join(printable(line)[:_LINE] for line in lines)


def _flush(stream: Any) -> None:
    try:
        stream.flush()
    except OSError:  # its reader or its disk has gone
        return


def _print_once(text: str, everywhere: bool = True) -> None:
    """Print what all ranks meet once. Before they have met each other it is said once a node where it may differ
    (`everywhere`), by rank 0 alone where it cannot."""
    dist = sys.modules.get("torch.distributed")  # where it was never imported, no rank knows of the others
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1:
        if _number() == "0" or (everywhere and os.environ.get("LOCAL_RANK") == "0") or _odd_numbers():
            _print(text)
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        first = store.add("reported/" + hashlib.sha256(text.encode(errors="replace")).hexdigest(), 1) == 1
    except (RuntimeError, dist.DistError):  # the store went with another rank: then say it here
        first = True
    if first:
        _print(text)
    _linger(store, dist)


def _print(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # nobody listens any more
        return


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
