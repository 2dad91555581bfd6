"""What a person is told of a run's optimised and held-out rewards: on the console, and as the first section of a report."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from align.charts import Series, line_chart
from align.grids import comparison_grid
from align.hacking import FALL, RISE, Curve, Parting, Point, curve, diverged, parting
from align.runfolder import RunFolder, number_of, parse_config, read_run
from align.snapshots import base_std, kept_pictures, points


@dataclass(frozen=True)
class Finding:
    """The evaluations of a run in units of the base's scores, and where optimised and held-out rewards part."""

    points: list[Point]
    units: Mapping[str, float]
    optimised: Curve
    held_out: Curve
    parting: Parting | None

    def iteration(self, position: int) -> int:
        return self.points[position].iteration

    @property
    def last(self) -> int:
        """Position of the last evaluation at which both are known."""
        both = np.isfinite(self.optimised.changes) & np.isfinite(self.held_out.changes)
        return int(np.flatnonzero(both)[-1])


@dataclass(frozen=True)
class Advice:
    """Which weights to use, the command that does, and the one that trains again and keeps them; empty where needless."""

    text: str
    command: str = ""
    again: str = ""


@dataclass(frozen=True)
class Section:
    """What the template shows; `state` is a class of the page's CSS."""

    state: str
    said: str
    why: str
    chart: Markup = Markup("")
    legend: tuple[tuple[str, str], ...] = ()
    prompts: int = 0
    """Prompts behind the bands; 0 where the run kept no scores by prompt."""
    left_out: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    """Rewards of weight 0 that are part of what is trained."""
    picture: dict[str, Any] | None = None
    no_picture: str = ""
    advice: Advice | None = None


