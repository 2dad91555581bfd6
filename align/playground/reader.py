"""Reads the objects of 64x64 images from pixels alone: connected components, their colours and their shapes.

Everything works on a batch at once: all components of all images are measured together by weighted bin counts.
A blob is one object, also where two shapes have fused; such a blob usually matches no shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from align.playground.scenes import COLORS, SHAPES, SIZE, Obj, Scene, render

MIN_AREA = 16  # pixels; a smaller component is a speck. The smallest object that a scene holds has about 85.
CONTRAST = 48.0  # least distance to the background in RGB; the palest object on the brightest background has 125
RELATIVE = 0.40  # an object's outline lies near this fraction of the contrast around it, so softness moves it little
MAX_COLOR_DISTANCE = 78.0  # RGB; the two closest colours of the palette are 97 apart
MIN_PURITY = 0.78  # least share of an object's core that has the object's own colour
MAX_STRETCH = 1.75  # largest ratio of the principal standard deviations that still reads as a shape
MAX_AREA = 1800.0  # pixels; a larger component is no shape. The largest object of a scene has about 900.
# Largest distance to the nearest prototype, as a root mean square of pooled deviations. It rejects what is far from all
# shapes (circle and square, the closest two, are 1.9 apart): renders bent by 1.5 pixels stay below 2.8, two fused
# shapes lie above. Rings are far from everything else, so they get more room for their thickness.
MAX_SHAPE_DISTANCE = {"circle": 3.2, "square": 3.2, "triangle": 3.2, "star": 3.2, "ring": 4.8}

_RADII = np.linspace(0.0, 2.7, 10)  # bin centres of the radial mass distribution, in whitened units
UNREADABLE = 1 + len(SHAPES)
"""What `read_shapes` says of a component without a shape."""
_COLOR_NAMES = tuple(COLORS)
_PALETTE = np.array([COLORS[c] for c in _COLOR_NAMES], np.float32)


@dataclass(frozen=True)
class Found:
    """One component: centroid in pixels, area in pixels, readings (None where nothing fits).

    `shape_distances` maps each shape to a distance where 1 is the acceptance threshold, whether it is the outline,
    the stretch or the area that is farthest off.
    """

    x: float
    y: float
    area: float
    color: str | None
    shape: str | None
    shape_distances: dict[str, float]


@dataclass(frozen=True)
class Reading:
    """The objects of one image, largest first, and the total area of its specks in pixels."""

    objects: tuple[Found, ...]
    speck_area: int


def read(images: np.ndarray) -> list[Reading]:
    """Read the objects of uint8 images (N, 64, 64, 3). Any content is fine; another shape or dtype is a ValueError."""
    _check(images)
    found: list[list[Found]] = [[] for _ in images]
    blobs = _measure(images)
    if len(blobs.area):
        distances, nearest = _distances(blobs)
        for i in np.argsort(-blobs.area, kind="stable").tolist():
            found[int(blobs.image[i])].append(
                Found(
                    x=float(blobs.center[i, 0]),
                    y=float(blobs.center[i, 1]),
                    area=float(blobs.area[i]),
                    color=_COLOR_NAMES[blobs.color[i]] if blobs.color[i] >= 0 else None,
                    shape=SHAPES[nearest[i]] if distances[i, nearest[i]] <= 1.0 else None,
                    shape_distances=dict(zip(SHAPES, distances[i].tolist(), strict=True)),
                )
            )
    return [Reading(tuple(objects), int(blobs.speck_area[n])) for n, objects in enumerate(found)]


def read_shapes(images: np.ndarray) -> np.ndarray:
    """What shape each pixel belongs to, uint8 (N, 64, 64): 0 none, 1 + the place in SHAPES, or UNREADABLE.

    images: uint8 (N, 64, 64, 3), else ValueError. An outline lies where half of a pixel is covered; specks are none.
    """
    _check(images)
    shapes = np.zeros(images.shape[:3], np.uint8)
    blobs = _measure(images)
    if len(blobs.area):
        distances, nearest = _distances(blobs)
        accepted = distances[np.arange(len(nearest)), nearest] <= 1.0
        of_blob = np.where(accepted, 1 + nearest, UNREADABLE).astype(np.uint8)
        shapes.reshape(-1)[blobs.pixels] = of_blob[blobs.owners]
    return shapes


def _check(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3) or images.dtype != np.uint8:
        raise ValueError(f"expected uint8 images of shape (N, 64, 64, 3), got {images.dtype} {images.shape}")


def _distances(blobs: _Blobs) -> tuple[np.ndarray, np.ndarray]:
    """Distance (M, 5) of each component to each shape, 1 being the threshold, and the nearest shape (M,)."""
    distances = _shape_distances(blobs.features) / np.array([MAX_SHAPE_DISTANCE[s] for s in SHAPES])
    nearest = distances.argmin(1)
    excess = np.maximum(blobs.stretch / MAX_STRETCH, blobs.area / MAX_AREA)[:, None]
    return np.where(excess > 1.0, np.maximum(distances, excess), distances), nearest


@dataclass
class _Blobs:
    """Arrays over the M components of a batch; features (M, F), center (M, 2); color -1 where none fits.

    pixels, owners: flat indices of the pixels that a component covers by half or more, and the component of each.
    """

    image: np.ndarray
    area: np.ndarray
    center: np.ndarray
    color: np.ndarray
    stretch: np.ndarray
    features: np.ndarray
    speck_area: np.ndarray
    pixels: np.ndarray
    owners: np.ndarray


def _measure(images: np.ndarray) -> _Blobs:
    pixels = images.astype(np.float32)
    border = np.concatenate([pixels[:, :2], pixels[:, -2:]], 1).reshape(len(images), -1, 3)
    sides = np.concatenate([pixels[:, 2:-2, :2], pixels[:, 2:-2, -2:]], 2).reshape(len(images), -1, 3)
    background = np.median(np.concatenate([border, sides], 1), axis=1)
    offset = pixels - background[:, None, None]
    distance = np.sqrt(np.einsum("nijc,nijc->nij", offset, offset))
    mask = distance > np.maximum(CONTRAST, RELATIVE * _local_max(distance))
    labels, index = _components(mask)
    area = np.bincount(labels)
    keep = area >= MIN_AREA
    first = np.zeros(len(area), np.int64)
    first[labels] = index  # any pixel of a component tells its image
    image = first // (SIZE * SIZE)
    speck_area = np.bincount(image[~keep], weights=area[~keep], minlength=len(images)).astype(np.int64)
    renumber = np.where(keep, np.cumsum(keep) - 1, -1)
    inside = keep[labels]
    labels, index = renumber[labels[inside]], index[inside]
    image, area = image[keep], area[keep]
    m = len(area)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(labels, weights=values, minlength=m)

    rel = offset.reshape(-1, 3)[index]
    dist = distance.reshape(-1)[index]
    peak = np.zeros(m, np.float32)
    np.maximum.at(peak, labels, dist)
    core = np.maximum(dist / peak[labels] - 0.65, 0.0)
    core_sum = total(core)
    tone = np.stack([total(core * rel[:, c]) for c in range(3)], 1) / core_sum[:, None]
    color = _colors(tone + background[image], rel + background[image][labels], core, total)

    # Coverage is the pixel's place between background and core; a soft step at one half finds the outline.
    norm = np.maximum((tone * tone).sum(1), 1.0)
    cover = np.einsum("pc,pc->p", rel, tone[labels].astype(np.float32)) / norm[labels]
    weight = np.clip((cover - 0.3) / 0.4, 1e-3, 1.0)
    center, stretch, features = _shape_features(index, labels, weight, total)
    half = cover >= 0.5
    return _Blobs(image, area, center, color, stretch, features, speck_area, index[half], labels[half])


def _local_max(values: np.ndarray, reach: int = 4) -> np.ndarray:
    """Largest value in the (2 reach + 1)^2 neighbourhood; (N, H, W) -> (N, H, W)."""
    for axis in (1, 2):
        pad = [(0, 0), (0, 0), (0, 0)]
        pad[axis] = (reach, reach)
        wide = np.pad(values, pad)
        n = values.shape[axis]
        cuts = [wide.take(range(i, i + n), axis) if axis == 1 else wide[:, :, i : i + n] for i in range(2 * reach + 1)]
        values = np.maximum.reduce(cuts)
    return values


def _components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """4-connected components of (N, H, W): a label and a flat index for each set pixel, in index order.

    Joins horizontal runs of neighbouring rows by union-find; an empty row and column keep images and rows apart.
    """
    n, h, w = mask.shape
    padded = np.zeros((n, h + 1, w + 1), np.int8)
    padded[:, :h, :w] = mask
    step = np.diff(padded.reshape(-1), prepend=np.int8(0))
    starts, ends = np.flatnonzero(step == 1), np.flatnonzero(step == -1)
    parent = list(range(len(starts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0
    begin, end, width = starts.tolist(), ends.tolist(), w + 1
    for i, (a, b) in enumerate(zip(begin, end, strict=True)):
        while end[above] + width <= a:
            above += 1
        j = above
        while j < i and begin[j] + width < b:
            ri, rj = root(i), root(j)
            if ri != rj:
                parent[max(ri, rj)] = min(ri, rj)
            j += 1
    roots = np.array([root(i) for i in range(len(parent))], np.int64)
    _, run_label = np.unique(roots, return_inverse=True)
    return np.repeat(run_label, ends - starts), np.flatnonzero(mask)


def _colors(
    tone: np.ndarray, pixels: np.ndarray, core: np.ndarray, total: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Index into COLORS for each component, -1 where its mean core is far from all or its core has several colours."""

    def squared(rgb: np.ndarray, darkest: float) -> np.ndarray:
        # Softness mixes a colour with the dark background, so a darker version of a colour is that colour too.
        shade = np.einsum("pc,kc->pk", rgb, _PALETTE) / (_PALETTE * _PALETTE).sum(1)
        shade = np.clip(shade, darkest, 1.1)[:, :, None]
        return ((rgb[:, None, :] - shade * _PALETTE) ** 2).sum(2)

    away = squared(tone.astype(np.float32), 0.7)
    color = away.argmin(1)
    nearest = squared(pixels, 0.5).argmin(1)
    shares = np.stack([total(core * (nearest == c)) for c in range(len(_PALETTE))], 1)
    purity = shares[np.arange(len(color)), color] / shares.sum(1)
    return np.where((away.min(1) <= MAX_COLOR_DISTANCE**2) & (purity >= MIN_PURITY), color, -1)


