"""Decoding and judging the images of an iteration, piece by piece: when all are sampled, or while others still are."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.prompts import Prompt
from align.run import Run
from align.scoring import Scores, gather_scores, score_local
from rewards.base import Reward, RewardError, onloaded

SCORED_AT_ONCE = 64
PIECES = 4
WAITING = 2


@dataclass
class Piece:
    """Images of one column that are judged together."""

    rows: list[int]
    column: int
    rewards: dict[str, Reward]
    images: Tensor
    decoded: Any
    """CUDA event after which the images are there; None where there is no stream to wait for."""


class Judging:
    """Scores of one process's samples of an iteration, whose latents are offered in their order, some or all at a time.

    In the background a thread judges pieces while the caller samples the next images; else everything is judged in as few
    calls as the memory allows. The code is the same, so scores differ by no more than a reward's own do between batches of
    different sizes. One thread judges the pieces one after the other, and sampling has generators of its own: a reward that
    draws from the global ones draws the same when the run is repeated. Decoding stays with the caller, since the model's
    modules are not made for two threads and the memory of two stages would add up.
    """

    def __init__(
        self,
        run: Run,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        iteration: int,
        total: int,
        report: Callable[[str, int, int], None],
        background: bool = False,
    ) -> None:
        """samples: global indices, whose group i // group_size has prompts[group]; total: samples of all processes."""
        train = run.config.train
        self._run, self._prompts, self._samples, self._iteration = run, prompts, list(samples), iteration
        self._total, self._report = total, report
        self._groups = [i // train.group_size for i in samples]
        self._first = {g: i for i, g in reversed(list(enumerate(self._groups)))}
        self._rewards = {name: run.rewards[name] for name in run.config.rewards}
        self._trained = {name: r for name, r in self._rewards.items() if run.config.rewards[name].weight != 0}
        self._ends = [len(samples)]
        if background:
            size = piece_size(len(samples), train.rollout_batch)
            self._ends = piece_ends(self._groups, size, not pointwise(self._rewards.values()))
        self._offered: list[list[Tensor]] = []  # of the samples from the last end on
        self._start = self._sampled = self._width = 0
        self._table: dict[str, Tensor] = {}
        self._at_work = ""
        self._onloaded = contextlib.ExitStack()
        self._worker = Worker(self._judge, self._enter, train.scoring_timeout) if background else None
        on_gpu = background and run.model.device.type == "cuda"
        self._stream = torch.cuda.Stream(run.model.device) if on_gpu else None

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()
        self._onloaded.close()

    def offer(self, latents: Sequence[Tensor]) -> None:
        """Latents (b, C, h, w) of the next b samples: of their completions, if there are any, then the final ones.

        Judges all pieces that are whole. Raises: RewardFailure, together with all other processes, if a reward failed.
        """
        self._width = len(latents)
        if self._worker is not None and self._worker.given_up:
            return
        self._offered.append(list(latents))
        self._sampled += len(latents[-1])
        try:
            if self._worker is not None:
                self._worker.check()
            while self._ends and self._ends[0] <= self._sampled:
                self._decode(self._ends.pop(0))
        except RewardError as problem:
            self._gather(problem)

    def scores(self) -> Scores:
        """Scores (total, C) of every process's samples, C the number of latents that a sample was offered with.

        Waits for what is still being judged. Raises: RewardFailure, as `offer`.
        """
        if self._worker is not None:
            self._report("scoring", self._start, len(self._samples))
            try:
                self._worker.finish()
            except RewardError as problem:
                self._gather(problem)
            if self._worker.given_up:
                self._run.warn_once(
                    "scoring_timeout",
                    f"reward '{self._at_work}' gave no answer for {self._worker.patience:g} s (train.scoring_timeout); what "
                    "was not judged by then counts as missing in this iteration",
                )
        self._onloaded.close()
        if self._once(0):
            first = [self._first[g] for g in self._groups]
            for values in self._table.values():
                values[:, 0] = values[first, 0]
        return self._gather({name: self._values(name) for name in self._rewards} | self._table)

    def _gather(self, found: dict[str, Tensor] | RewardError) -> Scores:
        # a reward that is only watched may have nothing to say of an iteration's prompts
        shape, required = (self._width,), list(self._trained)
        names = list(self._rewards)
        return gather_scores(self._run.accelerator, found, names, self._samples, self._total, shape, required)

    def _once(self, column: int) -> bool:
        """With a shared start the first completion is the same for a whole group: it is decoded and judged once."""
        shared = self._run.config.sampler.shared_start
        return column == 0 and self._width > 1 and shared and pointwise(self._trained.values())

    def _decode(self, end: int) -> None:
        """Decode the samples up to `end` and judge them, or have them judged."""
        if self._start == 0:
            self._onloaded.enter_context(onloaded(self._rewards.values()))
        columns = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self._offered, strict=True)]
        here, batch = range(self._start, end), self._run.config.train.rollout_batch
        for c, latents in enumerate(columns):
            # a reward of weight 0 is only watched: it sees the final images alone
            judges = self._rewards if c == self._width - 1 else self._trained
            rows = [i for i in here if not self._once(c) or self._first[self._groups[i]] == i]
            size = max(batch, SCORED_AT_ONCE) if pointwise(judges.values()) else len(rows)
            for some in (rows[at : at + size] for at in range(0, len(rows), size)):
                if self._worker is not None and self._worker.given_up:
                    return
                images = self._run.model.decode(latents[[i - self._start for i in some]], batch)
                decoded = None if self._stream is None else torch.cuda.Event()
                piece = Piece(some, c, judges, images, decoded)
                if self._worker is None:
                    self._report("scoring", c, len(columns))
                    for found in self._judge(piece):
                        self._enter(piece, found)
                else:
                    if decoded is not None:
                        decoded.record()
                    self._worker.put(piece)
        rest = [latents[end - self._start :] for latents in columns]
        self._offered = [rest] if len(rest[-1]) else []  # an empty view would keep all of it
        self._start = end

    def _judge(self, piece: Piece) -> Iterator[dict[str, Tensor]]:
        """What each reward finds, one after the other. Raises: RewardError."""
        owners = [self._groups[i] for i in piece.rows]
        prompts = [self._prompts[g] for g in owners]
        for name, reward in piece.rewards.items():
            self._at_work = name
            with self._side_stream(piece):
                found = score_local({name: reward}, piece.images, prompts, owners, self._iteration)
            yield found

    @contextlib.contextmanager
    def _side_stream(self, piece: Piece) -> Iterator[None]:
        """Inside, the GPU works for this piece beside the sampler; at the end it has done so, and the images may go."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(piece.decoded)
            yield
            self._stream.synchronize()

    def _enter(self, piece: Piece, found: dict[str, Tensor]) -> None:
        for key, scores in found.items():
            self._values(key)[piece.rows, piece.column] = scores

    def _values(self, key: str) -> Tensor:
        return self._table.setdefault(key, torch.full((len(self._samples), self._width), float("nan")))


def pointwise(rewards: Iterable[Reward]) -> bool:
    """Whether no score depends on other samples."""
    return all(reward.kind != "groupwise" for reward in rewards)


def piece_size(samples: int, rollout_batch: int) -> int:
    """Samples of a piece: whole rollout batches, about SCORED_AT_ONCE, fewer where that leaves less than PIECES pieces."""
    wanted = min(SCORED_AT_ONCE, math.ceil(samples / PIECES))
    return rollout_batch * max(1, wanted // rollout_batch)


def piece_ends(groups: Sequence[int], size: int, whole_groups: bool) -> list[int]:
    """Where pieces of `size` samples end; where groups must be whole, at the next end of a group that splits none."""
    last = {group: i for i, group in enumerate(groups)}
    open_until = -1
    ends: list[int] = []
    for i, group in enumerate(groups):
        open_until = max(open_until, last[group])
        full = i + 1 - (ends[-1] if ends else 0) >= size and (open_until == i or not whole_groups)
        if full or i + 1 == len(groups):
            ends.append(i + 1)
    return ends


class Worker:
    """A thread that does pieces in their order; at most WAITING of them wait while one is being done."""

    def __init__(
        self,
        work: Callable[[Piece], Iterator[dict[str, Tensor]]],
        enter: Callable[[Piece, dict[str, Tensor]], None],
        patience: float,
    ) -> None:
        """work: does a piece, result by result, in the thread; enter: takes a result, unless the work was given up.

        patience: seconds that the caller waits without a new result before it gives up.
        """
        self._work, self._enter, self.patience = work, enter, patience
        self._changed = threading.Condition()
        self._pieces: deque[Piece] = deque()
        self._busy = self._closed = False
        self._error: BaseException | None = None
        self._moved = 0.0
        self.given_up = False
        """Whether there was no result in time; what was not done by then never will be."""
        # a daemon: a reward that hangs must not keep the process from ending
        threading.Thread(target=self._run, name="judging", daemon=True).start()

    def put(self, piece: Piece) -> None:
        """Add a piece, once there is room. Raises: what the work has raised."""
        self._wait(lambda: len(self._pieces) < WAITING)
        with self._changed:
            if not self._closed:
                self._pieces.append(piece)
                self._changed.notify_all()

    def finish(self) -> None:
        """Wait until everything is done, or given up. Raises: what the work has raised."""
        self._wait(lambda: not self._pieces and not self._busy)

    def check(self) -> None:
        """Raises: what the work has raised."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Nothing more is wanted: the thread ends after what it is doing, whose result is dropped."""
        with self._changed:
            self._closed = True
            self._pieces.clear()
            self._changed.notify_all()

    def _wait(self, reached: Callable[[], bool]) -> None:
        with self._changed:
            while not reached() and not self._closed and self._error is None:
                left = self._moved + self.patience - time.monotonic()
                if left <= 0 and self._busy:
                    self.given_up = True
                    self.close()
                else:
                    self._changed.wait(max(left, 0.01))
        self.check()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._pieces or self._closed)
                if self._closed:
                    return
                piece = self._pieces.popleft()
                self._busy, self._moved = True, time.monotonic()
                self._changed.notify_all()
            try:
                for found in self._work(piece):
                    with self._changed:
                        if self._closed:
                            return
                        self._enter(piece, found)
                        self._moved = time.monotonic()
            except BaseException as error:  # for the caller to raise
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            del piece  # its images must not be kept while there is nothing to do
