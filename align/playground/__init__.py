"""A tiny text-to-image world: procedural scenes, captions, and an exact verifier that reads pixels."""
