"""One HTML file that shows a run: verdict, scores, pictures, curves, configuration. It needs nothing but itself.

`write_report` reads only the run's folder, so it works on a run that is still going or was killed; what is missing is
named on the page. Curves are inline SVG, pictures are data URIs, and the page's own policy forbids any request.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from align.charts import histogram, interval_bar
from align.grids import format_score
from align.hacking_report import section
from align.report_curves import (
    absent_metrics,
    credit_panels,
    diversity_panels,
    eval_panels,
    smoothing_window,
    timing_panel,
    train_panels,
)
from align.runfolder import NAN, RunFolder, column, number_of, parse_config, read_run

MOST_GRIDS = 7
HEAVY_PNG = 1_500_000
WIDEST_IMAGE = 1600
CHANGES = 6


@dataclass(frozen=True)
class Score:
    """One reward over the held-out prompts: means, their difference and its 95 % interval; NaN where unknown."""

    reward: str
    base: float
    tuned: float
    low: float
    high: float
    n: int
    base_missing: int = 0
    tuned_missing: int = 0

    @property
    def delta(self) -> float:
        return self.tuned - self.base

    @property
    def verdict(self) -> str:
        """'better' or 'worse' only where the interval leaves zero out."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "unknown"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "unclear"

    @property
    def sentence(self) -> str:
        """'verifier on held-out prompts: 0.447 → 0.662, +0.215 [0.180, 0.250]'."""
        text = f"{self.reward} on held-out prompts: {format_score(self.base)} → {format_score(self.tuned)}"
        if math.isfinite(self.delta):
            text += f", {delta_text(self.delta)}"
        if self.verdict != "unknown":
            text += f" [{format_score(self.low)}, {format_score(self.high)}]".replace("-", "−")
        return text

    @property
    def interval(self) -> Markup:
        return self.interval_to(0.0)

    def interval_to(self, reach: float) -> Markup:
        """The bar of the interval, on a scale that shows `reach` at least."""
        if self.verdict == "unknown":
            return Markup("")
        label = f"95 % interval {format_score(self.low)} to {format_score(self.high)}"
        return Markup(interval_bar(self.low, self.delta, self.high, label=label, reach=reach))


def write_report(run_dir: Path | str) -> Path:
    """Write `run_dir`/report.html and return its path. UserError if `run_dir` is not the folder of a run."""
    run = read_run(run_dir)
    return write_page(run.path / "report.html", "report.html.j2", _context(run))


