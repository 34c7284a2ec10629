"""AsyncEngine over a core in a real process: the way of every request the server will make."""

import asyncio
import random
from contextlib import aclosing

import pytest

from jaxinfer import AsyncEngine, RequestOutput, SamplingParams
from jaxinfer.engine.request_state import FinishedEvent, OutputKind, TokensEvent
from jaxinfer.errors import EngineDeadError, QueueFullError, RequestError
from tests.engine.conftest import EngineMaker, until
from tests.engine.fake_runner import EOS, expected_output

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


async def collect(
    engine: AsyncEngine, prompt: object, params: SamplingParams, kind: OutputKind = "cumulative"
) -> list[RequestOutput]:
    return [
        output
        async for output in engine.generate(
            prompt,  # pyright: ignore[reportArgumentType]
            params,
            request_id="r",
            output_kind=kind,
        )
    ]


async def idle(engine: AsyncEngine) -> None:
    """Returns when the core holds nothing any more."""
    await until(
        lambda: not (engine.stats.num_running or engine.stats.num_waiting or engine.num_inflight)
    )


def text_of(tokens: list[int]) -> str:
    return "".join(chr(token) for token in tokens if token != EOS)


async def test_delta_cumulative_and_final_agree(running_engine: EngineMaker) -> None:
    params = SamplingParams(
        n=3, seed=11, max_tokens=20, logprobs=1, prompt_logprobs=0, stop=["zz", "q"]
    )
    async with running_engine() as engine:
        deltas = await collect(engine, "hello", params, "delta")
        cumulative = await collect(engine, "hello", params, "cumulative")
        final = await collect(engine, "hello", params, "final")
    assert len(final) == 1
    assert cumulative[-1].outputs == final[0].outputs
    assert [output.finished for output in deltas].count(True) == 1
    assert deltas[-1].finished
    for whole in final[0].outputs:
        parts = [one for output in deltas for one in output.outputs if one.index == whole.index]
        assert "".join(part.text for part in parts) == whole.text
        assert [token for part in parts for token in part.token_ids] == whole.token_ids
        assert [entry for part in parts for entry in part.logprobs or []] == whole.logprobs
        assert parts[-1].cumulative_logprob == whole.cumulative_logprob
        reasons = [part.finish_reason for part in parts]
        assert reasons == [None] * (len(parts) - 1) + [whole.finish_reason]
    prompts = [output.prompt_logprobs for output in deltas if output.prompt_logprobs]
    assert prompts == [final[0].prompt_logprobs]
    for earlier, later in zip(cumulative, cumulative[1:], strict=False):
        for before, after in zip(earlier.outputs, later.outputs, strict=True):
            assert after.text.startswith(before.text)
            assert after.token_ids[: len(before.token_ids)] == before.token_ids


async def test_a_slow_consumer_gets_everything_in_few_pieces(running_engine: EngineMaker) -> None:
    async with running_engine("build_slow") as engine:
        outputs: list[RequestOutput] = []
        stream = engine.generate("hello", GREEDY, request_id="r", output_kind="delta")
        async with aclosing(stream):
            async for output in stream:
                outputs.append(output)
                if not output.finished:
                    await idle(engine)  # all the rest is generated meanwhile
    assert len(outputs) == 2
    tokens = [token for output in outputs for token in output.outputs[0].token_ids]
    assert tokens == expected_output(list(b"hello"), GREEDY, 20)
    assert outputs[-1].metrics is not None
    assert outputs[-1].metrics.queue_time_s is not None


class RecordingTap:
    """Open for every third output that is offered to it; what it may not have is yielded."""

    def __init__(self, into: list[RequestOutput], *, error: Exception | None = None) -> None:
        self.num_put = 0
        self._into = into
        self._error = error
        self._num_asked = 0

    def is_open(self) -> bool:
        self._num_asked += 1
        return self._num_asked % 3 == 0

    def put(self, output: RequestOutput) -> None:
        if self._error is not None:
            raise self._error
        assert not output.finished, "the end is the consumer's"
        self.num_put += 1
        self._into.append(output)


