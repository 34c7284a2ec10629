"""Random arrivals, aborts, priorities and page shortage: outputs are those of each request alone.

The checks are in `simulated_device`: after every call pages and slots are conserved, no step
exceeds its budget, no decode starves, and in the end every request has its own output.
"""

import hypothesis.strategies as st
from hypothesis import HealthCheck, event, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from jaxinfer.errors import QueueFullError, RequestError
from tests.scheduler.simulated_device import Simulation, make_limits, make_request

SHARED_TEXT = [(7 * i * i + 3 * i) % 13 for i in range(40)]  # prompts begin with part of it


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        is_async=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
        max_num_seqs=st.integers(1, 6),
        num_extra_budget_tokens=st.integers(0, 16),
        page_size=st.sampled_from([1, 2, 4]),
        num_cached_tokens=st.integers(24, 64),
        threshold=st.sampled_from([0, 0, 1, 3]),
        enable_prefix_caching=st.booleans(),
        max_num_queued=st.sampled_from([2, 100]),
        min_tokens_to_wait_for=st.sampled_from([1, 6, 128]),
    )
    def start(
        self,
        is_async,
        policy,
        max_num_seqs,
        num_extra_budget_tokens,
        page_size,
        num_cached_tokens,
        threshold,
        **limits,
    ) -> None:
        self.breaks_at: dict[str, int] = {}
        self.sim = Simulation(
            make_limits(
                policy=policy,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_seqs + num_extra_budget_tokens,
                long_prefill_token_threshold=threshold,
                page_size=page_size,
                num_pages=num_cached_tokens // page_size,  # room for one to three requests
                **limits,
            ),
            is_async=is_async,
            breaks_at=self.breaks_at,
        )
        self.num_added = 0

    @rule(count=st.integers(2, 5), num_shared=st.integers(0, 12), max_tokens=st.integers(4, 20))
    def add_burst(self, count, num_shared, max_tokens) -> None:
        for own in range(count):
            logprobs = {"prompt_logprobs": 0} if own == 1 else {}
            self._add(SHARED_TEXT[:num_shared] + [own], max_tokens, **logprobs)

    @rule(
        num_shared=st.integers(0, 16),
        own=st.lists(st.integers(0, 12), max_size=6),
        max_tokens=st.integers(0, 20),
        priority=st.integers(-1, 1),
        salt=st.sampled_from([None, None, None, "", "a"]),
        stop=st.sampled_from([{}, {}, {"ignore_eos": False}, {"stop_token_ids": [3, 5]}]),
        min_share=st.sampled_from([0, 0, 2]),
        logprobs=st.sampled_from([{}, {}, {"logprobs": 0}, {"prompt_logprobs": 0}]),
        breaks_at=st.sampled_from([None] * 9 + [0, 2]),
    )
    def add(
        self, num_shared, own, max_tokens, priority, salt, stop, min_share, logprobs, breaks_at
    ) -> None:
        self._add(
            SHARED_TEXT[:num_shared] + own,
            max_tokens,
            breaks_at=breaks_at,
            priority=priority,
            cache_salt=salt,
            min_tokens=max_tokens // min_share if min_share else 0,
            **stop,
            **logprobs,
        )

    def _add(self, prompt, max_tokens, *, breaks_at=None, **fields) -> None:
        request_id = f"r{self.num_added}"
        self.num_added += 1
        if breaks_at is not None:
            self.breaks_at[request_id] = breaks_at
        try:
            self.sim.add(make_request(request_id, prompt, max_tokens, **fields))
        except (RequestError, QueueFullError):
            self.sim.scheduler.check_integrity()

    @rule()
    def step(self) -> None:
        self.sim.step()

    @rule(count=st.integers(2, 12))
    def several_steps(self, count) -> None:
        for _ in range(count):
            self.sim.step()

    @rule()
    def settle(self) -> None:
        if self.sim.in_flight:
            self.sim.settle()

    @rule(age=st.integers(1, 8))
    def abort(self, age) -> None:
        self.sim.abort(f"r{self.num_added - age}")

    @rule()
    def reset_prefix_cache(self) -> None:
        self.sim.scheduler.reset_prefix_cache()

    def teardown(self) -> None:
        self.sim.drain()
        event(f"preemptions: {min(self.sim.scheduler.stats().num_preemptions_total, 3)}")
        event(f"prefix hits: {self.sim.scheduler.stats().prefix_hits_total > 0}")


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=50,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
