import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openrlhf_bd.cli.flags import main_guard, parse_config, resolved_yaml
from openrlhf_bd.cli.options import all_options, describe_type, nearest
from openrlhf_bd.config import Config
from openrlhf_bd.errors import ConfigError, StoreError

FOLDER = Path(__file__).parents[3] / "configs"
# Experiment files and scales have a form of their own; their pieces are option files.
CONFIGS = sorted(
    path for path in FOLDER.rglob("*.yaml") if FOLDER / "paper" not in path.parents or path.parent.name == "pieces"
)


def parse(*argv):
    return parse_config([str(argument) for argument in argv], prog="openrlhf-bd train", description="Train a student.")


def config_of(*argv):
    return parse(*argv)[0]


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_nothing_given_is_the_default():
    """An empty command line gives exactly the defaults of the option tree."""
    config, options = parse()
    assert config == Config()
    assert not options.dry_run
    assert options.config_files == ()
    assert options.origins == {}


def test_flags_of_every_kind():
    """Numbers, texts, choices, lists, pairs and switches arrive as the types that the options have."""
    config = config_of(
        *("--train.batch_size", 8, "--actor.adam.lr", "1e-5", "--actor.adam.betas", 0.8, 0.99),
        *("--eval.seeds", 1, 2, "--algo.distill.linear_term=sampled", "--data.prompt_dataset", "a.jsonl"),
        *("--actor.gradient_checkpointing_enable", "--teacher.enable_prefix_caching", "false"),
    )
    assert config.train.batch_size == 8
    assert config.actor.adam.lr == 1e-5
    assert config.actor.adam.betas == (0.8, 0.99)
    assert config.eval.seeds == [1, 2]
    assert config.algo.distill.linear_term == "sampled"
    assert config.data.prompt_dataset == "a.jsonl"
    assert config.actor.gradient_checkpointing_enable is True
    assert config.teacher.enable_prefix_caching is False


@pytest.mark.parametrize("text", ["-10", "-1e1", "-10.0", "-.1e2"])
def test_negative_numbers(text):
    """A negative number is a value, not a flag, however it is written."""
    assert config_of("--algo.distill.q_min", text).algo.distill.q_min == -10.0
    assert config_of(f"--algo.distill.q_min={text}").algo.distill.q_min == -10.0


def test_none_unsets(write):
    """The word none unsets what a file set, where an option may be unset."""
    path = write("a.yaml", "data: {max_prompt_len: 10, label_key: output}\n")
    config = config_of("--config", path, "--data.max_prompt_len", "none", "--data.label_key", "none")
    assert config.data.max_prompt_len is None
    assert config.data.label_key is None
    assert config_of("--algo.distill.q_shift", "none").algo.distill.q_shift == "none"


def test_layers(write):
    """Defaults < preset < first file < second file < flags, whatever the order on the command line."""
    first = write("first.yaml", "algo:\n  distill:\n    preset: paper\n    alpha: 5\n    gamma: 0.5\n    tau: 2\n")
    second = write("second.yaml", "algo.distill.gamma: 0.6\nalgo.distill.tau: 3\n")
    config = config_of("--algo.distill.tau", 4, "--config", first, "--config", second)
    distill = config.algo.distill
    assert distill.reduction == "token"  # default
    assert (distill.q_min, distill.top_p) == (-10.0, 0.8)  # preset paper
    assert (distill.alpha, distill.gamma, distill.tau) == (5.0, 0.6, 4.0)


def test_preset_on_the_command_line_stays_below_files(write):
    """A preset gives values that nobody else gives, wherever the preset itself is named."""
    path = write("a.yaml", "algo.distill.alpha: 7\n")
    distill = config_of("--config", path, "--algo.distill.preset", "paper").algo.distill
    assert (distill.alpha, distill.q_shift) == (7.0, "max")


