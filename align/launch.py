"""What `accelerate launch` leaves undone for us: several processes on CPUs, and passing on a signal."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import psutil


def launcher_arguments() -> list[str]:
    """Command line of the `accelerate launch` that started this process directly, or an empty list."""
    parent = psutil.Process().parent()
    try:
        command = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return []
    return command if any(os.path.basename(part) in ("accelerate", "accelerate-launch") for part in command[:3]) else []


def spread_over_cpus(arguments: list[str]) -> None:
    """Replace this process by N, if `accelerate launch --cpu --num_processes N` asked for them.

    Without mpirun that command starts a single process and says nothing, so the number would silently do nothing.
    """
    alone = not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys()
    if not alone or os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true"):
        return
    count = _option(launcher_arguments(), "--num_processes")
    if count > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        runner = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "align.train"]
        os.execv(sys.executable, [sys.executable, *runner, *arguments])


def follow_launcher() -> None:
    """Get SIGTERM when the launcher is terminated: it would otherwise leave this process running without its checkpoint."""
    if sys.platform == "linux" and launcher_arguments():
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _option(command: list[str], name: str) -> int:
    for i, part in enumerate(command):
        value = part.partition("=")[2] if part.startswith(f"{name}=") else None
        if part == name and i + 1 < len(command):
            value = command[i + 1]
        if value is not None and value.isdigit():
            return int(value)
    return 1
