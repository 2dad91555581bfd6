"""Runs one after the other in the processes of one launch, which costs more than they do: argv are configuration files."""

import sys

import torch.distributed
from accelerate.state import AcceleratorState
from rich.console import Console

from align.config import load_config
from align.train import train

if __name__ == "__main__":
    store, rank, processes = next(torch.distributed.rendezvous("env://"))
    for path in sys.argv[1:]:
        # every run ends its process group, and the next one must not read the addresses that it left in the store
        own = torch.distributed.PrefixStore(path, store)
        torch.distributed.init_process_group("gloo", store=own, rank=rank, world_size=processes)
        train(load_config(path, ["name=both"]), Console(quiet=True))
        AcceleratorState._reset_state(reset_partial_state=True)