def test_extends(write):
    """A file extends others relative to itself; its own keys win, and later files of a list win over earlier ones."""
    write("base/a.yaml", "train: {batch_size: 1, seed: 1}\nds.zero_stage: 1\n")
    write("base/b.yaml", "train.seed: 2\n")
    path = write("child.yaml", "extends: [base/a.yaml, base/b.yaml]\ntrain.batch_size: 3\n")
    config, options = parse("--config", path)
    assert (config.train.batch_size, config.train.seed, config.ds.zero_stage) == (3, 2, 1)
    assert options.origins["train.seed"].endswith("base/b.yaml:1")
    assert options.origins["train.batch_size"].endswith("child.yaml:2")


def test_yaml_types(write):
    """YAML's own readings do no harm: 1e-5 is a number, and a text that looks like a number or a date stays a text."""
    text = "actor: {adam: {lr: 1e-5, betas: [0.9, 0.99]}}\nlogger: {wandb: {run_name: 2026-01-02, group: 012}}\n"
    text += "data: {prompt_probs: 1.0, label_key: null}\nckpt: {max_mem: .inf}\nvllm:\nteacher: {enforce_eager: yes}\n"
    config = config_of("--config", write("a.yaml", text))
    assert config.actor.adam.lr == 1e-5
    assert config.actor.adam.betas == (0.9, 0.99)
    assert (config.logger.wandb.run_name, config.logger.wandb.group) == ("2026-01-02", "012")
    assert config.data.prompt_probs == "1.0"
    assert config.ckpt.max_mem == math.inf
    assert config.teacher.enforce_eager is True


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configurations(path):
    """Every YAML file that is shipped has known options with values of the right types."""
    assert parse("--config", path)[1].origins


def test_resolved_configuration_reads_back(write):
    """What is saved as config.yaml gives the same configuration again."""
    config = config_of("--algo.distill.preset", "paper", "--eval.seeds", 1, "--data.input_template", "Q: {}\nA: ü")
    assert config_of("--config", write("saved.yaml", resolved_yaml(config))) == config


def test_secrets_are_left_out():
    """A key given on the command line is neither printed nor saved, and the saved file says so."""
    text = resolved_yaml(config_of("--logger.wandb.key", "s3cret"))
    assert "s3cret" not in text
    assert "logger.wandb.key" in text.splitlines()[0]
    assert yaml.safe_load(text)["logger"]["wandb"]["key"] is None


def test_secrets_are_not_in_messages(write):
    """A wrong value of a secret is not repeated in the error."""
    with pytest.raises(ConfigError) as error:
        parse("--config", write("a.yaml", "logger.wandb.key: [s3cret]\n"))
    assert "s3cret" not in str(error.value)


def test_dry_run():
    """--dry_run is passed on to the command."""
    assert parse("--dry_run")[1].dry_run


def test_measured_plan():
    """--measure takes a number of rows or has one of its own, and belongs to a plan."""
    assert parse("--dry_run")[1].measure is None
    assert parse("--dry_run", "--measure")[1].measure == 32
    assert parse("--dry_run", "--measure", "8")[1].measure == 8
    with pytest.raises(ConfigError, match=r"--measure belongs to a plan; give it to openrlhf-bd plan"):
        parse("--measure")
    with pytest.raises(ConfigError, match=r"--measure is '-3'; expected a number of rows"):
        parse("--dry_run", "--measure", "-3")


