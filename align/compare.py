"""`align compare`: several runs on one page: what each one reached at what cost, their curves, and their pictures.

Pictures of a row start from the same noise: one pipeline takes the adapters of the runs one after another.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from align.charts import compact
from align.checkpoint import checkpoints
from align.compare_curves import (
    COLOURS,
    Overlay,
    chosen_costs,
    chosen_metrics,
    is_crowded,
    overlays,
    save_curves,
    style_of,
)
from align.compare_runs import (
    Entry,
    Pair,
    base_model,
    deployed_guidance,
    differing_settings,
    held_out,
    method,
    objective,
    open_runs,
    paired_differences,
    remarks,
    reward_settings,
    rows,
    spread,
)
from align.confidence import use_stored
from align.errors import UserError
from align.grids import format_score
from align.inference import Share, chosen_prompts, compare, load_target, ready_reward
from align.prompts import load_prompts
from align.report import Score, cost_so_far, data_uri, duration, iterations_done, write_page
from align.runfolder import NAN, number_of
from align.tracking import write_json
from align.train import save_comparison
from rewards.base import Reward, RewardError
from rewards.registry import RewardConfig

ROWS = 8
MOST_NAMES = 4
MOST_PAIRS = 12
NARROWEST = 8
STYLES = {"better": "green", "worse": "red", "unclear": "", "unknown": "dim"}


@dataclass
class Comparison:
    """All that is known of the runs before a picture is drawn; `notes` says in words what cannot be compared."""

    entries: list[Entry]
    scores: dict[str, list[Score]]
    pairs: list[Pair]
    panels: list[list[Overlay]]
    notes: list[str] = field(default_factory=list)


def compare_runs(
    paths: Sequence[str],
    console: Console,
    *,
    prompts: str | None = None,
    count: int = ROWS,
    seed: int | None = None,
    metrics: Sequence[str] = (),
    costs: Sequence[str] = (),
    out: Path | None = None,
    pictures: bool = True,
) -> Path:
    """Write compare.json, curves.png, grid.png (unless not `pictures`) and compare.html of the runs; returns the folder.

    `prompts` and `count`: rows of the grid (default: the first run's held-out prompts); `seed`: of its noise (default:
    the first run's). `metrics`, `costs`: what is drawn against what (default: rewards, against all three costs).
    Raises: UserError if a path is no run, a metric is in none, or the pictures of these runs cannot be compared.
    """
    entries = open_runs(paths)
    names, kinds = chosen_metrics(entries, metrics), chosen_costs(costs)
    adapters, remarks_on_pictures = _adapters(entries) if pictures else ({}, [])
    if prompts is not None:
        load_prompts(prompts)  # a mistake is told now, not after the model is loaded
    folder = out or _default_folder(entries)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: there is a file of this name; give a folder")
    pairs, unpaired = paired_differences(entries)
    found = Comparison(
        entries,
        {entry.label: held_out(entry) for entry in entries},
        pairs,
        overlays(entries, names, kinds),
        remarks(entries) + unpaired + remarks_on_pictures,
    )
    write_json(folder / "compare.json", {"rows": rows(entries, pairs), "notes": found.notes})
    if found.panels:
        save_curves(folder / "curves.png", found.panels, [entry.label for entry in entries])
    print_comparison(found, console)
    before = len(found.notes)
    made = _draw_grid(found, adapters, folder / "grid.png", prompts, count, seed, console) if adapters else None
    _print_notes(found.notes[before:], console)
    command = shlex.join(["align", "compare", *paths, *_options(prompts, count, seed, metrics, costs, out, pictures)])
    write_page(folder / "compare.html", "compare.html.j2", _context(found, made, folder, command))
    written = {"curves": "curves.png", "grid": "grid.png", "scores": "compare.json", "page": "compare.html"}
    for what, name in written.items():
        if (what != "curves" or found.panels) and (what != "grid" or made is not None):
            console.print(f"{what:8}{folder / name}", markup=False, highlight=False, soft_wrap=True)
    return folder


def _default_folder(entries: Sequence[Entry]) -> Path:
    names = [entry.label.strip("/").replace("/", "-") for entry in entries]
    more = [f"and-{len(names) - MOST_NAMES}-more"] if len(names) > MOST_NAMES else []
    return Path("outputs") / "-".join(["compare", *names[:MOST_NAMES], *more])


def _adapters(entries: Sequence[Entry]) -> tuple[dict[str, Path], list[str]]:
    """Adapter folder of each run that has one, and notes. Raises: UserError if the runs have no base in common."""
    for entry in entries:
        if not base_model(entry):
            raise UserError(
                f"{entry.run.path}: config.yaml does not name the base model, so no picture can be made; "
                "--no-grid compares the rest"
            )
    if models := spread(entries, base_model):
        raise UserError(f"no grid of runs with different base models: {models}; --no-grid compares the rest")
    found, notes = {}, []
    for entry in entries:
        saved = checkpoints(entry.run.path)
        final, latest = entry.run.path / "adapter", saved[-1] / "adapter" if saved else None
        if any(final.glob("*.safetensors")):
            found[entry.label] = final
        elif latest is not None:
            found[entry.label] = latest
            notes.append(f"pictures of {entry.label} are from its checkpoint {latest.parent.name}")
        else:
            notes.append(f"no pictures of {entry.label}: it has neither an adapter nor a checkpoint yet")
    return found, notes


def _draw_grid(
    found: Comparison,
    adapters: Mapping[str, Path],
    path: Path,
    prompts: str | None,
    count: int,
    seed: int | None,
    console: Console,
) -> str:
    """Write the grid of base and `adapters`; returns in words how the pictures were made. Adds to `found.notes`."""
    first = found.entries[0]
    with console.status("loading the model"):
        setup = load_target(str(first.run.path), str(next(iter(adapters.values()))), seed=seed)
        rewards = _rewards(found, setup.model.device)
    chosen = chosen_prompts(setup, prompts, count)
    shares = {label: [Share(folder)] for label, folder in adapters.items()}
    columns = compare(setup, rewards, chosen, console, keep=len(chosen), adapters=shares)
    save_comparison(path, columns, len(chosen))
    for entry in found.entries[1:]:
        if (entry.setting("eval.num_steps"), deployed_guidance(entry)) != (setup.num_steps, setup.guidance_scale):
            found.notes.append(f"pictures of {entry.label} are made with the steps and guidance of {first.label}")
    return f"{setup.num_steps} steps, guidance {setup.guidance_scale}, seed {setup.seed}"


def _rewards(found: Comparison, device: torch.device) -> dict[str, Reward]:
    """The rewards of all runs; one that is not the same everywhere bears the run's label, one that fails is noted."""
    rewards: dict[str, Reward] = {}
    known: dict[str, Mapping[str, Any]] = {}
    for entry in found.entries:
        for name in [*(entry.setting("rewards") or {}), *(entry.setting("eval_rewards") or {})]:
            settings = reward_settings(entry, name)
            label = name if known.get(name, settings) == settings else f"{name} ({entry.label})"
            if settings is None or label in known:
                continue
            known[label] = settings
            try:
                rewards[label] = ready_reward(name, RewardConfig(**settings), device)
                use_stored({name: rewards[label]}, entry.run.path)
            except RewardError as problem:
                found.notes.append(f"pictures are without this score: {problem}")
    return rewards


def print_comparison(found: Comparison, console: Console) -> None:
    """The table of runs, that of paired differences, and the notes."""
    rewards = list(dict.fromkeys(score.reward for scores in found.scores.values() for score in scores))
    one = len(rewards) == 1
    table = _table(
        f"{rewards[0]} on held-out prompts" if one else "on held-out prompts",
        ["run"] if one else ["run", "reward"],
        ["base", "tuned", "change, 95 %", "iters", "nfe", "time"],
    )
    for entry in found.entries:
        name, costs = Text.assemble(entry.label, "\n", (method(entry), "dim")), costs_of(entry)
        for score in found.scores[entry.label] or [Score("", NAN, NAN, NAN, NAN, 0)]:
            change = Text(change_text(score, so_far=not _evaluated(entry)), STYLES[score.verdict])
            numbers: list[RenderableType] = [format_score(score.base), format_score(score.tuned), change, *costs]
            table.add_row(name, *([] if one else [Text(score.reward)]), *numbers)
            name, costs = Text(), [""] * len(costs)
    console.print(table)
    shown = [p for p in found.pairs if len(found.pairs) <= MOST_PAIRS or p.against == found.entries[0].label]
    if shown:
        more = f", {len(shown)} of {len(found.pairs)}, all in compare.json" if len(shown) < len(found.pairs) else ""
        table = _table(
            f"tuned minus tuned, by prompt{more}", ["run", "minus", "reward"], ["difference, 95 %", "prompts"]
        )
        for pair in shown:
            change = Text(change_text(pair.score), STYLES[pair.score.verdict])
            table.add_row(Text(pair.run), Text(pair.against), Text(pair.score.reward), change, str(pair.score.n))
        console.print(table)
    _print_notes(found.notes, console)


def _print_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Names on the `left`, numbers on the `right`; where room is short names are folded, intervals last of all."""
    table = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in left:
        table.add_column(name, overflow="fold", min_width=NARROWEST)
    for name in right:
        table.add_column(name, justify="right", no_wrap="95 %" in name, min_width=5)
    return table


def _evaluated(entry: Entry) -> bool:
    return entry.finished or entry.run.tuned is not None


def change_text(score: Score, so_far: bool = False) -> str:
    """'+0.142 [+0.106, +0.180]'; without an interval the change alone, of an unfinished run marked as such."""
    if not math.isfinite(score.delta):
        return "n/a"
    known = score.verdict != "unknown"
    numbers = [score.delta, *([score.low, score.high] if known else [])]
    reach = max(map(abs, numbers))
    digits = 1 if reach >= 100 else 2 if reach >= 10 else max(3, 1 - math.floor(math.log10(reach or 1)))
    first, *ends = (f"{value:+.{digits}f}".replace("-", "−") for value in numbers)
    return f"{first} [{', '.join(ends)}]" if known else f"{first} so far" if so_far else first


def costs_of(entry: Entry) -> list[str]:
    """Iterations, network evaluations and time, written: ['20 of 40', '38.4k', '2 min 20 s']."""
    done, planned = iterations_done(entry.run), number_of(entry.setting("train.iterations"))
    iterations = f"{done:.0f}" if math.isfinite(done) else "n/a"
    if not entry.finished and math.isfinite(planned):
        iterations += f" of {planned:.0f}"
    return [iterations, compact(cost_so_far(entry.run, "nfe")), duration(cost_so_far(entry.run, "seconds"))]


def _options(
    prompts: str | None,
    count: int,
    seed: int | None,
    metrics: Sequence[str],
    costs: Sequence[str],
    out: Path | None,
    pictures: bool,
) -> list[str]:
    """The options that differ from their defaults, as they are typed."""
    given = [("--prompts", prompts), ("--rows", None if count == ROWS else count), ("--seed", seed), ("--out", out)]
    words = [str(word) for name, value in given if value is not None for word in (name, value)]
    words += [word for name, values in (("--metric", metrics), ("--x", costs)) for v in values for word in (name, v)]
    return words if pictures else [*words, "--no-grid"]


def _context(found: Comparison, made: str | None, folder: Path, command: str) -> dict[str, Any]:
    """What the page shows; `made` says how the pictures were made, None without any."""
    entries = found.entries
    styles = [style_of(number) for number in range(len(entries))]
    return {
        "runs": [
            {
                "label": entry.label,
                "style": style,
                "method": method(entry),
                "objective": objective(entry),
                "finished": entry.finished,
                "costs": costs_of(entry),
                "scores": [(score, change_text(score, not _evaluated(entry))) for score in found.scores[entry.label]],
            }
            for entry, style in zip(entries, styles, strict=True)
        ],
        "pairs": [(pair, change_text(pair.score)) for pair in found.pairs],
        "reach": _reach([score for scores in found.scores.values() for score in scores]),
        "pair_reach": _reach([pair.score for pair in found.pairs]),
        "panels": found.panels,
        "crowded": is_crowded(entries),
        "colours": COLOURS,
        "grid": None if made is None else data_uri(folder / "grid.png"),
        "made": made,
        "settings": differing_settings(entries),
        "notes": found.notes,
        "command": command,
    }


def _reach(scores: Sequence[Score]) -> dict[str, float]:
    """reward -> the furthest end of all its intervals: one scale for the bars that are compared."""
    reach = dict.fromkeys((score.reward for score in scores), 0.0)
    for score in scores:
        reach[score.reward] = max([reach[score.reward], *(abs(v) for v in (score.low, score.high) if math.isfinite(v))])
    return reach
