"""Temperature, min-p, top-k and top-p in numpy by sorting: the oracle where torch is absent.

`test_select.py` checks it against transformers' warpers where torch is installed.
"""

from typing import NamedTuple

import numpy as np


class Filters(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def _softmax(scores_V: np.ndarray) -> np.ndarray:
    weight_V = np.exp(scores_V - scores_V.max())
    return weight_V / weight_V.sum()


def kept_tokens(logits_V: np.ndarray, filters: Filters) -> np.ndarray:
    """Mask of the tokens that the filters leave, in vLLM's order; float64 inside."""
    scores_V = logits_V.astype(np.float64) / filters.temperature
    if filters.min_p > 0:
        probs_V = _softmax(scores_V)
        scores_V = np.where(probs_V < filters.min_p * probs_V.max(), -np.inf, scores_V)
    if 0 < filters.top_k < logits_V.size:
        kth = np.sort(scores_V)[-filters.top_k]
        scores_V = np.where(scores_V < kth, -np.inf, scores_V)
    if filters.top_p < 1:
        order_V = np.argsort(scores_V, kind="stable")
        mass_V = np.cumsum(_softmax(scores_V)[order_V])
        removed_V = order_V[mass_V <= 1 - filters.top_p]
        scores_V[removed_V[removed_V != order_V[-1]]] = -np.inf
    return np.isfinite(scores_V)
