"""What is generated in the benchmarks that run without a server: random tokens of a fixed length.

The generator and its seed are those that the comparison with other engines uses, so that lines of
output can stand side by side. Knows nothing of engines.
"""

import random
from typing import NamedTuple

from jaxinfer.errors import ConfigError

MIN_TOKEN_ID, MAX_TOKEN_ID = 100, 49000  # ordinary words in the vocabularies compared


class Workload(NamedTuple):
    """`num_prompts` at once, each of `input_len` tokens, each answered by `output_len`."""

    num_prompts: int
    input_len: int
    output_len: int


PEERS = (
    Workload(1, 16, 128),
    Workload(4, 128, 128),
    Workload(16, 128, 128),
    Workload(64, 128, 128),
    Workload(64, 512, 32),
    Workload(1, 1024, 1),
)


def random_prompts(
    num_prompts: int, input_len: int, *, vocab_size: int, seed: int
) -> list[list[int]]:
    """Token ids that any vocabulary of `vocab_size` has, the same for the same seed."""
    rng = random.Random(seed)
    high = min(MAX_TOKEN_ID, vocab_size)
    low = min(MIN_TOKEN_ID, high - 1)
    return [[rng.randrange(low, high) for _ in range(input_len)] for _ in range(num_prompts)]


def check_fits(workload: Workload, max_model_len: int | None) -> None:
    """Raises ConfigError for a workload whose sequences are too long for the engine.

    Called with the setting before an engine is started, where None says that the model decides,
    and with the engine's own limit after that.
    """
    length = workload.input_len + workload.output_len
    if max_model_len is not None and length > max_model_len:
        raise ConfigError(
            f"--input-len={workload.input_len} and --output-len={workload.output_len} make "
            f"{length} tokens, but a sequence may have {max_model_len}: lower one of them or raise "
            "--max-model-len."
        )
