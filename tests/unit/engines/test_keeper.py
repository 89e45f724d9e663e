"""The keeper: a command never outlives who holds its pipe, whatever ends that one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# A command with a child of its own, which does not end by itself.
SHELL = 'sleep 300 & echo $$ $! > "$0.part"; mv "$0.part" "$0"; wait'
KEEPER = [sys.executable, "-m", "openrlhf_bd.engines.keeper"]
# Holds the pipe, and does nothing.
HOLDER = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE); time.sleep(300)"
TIMEOUT_S = 30.0


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def started(pids: Path) -> list[int]:
    """The command and its child, once they run."""
    wait_until(pids.exists)
    return [int(pid) for pid in pids.read_text().split()]


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("ending", ["closed", "holder killed", "keeper terminated"])
def test_command_ends_with_its_children(tmp_path: Path, ending: str) -> None:
    """The pipe closes, its holder is killed, or the keeper itself is told to end: command and child are gone."""
    command = [*KEEPER, "sh", "-c", SHELL, str(tmp_path / "pids")]
    if ending == "holder killed":
        command = [sys.executable, "-c", HOLDER, *command]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    pids = started(tmp_path / "pids")
    keeper = psutil.Process(pids[0]).parent()
    assert keeper is not None
    # Ctrl-C is the holder's business.
    keeper.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert all(is_running(pid) for pid in pids)
    if ending == "closed":
        process.stdin.close()
    elif ending == "holder killed":
        process.kill()
    else:
        keeper.terminate()
    # Closed by the end of the keeper, its last holder.
    assert process.stdout.read() == b""
    process.wait(TIMEOUT_S)
    wait_until(lambda: not any(is_running(pid) for pid in [*pids, keeper.pid]))


def test_command_ends_with_a_killed_keeper(tmp_path: Path) -> None:
    """The kernel tells the command of a keeper that was killed."""
    command = [*KEEPER, "sh", "-c", SHELL, str(tmp_path / "pids")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        shell, child = started(tmp_path / "pids")
        keeper = psutil.Process(shell).parent()
        assert keeper is not None
        # No child of who started it, who may be ended together with all its children.
        assert keeper.pid != process.pid
        keeper.kill()
        wait_until(lambda: not is_running(shell))
    # A shell leaves its child; a server ends its own.
    os.kill(child, signal.SIGKILL)


def test_command_that_ends_by_itself(tmp_path: Path) -> None:
    """The keeper ends with it, and what it wrote is on standard error alone."""
    with subprocess.Popen(
        [*KEEPER, "sh", "-c", "echo said"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read() == b""
        assert process.stderr.read() == b"said\n"
