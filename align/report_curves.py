"""The curves of a report: which metric is drawn how, from the rows of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.charts import Series, balance_chart, compact, line_chart, stacked_chart
from align.grids import format_score
from align.runfolder import column

# metric -> (title, one line that says how to read it)
KNOWN = {
    "reward/mean": ("Training reward", "over the images; band: one standard deviation"),
    "train/loss": ("Loss", "need not fall while the reward rises"),
    "train/grad_norm": ("Gradient norm", "before clipping"),
    "train/clip_fraction": ("Clip fraction", "share of steps whose ratio was clipped"),
    "train/ratio_mean": ("Ratio", "new over old likelihood; 1 at the first update"),
    "train/kl": ("KL to the reference", "how far the adapter has moved from the base"),
    "train/zero_spread_fraction": ("Groups without spread", "share of prompts whose images all score the same"),
    "train/lr": ("Learning rate", "of the adapter"),
    "train/skipped_updates": ("Skipped updates", "so far, for a gradient that was not finite"),
    "reward/invalid_fraction": ("Missing scores", "share of images that a reward could not judge"),
}
# of one method or another; shown folded away, and not missed where absent
FURTHER = {
    "train/displacement": ("Distance to the old policy", "mean square, of the velocity"),
    "train/ref_mse": ("Distance to the reference", "mean square, of the velocity"),
    "train/norm_ratio": ("Velocity norm", "relative to the reference"),
    "train/loss_plus": ("Loss, positive branch", "towards what scored well"),
    "train/loss_minus": ("Loss, negative branch", "away from what scored badly"),
    "train/active_steps": ("Active steps", "differentiated network calls of one image"),
    "train/adjoint_norm": ("Gradient at the image", "norm at the final latent, mean over images"),
    "train/adjoint_growth": ("Growth of the gradient", "norm at the earliest active step over that at the image"),
    "train/saturated_fraction": ("Saturated pixels", "share of values outside [0, 1] before the clamp"),
    "train/uncond_drift": ("Drift of the empty prompt", "relative to the base's prediction"),
    "train/old_decay": ("Old policy's decay", "0: it equals the live one"),
    "sample/nfe_per_image": ("Evaluations per image", "of the network while sampling, completions included"),
}
# of rules of credit that give every step its own reward: (metric, or prefix of one per step) -> (title, hint)
CREDIT = {
    "values/step_": ("Value of the states", "mean reward of the images completed from state k; last, the final images"),
    "gain/": ("Gains and losses", "share of images whose value a step raised (above) or lowered (below)"),
    "values/rank_corr_": ("Rank correlation", "of a state's value with the final reward in its group; 1: same order"),
    "gain/zero_spread_": ("Steps without spread", "share of groups whose images all got the same reward for step k"),
    "credit/turning_point_rate": ("Turning points", "share of steps after the first; dashed: what pure noise gives"),
    "credit/first_step_rate": ("First steps selected", "share of images; dashed: what pure noise gives"),
    "credit/kept_fraction": ("Turning points kept", "share left once both signs are equally many"),
}
# of the evaluations: metric -> (title, hint)
DIVERSITY = {
    "diversity/spread": ("Spread of a prompt's images", "mean 1 - cosine of their embeddings; 0: all the same"),
    "diversity/vendi": ("Different images of a prompt", "effective number (Vendi score); 1: all the same"),
}
AT_MOST = 10
EXACT = ("train/lr", "train/skipped_updates", "train/old_decay")
DULL_AT_ZERO = ("train/skipped_updates", "reward/invalid_fraction")
SMOOTH_FROM = 30


@dataclass(frozen=True)
class Panel:
    """One chart with its title, the value it ends on, a hint, and the legend of what it overlays."""

    key: str
    title: str
    svg: Markup
    last: str = ""
    hint: str = ""
    legend: tuple[tuple[str, str], ...] = ()


def eval_panels(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> list[tuple[str, list[Panel]]]:
    """(reward, panels against iteration, network evaluations, time) of each evaluated reward; those of `first` lead."""
    names = {k.removeprefix("eval/") for row in rows for k in row if k.startswith("eval/") and not k.endswith("_ci95")}
    ordered = [n for n in first if n in names] + sorted(names - set(first))
    return [(name, panels) for name in ordered if (panels := _eval_panels_of(rows, name))]


def train_panels(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Panel], list[Panel]]:
    """(main, further) panels of training metrics with a finite value; further: a method's own and any other."""
    keys = {key for row in rows for key in row if key.startswith(("train/", "reward/"))} - {"reward/std"}
    rewards = sorted(k for k in keys if k.startswith("reward/") and k not in KNOWN)
    if len(rewards) == 1:  # a single reward is its own mean
        pairs = zip(column(rows, "reward/mean"), column(rows, rewards[0]), strict=True)
        both = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
        if both and all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6) for a, b in both):
            rewards = []
    main = ["reward/mean", *rewards, *[k for k in KNOWN if k != "reward/mean"]]
    further = [*FURTHER, *sorted(k for k in keys if k not in KNOWN and k not in FURTHER and k.startswith("train/"))]
    return _panels_of(rows, main), _panels_of(rows, further)


