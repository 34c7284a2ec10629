"""What the compiler says decides: the programs' own size counts, its other failures do not.

The compiler is played: what compile_rows says is given, or raised.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.errors import CheckpointError
from jaxinfer.planner import check
from jaxinfer.planner.check import is_out_of_memory
from jaxinfer.planner.compile import TargetEngine
from jaxinfer.planner.devices import stand_ins
from jaxinfer.planner.messages import PlanRequest, PlanResult, ProgramRow
from jaxinfer.planner.plan import make_plan
from jaxinfer.planner.report import describe

CONFIG = Path(__file__).parent / "configs" / "llama-3.1-8b-instruct.json"
GIB, MIB = 2**30, 2**20
# As libtpu 0.0.42 says it, of XLA's programs and of a Pallas kernel's.
OUT_OF_HBM = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(48.00G) exceeds available HBM (15.75G).\nLargest allocations:"
)
OUT_OF_VMEM = (
    "RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=134217728) :: "
    "#allocation2 [space=vmem, tag = 'input window of an operand that lies in hbm']"
)

LAYERS = 4  # of the model, whose pages take all that is left

Answers = Callable[[TargetEngine], list[ProgramRow]]
Play = Callable[[Answers], None]
Plan = Callable[..., PlanResult]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """`plan(topology=..., **settings)`, compiled."""

    def ask(
        *, topology: str = "v6e:1x1", sweep: bool = False, num_layers: int = LAYERS, **settings: Any
    ) -> PlanResult:
        path = tmp_path / "config.json"
        config = json.loads(CONFIG.read_text("utf-8"))
        path.write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
        settings = {"max_model_len": 16384, "max_num_seqs": 256, **settings}
        return make_plan(
            PlanRequest(
                config_path=str(path),
                engine=engine_config_from_kwargs(model="m", **settings),
                topology=topology,
                sweep=sweep,
                compile=True,
                price_per_hour=None,
                input_len=1024,
                output_len=1024,
            )
        )

    return ask


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Puts a compiler in the place of XLA's."""

    def put(answers: Answers) -> None:
        def compile_rows(config_json: Any, engine: TargetEngine, *_: Any, **__: Any) -> Any:
            return answers(engine)

        monkeypatch.setattr(check, "compile_rows", compile_rows)
        monkeypatch.setattr(check, "target_devices", lambda target: stand_ins(target.num_devices))

    return put


def rows(
    engine: TargetEngine, *, temp_bytes: int = GIB, code_bytes: int = 0, padding_bytes: int = 0
) -> list[ProgramRow]:
    memory = engine.memory
    known = memory.weight_bytes + memory.state_bytes + memory.kv_bytes
    return [
        ProgramRow(
            name=name,
            num_tokens=256,
            num_layers_compiled=2,
            temp_bytes=temp_bytes,
            code_bytes=code_bytes,
            argument_bytes=known + padding_bytes,
            alias_bytes=memory.kv_bytes,
            moved_bytes=0,
            flops=0.0,
            collectives=[],
            trace_s=0.0,
            compile_s=0.0,
        )
        for name in ("decode 256x256", "mixed 2048x256")
    ]


def test_programs_that_are_small_fit(plan: Plan, play: Play):
    play(lambda engine: rows(engine, code_bytes=MIB, padding_bytes=3 * MIB))
    result = plan()
    assert result.fits
    assert result.padding_bytes == 3 * MIB
    assert result.code_bytes is not None and result.code_bytes % MIB == 0
    kept, needed = result.memory, result.needed_bytes
    assert needed == kept.total_bytes - kept.step_bytes + GIB + 3 * MIB + result.code_bytes
    assert f"of {kept.device_bytes / GIB:.2f} GiB, with what XLA needs" in describe(result)


@pytest.mark.parametrize("large", [{"code_bytes": 350 * MIB}, {"padding_bytes": 6 * GIB}], ids=str)
def test_programs_and_padding_need_room(plan: Plan, play: Play, large: dict[str, int]):
    """The weights, pages and temporaries fit the part that the engine uses; all is too much."""
    play(lambda engine: rows(engine, **large))
    result = plan()
    assert not result.fits
    assert "Not enough memory for the programs themselves" in result.why_not
    assert result.needed_bytes is not None and result.needed_bytes > result.memory.device_bytes
    assert result.memory.total_bytes <= result.memory.usable_bytes
    first = result.alternatives[0]
    name, value = first.flags.split()
    assert name == "--gpu-memory-utilization" and first.compiled
    assert f"{name} {value}" in result.why_not
    assert plan(gpu_memory_utilization=float(value)).fits


