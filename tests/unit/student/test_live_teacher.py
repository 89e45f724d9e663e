"""The live teacher over the student's vocabulary."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from openrlhf_bd.config import Config
from openrlhf_bd.data.micro_batches import TokenBatch
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.student.live_teacher import load_live_teacher, teacher_dtype

CPU = torch.device("cpu")
TEACHER_VOCAB = 20
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def save_teacher(folder: Path, family: str = "llama") -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": TEACHER_VOCAB}
    config = (
        LlamaConfig(**shape, intermediate_size=16, tie_word_embeddings=True)
        if family == "llama"
        else OPTConfig(**shape, ffn_dim=16, word_embed_proj_dim=8)
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def config_of(folder: Path | str | None, **teacher: str) -> Config:
    name = None if folder is None else str(folder)
    return Config.model_validate({"teacher": {"model_name_or_path": name, **teacher}})


def log_probs(folder: Path, vocab_size: int) -> torch.Tensor:
    """log softmax of the live teacher's logits at the states 1 and 3 of IDS."""
    tokens = TokenBatch(IDS, torch.arange(5)[None], None, torch.tensor([1, 3]), 5)
    head = load_live_teacher(config_of(folder), vocab_size=vocab_size, device=CPU).head(tokens)
    assert (head.num_states, head.vocab_size) == (2, vocab_size)
    return torch.log_softmax(head.block(slice(0, 2), slice(0, vocab_size)), dim=1)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_same_vocabulary(family: str, tmp_path: Path) -> None:
    """The head's logits are the model's own."""
    save_teacher(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = torch.log_softmax(model(IDS).logits[0, [1, 3]], dim=1)
    torch.testing.assert_close(log_probs(tmp_path, TEACHER_VOCAB), expected, rtol=0, atol=1e-5)


def test_teacher_with_more_ids(tmp_path: Path) -> None:
    """Ids that the student lacks never count: the teacher is what it is over the student's ids."""
    save_teacher(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    expected = torch.log_softmax(model(IDS).logits[0, [1, 3], :12], dim=1)
    torch.testing.assert_close(log_probs(tmp_path, 12), expected, rtol=0, atol=1e-5)


def test_teacher_with_fewer_ids(tmp_path: Path) -> None:
    """Ids that the teacher lacks have no probability, and the others keep theirs."""
    save_teacher(tmp_path)
    found = log_probs(tmp_path, TEACHER_VOCAB + 5)
    torch.testing.assert_close(found[:, :TEACHER_VOCAB], log_probs(tmp_path, TEACHER_VOCAB), rtol=0, atol=1e-6)
    assert bool((found[:, TEACHER_VOCAB:].exp() == 0).all())


def test_refusals(tmp_path: Path) -> None:
    """No teacher, a folder without one, its own code, or a family of other logits: each is refused by name."""
    with pytest.raises(ConfigError, match=r"--teacher\.model_name_or_path is missing"):
        load_live_teacher(config_of(None), vocab_size=5, device=CPU)
    with pytest.raises(DataError, match="no teacher model could be loaded there"):
        load_live_teacher(config_of(tmp_path), vocab_size=5, device=CPU)
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="models of type gemma2 cannot be the teacher that"):
        load_live_teacher(config_of(tmp_path), vocab_size=5, device=CPU)
    (tmp_path / "modeling.py").write_text("raise SystemExit", encoding="utf-8")
    with pytest.raises(DataError, match=r"modeling\.py"):
        load_live_teacher(config_of(tmp_path), vocab_size=5, device=CPU)


def test_type_of_weights() -> None:
    """auto is float32 on CPUs and the checkpoint's own type on GPUs; a given type counts everywhere."""
    assert teacher_dtype(config_of("t"), CPU) == torch.float32
    assert teacher_dtype(config_of("t"), torch.device("cuda")) == "auto"
    assert teacher_dtype(config_of("t", dtype="bfloat16"), CPU) == torch.bfloat16
