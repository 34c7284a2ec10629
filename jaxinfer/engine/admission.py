"""From a client's AddRequest to a Request that cannot hurt the engine.

The last gate before the scheduler: clients check too, with better messages, but a core trusts no
client. Knows the engine's limits; must not know text, queues or the device.
"""

from jaxinfer.core.messages import AddRequest, EngineInfo
from jaxinfer.core.request import Request
from jaxinfer.errors import RequestError


def max_prompt_tokens(max_model_len: int, max_tokens: int | None) -> int:
    """The longest prompt: it leaves room for one token unless none is to be generated."""
    return max_model_len if max_tokens == 0 else max_model_len - 1


def check_prompt(
    token_ids: list[int], *, max_tokens: int | None, info: EngineInfo, param: str
) -> None:
    """Raises RequestError (naming `param`) for a prompt that cannot be served."""
    if not token_ids:
        raise RequestError(
            f"{param} must not be empty: it has no tokens to start from.", param=param
        )
    limit = max_prompt_tokens(info.max_model_len, max_tokens)
    if len(token_ids) > limit:
        room = "" if limit == info.max_model_len else ", which leaves no room for an answer"
        raise RequestError(
            f"This model's maximum context length is {info.max_model_len} tokens. However, your "
            f"prompt contains {len(token_ids)} tokens{room}. Please shorten the prompt to at most "
            f"{limit} tokens.",
            param=param,
        )
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < info.vocab_size:
            raise RequestError(
                f"{param} holds token id {token_id}, which is outside the vocabulary "
                f"(0 to {info.vocab_size - 1}).",
                param=param,
            )


def check_priority(priority: int, info: EngineInfo) -> None:
    """Raises RequestError for a priority that would silently mean nothing."""
    if priority != 0 and info.scheduling_policy != "priority":
        raise RequestError(
            f"priority={priority} needs an engine with --scheduling-policy priority; this one "
            f"has {info.scheduling_policy}.",
            param="priority",
        )


def make_request(message: AddRequest, info: EngineInfo, *, client_index: int) -> Request:
    """The request to schedule, max_tokens cut to what the context leaves; raises RequestError."""
    sampling = message.sampling
    check_prompt(
        message.prompt_token_ids, max_tokens=sampling.max_tokens, info=info, param="prompt"
    )
    if sampling.n != 1:
        raise RequestError(f"n must be 1 here (clients fan out), got {sampling.n}.", param="n")
    check_priority(message.priority, info)
    sampling.validate_for_model(vocab_size=info.vocab_size)
    num_prompt = len(message.prompt_token_ids)
    room = info.max_model_len - num_prompt
    if sampling.max_tokens is None:
        # The last token is never computed, so it needs no place in the cache. (Whoever gives a
        # number that the cache cannot hold is told so by the scheduler.)
        room = min(room, max(1, info.num_pages * info.page_size - num_prompt + 1))
    return Request(
        request_id=message.request_id,
        prompt_token_ids=message.prompt_token_ids,
        sampling=sampling,
        eos_token_ids=tuple(info.eos_token_ids),
        max_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
        arrival_time_s=message.arrival_time_s,
        priority=message.priority,
        cache_salt=message.cache_salt,
        client_index=client_index,
    )