def credit_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Panels of the metrics in `CREDIT` that any row has: by step, now and at the start, or against iteration."""
    panels = [
        _step_panel(rows, "values/step_", final="reward/mean"),
        _balance_panel(rows),
        _step_panel(rows, "values/rank_corr_"),
        _step_panel(rows, "gain/zero_spread_"),
        _train_panel(rows, "credit/turning_point_rate", null="credit/turning_point_null"),
        _train_panel(rows, "credit/first_step_rate", null="credit/first_step_null"),
        _train_panel(rows, "credit/kept_fraction"),
    ]
    return [panel for panel in panels if panel]


def absent_metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The known training metrics that no row has a finite value of."""
    return [key for key in KNOWN if not any(map(math.isfinite, column(rows, key)))]


def smoothing_window(rows: Sequence[Mapping[str, Any]]) -> int:
    """Iterations in the moving average of a training panel; 0 where the run is too short for one."""
    return max(5, len(rows) // 20) if len(rows) >= SMOOTH_FROM else 0


def timing_panel(rows: Sequence[Mapping[str, Any]]) -> Panel | None:
    """Seconds of each stage, stacked; None if no row has any."""
    usual = ["time/sample", "time/score", "time/train"]
    recorded = {key for row in rows for key in row if key.startswith("time/")}
    keys = [k for k in usual if k in recorded] + sorted(recorded - set(usual))
    if not keys:
        return None
    layers = {key.removeprefix("time/"): column(rows, key) for key in keys}
    typical = {name: _median(values) for name, values in layers.items()}
    svg = stacked_chart(layers, column(rows, "iteration"), label="Seconds by stage", x_label="iteration")
    legend = tuple((f"{name} {compact(round(typical[name], 2))} s", f"c{i % 6}") for i, name in enumerate(layers))
    total = sum(typical.values())
    hint = "seconds; the legend gives medians"
    return Panel("time", "Time of an iteration", Markup(svg), f"{total:.2f} s", hint, legend)


def diversity_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Panels against the iteration of how different the images of a prompt are; empty for a run that did not measure it."""
    panels = []
    for key, (title, hint) in DIVERSITY.items():
        means, widths = column(rows, key), column(rows, f"{key}_ci95")
        finite = [v for v in means if math.isfinite(v)]
        if not finite:
            continue
        low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
        x = column(rows, "iteration")
        start = (finite[0], f"start {format_score(finite[0])}") if len(finite) > 1 else None
        label = f"{title} against iteration"
        series = Series(title, x, means, low, high, points=True)
        svg = line_chart([series], label=label, x_label="iteration", reference=start)
        panels.append(Panel(key, title, Markup(svg), format_score(finite[-1]), hint))
    return panels


def _eval_panels_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[Panel]:
    means, widths = column(rows, f"eval/{name}"), column(rows, f"eval/{name}_ci95")
    finite = [v for v in means if math.isfinite(v)]
    if not finite:
        return []
    low = [m - w for m, w in zip(means, widths, strict=True)]
    high = [m + w for m, w in zip(means, widths, strict=True)]
    start = (finite[0], f"start {format_score(finite[0])}") if len(finite) > 1 else None
    panels = []
    for key, label in (("iteration", "iteration"), ("nfe", "network evaluations"), ("seconds", "")):
        x = column(rows, key)
        if key == "seconds":
            label, size = time_unit(x)
            x = [value / size for value in x]
        if not any(math.isfinite(a) and math.isfinite(b) for a, b in zip(x, means, strict=True)):
            continue
        keep = [i for i, value in enumerate(x) if math.isfinite(value)]
        xs, ys, lows, highs = ([v[i] for i in keep] for v in (x, means, low, high))
        series = Series(name, xs, ys, lows, highs, points=True)
        title = f"{name} on held-out prompts against {label}"
        svg = line_chart([series], label=title, x_label=label, reference=start)
        panels.append(Panel(f"eval/{name}", label, Markup(svg), format_score(finite[-1])))
    return panels


def _panels_of(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[Panel]:
    return [panel for key in keys if (panel := _train_panel(rows, key))]


def _by_step(rows: Sequence[Mapping[str, Any]], prefix: str) -> tuple[list[int], list[float], list[float]]:
    """(steps, now, at the start) of a metric with one key per step: means of its last and first iterations.

    Each is over up to `AT_MOST` of the step's own iterations, a quarter of them: a window trains few steps at a time.
    """
    recorded = {key for row in rows for key in row if key.startswith(prefix)}
    steps = sorted(int(end) for key in recorded if (end := key.removeprefix(prefix)).isdigit())
    spans = {k: _first_and_last(column(rows, f"{prefix}{k:02d}")) for k in steps}
    known = [k for k in steps if math.isfinite(spans[k][1])]
    return known, [spans[k][1] for k in known], [spans[k][0] for k in known]


def _first_and_last(values: Sequence[float]) -> tuple[float, float]:
    finite = [v for v in values if math.isfinite(v)]
    few = max(1, min(AT_MOST, len(finite) // 4))
    return (sum(finite[:few]) / few, sum(finite[-few:]) / few) if finite else (math.nan, math.nan)


def _step_panel(rows: Sequence[Mapping[str, Any]], prefix: str, final: str | None = None) -> Panel | None:
    """`final`: a metric that stands after the last step."""
    steps, now, start = _by_step(rows, prefix)
    if not steps:
        return None
    x_label = "step k"
    if final is not None:
        before, after = _first_and_last(column(rows, final))
        steps, now, start = [*steps, steps[-1] + 1], [*now, after], [*start, before]
        x_label = "state k, then the final image"
    title, hint = CREDIT[prefix]
    series = [Series("now", steps, now, points=True)]
    if len(rows) > 1:
        series.insert(0, Series("at the start", steps, start, style="c5", points=True))
    svg = line_chart(series, label=f"{title} by step", x_label=x_label)
    return Panel(prefix, title, Markup(svg), "", hint, _then_and_now(rows))


def _balance_panel(rows: Sequence[Mapping[str, Any]]) -> Panel | None:
    steps, up, up_before = _by_step(rows, "gain/up_")
    also, down, down_before = _by_step(rows, "gain/down_")
    if not steps or steps != also:
        return None
    title, hint = CREDIT["gain/"]
    before = (up_before, down_before) if len(rows) > 1 else None
    svg = balance_chart(steps, up, down, before, label=f"{title} by step", x_label="step k")
    legend = (("raised, now", "gain"), ("lowered, now", "loss"), *([("at the start", "before")] if before else []))
    return Panel("gain/", title, Markup(svg), "", hint, legend)


def _then_and_now(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    return (("now", "c0"), ("at the start", "c5")) if len(rows) > 1 else (("now", "c0"),)


def _train_panel(rows: Sequence[Mapping[str, Any]], key: str, null: str | None = None) -> Panel | None:
    """`null`: the metric that holds this one's value for pure noise, drawn as a dashed level."""
    values = column(rows, key)
    finite = [v for v in values if math.isfinite(v)]
    if not finite or (key in DULL_AT_ZERO and not any(finite)):
        return None
    x = column(rows, "iteration")
    plain = key.replace("reward/", "Reward: ").removeprefix("train/")
    title, hint = (
        KNOWN.get(key)
        or FURTHER.get(key)
        or CREDIT.get(key)
        or (plain, "mean over the images" if "Reward" in plain else "")
    )
    low: list[float] = []
    high: list[float] = []
    if key == "reward/mean":
        spread = column(rows, "reward/std")
        if any(map(math.isfinite, spread)):
            low = [m - s for m, s in zip(values, spread, strict=True)]
            high = [m + s for m, s in zip(values, spread, strict=True)]
        else:
            hint = "over the images"
    series = [Series(title, x, values, low, high)]
    if len(values) >= SMOOTH_FROM and key not in EXACT:
        series = [
            Series(title, x, values, low, high, style="faint"),
            Series("average", x, moving_average(values, smoothing_window(rows))),
        ]
    levels = [v for v in column(rows, null) if math.isfinite(v)] if null else []
    reference = (levels[-1], f"pure noise {format_score(levels[-1])}") if levels else None
    svg = line_chart(series, label=f"{title} against iteration", x_label="iteration", reference=reference)
    return Panel(key, title, Markup(svg), compact(finite[-1]), hint)


def time_unit(seconds: Sequence[float]) -> tuple[str, float]:
    """The unit that suits the longest time, and its length in seconds."""
    longest = max([s for s in seconds if math.isfinite(s)], default=0.0)
    return ("seconds", 1.0) if longest < 180 else ("minutes", 60.0) if longest < 3 * 3600 else ("hours", 3600.0)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite values among the last `window`; NaN until there are half as many."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [v for v in values[max(0, end - window) : end] if math.isfinite(v)]
        means.append(sum(recent) / len(recent) if 2 * len(recent) >= window else float("nan"))
    return means


def _median(values: Sequence[float]) -> float:
    finite = sorted(v for v in values if math.isfinite(v))
    if not finite:
        return 0.0
    middle = len(finite) // 2
    return finite[middle] if len(finite) % 2 else (finite[middle - 1] + finite[middle]) / 2
