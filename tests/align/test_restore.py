"""What a run takes over from a checkpoint: all of its own, and of another run what does not depend on prompts or rewards."""

from __future__ import annotations

import pytest
import yaml

from align.checkpoint import checkpoints, load_checkpoint
from align.errors import UserError
from align.models.base import ModelConfig, family_of

HISTORY = {
    "advantage": {"baseline": "history", "history": {"entries": 100, "min_count": 1}},
    "train": {"iterations": 1},
    "checkpoint": {"every": 1},
}


def histories(folder):
    """Iterations in the history of the newest checkpoint."""
    _, state = load_checkpoint(checkpoints(folder)[-1])
    return {iteration for rows in state["history"].values() for iteration, _ in rows}


def test_settings_unknown_to_an_older_version_count_as_their_defaults(tmp_path, write_config, train_here):
    config = write_config(tmp_path, "flow_grpo", {"train": {"iterations": 1}, "checkpoint": {"every": 1}})
    train_here(config, "name=old")
    path = tmp_path / "old" / "config.yaml"
    written = yaml.safe_load(path.read_text())
    for section, key in (
        ("selection", None),
        ("sampler", "branch"),
        ("train", "inner_epochs"),
        ("advantage", "history"),
    ):
        removed = written.pop(section) if key is None else written[section].pop(key)
        assert removed is not None
    path.write_text(yaml.safe_dump(written))
    assert train_here(config, "name=old", "train.iterations=2")["iterations"] == 2


def test_a_history_stays_with_its_run(tmp_path, write_config, train_here):
    """Another run may have other prompts at the same places, or rewards of another scale."""
    config = write_config(tmp_path, "flow_grpo", HISTORY)
    train_here(config, "name=first")
    train_here(config, "name=first", "train.iterations=2")
    assert histories(tmp_path / "first") == {0, 1}
    newest = checkpoints(tmp_path / "first")[-1]
    train_here(config, "name=second", f"checkpoint.resume={newest}", "train.iterations=3")
    assert histories(tmp_path / "second") == {2}


def test_a_family_that_the_pipeline_is_not_of_is_refused():
    for path, family in (("playground", "sd"), ("playground-unet", "sd3")):
        with pytest.raises(UserError, match="use family=auto"):
            family_of(ModelConfig(path=path, family=family))
