"""A user's reward that scores the same here and behind a service: it rounds the pixels as the way there does, and sums
integers, so that their order does not matter."""

import zlib


def brightness(images, prompts, metadata, missing_every=0):
    """Mean brightness; None for one image in `missing_every`, chosen by its pixels."""
    pixels = images.mul(255).round().clamp(0, 255)
    scores = [float(image.double().mean()) / 255 for image in pixels]
    return [None if is_missing(image, missing_every) else s for image, s in zip(pixels, scores, strict=True)]


def is_missing(image, every):
    """Whether the checksum of (3, H, W) pixels in 0..255 is a multiple of `every`."""
    return every > 0 and zlib.crc32(image.byte().contiguous().numpy().tobytes()) % every == 0
