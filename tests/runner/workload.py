"""Random requests that use every sampling feature, and what greedy ones must answer."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.core.sampling_params import SamplingParams
from tests.runner.tiny_llama import EOS, TinyLlama


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request."""

    prompt: list[int]
    sampling: SamplingParams


def random_cases(
    count: int, *, seed: int, vocab_size: int, max_model_len: int, max_output: int = 64
) -> list[Case]:
    """Prompts of 1 .. the context, many short, many with a common beginning; all settings."""
    rng = np.random.default_rng(seed)
    bases = rng.integers(2, vocab_size, (2, max_model_len)).tolist()
    cases = []
    for index in range(count):
        length = int(rng.integers(1, max_model_len if rng.random() < 0.5 else 20))
        shared = int(length * rng.uniform(0.5, 1.0)) if rng.random() < 0.6 else 0
        own = rng.integers(2, vocab_size, length - shared).tolist()
        prompt = bases[int(rng.integers(2))][:shared] + own
        room = max_model_len - length
        max_tokens = min(room, int(rng.integers(1, max_output + 1)))
        sampling = random_sampling(rng, index, vocab_size=vocab_size, max_tokens=max_tokens)
        cases.append(Case(prompt=prompt, sampling=sampling))
    return cases


def random_sampling(
    rng: np.random.Generator, index: int, *, vocab_size: int, max_tokens: int
) -> SamplingParams:
    """Half of them greedy; every other setting in a part of them."""

    def tokens(count: int) -> list[int]:
        return rng.choice(np.arange(2, vocab_size), count, replace=False).tolist()

    settings: list[tuple[float, dict[str, Any]]] = [
        (0.5, {"temperature": 0.0}),
        (0.3, {"ignore_eos": False}),
        (0.3, {"top_k": int(rng.integers(1, 30)), "top_p": rng.uniform(0.3, 1.0)}),
        (0.2, {"min_p": rng.uniform(0.0, 0.3)}),
        (0.3, {"presence_penalty": rng.uniform(-1, 2), "frequency_penalty": rng.uniform(-1, 2)}),
        (0.3, {"repetition_penalty": rng.uniform(0.7, 1.8)}),
        (0.2, {"logit_bias": {token: rng.uniform(-5, 5) for token in tokens(6)}}),
        (0.2, {"allowed_token_ids": tokens(20)}),
        (0.2, {"bad_words_token_ids": [[t] for t in tokens(20)] + [tokens(2) for _ in range(9)]}),
        (0.3, {"stop_token_ids": tokens(8)}),
        (0.3, {"min_tokens": int(rng.integers(0, max_tokens + 1))}),
        (0.4, {"logprobs": int(rng.integers(0, 6))}),
        (0.3, {"prompt_logprobs": int(rng.integers(0, 6))}),
    ]
    values: dict[str, Any] = {
        "max_tokens": max_tokens,
        "seed": index * 7919 + 1,
        "temperature": rng.uniform(0.3, 1.5),
        "ignore_eos": True,
    }
    for probability, setting in settings:
        if rng.random() < probability:
            values |= setting
    return SamplingParams(**values)


def processed_logits(
    logits_V: np.ndarray, sampling: SamplingParams, prompt: list[int], output: list[int]
) -> np.ndarray:
    """What vLLM's documentation says is done to logits before sampling, one thing at a time."""
    logits_V = logits_V.copy()
    if sampling.allowed_token_ids is not None:
        is_allowed_V = np.isin(np.arange(logits_V.size), sampling.allowed_token_ids)
        logits_V[~is_allowed_V] = -np.inf
    for *begin, last in sampling.bad_words_token_ids:
        if output[len(output) - len(begin) :] == begin:
            logits_V[last] = -np.inf
    if len(output) < sampling.min_tokens:
        logits_V[[EOS, *sampling.stop_token_ids]] = -np.inf
    for token, bias in (sampling.logit_bias or {}).items():
        logits_V[token] += bias
    seen = sorted({*prompt, *output})
    penalty = sampling.repetition_penalty
    logits_V[seen] = np.where(
        logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty
    )
    counts_V = np.bincount(output, minlength=logits_V.size)
    logits_V -= sampling.frequency_penalty * counts_V
    logits_V -= sampling.presence_penalty * (counts_V > 0)
    return logits_V


def greedy_answer(model: TinyLlama, case: Case) -> list[int]:
    """The output of a greedy request, from the reference model."""
    sampling, output = case.sampling, list[int]()
    stops = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS])}
    assert sampling.max_tokens is not None
    while len(output) < sampling.max_tokens:
        logits_V = model.logits(case.prompt + output)[-1]
        logits_V = processed_logits(logits_V, sampling, case.prompt, output)
        output.append(int(logits_V.argmax()))
        if output[-1] in stops and len(output) >= sampling.min_tokens:
            break
    return output
