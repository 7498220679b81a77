"""The folder of a run: taken by one run at a time, and shared by all of its ranks."""

from __future__ import annotations

import secrets

from data_tools.errors import UserError
from pretrain.process.collectives import gather, raise_on_all_ranks
from pretrain.process.runtime import Runtime
from pretrain.process.status import Status


def claim_run_dir(status: Status, runtime: Runtime) -> None:
    """See that run.dir is this run's and that all ranks share it; from then on any of them may write its status. All
    ranks must call it, once."""
    folder = status.folder
    token = gather(secrets.token_hex(8))[0]
    probe = folder / f".shared-{token}"

    def own() -> None:
        status.own()
        probe.touch()

    def look() -> None:
        if not probe.exists():
            raise UserError(
                f"run.dir {folder.absolute()} is not shared by all hosts",
                got="a folder that rank 0 wrote to and this rank cannot see",
                remedy="set run.dir to a shared file system",
            )

    raise_on_all_ranks(own if runtime.is_main else lambda: None, f"preparing run.dir {folder}")
    raise_on_all_ranks(look, "checking run.dir")
    raise_on_all_ranks(probe.unlink if runtime.is_main else lambda: None, "checking run.dir")
    status.share()
