"""The noise table of a run: measured with the initial policy, stored with what it was measured for, found again.

The search itself is `samplers.calibration` (DenseGRPO, arXiv 2601.20218). A table is the JSON object that is stored:
`fingerprint`, `sigma` and `multiplier` (T numbers), `nfe` (network evaluations it took), `seconds`, `settled`, and per
iteration `history` (sigmas), `up` and `down` (shares of samples that gained and lost, a number for each searched step).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from align.collect import Report, collect, score_values
from align.config import Config
from align.errors import UserError
from align.prompts import Prompt, prompt_indices
from align.psi_chart import draw_chart, ends, searched_steps
from align.run import Run, restore_rng, rng_state, start, used_prompts
from align.tracking import write_json
from rewards.combine import combine
from samplers.calibration import HARDLY_MEASURED, CalibrationResult, calibrate_table
from samplers.config import SamplerConfig
from samplers.plans import Plan, full_plan

# Prompts and noise are named by (seed, iteration); training never counts this far, so no name is used twice.
FIRST_ITERATION = 2**32


def plan_to_search(sampler: SamplerConfig) -> Plan:
    """The steps whose noise is measured: those of the run if they are always the same, else all but the last.

    The states before a step depend on which steps before it are stochastic, so a window that cannot move is measured as
    it is trained, and at no more cost.
    """
    low, high = sampler.window_bounds()
    fixed = sampler.plan == "full" or (sampler.plan != "branched" and high - low == sampler.window_size)
    return sampler.make_plan(0, 0) if fixed else full_plan(sampler.num_steps)


def fingerprint(run: Run) -> dict[str, Any]:
    """What a table depends on, as plain JSON data; `calibration` is recorded too, but a table may be used without it.

    Files are named and not read: a model folder or prompt file rewritten in place is not noticed.
    """
    config = run.config
    trained = {name: reward for name, reward in config.rewards.items() if reward.weight != 0}
    found = {
        "model": config.model.path,
        "revision": config.model.revision,
        "precision": config.model.precision,
        "adapter": config.model.lora.init_from,
        "resolution": config.model.resolution or run.model.native_resolution,
        "kernel": config.sampler.kernel,
        "grid": rounded_grid(run.grid),
        "stochastic": plan_to_search(config.sampler).stochastic,
        "prompts": config.prompts.train,
        "guidance_scale": config.sampler.guidance_scale,
        "completions": {
            "ode_steps": config.completions.ode_steps,
            "guidance_scale": config.completions.guidance_scale,
        },
        "rewards": {n: {"type": r.type, "weight": r.weight, "args": r.args} for n, r in sorted(trained.items())},
        "calibration": dataclasses.asdict(config.calibration),
    }
    return json.loads(json.dumps(found, default=str))  # as it will be read back: lists for tuples, text for keys


def rounded_grid(grid: Tensor) -> list[float]:
    """The times (T+1,) as a table has them."""
    return [round(float(t), 6) for t in grid]


def cache_path(config: Config, wanted: Mapping[str, Any]) -> Path:
    """Where `sampler.psi: auto` looks for a table with this fingerprint, calibration settings included."""
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.output_dir) / "psi" / f"{digest}.json"


def save_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table; a reader never sees half of it."""
    write_json(path, table)


