"""One engine behind a pipe: loads it, then runs a workload for each line of JSON on stdin.

Runs under the engine's own Python, which need not have jaxinfer: imports nothing but the engine.
First answer: {"ready": {...}} once it has served a small batch; then {"wall_s": seconds} for each
{"num_prompts", "input_len", "output_len", "seed"}. Ends when stdin does. What engines print goes to
stderr. Prompts are those of `jaxinfer bench throughput`: the same seed gives the same tokens.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

MAX_MODEL_LEN, MAX_NUM_SEQS = 2048, 64
MIN_TOKEN_ID = 100

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[int]]  # prompts, output_len -> tokens of each answer


def make_prompts(num_prompts: int, input_len: int, *, seed: int, vocab_size: int) -> Prompts:
    rng = random.Random(seed)
    return [
        [rng.randrange(MIN_TOKEN_ID, vocab_size) for _ in range(input_len)]
        for _ in range(num_prompts)
    ]


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def load_jaxinfer(model: str, dtype: str, options: dict[str, Any]) -> tuple[Generate, str]:
    from jaxinfer import LLM, SamplingParams

    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS}
    llm = LLM(model, dtype=dtype, **{**limits, **options})

    def generate(prompts: Prompts, output_len: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return generate, llm.info.dtype


def load_vllm(model: str, dtype: str, options: dict[str, Any]) -> tuple[Generate, str]:
    for name, value in vllm_environment().items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS}
    llm = LLM(model, dtype=dtype, **{**limits, **options})

    def generate(prompts: Prompts, output_len: int) -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return generate, str(llm.llm_engine.model_config.dtype).removeprefix("torch.")


def vllm_environment() -> dict[str, str]:
    """What gives vLLM's CPU backend all cores; without it, it keeps one for itself."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }


def load_transformers(model: str, dtype: str, options: dict[str, Any]) -> tuple[Generate, str]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_cores())
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=chosen, **options)

    def generate(prompts: Prompts, output_len: int) -> list[int]:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            out = lm.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_len,
                min_new_tokens=output_len,
                do_sample=False,
            )
        return [out.shape[1] - ids.shape[1]] * len(prompts)

    return generate, str(lm.dtype).removeprefix("torch.")


def load_llamacpp(model: str, dtype: str, options: dict[str, Any]) -> tuple[Generate, str]:
    """One sequence after the other: the high-level API of llama-cpp-python has no batches."""
    from llama_cpp import Llama  # type: ignore[import-not-found]

    threads = num_cores()
    settings = {"n_ctx": MAX_MODEL_LEN, "n_threads": threads, "n_threads_batch": threads}
    llm = Llama(model, verbose=False, **{**settings, **options})

    def one(prompt: list[int], output_len: int) -> int:
        llm.reset()
        tokens = llm.generate(prompt, temp=0.0, reset=True)
        return sum(1 for _ in zip(range(output_len), tokens, strict=False))

    def generate(prompts: Prompts, output_len: int) -> list[int]:
        return [one(prompt, output_len) for prompt in prompts]

    return generate, f"{dtype} (as in the file)"


LOADERS = {
    "jaxinfer": load_jaxinfer,
    "vllm": load_vllm,
    "transformers": load_transformers,
    "llamacpp": load_llamacpp,
}


def run(generate: Generate, prompts: Prompts, output_len: int) -> float:
    """Seconds of one workload; every answer must have all of its tokens."""
    start_s = time.perf_counter()
    lengths = generate(prompts, output_len)
    wall_s = time.perf_counter() - start_s
    assert lengths == [output_len] * len(prompts), f"answers of {lengths} tokens"
    return wall_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=LOADERS, required=True)
    parser.add_argument("--model", required=True, help="HF directory; a .gguf file for llamacpp")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--options", type=json.loads, default={}, help="JSON, to the engine's class"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="token ids are below it")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    generate, dtype = LOADERS[args.engine](args.model, args.dtype, args.options)
    run(generate, make_prompts(2, 16, seed=-1, vocab_size=args.vocab_size), 4)
    print(json.dumps({"ready": {"dtype": dtype}}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        output_len = asked.pop("output_len")
        wall_s = run(generate, make_prompts(**asked, vocab_size=args.vocab_size), output_len)
        print(json.dumps({"wall_s": wall_s}), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