async def test_what_a_tap_takes_and_what_is_yielded_make_the_whole_in_order(
    running_engine: EngineMaker,
) -> None:
    params = SamplingParams(n=2, seed=5, max_tokens=20, ignore_eos=True)
    merged: list[RequestOutput] = []
    tap = RecordingTap(merged)
    async with running_engine("build_slow") as engine:
        stream = engine.generate("hello", params, request_id="r", output_kind="delta", tap=tap)
        async for output in stream:
            if len(merged) % 4 == 1:  # it is at work for two steps, with this output in its hands
                await asyncio.sleep(0.05)
            merged.append(output)
        (whole,) = await collect(engine, "hello", params, "final")
    assert 3 <= tap.num_put < len(merged) / 2
    assert merged[-1].finished
    for completion in whole.outputs:
        parts = [one for output in merged for one in output.outputs]
        parts = [part for part in parts if part.index == completion.index]
        assert [token for part in parts for token in part.token_ids] == completion.token_ids
        assert "".join(part.text for part in parts) == completion.text


async def test_a_tap_that_fails_fails_its_request_alone(running_engine: EngineMaker) -> None:
    async with running_engine("build_slow") as engine:
        other = asyncio.create_task(collect(engine, "hello", GREEDY, "final"))
        tap = RecordingTap([], error=ZeroDivisionError("in a frame"))
        with pytest.raises(ZeroDivisionError, match="in a frame"):
            async for _ in engine.generate("x", GREEDY, request_id="t", tap=tap):
                pass
        (output,) = await other
        assert output.outputs[0].token_ids == expected_output(list(b"hello"), GREEDY, 20)
        await idle(engine)


async def test_stop_strings_end_the_core_s_work(running_engine: EngineMaker) -> None:
    tokens = expected_output(list(b"hello"), GREEDY, 20)
    stop = text_of(tokens[4:7])
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, stop=[stop])
    async with running_engine("build_slow") as engine:
        (output,) = await collect(engine, "hello", params, "final")
        await idle(engine)
        assert engine.stats.num_steps_total < 20
    (completion,) = output.outputs
    assert completion.text == text_of(tokens[:4])
    assert completion.token_ids == tokens[:7]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


async def test_closing_the_iterator_aborts(running_engine: EngineMaker) -> None:
    finished: list[FinishedEvent] = []
    async with running_engine("build_slow") as engine:
        engine.observe(on_tokens=None, on_finished=finished.append)
        stream = engine.generate("hello", GREEDY, request_id="left")
        async with aclosing(stream):
            await anext(stream)
        assert engine.num_inflight == 0
        await idle(engine)
        assert engine.stats.kv_usage == 0
        assert engine.stats.num_steps_total < 15
    (event,) = finished
    assert (event.request_id, event.finish_reasons) == ("left", ("abort",))


