"""Advantages of six groups of four as one, two and four processes form them; then one process meets a broken reward.

argv: a folder, in which every process leaves `PROCESSES-RANK.json`. The processes are copies of this one, which has imported
what they need: that takes longer than all that they do.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from align.advantages import AdvantageConfig, group_advantages
from align.geometry import Geometry, local_order
from align.scoring import RewardFailure, gather_scores
from align.uncertainty import UncertaintyConfig, confidence
from rewards.base import RewardError

GROUPS, SIZE = 6, 4
PATIENCE = 90  # seconds for each set of processes


def work(folder: Path, rank: int, processes: int, port: int) -> None:
    """What one of the processes does."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({key: str(value) for key, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    accelerator = Accelerator(cpu=True)
    assert (accelerator.process_index, accelerator.num_processes) == (rank, processes)
    total = GROUPS * SIZE
    known = torch.rand(total, generator=torch.Generator().manual_seed(0))
    known[[3, 8, 9, 10, 11]] = float("nan")  # one of a group, and all of another
    order = local_order(Geometry(processes, total, GROUPS, 1, 1, 1), rank, 0, 0)[0]
    doubt = 3 * torch.rand(total, generator=torch.Generator().manual_seed(1))
    doubt[5] = float("nan")  # not said
    scores = gather_scores(accelerator, {"f": known[order], "doubt": doubt[order]}, ["f", "doubt"], order, total)
    groups = torch.arange(total) // SIZE
    values, valid = scores.values["f"], scores.valid["f"]
    advantages, _ = group_advantages(values, valid, groups, AdvantageConfig())
    trusted = confidence(scores.values["doubt"].nan_to_num(0.0), valid, groups, UncertaintyConfig(mode="weight"))
    plain, _ = group_advantages(values, valid, groups, AdvantageConfig(), *trusted.statistics())
    weighted = trusted.applied(plain.double().view(total, -1)).flatten()
    broken = RewardError("reward 'f' failed: no such file") if rank == processes - 1 else {"f": known[order]}
    words = ""
    try:
        gather_scores(accelerator, broken, ["f"], order, total)
    except RewardFailure as problem:
        words = str(problem)
    found = {"advantages": advantages.tolist(), "weighted": weighted.tolist(), "mine": order, "words": words}
    (folder / f"{processes}-{rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


def main(folder: Path) -> None:
    """Start one, two and four processes in turn."""
    context = multiprocessing.get_context("fork")
    for processes in (1, 2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [context.Process(target=work, args=(folder, rank, processes, port)) for rank in range(processes)]
        for process in started:
            process.start()
        patience = time.monotonic() + PATIENCE
        for process in started:
            process.join(max(0.0, patience - time.monotonic()))
        for process in started:
            process.kill()  # one that waits for another for ever must not outlive the test
            process.join()
        assert [process.exitcode for process in started] == [0] * processes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
