"""The reward-difference objective over an iteration's trajectories, which processes may hold in part."""

from __future__ import annotations

import torch
from torch import Tensor

from align.collect import Batch
from align.reward_difference import step_weights
from align.run import Run
from align.updates import rescored


class PairedTrajectories:
    """Log-probs of this process's trajectories, and the weight of each of their steps in the loss over all processes.

    The exact gradient in two passes: the first, without gradient, fills a table of log-probs, from which the loss and
    its derivative for every entry follow; the second runs each step forward and backward with that weight
    (`updates.weighted_pairs`). The first is free before the weights change: the table is the stored one.
    """

    def __init__(self, run: Run, batch: Batch, rewards: Tensor) -> None:
        """rewards: (N,) of all samples; scores the reference once, with the adapter off."""
        self.run, self.batch, self.rewards = run, batch, rewards
        self.reference, self.forwards = rescored(run, batch, range(len(batch.samples)), reference=True)
        self.updates = run.counters.updates - run.counters.empty_updates

    def weights(self, rows: range, sums: dict[str, float]) -> Tensor | None:
        """(n, S) weights of the steps of the samples at local `rows`, 0 elsewhere; None if no pair differs in reward.

        Adds the loss and the stats to `sums`, as this process's equal part of what all processes found.
        """
        run, batch, config = self.run, self.batch, self.run.config.objective
        moved = run.counters.updates - run.counters.empty_updates > self.updates
        old = batch.log_probs[list(rows)].cpu()
        if moved:
            present, forwards = rescored(run, batch, rows)
            self.forwards += forwards
        else:
            present = old
        samples = [batch.samples[j] for j in rows]
        table = torch.zeros(4, run.shape.samples, old.shape[1], dtype=torch.float64)
        for number, part in enumerate((present, old, self.reference[list(rows)], torch.ones_like(old))):
            table[number, samples] = part
        table = run.accelerator.reduce(table.to(run.accelerator.device), reduction="sum").cpu()
        members = table[3, :, 0] > 0
        groups = (torch.arange(run.shape.samples) // run.config.train.group_size)[members]
        every, every_old, every_ref = table[:3, members]
        settings = (config.pair_beta, config.step_clip, config.reduce_steps)
        found, loss, stats = step_weights(every, every_old, every_ref, self.rewards[members], groups, *settings)
        if not stats["groups"]:
            return None
        for key, value in (("pair_loss", loss), ("clipped_steps", stats["clipped"])):
            sums[key] += value / run.shape.processes
        for key in ("abs_error", "abs_target"):
            sums[key] += stats[key] / stats["groups"] / run.shape.processes
        everyone = torch.zeros(run.shape.samples, old.shape[1], dtype=torch.float64)
        everyone[members] = found
        weights = torch.zeros(len(batch.samples), old.shape[1], dtype=torch.float64)
        weights[list(rows)] = everyone[samples]
        return weights
