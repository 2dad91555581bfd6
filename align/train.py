"""Entry of a run: `accelerate launch -m align.train CONFIG [key=value ...]`."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate.utils import set_seed
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from align.calibrate import apply_psi
from align.checkpoint import export_adapter
from align.confidence import fit_rewards, settle, tell_rewards
from align.config import Config, load_config, to_yaml
from align.config_checks import without_effect
from align.control_data import check_conditions, check_examples
from align.diversity import measure
from align.errors import UserError
from align.evaluate import Evaluation, conditions_of, evaluate, half_width, paired_interval
from align.geometry import geometry, geometry_table, memory_estimate
from align.grids import as_image, comparison_grid, save_png
from align.hacking_report import metrics_of, parts_of_trained, warning_of
from align.launch import follow_launcher, spread_over_cpus
from align.loops import iteration_of
from align.prompts import load_prompts
from align.report import write_report
from align.run import Run, check_gradients, deploy_guidance, restore_rng, rng_state, start
from align.scoring import RewardFailure, Scores
from align.snapshots import keep_snapshot
from align.step import Interrupted
from align.tracking import write_json
from align.trainable import check_trainable, fixed_rewards
from rewards.base import RewardError
from rewards.registry import build_reward


def train_command(
    config: Annotated[str, typer.Argument(help="YAML file of the run")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings that win over the file, as in train.iterations=20")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything that needs no model; print config, geometry and memory")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Fine-tune a model towards a reward, or continue the run if it was stopped.

    On several GPUs: accelerate launch -m align.train CONFIG [key=value ...]
    """
    console = Console()
    with readable_errors(console, debug):
        settings = load_config(config, overrides or [])
        if dry_run:
            print_plan(settings, console)
        else:
            train(settings, console)


@contextlib.contextmanager
def readable_errors(console: Console, debug: bool) -> Iterator[None]:
    """Turn UserError and RewardError into their own lines and exit status 1; everything else keeps its traceback."""
    try:
        yield
    except (UserError, RewardError) as problem:
        if debug:
            raise
        for line in str(problem).splitlines():
            console.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


def print_plan(config: Config, console: Console) -> None:
    """What `--dry-run` shows: resolved config, batch geometry, parameters and memory. Raises: as `train` would."""
    trained, held_out = load_prompts(config.prompts.train), load_prompts(config.prompts.eval)
    rewards = {name: build_reward(name, r) for name, r in {**config.rewards, **config.eval_rewards}.items()}
    check_gradients(config, rewards, trained)
    check_trainable(config, rewards, trained)
    if config.objective.type == "condition_consistency":  # whether it needs labels, its network will say
        check_examples(trained, 0, "prompts.train")
        check_conditions(held_out[: config.eval.prompts], "prompts.eval")
    console.print(to_yaml(config), markup=False, highlight=False)
    console.print(f"{len(trained):,} training prompts, {min(len(held_out), config.eval.prompts):,} for evaluation")
    console.print(geometry_table(config, geometry(config, 1)))
    _print_notes(config, console)
    numbers = memory_estimate(config)
    table = Table(title="size (memory is an estimate)", title_justify="left", show_header=False, title_style="bold")
    for key, value in numbers.items():
        name, unit = key.rsplit("_", 1)
        table.add_row(f"{name.replace('_', ' ')}", f"{value:,.2f} GiB" if unit == "gib" else f"{value:,} {unit}")
    console.print(table)


def notes(config: Config) -> list[str]:
    """What a person may not have meant, one line each."""
    lines, watched = without_effect(config), config.early_stop.reward
    if watched in parts_of_trained(asdict(config)):
        lines.append(f"early_stop.reward: '{watched}' is a part of what is trained and rises with it; watch another")
    return lines


def _print_notes(config: Config, console: Console) -> None:
    for line in notes(config):
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


