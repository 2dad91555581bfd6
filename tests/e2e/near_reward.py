"""A user's reward that rises and then falls while images get brighter."""


def score(images, prompts, metadata, target=0.5):
    """Minus the distance of an image's mean brightness from `target`, in [-1, 0]."""
    return [-abs(float(i.mean()) - target) for i in images]
