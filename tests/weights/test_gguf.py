"""GGUF as a checkpoint: arithmetic of the types, names, row order, refusals, the real file."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind

from jaxinfer.errors import CheckpointError
from jaxinfer.weights.gguf import to_hf_name
from jaxinfer.weights.reader import open_checkpoint
from tests.weights.checkpoints import write_gguf

NAME, HF_NAME = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Largest error in steps of the block's quantization: half a step for rounding, one for the
# asymmetric codes that never reach the far end, plus what float16 scales lose.
LEVELS = {
    Kind.Q8_0: (255, 0.6),
    Kind.Q4_0: (16, 1.1),
    Kind.Q4_1: (15, 0.6),
    Kind.Q5_0: (32, 1.1),
    Kind.Q5_1: (31, 0.6),
}


@pytest.mark.parametrize("kind", LEVELS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(3, 32), (40, 224)])
def test_legacy_types_stay_within_a_quantization_step(tmp_path, kind, shape):
    values = random(*shape)
    packed = gguf.quants.quantize(values, kind)
    path = write_gguf(tmp_path / "m.gguf", {NAME: packed}, kinds={NAME: kind})
    reader = open_checkpoint(path)
    read = reader.read(HF_NAME)
    info = reader.tensors()[HF_NAME]
    assert (info.shape, info.dtype) == (shape, np.float32) == (read.shape, read.dtype)
    blocks, error = values.reshape(-1, 32), np.abs(read - values).reshape(-1, 32)
    levels, steps = LEVELS[kind]
    symmetric = kind in (Kind.Q8_0, Kind.Q4_0, Kind.Q5_0)
    span = 2 * np.abs(blocks).max(1) if symmetric else np.ptp(blocks, axis=1)
    assert (error.max(1) <= steps * span / levels + 2e-3 * np.abs(blocks).max(1)).all()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Kind.F32, np.float32), (Kind.F16, np.float16), (Kind.BF16, ml_dtypes.bfloat16)],
)
def test_plain_types_are_views_in_their_own_dtype(tmp_path, kind, dtype):
    values = random(4, 32).astype(dtype)
    raw = values.view(np.uint8) if kind == Kind.BF16 else values
    path = write_gguf(tmp_path / "m.gguf", {NAME: raw}, kinds={NAME: kind})
    read = open_checkpoint(path).read(HF_NAME)
    assert read.dtype == dtype and read.tobytes() == values.tobytes()
    assert not read.flags.owndata and not read.flags.writeable


def scale_min(scales: np.ndarray, j: int) -> tuple[int, int]:
    """The 6-bit scale and minimum of sub-block j out of 12 bytes (ggml's block_q4_K)."""
    s = [int(x) for x in scales]
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4)