def train(config: Config, console: Console) -> dict[str, Any] | None:
    """Run `config` to its end; returns the summary, or None when stopped by SIGTERM (a checkpoint is then written).

    Raises: UserError for anything a person can put right.
    """
    set_seed(config.train.seed)
    run = start(config, console)
    console = run.console  # silent on all processes but one
    console.print(geometry_table(config, run.shape))
    _print_notes(config, console)
    base = _evaluate_base(run)
    _watch_base(run, base)
    apply_psi(run)
    with _progress(console) as bar:
        task = bar.add_task("iteration", total=config.train.iterations, completed=run.counters.iteration, stage="")
        while run.counters.iteration < config.train.iterations and not run.stopped:
            if run.stop_requested() or not _one_iteration(run, bar, task):
                run.save()
                console.print(
                    f"stopped: checkpoint of iteration {run.counters.iteration} written; the same command continues"
                )
                run.accelerator.end_training()
                return None
            done, last = run.counters.iteration, run.counters.iteration == config.train.iterations
            # the end has an evaluation of its own, but it may be of other weights than the last iteration's
            due = run.watch is not None if last else config.eval.every > 0 and done % config.eval.every == 0
            if due:
                _evaluate_during(run, bar, task)
            if last or run.stopped or done % config.checkpoint.every == 0:
                run.save()
    summary = finish(run, base)
    run.accelerator.end_training()
    return summary


def _watch_base(run: Run, base: Evaluation) -> None:
    """Begin the record of the watched reward, or say of a continued run that it had stopped early."""
    watch = run.watch
    if watch is not None and not watch.means:
        watch.add(0, _watched_mean(run, base))
    if watch is not None and run.stopped:
        _say(run, f"nothing to train: the run stopped early, at iteration {run.counters.iteration}: {watch.reason()}")


def _evaluate_during(run: Run, bar: Progress, task: Any) -> None:
    """An evaluation during the run, which may end it."""
    config, done, watch = run.config, run.counters.iteration, run.watch
    tuned = _evaluate_tuned(run, config.eval.during, run.evaluated(), bar, task)
    _log_evaluation(run, tuned, config.eval.during)
    if watch is None:
        return
    with run.evaluated():
        watch.add(done, _watched_mean(run, tuned))
    if run.stopped:
        _say(run, f"stopped at iteration {done}: {watch.reason()}")


def _say(run: Run, line: str) -> None:
    run.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _watched_mean(run: Run, evaluation: Evaluation) -> float:
    """Mean of the watched reward, the same on all processes; NaN without any score."""
    scores = evaluation.scores.values[run.config.early_stop.reward or ""]
    return float(scores[: run.config.eval.during].double().nanmean())


def _one_iteration(run: Run, bar: Progress, task: Any) -> bool:
    def report(stage: str, done: int, total: int) -> None:
        bar.update(task, stage=f"{stage} {done}/{total}")

    index, before, updates = run.counters.iteration, rng_state(), run.counters.updates
    try:
        metrics = iteration_of(run.config)(run, report)
    except Interrupted:
        restore_rng(before)  # the iteration will be done again
        return False
    except RewardFailure as problem:
        if not index or run.counters.updates > updates:
            raise
        restore_rng(before)  # no weight has changed: what was learnt so far is kept
        run.save()
        raise UserError(
            f"{problem}; a checkpoint of iteration {index} is written, the same command goes on from there"
        ) from problem
    assert run.tracker is not None
    run.tracker.log("train", index, metrics)
    bar.update(task, completed=index + 1, stage="")
    reward = metrics.get("reward/mean", float("nan"))
    if not run.console.is_terminal and (index % 10 == 0 or index + 1 == run.config.train.iterations):
        run.console.print(f"iteration {index}: reward {reward:.4f}, {run.counters.seconds:.0f} s", highlight=False)
    bar.update(task, description=f"iteration · reward {reward:.3f}")
    return True


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[stage]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _evaluate(
    run: Run, count: int, keep: int, weights: Any, on_progress: Any = None, before_scoring: Any = None
) -> Evaluation:
    config, before = run.config, rng_state()
    settings: dict[str, Any] = {
        "num_steps": config.eval.num_steps,
        "guidance_scale": deploy_guidance(config),
        "seed": config.eval.seed,
        "batch_size": config.train.rollout_batch,
    }
    with weights:
        evaluation = evaluate(
            run.model,
            fixed_rewards(run.rewards),
            run.eval_prompts[:count],
            run.accelerator,
            keep_images=keep,
            progress=on_progress,
            before_scoring=before_scoring,
            required=count >= len(run.eval_prompts),  # of a few prompts, a reward may have nothing to say
            **settings,
        )
        if run.embedder is not None:
            wanted = config.eval.diversity
            prompts = run.eval_prompts[: wanted.prompts]
            evaluation.diversity = measure(run.model, run.embedder, prompts, wanted.images, run.accelerator, **settings)
    restore_rng(before)  # what rewards draw while they only measure must not change the training
    return evaluation


