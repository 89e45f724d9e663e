"""The student's model: logits where they are asked for, packing, refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.student.attention import PER_ROW_SDPA
from openrlhf_bd.student.loading import attention_implementation, check_family, load_student, refuse_model_code
from openrlhf_bd.student.model import OutputHead, StudentModel
from openrlhf_bd.student.strategy import make_strategy, strategy_arguments
from openrlhf_bd.upstream import has_flash_attention, is_cpu
from tests.unit.student.families import FAMILIES, TOKENS, VOCAB


def student(family: str) -> StudentModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=PER_ROW_SDPA).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return StudentModel(model)


def logits_of(head: StudentHead) -> torch.Tensor:
    """Every logit, by asking for one token after another."""
    tokens = (torch.full((head.num_states,), token) for token in range(VOCAB))
    return torch.stack([head.at(token_S) for token_S in tokens], dim=1)


FIRST, SECOND = torch.arange(2, 9)[None], torch.arange(20, 24)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family: str) -> None:
    """Logits at chosen states of padded rows are those of the model's own forward pass over each row alone."""
    model = student(family)
    ids = torch.zeros(2, 7, dtype=torch.int64)
    ids[0], ids[1, :4] = FIRST, SECOND
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    states_S = torch.tensor([0, 6, 7, 10])
    found_SV = model(ids, torch.arange(7).expand(2, 7), mask, states_S, logits_of)
    expected = torch.cat([model.model(FIRST).logits[0, [0, 6]], model.model(SECOND).logits[0, [0, 3]]])
    torch.testing.assert_close(found_SV, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_do_not_see_each_other(family: str) -> None:
    """Packed rows give the logits that each gives alone."""
    model = student(family)
    positions = torch.cat([torch.arange(7), torch.arange(4)])[None]
    found_SV = model(torch.cat([FIRST, SECOND], dim=1), positions, None, torch.arange(11), logits_of)
    expected = torch.cat([model.model(FIRST).logits[0], model.model(SECOND).logits[0]])
    torch.testing.assert_close(found_SV, expected, rtol=0, atol=1e-5)


class TestOutputHead:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_names_and_ties_stay(self, family: str) -> None:
        """The head holds the embedding's own parameters under their own names, tied to the input as before."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family])
        before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        head, tied = model.get_output_embeddings(), model.config.tie_word_embeddings
        StudentModel(model)
        replaced = model.get_output_embeddings()
        assert isinstance(replaced, OutputHead)
        assert replaced.weight is head.weight
        assert (replaced.weight is model.get_input_embeddings().weight) == tied
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
        model.tie_weights()
        assert (replaced.weight is model.get_input_embeddings().weight) == tied

    def test_family_code_still_gets_logits(self) -> None:
        """Without a loss the head is the linear layer that it replaced, for the family's own forward pass."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"]).eval()
        expected = model(FIRST).logits
        torch.testing.assert_close(StudentModel(model).model(FIRST).logits, expected, rtol=0, atol=0)

    def test_bias(self) -> None:
        """A bias is part of the logits and gets its gradient."""
        torch.manual_seed(0)
        embedding = nn.Linear(8, VOCAB)
        hidden_SH = torch.randn(3, 8)
        head = OutputHead(embedding)
        assert head.bias is embedding.bias
        found_SV = head(hidden_SH, loss=logits_of)
        torch.testing.assert_close(found_SV, embedding(hidden_SH))
        found_SV.square().sum().backward()
        expected = 2 * embedding(hidden_SH).detach().sum(0)
        torch.testing.assert_close(embedding.bias.grad, expected)

    def test_head_outlives_other_weights(self) -> None:
        """A head that was made without gradient keeps its weights when the parameters are given others."""
        model = student("llama")
        arguments = (FIRST, torch.arange(7)[None], None, torch.arange(7))
        with torch.no_grad():
            head = model.head(model(*arguments, None))
        before_SV = logits_of(head)
        weight = model.model.get_output_embeddings().weight
        weight.data = torch.zeros_like(weight)
        torch.testing.assert_close(logits_of(head), before_SV, rtol=0, atol=0)

    def test_resized_model(self) -> None:
        """A model whose vocabulary was resized, before or after, is a student of the new size."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES["gpt2"]).eval()
        StudentModel(model).model.resize_token_embeddings(VOCAB + 3)
        resized = StudentModel(model)
        assert resized.model.get_output_embeddings().weight is model.get_input_embeddings().weight
        found_SV = resized(FIRST, torch.arange(7)[None], None, torch.arange(7), logits_of)
        torch.testing.assert_close(found_SV, model(FIRST).logits[0, :, :VOCAB], rtol=0, atol=1e-5)


def test_model_needs_torch_and_transformers_alone() -> None:
    """The student's model is there for machines without Ray, DeepSpeed, OpenRLHF and pydantic."""
    code = (
        "import sys, openrlhf_bd.student.model, openrlhf_bd.student.flops\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'openrlhf', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


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
    arguments = (FIRST, torch.arange(7)[None], None, torch.arange(7), logits_of)
    torch.testing.assert_close(model(*arguments), model(*arguments), rtol=0, atol=0)


class TestRefusals:
    def test_packing_where_rows_would_mix(self, tmp_path: Path) -> None:
        """Packing is refused with an attention that would let packed rows see each other."""
        FAMILIES["opt"].save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"--ds\.packing_samples.*eager.*'opt'.*use sdpa"):
            load(config_of(tmp_path, packing_samples=True, attn_implementation="eager"))

    @pytest.mark.skipif(not is_cpu(), reason="flex_attention can train here")
    def test_attention_without_a_backward_pass(self, tmp_path: Path) -> None:
        """flex_attention on CPUs is refused before training, not in its first backward pass."""
        FAMILIES["llama"].save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match="flex_attention: PyTorch has no backward pass"):
            load(config_of(tmp_path, attn_implementation="flex_attention"))

    def test_flash_attention_of_fp32(self) -> None:
        """A type that flash kernels do not compute is refused before training, not in its first forward pass."""
        config = config_of(None, attn_implementation="flash_attention_2", param_dtype="fp32")
        with pytest.raises(ConfigError, match=r"flash_attention_2 with --ds\.param_dtype fp32"):
            check_family("llama", config)

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

    def test_muon_of_gpt2(self, tmp_path: Path) -> None:
        """Muon is refused for the family whose embeddings DeepSpeed would take for hidden matrices."""
        FAMILIES["gpt2"].save_pretrained(tmp_path)
        values = config_of(tmp_path).model_dump()
        values["actor"] |= {"optim": "muon", "max_norm": 0.0}
        with pytest.raises(ConfigError, match=r"--actor\.optim muon.*gpt2"):
            load(Config.model_validate(values))

    @pytest.mark.parametrize("ds", [{"zero_stage": 0}, {"zero_stage": 1, "grad_accum_dtype": "fp32"}])
    def test_unreliable_pairs(self, ds: dict[str, object]) -> None:
        """Pairs of options that DeepSpeed trains wrongly are refused before any process starts."""
        with pytest.raises(ConfigError, match=r"--ds\.zero_stage"):
            make_strategy(config_of(None, param_dtype="bf16", **ds))


def test_attention_implementation() -> None:
    """auto takes flash attention only where it is installed and can compute; sdpa never makes a block mask."""
    assert attention_implementation(config_of(None)) == PER_ROW_SDPA
    assert attention_implementation(config_of(None, attn_implementation="sdpa")) == PER_ROW_SDPA
    expected = "flash_attention_2" if has_flash_attention() else PER_ROW_SDPA
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
