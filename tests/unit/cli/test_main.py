import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_bd.cli.list_algorithms import main as list_main
from openrlhf_bd.cli.main import COMMANDS, main


def test_help_names_every_command(capsys):
    """Help lists all commands, and is what one gets without any."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main([]) == 0
    assert capsys.readouterr().out == text


def test_unknown_command_names_the_nearest(capsys):
    """A mistyped command ends with status 2 and the name that was probably meant."""
    assert main(["trian"]) == 2
    assert "openrlhf-bd train?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_command_is_a_module(name):
    """Each command is a module that `python3 -m` also runs."""
    spec = importlib.util.find_spec(COMMANDS[name].module)
    assert spec is not None
    text = Path(str(spec.origin)).read_text(encoding="utf-8")
    assert "\ndef main(" in text
    assert 'if __name__ == "__main__":' in text


def test_list(capsys):
    """`openrlhf-bd list` prints every algorithm by name."""
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("bd", "sft", "seqkd", "package.module:Class"))


def test_list_takes_no_arguments(capsys):
    """An argument too many ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        list_main(["bd"])
    assert stop.value.code == 2


def test_module_runs():
    """`python3 -m openrlhf_bd.cli.main` is the console script, and answers --help without importing torch."""
    command = [sys.executable, "-X", "importtime", "-m", "openrlhf_bd.cli.main", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: openrlhf-bd")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "ray", "transformers"})
