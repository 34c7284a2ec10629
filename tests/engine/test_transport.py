"""Every message over the wire and over real sockets; bytes that are no message."""

import os
import stat
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.core.messages import (
    WIRE_VERSION,
    AbortRequests,
    AddRequest,
    ClientMessage,
    CoreMessage,
    EngineInfo,
    EngineStats,
    Failed,
    Hello,
    Progress,
    Ready,
    Rejected,
    ResetPrefixCache,
    SequenceUpdate,
    Shutdown,
    StepUpdate,
)
from jaxinfer.core.request import FinishReason
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import TokenLogprobs
from jaxinfer.engine.transport import ClientEndpoint, CoreEndpoint, decode
from jaxinfer.errors import EngineDeadError

INFO = EngineInfo(
    model="m",
    max_model_len=64,
    vocab_size=100,
    num_pages=8,
    page_size=16,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    eos_token_ids=[2, 3],
    max_logprobs=20,
    enable_prefix_caching=True,
    scheduling_policy="fcfs",
    dtype="float32",
    device="cpu",
)
LOGPROBS = [TokenLogprobs([5, 6], [-0.5, -0.25], 2)]
CLIENT_MESSAGES = [
    AddRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(
            temperature=0.5,
            seed=-(2**63),
            logit_bias={5: -1.5},
            allowed_token_ids=[1],
            bad_words_token_ids=[[1, 2]],
        ),
        arrival_time_s=1.25,
        priority=-3,
        cache_salt="salt",
    ),
    AbortRequests(request_ids=["a", "b"]),
    Shutdown(),
    ResetPrefixCache(),
]
CORE_MESSAGES = [
    Hello(wire_version=WIRE_VERSION, pid=1),
    Progress(phase="compile", done=1, total=2, elapsed_s=0.5),
    Ready(info=INFO),
    StepUpdate(
        sequences=[
            SequenceUpdate(
                request_id="r",
                new_token_ids=[5],
                logprobs=LOGPROBS,
                prompt_logprobs=LOGPROBS,
                finish_reason=FinishReason.STOP,
                stop_reason=5,
                num_cached_tokens=16,
                queue_time_s=0.5,
                error="e",
            )
        ],
        stats=EngineStats(num_running=1, kv_usage=0.5),
    ),
    Rejected(request_id="r", kind="queue_full", message="m", param="p"),
    Failed(kind="ConfigError", message="m"),
]


def receive(endpoint: ClientEndpoint, count: int) -> list[CoreMessage]:
    messages: list[CoreMessage] = []
    deadline_s = time.monotonic() + 5
    while len(messages) < count and time.monotonic() < deadline_s:
        messages += endpoint.receive()
        time.sleep(0.001)
    return messages


def wait_for_hello(endpoint: ClientEndpoint) -> Hello:
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        hello = endpoint.receive_hello()
        if hello is not None:
            return hello
        time.sleep(0.001)
    raise AssertionError("no hello")


def test_all_messages_between_two_clients_and_a_core() -> None:
    clients = [ClientEndpoint(), ClientEndpoint()]
    core = CoreEndpoint([client.address for client in clients], core_index=3)
    core.start(Hello(wire_version=WIRE_VERSION, pid=7))
    try:
        for client in clients:
            assert wait_for_hello(client).pid == 7
        for message in CLIENT_MESSAGES:
            clients[1].send(3, message)
        assert [core.inbox.get(timeout=5) for _ in CLIENT_MESSAGES] == [
            (1, message) for message in CLIENT_MESSAGES
        ]
        for message in CORE_MESSAGES:
            core.send(0, message)
        assert receive(clients[0], len(CORE_MESSAGES)) == CORE_MESSAGES
        assert clients[1].receive() == []
        core.broadcast(Ready(info=INFO))
        for client in clients:
            assert receive(client, 1) == [Ready(info=INFO)]
    finally:
        core.close()
        for client in clients:
            client.close()


def test_what_was_sent_before_close_arrives_after_it() -> None:
    client = ClientEndpoint()
    core = CoreEndpoint([client.address], core_index=0)
    core.start(Hello(wire_version=WIRE_VERSION, pid=7))
    for _ in range(1000):
        core.send(0, CORE_MESSAGES[-1])
    core.close()
    assert len(receive(client, 1000)) == 1000
    client.close()


def test_a_foreign_wire_version_is_refused() -> None:
    client = ClientEndpoint()
    core = CoreEndpoint([client.address], core_index=0)
    core.start(Hello(wire_version=WIRE_VERSION + 1, pid=7))
    try:
        with pytest.raises(EngineDeadError, match="install the same jaxinfer"):
            wait_for_hello(client)
    finally:
        core.close()
        client.close()


def test_sending_to_nobody_is_an_error() -> None:
    client = ClientEndpoint()
    with pytest.raises(EngineDeadError, match="not connected"):
        client.send(0, Shutdown())
    client.close()


def test_sockets_are_private_and_removable_while_connected() -> None:
    client = ClientEndpoint()
    directory = Path(client.address.to_core.removeprefix("ipc://")).parent
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    core = CoreEndpoint([client.address], core_index=0)
    core.start(Hello(wire_version=WIRE_VERSION, pid=7))
    core.send(0, CORE_MESSAGES[1])
    wait_for_hello(client)
    assert receive(client, 1)
    client.remove_files()
    assert not directory.exists()
    client.send(0, Shutdown())
    assert core.inbox.get(timeout=5).message == Shutdown()
    core.close()
    client.close()


def test_a_message_that_is_none_is_dropped_and_the_next_one_arrives() -> None:
    client = ClientEndpoint()
    core = CoreEndpoint([client.address], core_index=0)
    core.start(Hello(wire_version=WIRE_VERSION, pid=7))
    wait_for_hello(client)
    bad_sampling = msgspec.msgpack.encode(["add", "r", [1], {"temperature": -1.0}, 0.0, 0, None])
    for payload in (b"", b"\xc1", b"\x00" * 100, bad_sampling):
        client._router.send_multipart([b"\x00\x00", payload])
    client.send(0, Shutdown())
    assert core.inbox.get(timeout=5).message == Shutdown()
    core.close()
    client.close()


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_decoder(payload: bytes) -> None:
    decode(payload, msgspec.msgpack.Decoder(ClientMessage))
    decode(payload, msgspec.msgpack.Decoder(CoreMessage))


@given(st.data())
def test_no_mutation_of_a_message_crashes_the_decoder(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from([*CLIENT_MESSAGES, *CORE_MESSAGES]))
    payload = bytearray(msgspec.msgpack.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    decode(cut, msgspec.msgpack.Decoder(ClientMessage))
    decode(cut, msgspec.msgpack.Decoder(CoreMessage))
