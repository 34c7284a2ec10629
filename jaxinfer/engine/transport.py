"""Moves wire messages between engine clients and engine cores over ZMQ.

Each client binds a ROUTER (messages to cores, addressed by core index) and a PULL (messages from
cores); each core connects a DEALER and a PUSH to every client, so N clients x M cores need nothing
new. Knows bytes, sockets and `core.messages`; must not know requests, schedulers, processes or JAX.

The sockets of a local engine are files in a private (0700) directory which is removed as soon as
the core is connected: nothing is left behind however either side ends.
"""

import contextlib
import queue
import shutil
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
import zmq

from jaxinfer.core.messages import WIRE_VERSION, ClientMessage, CoreMessage, Hello
from jaxinfer.errors import EngineDeadError
from jaxinfer.logging import get_logger

logger = get_logger(__name__)
_Message = TypeVar("_Message")

_MAX_IPC_PATH = 100  # sun_path holds 108 bytes; libzmq keeps some
_FLUSH_MS = 2000  # how long the last messages of a core may take to leave


class ClientAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where one client listens."""

    to_core: str
    from_core: str


class Incoming(NamedTuple):
    """A message as the core's main thread gets it."""

    client_index: int
    message: ClientMessage


class Outgoing(NamedTuple):
    client_index: int
    message: CoreMessage


def core_identity(core_index: int) -> bytes:
    return core_index.to_bytes(2, "little")


def _open_socket(context: zmq.Context, kind: int, *, linger_ms: int) -> zmq.Socket:
    """A socket without a high-water mark: what may be in flight is bounded by the scheduler."""
    socket = context.socket(kind)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.LINGER, linger_ms)
    return socket


class ClientEndpoint:
    """The sockets of one client. Everything here is for one thread and never blocks."""

    def __init__(self) -> None:
        directory = tempfile.mkdtemp(prefix="jaxinfer-")
        if len(directory) > _MAX_IPC_PATH - len("/from_core"):
            Path(directory).rmdir()
            directory = tempfile.mkdtemp(prefix="jaxinfer-", dir="/tmp")
        self._directory = Path(directory)
        self._has_files = True
        self.address = ClientAddress(
            to_core=f"ipc://{directory}/to_core", from_core=f"ipc://{directory}/from_core"
        )
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[CoreMessage] = msgspec.msgpack.Decoder(CoreMessage)
        self._context = zmq.Context()
        self._router = _open_socket(self._context, zmq.ROUTER, linger_ms=0)
        # Without it a ROUTER silently drops what it cannot deliver.
        self._router.set(zmq.ROUTER_MANDATORY, 1)
        self._router.bind(self.address.to_core)
        self._pull = _open_socket(self._context, zmq.PULL, linger_ms=0)
        self._pull.bind(self.address.from_core)

    @property
    def hello_fd(self) -> int:
        """Becomes readable (edge-triggered) when a core may have said hello."""
        return int(self._router.get(zmq.FD))

    @property
    def messages_fd(self) -> int:
        """Becomes readable (edge-triggered) when `receive` may have something."""
        return int(self._pull.get(zmq.FD))

    def receive_hello(self) -> Hello | None:
        """The next core's greeting, if one is there; raises EngineDeadError for a foreign wire."""
        try:
            _, payload = self._router.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        message = decode(payload, self._decoder)
        if not isinstance(message, Hello):
            raise EngineDeadError("The engine core did not greet; is it another program?")
        if message.wire_version != WIRE_VERSION:
            raise EngineDeadError(
                f"The engine core speaks wire version {message.wire_version}, this client "
                f"{WIRE_VERSION}: install the same jaxinfer on both sides."
            )
        return message

    def send(self, core_index: int, message: ClientMessage) -> None:
        """Raises EngineDeadError when no such core is connected."""
        frames = [core_identity(core_index), self._encoder.encode(message)]
        try:
            self._router.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDeadError(f"The engine core is not connected: {error}.") from error

    def receive(self) -> list[CoreMessage]:
        """All messages that have come; drains, because the descriptor is edge-triggered."""
        messages = []
        while True:
            try:
                payload = self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            message = decode(payload, self._decoder)
            if message is not None:
                messages.append(message)

    def remove_files(self) -> None:
        """Removes the socket files. Connections that exist go on; new ones are impossible."""
        if self._has_files:
            self._has_files = False
            shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        self._router.close()
        self._pull.close()
        self._context.term()
        self.remove_files()


class CoreEndpoint:
    """The sockets of one core: one thread decodes what comes, one encodes what goes.

    The main thread only touches `inbox` and `send`, so it never waits for a socket.
    """

    def __init__(self, clients: list[ClientAddress], *, core_index: int) -> None:
        self.inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        self.num_clients = len(clients)
        self._outbox: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        self._clients = clients
        self._identity = core_identity(core_index)
        self._context = zmq.Context()
        self._input = threading.Thread(target=self._run_input, name="core-input", daemon=True)
        self._output = threading.Thread(target=self._run_output, name="core-output", daemon=True)

    def start(self, hello: Hello) -> None:
        """Connects to every client and greets it."""
        payload = msgspec.msgpack.encode(hello)
        self._dealers = []
        for client in self._clients:
            dealer = _open_socket(self._context, zmq.DEALER, linger_ms=0)
            dealer.set(zmq.IDENTITY, self._identity)
            dealer.connect(client.to_core)
            dealer.send(payload)
            self._dealers.append(dealer)
        self._input.start()
        self._output.start()

    def send(self, client_index: int, message: CoreMessage) -> None:
        self._outbox.put(Outgoing(client_index, message))

    def broadcast(self, message: CoreMessage) -> None:
        for client_index in range(self.num_clients):
            self.send(client_index, message)

    def close(self) -> None:
        """Returns when all that was sent has left, or after two seconds."""
        self._outbox.put(None)
        self._output.join()
        self._context.term()  # wakes the input thread, which closes its sockets

    def _run_input(self) -> None:
        decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
        poller = zmq.Poller()
        index_of = {dealer: index for index, dealer in enumerate(self._dealers)}
        for dealer in self._dealers:
            poller.register(dealer, zmq.POLLIN)
        with contextlib.suppress(zmq.ContextTerminated):
            while True:
                for dealer, _ in poller.poll():
                    message = decode(dealer.recv(), decoder)
                    if message is not None:
                        self.inbox.put(Incoming(index_of[dealer], message))
        for dealer in self._dealers:
            dealer.close()

    def _run_output(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        sockets = []
        for client in self._clients:
            socket = _open_socket(self._context, zmq.PUSH, linger_ms=_FLUSH_MS)
            socket.connect(client.from_core)
            sockets.append(socket)
        while (outgoing := self._outbox.get()) is not None:
            sockets[outgoing.client_index].send(encoder.encode(outgoing.message))
        for socket in sockets:
            socket.close()


def decode(payload: bytes, decoder: "msgspec.msgpack.Decoder[_Message]") -> _Message | None:
    """The message, or None (logged) for bytes that are none: a bad peer must not end the engine."""
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # (ValueError: text that is not UTF-8; msgspec wraps all that __post_init__ raises.)
        logger.warning("dropped a message of %d bytes that is none: %s", len(payload), error)
        return None
