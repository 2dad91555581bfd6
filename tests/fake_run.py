"""A run's folder as training leaves it, made of seeded random numbers and real pictures in a fraction of a second."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from align.grids import comparison_grid, save_png

COLOURS = {"red": "#e04b4b", "green": "#3fb56b", "blue": "#4a78e0", "yellow": "#e8c23f"}
MISSING = ("tuned", "clip", 3)
CATEGORIES = ("single", "count", "two", "relation")
NASTY = '<img src=x onerror="document.title=1"> & <script>document.title=2</script>'

CONFIG = """\
name: fake
preset: [nft]
rewards:
  verifier: {type: verifier, weight: 1.0}
eval_rewards:
  clip: {type: clip}
train:
  iterations: 80
  seed: 0
"""


def picture(rng: np.random.Generator, colour: str, size: int = 64) -> Image.Image:
    """One anti-aliased disc on a dark ground."""
    big = Image.new("RGB", (size * 4, size * 4), (22, 24, 30))
    x, y, r = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.15, 0.25)
    box = tuple(int(v * size * 4) for v in (x - r, y - r, x + r, y + r))
    ImageDraw.Draw(big).ellipse(box, fill=COLOURS[colour])
    return big.resize((size, size), Image.Resampling.LANCZOS)


def prompts(n: int) -> list[str]:
    """`n` prompts; the first is HTML that would run if it were not escaped, the second is empty."""
    made = [f"a {list(COLOURS)[i % 4]} circle, picture number {i}" for i in range(n)]
    made[:2] = [NASTY, ""]
    return made


def metric_lines(iterations: int, rng: np.random.Generator) -> list[str]:
    """Rows of metrics.jsonl: reward rising from 0.45 to about 0.66, one NaN update, evaluations every ten."""
    lines, seconds, nfe = [], 0.0, 0
    for i in range(iterations + 1):
        level = 0.45 + 0.22 * (1 - math.exp(-i / 25))
        if i % 10 == 0:
            evaluated = {"eval/verifier": level + rng.normal(0, 0.008), "eval/verifier_ci95": 0.042}
            evaluated |= {"eval/clip": 0.281 + 0.0002 * i + rng.normal(0, 0.001), "eval/clip_ci95": 0.006}
            lines.append(json.dumps({"kind": "eval", "iteration": i, "seconds": seconds, "nfe": nfe, **evaluated}))
        if i == iterations:
            break
        reward = level + rng.normal(0, 0.03)
        row: dict[str, Any] = {"kind": "train", "iteration": i, "reward/mean": reward, "reward/verifier": reward}
        row |= {"reward/std": 0.24 + rng.normal(0, 0.01), "train/loss": 0.3 * math.exp(-i / 40) + rng.normal(0, 0.01)}
        row |= {"train/grad_norm": float(rng.lognormal(-1, 0.4)), "train/clip_fraction": float(rng.beta(2, 30))}
        row |= {"train/kl": 2e-4 * i + abs(rng.normal(0, 5e-4)), "train/ratio_mean": 1 + rng.normal(0, 1e-4)}
        row |= {"train/zero_spread_fraction": float(rng.integers(0, 3)) / 8}
        row |= {"train/lr": 4e-4, "train/skipped_updates": int(i >= 17), "train/displacement": 1e-4 * i}
        row |= {"time/sample": 1.5 + rng.normal(0, 0.05), "time/score": 0.45, "time/train": 1.5 + rng.normal(0, 0.1)}
        if i == 17:
            row |= {"train/loss": float("nan"), "train/grad_norm": None}
        seconds += row["time/sample"] + row["time/score"] + row["time/train"]
        nfe += 8 * 12 * 10
        lines.append(json.dumps({**row, "seconds": seconds, "nfe": nfe}))
    return lines


def write_fake_run(folder: Path, *, finished: bool = True, iterations: int = 80, count: int = 64) -> Path:
    """Fill `folder`. Unfinished: no summary, tuned scores or environment, and the last line of the metrics is cut."""
    rng = np.random.default_rng(0)
    for name in ("eval", "grids", "adapter"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = metric_lines(iterations, rng)
    text = "\n".join(lines) + "\n" if finished else "\n".join(lines[:-20]) + "\n" + lines[-20][:45]
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.yaml").write_text(CONFIG)

    texts = prompts(count)
    metadata = [{"category": CATEGORIES[i % 4]} for i in range(count)]
    base = np.clip(rng.normal(0.45, 0.2, count), 0, 1).round(2)
    tuned = np.clip(base + rng.choice([0, 0, 0.33, 0.5, 0.5, -0.25], count) + rng.normal(0, 0.02, count), 0, 1).round(2)
    before = rng.normal(0.281, 0.02, count)
    after = before + rng.normal(0.001, 0.012, count)
    scores: dict[str, dict[str, list[float]]] = {
        "base": {"verifier": base.tolist(), "clip": before.tolist()},
        "tuned": {"verifier": tuned.tolist(), "clip": after.tolist()},
    }
    common = {"prompts": texts, "metadata": metadata, "num_steps": 10, "guidance_scale": 1.0, "seed": 1234}
    for label in ("base", "tuned") if finished else ("base",):
        written: dict[str, list[float | None]] = {reward: [*values] for reward, values in scores[label].items()}
        if label == MISSING[0]:
            written[MISSING[1]][MISSING[2]] = None
        (folder / "eval" / f"{label}.json").write_text(json.dumps({**common, "scores": written}))

    rows = 4
    colours = [list(COLOURS)[i % 4] for i in range(rows)]
    images = {label: [picture(rng, c) for c in colours] for label in ("base", "tuned")}
    shown = {label: {"verifier": by["verifier"][:rows]} for label, by in scores.items()}
    for name in ("iteration-000040", "final") if finished else ("iteration-000040",):
        grid = comparison_grid(images, texts[:rows], shown, title=f"{name}: base and tuned, same noise", fold=2)
        save_png(grid, folder / "grids" / f"{name}.png")
    if not finished:
        return folder
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.9", "torch": "2.15.0", "device": "cpu"}))
    (folder / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    intervals = {}
    for reward in scores["base"]:
        deltas = np.subtract(scores["tuned"][reward], scores["base"][reward])
        half = 1.96 * float(deltas.std(ddof=1)) / math.sqrt(count)
        intervals[reward] = [float(deltas.mean()) - half, float(deltas.mean()) + half]
    summary = {
        **{label: {reward: float(np.mean(values)) for reward, values in by.items()} for label, by in scores.items()},
        "delta_ci95": intervals,
        "iterations": iterations,
        "nfe": 8 * 12 * 10 * iterations,
        "seconds": 281.4,
        "adapter": "adapter",
        "grid": "grids/final.png",
        "report": "report.html",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def hack(
    folder: Path,
    *,
    best: int = 30,
    height: float = 0.5,
    checkpoints: tuple[int, ...] = (20, 30, 80),
    snapshots: bool = True,
) -> Path:
    """Make the fake run in `folder` one whose `clip` rises to `best` and falls after it, to one std below the base.

    `height`: at the best, in std. `checkpoints`: those that are there. `snapshots`: with the scores by prompt and pictures
    of every evaluation.
    """
    rng = np.random.default_rng(1)
    base = json.loads((folder / "eval" / "base.json").read_text())
    unit = float(np.std(base["scores"]["clip"]))
    settings = {key: base[key] for key in ("num_steps", "guidance_scale", "seed")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] != "eval":
            continue
        i = row["iteration"]
        change = unit * (height * i / best if i <= best else height - (1 + height) * (i - best) / (80 - best))
        scores = {name: np.array(values) for name, values in base["scores"].items()}
        if i:
            scores["clip"] = scores["clip"] + change + rng.normal(0, 0.3 * unit, len(scores["clip"]))
            scores["verifier"] = scores["verifier"] + row["eval/verifier"] - 0.45
        row |= {f"eval/{name}": float(values.mean()) for name, values in scores.items()}
        if snapshots and i:
            kept = {**settings, "scores": {name: values.tolist() for name, values in scores.items()}}
            (folder / "eval" / f"iteration-{i:06d}.json").write_text(json.dumps(kept))
        if snapshots:
            place = folder / "samples" / (f"iteration-{i:06d}" if i else "base")
            place.mkdir(parents=True, exist_ok=True)
            for number in range(4):
                save_png(picture(rng, list(COLOURS)[number % 4]), place / f"{number:04d}.png")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in checkpoints:
        (folder / "checkpoints" / f"iteration-{i:06d}" / "adapter").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / f"iteration-{i:06d}" / "state.json").write_text("{}")
    return folder