# Arguments, and what the message must contain: where, what was found, what was expected or what to do.
BAD_COMMAND_LINES = {
    "unknown flag": (["--train.batch_sze", "8"], ["command line", "--train.batch_sze", "--train.batch_size?"]),
    "section forgotten": (["--batch_size=8"], ["--batch_size", "--train.batch_size?"]),
    "nothing near": (["--zzz", "1"], ["--zzz", "--help"]),
    "abbreviated": (["--train.batch", "8"], ["--train.batch is not an option"]),
    "word for a number": (["--train.batch_size", "many"], ["--train.batch_size", "'many'", "whole number", "128"]),
    "fraction for a whole number": (["--train.batch_size", "1.5"], ["'1.5'", "whole number greater than 0"]),
    "zero": (["--train.batch_size", "0"], ["'0'", "greater than 0"]),
    "not a number": (["--algo.distill.q_min", "nan"], ["--algo.distill.q_min", "'nan'", "a number, or none"]),
    "infinite": (["--actor.adam.lr", "inf"], ["--actor.adam.lr", "'inf'", "a number greater than 0"]),
    "over the bound": (["--algo.distill.gamma", "1.1"], ["'1.1'", "at most 1"]),
    "seed below 0": (["--train.seed", "-1"], ["--train.seed", "'-1'", "at least 0"]),
    "save every 0 steps": (["--ckpt.save_steps", "0"], ["--ckpt.save_steps", "other than 0"]),
    "wrong choice": (["--algo.distill.linear_term", "sample"], ["'sample'", "sampled, expected", "mean sampled?"]),
    "wrong preset": (["--algo.distill.preset", "papper"], ["'papper'", "robust, paper", "mean paper?"]),
    "switch": (["--teacher.enforce_eager", "maybe"], ["'maybe'", "true or false"]),
    "too few": (["--actor.adam.betas", "0.9"], ["--actor.adam.betas", "['0.9']", "2 numbers"]),
    "list of words": (["--eval.seeds", "1", "x"], ["--eval.seeds", "whole numbers"]),
    "no value": (["--train.batch_size"], ["--train.batch_size", "no value", "whole number"]),
    "no value before another flag": (["--train.batch_size", "--dry_run"], ["--train.batch_size", "no value"]),
    "left over": (["--data.prompt_dataset", "a.jsonl", "b.jsonl"], ["'b.jsonl'", "quote"]),
    "no such file": (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file", "--config"]),
}


@pytest.mark.parametrize(("argv", "parts"), BAD_COMMAND_LINES.values(), ids=BAD_COMMAND_LINES.keys())
def test_bad_command_line(argv, parts, capsys, tmp_path, monkeypatch):
    """A wrong flag ends with status 2 and one line that says what, where and what was expected; nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main_guard(lambda: bool(parse(*argv))) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert [part for part in parts if part not in message] == []
    assert list(tmp_path.iterdir()) == []


BAD_FILES = {
    "unknown key": ("train:\n  batch_sz: 8\n", ["a.yaml:2", "train.batch_sz", "train.batch_size?"]),
    "unknown section": ("trian:\n  batch_size: 8\n", ["a.yaml:1", "trian", "train?"]),
    "wrong type": ("# x\ntrain: {batch_size: many}\n", ["a.yaml:2", "train.batch_size", "'many'", "whole number"]),
    "switch for a number": ("train.batch_size: yes\n", ["a.yaml:1", "True", "whole number"]),
    "list for a number": ("train.batch_size: [8]\n", ["a.yaml:1", "[8]", "whole number"]),
    "mapping for a number": ("train:\n  batch_size: {a: 1}\n", ["a.yaml:2", "train.batch_size", "whole number"]),
    "null for a number": ("train.batch_size:\n", ["a.yaml:1", "None", "whole number"]),
    "value for a section": ("train: 8\n", ["a.yaml:1", "train is '8'", "batch_size"]),
    "list for a section": ("train: [8]\n", ["a.yaml:1", "train is a list"]),
    "given twice": ("train: {seed: 1}\ntrain.seed: 2\n", ["a.yaml:2", "train.seed", "a.yaml:1", "keep one"]),
    "no mapping": ("- a\n- b\n", ["a.yaml:1", "a list", "expected options"]),
    "no YAML": ("train: {seed: 1\nds: }\n", ["a.yaml:2", "not valid YAML"]),
    "tab": ("train:\n\tseed: 1\n", ["a.yaml:2", "not valid YAML"]),
    "code": ("train.seed: !!python/object/apply:os.getpid []\n", ["a.yaml:1", "could not determine a constructor"]),
    "two documents": ("train.seed: 1\n---\ntrain.seed: 2\n", ["a.yaml", "not valid YAML"]),
    "extends nothing": ("extends: no.yaml\n", ["no.yaml", "no such file", "a.yaml"]),
    "extends a number": ("extends: [1]\n", ["a.yaml:1", "[1]", "file name"]),
    "extends itself": ("extends: a.yaml\n", ["a.yaml", "extends itself"]),
}


@pytest.mark.parametrize(("text", "parts"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(text, parts, write, capsys):
    """A wrong YAML file ends with status 2 and one line that names file and line."""
    path = write("a.yaml", text)
    assert main_guard(lambda: bool(parse("--config", path))) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert [part for part in parts if part not in message] == []


def test_file_that_is_no_text(tmp_path, capsys):
    """A binary file, or a folder, is refused by name."""
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert main_guard(lambda: bool(parse("--config", path))) == 2
    assert main_guard(lambda: bool(parse("--config", tmp_path))) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert str(path) in first
    assert str(tmp_path) in second


def test_help_describes_every_option(capsys):
    """--help exits with 0 and lists every option with its meaning and default."""
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, option in all_options().items():
        assert f"--{name} " in text
        # argparse breaks long words at hyphens, so compare the text without spaces.
        assert option.field.description.replace(" ", "") in text.replace(" ", "")


def test_flags_need_no_torch():
    """Reading flags and printing help imports neither torch nor ray nor transformers."""
    program = (
        "import sys, openrlhf_bd.cli.main, openrlhf_bd.cli.flags as flags\n"
        "flags.parse_config(['--train.seed', '1'], prog='x', description='y')\n"
        "sys.exit(', '.join({'torch', 'ray', 'transformers', 'vllm'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_describe_type():
    """Types are described in words that a person understands."""
    options = all_options()
    assert describe_type(options["algo.distill.gamma"]) == "a number of at least 0 and of at most 1"
    assert describe_type(options["vllm.num_engines"]) == "a whole number greater than 0, or none"
    assert describe_type(options["actor.adam.betas"]) == "2 numbers"
    assert describe_type(options["eval.seeds"]) == "a list of whole numbers"
    assert all(describe_type(option) for option in options.values())


def test_nearest():
    """The nearest option is found by spelling, or by its last part where the section is wrong."""
    assert nearest("train.batchsize", all_options()) == "train.batch_size"
    assert nearest("student.max_norm", all_options()) == "actor.max_norm"
    assert nearest("actor.lr", all_options()) == "actor.adam.lr"
    assert nearest("qqqq", all_options()) is None


def test_main_guard_passes_status_on(capsys):
    """A command's own status is returned, and nothing is printed."""
    assert main_guard(lambda: 3) == 3
    assert capsys.readouterr().err == ""


def test_main_guard_uses_the_error_s_status(capsys):
    """Each of our errors ends with its own exit status and its message alone."""

    def fail():
        raise StoreError("shard 3 is damaged")

    assert main_guard(fail) == 74
    assert capsys.readouterr().err == "error: shard 3 is damaged\n"


def test_main_guard_tells_of_a_full_disk(capsys, tmp_path):
    """A write that finds no room ends with status 74 and what to do; any other that fails is a bug, and is seen."""

    def fill():
        Path("/dev/full").write_text("x", encoding="utf-8")

    assert main_guard(fill) == 74
    assert capsys.readouterr().err == (
        "error: No space left on device; make room and run the same command again to continue\n"
    )
    with pytest.raises(FileNotFoundError):
        main_guard(lambda: (tmp_path / "none" / "x").write_text("x", encoding="utf-8"))


def test_main_guard_unwraps_remote_errors(capsys):
    """An error of ours that crossed Ray is told by its own message, without the other process's traceback."""
    from ray.exceptions import RayTaskError

    def fail():
        raise RayTaskError("f", "Traceback of a worker", StoreError("shard 3 is damaged")).as_instanceof_cause()

    assert main_guard(fail) == 74
    assert capsys.readouterr().err == "error: shard 3 is damaged\n"


def test_main_guard_after_interrupt(capsys):
    """Ctrl-C ends with status 75 and says how to go on."""

    def interrupted():
        raise KeyboardInterrupt

    assert main_guard(interrupted) == 75
    assert "same command" in capsys.readouterr().err


def test_main_guard_leaves_bugs_alone():
    """An error that nobody raised on purpose keeps its traceback."""

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main_guard(fail)


def test_reader_that_goes_away():
    """`... --help | head -1` prints no traceback."""
    program = (
        "import sys; from openrlhf_bd.cli.flags import main_guard\n"
        "def write():\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "    return 0\n"
        "sys.exit(main_guard(write))"
    )
    command = f'{sys.executable} -c "{program}" | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "x" * 100 + "\n"
