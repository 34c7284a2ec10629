"""Which step shapes exist: every step is padded to one of a few buckets, all compiled at start.

Knows numbers only. Each bucket is a program to compile, so there are few; a step costs about what
its bucket costs, so they must not be far apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.core.limits import EngineLimits
from jaxinfer.errors import ConfigError


@dataclass(frozen=True, kw_only=True, order=True)
class Bucket:
    """A step shape. `decode_only`: each sequence has one token, so num_tokens == num_seqs."""

    num_tokens: int
    num_seqs: int
    decode_only: bool

    def __str__(self) -> str:
        kind = "decode" if self.decode_only else "mixed"
        return f"{kind} {self.num_tokens}x{self.num_seqs}"


def _powers(first: int, last: int, *, factor: int) -> list[int]:
    """first, first*factor, ... and `last` itself."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= factor
    return [*sizes, last]


@dataclass(frozen=True, kw_only=True)
class BucketRule:
    """How far apart the buckets of a platform are."""

    smallest_decode: int  # the least number of rows that the platform multiplies well
    smallest_mixed: int  # tokens
    decode_factor: int  # from one decode bucket to the next
    token_factor: int  # from one mixed bucket to the next


def make_buckets(
    limits: EngineLimits, rule: BucketRule, *, token_buckets: Sequence[int] = ()
) -> tuple[Bucket, ...]:
    """Decode buckets, then mixed buckets, each kind smallest first.

    `token_buckets` replaces the token counts of the mixed buckets; `max_num_batched_tokens` is
    always one of them. Raises ConfigError for a larger one.
    """
    most_seqs, most_tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    if max(token_buckets, default=0) > most_tokens:
        raise ConfigError(
            f"--token-buckets holds {max(token_buckets)}, but a step never has more than "
            f"--max-num-batched-tokens={most_tokens}: raise that, or leave the bucket out."
        )
    decode_sizes = _powers(
        min(rule.smallest_decode, most_seqs), most_seqs, factor=rule.decode_factor
    )
    token_sizes = _powers(
        min(rule.smallest_mixed, most_tokens), most_tokens, factor=rule.token_factor
    )
    if token_buckets:
        token_sizes = sorted({*token_buckets, most_tokens})
    decodes = [Bucket(num_tokens=size, num_seqs=size, decode_only=True) for size in decode_sizes]
    mixed = [
        Bucket(num_tokens=size, num_seqs=min(size, most_seqs), decode_only=False)
        for size in token_sizes
    ]
    return (*decodes, *mixed)


def choose_bucket(
    buckets: Sequence[Bucket], *, num_tokens: int, num_seqs: int, decode_only: bool
) -> Bucket:
    """The first (smallest) bucket that holds the step."""
    for bucket in buckets:
        if (
            bucket.decode_only == decode_only
            and num_tokens <= bucket.num_tokens
            and num_seqs <= bucket.num_seqs
        ):
            return bucket
    raise AssertionError(f"no bucket holds {num_tokens} tokens of {num_seqs} sequences")
