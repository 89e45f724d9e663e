"""Lengths as of databricks-dolly-15k, so that benchmarks need no data: quantiles of prompt and response.

Measured with GPT-2's tokenizer on the records of the training split in the instruction wrapper of the paper (Fig. 3),
end-of-sequence included, where prompt <= 256 and prompt + response <= 512 (87 % of the records). Prompt and response
lengths are nearly uncorrelated (-0.05), and are drawn independently.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
PROMPT_TOKENS = (31, 34, 36, 37, 38, 40, 41, 43, 46, 56, 90, 176, 211, 247, 256)
RESPONSE_TOKENS = (2, 3, 5, 10, 15, 23, 32, 44, 59, 80, 107, 161, 221, 361, 477)
MAX_TOKENS = 512


def dolly_lengths(num_rows: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompt and response lengths of rows: stratified draws, so that few rows already have the distribution's mean.

    Args:
        num_rows: rows.
        seed: of the pairing of prompts with responses, and of the rows' order.

    Returns:
        (prompt_N, response_N), each row at most MAX_TOKENS in all.
    """
    random = np.random.default_rng(seed)
    levels_N = (np.arange(num_rows) + 0.5) / num_rows
    prompt_N = np.interp(random.permutation(levels_N), QUANTILES, PROMPT_TOKENS).round().astype(np.int64)
    response_N = np.interp(random.permutation(levels_N), QUANTILES, RESPONSE_TOKENS).round().astype(np.int64)
    return prompt_N, np.minimum(response_N, MAX_TOKENS - prompt_N)
