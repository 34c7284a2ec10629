"""Reading config.json strictly: a switch that this version does not know is refused by name.

Knows which keys never change a forward pass; the family files say which others they honour.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from jaxinfer.errors import CheckpointError

IRRELEVANT_KEYS = frozenset(
    """
    add_cross_attention architectures attention_dropout attn_implementation auto_map
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id length_penalty max_length
    max_position_embeddings min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_past
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
    vocab_size
    """.split()
)


INTEGER_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
NUMBER_KEYS = (
    "rms_norm_eps",
    "rope_theta",
    "sliding_window",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


STRING_KEYS = ("model_type", "hidden_act", "torch_dtype", "dtype")
SWITCH_KEYS = (
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "use_sliding_window",
)
COUNT_KEYS = ("max_window_layers", "no_rope_layer_interval")


def refuse_quantized(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError naming the scheme when the weights are stored quantized."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return
    scheme = "unnamed"
    if isinstance(quantization, Mapping):
        scheme = quantization.get("quant_method") or quantization.get("format") or scheme
    raise CheckpointError(
        f"quantization_config of config.json: the weights are quantized ({scheme}), which this "
        "version does not serve. Use the model's unquantized checkpoint, or a GGUF file of it."
    )


def check_numbers(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a size or a constant that is no such number."""
    for key in INTEGER_KEYS:
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise CheckpointError(
                f"{key} of config.json must be a positive integer, got {value!r}."
            )
    for key in NUMBER_KEYS:
        value = config.get(key)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise CheckpointError(f"{key} of config.json must be a number, got {value!r}.")


def check_types(config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a label, a switch or a list that is something else."""
    for key in STRING_KEYS:
        _check_type(config, key, str, "a string")
    for key in SWITCH_KEYS:
        _check_type(config, key, bool, "true or false")
    for key in COUNT_KEYS:
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise CheckpointError(
                f"{key} of config.json must be an integer of at least 0, got {value!r}."
            )
    list_of(str, config, "layer_types")
    list_of(int, config, "no_rope_layers")


def list_of(kind: type, config: Mapping[str, Any], key: str) -> list[Any] | None:
    """The list of `kind` under a key; None for null or no key. Raises CheckpointError."""
    value = config.get(key)
    is_good = isinstance(value, list) and all(isinstance(item, kind) for item in value)
    if value is not None and not is_good:
        names = {str: "strings", int: "integers"}
        raise CheckpointError(
            f"{key} of config.json must be a list of {names[kind]}, got {value!r}."
        )
    return value


def _check_type(config: Mapping[str, Any], key: str, kind: type, what: str) -> None:
    value = config.get(key)
    if value is not None and type(value) is not kind:
        raise CheckpointError(f"{key} of config.json must be {what}, got {value!r}.")


def refuse_unknown(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises CheckpointError naming every key that is set and that nobody here understands.

    Keys that are null, false or empty, private ("_name_or_path") or belong to other runtimes
    ("transformers.js_config") say nothing about the forward pass. Strings are labels.
    """
    unknown = sorted(
        key
        for key, value in config.items()
        if key not in known
        and key not in IRRELEVANT_KEYS
        and not key.startswith(("_", "transformers"))
        and value not in (None, False, 0, [], {})
        and not isinstance(value, str)
    )
    if unknown:
        shown = ", ".join(f"{key}={config[key]!r}" for key in unknown)
        raise CheckpointError(
            f"config.json of model_type {config.get('model_type')!r} sets {shown}, which this "
            "version does not know and will not ignore. Remove a key only if it does not change "
            "the model's output."
        )


def require(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key that a model cannot do without."""
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"config.json has no {key!r}; the model cannot be built without it.")
    return value


def checkpoint_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that config.json states ("float32" when it states none)."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
