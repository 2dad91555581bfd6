"""`align fit-artifact`: an artifact detector from a folder of clean images and one of images with artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from align.errors import UserError
from align.grids import image_sheet, save_png
from align.score import Picture, best_device, read_pictures
from align.train import readable_errors
from rewards.artifact import FOLDS, ArtifactHead, deal, features, fit_head, probe_image
from rewards.backbone import Backbone, load_backbone

LEAST = 4 * FOLDS  # of each kind, so that four of each are held out
SMALLEST_SIDE = 32


def fit_artifact_command(
    clean: Annotated[str, typer.Option(help="folder of clean images")],
    artifact: Annotated[str, typer.Option(help="folder of images with artifacts")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    backbone: Annotated[
        str,
        typer.Option(help="image network: a folder or hub id (DINOv2, CLIP), proxy (the playground's), or none"),
    ] = "proxy",
    seed: Annotated[int, typer.Option(min=0, help="of the split")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Fit an artifact detector to a few dozen images of each kind, for the reward `artifact`.

    A fifth of the images is held out and measured. For example:
    align fit-artifact --clean good --artifact bad --out my_detector --backbone facebook/dinov2-base
    """
    console = Console()
    with readable_errors(console, debug):
        head, sheet = fit_artifact(clean, artifact, None if backbone == "none" else backbone, seed, out, console)
        print_head(head, out, sheet, console)


def fit_artifact(
    clean: str, artifact: str, backbone: str | None, seed: int, out: Path, console: Console
) -> tuple[ArtifactHead, Path | None]:
    """Fit, measure and write a detector; also a picture of the held-out images that it gets wrong, if there are any.

    Raises: UserError for too few, unreadable or tiny images; RewardError for a network that cannot be loaded.
    """
    kinds = {"clean": _pictures(clean, "clean"), "artifact": _pictures(artifact, "artifact")}
    if Path(clean).resolve() == Path(artifact).resolve():
        raise UserError("--clean and --artifact are one folder: a detector needs both kinds apart")
    for line in telling_formats(kinds["clean"], kinds["artifact"]):
        console.print(f"[yellow]warning:[/yellow] {line}", highlight=False, soft_wrap=True)
    pictures = kinds["clean"] + kinds["artifact"]
    shorter = sorted(min(picture.pixels.shape[-2:]) for picture in pictures)
    side, device = shorter[len(shorter) // 2], best_device()
    network = None if backbone is None else load_backbone(backbone, torch.float32).to(device)
    numbers = units_of(pictures)
    labels = torch.arange(len(pictures)) < len(kinds["clean"])
    found = torch.cat(
        [
            _features(picture.pixels, side, network, device)
            for picture in track(pictures, "looking", console=console, transient=True, disable=not console.is_terminal)
        ]
    )
    probe = _features(probe_image(side)[0], side, network, device)[0]
    head = fit_head(found, labels, numbers, side, backbone, probe, seed)
    head.about["seed"] = seed
    head.save(out)
    odds = found[:, : len(head.weight)] @ head.weight + head.bias
    held = deal(labels.tolist(), numbers, FOLDS, seed) == 0
    wrong = (held & ((odds > 0) != labels)).nonzero().flatten().tolist()
    return head, _wrong_sheet([pictures[i] for i in wrong], labels[wrong].tolist(), odds[wrong], out)


def units_of(pictures: Sequence[Picture]) -> list[int]:
    """A number for each picture, one and the same for those that share a file name or all pixels."""
    first: dict[object, int] = {}
    leads = list(range(len(pictures)))

    def number(i: int) -> int:
        while leads[i] != i:
            i = leads[i]
        return i

    for i, picture in enumerate(pictures):
        pixels = picture.pixels.contiguous()
        for key in (picture.path.stem, (pixels.shape, sha256(pixels.numpy().tobytes()).digest())):
            leads[number(i)] = number(first.setdefault(key, i))
    return [number(i) for i in range(len(pictures))]


def _pictures(folder: str, kind: str) -> list[Picture]:
    if not Path(folder).is_dir():
        raise UserError(f"--{kind}: there is no folder {folder}")
    pictures = read_pictures(folder, None, None, needed=False)
    if len(pictures) < LEAST:
        raise UserError(
            f"--{kind}: {folder} holds {len(pictures)} images: give at least {LEAST}, of which a fifth only measures"
        )
    small = [p.path.name for p in pictures if min(p.pixels.shape[-2:]) < SMALLEST_SIDE]
    if small:
        raise UserError(f"--{kind}: {small[0]} is less than {SMALLEST_SIDE} pixels high or wide")
    return pictures


def telling_formats(clean: list[Picture], artifact: list[Picture]) -> list[str]:
    """Warnings where file type or size alone tells the two kinds apart, which is then what a detector learns."""
    found = []
    for what, of in (("file type", _file_type), ("size", _size)):
        ours, theirs = (Counter(of(picture) for picture in pictures) for pictures in (clean, artifact))
        if not ours & theirs:
            pair = f"{ours.most_common(1)[0][0]} and {theirs.most_common(1)[0][0]}"
            found.append(
                f"no clean image has the {what} of one with artifacts ({pair}): the detector may learn only that"
            )
    return found


def _file_type(picture: Picture) -> str:
    return picture.path.suffix.lower().replace(".jpeg", ".jpg")


def _size(picture: Picture) -> str:
    height, width = picture.pixels.shape[-2:]
    return f"{width}x{height}"


@torch.no_grad()
def _features(pixels: Tensor, side: int, network: Backbone | None, device: torch.device) -> Tensor:
    """(1, F) float32 on the CPU of one image (3, H, W)."""
    return features(pixels.unsqueeze(0).to(device), side, network).float().cpu()


def _wrong_sheet(pictures: list[Picture], clean: list[bool], odds: Tensor, out: Path) -> Path | None:
    if not pictures:
        return None
    texts = [
        f"{'clean' if good else 'artifact'}, log-odds {odd:+.1f}"
        for good, odd in zip(clean, odds.tolist(), strict=True)
    ]
    sheet = image_sheet([picture.pixels for picture in pictures], texts, columns=min(4, len(pictures)))
    return save_png(sheet, out / "held_out_errors.png")


def print_head(head: ArtifactHead, out: Path, sheet: Path | None, console: Console) -> None:
    """What the detector does on the images held out, and how to use it."""
    about: dict[str, Any] = head.about
    measured = about["held_out"]
    low, high = measured["accuracy_ci95"]
    table = Table(title="held out", title_justify="left", title_style="bold", show_header=False)
    for key, value in {
        "images": f"{measured['clean']} clean, {measured['artifact']} with artifacts",
        "accuracy": f"{measured['accuracy']:.3f}  (95 % interval {low:.2f} to {high:.2f})",
        "area under ROC": f"{measured['auc']:.3f}",
        "log loss": f"{measured['log_loss']:.3f}",
        "reads": "texture" + (f" and {head.backbone}" if head.backbone else ""),
    }.items():
        table.add_row(key, value)
    console.print(table)
    if measured["auc"] < 0.75:
        console.print(
            "[yellow]warning:[/yellow] it hardly tells the two kinds apart: give more images, or a larger --backbone",
            soft_wrap=True,
        )
    if sheet is not None:
        console.print(f"wrong there: {sheet}", highlight=False, soft_wrap=True)
    console.print(
        f"use it: artifact: {{type: artifact, args: {{path: {out}}}}}", highlight=False, markup=False, soft_wrap=True
    )