def _evaluate_base(run: Run) -> Evaluation:
    """Scores and grid images of the base model; read back from the run's folder when it continues."""
    folder, config = run.config.run_dir, run.config.eval
    tell_rewards(run)
    waiting = any(reward.needs_reference for reward in run.rewards.values())
    stored = _stored_base(run) if run.counters.iteration and not waiting else None
    if stored is not None:
        return stored
    with _progress(run.console) as bar:
        task = bar.add_task("evaluating the base", total=len(run.eval_prompts), stage="")

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        fit = functools.partial(fit_rewards, run)
        base = _evaluate(run, config.prompts, config.grid_prompts, run.model.reference(), on_progress, fit)
    settle(run, base)
    if run.main:
        for i, image in enumerate(base.images):
            save_png(as_image(image), folder / "samples" / "base" / f"{i:04d}.png")
        write_json(folder / "eval" / "base.json", base.to_json())
    if run.counters.iteration == 0:
        _log_evaluation(run, base, config.during)
    return base


def _stored_base(run: Run) -> Evaluation | None:
    """The base evaluation in the run's folder, if it was made with the present prompts and settings."""
    folder, config = run.config.run_dir, run.config.eval
    path = folder / "eval" / "base.json"
    pictures = sorted((folder / "samples" / "base").glob("*.png"))
    if not path.is_file() or len(pictures) != min(config.grid_prompts, len(run.eval_prompts)):
        return None
    try:
        images = torch.stack([pil_to_tensor(Image.open(p).convert("RGB")).float() / 255 for p in pictures])
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RuntimeError, json.JSONDecodeError):
        return None  # damaged files: the base is evaluated again
    same: dict[str, Any] = {
        "prompts": [p.text for p in run.eval_prompts],
        "num_steps": config.num_steps,
        "seed": config.seed,
    }
    same["guidance_scale"] = deploy_guidance(run.config)
    same["metadata"] = json.loads(json.dumps([p.metadata for p in run.eval_prompts]))  # conditions too are part of it
    if any(data.get(k) != v for k, v in same.items()) or set(data["scores"]) != set(fixed_rewards(run.rewards)):
        return None
    values = {k: torch.tensor([float("nan") if x is None else x for x in v]) for k, v in data["scores"].items()}
    scores = Scores(values, {k: ~v.isnan() for k, v in values.items()})
    return Evaluation(run.eval_prompts, scores, images, config.num_steps, data["guidance_scale"], config.seed)


def _evaluate_tuned(run: Run, count: int, weights: Any, bar: Progress, task: Any) -> Evaluation:
    def on_progress(done: int, total: int) -> None:
        bar.update(task, stage=f"evaluating {done}/{total}")

    shown = run.config.eval
    keep = max(shown.pictures, shown.grid_prompts if count >= len(run.eval_prompts) else 0)
    return _evaluate(run, count, keep, weights, on_progress)


def _log_evaluation(run: Run, evaluation: Evaluation, count: int) -> None:
    # always over the same first prompts, so that the curve compares like with like
    values: dict[str, float] = {"seconds": run.counters.seconds, "nfe": run.counters.nfe}
    for name, scores in evaluation.scores.values.items():
        values[f"eval/{name}"] = float(scores[:count].double().nanmean())
        values[f"eval/{name}_ci95"] = half_width(scores[:count])
    values |= evaluation.diversity
    assert run.tracker is not None
    folder, done = run.config.run_dir, run.counters.iteration
    if done and run.main:
        values |= metrics_of(folder, values)
    run.tracker.log("eval", done, values)
    if done and run.main:  # of the base, eval/base.json and samples/base say the same
        keep_snapshot(folder, done, evaluation, count, run.config.eval.pictures)
        if line := warning_of(folder):
            run.warn_once("hacking", line)


