"""Turns `bad_words` of a request into token sequences. Knows the tokenizer, nothing else."""

from collections.abc import Iterable

from jaxinfer.errors import RequestError
from jaxinfer.tokenizer.tokenizer import Tokenizer


def bad_words_to_token_ids(words: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The token sequences that spell each word at the start of a text and after a space.

    As in vLLM the sequence with the space counts only if it is another spelling of equal length
    (tokenizers that put the space in a token of its own would forbid that token otherwise).
    Raises RequestError for a word that is empty or has no tokens.
    """
    sequences: list[list[int]] = []
    for word in words:
        bare = word.lstrip()
        plain = tokenizer.encode(bare, add_special_tokens=False) if bare else []
        if not plain:
            raise RequestError(f"bad_words must not be blank, got {word!r}.", param="bad_words")
        spaced = tokenizer.encode(" " + bare, add_special_tokens=False)
        sequences.append(plain)
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            sequences.append(spaced)
    return sequences
