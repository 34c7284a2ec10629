"""Scheduler, engine core and runner on a real (tiny) model: whatever shares the device with it, a
request's output is the one it has alone, and that is the reference model's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import TokenLogprobs
from jaxinfer.runner.packing import num_page_updates
from jaxinfer.runner.runner import Runner
from tests.runner.conftest import MakeRunner
from tests.runner.harness import Collected, Engine, Mode
from tests.runner.tiny_llama import TinyLlama
from tests.runner.workload import Case, greedy_answer, random_cases

LOGPROB_TOLERANCE = 2e-4  # float32 against float64, logits up to about 10
MAX_LEN = 96
PAGE = 8

ALONE = Mode(is_async=False, prefix_caching=False)
MODES = {
    "async": Mode(),
    "in step": Mode(is_async=False),
    "few pages": Mode(num_pages=15),
    "few pages, in step, no prefix cache": Mode(is_async=False, prefix_caching=False, num_pages=13),
    "short chunks": Mode(long_prefill_token_threshold=5, num_pages=24),
}


def greedy(max_tokens: int, **values: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **values)  # type: ignore[arg-type]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + 1000 * length).integers(2, 96, length).tolist()


@pytest.fixture(scope="module", params=[True, False], ids=["C++", "XLA"])
def runner(request: pytest.FixtureRequest, make_runner: MakeRunner, tiny_dir: Path) -> Runner:
    """With each implementation of attention that a CPU has."""
    return make_runner(tiny_dir, native_kernels=request.param)


@pytest.fixture(scope="module")
def cases(tiny: TinyLlama) -> list[Case]:
    return random_cases(40, seed=3, vocab_size=tiny.vocab_size, max_model_len=MAX_LEN)


@pytest.fixture(scope="module")
def alone(runner: Runner, cases: list[Case]) -> list[Collected]:
    """Each request's output when nothing else runs."""
    engine = Engine(runner, ALONE)
    return [engine.run(case.prompt, case.sampling) for case in cases]


# One request.


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 32, 33, 64, 70])
def test_greedy_tokens_are_the_references(runner: Runner, tiny: TinyLlama, length: int):
    """Prompts of a token, of whole pages and of several steps."""
    prompt = prompt_of(length)
    got = Engine(runner).run(prompt, greedy(20))
    assert got.token_ids == tiny.greedy(prompt, 20)
    assert got.finish_reason == "length"


def test_every_greedy_setting_gives_the_references_tokens(
    tiny: TinyLlama, cases: list[Case], alone: list[Collected]
):
    """Penalties, bias, allowed tokens, bad words, min_tokens and stop tokens, from outside."""
    num_greedy = 0
    for case, output in zip(cases, alone, strict=True):
        if case.sampling.is_greedy:
            num_greedy += 1
            assert output.token_ids == greedy_answer(tiny, case), case
    assert num_greedy >= 10


def test_logprobs_are_the_references(tiny: TinyLlama, cases: list[Case], alone: list[Collected]):
    """Of sampled and of prompt tokens, over chunk borders: log softmax of the raw logits."""
    num_checked = 0
    for case, output in zip(cases, alone, strict=True):
        tokens = case.prompt + output.token_ids
        sampling = case.sampling
        if sampling.logprobs is None and sampling.prompt_logprobs is None:
            assert not output.logprobs
            assert not output.prompt_logprobs
            continue
        log_probs_TV = tiny.log_probs(tokens)
        first = len(case.prompt)
        if sampling.logprobs is not None:
            positions = range(first, len(tokens))
            check_logprobs(output.logprobs, positions, tokens, log_probs_TV, sampling.logprobs)
        if sampling.prompt_logprobs is not None:
            positions = range(1, first)
            check_logprobs(
                output.prompt_logprobs, positions, tokens, log_probs_TV, sampling.prompt_logprobs
            )
        num_checked += 1
    assert num_checked >= 10


def check_logprobs(
    entries: list[TokenLogprobs],
    positions: Sequence[int],
    tokens: list[int],
    log_probs_TV: np.ndarray,
    num_top: int,
) -> None:
    assert len(entries) == len(positions)
    for entry, position in zip(entries, positions, strict=True):
        expected_V = log_probs_TV[position - 1]
        assert entry.token_ids[0] == tokens[position]
        assert len(entry.token_ids) == len(entry.logprobs) == num_top + 1
        np.testing.assert_allclose(
            entry.logprobs, expected_V[entry.token_ids], atol=LOGPROB_TOLERANCE
        )
        top = np.sort(expected_V)[::-1][:num_top]
        np.testing.assert_allclose(entry.logprobs[1:], top, atol=LOGPROB_TOLERANCE)
        own = expected_V[tokens[position]]
        num_better = int((expected_V > own + LOGPROB_TOLERANCE).sum())
        assert num_better <= entry.rank - 1 <= int((expected_V > own - LOGPROB_TOLERANCE).sum())


