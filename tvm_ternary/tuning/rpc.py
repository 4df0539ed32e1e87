"""TVM's RPC tracker and its servers, asked with limits on how long to wait: TVM's own client retries for a minute."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm_ternary.errors import HostError, OptionError

_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Tracker:
    """A tracker and the key under which the servers to use are registered.

    Parameters
    ----------
    host : str
    port : int
    key : str
    """

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, address: str, key: str) -> Tracker:
        """Read ``HOST:PORT``.

        Raises
        ------
        OptionError
            If it is none.
        """
        host, _, port = address.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
            raise OptionError("--rpc-tracker", f"got {address!r}; expected HOST:PORT", "for example 192.0.2.7:9190")
        return cls(host.strip("[]"), int(port), key)

    def __str__(self) -> str:
        return f"tracker {self.host}:{self.port}"

    def require_servers(self) -> int:
        """Count the servers with the key, of which there must be one.

        Raises
        ------
        HostError
            If no tracker answers, or there is no server.
        """
        keys = self._keys()
        if not keys.get(f"server:{self.key}"):
            others = sorted({name.partition(":")[2] for name in keys})
            registered = f"its servers have {', '.join(others)}" if others else "it has no servers"
            hint = f"start one: python -m tvm.exec.rpc_server --tracker {self.host}:{self.port} --key {self.key}"
            raise HostError(str(self), f"no server has the key {self.key!r}; {registered}", hint)
        return keys[f"server:{self.key}"]

    def session(self, seconds: float) -> Any:
        """Connect to a server that is free, waiting for one.

        Parameters
        ----------
        seconds : float
            After which the server ends the session.
        """
        from tvm import rpc

        with self._connection() as (sock, base):
            sock.settimeout(seconds)
            base.sendjson(sock, [base.TrackerCode.REQUEST, self.key, "", 1])
            status, answer = base.recvjson(sock)
        if status != base.TrackerCode.SUCCESS:
            raise ConnectionError(f"{self} refuses: {answer}")
        url, port, match = answer
        return rpc.connect(url, port, match, session_timeout=seconds)

    def _keys(self) -> dict[str, int]:
        """Count the tracker's servers by ``server:KEY``."""
        try:
            with self._connection() as (sock, base):
                base.sendjson(sock, [base.TrackerCode.SUMMARY])
                status, summary = base.recvjson(sock)
        except OSError as error:
            raise self._silent(error.strerror or str(error)) from error
        counts: dict[str, int] = {}
        for server in summary["server_info"] if status == base.TrackerCode.SUCCESS else []:
            counts[server["key"]] = counts.get(server["key"], 0) + 1
        return counts

    @contextmanager
    def _connection(self) -> Iterator[tuple[socket.socket, Any]]:
        from tvm.rpc import base

        with socket.create_connection((self.host, self.port), _ANSWER_SECONDS) as sock:
            magic = struct.pack("<i", base.RPC_TRACKER_MAGIC)
            sock.sendall(magic)
            if base.recvall(sock, len(magic)) != magic:
                raise ConnectionError("what answers is no RPC tracker")
            yield sock, base

    def _silent(self, reason: str) -> HostError:
        hint = "start one: python -m tvm.exec.rpc_tracker"
        return HostError(str(self), f"does not answer ({reason})", f"{hint} --host HOST --port {self.port}")
