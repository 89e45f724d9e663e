"""The demo tokenizer: a small byte-level BPE of the Qwen2 kind, which keeps every digit apart.

One token per digit lets a small model do arithmetic column by column. The fixed lines of the prompt template are one
token each, so that a prompt costs little more than its problem. Decoding gives back any text (in Unicode's NFC form).

The way of splitting text is Qwen2's own: `AutoTokenizer` uses it for every folder with a Qwen2 configuration, whatever
tokenizer.json says, and another one would give other tokens there than in training.
"""

import json
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer

from openrlhf_bd.data.templates import PREAMBLE
from openrlhf_bd.demo.corpus import iter_records

EOS = "<|endoftext|>"
WRAPPERS = (PREAMBLE + "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n")
VOCABULARY_SIZE = 600
NUM_TRAINING_RECORDS = 20000


def train_tokenizer(
    *, vocabulary_size: int = VOCABULARY_SIZE, num_records: int = NUM_TRAINING_RECORDS, seed: int = 0
) -> Qwen2Tokenizer:
    """A byte-level BPE trained on records of the train split; the same for the same arguments.

    Args:
        vocabulary_size: the end-of-text token, 256 bytes, merges and the three wrapper tokens together.
        num_records: how many records the merges are counted on.
        seed: of those records.
    """
    empty = Qwen2Tokenizer().backend_tokenizer
    counted = Tokenizer(BPE())
    counted.normalizer, counted.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    trainer = BpeTrainer(
        vocab_size=vocabulary_size - len(WRAPPERS),
        special_tokens=[EOS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    records = islice(iter_records("train", f"tokenizer:{seed}"), num_records)
    # Parts, not whole documents: a response is tokenized on its own.
    counted.train_from_iterator(
        (record[key] for record in records for key in ("instruction", "input", "output")), trainer
    )
    return with_wrappers(counted)


def with_wrappers(counted: Tokenizer) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer with the vocabulary and the merges of another one, and a token for each line of the wrapper."""
    model = json.loads(counted.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],  # type: ignore[misc]
        unk_token=None,  # type: ignore[arg-type]
        eos_token=EOS,
        pad_token=EOS,
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in WRAPPERS])
    tokenizer.model_max_length = 512
    return tokenizer


def save_tokenizer(tokenizer: Qwen2Tokenizer, folder: str | Path) -> None:
    """Save as a folder that `transformers.AutoTokenizer` loads; end of text is also the padding token."""
    tokenizer.save_pretrained(str(folder))
