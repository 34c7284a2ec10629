"""Which programs an engine consists of: a step per bucket, and two that write a slot's row.

Knows their arguments and what is donated; compiler.py compiles them, Runner calls them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.parallel.rules import replicated
from jaxinfer.runner.abstract import AbstractArrays, AbstractModel
from jaxinfer.runner.buckets import Bucket, BucketRule, make_buckets
from jaxinfer.runner.compiler import Program, compile_all, compiler_options
from jaxinfer.runner.packing import num_words
from jaxinfer.runner.program_store import ProgramStore
from jaxinfer.runner.runner import Programs
from jaxinfer.runner.step_fn import DeviceState, StepModel, make_step
from jaxinfer.sampling.state import SlotRow, slot_row, write_slot


class CompiledPrograms(NamedTuple):
    """All programs, and what the hungriest of them needs besides its arguments."""

    programs: Programs
    temp_bytes: int  # per device; XLA's figure


def compile_programs(
    config: EngineConfig,
    model: AbstractModel,
    limits: EngineLimits,
    arrays: AbstractArrays,
    store: ProgramStore | None,
    on_done: Callable[[int, int], None],
    tell: Callable[[str], None],
) -> CompiledPrograms:
    """Compiles everything the runner will call; `config` is resolved.

    `on_done` and `tell` are compile_all's.
    """
    step_model = model.step_model(limits)
    buckets = engine_buckets(config, model, limits)
    programs = {
        str(bucket): step_program(step_model, bucket, arrays, limits) for bucket in buckets
    } | _slot_programs(model, arrays)
    num_workers = config.compile.num_compile_workers
    assert num_workers
    compiled = compile_all(
        programs,
        compiler_options(config.compile.device, num_workers=num_workers),
        num_workers=num_workers,
        on_done=on_done,
        tell=tell,
        store=store,
    )
    return CompiledPrograms(
        programs=Programs(
            steps={bucket: compiled[str(bucket)] for bucket in buckets},
            write_slot=compiled["write_slot"],
            write_pages=compiled["write_pages"],
        ),
        temp_bytes=max(_temp_bytes(program) for program in compiled.values()),
    )


def engine_buckets(
    config: EngineConfig, model: AbstractModel, limits: EngineLimits
) -> tuple[Bucket, ...]:
    """The step shapes of an engine; `config` is resolved. Raises ConfigError, see make_buckets."""
    rule = bucket_rule(config, skips_padding=model.kernels.matmul is not None)
    return make_buckets(limits, rule, token_buckets=config.compile.token_buckets)


def bucket_rule(config: EngineConfig, *, skips_padding: bool) -> BucketRule:
    """A CPU compiles slowly and multiplies more rows at nearly the same price: few buckets.

    The fewer where the products skip the padding (docs/benchlog.md). XLA:CPU multiplies fewer than
    4 rows of 16-bit floats one number at a time.
    """
    if config.compile.device != "cpu":
        return BucketRule(smallest_decode=1, smallest_mixed=16, decode_factor=2, token_factor=4)
    smallest = 1 if config.model.dtype == "float32" else 4
    return BucketRule(
        smallest_decode=smallest,
        smallest_mixed=32 if skips_padding else 16,
        decode_factor=4,
        token_factor=4,
    )


def _temp_bytes(program: jax.stages.Compiled) -> int:
    analysis = program.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0


def step_program(
    model: StepModel, bucket: Bucket, arrays: AbstractArrays, limits: EngineLimits
) -> Program:
    """The step of one bucket."""
    sharding = jax.tree.leaves(arrays.state)[0].sharding
    words = jax.ShapeDtypeStruct(
        (num_words(bucket, limits.page_size),), np.int32, sharding=sharding
    )
    return Program(
        function=make_step(model, bucket),
        args=(arrays.weights, arrays.pages_L, arrays.state, words),
        donate=(1, 2),
    )


def _slot_programs(model: AbstractModel, arrays: AbstractArrays) -> dict[str, Program]:
    """The two small programs that write a slot's row ahead of a step."""
    whole = replicated(model.mesh)

    def abstract(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole)

    def write_sampler(state: DeviceState, slot: jax.Array, row: SlotRow) -> DeviceState:
        return state._replace(sampler=write_slot(state.sampler, slot, row))

    def write_pages(state: DeviceState, slot: jax.Array, row_M: jax.Array) -> DeviceState:
        return state._replace(page_table_RM=state.page_table_RM.at[slot].set(row_M))

    empty_row = slot_row(
        SamplingParams(),
        prompt_token_ids=(),
        output_token_ids=(),
        eos_token_ids=(),
        vocab_size=model.definition.shape.vocab_size,
    )
    slot = abstract(np.zeros((), np.int32))
    row_M = abstract(np.zeros(arrays.state.page_table_RM.shape[1], np.int32))
    row = jax.tree.map(abstract, empty_row)
    return {
        "write_slot": Program(function=write_sampler, args=(arrays.state, slot, row), donate=(0,)),
        "write_pages": Program(function=write_pages, args=(arrays.state, slot, row_M), donate=(0,)),
    }
