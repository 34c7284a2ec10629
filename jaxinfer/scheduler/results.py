"""Applies what a step gave for one sequence to its request. Knows no pages, slots or queues."""

from jaxinfer.core.messages import SequenceUpdate
from jaxinfer.core.request import FinishReason, Request, RequestStatus
from jaxinfer.core.step import ScheduledSeq, SeqOutput, TokenLogprobs
from jaxinfer.scheduler.sequence import SequenceState
from jaxinfer.scheduler.stop import Stop


def finish(request: Request, stop: Stop) -> None:
    request.status = RequestStatus.FINISHED
    request.finish_reason = stop.reason
    request.stop_reason = stop.token_id


def fail_request(state: SequenceState, error: str) -> SequenceUpdate:
    """Ends a request that no step will end; returns the news."""
    finish(state.request, Stop(FinishReason.ERROR))
    return _make_update(state, [], error=error)


def apply_result(
    state: SequenceState, seq: ScheduledSeq, result: SeqOutput
) -> SequenceUpdate | None:
    """Appends a new token, ends the request where it must end; returns the news, if any."""
    request = state.request
    if seq.samples:
        request.num_pending_tokens -= 1
    if result.error is not None:
        finish(request, Stop(FinishReason.ERROR))
        return _make_update(state, [], error=result.error)
    prompt_logprobs = None
    if result.prompt_logprobs and request.sampling.prompt_logprobs is not None:
        prompt_logprobs = _new_prompt_logprobs(state, seq, result) or None
    new_token_ids: list[int] = []
    if seq.samples:
        new_token_ids = _accept_token(state, result)
    if prompt_logprobs is None and request.finish_reason is None:
        if not new_token_ids:
            return None
        if state.was_reported and not result.logprobs:  # as nearly always
            return SequenceUpdate(
                request_id=request.request_id,
                new_token_ids=new_token_ids,
                num_cached_tokens=request.num_cached_tokens,
            )
    wants_logprobs = request.sampling.logprobs is not None
    return _make_update(
        state,
        new_token_ids,
        logprobs=list(result.logprobs) if wants_logprobs and new_token_ids else None,
        prompt_logprobs=prompt_logprobs,
    )


def _accept_token(state: SequenceState, result: SeqOutput) -> list[int]:
    request = state.request
    if request.max_tokens == 0:  # only the prompt was wanted; the sampled token is dropped
        finish(request, Stop(FinishReason.LENGTH))
        return []
    (token_id,) = result.token_ids
    request.output_token_ids.append(token_id)
    stop = state.stop.check(token_id, len(request.output_token_ids))
    if stop is not None:
        finish(request, stop)
    return [token_id]


def _new_prompt_logprobs(
    state: SequenceState, seq: ScheduledSeq, result: SeqOutput
) -> list[TokenLogprobs]:
    """Those not passed on before: a preempted request computes part of its prompt twice."""
    num_seen = state.num_prompt_logprobs - seq.start
    assert num_seen >= 0, "prompt logprobs were skipped"
    new = list(result.prompt_logprobs[num_seen:])
    state.num_prompt_logprobs += len(new)
    return new


def _make_update(
    state: SequenceState,
    new_token_ids: list[int],
    *,
    logprobs: list[TokenLogprobs] | None = None,
    prompt_logprobs: list[TokenLogprobs] | None = None,
    error: str | None = None,
) -> SequenceUpdate:
    request = state.request
    queue_time_s = None
    if not state.was_reported and request.first_scheduled_time_s is not None:
        state.was_reported = True
        queue_time_s = max(0.0, request.first_scheduled_time_s - request.arrival_time_s)
    return SequenceUpdate(
        request_id=request.request_id,
        new_token_ids=new_token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        num_cached_tokens=max(0, request.num_cached_tokens),
        queue_time_s=queue_time_s,
        error=error,
    )
