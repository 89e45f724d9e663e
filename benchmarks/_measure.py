"""Time and peak memory of a process, on CPU and CUDA."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch


def now(device: torch.device) -> float:
    """Seconds on a clock that never goes back, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> None:
    """Let the next peak_memory_bytes count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held since the last reset: of the CUDA allocator; on CPU the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def memory_bytes(device: torch.device) -> int:
    """Memory held now, counted in the same way."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def describe_machine(device: torch.device) -> str:
    """One line: processor, threads and versions, for beside a figure."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    where = name if device.type == "cuda" else f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{where}; Python {platform.python_version()}, torch {torch.__version__}"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; resident memory is known on Linux only")
