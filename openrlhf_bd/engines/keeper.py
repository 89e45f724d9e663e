"""A process in the background that runs a command, and ends it with all its children when standard input closes.

    python -m openrlhf_bd.engines.keeper COMMAND [ARGUMENT ...]

Whoever holds the other end of that pipe need not live to end the command: when a process is killed, its pipes close.
Standard output stays open, and empty, until command and keeper have ended. What the command writes goes to standard
error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

# Who does not end by itself in this time is killed.
GRACE_S = 15.0
_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


def main(command: Sequence[str]) -> None:
    """Run a command until it ends, or until standard input closes."""
    # No child of whoever started it: Ray kills the children of an actor that it ends, before they could end theirs.
    if os.fork():
        os._exit(0)
    # Ctrl-C reaches everyone at the terminal; the holder of the pipe decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os.close(sys.stdin.fileno()))
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        while child.poll() is None and not _is_closed():
            pass
    finally:
        _end(child)


def _end_with_parent() -> None:
    """The last resort, should this process be killed: the kernel tells its child."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_closed() -> bool:
    """Whether standard input is, after a moment's wait."""
    try:
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], _POLL_S)
        return bool(readable) and not os.read(sys.stdin.fileno(), 1)
    except OSError:
        return True


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        # It ends its own children in order.
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
    # Who is left of its group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
