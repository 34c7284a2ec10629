"""What the host does beside the device: Python time per step, per request and per streamed token.

    .venv/bin/python scripts/profile_host.py core           # schedule, pack, call, result, update
    .venv/bin/python scripts/profile_host.py core --num-layers 30  # as many arguments as a model
    .venv/bin/python scripts/profile_host.py http           # HTTP, with an instant device

`core` drives the real scheduler and the real runner over a tiny model with random weights, all
sequences decoding. `http` runs the real server and engine process around a runner that computes
nothing; only the server's process is counted. Nothing is instrumented in the engine itself: clocks
sit in wrappers around what EngineCore is given, and around two public functions below the runner.
CPU is processor time of the thread (of the process, for `http`), which other load on the machine
disturbs less than wall time. `call` includes whatever XLA computes inside the calling thread;
`call floor` is the same call, with as many arguments, of a program that computes nothing.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from host_parts import MAX_MODEL_LEN, tiny_config, write_tiny_model
from profile_http import profile_http

from jaxinfer.core.messages import CoreMessage, StepUpdate
from jaxinfer.core.progress import ignore_progress
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import ScheduledStep
from jaxinfer.engine.build import BuiltCore, build_core
from jaxinfer.engine.core import EngineCore, PendingStep, Runner
from jaxinfer.engine.inputs import InputProcessor
from jaxinfer.engine.output_processor import OutputProcessor
from jaxinfer.tokenizer.tokenizer import load_tokenizer

PROMPT_LEN = 16


class Times(NamedTuple):
    wall_s: float
    cpu_s: float


class Clocks:
    """Times of named phases, one entry a call."""

    def __init__(self) -> None:
        self.of: dict[str, list[Times]] = defaultdict(list)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        yield
        self.of[phase].append(Times(time.perf_counter() - wall_s, time.thread_time() - cpu_s))

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(phase):
                return function(*args, **kwargs)

        return timed

    def row(self, phase: str, num_steps: int) -> dict[str, float]:
        """Per step: median CPU and wall of the calls, times how many of them a step has."""
        times = self.of.get(phase, [])
        per_step = len(times) / num_steps
        if not times:
            return {"calls": 0.0, "cpu_us": 0.0, "wall_us": 0.0}
        wall_s, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
        return {
            "calls": round(per_step, 2),
            "cpu_us": round(per_step * cpu_s * 1e6, 1),
            "wall_us": round(per_step * wall_s * 1e6, 1),
        }


class Around:
    """An object whose calls of `phases` (method -> phase) are timed; all else is its own."""

    def __init__(self, inner: Any, clocks: Clocks, phases: dict[str, str]) -> None:
        self._inner = inner
        for method, phase in phases.items():
            setattr(self, method, clocks.around(phase, getattr(inner, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class TimedRunner(Around):
    """The runner, with `dispatch` and its pending steps' `result` timed."""

    def __init__(self, inner: Runner, clocks: Clocks) -> None:
        super().__init__(inner, clocks, {})
        self._clocks = clocks

    def dispatch(self, step: ScheduledStep) -> PendingStep:
        with self._clocks.measure("dispatch"):
            pending = self._inner.dispatch(step)
        return Around(pending, self._clocks, {"result": "result"})  # type: ignore[return-value]


@contextmanager
def timed_below_the_runner(clocks: Clocks) -> Iterator[list[Any]]:
    """Times packing and the calls of compiled programs; yields the shapes of the last call."""
    import jax

    from jaxinfer.runner import runner as module

    pack, call = module.pack_step, jax.stages.Compiled.__call__
    shapes: list[Any] = []

    def timed_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not shapes:
            shapes.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args))
        with clocks.measure("call"):
            return call(self, *args, **kwargs)

    module.pack_step = clocks.around("pack", pack)
    jax.stages.Compiled.__call__ = timed_call  # type: ignore[method-assign]
    try:
        yield shapes
    finally:
        module.pack_step = pack
        jax.stages.Compiled.__call__ = call  # type: ignore[method-assign]


def call_floor(shapes: tuple[Any, ...], clocks: Clocks, num_steps: int) -> None:
    """Times calls with the same arguments (weights, pages, state, ...) that compute nothing."""
    import jax
    import jax.numpy as jnp

    def nothing(weights: Any, pages: Any, state: Any, *rest: Any) -> Any:  # noqa: ARG001
        return pages, state

    program = jax.jit(nothing, donate_argnums=(1, 2), keep_unused=True).lower(*shapes).compile()
    weights, pages, state, *rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    rest = jax.device_get(rest)
    for _ in range(num_steps):
        with clocks.measure("call floor"):
            pages, state = program(weights, pages, state, *rest)
        jax.block_until_ready(pages)


PHASES = {
    "schedule": "",
    "dispatch": "",
    "pack": "in dispatch",
    "call": "in dispatch",
    "result": "waits for the device",
    "update": "",
    "send": "puts into the outbox",
    "step": "the whole turn",
    "call floor": "not in the step",
    "encode": "another thread of the core",
    "decode": "server's process",
    "process": "server's process: detokenize, outputs",
}


