"""Advantages of six groups of four as each process of a launch forms them; then one process meets a broken reward.

argv: a folder, in which every process leaves `PROCESSES-RANK.json`.
"""

import json
import math
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from align.advantages import AdvantageConfig, group_advantages
from align.geometry import Geometry, local_order
from align.scoring import RewardFailure, gather_scores, uncertainty_key
from rewards.base import RewardError

GROUPS, SIZE = 6, 4


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    rank, processes = accelerator.process_index, accelerator.num_processes
    total = GROUPS * SIZE
    known = torch.rand(total, generator=torch.Generator().manual_seed(0))
    known[[3, 8, 9, 10, 11]] = float("nan")  # one of a group, and all of another
    order = local_order(Geometry(processes, total, GROUPS, 1, 1, 1), rank, 0, 0)[0]
    # a service says how sure it is to the last process only: the others must take part in the gathering all the same
    doubt = {uncertainty_key("f"): known[order] + 1} if rank == processes - 1 else {}
    scores = gather_scores(accelerator, {"f": known[order], **doubt}, ["f"], order, total)
    groups = torch.arange(total) // SIZE
    advantages, _ = group_advantages(scores.values["f"], scores.valid["f"], groups, AdvantageConfig())
    broken = RewardError("reward 'f' failed: no such file") if rank == processes - 1 else {"f": known[order]}
    words = ""
    try:
        gather_scores(accelerator, broken, ["f"], order, total)
    except RewardFailure as problem:
        words = str(problem)
    doubts = [None if math.isnan(x) else x for x in scores.extras[uncertainty_key("f")].tolist()]
    found = {"advantages": advantages.tolist(), "mine": order, "words": words, "doubts": doubts}
    (folder / f"{processes}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
