"""The numbers that the scheduler and the runner must agree on. Knows neither of them.

They are fixed before anything is compiled: array shapes, page tables and admission all follow
from them.
"""

from dataclasses import dataclass

from jaxinfer.errors import ConfigError


def check_at_least(flag: str, value: int, low: int) -> None:
    """Raises ConfigError when a setting is below `low`."""
    if value < low:
        raise ConfigError(f"--{flag} must be at least {low}, got {value}.")


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Capacities of one engine. Raises ConfigError for a set that could not serve."""

    max_num_seqs: int  # sequences that run at once: slots
    max_num_batched_tokens: int  # tokens of one step
    max_model_len: int  # tokens of a prompt and its output
    page_size: int  # tokens of a page of the KV cache
    num_pages: int  # pages of the KV cache, numbered 0 .. num_pages - 1

    def __post_init__(self) -> None:
        check_at_least("max-num-seqs", self.max_num_seqs, 1)
        check_at_least("max-model-len", self.max_model_len, 1)
        check_at_least("block-size", self.page_size, 1)
        check_at_least("num-gpu-blocks-override", self.num_pages, 1)
        if self.max_num_batched_tokens < self.max_num_seqs:
            # Else some running sequences could not take their one token in every step.
            raise ConfigError(
                f"--max-num-batched-tokens={self.max_num_batched_tokens} must not be below "
                f"--max-num-seqs={self.max_num_seqs}: raise the first or lower the second."
            )