def q4_k(block: np.ndarray) -> list[float]:
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    scales, quants = block[4:16], block[16:144]
    out = []
    for j in range(8):
        scale, minimum = scale_min(scales, j)
        for i in range(32):
            code = int(quants[32 * (j // 2) + i]) >> (4 * (j % 2)) & 15
            out.append(d * scale * code - dmin * minimum)
    return out


def q5_k(block: np.ndarray) -> list[float]:
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    scales, high, quants = block[4:16], block[16:48], block[48:176]
    out = []
    for j in range(8):
        scale, minimum = scale_min(scales, j)
        for i in range(32):
            code = int(quants[32 * (j // 2) + i]) >> (4 * (j % 2)) & 15
            code += 16 * (int(high[i]) >> j & 1)
            out.append(d * scale * code - dmin * minimum)
    return out


def q6_k(block: np.ndarray) -> list[float]:
    low, high = block[:128], block[128:192]
    scales, d = block[192:208].view(np.int8), float(block[208:210].view(np.float16)[0])
    out = []
    for position in range(256):
        half, quarter, i = position // 128, position % 128 // 32, position % 32
        nibble = int(low[64 * half + 32 * (quarter % 2) + i]) >> (4 * (quarter // 2)) & 15
        code = nibble | (int(high[32 * half + i]) >> (2 * quarter) & 3) << 4
        out.append(d * int(scales[position // 16]) * (code - 32))
    return out


@pytest.mark.parametrize(
    ("kind", "formula", "float16_at"),
    [(Kind.Q4_K, q4_k, (0, 2)), (Kind.Q5_K, q5_k, (0, 2)), (Kind.Q6_K, q6_k, (208,))],
    ids=["Q4_K", "Q5_K", "Q6_K"],
)
def test_k_quants_equal_the_formula_of_their_layout(tmp_path, kind, formula, float16_at):
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(1).integers(0, 256, (6, block_bytes), np.uint8)
    for at in float16_at:
        scales = np.linspace(0.01, 0.02, 6).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(6, 2)
    packed = blocks.reshape(3, 2 * block_bytes)
    path = write_gguf(tmp_path / "m.gguf", {NAME: packed}, kinds={NAME: kind})
    read = open_checkpoint(path).read(HF_NAME)
    expected = np.array([formula(block) for block in blocks]).reshape(3, 512)
    np.testing.assert_allclose(read, expected, rtol=1e-6, atol=1e-6)


def interleave_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k, row by row."""
    out = np.empty_like(rows)
    for row in range(len(rows)):
        head, inside = divmod(row, head_dim)
        half, pair = divmod(inside, head_dim // 2)
        out[head * head_dim + 2 * pair + half] = rows[row]
    return out


@pytest.mark.parametrize(
    ("arch", "permuted"),
    [("llama", True), ("granite", True), ("smollm3", True), ("qwen2", False), ("qwen3", False)],
)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda kind: kind.name)
def test_q_and_k_rows_come_back_in_hugging_face_order(tmp_path, arch, permuted, kind):
    head_dim, num_heads = 8, {"q": 4, "k": 2, "v": 2}
    original = {p: random(n * head_dim, 32, seed=n) for p, n in num_heads.items()}
    bias = random(4 * head_dim, seed=9)
    stored = dict(original)
    if permuted:
        stored |= {p: interleave_halves(original[p], head_dim) for p in ("q", "k")}
    tensors = {f"blk.0.attn_{p}.weight": gguf.quants.quantize(a, kind) for p, a in stored.items()}
    kinds = dict.fromkeys(tensors, kind)
    tensors["blk.0.attn_q.bias"] = interleave_halves(bias, head_dim) if permuted else bias
    reader = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, arch=arch, kinds=kinds))
    for p, expected in original.items():
        read = reader.read(f"model.layers.0.self_attn.{p}_proj.weight")
        np.testing.assert_allclose(read, expected, atol=0.02 if kind == Kind.Q8_0 else 0)
    np.testing.assert_array_equal(reader.read("model.layers.0.self_attn.q_proj.bias"), bias)
    assert reader.config()["attention_bias"]


def test_names():
    assert to_hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert to_hf_name("output.weight") == "lm_head.weight"
    assert to_hf_name("blk.12.attn_q_norm.weight") == "model.layers.12.self_attn.q_norm.weight"
    assert to_hf_name("blk.3.attn_output.bias") == "model.layers.3.self_attn.o_proj.bias"
    # what is unknown keeps its name, so that the loader can list it
    assert to_hf_name("blk.3.attn_sinks.weight") == "blk.3.attn_sinks.weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "gemma3"}, r"architecture 'gemma3'.*granite, llama, qwen2, qwen3, smollm3"),
        ({"metadata": {"expert_count": 8}}, "mixture of experts"),
        ({"plain": {"split.count": 3}}, "one of 3 parts.*llama-gguf-split --merge"),
        ({"metadata": {"block_count": None}}, "llama.block_count"),
    ],
)
def test_refusals_name_what_is_wrong(tmp_path, arguments, message):
    path = write_gguf(tmp_path / "m.gguf", {NAME: random(2, 32)}, **arguments)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_an_unsupported_type_is_named_with_the_supported_ones(tmp_path):
    packed = np.zeros((2, gguf.GGML_QUANT_SIZES[Kind.IQ2_XXS][1]), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", {NAME: packed}, kinds={NAME: Kind.IQ2_XXS})
    with pytest.raises(CheckpointError, match=r"IQ2_XXS \(first: blk.0.ffn_up.weight\).*Q6_K"):
        open_checkpoint(path)


@pytest.mark.model
def test_the_real_model(smollm2_gguf):
    reader = open_checkpoint(smollm2_gguf)
    config = reader.config()
    # config.json of HuggingFaceTB/SmolLM2-135M-Instruct
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "vocab_size": 49152,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    tensors = reader.tensors()
    assert len(tensors) == 272 and "lm_head.weight" not in tensors
    layer = "model.layers.29"
    assert tensors[f"{layer}.self_attn.k_proj.weight"].shape == (192, 576)
    assert tensors[f"{layer}.mlp.down_proj.weight"].shape == (576, 1536)
    norm = reader.read("model.norm.weight")
    assert norm.shape == (576,) and 0.1 < norm.mean() < 20
    up = reader.read(f"{layer}.mlp.up_proj.weight")
    plain = gguf.quants.dequantize(
        np.fromfile(smollm2_gguf, np.uint8, **_span(smollm2_gguf, "blk.29.ffn_up.weight")),
        Kind.Q4_1,
    )
    np.testing.assert_array_equal(up.reshape(-1), plain)


def _span(path, name: str) -> dict[str, int]:
    from jaxinfer.weights.gguf_file import read_gguf

    tensor = read_gguf(path).tensors[name]
    return {"offset": tensor.offset, "count": tensor.num_bytes}