def finish(run: Run, base: Evaluation) -> dict[str, Any]:
    """Final evaluation, adapter, grid, report and summary.json of a completed run."""
    config, folder = run.config, run.config.run_dir
    if run.watch is not None and run.best is not None:
        _say(run, f"the result is that of iteration {run.best}, {run.watch.choice()}")
    with _progress(run.console) as bar:
        task = bar.add_task("evaluating the tuned model", total=None, stage="")
        tuned = _evaluate_tuned(run, len(run.eval_prompts), run.result(), bar, task)
    if run.best is None:  # rows are of the iteration's own weights
        _log_evaluation(run, tuned, config.eval.during)
    summary: dict[str, Any] = {}
    if run.main:
        write_json(folder / "eval" / "tuned.json", tuned.to_json())
        with run.result():
            adapter = export_adapter(run.model, folder / run.model.result_name)
        grid = save_comparison(
            folder / "grids" / "base_vs_tuned.png",
            {"base": base, "tuned": tuned},
            config.eval.grid_prompts,
            conditions_of(run.model, base.prompts[: config.eval.grid_prompts]),
        )
        deltas = {
            name: paired_interval(base.scores.values[name], tuned.scores.values[name]) for name in base.scores.values
        }
        summary = {
            "base": {name: base.scores.mean(name) for name in base.scores.values},
            "tuned": {name: tuned.scores.mean(name) for name in tuned.scores.values},
            "delta_ci95": deltas,
            "iterations": run.counters.iteration,
            "nfe": run.counters.nfe,
            "seconds": run.counters.seconds,
            run.model.result_name: str(adapter),
            "grid": str(grid),
            "report": str(folder / "report.html"),
        }
        if run.best is not None:
            summary["best_iteration"] = run.best
        write_json(folder / "summary.json", summary)
        write_report(folder)
        print_summary(summary, len(run.eval_prompts), run.console)
    run.accelerator.wait_for_everyone()
    return summary


def save_comparison(path: Path, columns: dict[str, Evaluation], count: int, conditions: Tensor | None = None) -> Path:
    """Grid of the first `count` prompts, one column per evaluation, scores under each cell; what was followed goes first."""
    first = next(iter(columns.values()))
    rows = min(count, len(first.prompts))
    followed = {} if conditions is None else {"condition": list(conditions[:count])}
    picture = comparison_grid(
        followed | {label: list(e.images[:count]) for label, e in columns.items()},
        [p.text for p in first.prompts[:count]],
        {
            label: {name: [float(x) for x in v[:count]] for name, v in e.scores.values.items()}
            for label, e in columns.items()
        },
        fold=2 if rows > 4 and len(columns) < 4 else 1,
    )
    save_png(picture, path)
    return path


def print_summary(summary: dict[str, Any], prompts: int, console: Console) -> None:
    """The result as a person reads it; without an adapter there is only the base."""
    if not summary["delta_ci95"]:
        for name, value in summary["base"].items():
            console.print(f"{name}: {value:.4f} over {prompts} prompts", highlight=False)
        console.print(f"grid    {summary['grid']}", highlight=False, soft_wrap=True)
        return
    table = Table(title=f"held-out, {prompts} prompts, same noise", title_justify="left", title_style="bold")
    for column in ("reward", "base", "tuned", "gain", "95 % interval"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    for name, base in summary["base"].items():
        tuned, (low, high) = summary["tuned"][name], summary["delta_ci95"][name]
        table.add_row(
            name,
            f"{base:.4f}",
            f"{tuned:.4f}",
            f"{tuned - base:+.4f}",
            f"[{low:+.4f}, {high:+.4f}]".replace("[", r"\["),
        )
    console.print(table)
    for key in ("adapter", "controlnet", "grid", "report"):
        if key in summary:
            console.print(f"{key:11}{summary[key]}", highlight=False, soft_wrap=True)


def main() -> None:
    """`python -m align.train`."""
    follow_launcher()
    spread_over_cpus(sys.argv[1:])
    typer.run(train_command)


if __name__ == "__main__":
    main()