def load_table(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Read a table and check that it was made for `wanted` (a fingerprint), whatever its calibration settings.

    Raises: UserError if it is none, or listing every difference.
    """
    table = read_table(path)
    old, new = (_flat({k: v for k, v in f.items() if k != "calibration"}) for f in (table["fingerprint"], wanted))
    lines = [
        f"{key}: {_shown(old, key)} in the table, {_shown(new, key)} in this run"
        for key in sorted(old.keys() | new.keys())
        if _shown(old, key) != _shown(new, key)
    ]
    if lines:
        raise UserError(
            "\n  ".join(
                [f"{path} was made for other settings; use sampler.psi=auto or run align calibrate again", *lines]
            )
        )
    if len(table["sigma"]) != len(wanted["grid"]) - 1:
        raise UserError(f"{path}: has {len(table['sigma'])} noise levels for {len(wanted['grid']) - 1} steps")
    return table


def read_table(path: Path) -> dict[str, Any]:
    """Read a table, whatever it was made for. Raises: UserError if it is none."""
    if not path.is_file():
        raise UserError(f"sampler.psi: no file {path}; write it with align calibrate, or use sampler.psi=auto")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        sound = isinstance(table["fingerprint"]["grid"], list) and isinstance(table["nfe"], int)
        sound = sound and isinstance(table.get("seconds", 0.0), int | float)
        sound = sound and all(isinstance(s, float) and 0 < s < math.inf for s in table["sigma"])
    except (OSError, ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise UserError(f"{path}: not a table that align calibrate wrote; delete it or name another file")
    return table


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, Mapping):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"


class Stopped(UserError):
    """Asked to stop (SIGTERM) before the calibration was done; what was measured is kept."""


def apply_psi(run: Run) -> None:
    """Put the noise table that `config.sampler.psi` asks for in force, if it asks for one; all processes call it.

    A request to stop ends the calibration without a table; the caller sees the same request before its first iteration.
    """
    if run.config.sampler.psi is None:
        return
    with contextlib.suppress(Stopped), calibration_progress(run.console) as report:
        run.noise_levels, run.kernel = psi_table(run, report), "psi_sde"


def psi_table(run: Run, report: Report) -> Tensor:
    """Noise levels (T,) float64 that `config.sampler.psi` asks for, the same on every process; all processes call it.

    auto: the run's own psi.json, else the cache, else a calibration, which is cached. A path: that file. The run's
    folder gets a copy, and a run that continues (call this after its checkpoint is restored) takes that one. The
    network evaluations and the seconds of the calibration are charged to the run, cached or not, so that methods compare
    honestly. One that was cut short goes on from the run's psi.partial.json.

    Raises: UserError for a table made for other settings or a continued run without its table; Stopped.
    """
    config, wanted, resumed = run.config, fingerprint(run), run.counters.iteration > 0
    own, cached = config.run_dir / "psi.json", cache_path(config, wanted)
    partial = partial_path(own)
    if resumed and own.is_file():
        table: dict[str, Any] | None = load_table(own, wanted)
    elif config.sampler.psi != "auto":
        table = load_table(Path(str(config.sampler.psi)), wanted)
    else:
        table = _exact(own, wanted) or _exact(cached, wanted)
        run.accelerator.wait_for_everyone()  # nobody writes before all have looked
        if table is None and resumed:
            raise UserError(f"{own} is missing: copy it from the run that wrote the checkpoint, or choose another name")
        if table is None:
            table = calibrate(run, report, partial)
            if run.main:
                save_table(cached, table)
    assert table is not None
    if run.main:
        save_table(own, table)
        partial.unlink(missing_ok=True)
    if not resumed:
        # set, not added: a run stopped before its first iteration comes here twice
        run.counters.nfe, run.counters.seconds = table["nfe"], table.get("seconds", 0.0)
    run.accelerator.wait_for_everyone()
    return torch.tensor(table["sigma"], dtype=torch.float64)


def _exact(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table at `path` if there is one with this very fingerprint."""
    table = read_table(path) if path.is_file() else None
    return table if table is not None and table["fingerprint"] == wanted else None


def partial_path(table: Path) -> Path:
    """Where an unfinished calibration keeps what it has measured, given where its table will go."""
    return table.with_name(f"{table.stem}.partial.json")


def _unfinished(partial: Path | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What was kept of the calibration with this very fingerprint, or an empty start; see `calibrate_table` for counts."""
    try:
        found = json.loads(partial.read_text(encoding="utf-8")) if partial is not None else None
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and found.get("fingerprint") == wanted:
        return found
    return {"fingerprint": wanted, "nfe": 0, "seconds": 0.0, "counts": []}


def calibrate(run: Run, report: Report, partial: Path | None = None) -> dict[str, Any]:
    """Measure the table with the present weights, which should be the initial ones; all processes call it.

    The stochastic steps are those of `plan_to_search`. Prompts are the training prompts that the run visits, in another
    order and each once as far as they suffice; noise is not training's either. The generators that rewards may draw
    from are left as they were. partial: file that keeps what is measured after every iteration and from which the same
    calibration goes on exactly; who stores the table deletes it.

    Raises: UserError for a broken reward or too many missing scores; Stopped when asked to stop.
    """
    settings, plan = run.config.calibration, plan_to_search(run.config.sampler)
    processes, rank = run.accelerator.num_processes, run.accelerator.process_index
    if settings.samples < processes:
        raise UserError(f"calibration.samples: {settings.samples} images cannot be split over {processes} processes")
    trial, pool = _trial(run), _pool(run)
    weights = {name: reward.weight for name, reward in trial.config.rewards.items()}
    mine = list(range(settings.samples))[rank::processes]
    groups = math.ceil(settings.samples / trial.config.train.group_size)
    state = _unfinished(partial, fingerprint(run))
    run.accelerator.wait_for_everyone()  # nobody writes or deletes it before all have looked
    started = time.perf_counter() - state["seconds"]

    def gains(sigmas: Tensor, iteration: int) -> Tensor:
        if run.stop_requested():
            raise Stopped("stopped before the calibration was done; the same command continues it")
        number = FIRST_ITERATION + iteration
        set_seed((settings.seed + iteration) % 2**32)  # each iteration its own, so that one can go on from any of them
        prompts = [pool[i] for i in prompt_indices(len(pool), groups, number, settings.seed)]
        trial.noise_levels = sigmas
        batch = collect(trial, prompts, mine, number, settings.seed, _silent, with_values=True, plan=plan)
        scores = score_values(trial, prompts, batch, settings.samples, _silent)
        state["nfe"] += run.total(batch.nfe)
        values, valid = combine(scores.values, scores.valid, weights)
        missing = 1 - float(valid.double().mean())
        if missing > run.config.train.max_invalid_fraction:
            raise UserError(
                f"calibration: {missing:.0%} of the scores are missing, more than train.max_invalid_fraction"
            )
        return values.diff(dim=1)

    def keep(counts: Tensor) -> None:
        state["counts"].append(counts.tolist())
        state["seconds"] = time.perf_counter() - started
        if run.main and partial is not None:
            write_json(partial, state)

    before, done = rng_state(), [torch.tensor(counts) for counts in state["counts"]]
    try:
        result = calibrate_table(gains, run.grid, plan.stochastic, settings, report, done, keep)
    finally:
        restore_rng(before)
    _warn(run, result, plan)
    return _table(result, state)


def _warn(run: Run, result: CalibrationResult, plan: Plan) -> None:
    if not result.settled:
        last = f"the noise table still moved after {result.iterations} iterations"
        run.warn_once("psi", f"{last}; if its chart shows a drift and not a jitter, raise calibration.iterations")
    weak = [str(k) for k, hardly in zip(plan.stochastic, result.hardly_measured().tolist(), strict=True) if hardly]
    if weak:
        run.warn_once(
            "psi_hardly",
            f"the noise of step(s) {', '.join(weak)} was hardly measured: fewer than {HARDLY_MEASURED:.0%} of the images "
            "gained or lost reward there, so the level found says little; use a finer reward, or a window without them",
        )


def _table(result: CalibrationResult, state: Mapping[str, Any]) -> dict[str, Any]:
    def rounded(values: Tensor) -> list[list[float]]:
        return [[round(x, 6) for x in row] for row in values.tolist()]

    return {
        "fingerprint": state["fingerprint"],
        "sigma": result.sigmas.tolist(),
        "multiplier": result.multipliers.tolist(),
        "settled": result.settled,
        "iterations": result.iterations,
        "nfe": state["nfe"],
        "seconds": round(state["seconds"], 3),
        "history": rounded(result.history),
        "up": rounded(result.up),
        "down": rounded(result.down),
    }


def _trial(run: Run) -> Run:
    """The run as the calibration sees it: same model and counters, its noise table free, a prompt for every image."""
    config = run.config
    rewards = {name: reward for name, reward in config.rewards.items() if reward.weight != 0}
    whole_groups = any(run.rewards[name].kind == "groupwise" for name in rewards)
    train = dataclasses.replace(config.train, group_size=config.train.group_size if whole_groups else 1)
    return dataclasses.replace(run, config=dataclasses.replace(config, rewards=rewards, train=train), kernel="psi_sde")


def _pool(run: Run) -> list[Prompt]:
    # the prompts that training visits are the ones embedded before the text encoders were released
    known = set(used_prompts(run.config, run.train_prompts))
    return [prompt for prompt in run.train_prompts if prompt.text in known]


def _silent(stage: str, done: int, total: int) -> None:
    """A report that nobody reads: an iteration of the calibration is one step of its progress."""


@contextlib.contextmanager
def calibration_progress(console: Console) -> Iterator[Report]:
    """A report that shows the calibration as a bar, from the first report on, or as a line every ten iterations."""
    columns = (TextColumn("calibrating noise"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        tasks: list[Any] = []

        def report(stage: str, done: int, total: int) -> None:
            if not tasks:
                tasks.append(bar.add_task(stage, completed=done))
            bar.update(tasks[0], completed=done, total=total)
            if not console.is_terminal and (done % 10 == 0 or done == total):
                console.print(f"calibrating noise: {done} of {total} iterations", highlight=False)

        yield report


def run_calibration(config: Config, out: Path | None, console: Console) -> Path:
    """Measure the table of `config` and write it to `out` (default: where `sampler.psi: auto` finds it), with a chart.

    Raises: UserError for anything a person can put right.
    """
    if config.sampler.kernel != "flow_sde":
        raise UserError(f"sampler.kernel: only flow_sde takes a noise table, got '{config.sampler.kernel}'")
    with tempfile.TemporaryDirectory() as scratch:
        # a run that leaves nothing behind, starts from the base and measures only what it trains
        plain = dataclasses.replace(
            config,
            output_dir=scratch,
            trackers=[],
            eval_rewards={},
            sampler=dataclasses.replace(config.sampler, psi=None),
            eval=dataclasses.replace(config.eval, prompts=1),
            checkpoint=dataclasses.replace(config.checkpoint, resume="auto"),
        )
        run = start(plain, console)
        path = out or cache_path(config, fingerprint(run))
        with calibration_progress(run.console) as report:
            table = calibrate(run, report, partial_path(path))
        if run.main:
            save_table(path, table)
            partial_path(path).unlink(missing_ok=True)
            draw_chart(path.with_suffix(".png"), table)
        run.console.print(_summary(table))
        run.console.print(f"table  {path}\nchart  {path.with_suffix('.png')}", highlight=False, soft_wrap=True)
    return path


def _summary(table: Mapping[str, Any]) -> Table:
    state = "settled" if table["settled"] else "not settled"
    title = f"noise per step, {state} after {table['iterations']} iterations, {table['nfe']:,} network evaluations"
    shown = Table(title=title, title_justify="left", title_style="bold")
    for column in ("step", "t", "sigma before", "sigma", "multiplier", "gain > 0", "gain < 0"):
        shown.add_column(column, justify="right")
    last = zip(ends(table["up"])[1], ends(table["down"])[1], strict=True)
    found = dict(zip(searched_steps(table), last, strict=True))
    for k, sigma in enumerate(table["sigma"]):
        shares = [f"{share:.0%}" for share in found[k]] if k in found else ["-", "-"]
        numbers = [table["fingerprint"]["grid"][k], table["history"][0][k], sigma, table["multiplier"][k]]
        shown.add_row(str(k), *(f"{x:.3f}" for x in numbers), *shares)
    return shown
