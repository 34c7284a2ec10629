"""The engine with Llama-3.1-8B's shapes and random weights: time to ready, decodes, throughput.

`device step` is the time of steps that are dispatched without waiting for results: the host is
ahead, so only the device counts. `engine step` is the time of whole turns of the engine core, with
scheduling, packing, results and messages. What lies between is the host gap.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpu_sections.child import SectionRun
from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.core.messages import AddRequest, CoreMessage, StepUpdate
from jaxinfer.core.progress import ignore_progress
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.core.step import PENDING_TOKEN, Admission, ScheduledSeq, ScheduledStep
from jaxinfer.engine.build import BuiltCore, build_core
from jaxinfer.logging import configure_logging

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
TINY = LLAMA_8B | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "eos_token_id": 1,
}
PAGE_SIZE = 16
_ME = 0
_LONG = {"temperature": 0, "ignore_eos": True}


class Load(NamedTuple):
    num_prompts: int
    input_len: int
    output_len: int


def run(section: SectionRun) -> None:
    is_tiny = section.is_rehearsal
    configure_logging("info", process="engine")
    choices = _KernelChoices()
    logging.getLogger("jaxinfer").addHandler(choices)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["JAXINFER_CACHE"] = scratch  # nothing is compiled or checked yet
        engine, cold_s = _start(section, Path(scratch), "time to ready, nothing compiled")
        for line in choices.lines:
            section.row(what="kernel", choice=line)
        for batch in (1, 2) if is_tiny else (1, 8, 32, 128):
            if not section.has(6):
                section.row(what="decode", batch=batch, skipped="no time is left")
                continue
            section.row(what="decode", batch=batch, **_decode(engine, section, batch))
        for load, needed_s in _loads(is_tiny=is_tiny):
            name = f"throughput {load.input_len}/{load.output_len}"
            if not section.has(needed_s):
                section.row(what=name, skipped="no time is left")
                continue
            section.row(what=name, num_prompts=load.num_prompts, **engine.throughput(load))
        engine.close()
        if section.has(cold_s / 2 + 10):
            _start(section, Path(scratch), "time to ready, started before")[0].close()


def _start(section: SectionRun, directory: Path, what: str) -> "tuple[_Engine, float]":
    """A new engine, and the seconds that it took, those for random weights included."""
    start_s = time.perf_counter()
    engine = _Engine(directory, is_tiny=section.is_rehearsal)
    seconds = time.perf_counter() - start_s
    programs, device = len(engine.built.runner.buckets), engine.built.info.device
    section.row(what=what, seconds=round(seconds, 1), programs=programs, device=device)
    return engine, seconds


def _loads(*, is_tiny: bool) -> list[tuple[Load, float]]:
    """With the seconds that each may take."""
    if is_tiny:
        return [(Load(4, 16, 8), 1.0)]
    return [(Load(256, 128, 128), 15.0), (Load(128, 1000, 1000), 50.0)]


class _KernelChoices(logging.Handler):
    """What the engine says of its choice of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("kernel "):
            self.lines.append(text.removeprefix("kernel "))


class _Engine:
    """A core in this process, and the messages it sends."""

    def __init__(self, directory: Path, *, is_tiny: bool) -> None:
        hf_config = TINY if is_tiny else LLAMA_8B
        (directory / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
        self.max_num_seqs = 4 if is_tiny else 128
        tokens = 64 if is_tiny else 2048
        self.config = engine_config_from_kwargs(
            model=str(directory),
            load_format="dummy",
            max_model_len=256 if is_tiny else 4096,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=tokens,
            token_buckets=[tokens],
            block_size=PAGE_SIZE,
            enable_prefix_caching=False,
        )
        self.messages: list[CoreMessage] = []
        self.built: BuiltCore = build_core(
            self.config,
            runner_factory="jaxinfer.runner.build:build_runner",
            progress=ignore_progress,
            send=lambda _, message: self.messages.append(message),
            num_clients=1,
        )
        self.hf_config = hf_config
        self._num_added = 0

    def add(self, num_prompts: int, input_len: int, output_len: int) -> None:
        rng = np.random.default_rng(self._num_added)
        for _ in range(num_prompts):
            prompt = rng.integers(2, self.hf_config["vocab_size"], input_len).tolist()
            request = AddRequest(
                request_id=str(self._num_added),
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=output_len, **_LONG),
                arrival_time_s=time.monotonic(),
            )
            self._num_added += 1
            self.built.core.handle(_ME, request)

    def step(self) -> int:
        """One turn; the number of tokens it brought."""
        self.messages.clear()
        self.built.core.step()
        updates = (m for m in self.messages if isinstance(m, StepUpdate))
        return sum(len(s.new_token_ids) for update in updates for s in update.sequences)

    def finish(self) -> int:
        num_tokens = 0
        while self.built.core.has_work:
            num_tokens += self.step()
        return num_tokens

    def throughput(self, load: Load) -> dict[str, Any]:
        start_s = time.perf_counter()
        self.add(*load)
        num_tokens = self.finish()
        seconds = time.perf_counter() - start_s
        assert num_tokens == load.num_prompts * load.output_len, num_tokens
        num_all = num_tokens + load.num_prompts * load.input_len
        return {
            "seconds": round(seconds, 2),
            "output_tokens_per_s": round(num_tokens / seconds, 1),
            "all_tokens_per_s": round(num_all / seconds, 1),
        }

    def close(self) -> None:
        self.built.runner.close()


