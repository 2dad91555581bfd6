"""The exact verifier of the playground: does an image show exactly what a prompt asks for?

It judges pixels only. A full match means exactly the asked objects, each of the right colour and shape, in the right
number and relation, and nothing else. The graded score in [0, 1] gives partial credit and is 1 only for a full match.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from align.playground.captions import Spec, caption, parse, spec_of
from align.playground.reader import Found, Reading, blur, read, wobble
from align.playground.scenes import CATEGORIES, COLORS, RELATIONS, SHAPES, SIZE, relation_holds, render, sample_scene
from rewards.base import Reward, RewardBatch, RewardOutput, to_uint8

MAX_ASKED = 8  # objects a spec may ask for; also how many of the largest objects of an image are matched
SPECK_LIMIT = 40  # pixels; specks that cover more than this together count as one extra object

# An object's worth: that it is there, has the asked colour, has the asked shape; the rest of 1 is paid for both.
_EXISTS, _COLOR, _SHAPE = 0.1, 0.25, 0.25
_RIGHT_NUMBER = 0.3  # share of the objects' worth that is paid only for the right number of objects
_RELATION = 0.4  # share of the score that a relation is worth, once both of its objects are there
_EXTRA = 0.5  # n extra objects divide the score by 1 + n * _EXTRA
_PARTIAL = 0.8  # largest score short of a full match


@dataclass(frozen=True)
class Verdict:
    """full: exactly what was asked. graded: partial credit in [0, 1], 1 only if full. objects: what was read."""

    full: bool
    graded: float
    objects: tuple[Found, ...]


def verify(image: np.ndarray, spec: Spec) -> Verdict:
    """Judge one uint8 image (64, 64, 3) by a spec (see `captions`). Raises ValueError for a malformed spec."""
    return verify_batch(image[None], [spec])[0]


def verify_batch(images: np.ndarray, specs: Sequence[Spec]) -> list[Verdict]:
    """Judge uint8 images (N, 64, 64, 3), each by its own spec."""
    if len(images) != len(specs):
        raise ValueError(f"{len(images)} images but {len(specs)} specs; give one spec for each image")
    return [judge(reading, spec) for reading, spec in zip(read(images), specs, strict=True)]


def judge(reading: Reading, spec: Spec) -> Verdict:
    """Judge what was read from an image by a spec."""
    asked = _expand(spec)
    found = reading.objects[:MAX_ASKED]
    worth = [[_worth(f, color, shape) for color, shape in asked] for f in found]
    chosen = _assign(worth, len(asked))
    values = [0.0 if i is None else worth[i][e] for e, i in enumerate(chosen)]
    littered = reading.speck_area > SPECK_LIMIT
    exact = len(reading.objects) == len(asked) and not littered
    score = sum(values) / len(asked) * (1 - _RIGHT_NUMBER * (not exact))
    complete = exact and all(v == 1.0 for v in values)
    if spec["relation"]:
        degree = _relation_degree(spec["relation"], [None if i is None else found[i] for i in chosen])
        score = (1 - _RELATION) * score + _RELATION * min(values) * degree
        complete = complete and degree == 1.0
    score /= 1 + _EXTRA * max(len(reading.objects) + littered - len(asked), 0)
    return Verdict(complete, 1.0 if complete else _PARTIAL * score, reading.objects)


def _expand(spec: Spec) -> list[tuple[str, str]]:
    """The asked objects one by one as (colour, shape). Raises ValueError for a malformed spec."""
    try:
        asked = [(o["color"], o["shape"]) for o in spec["objects"] for _ in range(int(o.get("count", 1)))]
        relation = spec["relation"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"a spec needs 'objects' (color, shape, count) and 'relation', got {spec!r}") from None
    if not 1 <= len(asked) <= MAX_ASKED:
        raise ValueError(f"a spec may ask for 1 to {MAX_ASKED} objects, got {len(asked)}")
    for color, shape in asked:
        if color not in COLORS or shape not in SHAPES:
            raise ValueError(f"no {color} {shape} here; colours: {', '.join(COLORS)}; shapes: {', '.join(SHAPES)}")
    if relation is not None and (relation not in RELATIONS or len(asked) != 2):
        raise ValueError(f"a relation is one of {', '.join(RELATIONS)} between exactly two objects, got {relation!r}")
    return asked


def _worth(found: Found, color: str, shape: str) -> float:
    """What a found object is worth as the asked one, in (0, 1]; 1.0 exactly if colour and shape are right."""
    right_color, right_shape = found.color == color, found.shape == shape
    if right_color and right_shape:
        return 1.0
    # A shape that lies close to the asked one earns up to two fifths of its worth, so that there is a slope to climb.
    away = found.shape_distances[shape]
    near = 1.0 if right_shape else 0.4 * min(found.shape_distances.values()) / (away * max(away, 1.0))
    exists = _EXISTS if found.color or found.shape else 0.25 * _EXISTS  # a blob without colour and shape is hardly one
    return exists + _COLOR * right_color + _SHAPE * near


def _assign(worth: list[list[float]], asked: int) -> list[int | None]:
    """For each asked object the found one it is matched to (None: nothing left), with the largest total worth."""
    best: dict[int, tuple[float, list[int | None]]] = {0: (0.0, [None] * asked)}
    for i, row in enumerate(worth):
        for mask, (total, chosen) in list(best.items()):
            for e in range(asked):
                taken = mask | 1 << e
                if taken != mask and total + row[e] > best.get(taken, (-1.0,))[0]:
                    best[taken] = (total + row[e], [i if k == e else c for k, c in enumerate(chosen)])
    return max(best.values(), key=lambda entry: entry[0])[1]


def _relation_degree(relation: str, pair: list[Found | None]) -> float:
    """1 where the relation holds, 0.4 where the object is on the right side but too far off the axis, else 0."""
    a, b = pair
    if a is None or b is None:
        return 0.0
    if relation_holds(relation, a.x - b.x, a.y - b.y):
        return 1.0
    return 0.4 if relation_holds(relation, a.x - b.x, a.y - b.y, slack=0.0) else 0.0


class VerifierReward(Reward):
    """The verifier as a reward: scores are graded (default) or full; both are components.

    The target is the sample's metadata where it holds a spec, else what the prompt itself says. A target outside the
    playground's grammar has no score: NaN, with the reason in `info["problem"]`. Images of another size are resized
    to 64x64 by area.
    """

    name = "verifier"
    max_batch = 256

    def __init__(self, graded: bool = True) -> None:
        self.graded = graded

    def score(self, batch: RewardBatch) -> RewardOutput:
        """Scores (B,) in [0, 1]; components "full" (0 or 1) and "graded", NaN where the prompt has no meaning here."""
        images = torch.nan_to_num(batch.images.detach().float())
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="area")
        pixels = to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        full = torch.full((len(pixels),), torch.nan)
        graded = full.clone()
        problems = [""] * len(pixels)
        for i, (reading, prompt, metadata) in enumerate(zip(read(pixels), batch.prompts, batch.metadata, strict=True)):
            try:
                verdict = judge(reading, spec_for(prompt, metadata))
            except ValueError as error:
                problems[i] = str(error)
            else:
                full[i], graded[i] = float(verdict.full), verdict.graded
        scores = graded if self.graded else full
        return RewardOutput(scores, {"full": full, "graded": graded}, info={"problem": problems})


def spec_for(prompt: str, metadata: Mapping[str, Any] | None) -> Spec:
    """The spec in the metadata if there is one, else the prompt's own. Raises ValueError for an unreadable prompt."""
    if metadata and "objects" in metadata:
        return {"relation": None, **metadata}
    return parse(prompt)


