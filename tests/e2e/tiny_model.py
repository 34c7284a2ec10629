"""A Llama of two layers with random weights and a real byte-level tokenizer, as a Hugging Face
directory. Its texts are nonsense, but everything between HTTP and the device is the real thing,
and its few shapes compile in seconds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN = "<|im_end|>"
CONTEXT_LEN = 512

# Accepts what OpenAI's chat messages can hold, and shows every part that a test looks for.
CHAT_TEMPLATE = """\
{%- if tools -%}
    {{ '<|im_start|>system\\ntools: ' + tools | map(attribute='function.name') | join(', ') }}
    {{- '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + (' ' + message.name if message.name else '') + '\\n' }}
    {%- if message.content is string -%}
        {{ message.content }}
    {%- elif message.content -%}
        {%- for part in message.content %}{{ part.text }}{% endfor -%}
    {%- endif -%}
    {%- for call in message.tool_calls or [] %}{{ 'call ' + call.function.name }}{% endfor -%}
    {{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\\n' + ('(' + mood + ') ' if mood is defined else '') }}
{%- endif -%}
"""

_CORPUS = (
    "The quick brown fox jumps over the lazy dog, doesn't it? It does, and then it sleeps.",
    "Once upon a time there was a model that was small enough to test everything with.",
    "Naïve façades cost fünfzig Öre. 日本語の文章です。 今日は。 🙂🙃",
)


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE: every text can be spelt, characters may be split over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    return tokenizer


def write_tiny_model(
    directory: Path,
    *,
    num_layers: int = 2,
    dim: int = 64,
    seed: int = 0,
    config: dict[str, Any] | None = None,
) -> Path:
    """Writes config.json, model.safetensors and the tokenizer; `config` overrides config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    vocab_size = tokenizer.get_vocab_size()
    head_dim, num_heads, num_kv_heads = 16, 4, 2
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": CONTEXT_LEN,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.token_to_id(EOS_TOKEN),
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(settings | (config or {})))
    random = np.random.default_rng(seed)

    def matrix(num_out: int, num_in: int) -> np.ndarray:
        return random.normal(0, num_in**-0.5, (num_out, num_in)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(vocab_size, dim) * 8,
        "model.norm.weight": np.ones(dim, np.float32),
        "lm_head.weight": matrix(vocab_size, dim) * 3,  # logits with a standard deviation of 3
    }
    for layer in range(num_layers):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.input_layernorm.weight": np.ones(dim, np.float32),
            f"{name}.post_attention_layernorm.weight": np.ones(dim, np.float32),
            f"{name}.self_attn.q_proj.weight": matrix(num_heads * head_dim, dim) * 2,
            f"{name}.self_attn.k_proj.weight": matrix(num_kv_heads * head_dim, dim) * 2,
            f"{name}.self_attn.v_proj.weight": matrix(num_kv_heads * head_dim, dim),
            f"{name}.self_attn.o_proj.weight": matrix(dim, num_heads * head_dim),
            f"{name}.mlp.gate_proj.weight": matrix(2 * dim, dim),
            f"{name}.mlp.up_proj.weight": matrix(2 * dim, dim),
            f"{name}.mlp.down_proj.weight": matrix(dim, 2 * dim),
        }
    save_file(tensors, directory / "model.safetensors")
    return directory
