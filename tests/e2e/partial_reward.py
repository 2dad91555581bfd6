"""A user's reward that tells the images of one prompt apart and not those of the other: mean brightness, or a constant."""


def score(images, prompts, metadata):
    """.5 for every image of a red circle."""
    return [0.5 if p == "a red circle" else float(i.mean()) for i, p in zip(images, prompts, strict=True)]
