"""`bench throughput`: tokens per second of the offline engine. Knows engines; prints nothing."""

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

from jaxinfer.bench.workloads import Workload, check_fits, random_prompts
from jaxinfer.config.fields import flatten
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.sampling_params import SamplingParams
from jaxinfer.engine.offline import LLM


def measure(llm: LLM, workload: Workload, *, seed: int) -> float:
    """Seconds from the first prompt in to the last token out."""
    prompts = random_prompts(
        workload.num_prompts,
        workload.input_len,
        vocab_size=llm.get_tokenizer().vocab_size,
        seed=seed,
    )
    params = SamplingParams(temperature=0, max_tokens=workload.output_len, ignore_eos=True)
    start_s = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    wall_s = time.perf_counter() - start_s
    for output in outputs:
        assert len(output.outputs[0].token_ids) == workload.output_len, "an answer fell short"
    return wall_s


def rates(workload: Workload, wall_s: float) -> dict[str, Any]:
    num_output = workload.num_prompts * workload.output_len
    num_total = num_output + workload.num_prompts * workload.input_len
    return {
        "n": workload.num_prompts,
        "in": workload.input_len,
        "out": workload.output_len,
        "wall_s": round(wall_s, 3),
        "output_tok_s": round(num_output / wall_s, 1),
        "total_tok_s": round(num_total / wall_s, 1),
    }


def measure_all(
    config: EngineConfig, workloads: Iterable[Workload], *, num_runs: int
) -> Iterator[dict[str, Any]]:
    """A row per workload, as soon as it is measured; of several runs the fastest counts."""
    workloads = tuple(workloads)
    for workload in workloads:
        check_fits(workload, config.model.max_model_len)
    start_s = time.perf_counter()
    with LLM(**flatten(config)) as llm:
        for workload in workloads:
            check_fits(workload, llm.info.max_model_len)
        warm_up = Workload(2, min(16, llm.info.max_model_len - 4), 4)
        measure(llm, warm_up, seed=config.model.seed)
        startup_s = time.perf_counter() - start_s
        common = {
            "engine": "jaxinfer",
            "model": config.model.model,
            "dtype": llm.info.dtype,
            "device": llm.info.device,
            "startup_s": round(startup_s, 1),
        }
        # Another seed for each run of each workload: the same one begins with the same prompts,
        # which the prefix cache would know.
        seeds = itertools.count(config.model.seed)
        for workload in workloads:
            walls = [measure(llm, workload, seed=next(seeds)) for _ in range(num_runs)]
            yield common | rates(workload, min(walls)) | {"runs": num_runs}
