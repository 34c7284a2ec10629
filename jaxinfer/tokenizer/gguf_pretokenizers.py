"""How byte-level BPE vocabularies split text before merging: GGUF's `tokenizer.ggml.pre` names.

Data only. A name stands here when its Hugging Face tokenizer.json is known; every other name is
refused, since a wrong split gives plausible but wrong tokens. Sources: the tokenizer.json of the
models, and the table of names in llama.cpp (src/llama-vocab.cpp).
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from jaxinfer.errors import CheckpointError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_LOWER_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_UPPER_WORD}|{_LOWER_WORD}|\p{{N}}|{_REST}"
_GPT4O = rf"{_UPPER_WORD}{_CONTRACTION}|{_LOWER_WORD}{_CONTRACTION}|\p{{N}}{{1,3}}|{_REST}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True, kw_only=True)
class PreTokenizerRule:
    """One way of splitting; `build` makes a fresh object since a tokenizer owns its parts."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False  # a word that is in the vocabulary is taken whole
    add_bos: bool = False  # when the file does not say


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split_by(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        splits: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns
        ]
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, bytes_only])

    return build


_GPT2_RULE = PreTokenizerRule(build=_gpt2)
_DIGITS_RULE = PreTokenizerRule(build=_single_digits)
_LLAMA3_RULE = PreTokenizerRule(build=_split_by(_LLAMA3), ignore_merges=True, add_bos=True)
_QWEN2_RULE = PreTokenizerRule(build=_split_by(_QWEN2), normalizer=normalizers.NFC)
_GPT4O_RULE = PreTokenizerRule(build=_split_by(_GPT4O))

_RULES = {
    "gpt-2": _GPT2_RULE,
    "phi-2": _GPT2_RULE,
    "olmo": _GPT2_RULE,
    "smollm": _DIGITS_RULE,
    "starcoder": _DIGITS_RULE,
    "refact": _DIGITS_RULE,  # also IBM Granite 3
    "command-r": _DIGITS_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "tekken": PreTokenizerRule(build=_split_by(_TEKKEN), ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT4O_RULE,
    "llama4": _GPT4O_RULE,
    "deepseek-v3": PreTokenizerRule(build=_split_by(*_DEEPSEEK3)),
}


def find_rule(name: str | None) -> PreTokenizerRule:
    """The rule of a `tokenizer.ggml.pre` value; raises CheckpointError for an unknown one."""
    rule = _RULES.get(name or "")
    if rule is None:
        raise CheckpointError(
            f"The GGUF file's tokenizer.ggml.pre={name!r} is not known; known are "
            f"{', '.join(sorted(_RULES))}. Give the model's Hugging Face tokenizer directory "
            "with --tokenizer."
        )
    return rule
