"""`align score`: scores of image files, and the check of one's own reward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from align.errors import UserError
from align.grids import format_score
from align.inference import ready_reward
from align.prompts import Prompt, load_prompts
from align.real_images import IMAGE_SUFFIXES
from align.scoring import reward_batch
from align.tracking import write_json
from rewards.base import Reward, checked_score, one_line
from rewards.conformance import FAIL, NOT_APPLICABLE, PASS, Verdict, check
from rewards.registry import RewardConfig, build_reward

_COLOURS = {PASS: "green", FAIL: "bold red", NOT_APPLICABLE: "dim"}
_SHOWN = 40  # rows of the table; the JSON file has them all


@dataclass(frozen=True)
class Picture:
    """An image file with what was asked of it."""

    path: Path
    prompt: Prompt
    pixels: Tensor
    """(3, H, W) float32 in [0, 1]."""


def run_score(
    source: str | None,
    names: Sequence[str],
    console: Console,
    *,
    prompt: str | None = None,
    prompts: str | None = None,
    arguments: Sequence[str] = (),
    out: Path | None = None,
) -> None:
    """Score images with registered rewards or dotted paths, print a table, write JSON to `out`.

    Raises: UserError for a mistake in the input; RewardError if a reward cannot be used.
    """
    if source is None:
        raise UserError("give an image, a folder of images, or a .jsonl with image and prompt; or --check REWARD")
    if not names:
        raise UserError("give at least one --reward NAME")
    if arguments and len(names) > 1:
        raise UserError("--arg goes with one --reward: score with one reward at a time")
    args = read_arguments(arguments)
    pictures = read_pictures(source, prompt, prompts, needed=False)
    device = best_device()
    rewards = {name: ready_reward(name, RewardConfig(type=name, args=args), device) for name in names}
    blind = [name for name, reward in rewards.items() if reward.uses_prompt]
    if blind and not any(picture.prompt.text for picture in pictures) and prompt is None:
        raise UserError(f"{', '.join(blind)} judges an image by its prompt: give --prompt TEXT or --prompts FILE")
    with console.status(f"scoring {len(pictures)} images"):
        rows = score_pictures(rewards, pictures, device)
    means = {name: _mean(row["scores"][name] for row in rows) for name in rewards}
    console.print(_score_table(rows, means))
    if len(rows) > _SHOWN:
        console.print(f"... and {len(rows) - _SHOWN} more" + ("" if out else "; --out FILE.json writes them all"))
    for name in rewards:
        _print_missing(name, rows, console)
    if out is not None:
        write_json(out, {"rewards": list(rewards), "args": args, "mean": means, "rows": rows})
        console.print(f"scores: {out}", highlight=False, soft_wrap=True)


def run_check(
    target: str,
    console: Console,
    *,
    source: str | None = None,
    prompt: str | None = None,
    prompts: str | None = None,
    arguments: Sequence[str] = (),
    out: Path | None = None,
) -> bool:
    """Print a verdict for every point of the contract of rewards; True if none failed.

    source, prompt and prompts: images of one size the reward can judge (default: six that are made for the check).
    Raises: RewardError if the reward cannot be built.
    """
    reward = build_reward(target.rpartition(":")[2], RewardConfig(type=target, args=read_arguments(arguments)))
    device = best_device()
    batch = None
    if source is not None:
        pictures = read_pictures(source, prompt, prompts)
        sizes = sorted({tuple(picture.pixels.shape[-2:]) for picture in pictures})
        if len(sizes) > 1:
            raise UserError(f"--check takes images of one size, got {', '.join(f'{h}x{w}' for h, w in sizes)}")
        texts = [picture.prompt for picture in pictures]
        batch = reward_batch(torch.stack([p.pixels for p in pictures]), texts, group_numbers(texts), -1)
    elif prompt is not None or prompts is not None:
        raise UserError("with --check, --prompt and --prompts go with images: give their folder first")
    verdicts = check(reward, batch, device=device)
    failed = sum(verdict.status == FAIL for verdict in verdicts)
    console.print(_verdict_table(target, verdicts))
    passed = sum(verdict.status == PASS for verdict in verdicts)
    console.print(f"{passed} passed, {failed} failed, {len(verdicts) - passed - failed} not applicable")
    if out is not None:
        write_json(out, {"reward": target, "verdicts": [vars(verdict) for verdict in verdicts]})
    return not failed


def read_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """`key=value` entries as the `args` of a reward; values are YAML, and `a.b=1` nests. Raises: UserError."""
    wrong = [text for text in arguments if not text.partition("=")[0] or "=" not in text]
    if wrong:
        raise UserError(f"--arg {wrong[0]}: expected key=value")
    try:
        found = OmegaConf.to_container(OmegaConf.from_dotlist(list(arguments)))
    except (OmegaConfBaseException, ValueError) as problem:
        raise UserError(f"--arg cannot be read: {one_line(problem)}") from problem
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def read_pictures(source: str, prompt: str | None, prompts: str | None, needed: bool = True) -> list[Picture]:
    """Images of a file, a folder (by name) or a .jsonl, each with its prompt.

    prompt holds for every image; prompts is a file with one for each. Without either the text is empty; `needed` makes
    that an error. Raises: UserError for a missing file, an image that cannot be read, or an unequal number.
    """
    path = Path(source)
    if path.suffix == ".jsonl":
        listed = load_prompts(source)
        if any(entry.image is None for entry in listed):
            raise UserError(f'{source}: every line needs {{"image": "file.png", "prompt": "text"}}')
        if prompt is not None or prompts is not None:
            raise UserError(f"{source} brings its own prompts: leave --prompt and --prompts out")
        return [Picture(Path(str(entry.image)), entry, _pixels(Path(str(entry.image)))) for entry in listed]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise UserError(f"{source} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"there is no image or folder {source}")
    if prompt is not None and prompts is not None:
        raise UserError("give --prompt (one for all images) or --prompts (a file with one for each), not both")
    if prompts is not None:
        texts = load_prompts(prompts)
        if len(texts) != len(files):
            raise UserError(f"{prompts} has {len(texts)} prompts for {len(files)} images: give one for each")
    elif prompt is None and needed:
        raise UserError("give --prompt TEXT or --prompts FILE with the images")
    else:
        texts = [Prompt(prompt or "")] * len(files)
    return [Picture(file, text, _pixels(file)) for file, text in zip(files, texts, strict=True)]


def score_pictures(
    rewards: Mapping[str, Reward], pictures: Sequence[Picture], device: torch.device
) -> list[dict[str, Any]]:
    """One row an image, in order: image, prompt, `scores`, and where a reward gives them `components` and `info`.

    Images of one prompt are a group. Different sizes are scored apart. Raises: UserError if that would cut a group of
    a groupwise reward; RewardError if a reward fails.
    """
    groups = group_numbers([picture.prompt for picture in pictures])
    rows: list[dict[str, Any]] = [
        {"image": str(p.path), "prompt": p.prompt.text, "scores": {}, "components": {}, "info": {}} for p in pictures
    ]
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, picture in enumerate(pictures):
        sizes.setdefault(tuple(picture.pixels.shape), []).append(i)
    for name, reward in rewards.items():
        if reward.kind == "groupwise" and len(
            {(groups[i], size) for size, index in sizes.items() for i in index}
        ) > len(set(groups)):
            raise UserError(f"{name} compares the images of a prompt: give them one size")
        for index in sizes.values():
            images = torch.stack([pictures[i].pixels for i in index]).to(device)
            batch = reward_batch(images, [pictures[i].prompt for i in index], [groups[i] for i in index], -1)
            with torch.no_grad():
                output = checked_score(reward, batch)
            for place, i in enumerate(index):
                rows[i]["scores"][name] = output.scores[place].item()
                if output.components:
                    rows[i]["components"][name] = {key: part[place].item() for key, part in output.components.items()}
                lists = {k: v[place] for k, v in output.info.items() if isinstance(v, list) and len(v) == len(index)}
                if lists:
                    rows[i]["info"][name] = lists
    return [{key: value for key, value in row.items() if value != {}} for row in rows]


def group_numbers(prompts: Sequence[Prompt]) -> list[int]:
    """The number of each prompt's group: equal texts are one group, counted in order of appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(prompt.text, len(numbers)) for prompt in prompts]


