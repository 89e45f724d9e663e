"""The architectures of the demo: a teacher that ships with the package, and a student that starts from random weights.

Heads are 32 wide, which vLLM's CPU attention supports.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

HEAD_DIM = 32
MAX_LENGTH = 256
TEACHER_FOLDER = Path(__file__).parent / "teacher"


def make_config(
    *, vocabulary_size: int, eos_token_id: int, hidden_size: int, num_layers: int, feed_forward_size: int
) -> Qwen2Config:
    """A Qwen2 configuration with tied embeddings, heads of 32, and end of text as padding."""
    return Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=feed_forward_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        # Wider than usual: models this narrow learn markedly faster from it.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
        dtype="float32",
    )


def teacher_config(vocabulary_size: int = 600, eos_token_id: int = 0) -> Qwen2Config:
    """The teacher: five layers of 192, 2.3 million parameters."""
    return make_config(
        vocabulary_size=vocabulary_size,
        eos_token_id=eos_token_id,
        hidden_size=192,
        num_layers=5,
        feed_forward_size=512,
    )


def student_config(vocabulary_size: int = 600, eos_token_id: int = 0) -> Qwen2Config:
    """The student: four layers of 128, 0.8 million parameters."""
    return make_config(
        vocabulary_size=vocabulary_size,
        eos_token_id=eos_token_id,
        hidden_size=128,
        num_layers=4,
        feed_forward_size=320,
    )


def build_model(config: Qwen2Config, seed: int) -> Qwen2ForCausalLM:
    """A randomly initialised model in float32; the same weights for the same seed; the global state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).float()


def generation_config(eos_token_id: int) -> GenerationConfig:
    """Plain sampling at temperature 1 until end of text."""
    return GenerationConfig(do_sample=True, eos_token_id=eos_token_id, pad_token_id=eos_token_id)


def init_student(folder: str | Path, seed: int, tokenizer_folder: str | Path = TEACHER_FOLDER) -> Path:
    """Write a randomly initialised student as a Hugging Face folder, with the teacher's tokenizer.

    Args:
        folder: made if it does not exist.
        seed: of the weights.
        tokenizer_folder: where the tokenizer is taken from.
    """
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    model = build_model(student_config(len(tokenizer), tokenizer.eos_token_id), seed)
    model.generation_config = generation_config(tokenizer.eos_token_id)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return Path(folder)