# Many requests.


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_company_changes_nothing(
    runner: Runner, cases: list[Case], alone: list[Collected], mode: Mode, seed: int
):
    """Random arrivals and aborts, chunked prompts, shared prefixes, preemptions, both loops."""
    rng = np.random.default_rng(seed)
    engine = Engine(runner, mode)
    order = rng.permutation(len(cases)).tolist()
    waiting, aborted = list(order), set[int]()
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.5:
            index = waiting.pop()
            engine.add(str(index), cases[index].prompt, cases[index].sampling)
        if rng.random() < 0.03:
            open_ids = [name for name, out in engine.outputs.items() if out.finish_reason is None]
            if open_ids:
                victim = open_ids[int(rng.integers(len(open_ids)))]
                engine.abort([victim])
                aborted.add(int(victim))
        engine.step()
    assert runner.num_compiles_after_ready == 0
    assert 0 < len(aborted) < len(cases) / 2
    for index in order:
        got, expected = engine.outputs[str(index)], alone[index]
        if index in aborted:
            assert got.finish_reason == "abort"
            assert got.token_ids == expected.token_ids[: len(got.token_ids)]
            continue
        assert got.token_ids == expected.token_ids, cases[index]
        assert (got.finish_reason, got.stop_reason) == (
            expected.finish_reason,
            expected.stop_reason,
        )
        assert_same_logprobs(got.logprobs, expected.logprobs)
        assert_same_logprobs(got.prompt_logprobs, expected.prompt_logprobs)
    if mode.num_pages is None:
        assert engine.stats.prefix_hits_total > 0, "the test no longer tests shared prefixes"
    elif mode.num_pages < 20:
        assert engine.stats.num_preemptions_total > 0, "the test no longer tests preemption"


def assert_same_logprobs(got: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    assert [entry.token_ids[0] for entry in got] == [entry.token_ids[0] for entry in expected]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=LOGPROB_TOLERANCE)


def test_a_seed_does_not_depend_on_the_batch(runner: Runner):
    """The same seeded request, alone and four times among others, at other places each time."""
    sampling = SamplingParams(temperature=1.0, max_tokens=16, seed=1234, ignore_eos=True)
    prompt = prompt_of(11)
    expected = Engine(runner).run(prompt, sampling).token_ids
    engine = Engine(runner)
    for index in range(12):
        other = SamplingParams(temperature=1.3, max_tokens=9 + index, seed=index, top_p=0.9)
        engine.add(f"other-{index}", prompt_of(index + 1), other)
        if index % 3 == 0:
            engine.add(f"same-{index}", prompt, sampling)
        engine.step()
    engine.finish()
    same = [out.token_ids for name, out in engine.outputs.items() if name.startswith("same")]
    assert same == [expected] * 4
    another = sampling.__class__(temperature=1.0, max_tokens=16, seed=1235, ignore_eos=True)
    assert Engine(runner).run(prompt, another).token_ids != expected


# Pages.


def test_a_prefix_hit_longer_than_a_steps_room(runner: Runner, tiny: TinyLlama):
    """More pages at once than a packed step carries: their table rows are written ahead."""
    prompt = prompt_of(90)
    room = max(num_page_updates(bucket, PAGE) for bucket in runner.buckets)
    assert room < 90 // PAGE
    engine = Engine(runner)
    first = engine.run(prompt, greedy(5))
    assert first.num_cached_tokens == 0
    for length in (90, 89, 81):  # 81: a single token is left to compute, in a decode step
        engine.add(f"a{length}", prompt[:length], greedy(5))
    engine.finish()
    for length in (90, 89, 81):
        got = engine.outputs[f"a{length}"]
        assert got.num_cached_tokens == (length - 1) // PAGE * PAGE
        assert got.token_ids == tiny.greedy(prompt[:length], 5)


def test_prefix_hits_while_others_decode(runner: Runner, tiny: TinyLlama):
    """Rows written ahead of a step leave the rows of running neighbours alone."""
    long, short = prompt_of(88), prompt_of(3)
    engine = Engine(runner)
    engine.run(long, greedy(1))
    engine.add("short", short, greedy(60))
    for _ in range(10):
        engine.step()
    for index in range(3):
        engine.add(f"long-{index}", long, greedy(8))
        engine.step()
    engine.finish()
    assert engine.outputs["short"].token_ids == tiny.greedy(short, 60)
    for index in range(3):
        assert engine.outputs[f"long-{index}"].num_cached_tokens == 80
        assert engine.outputs[f"long-{index}"].token_ids == tiny.greedy(long, 8)


# Ends.


def test_max_tokens_0_computes_the_prompt_only(runner: Runner, tiny: TinyLlama):
    prompt = prompt_of(MAX_LEN)  # the whole context
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=2, seed=0)
    got = Engine(runner).run(prompt, sampling)
    assert (got.token_ids, got.finish_reason) == ([], "length")
    check_logprobs(got.prompt_logprobs, range(1, MAX_LEN), prompt, tiny.log_probs(prompt), 2)


@pytest.mark.parametrize("length", [1, 50, 95])
def test_the_context_can_be_filled(runner: Runner, tiny: TinyLlama, length: int):
    prompt = prompt_of(length)
    engine = Engine(runner)
    got = engine.run(prompt, greedy(MAX_LEN - length))
    assert got.token_ids == tiny.greedy(prompt, MAX_LEN - length)
    unbounded = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    assert engine.run(prompt, unbounded).token_ids == got.token_ids


def test_a_whole_batch_can_fill_the_context_at_once(runner: Runner, tiny: TinyLlama):
    engine = Engine(runner)
    prompts = [prompt_of(80 + index) for index in range(4)]
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, greedy(MAX_LEN - len(prompt)))
    engine.finish()
    for index, prompt in enumerate(prompts):
        expected = tiny.greedy(prompt, MAX_LEN - len(prompt))
        assert engine.outputs[str(index)].token_ids == expected
