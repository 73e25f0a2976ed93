"""What a result was measured on: hardware and versions."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from m2rnn.runs.errors import SettingsError

# What a container may have, by the second and by the first version of control groups.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise `SettingsError` for a device that is not there."""
    try:
        torch.zeros(1, device=device).item()  # "meta" has tensors, but no numbers
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"device {device!r}: {reason}. Expected cpu, or cuda on a machine with a GPU") from error


def memory_of(device: str | torch.device) -> int | None:
    """Bytes of the GPU's memory, or of the memory that this machine lets a process have; None if nobody knows."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    for limit in CONTAINER_LIMITS:
        if limit.exists():
            text = limit.read_text().strip()
            found += [int(text)] if text.isdecimal() else []  # or max
    return min(found)


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The versions of installed packages (None for others) and of Python."""
    return {name: _version(name) for name in packages} | {"python": platform.python_version()}


def hardware(device: str) -> dict[str, Any]:
    """The processor, its threads in use, and the GPU if ``device`` is one."""
    found = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