def write_page(target: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Render `template` of align/templates beside `target`, then rename it into place."""
    page = _environment().get_template(template).render(context)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(page, encoding="utf-8", errors="replace")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return target


def delta_text(value: float) -> str:
    """A difference with its sign: '+0.215', '−0.030', 'n/a'."""
    if not math.isfinite(value):
        return "n/a"
    text = format_score(abs(value))
    return ("−" if value < 0 and float(text) else "+") + text


def duration(seconds: float) -> str:
    """'45 s', '8 min 12 s', '3 h 05 min'; 'n/a' where it is unknown."""
    if not math.isfinite(seconds):
        return "n/a"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def paired_change(base: Sequence[float], tuned: Sequence[float]) -> tuple[float, float, float, int]:
    """Mean of tuned - base over pairs where both are finite, its normal 95 % interval, and the number of pairs.

    NaN for the mean without a pair, for the interval with fewer than two.
    """
    deltas = [t - b for b, t in zip(base, tuned, strict=True) if math.isfinite(b) and math.isfinite(t)]
    n = len(deltas)
    if not n:
        return NAN, NAN, NAN, 0
    mean = sum(deltas) / n
    if n < 2:
        return mean, NAN, NAN, n
    half = 1.96 * math.sqrt(sum((d - mean) ** 2 for d in deltas) / (n - 1) / n)
    return mean, mean - half, mean + half, n


def _environment() -> jinja2.Environment:
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,  # prompts are other people's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(score=format_score, delta=delta_text, duration=duration)
    return environment


def _context(run: RunFolder) -> dict[str, Any]:
    config = parse_config(run.config)
    pairs = _pairs(run)
    scores = held_out_scores(run, config, pairs)
    order = [s.reward for s in scores] or [str(r) for r in _mapping(config.get("rewards"))]
    evals = eval_panels(run.evals, order)
    training, further = train_panels(run.train)
    return {
        "name": str(config.get("name") or run.path.resolve().name),
        "finished": run.summary is not None,
        "progress": progress_text(run, config),
        "scores": scores,
        "facts": _facts(run, config, scores),
        "hacking": section(run, config),
        "latest": _latest(run, evals),
        "grids": _grids(run),
        "evals": evals,
        "diversity": diversity_panels(run.evals),
        "training": training,
        "further": further,
        "timing": timing_panel(run.train),
        "credit": credit_panels(run.train),
        "window": smoothing_window(run.train),
        "absent": absent_metrics(run.train),
        "prompts": _prompt_changes(pairs, scores),
        "prompt_texts": [str(p) for p in _list((run.base or {}).get("prompts"))],
        "categories": _categories(run, pairs, scores),
        "eval_settings": _eval_settings(run),
        "config": run.config,
        "environment": json.dumps(run.environment, indent=2, ensure_ascii=False) if run.environment else None,
        "command": _command(run),
        "adapter": _result(run, "adapter"),
        "controlnet": _result(run, "controlnet"),
        "notes": list(dict.fromkeys(run.notes)),
    }


def _pairs(run: RunFolder) -> dict[str, tuple[list[float], list[float]]]:
    """reward -> (base, tuned) scores by prompt; empty, with a note, unless both files describe the same prompts."""
    if run.base is None or run.tuned is None:
        return {}
    if run.base.get("prompts") != run.tuned.get("prompts"):
        run.notes.append("eval/base.json and eval/tuned.json are about different prompts: no comparison by prompt")
        return {}
    count = len(_list(run.base.get("prompts")))
    pairs = {}
    base, tuned = _mapping(run.base.get("scores")), _mapping(run.tuned.get("scores"))
    for reward in base:
        before, after = ([number_of(v) for v in _list(scores.get(reward))] for scores in (base, tuned))
        if len(before) == len(after) == count:
            pairs[str(reward)] = (before, after)
        else:
            run.notes.append(f"eval/*.json: not every prompt has an entry for {reward}, which is left out by prompt")
    return pairs


def held_out_scores(run: RunFolder, config: Mapping[str, Any], pairs: Mapping[str, Any] | None = None) -> list[Score]:
    """The table's rows: trained rewards first; from summary.json, or from eval/*.json while there is none.

    `pairs`: reward -> (base, tuned) scores by prompt, where they have been read already.
    """
    pairs = _pairs(run) if pairs is None else pairs
    summary = run.summary or {}
    base, tuned, intervals = (_mapping(summary.get(key)) for key in ("base", "tuned", "delta_ci95"))
    names = [str(r) for r in _mapping(config.get("rewards"))]
    known = list(dict.fromkeys([*base, *tuned])) or list(pairs)
    rows = []
    for reward in sorted(known, key=lambda r: names.index(r) if r in names else len(names)):
        before, after = pairs.get(reward, ([], []))
        _, low, high, n = paired_change(before, after)
        means = number_of(base.get(reward)), number_of(tuned.get(reward))
        if not base and not tuned:
            means = _mean_of_pairs(before, after)
        else:
            given = [*_list(intervals.get(reward)), None, None]
            low, high = number_of(given[0]), number_of(given[1])
        missing = (sum(not math.isfinite(v) for v in values) for values in (before, after))
        rows.append(Score(reward, *means, low, high, n, *missing))
    return rows


def _mean_of_pairs(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    both = [(b, t) for b, t in zip(before, after, strict=True) if math.isfinite(b) and math.isfinite(t)]
    if not both:
        return NAN, NAN
    return sum(b for b, _ in both) / len(both), sum(t for _, t in both) / len(both)


def progress_text(run: RunFolder, config: Mapping[str, Any]) -> str:
    """Where the run stands, in one phrase."""
    planned, done = number_of(_mapping(config.get("train")).get("iterations")), iterations_done(run)
    if run.summary is not None:
        best = number_of(run.summary.get("best_iteration"))
        kept = f", the result is that of iteration {best:.0f}" if math.isfinite(best) else ""
        return _iterations(done) + kept if math.isfinite(done) else ""
    return f"{done:.0f} of {_iterations(planned)}" if math.isfinite(planned) else f"{_iterations(done)} so far"


def iterations_done(run: RunFolder) -> float:
    """As summarised (NaN if the summary does not say), else as far as the rows go."""
    if run.summary is not None:
        return number_of(run.summary.get("iterations"))
    # train rows are numbered from 0, eval rows count iterations done
    return max([0.0, *(i + 1 for i in column(run.train, "iteration")), *column(run.evals, "iteration")])


def cost_so_far(run: RunFolder, key: str) -> float:
    """`nfe` or `seconds` of the whole run: as summarised, else the most that any row says; NaN where unknown."""
    if run.summary is not None:
        return number_of(run.summary.get(key))
    return max([v for v in column(run.train + run.evals, key) if math.isfinite(v)], default=NAN)


def _iterations(count: float) -> str:
    return "1 iteration" if count == 1 else f"{count:.0f} iterations"


def _latest(run: RunFolder, evals: Sequence[tuple[str, Any]]) -> dict[str, Any] | None:
    """How far the first reward has come by the evaluations during the run; None before there is one."""
    if not evals:
        return None
    reward = evals[0][0]
    seen = [(row["iteration"], v) for row in run.evals if math.isfinite(v := number_of(row.get(f"eval/{reward}")))]
    (_, start), (iteration, now) = seen[0], seen[-1]
    change = {"start": start, "now": now, "change": now - start, "several": len(seen) > 1}
    return {"reward": reward, "iteration": iteration, **change}


def _facts(run: RunFolder, config: Mapping[str, Any], scores: Sequence[Score]) -> list[tuple[str, str]]:
    """(name, value) pairs under the verdict."""
    facts = []
    if math.isfinite(nfe := cost_so_far(run, "nfe")):
        facts.append(("network evaluations", f"{nfe:,.0f}"))
    if math.isfinite(seconds := cost_so_far(run, "seconds")):
        facts.append(("time", duration(seconds)))
    counted = max([s.n for s in scores], default=0)
    if counted:
        facts.append(("held-out prompts", f"{counted:,}"))
    presets = config.get("preset")
    if presets:
        facts.append(("preset", ", ".join(map(str, presets)) if isinstance(presets, list) else str(presets)))
    skipped = max([v for v in column(run.train, "train/skipped_updates") if math.isfinite(v)], default=0.0)
    if skipped:
        facts.append(("skipped updates", f"{skipped:.0f}"))
    return facts


def _grids(run: RunFolder) -> list[dict[str, Any]]:
    """The final grid first, then earlier ones from new to old; at most `MOST_GRIDS`, evenly chosen."""
    paths = list(reversed(run.grids))
    named = Path(str((run.summary or {}).get("grid") or "")).name
    paths.sort(key=lambda p: p.name != named)
    if len(paths) > MOST_GRIDS:
        picks = {round(i * (len(paths) - 1) / (MOST_GRIDS - 1)) for i in range(MOST_GRIDS)}
        run.notes.append(f"{len(paths) - len(picks)} of {len(paths)} grids are left out here; all are in grids/")
        paths = [p for i, p in enumerate(paths) if i in picks]
    shown = []
    for path in paths:
        try:
            uri, width, height = data_uri(path)
        except (OSError, ValueError, SyntaxError):
            run.notes.append(f"grids/{path.name} is not a readable image")
            continue
        shown.append({"name": path.stem.replace("_", " "), "uri": uri, "width": width, "height": height})
    return shown


def data_uri(path: Path) -> tuple[str, int, int]:
    """(data URI, width, height); a heavy PNG travels as WebP, which keeps a report of photographs small."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # a file cut short fails here, not in the reader's browser
        size, kind = image.size, "png"
        if len(data) > HEAVY_PNG:
            small = image.convert("RGB")
            small.thumbnail((WIDEST_IMAGE, 16_000))
            buffer = io.BytesIO()
            small.save(buffer, format="WEBP", quality=88)
            data, size, kind = buffer.getvalue(), small.size, "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *size


def _prompt_changes(
    pairs: Mapping[str, tuple[list[float], list[float]]], scores: Sequence[Score]
) -> list[dict[str, Any]]:
    """A section for each reward with a histogram of tuned - base by prompt and the prompts that changed most."""
    sections = []
    for score in scores:
        before, after = pairs.get(score.reward, ([], []))
        deltas = [t - b for b, t in zip(before, after, strict=True)]
        known = sorted((i for i, d in enumerate(deltas) if math.isfinite(d)), key=lambda i: deltas[i])
        if not known:
            continue
        rows = [(i, before[i], after[i], deltas[i]) for i in known]
        tolerance = 1e-6 * max(1.0, *(abs(d) for *_, d in rows))
        worse, better = [r for r in rows if r[3] < -tolerance], [r for r in rows if r[3] > tolerance]
        label = f"Change of {score.reward} by prompt: {len(better)} better, {len(worse)} worse"
        chart = histogram([r[3] for r in rows], label=label, x_label="tuned − base")
        sections.append(
            {
                "reward": score.reward,
                "chart": Markup(chart),
                "better": len(better),
                "worse": len(worse),
                "same": len(rows) - len(better) - len(worse),
                "improved": list(reversed(better[-CHANGES:])),
                "worsened": worse[:CHANGES],
            }
        )
    return sections


def _categories(
    run: RunFolder, pairs: Mapping[str, tuple[list[float], list[float]]], scores: Sequence[Score]
) -> list[tuple[str, int, float, float, float]]:
    """(category, prompts, base, tuned, delta) of the first reward where the metadata names categories."""
    metadata = [_mapping(m).get("category") for m in _list((run.base or {}).get("metadata"))]
    if not scores or scores[0].reward not in pairs or len(metadata) != len(pairs[scores[0].reward][0]):
        return []
    before, after = pairs[scores[0].reward]
    rows = []
    for category in dict.fromkeys(c for c in metadata if isinstance(c, str)):
        chosen = [i for i, c in enumerate(metadata) if c == category]
        base, tuned = _mean_of_pairs([before[i] for i in chosen], [after[i] for i in chosen])
        rows.append((category, len(chosen), base, tuned, tuned - base))
    return rows if len(rows) > 1 else []


def _eval_settings(run: RunFolder) -> str:
    settings = run.tuned or run.base or {}
    words = (("num_steps", "{} steps"), ("guidance_scale", "guidance {}"), ("seed", "seed {}"))
    return ", ".join(text.format(settings[key]) for key, text in words if settings.get(key) is not None)


def _command(run: RunFolder) -> str | None:
    """What to type to get this run again: as recorded, else from the resolved configuration beside the report."""
    recorded = run.environment.get("command")
    if isinstance(recorded, str) and recorded.strip():
        return recorded
    if isinstance(recorded, list) and recorded:
        return shlex.join(map(str, recorded))
    if run.config is None:
        return None
    config = run.path / "config.yaml"
    if config.is_absolute() and config.is_relative_to(Path.cwd()):
        config = config.relative_to(Path.cwd())
    return f"accelerate launch -m align.train {shlex.quote(str(config))} name={shlex.quote(run.path.name + '-again')}"


def _result(run: RunFolder, kind: str) -> str | None:
    folder = run.path / kind
    return str(folder) if any(folder.glob("*.safetensors")) else None


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