def roles(config: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """(optimised, held-out) rewards of a configuration as plain data, name -> weight; held-out ones weigh 1 each.

    A reward of weight 0 that is part of what is trained is neither (`parts_of_trained`).
    """
    optimised, watched = _by_weight(config)
    parts = parts_of_trained(config)
    return optimised, {name: 1.0 for name in watched if name not in parts}


def parts_of_trained(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Rewards that are only watched and yet of one kind with a trained one or a part of it: a member of its ensemble, the
    plain form of its corrected score. They rise with it, and would hide that others fall."""
    optimised, watched = _by_weight(config)
    rewards = _mapping(config.get("rewards"))
    trained = [kind for name in optimised for kind in _kinds(rewards.get(name))]
    return tuple(name for name, entry in watched.items() if _kind(entry) in trained)


def _by_weight(config: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Weights of the trained rewards, and the entries of the others."""
    entries = {str(k): v for k, v in _mapping(config.get("rewards")).items()}
    weights = {k: number_of(_mapping(v).get("weight", 1.0)) for k, v in entries.items()}
    watched = {k: entries[k] for k, w in weights.items() if w == 0}
    watched |= {str(k): v for k, v in _mapping(config.get("eval_rewards")).items()}
    return {k: w for k, w in weights.items() if math.isfinite(w) and w != 0}, watched


def _kinds(entry: Any) -> list[tuple[Any, Any]]:
    """A reward's kind and those of all rewards among its arguments."""
    if isinstance(entry, list):
        return [kind for value in entry for kind in _kinds(value)]
    own = [_kind(entry)] if "type" in _mapping(entry) else []
    return own + [kind for value in _mapping(entry).values() for kind in _kinds(value)]


def _kind(entry: Any) -> tuple[Any, Any]:
    """What makes two rewards the same: type and arguments."""
    return _mapping(entry).get("type"), _mapping(entry).get("args") or {}


def find(run: RunFolder, config: Mapping[str, Any]) -> Finding | None:
    """None where there is nothing to compare: no held-out reward, no evaluation of the base, or no spread in its scores."""
    optimised, held_out = roles(config)
    evaluations, units = points(run), base_std(run)
    known = _known(evaluations, units)
    if not set(optimised) & set(known) or not set(held_out) & set(known):
        return None
    first, second = curve(evaluations, known, optimised), curve(evaluations, known, held_out)
    return Finding(evaluations, known, first, second, parting(first, second))


def metrics_of(run_dir: Path, values: Mapping[str, float]) -> dict[str, float]:
    """`hacking/optimised` and `hacking/held_out` of the evaluation row `values`; neither without a base to compare with."""
    run = read_run(run_dir, only="eval")
    evaluations, units = points(run), base_std(run)
    if not evaluations:
        return {}
    now = Point(0, {n: number_of(values.get(f"eval/{n}")) for n in evaluations[0].means})
    units = _known(evaluations, units)
    kinds = zip(("hacking/optimised", "hacking/held_out"), roles(parse_config(run.config)), strict=True)
    return {key: float(curve([evaluations[0], now], units, of).changes[1]) for key, of in kinds if set(of) & set(units)}


def _known(evaluations: Sequence[Point], units: Mapping[str, float]) -> dict[str, float]:
    """Units of the rewards that have a level to count from: of one score alone no error is known."""
    base = evaluations[0] if evaluations else Point(0, {})
    alone = {n for n, values in base.scores.items() if sum(map(math.isfinite, values)) == 1}
    return {n: u for n, u in units.items() if n not in alone and math.isfinite(base.means.get(n, math.nan))}


def warning_of(run_dir: Path) -> str | None:
    """One line for the console if the run's evaluations so far say that its reward is hacked."""
    run = read_run(run_dir, only="eval")
    config = parse_config(run.config)
    found = find(run, config)
    if found is None or found.parting is None:
        return None
    best, now = found.parting.best, found.last
    source = f"at iteration {found.iteration(best)}" if found.iteration(best) else "the base's"
    fall = found.held_out.changes[best] - found.held_out.changes[now]
    return (
        f"the reward is being hacked: in std of the base's scores, what is trained ({_and(found.optimised.names)}) is up by "
        f"{found.optimised.changes[now]:.2f}, what is only watched ({_and(found.held_out.names)}) down by {fall:.2f} from "
        f"its best, {source}; `{shlex.join(['align', 'report', str(run_dir)])}` shows it"
        + ("" if _mapping(config.get("early_stop")).get("reward") else ", and early_stop.reward ends such a run")
    )


def section(run: RunFolder, config: Mapping[str, Any]) -> Section | None:
    """None for a run without an optimised reward or any evaluation."""
    optimised, held_out = roles(config)
    if not optimised or not run.evals:
        return None
    found = find(run, config)
    if found is None or len(found.points) < 2:
        return Section("unknown", "", _nothing_to_compare(run, optimised, held_out, found))
    return replace(
        _hacked(run, config, found) if found.parting else _agreement(found),
        chart=Markup(_chart(found)),
        legend=_legend(found),
        prompts=found.held_out.prompts,
        left_out=tuple(n for n in (*optimised, *held_out) if n not in found.units),
        parts=parts_of_trained(config),
    )


def _hacked(run: RunFolder, config: Mapping[str, Any], found: Finding) -> Section:
    assert found.parting is not None
    best, last = found.parting.best, found.last
    start, alarm = found.iteration(best), found.iteration(found.parting.alarm)
    one, two = found.optimised.changes, found.held_out.changes
    since = f"Since iteration {start}" if start else "From the start"
    why = (
        f"{since}, what is trained ({_and(found.optimised.names)}) went from {_units(one[best])} to {_units(one[last])} "
        f"while what is only watched ({_and(found.held_out.names)}) fell from {_units(two[best])} to {_units(two[last])}. "
        f"Beyond doubt from the evaluation at iteration {alarm} on."
    )
    said = f"Hacked from iteration {start} on" if start else "Hacked from the start"
    picture, missing = _pictures(run, found)
    advice = _advice(run, config, found)
    return Section("worse", said, why, picture=picture, no_picture=missing, advice=advice)


def _agreement(found: Finding) -> Section:
    last = found.last
    best = int(np.nanargmax(found.held_out.changes[: last + 1]))
    rise, held = found.optimised.changes[last], found.held_out.changes[last]
    numbers = f"At the last evaluation: {_and(found.optimised.names)} {_units(rise)}, {_and(found.held_out.names)} {_units(held)}."
    if found.held_out.changes[best] - held < FALL:
        if rise < RISE:
            return Section("unclear", "No sign of hacking, and little change so far", numbers)
        return Section("better" if held > 0 else "unclear", "No sign of hacking", numbers)
    if diverged(found.optimised, best, last):
        said = "The held-out rewards fell, and the optimised one did not rise with that"
        return Section("unclear", said, f"{numbers} That is a run that diverges, not a hacked reward.")
    said = "Perhaps hacked: the held-out rewards fell, but not all of it is beyond doubt"
    return Section("unclear", said, f"{numbers} More prompts (eval.during) would tell.")


def _nothing_to_compare(
    run: RunFolder, optimised: Mapping[str, float], held_out: Mapping[str, float], found: Finding | None
) -> str:
    if not held_out:
        return (
            "This run cannot tell whether its reward was hacked: every reward it evaluates is trained, or a part of one that "
            "is. Add one that is only watched, for example eval_rewards: {clip: {type: clip}}, or a reward of weight 0."
        )
    if found is not None and len(run.evals) > 1:
        return "No other evaluation was made with the settings of eval/base.json (steps, guidance, seed)."
    if found is not None:
        return "One evaluation so far, that of the base: nothing has changed yet."
    if not points(run):
        return "The base was not evaluated with the run (eval.every above 0), so there is nothing to count from."
    flat = [n for n in (*optimised, *held_out) if n not in base_std(run)]
    return (
        f"The base model's scores of {_and(flat)} in eval/base.json are missing or do not differ, so optimised and held-out "
        "rewards have no common unit."
    )


def _chart(found: Finding) -> str:
    x = [p.iteration for p in found.points]
    series = []
    for whole, style in ((found.held_out, "c1"), (found.optimised, "c0")):
        if len(whole.names) > 1:
            parts = [curve(found.points, found.units, {name: 1.0}) for name in whole.names]
            series += [Series(p.names[0], x, _listed(p.changes), style=f"{style} thin") for p in parts]
        half = np.array([1.96 * whole.error(0, i) for i in range(len(x))])
        low, high = (_listed(whole.changes + sign * half) for sign in (-1, 1))
        series.append(Series(_and(whole.names), x, _listed(whole.changes), low, high, style=style, points=True))
    marks = []
    if found.parting is not None:
        at = found.iteration(found.parting.best)
        marks = [(float(at), f"parted: iteration {at}" if at else "parted from the start")]
    return line_chart(
        series,
        label="Optimised and held-out rewards against iteration, in std of the base's scores",
        x_label="iteration",
        reference=(0.0, "base"),
        marks=marks,
    )


def _legend(found: Finding) -> tuple[tuple[str, str], ...]:
    both = (("optimised", found.optimised, "c0"), ("held-out", found.held_out, "c1"))
    return tuple((f"{role}: {_and(whole.names)}", style) for role, whole, style in both)


def _pictures(run: RunFolder, found: Finding) -> tuple[dict[str, Any] | None, str]:
    """The same prompts and noise by the base, where the rewards part, and at the end; or why there are none."""
    assert found.parting is not None
    best, last = found.parting.best, found.last
    wanted = list(dict.fromkeys([0, best, last]))
    files = {i: kept_pictures(run.path, found.iteration(i)) for i in wanted}
    absent = [found.iteration(i) for i in wanted if not files[i]]
    if absent:
        return None, (
            f"No pictures were kept at iteration {_and([str(i) for i in absent])}; eval.pictures keeps some at every "
            "evaluation."
        )
    prompts = [str(p) for p in _list((run.base or {}).get("prompts"))]
    count = min([len(prompts), *(len(f) for f in files.values())])
    columns: dict[str, list[Image.Image]] = {}
    scores: dict[str, dict[str, list[float]]] = {}
    shown = [*found.optimised.names, *found.held_out.names]
    for i in wanted:
        label = "base" if i == 0 else f"iteration {found.iteration(i)}"
        label += {best: ", before", last: ", after"}.get(i, "") if best != last else ""
        try:
            columns[label] = [_opened(path) for path in files[i][:count]]
        except (OSError, ValueError, SyntaxError):
            return None, f"A picture of iteration {found.iteration(i)} in samples/ cannot be read."
        kept = found.points[i].scores
        scores[label] = {n: list(kept[n][:count]) for n in shown if len(kept.get(n, ())) >= count}
    sheet = comparison_grid(columns, prompts[:count], scores, fold=2 if count > 2 and len(columns) < 3 else 1)
    buffer = io.BytesIO()
    sheet.save(buffer, format="WEBP", quality=88)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"uri": uri, "width": sheet.width, "height": sheet.height}, ""


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _advice(run: RunFolder, config: Mapping[str, Any], found: Finding) -> Advice:
    assert found.parting is not None
    wanted, end = found.iteration(found.parting.best), found.iteration(found.last)
    if wanted == 0:
        return Advice(
            "Use the base model: at no evaluation were the held-out rewards better. Train with another reward, or a mix."
        )
    if number_of((run.summary or {}).get("best_iteration")) == wanted:
        text = f"Use the run's adapter: early stop has exported that of iteration {wanted}."
        return Advice(text, _eval_command(run.path, None))
    kept = _kept_adapters(run.path)
    if wanted in kept:
        text = f"Use the checkpoint of iteration {wanted}, where the held-out rewards are highest."
        return Advice(text, _eval_command(run.path, kept[wanted]))
    text = f"The weights of iteration {wanted}, where the held-out rewards are highest, were not kept."
    again = _again(run, config, found, end)
    levels = {i: _held_out_at(found, i) for i in kept if i < end}
    if not levels:
        return Advice(text, again=again)
    instead = max(levels, key=lambda i: levels[i])
    if levels[instead] <= 0:
        return Advice(f"{text} Use the base model: at no checkpoint that is there are they above it.", again=again)
    text += f" Of the checkpoints that are there, use that of iteration {instead}: there they are {_units(levels[instead])}."
    return Advice(text, _eval_command(run.path, kept[instead]), again)


def _held_out_at(found: Finding, iteration: int) -> float:
    """Level of the held-out rewards at a checkpoint, between evaluations on the line that joins them."""
    known = np.isfinite(found.held_out.changes)
    iterations = np.array([p.iteration for p in found.points])
    return float(np.interp(iteration, iterations[known], found.held_out.changes[known]))


def _again(run: RunFolder, config: Mapping[str, Any], found: Finding, end: int) -> str:
    """The command that trains again and keeps the best weights."""
    if run.config is None:
        return ""
    every = number_of(_mapping(config.get("eval")).get("every"))
    step = int(every) if math.isfinite(every) and every >= 1 else 10
    settings = [
        f"name={run.path.resolve().name}-again",
        f"checkpoint.every={step}",
        f"checkpoint.keep={-(-end // step)}",
    ]
    if len(found.held_out.names) == 1:
        settings.append(f"early_stop.reward={found.held_out.names[0]}")
    return shlex.join(["align", "train", str(run.path / "config.yaml"), *settings])


def _eval_command(run_dir: Path, adapter: Path | None) -> str:
    return shlex.join(["align", "eval", str(run_dir), *(["--adapter", str(adapter)] if adapter else [])])


def _kept_adapters(run_dir: Path) -> dict[int, Path]:
    """Iteration -> adapter folder of every checkpoint that is there."""
    states = list((run_dir / "checkpoints").glob("iteration-*/state.json"))
    folders = (p.parent / kind for p in states for kind in ("adapter", "controlnet"))
    named = ((p.parent.name.removeprefix("iteration-"), p) for p in folders if p.is_dir())
    return {int(number): path for number, path in sorted(named) if number.isdigit()}


def _units(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _listed(values: np.ndarray) -> list[float]:
    return [float(v) for v in values]


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
