"""One small adapter per model family: a plain `velocity(x, t, cond)`, prompt encoding, decoding, and the LoRA."""

from align.models.base import Conditioning, ImageModel, ModelConfig, load_model

__all__ = ["Conditioning", "ImageModel", "ModelConfig", "load_model"]
