"""The student's model: logits where they are asked for, packing, refusals."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.student.model import StudentModel, attention_implementation, load_student, refuse_model_code
from openrlhf_bd.student.strategy import make_strategy, strategy_arguments
from openrlhf_bd.upstream import has_flash_attention

VOCAB = 97
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
GROUPED = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 48}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCAB, **TOKENS),
    "opt": OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16, **TOKENS),
    "qwen2": Qwen2Config(**GROUPED, **TOKENS),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16, **TOKENS),
    "llama": LlamaConfig(**GROUPED, **TOKENS),
}


def student(family: str) -> StudentModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return StudentModel(model)


FIRST, SECOND = torch.arange(2, 9)[None], torch.arange(20, 24)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str) -> None:
    """Logits at chosen states of padded rows are those of the model's own forward pass over each row alone."""
    model = student(family)
    ids = torch.zeros(2, 7, dtype=torch.int64)
    ids[0], ids[1, :4] = FIRST, SECOND
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    states_S = torch.tensor([0, 6, 7, 10])
    found_SV = model(ids, torch.arange(7).expand(2, 7), mask, states_S)
    expected = torch.cat([model.model(FIRST).logits[0, [0, 6]], model.model(SECOND).logits[0, [0, 3]]])
    torch.testing.assert_close(found_SV, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opt"}))
def test_packed_rows_do_not_see_each_other(family: str) -> None:
    """Packed rows give the logits that each gives alone."""
    model = student(family)
    positions = torch.cat([torch.arange(7), torch.arange(4)])[None]
    found_SV = model(torch.cat([FIRST, SECOND], dim=1), positions, None, torch.arange(11))
    expected = torch.cat([model.model(FIRST).logits[0], model.model(SECOND).logits[0]])
    torch.testing.assert_close(found_SV, expected, rtol=0, atol=1e-5)


def config_of(folder: Path | None, **ds: object) -> Config:
    actor = {"model_name_or_path": None if folder is None else str(folder)}
    return Config.model_validate({"actor": actor, "ds": {"param_dtype": "fp32", **ds}})


def load(config: Config) -> StudentModel:
    return load_student(config, make_strategy(config))


def test_dropout_is_off(tmp_path: Path) -> None:
    """A student in training mode is deterministic, whatever dropout its configuration has."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=VOCAB, resid_pdrop=0.5, **TOKENS)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load(config_of(tmp_path)).train()
    arguments = (FIRST, torch.arange(7)[None], None, torch.arange(7))
    torch.testing.assert_close(model(*arguments), model(*arguments), rtol=0, atol=0)


class TestRefusals:
    def test_packing_where_rows_would_mix(self, tmp_path: Path) -> None:
        """Packing is refused for a family whose attention would let packed rows see each other."""
        FAMILIES["opt"].save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"--ds\.packing_samples.*'opt'"):
            load(config_of(tmp_path, packing_samples=True))

    def test_other_family(self, tmp_path: Path) -> None:
        """A family whose logits may be more than head times hidden state is refused by name."""
        (tmp_path / "config.json").write_text('{"model_type": "gemma2"}', encoding="utf-8")
        with pytest.raises(ConfigError, match="'gemma2' is not supported"):
            load(config_of(tmp_path))

    def test_no_model(self) -> None:
        """A missing student is an error that names the option."""
        with pytest.raises(ConfigError, match=r"--actor\.model_name_or_path is missing"):
            load(config_of(None))

    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        """A folder without a model is an error that names it."""
        with pytest.raises(DataError, match="no student model could be loaded"):
            load(config_of(tmp_path))

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_auto_map(self, name: str, tmp_path: Path) -> None:
        """A model folder that asks for its own code is refused unless remote code is on."""
        (tmp_path / name).write_text('{"auto_map": {}}', encoding="utf-8")
        with pytest.raises(DataError, match=f"auto_map in {name}"):
            refuse_model_code(tmp_path, trust_remote_code=False)
        refuse_model_code(tmp_path, trust_remote_code=True)

    def test_python_file(self, tmp_path: Path) -> None:
        """A Python file in a model folder is refused, and is not run."""
        (tmp_path / "modeling.py").write_text("raise SystemExit", encoding="utf-8")
        with pytest.raises(DataError, match=r"modeling\.py"):
            load(config_of(tmp_path))

    @pytest.mark.parametrize("ds", [{"zero_stage": 0}, {"zero_stage": 1, "grad_accum_dtype": "fp32"}])
    def test_unreliable_pairs(self, ds: dict[str, object]) -> None:
        """Pairs of options that DeepSpeed trains wrongly are refused before any process starts."""
        with pytest.raises(ConfigError, match=r"--ds\.zero_stage"):
            make_strategy(config_of(None, param_dtype="bf16", **ds))


def test_attention_implementation() -> None:
    """auto takes flash attention only where it is installed and can compute; a given name stays."""
    assert attention_implementation(config_of(None)) == "sdpa"
    expected = "flash_attention_2" if has_flash_attention() else "sdpa"
    assert attention_implementation(config_of(None, param_dtype="bf16")) == expected
    assert attention_implementation(config_of(None, attn_implementation="eager")) == "eager"


def test_strategy_arguments() -> None:
    """OpenRLHF's classes find every option where they look for it, as attributes."""
    arguments = strategy_arguments(Config.model_validate({"ckpt": {"output_dir": "run"}, "train": {"seed": 5}}))
    assert (arguments.train.seed, arguments.ckpt.path, arguments.ds.ring_attn_size) == (5, "run/checkpoints", 1)
    assert arguments.logger.wandb.project == "openrlhf_bd"


@pytest.mark.skipif(has_flash_attention(), reason="flash-attn is installed, nothing stands in")
def test_no_stand_in_is_left() -> None:
    """After the import nobody finds a flash-attn that is not there; upstream's packing works all the same."""
    from openrlhf.models.ring_attn_utils import gather_and_pad_tensor, unpad_and_slice_tensor

    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
    ids, mask = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    packed, positions, _, pad, indices = unpad_and_slice_tensor(ids, mask, None)
    assert (packed.tolist(), positions.tolist()) == ([[1, 2, 3, 4, 5]], [[0, 1, 2, 0, 1]])
    torch.testing.assert_close(gather_and_pad_tensor(packed, None, pad, indices, 2, 4), ids)