def best_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _pixels(path: Path) -> Tensor:
    try:
        with Image.open(path) as file:
            return pil_to_tensor(file.convert("RGB")).float() / 255
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except (OSError, UnidentifiedImageError) as problem:
        raise UserError(f"the image {path} cannot be read ({one_line(problem)})") from problem


def _print_missing(name: str, rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """How many images a reward has no score for, and the first reason it gave."""
    missing = [row for row in rows if row["scores"][name] != row["scores"][name]]
    if not missing:
        return
    told = missing[0].get("info", {}).get(name, {})
    reason = next((f": {told[key]}" for key in ("problem", "reason") if told.get(key)), "")
    console.print(
        f"{name}: no score for {len(missing)} of {len(rows)} images{reason}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _score_table(rows: Sequence[Mapping[str, Any]], means: Mapping[str, float]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, max_width=48)
    for name in means:
        table.add_column(name, justify="right")
    for row in rows[:_SHOWN]:
        cells = [format_score(row["scores"][name]) for name in means]
        table.add_row(Path(row["image"]).name, row["prompt"].replace("[", r"\["), *cells)
    if len(rows) > 1:
        table.add_row("mean", "", *(format_score(value) for value in means.values()), style="bold")
    return table


def _verdict_table(target: str, verdicts: Sequence[Verdict]) -> Table:
    table = Table(title=f"contract of {target}".replace("[", r"\["), title_justify="left", title_style="bold", box=None)
    table.add_column("point", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what was seen", overflow="fold")
    for verdict in verdicts:
        colour = _COLOURS[verdict.status]
        table.add_row(verdict.point, f"[{colour}]{verdict.status}[/{colour}]", verdict.detail.replace("[", r"\["))
    return table
