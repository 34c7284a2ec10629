"""Builds a `tokenizers.Tokenizer` from the metadata of a GGUF file.

Knows GGUF's tokenizer keys; knows nothing of templates' meaning, of tensors or of serving. The
result splits text as the Hugging Face tokenizer.json of the same model does.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from jaxinfer.core.gguf_header import read_gguf_header
from jaxinfer.errors import CheckpointError
from jaxinfer.tokenizer.gguf_pretokenizers import find_rule
from jaxinfer.tokenizer.source import TokenizerSource

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type
_EXTRA_EOS_KEYS = ("eot_token_id", "eom_token_id")  # ends of turn and of message
_NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelt so by the gguf package
    "pad_token": "padding_token_id",
}


def load_gguf_tokenizer(path: Path) -> TokenizerSource:
    """Reads `path`; raises CheckpointError when its tokenizer is missing, damaged or unknown."""
    return source_from_metadata(read_gguf_header(path).metadata)


def source_from_metadata(metadata: dict[str, Any]) -> TokenizerSource:
    """The tokenizer that GGUF key-values describe; raises CheckpointError."""
    fields = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens = _require(fields, "tokens")
    kind = fields.get("model")
    if kind == "gpt2":
        backend, add_bos = _byte_level_bpe(fields)
    elif kind == "llama":
        backend, add_bos = _sentencepiece_bpe(fields)
    else:
        raise CheckpointError(
            f"The GGUF file's tokenizer.ggml.model={kind!r} is not supported (gpt2 and llama "
            "are). Give the model's Hugging Face tokenizer directory with --tokenizer."
        )
    _add_marked_tokens(backend, tokens, fields.get("token_type"))
    named = _named_tokens(fields, tokens)
    _set_post_processor(
        backend,
        bos=named.get("bos_token") if fields.get("add_bos_token", add_bos) else None,
        eos=named.get("eos_token") if fields.get("add_eos_token", False) else None,
    )
    extra_eos = [fields[key] for key in _EXTRA_EOS_KEYS if fields.get(key) is not None]
    return TokenizerSource(
        backend=backend,
        named_tokens=named,
        generation_eos_ids=tuple(extra_eos),
        chat_templates=_chat_templates(metadata),
    )


def _require(fields: dict[str, Any], key: str) -> Any:
    if key not in fields:
        raise CheckpointError(f"The GGUF file has no tokenizer.ggml.{key}; it cannot tokenize.")
    return fields[key]


def _vocabulary(fields: dict[str, Any]) -> dict[str, int]:
    tokens = _require(fields, "tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError("The GGUF file's tokenizer.ggml.tokens holds a token twice.")
    return vocab


def _byte_level_bpe(fields: dict[str, Any]) -> tuple[Tokenizer, bool]:
    rule = find_rule(fields.get("pre"))
    merges = [tuple(merge.split(" ", 1)) for merge in _require(fields, "merges")]
    model = _build_bpe(_vocabulary(fields), merges, ignore_merges=rule.ignore_merges)
    backend = Tokenizer(model)
    backend.pre_tokenizer = rule.build()
    if rule.normalizer is not None:
        backend.normalizer = rule.normalizer()
    backend.decoder = decoders.ByteLevel()
    return backend, rule.add_bos


def _sentencepiece_bpe(fields: dict[str, Any]) -> tuple[Tokenizer, bool]:
    """Llama-2 style: SentencePiece BPE with byte fallback; pieces merge in the order of scores."""
    vocab = _vocabulary(fields)
    merges = merges_from_scores(vocab, _require(fields, "scores"))
    unknown = fields.get("unknown_token_id", 0)
    tokens = fields["tokens"]
    if not 0 <= unknown < len(tokens):
        raise CheckpointError(
            f"tokenizer.ggml.unknown_token_id={unknown} is not in the vocabulary."
        )
    model = _build_bpe(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    add_space = fields.get("add_space_prefix", True)
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *steps] if add_space else steps
    )
    decoding: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space:
        decoding.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(decoding)
    return backend, True


def _build_bpe(vocab: dict[str, int], merges: list[Any], **options: Any) -> BPE:
    try:
        return BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # noqa: BLE001  (the Rust library raises bare Exception)
        raise CheckpointError(f"The GGUF file's merges do not fit its tokens: {error}.") from error


def merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The BPE merges of a SentencePiece model, first merge first.

    SentencePiece merges the adjacent pair whose union has the highest score (Kudo & Richardson
    2018, https://arxiv.org/abs/1808.06226); so every split of a piece into two pieces is a merge,
    ranked by the score of the whole. Byte and control pieces have no such split.
    """
    if len(scores) != len(vocab):
        raise CheckpointError(
            f"The GGUF file has {len(scores)} tokenizer.ggml.scores for {len(vocab)} tokens."
        )
    ranked = sorted(vocab, key=lambda piece: -scores[vocab[piece]])
    merges: list[tuple[str, str]] = []
    for piece in ranked:
        splits = [
            (piece[:cut], piece[cut:])
            for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        merges += sorted(splits, key=lambda split: (vocab[split[0]], vocab[split[1]]))
    return merges


def _add_marked_tokens(backend: Tokenizer, tokens: list[str], types: list[int] | None) -> None:
    """Control tokens become special, user-defined ones are matched whole but stay visible."""
    if types is None:
        return
    if len(types) != len(tokens):
        raise CheckpointError(
            f"The GGUF file has {len(types)} tokenizer.ggml.token_type for {len(tokens)} tokens."
        )
    marked: list[AddedToken | str] = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]
    backend.add_tokens(marked)


def _named_tokens(fields: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name, key in _NAMED_TOKENS.items():
        index = fields.get(key)
        if index is None or index == 2**32 - 1:  # how "none" is written in an unsigned field
            continue
        if not 0 <= index < len(tokens):
            raise CheckpointError(
                f"The GGUF file's tokenizer.ggml.{key}={index} is not in its vocabulary of "
                f"{len(tokens)}."
            )
        named[name] = tokens[index]
    return named


def _set_post_processor(backend: Tokenizer, *, bos: str | None, eos: str | None) -> None:
    if bos is None and eos is None:
        return
    first = [f"{bos}:0"] if bos is not None else []
    last = [f"{eos}:0"] if eos is not None else []
    second = [part[:-1] + "1" for part in first], [part[:-1] + "1" for part in last]
    special = [(token, backend.token_to_id(token)) for token in (bos, eos) if token is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A:0", *last],
        pair=[*first, "$A:0", *last, *second[0], "$B:1", *second[1]],
        special_tokens=special,
    )


def _chat_templates(metadata: dict[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    templates: dict[str, str] = {}
    for key, value in metadata.items():
        if key == prefix:
            templates["default"] = value
        elif key.startswith(prefix + "."):
            templates[key.removeprefix(prefix + ".")] = value
    return templates
