"""What a scheduler may use and how it chooses. Knows numbers only."""

from dataclasses import dataclass

from jaxinfer.core.limits import EngineLimits, check_at_least
from jaxinfer.errors import ConfigError
from jaxinfer.scheduler.queue import SchedulingPolicy


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits(EngineLimits):
    """The engine's limits and what the user chose about scheduling."""

    policy: SchedulingPolicy = "fcfs"
    max_num_queued: int = 4096
    long_prefill_token_threshold: int = 0  # most tokens of one sequence in a step; 0: no limit
    enable_prefix_caching: bool = True
    # A newcomer waits for tokens that others are computing if it can share this many of them:
    # fewer are computed again in less time than the wait takes (two steps or more).
    min_tokens_to_wait_for: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("max-num-queued-reqs", self.max_num_queued, 1)
        check_at_least("long-prefill-token-threshold", self.long_prefill_token_threshold, 0)
        if self.policy not in ("fcfs", "priority"):
            raise ConfigError(f"--scheduling-policy must be fcfs or priority, got {self.policy!r}.")
