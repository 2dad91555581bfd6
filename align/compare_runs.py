"""Runs side by side: what each one is, what it cost, how it scored, and between which of them a difference is known."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from align.config import CONFIG_DIR, Config
from align.errors import UserError
from align.evaluate import paired_interval
from align.report import Score, cost_so_far, held_out_scores, iterations_done
from align.runfolder import MARKS, NAN, RunFolder, column, number_of, parse_config, read_run
from align.schema import flattened

BASE = "base"
NOT_COMPARED = ("name", "output_dir", "preset", "trackers")
HELD_OUT = ("prompts.eval", "eval.seed", "eval.num_steps", "eval.during")


@dataclass(frozen=True)
class Entry:
    """One of the runs that are compared; `config` is empty where config.yaml is missing or broken."""

    label: str
    run: RunFolder
    config: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        return self.run.summary is not None

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the configuration; None where it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Pair:
    """Two runs by prompt: in `score`, "base" is what `against` reached and "tuned" what `run` did."""

    run: str
    against: str
    score: Score


def open_runs(paths: Sequence[str]) -> list[Entry]:
    """The runs of `paths`, labelled. Raises: UserError if one is no run's folder, or is given twice."""
    folders = [_run_folder(path) for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if sum(folder.resolve() == other.resolve() for other in folders) > 1:
            raise UserError(f"{path} is given twice: name every run once")
    runs = [read_run(folder) for folder in folders]
    return [Entry(name, run, parse_config(run.config)) for name, run in zip(labels(folders), runs, strict=True)]


def labels(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many parents as tell it from the others (and from the grid's column 'base')."""
    parts = [folder.resolve().parts for folder in folders]
    found = []
    for own in parts:
        size = 1
        while size < len(own) and (own[-size:] == (BASE,) or sum(own[-size:] == p[-size:] for p in parts) > 1):
            size += 1
        found.append("/".join(own[-size:]))
    return found


def _run_folder(path: str) -> Path:
    folder = Path(path)
    if _is_run(folder):
        return folder
    inside = [str(p) for p in _runs_in(folder)]
    if inside:
        raise UserError(f"{path} is not the folder of a run but holds some: name them, as in align compare {inside[0]}")
    near = {p.name: p for place in (Path("outputs"), folder.parent) for p in _runs_in(place)}
    close = difflib.get_close_matches(folder.name, near, n=1, cutoff=0.4)
    hint = f"did you mean '{near[close[0]]}'?" if close else f"it would hold one of {', '.join(MARKS)}"
    raise UserError(f"{path} is not the folder of a run ({hint})")


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


def _runs_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and _is_run(p)) if folder.is_dir() else []


def method(entry: Entry) -> str:
    """The presets of the run but for those of base models, else its objective."""
    given = entry.config.get("preset") or []
    names = [given] if isinstance(given, str) else [str(name) for name in given]
    kept = [Path(name).stem for name in names if not (CONFIG_DIR / "models" / f"{name}.yaml").is_file()]
    return ", ".join(kept) or objective(entry)


def objective(entry: Entry) -> str:
    """What is optimised and on which kernel: 'clipped_ratio on flow_sde'; empty where it is not known."""
    kind, kernel = entry.setting("objective.type"), entry.setting("sampler.kernel")
    return f"{kind} on {kernel}" if kind and kernel else str(kind or "")


def base_model(entry: Entry) -> str:
    """The base model with its revision and size where they are set; empty where the configuration is not known."""
    path = entry.setting("model.path")
    if path is None:
        return ""
    path = str(Path(path).resolve()) if Path(path).is_dir() else str(path)  # one folder has many spellings
    revision, side = entry.setting("model.revision"), entry.setting("model.resolution")
    return path + (f" at {revision}" if revision else "") + (f", {side} px" if side else "")


def held_out(entry: Entry) -> list[Score]:
    """Base and tuned by reward; before the final evaluation the first and the latest of those during the run.

    The latter are over fewer prompts and without an interval; tuned is NaN until the first of them.
    """
    scores = held_out_scores(entry.run, entry.config)
    if scores:
        return scores
    rows = entry.run.evals
    names = {key.removeprefix("eval/") for row in rows for key in row if key.startswith("eval/")}
    found = []
    for name in trained_first(entry, {n for n in names if not n.endswith("_ci95")}):
        seen = [v for v in column(rows, f"eval/{name}") if math.isfinite(v)]
        if seen:
            found.append(Score(name, seen[0], seen[-1] if len(seen) > 1 else NAN, NAN, NAN, 0))
    return found


def trained_first(entry: Entry, names: set[str]) -> list[str]:
    """`names` with the rewards that `entry` trains in front, in its order, the others sorted."""
    own = [str(name) for name in entry.setting("rewards") or {}]
    return [name for name in own if name in names] + sorted(names - set(own))


def paired_differences(entries: Sequence[Entry]) -> tuple[list[Pair], list[str]]:
    """Differences of the tuned scores of every two runs, and in words between which there is none and why.

    The noise of a prompt depends on its place and the seed, so two runs pair over the prompts with which both begin.
    """
    pairs: list[Pair] = []
    reasons: dict[str, list[str]] = {}
    evaluated = [entry for entry in entries if entry.run.tuned is not None]
    for against, entry in itertools.combinations(evaluated, 2):
        reason = _unpaired(against.run.tuned or {}, entry.run.tuned or {})
        before, after = _scores_by_prompt(against), _scores_by_prompt(entry)
        for name in [] if reason else trained_first(against, set(before) & set(after)):
            if reward_settings(entry, name) == reward_settings(against, name):
                pairs.append(Pair(entry.label, against.label, _difference(name, before[name], after[name])))
            else:
                reason = f"their rewards '{name}' are not the same"
        if reason:
            reasons.setdefault(reason, []).append(f"{against.label} and {entry.label}")
    missing = [entry.label for entry in entries if entry.run.tuned is None]
    notes = [f"no paired difference to {_some(missing)}: no final evaluation (eval/tuned.json) yet"] if missing else []
    notes += [f"no paired difference between {_some(couples)}: {reason}" for reason, couples in reasons.items()]
    return pairs, notes if len(entries) > 1 else []


def _unpaired(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Why two contents of eval/tuned.json do not pair by prompt; None if they do."""
    ours, theirs = one.get("prompts") or [], other.get("prompts") or []
    shared = min(len(ours), len(theirs))
    if not shared or ours[:shared] != theirs[:shared]:
        return "their held-out prompts differ"
    return None if one.get("seed") == other.get("seed") else "their evaluation seeds differ"


def _scores_by_prompt(entry: Entry) -> dict[str, list[float]]:
    """reward -> tuned score of each prompt, NaN where it is missing."""
    found = (entry.run.tuned or {}).get("scores")
    found = found if isinstance(found, Mapping) else {}
    return {str(name): [number_of(v) for v in values] for name, values in found.items() if isinstance(values, list)}


def _difference(reward: str, before: Sequence[float], after: Sequence[float]) -> Score:
    """Means over the prompts that have both scores, and the 95 % interval of their difference."""
    size = min(len(before), len(after))
    a, b = (torch.tensor(values[:size], dtype=torch.float64) for values in (before, after))
    both = a.isfinite() & b.isfinite()
    a, b = a[both], b[both]
    low, high = paired_interval(a, b) if len(a) > 1 else (NAN, NAN)
    return Score(reward, float(a.mean()), float(b.mean()), low, high, len(a))


def reward_settings(entry: Entry, name: str) -> Mapping[str, Any] | None:
    """What defines the score of a reward, without its weight; None where the configuration does not say."""
    for group in ("rewards", "eval_rewards"):
        found = (entry.setting(group) or {}).get(name)
        if isinstance(found, Mapping):
            return {"type": found.get("type"), "args": found.get("args") or {}, "max_batch": found.get("max_batch")}
    return None


def remarks(entries: Sequence[Entry]) -> list[str]:
    """What a reader must know before comparing these runs: where they are not alike, and which are not finished."""
    found = []
    if model := spread(entries, base_model):
        found.append(f"different base models: {model}")
    for entry in entries:
        if not entry.finished and entry.run.tuned is None:
            last = max(column(entry.run.evals, "iteration"), default=NAN)
            scores = (
                f"those during the run, the latest after iteration {last:.0f}, over fewer prompts, without interval"
            )
            found.append(f"{entry.label} is not finished; held-out scores: {scores if entry.run.evals else 'none yet'}")
        found += [f"{entry.label}: {note}" for note in entry.run.notes if "cannot be read" in note]
    if trained := spread(entries, lambda e: ", ".join(map(str, e.setting("rewards") or {}))):
        found.append(f"different rewards are trained, so reward/mean is not on one scale: {trained}")
    for key in HELD_OUT:
        if values := spread(entries, lambda e, key=key: _written(e.setting(key))):  # type: ignore[misc]
            found.append(f"held-out scores were made with different {key}: {values}")
    if values := spread(entries, lambda e: _written(deployed_guidance(e))):
        found.append(f"held-out scores were made with different guidance: {values}")
    return found


def deployed_guidance(entry: Entry) -> Any:
    """Guidance scale of the evaluation."""
    own = entry.setting("eval.guidance_scale")
    return entry.setting("sampler.guidance_scale") if own is None else own


def spread(entries: Sequence[Entry], value: Callable[[Entry], str]) -> str:
    """'x (a, b); y (c)' where `value` differs between runs that have one, else nothing."""
    groups: dict[str, list[str]] = {}
    for entry in entries:
        if entry.config:
            groups.setdefault(value(entry), []).append(entry.label)
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in groups.items()) if len(groups) > 1 else ""


def differing_settings(entries: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """(dotted key, its value in every run) of each setting that is not the same in all; '?' where it is not known."""
    defaults = flattened(dataclasses.asdict(Config()))  # what the configuration of an older version does not name
    flat = [defaults | flattened(entry.config) if entry.config else None for entry in entries]
    known = [settings for settings in flat if settings is not None]
    found = []
    for key in dict.fromkeys(key for settings in known for key in settings):
        if key not in NOT_COMPARED and len({_written(settings.get(key)) for settings in known}) > 1:
            found.append((key, ["?" if settings is None else _written(settings.get(key)) for settings in flat]))
    return found


def _written(value: Any) -> str:
    return "–" if value is None or value == {} else str(list(value) if isinstance(value, tuple) else value)


def _some(words: Sequence[str], most: int = 4) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def rows(entries: Sequence[Entry], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Flat rows of compare.json: one a run and reward, then one a pair of runs and reward."""
    found: list[dict[str, Any]] = []
    for entry in entries:
        common = {
            "kind": "run",
            "run": entry.label,
            "folder": str(entry.run.path),
            "method": method(entry),
            "objective": objective(entry),
            "base_model": base_model(entry) or None,
            "finished": entry.finished,
            "iterations": int(done) if math.isfinite(done := iterations_done(entry.run)) else None,
            "planned_iterations": entry.setting("train.iterations"),
            "nfe": cost_so_far(entry.run, "nfe"),
            "seconds": cost_so_far(entry.run, "seconds"),
        }
        scores = [{"reward": s.reward, "base": s.base, "tuned": s.tuned, **_change(s)} for s in held_out(entry)]
        found += [{**common, **score} for score in scores] or [common]
    for pair in pairs:
        names = {"kind": "pair", "run": pair.run, "against": pair.against, "reward": pair.score.reward}
        found.append({**names, **_change(pair.score)})
    return found


def _change(score: Score) -> dict[str, float]:
    return {"delta": score.delta, "ci95_low": score.low, "ci95_high": score.high, "n": score.n}
