"""Applies what a step gave for one sequence to its request. Knows no pages, slots or queues."""

from typing import NamedTuple

from jaxinfer.core.messages import SequenceUpdate
from jaxinfer.core.request import FinishReason, Request, RequestStatus
from jaxinfer.core.step import ScheduledSeq, SeqOutput, TokenLogprobs
from jaxinfer.scheduler.sequence import SequenceState
from jaxinfer.scheduler.stop import Stop


def finish(request: Request, stop: Stop) -> None:
    request.status = RequestStatus.FINISHED
    request.finish_reason = stop.reason
    request.stop_reason = stop.token_id


def apply_result(
    state: SequenceState, seq: ScheduledSeq, result: SeqOutput
) -> SequenceUpdate | None:
    """Appends new tokens, ends the request where it must end; returns the news, if any."""
    request = state.request
    if seq.samples:
        request.num_pending_tokens -= 1
    news = _News([], None, None)
    if result.error is not None:
        finish(request, Stop(FinishReason.ERROR))
    else:
        news = _accept(state, seq, result)
    if not news.token_ids and not news.prompt_logprobs and request.finish_reason is None:
        return None
    return _make_update(state, news, result.error)


class _News(NamedTuple):
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs] | None


def _accept(state: SequenceState, seq: ScheduledSeq, result: SeqOutput) -> _News:
    request = state.request
    prompt_logprobs = None
    if request.sampling.prompt_logprobs is not None:
        prompt_logprobs = _new_prompt_logprobs(state, seq, result) or None
    if not seq.samples:
        assert not result.token_ids, "a step that ends before the last token gave a token"
        return _News([], None, prompt_logprobs)
    if request.max_tokens == 0:  # only the prompt was wanted; the sampled token is dropped
        finish(request, Stop(FinishReason.LENGTH))
        return _News([], None, prompt_logprobs)
    (token_id,) = result.token_ids
    request.output_token_ids.append(token_id)
    stop = state.stop.check(token_id, len(request.output_token_ids))
    if stop is not None:
        finish(request, stop)
    logprobs = result.logprobs if request.sampling.logprobs is not None else None
    return _News([token_id], logprobs, prompt_logprobs)


def _new_prompt_logprobs(
    state: SequenceState, seq: ScheduledSeq, result: SeqOutput
) -> list[TokenLogprobs]:
    """Those not passed on before: a preempted request computes part of its prompt twice."""
    if not result.prompt_logprobs:
        return []
    num_seen = state.num_prompt_logprobs - seq.start
    assert num_seen >= 0, "prompt logprobs were skipped"
    new = result.prompt_logprobs[num_seen:]
    state.num_prompt_logprobs += len(new)
    return new


def _make_update(state: SequenceState, news: _News, error: str | None) -> SequenceUpdate:
    request = state.request
    queue_time_s = None
    if not state.was_reported:
        state.was_reported = True
        assert request.first_scheduled_time_s is not None
        queue_time_s = max(0.0, request.first_scheduled_time_s - request.arrival_time_s)
    return SequenceUpdate(
        request_id=request.request_id,
        new_token_ids=news.token_ids,
        logprobs=news.logprobs,
        prompt_logprobs=news.prompt_logprobs,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        num_cached_tokens=request.num_cached_tokens,
        queue_time_s=queue_time_s,
        error=error,
    )