async def test_cancelling_the_consumer_aborts(running_engine: EngineMaker) -> None:
    async with running_engine("build_slow") as engine:
        task = asyncio.create_task(collect(engine, "hello", GREEDY))
        await until(lambda: engine.stats.num_running > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await idle(engine)


async def test_abort_by_id_ends_the_iterator_with_what_there_is(
    running_engine: EngineMaker,
) -> None:
    params = SamplingParams(temperature=0, n=2, max_tokens=50, ignore_eos=True)
    async with running_engine("build_slow") as engine:
        last: RequestOutput | None = None
        async for output in engine.generate("hello", params, request_id="x"):
            last = output
            await engine.abort("unknown")
            if len(output.outputs[0].token_ids) == 3:
                await engine.abort("x")
        await idle(engine)
    assert last is not None
    assert last.finished
    assert [one.finish_reason for one in last.outputs] == ["abort", "abort"]
    assert 3 <= len(last.outputs[0].token_ids) < 10


async def test_bad_requests_do_nothing_and_the_next_one_works(running_engine: EngineMaker) -> None:
    async with running_engine() as engine:
        for prompt, params, param in (
            ("", GREEDY, "prompt"),
            ("x" * 64, GREEDY, "prompt"),
            ([1000], GREEDY, "prompt"),
            ("x" * 60, GREEDY, "max_tokens"),
            ("x", SamplingParams(stop_token_ids=[1000]), "stop_token_ids"),
        ):
            with pytest.raises(RequestError) as caught:
                await engine.validate(prompt, params)
            assert caught.value.param == param
            with pytest.raises(RequestError):
                await collect(engine, prompt, params)
        assert engine.num_inflight == 0
        assert engine.stats.num_steps_total == 0
        valid = await engine.validate("hello", GREEDY)
        (output,) = await collect(engine, valid, valid.params, "final")
        assert output.outputs[0].token_ids == expected_output(list(b"hello"), GREEDY, 20)


async def test_a_full_queue_is_an_error_before_any_output(running_engine: EngineMaker) -> None:
    async with running_engine("build_slow", max_num_seqs=1, max_num_queued_reqs=1) as engine:
        running = asyncio.create_task(collect(engine, "running", GREEDY))
        await until(lambda: engine.stats.num_running > 0)
        with pytest.raises(QueueFullError):  # its first sequence takes the only place
            await collect(engine, "two", SamplingParams(n=2))
        await asyncio.sleep(0.1)
        assert engine.stats.num_waiting == 0, "nothing of it stays"
        assert (await collect(engine, "next", GREEDY))[-1].finished
        assert (await running)[-1].finished


async def test_closing_the_engine_fails_open_requests(running_engine: EngineMaker) -> None:
    async with running_engine("build_slow") as engine:
        task = asyncio.create_task(collect(engine, "hello", GREEDY))
        await until(lambda: engine.stats.num_running > 0)
        await engine.close()
        with pytest.raises(EngineDeadError, match="shutting down"):
            await task
        assert not engine.is_alive
        with pytest.raises(EngineDeadError):
            await engine.validate("hello", GREEDY)


async def test_events_for_metrics(running_engine: EngineMaker) -> None:
    tokens: list[TokensEvent] = []
    finished: list[FinishedEvent] = []
    async with running_engine() as engine:
        engine.observe(on_tokens=tokens.append, on_finished=finished.append)
        params = SamplingParams(n=2, max_tokens=5, ignore_eos=True)
        await collect(engine, "hello", params)
        before_s = engine.last_step_time_s
        await collect(engine, list(b"0123456789abcdef0"), GREEDY)
        await collect(engine, list(b"0123456789abcdef0"), GREEDY)
        assert engine.last_step_time_s > before_s
    assert sum(event.num_tokens for event in tokens) == 10 + 20 + 20
    assert sum(event.is_first for event in tokens) == 4
    assert all(event.latency_s >= 0 for event in tokens)
    first, second, third = finished
    assert (first.num_output_tokens, first.finish_reasons) == (10, ("length", "length"))
    assert (second.num_prompt_tokens, second.num_cached_tokens) == (17, 0)
    assert third.num_cached_tokens == 16
    times = third.metrics
    assert times.first_token_time_s is not None
    assert times.last_token_time_s is not None
    assert times.finished_time_s is not None
    assert (
        times.arrival_time_s
        < times.first_token_time_s
        < times.last_token_time_s
        <= times.finished_time_s
    )


async def test_reset_prefix_cache(running_engine: EngineMaker) -> None:
    prompt = list(b"0123456789abcdef0")
    async with running_engine() as engine:
        await collect(engine, prompt, GREEDY)
        await engine.reset_prefix_cache()
        (output,) = await collect(engine, prompt, GREEDY, "final")
        assert not output.num_cached_tokens
        (output,) = await collect(engine, prompt, GREEDY, "final")
        assert output.num_cached_tokens == 16


async def test_two_hundred_requests_and_random_aborts(running_engine: EngineMaker) -> None:
    source = random.Random(1)

    async def one(engine: AsyncEngine, index: int) -> bool:
        prompt = [source.randrange(256) for _ in range(source.randrange(1, 40))]
        params = SamplingParams(max_tokens=source.randrange(1, 24), seed=index, ignore_eos=True)
        leave_after = source.choice([None, None, 0, 1, 5])
        await asyncio.sleep(source.random() * 0.2)
        tokens: list[int] = []
        stream = engine.generate(prompt, params, request_id="same id", output_kind="delta")
        async with aclosing(stream):
            async for output in stream:
                tokens += output.outputs[0].token_ids
                if leave_after is not None and len(tokens) > leave_after:
                    return False
        assert params.max_tokens is not None
        assert tokens == expected_output(prompt, params, params.max_tokens)
        return True

    async with running_engine() as engine:
        completed = await asyncio.gather(*(one(engine, index) for index in range(200)))
        await idle(engine)
        assert engine.stats.kv_usage == 0
        assert 50 < sum(completed) < 200