class CoreProfile:
    """A core in this process, with clocks around its parts, and the client's side of it."""

    def __init__(self, directory: Path, *, num_seqs: int, is_async: bool) -> None:
        self.clocks = Clocks()
        self.sent: list[CoreMessage] = []
        config = tiny_config(directory, num_seqs)
        built = build_core(
            config,
            runner_factory="jaxinfer.runner.build:build_runner",
            progress=ignore_progress,
            send=lambda _, message: self.sent.append(message),
            num_clients=1,
        )
        self._built = built
        self.core = self._timed_core(built, is_async=is_async)
        self._tokenizer = load_tokenizer(directory)
        self.outputs = OutputProcessor(self._tokenizer, next_seed=lambda: 0)

    def _timed_core(self, built: BuiltCore, *, is_async: bool) -> EngineCore:
        phases = {"schedule": "schedule", "update": "update"}
        scheduler: Any = Around(built.scheduler, self.clocks, phases)
        runner: Any = TimedRunner(built.runner, self.clocks)
        return EngineCore(
            runner=runner,
            scheduler=scheduler,
            info=built.info,
            send=self.clocks.around("send", lambda _, message: self.sent.append(message)),
            num_clients=1,
            async_scheduling=is_async,
        )

    def run(self, *, num_seqs: int, num_steps: int) -> None:
        """Fills the batch, lets all prompts pass, and measures `num_steps` steps of decoding."""
        inputs = InputProcessor(self._tokenizer, self._built.info)
        params = SamplingParams(temperature=0, max_tokens=num_steps + 100, ignore_eos=True)
        for number in range(num_seqs):
            prompt = [(number * 7 + position) % 256 for position in range(PROMPT_LEN)]
            validated = inputs.validate(prompt, params)
            new = self.outputs.add(str(number), validated, output_kind="delta")
            for message in new.messages:
                self.core.handle(0, message)
        for _ in range(40):
            self.core.step()
        self.sent.clear()
        self.clocks.of.clear()
        gc.collect()
        gc.freeze()  # as the core's own process does
        with timed_below_the_runner(self.clocks) as shapes:
            for _ in range(num_steps):
                with self.clocks.measure("step"):
                    self.core.step()
        self._client_side()
        if shapes:
            call_floor(shapes[0], self.clocks, num_steps)

    def _client_side(self) -> None:
        """What becomes of each update in the other thread and in the server's process."""
        encoder = msgspec.msgpack.Encoder()
        decoder: msgspec.msgpack.Decoder[CoreMessage] = msgspec.msgpack.Decoder(CoreMessage)
        for message in self.sent:
            with self.clocks.measure("encode"):
                payload = encoder.encode(message)
            with self.clocks.measure("decode"):
                update = decoder.decode(payload)
            assert isinstance(update, StepUpdate)
            with self.clocks.measure("process"):
                for state in self.outputs.process(update).changed:
                    state.take()


def profile_core(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    write_tiny_model(directory, num_layers=args.num_layers)
    profile = CoreProfile(directory, num_seqs=args.num_seqs, is_async=not args.no_async_scheduling)
    profile.run(num_seqs=args.num_seqs, num_steps=args.num_steps)
    rows = {phase: profile.clocks.row(phase, args.num_steps) for phase in PHASES}
    print(f"{args.num_seqs} sequences, {args.num_layers} layers, medians per step, us")
    print(f"{'phase':<12}{'calls':>7}{'CPU':>10}{'wall':>10}")
    for phase, row in rows.items():
        note = PHASES[phase]
        print(f"{phase:<12}{row['calls']:>7}{row['cpu_us']:>10.1f}{row['wall_us']:>10.1f}  {note}")
    outside_us = rows["step"]["cpu_us"] - rows["call"]["cpu_us"]
    with_floor_us = outside_us + rows["call floor"]["cpu_us"]
    print(f"\nhost CPU of a step outside the call {outside_us:.0f} us, ", end="")
    print(f"with the call's floor {with_floor_us:.0f} us")
    return {"phases": rows, "outside_call_us": outside_us, "with_floor_us": with_floor_us}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["core", "http"])
    parser.add_argument("--num-seqs", type=int, default=64, help="sequences at once")
    parser.add_argument("--num-steps", type=int, default=200, help="steps, tokens of a stream")
    parser.add_argument("--num-layers", type=int, default=1, help="of the tiny model (core)")
    parser.add_argument("--no-async-scheduling", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    args = parser.parse_args()
    if not 1 <= args.num_steps <= MAX_MODEL_LEN - 200:
        parser.error(f"--num-steps must be between 1 and {MAX_MODEL_LEN - 200}")
    with tempfile.TemporaryDirectory() as name:
        measure = profile_core if args.what == "core" else profile_http
        result = measure(args, Path(name))
    if args.json is not None:
        text = json.dumps({"what": args.what, "num_seqs": args.num_seqs, **result})
        Path(args.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
