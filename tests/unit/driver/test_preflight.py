import io
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from rich.console import Console

import openrlhf_bd.demo
from openrlhf_bd.algorithms.registry import resolve_algorithm
from openrlhf_bd.cli.flags import main_guard, parse_config
from openrlhf_bd.cli.main import main
from openrlhf_bd.driver.comparison import check_comparison
from openrlhf_bd.driver.engine_limits import check_head_sizes
from openrlhf_bd.driver.models import load_tokenizer
from openrlhf_bd.driver.preflight import preflight
from openrlhf_bd.driver.rank_memory import held_teacher_bytes, rank_bytes
from openrlhf_bd.driver.resources import check_cluster
from openrlhf_bd.driver.teacher_data import write_validation_rows
from openrlhf_bd.driver.teachers import tokenizer_differences
from openrlhf_bd.errors import ConfigError, DataError, ResourceError
from openrlhf_bd.paths import format_bytes
from openrlhf_bd.store import StoreReader

TOKENIZER = Path(openrlhf_bd.demo.__file__).parent / "teacher"
RECORDS = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(20)]


def save_model(folder, *, hidden_size=32, vocab_size=640, **changes):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    shape = {
        "hidden_size": hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
    }
    config = Qwen2Config(vocab_size=vocab_size, eos_token_id=0, **(shape | changes))
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """A teacher, a student and data sets; tests change copies."""
    root = tmp_path_factory.mktemp("originals")
    save_model(root / "teacher", hidden_size=64)
    save_model(root / "student")
    for name in ("train", "validation", "test"):
        lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
        (root / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (root / "text.jsonl").write_text('{"text": "some text"}\n' * 3, encoding="utf-8")
    return root


@pytest.fixture
def room(originals, tmp_path, monkeypatch):
    """A folder with a teacher, a student and data sets, as the current one."""
    path = tmp_path / "room"
    shutil.copytree(originals, path)
    monkeypatch.chdir(path)
    return path


BASE = [
    *("--teacher.model_name_or_path", "teacher", "--actor.model_name_or_path", "student"),
    *("--actor.num_gpus_per_node", "2", "--data.prompt_dataset", "train.jsonl", "--data.input_key", "instruction"),
    *("--data.context_key", "input", "--data.label_key", "output", "--data.prompt_wrapper", "paper"),
    *("--data.max_len", "100", "--train.batch_size", "8", "--ds.param_dtype", "fp32"),
    *("--eval.dataset", "validation.jsonl", "--eval.test_datasets", "t=test.jsonl", "--ckpt.output_dir", "runs/new"),
]


# Word-level distillation over the whole vocabulary, on the data set's own responses.
FULL_KD = [
    *("--algo.distill.name", "kd", "--algo.distill.responses", "gold", "--algo.distill.kd_support", "full"),
    *("--eval.test_datasets", "none"),
]


def config_of(*argv):
    return parse_config([*BASE, *argv], prog="openrlhf-bd train", description="Train.")[0]


@pytest.mark.parametrize(("url", "finding"), [("nosuch://a/b", "cannot be reached"), ("memory://a", "one process")])
def test_store_that_ranks_cannot_open(room, url, finding):
    """A URL that no package reaches, or that lives in one process, is refused by the flag."""
    with pytest.raises(ConfigError, match=f"--teacher.store_path {url}.*{finding}"):
        preflight(config_of("--teacher.store_path", url))


def test_plan(room):
    """The plan counts rows, tokens, steps, actors and GPUs of each stage, and nothing is written."""
    before = sorted(room.rglob("*"))
    plan = preflight(config_of("--rollout.n_samples_per_prompt", "2", "--train.max_epochs", "3"))
    generate, train, evaluate = plan.stages
    # 20 prompts, 2 samples each; prompt and response together are at most 100 tokens.
    assert (generate.name, generate.rows, generate.tokens, generate.steps) == ("generate", 40, 4000, None)
    # 40 rows in batches of 8 are 5 steps an epoch.
    assert (train.name, train.rows, train.tokens, train.steps) == ("train", 40, 12000, 15)
    # 20 prompts, 5 seeds, 2 samplers.
    assert (evaluate.name, evaluate.rows, evaluate.tokens) == ("evaluate", 200, 20000)
    # 1 teacher engine; 2 ranks and 1 engine that validates; 1 engine.
    assert [stage.num_gpus for stage in plan.stages] == [1, 3, 1]
    assert plan.num_gpus == 3
    assert sorted(plan.tables) == ["test:t", "train", "validation"]
    assert len(plan.tables["train"].prompts) == 20
    assert sorted(room.rglob("*")) == before


def test_plan_can_be_printed(room):
    """Printing a plan shows stages, data sets, GPUs, disk space and warnings."""
    plan = preflight(config_of("--algo.distill.preset", "paper", "--data.max_samples", "4"))
    console = Console(file=io.StringIO(), width=160)
    console.print(plan)
    text = console.file.getvalue()
    for part in ("generate", "train", "evaluate", "2 student ranks", "runs/new/teacher_data", "4 prompts", "free"):
        assert part in text
    # 4 prompts, at most 100 tokens each with their response; 40 bytes a response token, and 4 a token of the prompt.
    (rows,) = [use for use in plan.disk if use.what == "teacher's data"]
    prompt_tokens = sum(len(prompt.token_ids) for prompt in plan.tables["train"].prompts)
    assert rows.num_bytes == 40 * (4 * 100 - prompt_tokens) + 4 * prompt_tokens
    assert "assumed: at most" in text
    assert "plan --measure measures it" in text
    assert "warning: nothing holds the logits outside the candidate sets" in text
    assert "warning: --train.batch_size 8 is more than the 4 rows" in text


def test_memory_in_the_plan(room, monkeypatch):
    """The plan has each actor's GPU memory by part; on a machine without GPUs it says that it was left out."""

    def lines():
        console = Console(file=io.StringIO(), width=160)
        console.print(preflight(config_of()))
        return [line.strip() for line in console.file.getvalue().splitlines() if line.startswith("GPU memory")]

    assert lines() == ["GPU memory: not checked, there is no GPU here: their number is only a number"]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    rank, teacher, student = lines()
    # 50,400 numbers in fp32 on 2 ranks with ZeRO-2: 4, 4 / 2 and 8 / 2 bytes each. Activations: 1 row of 100 tokens, 1
    # layer of 4 * 32 + 2 * 64 + 2 * 32 + 4 * 32 = 448 numbers.
    parts = "weights 202 kB, gradients 101 kB, optimizer 202 kB, activations of 100 tokens about 179 kB"
    assert rank == f"GPU memory: student rank 683 kB: {parts}"
    # 100,672 numbers of 2 bytes; a cache of 100 tokens with 2 * 32 numbers of 2 bytes.
    assert teacher == "GPU memory: teacher engine (teacher) 214 kB, at most 90% of it: weights 201 kB, " + (
        "cache of 100 tokens 13 kB"
    )
    assert student.startswith("GPU memory: student engine 114 kB, at most 95% of it: weights 101 kB, ")


def test_dry_run(room, capsys):
    """`openrlhf-bd plan` prints configuration and plan, exits with 0 and writes nothing."""
    assert main(["plan", *BASE]) == 0
    text = capsys.readouterr().out
    assert "prompt_dataset: train.jsonl" in text
    assert "2 student ranks" in text
    assert not (room / "runs").exists()


def test_job_with_bad_input(room, capsys):
    """`openrlhf-bd train` with bad input ends with status 2 and a message before anything is started or written."""
    assert main(["train", *BASE, "--data.input_key", "instructon"]) == 2
    assert "train.jsonl:1" in capsys.readouterr().err
    assert not (room / "runs").exists()


def test_steps_are_limited(room):
    """--train.max_steps limits the steps of the plan."""
    assert preflight(config_of("--train.max_steps", "2")).stages[1].steps == 2


def test_own_responses_need_no_teacher(room):
    """An algorithm that learns from the data set's own responses has no generation stage and asks for no teacher."""
    plan = preflight(config_of("--algo.distill.name", "sft", "--teacher.model_name_or_path", "none"))
    assert [stage.name for stage in plan.stages] == ["train", "evaluate"]


def test_generation_alone(room):
    """Generation alone needs no student: prompts are tokenised by the teacher's tokenizer."""
    config = config_of("--actor.model_name_or_path", "none", "--eval.dataset", "nowhere.jsonl")
    plan = preflight(config, stages=["generate"])
    assert [stage.name for stage in plan.stages] == ["generate"]


def test_pretraining_text(room):
    """Pre-training text is looked at, and takes the warning about logits outside the sets away."""
    plan = preflight(config_of("--algo.distill.preset", "paper", "--data.pretrain_dataset", "text.jsonl"))
    assert "pretrain: 3 records" in plan.data_sets
    assert not any("outside the candidate sets" in warning for warning in plan.warnings)


def test_live_teacher(room):
    """With kd_ratio the plan says how much memory the teacher takes in every rank, also where its data is not made."""
    argv = ["--data.pretrain_dataset", "text.jsonl", "--algo.distill.kd_ratio", "0.5"]
    plan = preflight(config_of("--algo.distill.name", "sft", "--teacher.dtype", "bfloat16", *argv))
    # Hidden 64: two embeddings 640*64; queries 64*64+64, keys and values 32*64+32 each, output 64*64, feed-forward
    # 3*64*32, norms 2*64; the last norm 64: 81,920 + 18,688 + 64 = 100,672 numbers of 2 bytes.
    (note,) = plan.notes
    assert note == "each student rank also holds the whole teacher, 201 kB (--algo.distill.kd_ratio 0.5)"


def test_slow_copies_are_noted(room):
    """A target network is named with its size; under ZeRO-3 the ranks share it."""
    target = ["--algo.distill.next_value_gradient", "target"]
    (note,) = preflight(config_of(*target)).notes
    assert note.startswith("each student rank also holds a slow copy of the trained weights in fp32, ")
    assert note.endswith("(--algo.distill.next_value_gradient target)")
    (note,) = preflight(config_of(*target, "--ds.zero_stage", "3")).notes
    assert note.startswith("the student ranks together hold")


def test_padded_vocabulary(room):
    """A teacher with a longer vocabulary of the same tokenizer is fine, and noted."""
    shutil.rmtree("teacher")
    save_model("teacher", vocab_size=704)
    (warning,) = [line for line in preflight(config_of()).warnings if "padding" in line]
    assert "704 embeddings, the student 640" in warning


def replace(path, old, new):
    text = Path(path).read_text(encoding="utf-8")
    assert old in text
    Path(path).write_text(text.replace(old, new), encoding="utf-8")


def truncate(path, num_bytes):
    Path(path).write_bytes(Path(path).read_bytes()[:num_bytes])


def only_pickle():
    Path("student/model.safetensors").rename("student/pytorch_model.bin")


def model_with_code():
    Path("teacher/modeling.py").write_text("import os", encoding="utf-8")


def config_with_code():
    replace("teacher/config.json", '"model_type"', '"auto_map": {"AutoConfig": "other/repo--c.C"}, "model_type"')


def another_tokenizer():
    path = Path("student/tokenizer.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    path.write_text(json.dumps(content), encoding="utf-8")


def git_lfs_pointer():
    Path("teacher/model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def damaged_header():
    Path("student/model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{no}")


def missing_shard():
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    Path("student/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def small_vocabulary():
    shutil.rmtree("student")
    save_model("student", vocab_size=100)


def teacher_of_another_family():
    replace("teacher/config.json", '"model_type": "qwen2"', '"model_type": "gemma2"')


def other_family():
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    shutil.rmtree("student")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=640, **shape)).save_pretrained("student")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained("student")


def stop_token_beyond_the_embeddings():
    (Path("teacher") / "generation_config.json").write_text('{"eos_token_id": [0, 640]}', encoding="utf-8")


def encoder():
    replace("teacher/config.json", '"Qwen2ForCausalLM"', '"Qwen2Model"')


def nothing():
    pass


# What is done to the folder, the arguments, and what the message must contain.
BAD_INPUT = {
    "no student": (nothing, ["--actor.model_name_or_path", "none"], ["--actor.model_name_or_path is not given"]),
    "no teacher": (nothing, ["--teacher.model_name_or_path", "none"], ["--teacher.model_name_or_path is not given"]),
    "no prompts": (nothing, ["--data.prompt_dataset", "none"], ["--data.prompt_dataset is not given"]),
    "mistyped student": (
        nothing,
        ["--actor.model_name_or_path", "./studnt"],
        ["./studnt", "no such folder", 'did you mean "student"?', "--actor.model_name_or_path"],
    ),
    "stop token beyond the embeddings": (
        stop_token_beyond_the_embeddings,
        [],
        ["teacher: its responses end at the tokens [640]", "640 embeddings", "generation_config.json"],
    ),
    "model that writes no text": (encoder, [], ["teacher: its config.json says Qwen2Model", "ForCausalLM"]),
    "student is a file": (nothing, ["--actor.model_name_or_path", "train.jsonl"], ["train.jsonl: is a file"]),
    "folder without a model": (nothing, ["--actor.model_name_or_path", "."], ["has no config.json"]),
    "only pickled weights": (only_pickle, [], ["student", "only pytorch_model.bin", "safetensors", "save_pretrained"]),
    "no weights": (lambda: Path("student/model.safetensors").unlink(), [], ["has no weights", "*.safetensors"]),
    "model with code": (model_with_code, [], ["teacher", "modeling.py", "--trust_remote_code"]),
    "configuration with code": (config_with_code, [], ["teacher/config.json", "auto_map", "--trust_remote_code"]),
    "truncated weights": (lambda: truncate("student/model.safetensors", 5000), [], ["has 5000 bytes, expected"]),
    "empty weights": (lambda: truncate("student/model.safetensors", 0), [], ["no whole safetensors file"]),
    "Git LFS pointer": (git_lfs_pointer, [], ["teacher/model.safetensors", "git lfs pull"]),
    "damaged header": (damaged_header, [], ["student/model.safetensors", "damaged header"]),
    "missing shard": (missing_shard, [], ["model-00001-of-00002.safetensors", "lacks", "download"]),
    "configuration is no JSON": (lambda: truncate("student/config.json", 20), [], ["student/config.json", "not JSON"]),
    "unknown model type": (
        lambda: replace("student/config.json", '"qwen2"', '"qwen99"'),
        [],
        ["student", "configuration cannot be read", "qwen99"],
    ),
    "family that cannot be a student": (other_family, [], ["'gpt_neox' is not supported", "qwen2"]),
    "no tokenizer": (
        lambda: [Path(f"student/{name}").unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        [],
        ["student", "tokenizer"],
    ),
    "damaged tokenizer": (
        lambda: truncate("student/tokenizer.json", 1000),
        [],
        ["student/tokenizer.json", "not JSON", "download the model again"],
    ),
    "another tokenizer": (another_tokenizer, [], ["of teacher teacher and student student", "is '1' and '2'"]),
    "small vocabulary": (small_vocabulary, [], ["student: has 100 embeddings for the"]),
    "too long": (nothing, ["--data.max_len", "1000"], ["--data.max_len 1000", "512 positions of teacher"]),
    "odd tensor parallelism": (
        nothing,
        ["--teacher.tensor_parallel_size", "3"],
        ["--teacher.tensor_parallel_size 3", "2 attention heads"],
    ),
    "mistyped data set": (
        nothing,
        ["--data.prompt_dataset", "trian.jsonl"],
        ["trian.jsonl", 'did you mean "train.jsonl"?', "--data.prompt_dataset"],
    ),
    "mistyped test set": (nothing, ["--eval.test_datasets", "tset.jsonl"], ["tset.jsonl", "--eval.test_datasets"]),
    "mistyped validation set": (nothing, ["--eval.dataset", "vlidation.jsonl"], ["vlidation.jsonl", "--eval.dataset"]),
    "mistyped key": (nothing, ["--data.input_key", "instructon"], ["train.jsonl:1", "--data.input_key instruction?"]),
    "damaged record": (lambda: truncate("train.jsonl", 200), [], ["train.jsonl:4", "not JSON", "Correct the line"]),
    "damaged test record": (lambda: truncate("test.jsonl", 200), [], ["test.jsonl:4", "not JSON"]),
    "mistyped pre-training text": (
        nothing,
        ["--data.pretrain_dataset", "txt.jsonl"],
        ["txt.jsonl", 'did you mean "text.jsonl"?', "--data.pretrain_dataset"],
    ),
    "pre-training key": (
        nothing,
        ["--data.pretrain_dataset", "text.jsonl", "--data.pretrain_key", "txt"],
        ["text.jsonl:1", "--data.pretrain_key text?"],
    ),
    "own responses without a key": (
        nothing,
        ["--algo.distill.name", "sft", "--data.label_key", "none", "--eval.dataset", "none"],
        ["--data.label_key is not given"],
    ),
    "nothing to score by": (nothing, ["--data.label_key", "none"], ["--data.label_key", "--eval.checker"]),
    "unknown algorithm": (nothing, ["--algo.distill.name", "bdd"], ["--algo.distill.name", "bdd", 'mean "bd"?']),
    "unknown checker": (nothing, ["--eval.checker", "nowhere:check"], ["--eval.checker nowhere:check"]),
    "unknown metric": (
        nothing,
        ["--ckpt.best_metric_key", "bleu"],
        ["--ckpt.best_metric_key is 'bleu'", "rouge_l", "accuracy needs --eval.checker"],
    ),
    "loss without references": (
        nothing,
        ["--ckpt.best_metric_key", "loss", "--data.label_key", "none", "--eval.checker", "builtins:bool"],
        ["--ckpt.best_metric_key is 'loss'", "rouge_l and loss need --data.label_key"],
    ),
    "unknown schedule": (nothing, ["--actor.lr_scheduler", "cosin"], ["--actor.lr_scheduler is 'cosin'", "cosine"]),
    "schedule without its metric": (
        nothing,
        ["--actor.lr_scheduler", "reduce_lr_on_plateau"],
        ["--actor.lr_scheduler is 'reduce_lr_on_plateau'", "expected one of linear"],
    ),
    "unknown target module": (
        nothing,
        ["--ds.lora.rank", "4", "--ds.lora.target_modules", "q_proj", "c_attn"],
        ["--ds.lora.target_modules c_attn", "student (qwen2)", "all-linear", "down_proj, gate_proj"],
    ),
    "adapter of the output head": (
        nothing,
        ["--ds.lora.rank", "4", "--ds.lora.target_modules", "lm_head"],
        ["--ds.lora.target_modules lm_head", "the output head get none"],
    ),
    "Muon clipped": (nothing, ["--actor.optim", "muon"], ["--actor.max_norm 1", "use --actor.max_norm 0"]),
    "Muon without ZeRO": (
        nothing,
        ["--actor.optim", "muon", "--actor.max_norm", "0", "--ds.zero_stage", "3"],
        ["--ds.zero_stage 3", "use --ds.zero_stage 1 or 2"],
    ),
    "Muon offloaded": (
        nothing,
        ["--actor.optim", "muon", "--actor.max_norm", "0", "--ds.adam_offload"],
        ["--ds.adam_offload"],
    ),
    "Muon scaled": (
        nothing,
        ["--actor.optim", "muon", "--actor.max_norm", "0", "--ds.param_dtype", "fp16"],
        ["--ds.param_dtype fp16", "loss scale"],
    ),
    "flash attention": (nothing, ["--ds.attn_implementation", "flash_attention_9"], ["flash_attention_9"]),
    "unknown attention": (
        nothing,
        ["--ds.attn_implementation", "spda"],
        ["--ds.attn_implementation is 'spda'", "flex_attention", "did you mean sdpa?"],
    ),
    "momentum of 2": (nothing, ["--actor.adam.betas", "0.9", "2"], ["--actor.adam.betas is 0.9 2", "less than 1"]),
    "log-probabilities not recorded": (
        nothing,
        ["--teacher.record_logprobs", "false"],
        ["--teacher.record_logprobs true", "--algo.distill.linear_term sampled"],
    ),
    "log-probabilities not recorded for kd": (
        nothing,
        ["--teacher.record_logprobs", "false", "--algo.distill.name", "kd"],
        ["--algo.distill.name kd", "--teacher.record_logprobs true"],
    ),
    "kd without sets": (
        nothing,
        ["--algo.distill.name", "kd", "--algo.distill.top_p", "1"],
        ["--algo.distill.name kd with --algo.distill.top_p 1", "below 1"],
    ),
    "an option that the algorithm does not read": (
        nothing,
        ["--algo.distill.name", "kd", "--algo.distill.linear_term", "sampled"],
        ["--algo.distill.name kd does not read --algo.distill.linear_term sampled", "leave it out", "it reads top_p,"],
    ),
    "diverging pair": (nothing, ["--ds.zero_stage", "0", "--ds.param_dtype", "bf16"], ["--ds.zero_stage 0", "bf16"]),
    "fewer rows than ranks": (
        nothing,
        ["--train.batch_size", "1"],
        ["--train.batch_size 1", "2 student ranks", "--actor.num_gpus_per_node 2"],
    ),
    "live teacher without a teacher": (
        nothing,
        ["--algo.distill.name", "sft", "--teacher.model_name_or_path", "none", "--algo.distill.kd_ratio", "0.5"],
        ["--algo.distill.kd_ratio 0.5", "--teacher.model_name_or_path is not given"],
    ),
    "live teacher without text": (
        nothing,
        ["--algo.distill.kd_ratio", "0.5"],
        ["--algo.distill.kd_ratio 0.5", "--data.pretrain_dataset"],
    ),
    "live teacher of another family": (
        teacher_of_another_family,
        ["--algo.distill.kd_ratio", "0.5", "--data.pretrain_dataset", "text.jsonl"],
        ["type gemma2", "--teacher.model_name_or_path teacher", "--algo.distill.kd_ratio above 0"],
    ),
    "whole vocabulary without a teacher": (
        nothing,
        [*FULL_KD, "--teacher.model_name_or_path", "none"],
        ["a teacher in each rank", "--teacher.model_name_or_path is not given", "--algo.distill.kd_support sets"],
    ),
    "whole vocabulary of a server": (
        nothing,
        [*FULL_KD, "--teacher.model_name_or_path", "none", "--teacher.api_base", "http://localhost:1/v1"],
        ["a teacher in each rank", "--teacher.api_base http://localhost:1/v1", "--algo.distill.kd_support sets"],
    ),
    "whole vocabulary of several teachers": (
        nothing,
        [*FULL_KD, "--teacher.model_name_or_path", "none", "--teacher.routes", "a=teacher", "--teacher.route_key", "k"],
        ["--teacher.routes names several", "a rank holds one"],
    ),
    "whole vocabulary with another tokenizer": (
        another_tokenizer,
        FULL_KD,
        ["tokenizers of teacher teacher and student student differ"],
    ),
    "whole vocabulary under other prompts": (
        nothing,
        [*FULL_KD, "--teacher.privileged_key", "output"],
        ["reads the student's prompts", "--algo.distill.kd_support sets"],
    ),
    "rows made online of gold responses": (
        nothing,
        ["--algo.distill.name", "kd", "--algo.distill.responses", "gold", "--algo.distill.mode", "online"],
        ["--algo.distill.name kd learns from the data set's own responses", "--algo.distill.mode offline"],
    ),
    "gold responses for bd": (
        nothing,
        ["--algo.distill.responses", "gold"],
        ["--algo.distill.name bd does not read --algo.distill.responses gold"],
    ),
    "live teacher with another tokenizer": (
        another_tokenizer,
        ["--algo.distill.name", "sft", "--algo.distill.kd_ratio", "0.5", "--data.pretrain_dataset", "text.jsonl"],
        ["tokenizers of teacher teacher and student student differ"],
    ),
    "no room for a response": (
        nothing,
        ["--data.max_prompt_len", "100"],
        ["--data.max_prompt_len 100", "--data.max_len"],
    ),
    "prompts all too long": (nothing, ["--data.max_prompt_len", "3"], ["all 20 prompts", "--data.max_prompt_len"]),
    "output folder is a file": (nothing, ["--ckpt.output_dir", "train.jsonl/run"], ["--ckpt.output_dir", "is a file"]),
    "disk full": (
        nothing,
        ["--ckpt.max_num", "1000000000", "--ckpt.save_steps", "1"],
        ["are free there", "--ckpt.max_num"],
    ),
}


@pytest.mark.parametrize(("change", "argv", "parts"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input(room, capsys, change, argv, parts):
    """Bad input ends with status 2 and one message that says what, where and what to do; no output folder appears."""
    change()
    assert main_guard(lambda: bool(preflight(config_of(*argv)))) == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert [part for part in parts if part not in message] == []
    assert "Traceback" not in message
    assert not (room / "runs").exists()


def test_output_folder_that_cannot_be_written(room, monkeypatch):
    """A folder where nothing can be written is refused before the job starts."""
    # Root may write everywhere, so ask the system about another user's rights by a read-only answer.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written to"):
        preflight(config_of())


def test_nothing_to_do(room):
    """A stage that the job does not have is no silent success."""
    with pytest.raises(ConfigError, match=r"nothing to evaluate: --eval\.test_datasets is not given"):
        preflight(config_of("--eval.test_datasets", "none"), stages=["evaluate"])


def test_cluster_is_large_enough(room):
    """A cluster with the GPUs of the largest stage passes."""
    check_cluster(config_of(), {"CPU": 4.0, "GPU": 3.0})


def test_cluster_is_too_small():
    """A cluster that is too small is refused with stage, counts and the flags that asked."""
    with pytest.raises(ResourceError) as error:
        check_cluster(config_of("--teacher.num_engines", "2"), {"CPU": 4.0, "GPU": 2.0})
    assert str(error.value) == (
        "the Ray cluster has 2 GPUs, stage train needs 3: 2 for student ranks (--actor.num_nodes 1 x "
        "--actor.num_gpus_per_node 2); 1 for student engines (--vllm.num_engines 1 x --vllm.tensor_parallel_size 1). "
        "Lower these options or add nodes (on machines without GPUs: ray start --num-gpus N, where N is only a number)"
    )
    with pytest.raises(ResourceError, match="has 2 CPUs, stage train needs 3"):
        check_cluster(config_of(), {"CPU": 2.0, "GPU": 8.0})
    config = config_of("--teacher.num_engines", "2", "--teacher.tensor_parallel_size", "2")
    with pytest.raises(ResourceError, match=r"0 GPUs, stage generate needs 4: .*--teacher\.tensor_parallel_size 2"):
        check_cluster(config, {"CPU": 8.0}, stages=["generate"])


def test_scoring_by_the_teacher_needs_an_engine():
    """--eval.teacher_nll adds a teacher's engine to the evaluation."""
    with pytest.raises(ResourceError, match=r"stage evaluate needs 2: .*--eval\.teacher_nll"):
        check_cluster(config_of("--eval.teacher_nll"), {"CPU": 8.0, "GPU": 1.0}, stages=["evaluate"])


def test_tokenizer_differences():
    """Two tokenizers are told apart by size, first differing token and end of sequence."""
    from transformers import AutoTokenizer

    first, second = AutoTokenizer.from_pretrained(TOKENIZER), AutoTokenizer.from_pretrained(TOKENIZER)
    assert tokenizer_differences(first, second) == [
        "the same vocabulary, but other merges, normalisation or special tokens"
    ]
    second.add_tokens(["extra"])
    second.eos_token = "extra"
    assert tokenizer_differences(first, second) == [
        f"{len(first)} and {len(first) + 1} tokens",
        "the end of sequence is '<|endoftext|>' and 'extra'",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="engines run on GPUs here")
def test_head_size_that_no_cpu_kernel_has(room, monkeypatch):
    """A model that vLLM cannot run on CPUs is refused where an engine would host it, and nowhere else."""
    save_model("small_heads", head_dim=8)
    with pytest.raises(ConfigError, match=r"small_heads: .* size 8, .*32, 64, 80.*\(--teacher.model_name_or_path\)"):
        preflight(config_of("--teacher.model_name_or_path", "small_heads"))
    student = ("--actor.model_name_or_path", "small_heads")
    with pytest.raises(ConfigError, match=r"\(--actor.model_name_or_path\); take another model, or run on GPUs"):
        preflight(config_of(*student))
    # No engine samples from a student that is neither validated nor evaluated.
    preflight(config_of(*student, "--eval.dataset", "none", "--eval.test_datasets", "none"))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    plan = preflight(config_of(*student))
    for device in ("cuda", None):
        check_head_sizes(config_of(*student), plan.models, device=device, stages=("train",))
    with pytest.raises(ConfigError, match="size 8"):
        check_head_sizes(config_of(*student), plan.models, device="cpu", stages=("train",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Liger's kernels can run here")
def test_liger_needs_cuda(room):
    """--ds.use_liger_kernel on a machine without CUDA is refused before an actor starts."""
    with pytest.raises(ConfigError, match=r"--ds\.use_liger_kernel: its kernels need CUDA.*leave the option away"):
        preflight(config_of("--ds.use_liger_kernel"))


def test_options_without_effect_are_warned_of(room):
    """An option of something that is off is named, with what turns it on; a warning, since files may share options."""
    argv = ["--ds.lora.alpha", "32", "--actor.muon.lr", "0.1", "--train.ema_beta", "0.9"]
    warnings = preflight(config_of(*argv, "--train.pretrain_batch_size", "4")).warnings
    assert "--ds.lora.alpha has no effect without --ds.lora.rank" in warnings
    assert "--actor.muon.lr has no effect without --actor.optim muon" in warnings
    assert "--train.ema_beta has no effect without --train.enable_ema" in warnings
    assert "--train.pretrain_batch_size has no effect without --data.pretrain_dataset" in warnings
    on = ["--ds.lora.rank", "2", "--train.enable_ema", "--actor.optim", "muon", "--actor.max_norm", "0"]
    assert not [text for text in preflight(config_of(*argv, *on)).warnings if "no effect" in text]


@pytest.mark.parametrize(
    ("mode", "argv", "switch"),
    [
        ("offline", ["--algo.distill.max_ahead", "2"], "--algo.distill.mode online"),
        ("online", ["--algo.distill.offline_steps", "2"], "--algo.distill.mode offline_then_online"),
        (
            *("online", ["--algo.distill.student_fraction", "0.2", "--algo.distill.rollout", "student"]),
            "--algo.distill.rollout mixed",
        ),
        (
            *("online", ["--algo.distill.max_staleness", "2", "--algo.distill.rollout", "teacher"]),
            "--algo.distill.rollout student or mixed",
        ),
    ],
)
def test_options_of_rows_that_nobody_makes_are_warned_of(room, mode, argv, switch):
    """An option of online rows is named where no such rows are made, and only there."""
    [warning] = [text for text in preflight(config_of("--algo.distill.mode", mode, *argv)).warnings if "effect" in text]
    assert warning == f"{argv[0]} has no effect without {switch}"
    on = ["--algo.distill.mode", "offline_then_online", "--algo.distill.rollout", "mixed", *argv[:2]]
    assert not [text for text in preflight(config_of(*on)).warnings if "effect" in text]


def test_rows_of_an_online_run_take_disk_space(room):
    """Two epochs of 3 samples of 20 prompts, each response 7 tokens at most: 840 tokens of 40 bytes, and prompts."""
    argv = ["--algo.distill.mode", "online", "--train.max_epochs", "2", "--rollout.n_samples_per_prompt", "3"]
    plan = preflight(config_of(*argv, "--rollout.max_new_tokens", "7"))
    [use] = [use for use in plan.disk if use.what == "rows made while the student trains"]
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in plan.tables["train"].prompts)
    assert use.num_bytes == 840 * 40 + 6 * num_prompt_tokens * 4
    assert "at most 840 response tokens" in use.basis


def test_muon_decays_norms_too(room):
    """Weight decay with Muon is allowed, and a warning says what else it does."""
    plan = preflight(config_of("--actor.optim", "muon", "--actor.max_norm", "0", "--actor.adam.weight_decay", "0.1"))
    assert any("biases and norms decay too" in warning for warning in plan.warnings)


def test_disk_that_may_be_too_small(room, monkeypatch):
    """Each disk is looked at by itself, and one that may be too small for what goes there is named."""
    shared = Path("/dev/shm")
    if shared.stat().st_dev == room.stat().st_dev:
        pytest.skip("one disk alone here")
    monkeypatch.setattr("openrlhf_bd.driver.disk.free_bytes", lambda path: 10 if shared in path.parents else 10**15)
    plan = preflight(config_of("--teacher.store_path", str(shared / "rows")))
    assert [text for text in plan.warnings if "may not fit into the 10 B that are free in /dev/shm/rows" in text]
    assert not [text for text in plan.warnings if "runs/new" in text]


def test_gold_responses_are_scored_before_training(room):
    """kd on gold responses has a stage of the teacher's engines, with one row a prompt: nothing is sampled."""
    argv = ("--algo.distill.name", "kd", "--algo.distill.responses", "gold", "--rollout.n_samples_per_prompt", "3")
    generate, train, _ = preflight(config_of(*argv)).stages
    assert (generate.name, generate.rows, train.rows) == ("generate", 20, 20)
    assert generate.files == "runs/new/teacher_data"


def test_whole_vocabulary_needs_no_store_of_sets(room):
    """kd over the whole vocabulary on gold responses starts ranks alone; each holds the teacher, as the plan says."""
    config = config_of(*FULL_KD, "--eval.dataset", "none")
    plan = preflight(config)
    assert [(stage.name, [group.what for group in stage.actors]) for stage in plan.stages] == [
        ("train", ["student ranks"])
    ]
    teacher = plan.models["--teacher.model_name_or_path"]
    needs = resolve_algorithm("kd").needs_of(config.algo.distill)
    assert held_teacher_bytes(config, needs, teacher) == 4 * teacher.num_parameters
    assert plan.notes == (
        "each student rank also holds the whole teacher, "
        f"{format_bytes(4 * teacher.num_parameters)} (--algo.distill.kd_support full)",
    )
    rows = ("--algo.distill.name", "kd", "--algo.distill.kd_support", "full", "--eval.test_datasets", "none")
    assert [stage.name for stage in preflight(config_of(*rows)).stages] == ["generate", "train"]


def test_selection_by_loss_starts_no_engine(room):
    """With --ckpt.best_metric_key loss the plan has ranks alone, and a cluster of as many GPUs is enough."""
    config = config_of("--ckpt.best_metric_key", "loss", "--eval.test_datasets", "none", "--algo.distill.name", "sft")
    (stage,) = preflight(config, stages=["train"]).stages
    assert [group.what for group in stage.actors] == ["student ranks"]
    check_cluster(config, {"GPU": 2, "CPU": 2}, stages=["train"])
    by_rouge = config_of("--algo.distill.name", "sft")
    with pytest.raises(ResourceError, match="stage train needs 3"):
        check_cluster(by_rouge, {"GPU": 2, "CPU": 2}, stages=["train"])


def test_references_that_the_validation_loss_cuts(room):
    """A reference over --data.max_len is cut as training rows are, and the plan says how many are."""
    long = {"instruction": "Say it.", "input": "", "output": "word " * 200}
    (room / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*RECORDS, long]), "utf-8")
    lines = preflight(config_of(), stages=["train"]).data_sets
    assert any("validation loss: 1 of 21 references are cut" in line for line in lines)


def test_validation_records_without_a_reference(room):
    """With --eval.missing_references skip the validation loss is over the others; where there is none, nothing that
    references decide can select the student."""

    def write(*records):
        (room / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records), "utf-8")

    unanswered = {"instruction": "Say it.", "input": ""}
    write(unanswered, *RECORDS)
    skip = ("--eval.missing_references", "skip", "--eval.test_datasets", "none")
    config = config_of(*skip)
    plan = preflight(config, stages=["train"])
    assert any("validation loss: over the 20 of 21 prompts with a reference" in line for line in plan.data_sets)
    store = write_validation_rows(config, plan.tables["validation"], load_tokenizer("student", config))
    rows = StoreReader(store)
    assert [row.row_id for row in rows.rollouts(range(len(rows)))] == [f"{i:08d}:0" for i in range(1, 21)]
    write(unanswered)
    checked = (*skip, "--eval.checker", "builtins:bool")
    for metric in ("rouge_l", "loss"):
        with pytest.raises(ConfigError, match=f"best_metric_key is '{metric}'.* no record of validation.jsonl has a"):
            preflight(config_of(*checked, "--ckpt.best_metric_key", metric), stages=["train"])
    preflight(config_of(*checked, "--ckpt.best_metric_key", "accuracy"), stages=["train"])


def test_disk_space_of_pretraining_blocks(room):
    """Blocks of pre-training text take 4 bytes a token for as many as the steps read."""
    argv = ["--data.pretrain_dataset", "text.jsonl", "--train.pretrain_batch_size", "4", "--train.max_steps", "2"]
    (blocks,) = [use for use in preflight(config_of(*argv)).disk if use.what == "pre-training blocks"]
    # 2 steps of 4 blocks of 100 tokens.
    assert blocks.num_bytes == 2 * 4 * 100 * 4


def test_memory_of_a_rank(room):
    """Weights, gradients and moments of a rank, shared over the ranks as the stage of ZeRO says."""
    student = preflight(config_of()).models["--actor.model_name_or_path"]

    def found(*argv):
        return rank_bytes(config_of(*argv), student)

    # 50,400 numbers on 2 ranks; in fp32 weights and gradients of 4 bytes, moments of 8.
    numbers = 50_400
    assert found("--ds.zero_stage", "0") == numbers * (4 + 4 + 8)
    assert found("--ds.zero_stage", "1") == numbers * (4 + 4 + 4)
    assert found("--ds.zero_stage", "2") == numbers * (4 + 2 + 4)
    assert found("--ds.zero_stage", "3") == numbers * (2 + 2 + 4)
    # In bf16 half of that, and a copy in fp32 beside the moments.
    assert found("--ds.zero_stage", "3", "--ds.param_dtype", "bf16") == numbers * (1 + 1 + 6)
    assert found("--ds.lora.rank", "2") == numbers * 4


def test_disk_space_of_checkpoints(room):
    """A checkpoint takes the weights, Adam's states and each average; with adapters the weights alone."""
    often = ("--ckpt.save_steps", "1", "--ckpt.max_num", "1", "--eval.dataset", "none")
    plain, saved, ema, lora = (
        sum(use.num_bytes for use in preflight(config_of(*often, *extra), stages=["train"]).disk)
        for extra in ((), ("--ckpt.save_hf",), ("--train.enable_ema",), ("--train.enable_ema", "--ds.lora.rank", "4"))
    )
    # The student has 50,400 numbers of 4 bytes: two copies of it, and a second checkpoint before the first one goes.
    # Adam keeps 12 bytes for each trained number, an average 4.
    numbers = 50_400
    assert plain == numbers * (2 * 4 + 2 * (4 + 12))
    assert saved == numbers * (2 * 4 + 2 * 4 + 2 * (4 + 12))  # a student beside each checkpoint
    assert ema == numbers * (2 * 4 + 2 * (4 + 12 + 4))
    assert lora == numbers * (2 * 4 + 2 * 4)


EVALUATION = {
    "nucleus": (["--eval.test_top_p", "1.0", "1.2"], "--eval.test_top_p is 1 1.2; expected different numbers"),
    "nucleus twice": (["--eval.test_top_p", "0.8", "0.8"], "--eval.test_top_p is 0.8 0.8"),
    "seeds twice": (["--eval.seeds", "10", "10"], "--eval.seeds is"),
    "exposure without plain sampling": (
        ["--eval.exposure", "--eval.test_top_p", "0.8"],
        "use --eval.temperature 1, and 1.0 among --eval.test_top_p",
    ),
    "exposure of a sharpened model": (["--eval.exposure", "--eval.temperature", "0.5"], "--eval.temperature is 0.5"),
    "exposure without a teacher": (
        ["--eval.exposure", "--teacher.model_name_or_path", "none"],
        "--teacher.model_name_or_path is not given",
    ),
}


@pytest.mark.parametrize(("changes", "part"), EVALUATION.values(), ids=EVALUATION.keys())
def test_bad_samplers(room, changes, part):
    """What an evaluation could not sample, or measure, is refused before anything starts."""
    with pytest.raises(ConfigError) as error:
        preflight(config_of(*changes), stages=["evaluate"])
    assert part in str(error.value)


def test_exposure_needs_a_place_of_its_own(room):
    """The plan of an evaluation has one more actor and GPU for teacher and student side by side."""
    plan = preflight(config_of("--eval.exposure"), stages=["evaluate"])
    assert [group.what for group in plan.stages[0].actors] == ["student engines", "teacher and student side by side"]
    assert plan.num_gpus == 2
    both = preflight(config_of("--eval.exposure", "--eval.teacher_nll"), stages=["evaluate"])
    assert both.num_gpus == 3


def test_models_that_are_compared(room):
    """Models are checked before an engine starts: files, tokenizer, length, file of the label. Nothing is written."""
    save_model("short", max_position_embeddings=64)
    save_model("other")
    tokenizer = json.loads((room / "other/tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    (room / "other/tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = config_of("--actor.model_name_or_path", "none")
    before = sorted(room.rglob("*"))
    assert check_comparison(config, {"SFT": "student", "T": "teacher@temperature=0.7"}).num_gpus == 1
    for models, message in [
        ({"SFT": "student", "x": "missing"}, "missing: "),
        ({"SFT": "student", "x": "short"}, "more than the 64 positions of short \\(model 'x'\\)"),
        ({"SFT": "student", "x": "other"}, "the tokenizers of other \\(model 'x'\\) and student differ"),
        ({"SFT": "student", "sft": "teacher"}, "would both have the file sft.json"),
    ]:
        with pytest.raises((ConfigError, DataError), match=message):
            check_comparison(config, models)
    with pytest.raises(ConfigError, match="give the model a label in --models as well"):
        check_comparison(config_of(), {"SFT": "student"})
    assert sorted(room.rglob("*")) == before
