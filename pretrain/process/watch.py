"""Who watches a rank while it trains: the other ranks (peers.py) and itself (watchdog.py)."""

from __future__ import annotations

from pretrain.config.durations import parse_seconds
from pretrain.process.entry import reason_of
from pretrain.process.peers import HANGS, Peers
from pretrain.process.runtime import Runtime
from pretrain.process.status import Status
from pretrain.process.watchdog import Watchdog, end_process, phase, print_stacks


class Watch:
    """`with Watch(...):` around the training: a rank that dies, hangs or fails ends all, and the status says which one
    it was. All ranks must make one."""

    def __init__(self, runtime: Runtime, status: Status, hang_timeout: str | None):
        self._status, self._hang_timeout = status, hang_timeout
        self._peers = Peers(runtime, self._print_stacks, lambda reason: end_process(reason, status.fail))
        limit = None if hang_timeout is None else parse_seconds(hang_timeout, "guard.hang_timeout")
        self._watchdog = Watchdog(limit, self._hangs)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Tell the others why this rank fails, and write the status. What leaves the block is the error, or the loss of
        the rank that broke the collective it was in. From here on nobody watches this rank."""
        try:
            if error is not None:
                cause = self._peers.explain(error)
                self._status.fail(reason_of(cause))
                if cause is not error:
                    raise cause from error
        finally:
            self._watchdog.close()
            self._peers.leave()

    def _hangs(self) -> None:
        reason = f"no progress for {self._hang_timeout}: {self._peers.blame(self._whereabouts())}"
        self._peers.tell(HANGS, reason)
        self._print_stacks()
        end_process(reason, self._status.fail)

    def _print_stacks(self) -> None:
        print_stacks(f"stacks of all threads of {self._whereabouts()}:")

    def _whereabouts(self) -> str:
        return f"{self._peers.name} in {phase()} after step {self._status.step}"