def _decode(engine: _Engine, section: SectionRun, batch: int) -> dict[str, Any]:
    """Step times of `batch` sequences that are at `context` tokens and more."""
    is_tiny = section.is_rehearsal
    context, num_steps = (16, 8) if is_tiny else (512, 64)
    engine.add(batch, context, 3 * num_steps)
    while sum(engine.step() for _ in range(2)) < 2 * batch:  # until every prompt is computed
        pass
    best_s = float("inf")
    for _ in range(2):
        start_s = time.perf_counter()
        for _ in range(num_steps // 2):
            engine.step()
        best_s = min(best_s, (time.perf_counter() - start_s) / (num_steps // 2))
    engine.finish()
    device_s = _device_step_s(engine, batch, context=context, num_steps=num_steps // 2)
    floor_s = _floor_bytes(engine.hf_config, batch, context) / section.options["copy_bytes_per_s"]
    return {
        "context": context,
        "engine_step_ms": round(best_s * 1e3, 3),
        "device_step_ms": round(device_s * 1e3, 3),
        "host_gap": round(1 - device_s / best_s, 3),
        "tokens_per_s": round(batch / best_s, 1),
        "share_of_copy": round(floor_s / device_s, 3),
    }


def _device_step_s(engine: _Engine, batch: int, *, context: int, num_steps: int) -> float:
    """Steps straight to the runner, none waited for but the last; the faster of two runs."""
    runner = engine.built.runner
    pages_each = -(-(context + num_steps + 1) // PAGE_SIZE)
    prompt = [5] * context
    admission = Admission(
        sampling=SamplingParams(**_LONG), prompt_token_ids=prompt, output_token_ids=()
    )
    first = [
        _seq(slot, 0, [5], pages=range(slot * pages_each, (slot + 1) * pages_each), new=admission)
        for slot in range(batch)
    ]
    best_s = float("inf")
    for _ in range(2):
        runner.reset()
        for seq in first:  # one at a time: a step has little room for new pages
            runner.dispatch(_step([seq])).result()
        start_s = time.perf_counter()
        pending = None
        for index in range(num_steps):
            seqs = [_seq(slot, context + index, [PENDING_TOKEN]) for slot in range(batch)]
            pending = runner.dispatch(_step(seqs))
        assert pending is not None
        pending.result()
        best_s = min(best_s, (time.perf_counter() - start_s) / num_steps)
    runner.reset()
    return best_s


def _seq(
    slot: int,
    start: int,
    token_ids: list[int],
    *,
    pages: Sequence[int] = (),
    new: Admission | None = None,
) -> ScheduledSeq:
    return ScheduledSeq(
        request_id=str(slot),
        slot=slot,
        start=start,
        token_ids=token_ids,
        samples=True,
        output_index=0,
        first_new_page=0,
        new_pages=tuple(pages),
        admission=new,
    )


def _step(seqs: Sequence[ScheduledSeq]) -> ScheduledStep:
    return ScheduledStep(step_id=0, seqs=seqs, num_tokens=sum(len(seq.token_ids) for seq in seqs))


def _floor_bytes(config: dict[str, Any], batch: int, context: int) -> float:
    """Weights that every token needs (all but the embedding table) and keys and values, 16 bits."""
    dim, hidden, layers = (
        config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    )  # fmt: skip
    heads, kv_heads, head_dim = (
        config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    )  # fmt: skip
    attention = dim * head_dim * (2 * heads + 2 * kv_heads)
    weights = layers * (attention + 3 * dim * hidden) + dim * config["vocab_size"]
    keys = layers * batch * context * 2 * kv_heads * head_dim
    return 2.0 * (weights + keys)
