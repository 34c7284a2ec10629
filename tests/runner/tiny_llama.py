"""A random Llama small enough to compile in seconds, as a Hugging Face directory, and its truth.

`TinyLlama` holds the weights in numpy under their Hugging Face names; `save` writes what the
engine loads, `logits` computes the same model in float64, without a cache, a batch or a page.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS = 1
ROPE_THETA = 10_000.0
NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class TinyLlama:
    """Weights are wide enough for the logits to differ by whole numbers."""

    seed: int = 0
    num_layers: int = 2
    model_dim: int = 32
    hidden_dim: int = 48
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    vocab_size: int = 96
    max_len: int = 128
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # filled with random ones

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        for name, shape in self._shapes().items():
            if len(shape) == 1:
                values = 1.0 + 0.2 * rng.standard_normal(shape)
            elif "embed" in name:
                values = rng.standard_normal(shape)
            else:
                values = rng.standard_normal(shape) * 2.0 / np.sqrt(shape[1])
            self.weights[name] = values.astype(np.float32)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        D, V, F = self.model_dim, self.vocab_size, self.hidden_dim  # noqa: N806
        N, K = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim  # noqa: N806
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (V, D),
            "model.norm.weight": (D,),
            "lm_head.weight": (V, D),
        }
        for layer in range(self.num_layers):
            own = {
                "input_layernorm": (D,),
                "self_attn.q_proj": (N, D),
                "self_attn.k_proj": (K, D),
                "self_attn.v_proj": (K, D),
                "self_attn.o_proj": (D, N),
                "post_attention_layernorm": (D,),
                "mlp.gate_proj": (F, D),
                "mlp.up_proj": (F, D),
                "mlp.down_proj": (D, F),
            }
            shapes |= {f"model.layers.{layer}.{k}.weight": v for k, v in own.items()}
        return shapes

    def save(self, directory: Path) -> Path:
        """config.json, model.safetensors and a tokenizer of one token a character."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.model_dim,
            "intermediate_size": self.hidden_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_len,
            "rms_norm_eps": NORM_EPS,
            "rope_theta": ROPE_THETA,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "eos_token_id": EOS,
            "torch_dtype": "float32",
        }
        (directory / "config.json").write_text(json.dumps(config))
        save_file(self.weights, directory / "model.safetensors")
        self._save_tokenizer(directory)
        return directory

    def _save_tokenizer(self, directory: Path) -> None:
        characters = [chr(code) for code in range(33, 33 + self.vocab_size - 3)]
        vocab = {text: index for index, text in enumerate(["<unk>", "</s>", "▁", *characters])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(prepend_scheme="never", split=False),
                pre_tokenizers.Split("", "isolated"),
            ]
        )
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.save(str(directory / "tokenizer.json"))
        named = {"eos_token": "</s>", "unk_token": "<unk>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """[T] ids -> float64 [T, V]: Llama as its paper and config describe it."""
        weight = {name: value.astype(np.float64) for name, value in self.weights.items()}
        x_TD = weight["model.embed_tokens.weight"][token_ids]
        for layer in range(self.num_layers):
            own = {
                name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): value
                for name, value in weight.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            x_TD = x_TD + self._attention(_rms_norm(x_TD, own["input_layernorm"]), own)
            h_TD = _rms_norm(x_TD, own["post_attention_layernorm"])
            gate_TF = h_TD @ own["mlp.gate_proj"].T
            hidden_TF = gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ own["mlp.up_proj"].T)
            x_TD = x_TD + hidden_TF @ own["mlp.down_proj"].T
        return _rms_norm(x_TD, weight["model.norm.weight"]) @ weight["lm_head.weight"].T

    def _attention(self, x_TD: np.ndarray, own: dict[str, np.ndarray]) -> np.ndarray:
        num_tokens, H = x_TD.shape[0], self.head_dim  # noqa: N806
        q_TNH = _rotate((x_TD @ own["self_attn.q_proj"].T).reshape(num_tokens, -1, H))
        k_TKH = _rotate((x_TD @ own["self_attn.k_proj"].T).reshape(num_tokens, -1, H))
        v_TKH = (x_TD @ own["self_attn.v_proj"].T).reshape(num_tokens, -1, H)
        group = self.num_heads // self.num_kv_heads
        k_TNH, v_TNH = np.repeat(k_TKH, group, axis=1), np.repeat(v_TKH, group, axis=1)
        scores_NTX = np.einsum("TNH,XNH->NTX", q_TNH, k_TNH) / np.sqrt(H)
        is_later_TX = np.triu(np.ones((num_tokens, num_tokens), bool), k=1)
        scores_NTX = np.where(is_later_TX, -np.inf, scores_NTX)
        weights_NTX = np.exp(scores_NTX - scores_NTX.max(axis=-1, keepdims=True))
        weights_NTX /= weights_NTX.sum(axis=-1, keepdims=True)
        out_TNH = np.einsum("NTX,XNH->TNH", weights_NTX, v_TNH)
        return out_TNH.reshape(num_tokens, -1) @ own["self_attn.o_proj"].T

    def log_probs(self, token_ids: list[int]) -> np.ndarray:
        """log softmax of `logits`."""
        logits_TV = self.logits(token_ids)
        logits_TV = logits_TV - logits_TV.max(axis=-1, keepdims=True)
        return logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The likeliest continuation, token by token."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def _rms_norm(x_TD: np.ndarray, scale_D: np.ndarray) -> np.ndarray:
    return x_TD / np.sqrt((x_TD**2).mean(axis=-1, keepdims=True) + NORM_EPS) * scale_D


def _rotate(x_TNH: np.ndarray) -> np.ndarray:
    half = x_TNH.shape[-1] // 2
    frequency_F = ROPE_THETA ** (-np.arange(half) / half)
    angle_T1F = (np.arange(x_TNH.shape[0])[:, None] * frequency_F)[:, None]
    first, second = x_TNH[..., :half], x_TNH[..., half:]
    cos, sin = np.cos(angle_T1F), np.sin(angle_T1F)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