def _shape_features(
    index: np.ndarray, labels: np.ndarray, weight: np.ndarray, total: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centroids (M, 2), stretch (M,) and affine-invariant shape features (M, F) of weighted components.

    Whitening the second moments removes size and aspect. What is left is told by the distribution of the mass
    over the radius and by absolute angular moments |sum w r^p exp(i k theta)| / sum w r^p, k = 1..5.
    """
    x = index % SIZE + 0.5
    y = index // SIZE % SIZE + 0.5
    mass = total(weight)
    cx, cy = total(weight * x) / mass, total(weight * y) / mass
    dx, dy = x - cx[labels], y - cy[labels]
    # A pixel is a square, not a point: its own variance of 1/12 also keeps thin lines invertible.
    vx = total(weight * dx * dx) / mass + 1 / 12
    vy = total(weight * dy * dy) / mass + 1 / 12
    vxy = total(weight * dx * dy) / mass
    # Inverse square root of a symmetric 2x2 matrix: sqrt(C) = (C + s) / t with s^2 = det C, t^2 = tr C + 2 s.
    s = np.sqrt(np.maximum(vx * vy - vxy * vxy, 1e-6))
    t = np.sqrt(vx + vy + 2 * s)
    half = np.sqrt(np.maximum((vx - vy) ** 2 / 4 + vxy * vxy, 0.0))
    stretch = np.sqrt(((vx + vy) / 2 + half) / np.maximum((vx + vy) / 2 - half, 1e-6))
    wx, wy, wxy = (vy + s) / (s * t), (vx + s) / (s * t), -vxy / (s * t)
    u = wx[labels] * dx + wxy[labels] * dy
    v = wxy[labels] * dx + wy[labels] * dy

    radius = np.sqrt(u * u + v * v)
    place = np.clip(radius / (_RADII[1] - _RADII[0]), 0, len(_RADII) - 1.001)
    low = place.astype(np.int64)
    upper = weight * (place - low)
    slots = len(mass) * len(_RADII)
    slot = labels * len(_RADII) + low
    radial = np.bincount(slot, weights=weight - upper, minlength=slots)
    radial += np.bincount(slot + 1, weights=upper, minlength=slots)
    features = [radial.reshape(-1, len(_RADII)) / mass[:, None]]

    # A power of r other than k is asked of k = 1 and 2, whose plain moments centring and whitening have set to zero.
    z = (u + 1j * v) / np.maximum(radius, 1e-6)
    turn = z
    for power in (3, 4, 2, 2, 2):
        pull = weight * radius**power
        moment = np.hypot(total(pull * turn.real), total(pull * turn.imag)) / np.maximum(total(pull), 1e-6)
        features.append(moment[:, None])
        turn = turn * z
    return np.stack([cx, cy], 1), stretch, np.concatenate(features, 1)


def blur(images: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with edge padding; uint8 (N, H, W, 3) -> the same."""
    reach = max(int(3 * sigma + 0.5), 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    out = images.astype(np.float32)
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (reach, reach)
        wide, n = np.pad(out, pad, mode="edge"), images.shape[axis]
        out = sum(k * np.take(wide, range(i, i + n), axis) for i, k in enumerate(kernel.tolist()))
    return np.clip(out + 0.5, 0, 255).astype(np.uint8)


def wobble(images: np.ndarray, rng: np.random.Generator, amplitude: float = 1.0, aspect: float = 1.0) -> np.ndarray:
    """Bend images by a smooth random wave of `amplitude` pixels and stretch them to `aspect` (width over height).

    uint8 (N, H, W, 3) -> the same; bilinear, edges repeated. Wavelengths of 16 to 32 pixels: about an object's size.
    """
    n, h, w, _ = images.shape
    j, i = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    wave, phase = rng.uniform(16, 32, (n, 2, 1, 1)), rng.uniform(0, 2 * np.pi, (n, 2, 1, 1))
    x = (j - w / 2) / aspect**0.5 + w / 2 + amplitude * np.sin(2 * np.pi * i / wave[:, 0] + phase[:, 0])
    y = (i - h / 2) * aspect**0.5 + h / 2 + amplitude * np.sin(2 * np.pi * j / wave[:, 1] + phase[:, 1])
    x, y = np.clip(x, 0, w - 1.001), np.clip(y, 0, h - 1.001)
    x0, y0 = x.astype(np.int64), y.astype(np.int64)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    b = np.arange(n)[:, None, None]
    top = images[b, y0, x0] * (1 - fx) + images[b, y0, x0 + 1] * fx
    bottom = images[b, y0 + 1, x0] * (1 - fx) + images[b, y0 + 1, x0 + 1] * fx
    return np.clip(top * (1 - fy) + bottom * fy + 0.5, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def _prototypes() -> tuple[np.ndarray, np.ndarray]:
    """Prototypes (5, F) of the shapes and the map (F, F) that whitens their pooled covariance.

    They are learned from sharp, soft and bent renders, so that what softness and bending change counts little.
    The covariance is drawn towards its diagonal, as a few hundred renders do not fix all of its entries.
    """
    rng = np.random.default_rng(7)
    sizes = np.linspace(7.5, 16.0, 16)
    means, spread = [], []
    for shape in SHAPES:
        jitter = rng.uniform(-0.5, 0.5, (len(sizes), 2))
        aspects = rng.uniform(0.85, 1.15, len(sizes))
        scenes = [
            Scene((Obj(shape, "yellow", 32 + dx, 32 + dy, size, a),), "single")
            for size, (dx, dy), a in zip(sizes.tolist(), jitter.tolist(), aspects.tolist(), strict=True)
        ]
        sharp = np.stack([render(scene) for scene in scenes])
        bent, crooked = wobble(sharp, rng), wobble(sharp, rng, 1.5)
        variants = [sharp, blur(sharp, 0.8), blur(sharp, 1.3), bent, blur(bent, 1.0), crooked]
        blobs = _measure(np.concatenate(variants))
        means.append(blobs.features.mean(0))
        spread.append(np.cov(blobs.features.T))
    pooled = np.mean(spread, 0)
    pooled = 0.7 * pooled + 0.3 * np.diag(np.diag(pooled)) + 3e-5 * np.eye(len(pooled))
    whiten = np.linalg.cholesky(np.linalg.inv(pooled))
    return np.stack(means) @ whiten, whiten


def _shape_distances(features: np.ndarray) -> np.ndarray:
    """Root mean square Mahalanobis distance (M, 5) of features (M, F) to each prototype."""
    means, whiten = _prototypes()
    # einsum, as the rounding of a matrix product depends on how many rows it has, and a score must not.
    whitened = np.einsum("mf,fg->mg", features, whiten)
    return np.sqrt(((whitened[:, None, :] - means) ** 2).mean(2))
