"""A tiny model and a device that takes no time, for the profiles of the host's work."""

import json
import time
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxinfer.config.load import engine_config_from_kwargs
from jaxinfer.config.schema import EngineConfig
from jaxinfer.core.limits import EngineLimits
from jaxinfer.core.progress import ProgressCallback
from jaxinfer.core.step import ScheduledStep, SeqOutput, StepOutput

VOCAB_SIZE, MAX_MODEL_LEN = 256 + 3, 1024
PACED_STEP_S = 0.025  # longer than the server needs for 64 tokens: each is a frame of its own
_LETTER = ord("A") + 32  # in the byte tokenizer, some letter


def write_tiny_model(directory: Path, *, num_layers: int) -> Path:
    """config.json and a byte tokenizer; the weights are made by --load-format dummy."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([""], trainer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": VOCAB_SIZE - 1,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tiny_config(directory: Path, num_seqs: int) -> EngineConfig:
    return engine_config_from_kwargs(
        model=str(directory),
        load_format="dummy",
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(256, num_seqs),
        token_buckets=[max(256, num_seqs)],
        max_model_len=MAX_MODEL_LEN,
        num_gpu_blocks_override=num_seqs * MAX_MODEL_LEN // 16,
    )


class InstantStep:
    def __init__(self, output: StepOutput, ready_s: float) -> None:
        self._output, self._ready_s = output, ready_s

    def result(self) -> StepOutput:
        time.sleep(max(0.0, self._ready_s - time.monotonic()))
        return self._output


class InstantRunner:
    """A device that gives a letter for every sequence, after `step_s`."""

    def __init__(self, config: EngineConfig, *, step_s: float) -> None:
        num_seqs = config.scheduler.max_num_seqs or 64
        num_pages = config.cache.num_gpu_blocks_override or 64 * num_seqs
        self.limits = EngineLimits(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens or 4096,
            max_model_len=config.model.max_model_len or MAX_MODEL_LEN,
            page_size=config.cache.block_size or 16,
            num_pages=num_pages,
        )
        self.vocab_size = VOCAB_SIZE
        self.eos_token_ids = (VOCAB_SIZE - 1,)
        self.device_name, self.dtype = "instant", "float32"
        self.num_compiles_after_ready = 0
        self._step_s = step_s
        self._free_s = 0.0

    def dispatch(self, step: ScheduledStep) -> InstantStep:
        seqs = [SeqOutput([_LETTER] if seq.samples else [], [], []) for seq in step.seqs]
        self._free_s = max(time.monotonic(), self._free_s) + self._step_s
        return InstantStep(StepOutput(step_id=step.step_id, seqs=seqs), self._free_s)

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def build_instant(config: EngineConfig, _progress: ProgressCallback) -> InstantRunner:
    return InstantRunner(config, step_s=0.0)


def build_paced(config: EngineConfig, _progress: ProgressCallback) -> InstantRunner:
    return InstantRunner(config, step_s=PACED_STEP_S)
