"""Messages between the launchers of a job: one JSON object per line over TCP, and a sign of life where there is nothing to say."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

VERSION = 2
_LONGEST_LINE = 64 * 1024
_BEATS = 4  # in the time after which a silent peer is lost


class Wire:
    """One connection. `send` may be called from any thread, the rest from one.

    `silence_s`: a peer that has said nothing for so long is lost.
    """

    def __init__(self, connection: socket.socket, silence_s: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self.connection = connection
        self.silence_s = silence_s
        self._lock = threading.Lock()
        self._received = b""
        self._unsent = b""
        self._heard = self._said = time.monotonic()

    def send(self, **message: Any) -> None:
        """Say something, now or with the next `beat`. Never waits; a connection that is gone is noticed by who reads it."""
        with self._lock:
            self._unsent += json.dumps(message).encode() + b"\n"
            self._flush()

    def receive(self) -> list[dict[str, Any]]:
        """What has arrived, without waiting. Raises ConnectionError, in words, where the peer has gone or talks nonsense."""
        try:
            data = self.connection.recv(_LONGEST_LINE)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ConnectionError(f"its connection failed ({error.strerror or error})") from error
        if not data:
            raise ConnectionError("its launcher has ended")
        self._heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > _LONGEST_LINE:
            raise ConnectionError("it does not talk like a launcher")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ConnectionError("it does not talk like a launcher") from error
        if not all(isinstance(message, dict) and isinstance(message.get("type"), str) for message in messages):
            raise ConnectionError("it does not talk like a launcher")
        return [message for message in messages if message["type"] != "beat"]

    def beat(self) -> None:
        """Give the sign of life that is due. Raises ConnectionError, in words, where the peer has given none for too long."""
        now = time.monotonic()
        if now - self._heard > self.silence_s:
            raise ConnectionError(f"no sign of life for {self.silence_s:g} s (heartbeat_timeout_s)")
        with self._lock:
            self._flush()
            is_due = now - self._said >= self.silence_s / _BEATS
        if is_due:
            self.send(type="beat")

    def flushed(self) -> bool:
        """Whether all that was said is on its way."""
        with self._lock:
            self._flush()
            return not self._unsent

    def close(self) -> None:
        """Let go of the connection."""
        self.connection.close()

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self.connection.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:
                self._unsent = b""  # reading tells why
                return
            self._unsent = self._unsent[sent:]
            self._said = time.monotonic()
