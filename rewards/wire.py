"""How images and scores travel between `RemoteReward` and the server: JSON, images as base64 PNG, nothing pickled."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards.base import RewardBatch, RewardError, RewardOutput, to_uint8


class WireError(ValueError):
    """A message that cannot be read. Its text is one line."""


@dataclass(frozen=True)
class Limits:
    """What a server accepts; it tells them to clients with its health."""

    request_bytes: int = 64 * 2**20
    """Of a request's body: 16 photographs of 1024 x 1024 pixels are about 50 MB."""
    images: int = 64
    """Of one request."""
    pixels: int = 2048 * 2048
    """Of one image."""
    prompt_chars: int = 8192
    """Of one prompt."""
    metadata_bytes: int = 65536
    """Of the metadata of one image, as JSON."""
    queue: int = 64
    """Requests being read, waiting or scored; more are answered with 503."""
    read_seconds: float = 30.0
    """Time to send a request's body."""


def encode_request(batch: RewardBatch) -> bytes:
    """Body of POST /score for (B, 3, H, W) images: lossless for `to_uint8(images)`.

    Raises: RewardError, one line, for metadata that JSON does not have.
    """
    pixels = to_uint8(batch.images).permute(0, 2, 3, 1).cpu().numpy()
    message = {
        "images": [_png(image) for image in pixels],
        "prompts": batch.prompts,
        "metadata": batch.metadata,
    }
    try:
        return json.dumps(message, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"the prompts' metadata cannot be sent to a service, it is not plain JSON: {error}"
        ) from error


def decode_request(body: bytes, limits: Limits) -> RewardBatch:
    """The batch in the body of POST /score; images are float32 k/255 on the CPU, every sample is a group of its own.

    Nothing in a request is taken for a path. Raises: WireError for anything unexpected or beyond `limits`.
    """
    message = _load(body)
    if not isinstance(message, dict) or set(message) != {"images", "prompts", "metadata"}:
        raise WireError("a request must be an object with images, prompts and metadata, and nothing else")
    images, prompts, metadata = (message[key] for key in ("images", "prompts", "metadata"))
    if not (isinstance(images, list) and isinstance(prompts, list) and isinstance(metadata, list)):
        raise WireError("images, prompts and metadata must be lists")
    if not len(images) == len(prompts) == len(metadata):
        raise WireError(f"{len(images)} images came with {len(prompts)} prompts and {len(metadata)} metadata")
    if not 1 <= len(images) <= limits.images:
        raise WireError(f"a request must have 1 to {limits.images} images, got {len(images)}")
    for row, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True)):
        _check_prompt(row, prompt, limits.prompt_chars)
        if not isinstance(entry, dict):
            raise WireError(f"metadata {row} must be an object")
        if len(json.dumps(entry)) > limits.metadata_bytes:
            raise WireError(f"metadata {row} is longer than {limits.metadata_bytes} bytes")
    pixels = [_pixels(row, text, limits.pixels) for row, text in enumerate(images)]
    sizes = {tuple(image.shape[:2]) for image in pixels}
    if len(sizes) > 1:
        raise WireError("the images of a request must have one size")
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div(255)
    return RewardBatch(stacked.contiguous(), prompts, metadata, torch.arange(len(pixels)))


def encode_response(output: RewardOutput) -> bytes:
    """Answer to POST /score; null is a missing score. Every float32 arrives as it was."""
    message: dict[str, Any] = {"scores": _numbers(torch.where(output.valid, output.scores, torch.nan))}
    if output.components:
        message["components"] = {name: _numbers(values) for name, values in output.components.items()}
    if output.uncertainty is not None:
        message["uncertainty"] = _numbers(output.uncertainty)
    return json.dumps(message, allow_nan=False).encode()


def decode_response(body: bytes, size: int) -> RewardOutput:
    """Scores of `size` images, on the CPU. Raises: WireError unless there is one number or null an image."""
    message = _load(body)
    if not isinstance(message, dict) or "scores" not in message:
        raise WireError("the answer has no scores")
    components = message.get("components", {})
    if not isinstance(components, dict):
        raise WireError("the answer's components are not an object")
    uncertainty = message.get("uncertainty")
    return RewardOutput(
        scores=_floats("scores", message["scores"], size),
        components={str(name): _floats(f"component '{name}'", values, size) for name, values in components.items()},
        uncertainty=None if uncertainty is None else _floats("uncertainty", uncertainty, size),
    )


def decode_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises: WireError for anything else."""
    message = _load(body)
    if not isinstance(message, dict):
        raise WireError("the answer is not an object")
    return message


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)  # a network is faster than a higher level
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _pixels(row: int, text: Any, limit: int) -> np.ndarray:
    """(H, W, 3) uint8 of a base64 PNG; the size is looked at before anything is decompressed."""
    if not isinstance(text, str):
        raise WireError(f"image {row} must be a PNG in base64")
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            width, height = image.size
            if width * height > limit:
                raise WireError(f"image {row} of {width} x {height} has more than {limit} pixels")
            if image.mode != "RGB":
                raise WireError(f"image {row} must be RGB of 8 bits a channel, got {image.mode}")
            return np.array(image)
    except WireError:
        raise
    except Image.DecompressionBombError as error:
        raise WireError(f"image {row} has more than {limit} pixels") from error
    except (binascii.Error, OSError, ValueError, SyntaxError) as error:
        raise WireError(f"image {row} must be a PNG in base64") from error


def _check_prompt(row: int, prompt: Any, limit: int) -> None:
    if not isinstance(prompt, str):
        raise WireError(f"prompt {row} must be a string")
    if len(prompt) > limit:
        raise WireError(f"prompt {row} is longer than {limit} characters")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise WireError(f"prompt {row} is not valid Unicode") from error


def _load(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise WireError("not JSON, or NaN or infinity in it") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.detach().float().cpu().tolist()]


def _floats(what: str, values: Any, size: int) -> Tensor:
    if not isinstance(values, list) or len(values) != size:
        got = f"{len(values)}" if isinstance(values, list) else type(values).__name__
        raise WireError(f"{what} of {size} images: expected as many numbers, got {got}")
    if any(value is not None and (isinstance(value, bool) or not isinstance(value, int | float)) for value in values):
        raise WireError(f"{what} has an entry that is neither a number nor null")
    try:
        found = torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)
    except OverflowError as error:
        raise WireError(f"{what} has a number that is too large") from error
    found = found.float()
    if bool(found.isinf().any()):
        raise WireError(f"{what} has a number that is not finite")
    return found