def test_pages_that_were_asked_for_are_not_talked_away(plan: Plan, play: Play):
    play(lambda engine: rows(engine, code_bytes=8 * GIB))
    result = plan(topology="h100", num_gpu_blocks_override=2048)
    assert "Give the cache fewer pages (--num-gpu-blocks-override" in result.why_not


def fail(error: Exception) -> Answers:
    def raise_it(engine: TargetEngine) -> list[ProgramRow]:
        raise error

    return raise_it


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError(OUT_OF_VMEM),
        jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel: bad layout"),
        NotImplementedError("no lowering for this on TPU"),
    ],
    ids=["vmem", "mosaic", "lowering"],
)
def test_a_compiler_that_fails_leaves_the_arithmetic(plan: Plan, play: Play, error: Exception):
    play(fail(error))
    result = plan()
    assert result.fits
    assert result.decode and not result.programs
    assert result.memory.num_pages > 0
    assert result.needed_bytes is None
    assert result.notes[0].startswith(f"Not compiled: {type(error).__name__}: ")
    assert str(error) in result.notes[0]


def test_a_program_too_large_for_the_device_does_not_fit(plan: Plan, play: Play):
    play(fail(jax.errors.JaxRuntimeError(OUT_OF_HBM)))
    result = plan(topology="h100")
    assert not result.fits
    assert result.why_not.startswith("The compiler finds no room: RESOURCE_EXHAUSTED")
    assert "\n" not in result.why_not


def test_which_errors_are_for_want_of_memory():
    assert is_out_of_memory(jax.errors.JaxRuntimeError(OUT_OF_HBM))
    older = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
    assert is_out_of_memory(jax.errors.JaxRuntimeError(f"{older} hbm. Used 20G of 15.75G hbm."))
    assert not is_out_of_memory(jax.errors.JaxRuntimeError(f"{older} vmem, operand in hbm."))
    assert not is_out_of_memory(jax.errors.JaxRuntimeError(OUT_OF_VMEM))
    assert not is_out_of_memory(ValueError(OUT_OF_HBM))


def test_bad_input_stays_bad_input(plan: Plan, play: Play):
    play(fail(CheckpointError("of the model")))
    with pytest.raises(CheckpointError, match="of the model"):
        plan()


def test_a_sweep_goes_on_to_the_next_layout(plan: Plan, play: Play):
    """The best by arithmetic has programs that are too large; the next is planned instead."""
    sizes: list[int] = []

    def answers(engine: TargetEngine) -> list[ProgramRow]:
        sizes.append(engine.config.parallel.tensor_parallel_size)
        return rows(engine, code_bytes=GIB if len(sizes) == 1 else 0)

    play(answers)
    result = plan(topology="v6e:2x2", sweep=True)
    assert result.fits
    assert result.tensor_parallel_size == sizes[1]
    first, last = result.layouts[0], result.layouts[-1]
    assert (first.flags, first.fits, first.compiled) == (
        f"--tensor-parallel-size {sizes[1]}",
        True,
        True,
    )
    assert (last.flags, last.fits, last.compiled) == (
        f"--tensor-parallel-size {sizes[0]}",
        False,
        True,
    )
    assert last.output_tokens_per_s is None and last.num_pages == 0
    assert "does not fit" in describe(result)


def test_a_sweep_that_finds_nothing_says_what_would_fit(plan: Plan, play: Play):
    play(lambda engine: rows(engine))
    result = plan(topology="v5e:1x1", sweep=True, num_layers=32)
    assert not result.fits
    assert [item.fits for item in result.layouts] == [False]
    assert result.alternatives and all(item.fits for item in result.alternatives)
    text = describe(result)
    layouts, proposals = text.index("Layouts, of which none fits:"), text.index("What would fit:")
    assert "does not fit" in text[layouts:proposals]
    assert "does not fit" not in text[proposals:]
