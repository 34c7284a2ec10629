"""Closes connections on which no request comes: half a header, or nothing, costs a bounded time.

(aiohttp limits an idle connection, but not one whose header drips. A body that stops is body.py's;
a client that does not read its answer is the kernel's, see `run.py:bind`.)
Knows connections; nothing of what requests are about.
"""

import asyncio
import time

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

SILENT_TIMEOUT_S = 75.0
"""From the opening of a connection, or its last answer, to the end of the next request's header."""
_SWEEPS_PER_TIMEOUT = 8


class ConnectionWatch:
    """The connections of one application, by aiohttp's protocol objects."""

    def __init__(self) -> None:
        self._busy: set[object] = set()  # a request is being handled
        self._silent_since_s: dict[object, float] = {}

    def middleware(self) -> Middleware:
        """Has to be around every request: a connection is not silent while one is handled."""

        @web.middleware
        async def mark(request: web.Request, handler: Handler) -> web.StreamResponse:
            connection = request.protocol
            self._busy.add(connection)
            try:
                return await handler(request)
            finally:
                self._busy.discard(connection)
                self._silent_since_s.pop(connection, None)

        return mark

    async def close_silent(self, runner: web.AppRunner, timeout_s: float) -> None:
        """Runs until it is cancelled."""
        server = runner.server
        assert server is not None, "the runner is set up"
        while True:
            await asyncio.sleep(timeout_s / _SWEEPS_PER_TIMEOUT)
            now_s = time.monotonic()
            silent = [one for one in server.connections if one not in self._busy]
            self._silent_since_s = {one: self._silent_since_s.get(one, now_s) for one in silent}
            for connection in silent:
                if now_s - self._silent_since_s[connection] > timeout_s:
                    connection.force_close()
