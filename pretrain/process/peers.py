"""Which ranks are still there. A rank that dies, however it dies, is named on all others within seconds.

Every rank keeps a TCP connection to rank 0. The kernel closes it with the process, also after SIGKILL or when memory
ran out, and a rank that ends by itself says so first: an end of the connection without a word is a death. There is no
time limit that a slow or stopped process could exceed. A host that loses power is noticed by TCP's keep-alive. Each
rank also sends a beat a second, an empty line: where a rank hangs, those that are silent are named as the likely cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

from data_tools.errors import UserError
from pretrain.process.collectives import gather, raise_on_all_ranks
from pretrain.process.entry import reason_of
from pretrain.process.runtime import Runtime

LEFT, FAILED, HANGS, DIED, SILENT = "left", "failed", "hangs", "died", "silent"
_CONNECT = 60.0  # seconds to reach rank 0 at the start
_PATIENCE = 3.0  # seconds that a rank whose collective broke waits to hear of a death
_GRACE = 10.0  # seconds that a rank gets to end by itself, once it heard that another is gone
_BEAT = 1.0  # seconds
_SILENCE = 5.0  # seconds without a beat after which a rank counts as silent
_WARN_AFTER = 60.0  # seconds of silence that are worth a line
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


class Peers:
    """This rank's connections. All ranks must build one, and `leave` at a good end.

    Args:
        on_hang: called at once when another rank reports that it hangs.
        on_loss: called with the reason when another rank is gone and this one did not end by itself; ends the process.
    """

    def __init__(self, runtime: Runtime, on_hang: Callable[[], None], on_loss: Callable[[str], None]):
        self._rank, self._on_hang, self._on_loss = runtime.rank, on_hang, on_loss
        self._reason, self._heard, self._left = "", threading.Event(), False
        self._lines: dict[socket.socket, bytearray] = {}
        self._ranks: dict[socket.socket, int] = {}
        self._answered: dict[int, float] = {}  # monotonic time of the last word of those that this rank hears
        self._silent: dict[int, float] = {}  # time since when others are silent, as rank 0 tells
        self._sending = threading.Lock()
        self._names = [f"rank {rank} (process {pid} on {host})" for rank, (host, pid) in enumerate(gather(_place()))]
        if runtime.world_size > 1:
            self._connect(runtime)
            for run, name in ((self._listen, "peer-watch"), (self._heartbeat, "peer-beat")):
                threading.Thread(target=run, daemon=True, name=name).start()

    @property
    def name(self) -> str:
        """This rank, its process and its host."""
        return self._names[self._rank]

    def blame(self, text: str) -> str:
        """`text`, which says where this rank hangs, behind the ranks that are silent: it may be waiting for them."""
        silent = self._silent | self._unheard()
        if not silent:
            return text
        stopped = ", ".join(f"{self._names[rank]} since {_clock(at)}" for rank, at in sorted(silent.items()))
        return f"no answer from {stopped}: stopped, or stuck in foreign code; {text}"

    def explain(self, error: BaseException) -> BaseException:
        """Why this rank fails: `error`, or the loss of another rank that broke the collective it was in. Tells the
        others."""
        if self._ranks and not isinstance(error, UserError) and self._heard.wait(_PATIENCE):
            return UserError(self._reason)
        self.tell(FAILED, f"rank {self._rank} failed: {reason_of(error)}")
        return error

    def tell(self, event: str, reason: str = "") -> None:
        """Send word to rank 0, or as rank 0 to all."""
        self._send({"event": event, "reason": reason}, list(self._ranks))

    def leave(self) -> None:
        """End as agreed: from here on nobody watches this rank."""
        self._left = True
        self.tell(LEFT)

    def _connect(self, runtime: Runtime) -> None:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")  # where the ranks have found each other already
        server, offer = None, None
        if runtime.is_main:
            server = _server(address)
            offer = (server.getsockname()[1], secrets.token_hex(16))
        port, token = gather(offer)[0]
        if server is None:
            raise_on_all_ranks(lambda: self._join(address, port, token), "connecting the ranks")
        else:
            raise_on_all_ranks(lambda: self._accept(server, token, runtime.world_size - 1), "connecting the ranks")

    def _join(self, address: str, port: int, token: str) -> None:
        connection = socket.create_connection((address, port), timeout=_CONNECT)
        self._add(connection, 0)
        self._send({"rank": self._rank, "token": token}, [connection])

    def _accept(self, server: socket.socket, token: str, count: int) -> None:
        with server:
            while len(self._ranks) < count:
                connection, _ = server.accept()
                connection.settimeout(_CONNECT)
                try:
                    hello = json.loads(connection.makefile("rb").readline())
                    known = hello["token"] == token
                except (OSError, ValueError, LookupError, TypeError):
                    known = False
                if known:
                    self._add(connection, hello["rank"])
                else:  # not one of ours
                    connection.close()

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._ranks[connection] = rank
        self._answered[rank] = time.monotonic()
        self._lines[connection] = bytearray()

    def _send(self, message: dict | None, to: list[socket.socket]) -> None:
        line = b"" if message is None else json.dumps(message).encode()
        for connection in to:
            # Gone: the listener sees it. Or it has not read for long: then this rank must not wait for it.
            with contextlib.suppress(OSError), self._sending:
                connection.send(line + b"\n", socket.MSG_DONTWAIT)

    def _heartbeat(self) -> None:
        """Tell the others that this rank runs, and as rank 0 who is silent."""
        told: set[int] = set()
        warned: set[int] = set()
        before = time.monotonic()
        while not self._left:
            time.sleep(_BEAT)
            if time.monotonic() - before > _SILENCE:  # this rank was stopped itself: the others' beats are to be read
                self._answered = dict.fromkeys(self._answered, time.monotonic())
            before = time.monotonic()
            self._send(None, list(self._ranks))
            silent = self._unheard()
            if self._rank == 0 and (silent.keys() != told):
                told = set(silent)
                self._send({"event": SILENT, "since": list(silent.items())}, list(self._ranks))
            long = {rank for rank, since in silent.items() if time.time() - since > _WARN_AFTER}
            for rank in long - warned:
                text = f"no answer from {self._names[rank]} since {_clock(silent[rank])}"
                print(f"warning: {text}: stopped, or stuck in foreign code", file=sys.stderr, flush=True)
            warned = long

    def _unheard(self) -> dict[int, float]:
        """Ranks that this one should hear and does not, and since when."""
        now = time.monotonic()
        ages = {rank: now - at for rank, at in list(self._answered.items())}
        return {rank: time.time() - age for rank, age in ages.items() if age > _SILENCE}

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._ranks:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                ready = [cast(socket.socket, key.fileobj) for key, _ in selector.select()]
                for connection, message in [(c, m) for c in ready for m in self._read(c)]:
                    self._handle(message, connection, selector)

    def _handle(self, message: dict, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        if message["event"] == SILENT:
            self._silent = {rank: since for rank, since in message["since"] if rank != self._rank}
            return
        if message["event"] in (LEFT, DIED):
            selector.unregister(connection)
            self._answered.pop(self._ranks[connection], None)
        if message["event"] != LEFT:
            self._lose(message, connection)

    def _read(self, connection: socket.socket) -> Iterator[dict]:
        """Messages that arrived; the end of the connection is one of them, unless another came before."""
        try:
            data = connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            name = self._names[self._ranks[connection]]
            reason = f"{name} died without a word: killed from outside, perhaps because the memory ran out"
            yield {"event": DIED, "reason": reason}
            return
        self._answered[self._ranks[connection]] = time.monotonic()
        buffer = self._lines[connection]
        buffer += data
        *lines, rest = bytes(buffer).split(b"\n")
        buffer[:] = rest
        yield from (json.loads(line) for line in lines if line)

    def _lose(self, message: dict, source: socket.socket) -> None:
        """Another rank is gone: pass it on, and end this process unless it ends by itself."""
        if self._left:
            return
        hangs = message["event"] == HANGS
        if self._rank == 0:
            others = [connection for connection in self._ranks if connection is not source]
            self._send({"event": HANGS if hangs else FAILED, "reason": message["reason"]}, others)
        if hangs:
            self._on_hang()
        self._reason = message["reason"]
        self._heard.set()
        time.sleep(_GRACE)
        self._on_loss(self._reason)


def _place() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _server(address: str) -> socket.socket:
    if address in ("127.0.0.1", "localhost"):
        server = socket.create_server(("127.0.0.1", 0))
    elif socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    server.settimeout(_CONNECT)
    return server