def contact_sheet(path: Path, weights: Path | None = None) -> None:
    """Save a PNG of renders, softened renders and wrong pictures (rows) of eight scenes (columns) with their verdicts.

    weights: the folder of a pipeline whose autoencoder makes one more row, the real softness; left out without one.
    """
    rng = np.random.default_rng(3)
    categories = [*CATEGORIES, *CATEGORIES[1:4]]
    scenes = [sample_scene(rng, held_out=i >= len(CATEGORIES), category=c) for i, c in enumerate(categories)]
    captions, specs = [caption(s, rng) for s in scenes], [spec_of(s) for s in scenes]
    sharp = np.stack([render(s) for s in scenes])
    noise = rng.normal(0, 6, sharp.shape)
    extra = [replace(s, objects=(*s.objects[1:], *sample_scene(rng).objects)) for s in scenes]
    rows = {
        "render": sharp,
        "blurred, 1 px": blur(sharp, 1.0),
        "bent, narrow": wobble(sharp, rng, aspect=0.85),
        "bent, soft, noisy": np.clip(blur(wobble(sharp, rng), 1.2) + noise, 0, 255).astype(np.uint8),
        "autoencoder": None if weights is None else _round_trip(sharp, weights),
        "blurred, 2.5 px": blur(sharp, 2.5),
        "next caption's": np.roll(sharp, -1, 0),
        "other objects": np.stack([render(s) for s in extra]),
    }
    cell, left, top, text = 112, 104, 44, 16
    shown = {name: images for name, images in rows.items() if images is not None}
    sheet = Image.new("RGB", (left + cell * len(scenes), top + (cell + text) * len(shown)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, words in enumerate(captions):
        draw.multiline_text((left + x * cell + 3, 3), "\n".join(textwrap.wrap(words, 19)), "black", spacing=2)
    for y, (name, images) in enumerate(shown.items()):
        line = top + y * (cell + text)
        draw.text((4, line + cell // 2), name, "black")
        for x, (image, verdict) in enumerate(zip(images, verify_batch(images, specs), strict=True)):
            picture = Image.fromarray(image).resize((cell - 4, cell - 4), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + x * cell + 2, line))
            label = "full match" if verdict.full else f"no, {verdict.graded:.2f}"
            draw.text((left + x * cell + 4, line + cell - 3), label, "green" if verdict.full else "firebrick")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _round_trip(images: np.ndarray, weights: Path) -> np.ndarray:
    """uint8 images (N, 64, 64, 3) after the autoencoder of a pipeline folder."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(weights, subfolder="vae").float().eval()
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    return to_uint8(y / 2 + 0.5).permute(0, 2, 3, 1).contiguous().numpy()


def main() -> None:
    """`python -m align.playground.verifier --contact-sheet OUT.png [--weights DIR]`."""
    parser = argparse.ArgumentParser(prog="python -m align.playground.verifier", description=main.__doc__)
    parser.add_argument("--contact-sheet", type=Path, required=True, metavar="OUT.png", help="where to save it")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="pipeline folder whose autoencoder adds a row")
    args = parser.parse_args()
    contact_sheet(args.contact_sheet, args.weights)
    print(f"saved {args.contact_sheet}")


if __name__ == "__main__":
    main()
