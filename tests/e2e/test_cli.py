"""The `align` command on the playground: what it writes, and how it says what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from align.cli import app
from align.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """\
preset: [playground, nft]
model: {precision: fp32}
sampler: {num_steps: 3}
objective: {times_per_sample: 1}
eval_rewards: {size: {type: jpeg}}
train: {iterations: 1, prompts_per_iteration: 2, group_size: 2, micro_batch: 4, rollout_batch: 4}
eval: {every: 0, prompts: 4, during: 4, num_steps: 2, grid_prompts: 2}
trackers: []
"""

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerator():
    """Accelerate keeps its settings for the whole process; other tests may have used others."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def invoke(*arguments) -> Result:
    """A command run in this process; the signal handlers of a training run do not outlive it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "400"})
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def align(*arguments) -> str:
    """Output of a command that must succeed."""
    result = invoke(*arguments)
    if result.exit_code:
        raise AssertionError(result.output) from result.exception
    return result.output


def refused(*arguments) -> list[str]:
    """The error lines of a command that must fail, without a traceback; with --debug it must raise instead."""
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert lines, result.output
    loud = invoke(*arguments, "--debug")
    assert isinstance(loud.exception, (UserError, ValueError)), repr(loud.exception)
    return [line.removeprefix("error: ") for line in lines]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.yaml"
    path.write_text(CONFIG + f"output_dir: {path.parent}\n")
    return path


@pytest.fixture(scope="module")
def run(config) -> Path:
    """A finished run of one iteration."""
    output = align("train", config)
    assert "batch geometry" in output
    return config.parent / "tiny"


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        return image.size


# -- what the commands write ------------------------------------------------------------------------------------


def test_train_leaves_a_complete_folder(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["iterations"] == 1
    assert set(summary["base"]) == set(summary["tuned"]) == set(summary["delta_ci95"]) == {"verifier", "size"}
    # sampling 4 images in 3 steps, then one time an image: a forward (old policy = live), reference, a backward of 2
    assert summary["nfe"] == 4 * 3 + 4 * (1 + 1 + 2)
    for key in ("adapter", "grid", "report"):
        assert Path(summary[key]).exists(), key
    assert len(json.loads((run / "eval" / "tuned.json").read_text())["scores"]["size"]) == 4


def test_every_metric_that_is_written_is_in_the_documentation(run):
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"train", "eval"}
    for key in {key for row in rows for key in row}:
        general = re.sub(r"\b(verifier|size)", "<name>" if key.startswith("reward/") else "<reward>", key)
        general = re.sub(r"^reward/<name>/\w+", "reward/<name>/<component>", general)
        assert f"`{general}`" in page or f'`"{key}"' in page or f"`{key}" in page, key


def test_sample_writes_images_and_a_sheet_and_repeats_itself(tmp_path):
    for out in ("one", "two"):
        align("sample", "playground", "a red circle", "--n", 2, "--steps", 4, "--out", tmp_path / out)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["0000.png", "0001.png", "sheet.png"]
    assert size_of(tmp_path / "one" / "0000.png") == (64, 64)
    first, again = ((tmp_path / out / "0001.png").read_bytes() for out in ("one", "two"))
    assert first == again
    assert first != (tmp_path / "one" / "0000.png").read_bytes()


def test_sample_of_a_run_uses_its_adapter_and_scale_zero_is_the_base(run, tmp_path):
    for name, target, options in (("base", "playground", []), ("off", run, ["--scale", 0]), ("tuned", run, [])):
        shared = ["--n", 1, "--steps", 3, "--seed", 5, "--guidance", 1, "--out", tmp_path / name]
        align("sample", target, "a red circle", *shared, *options)
    images = {name: (tmp_path / name / "0000.png").read_bytes() for name in ("base", "off", "tuned")}
    assert images["off"] == images["base"]
    assert (tmp_path / "tuned" / "sheet.png").is_file()


def test_grid_of_a_run(run, tmp_path):
    out = tmp_path / "grid.png"
    assert str(out) in align("grid", run, "--n", 2, "--out", out)
    width, height = size_of(out)
    assert width > 2 * 192
    assert height > 2 * 192


def test_eval_of_a_run_repeats_the_scores_of_training(run):
    output = align("eval", run, "--n", 3)
    folder = run / "eval" / "2-steps"
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["base"]) == {"verifier", "size"}
    assert "verifier" in output
    for label in ("base", "tuned"):
        now = json.loads((folder / f"{label}.json").read_text())["scores"]["size"]
        then = json.loads((run / "eval" / f"{label}.json").read_text())["scores"]["size"]
        # kB of a JPEG: the batch size may move a pixel by one grey level, which is a few bytes
        assert now == pytest.approx(then[:3], abs=0.05)


def test_eval_of_a_model_with_own_prompts_and_reward(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\na blue star\n")
    options = ["--prompts", tmp_path / "p.txt", "--reward", "verifier", "--steps", 2, "--out", tmp_path / "eval"]
    assert "2 prompts" in align("eval", "playground", *options)
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert "tuned" not in summary
    assert 0 <= summary["base"]["verifier"] <= 1
    assert not (tmp_path / "eval" / "tuned.json").exists()


def test_report_of_a_run(run):
    assert "report.html" in align("report", run)
    assert "<html" in (run / "report.html").read_text()


def test_dry_run_prints_everything_and_writes_nothing(config, tmp_path):
    output = align("train", config, "--dry-run", f"output_dir={tmp_path}", "train.group_size=4")
    assert "group_size: 4" in output
    for words in ("2 prompts x 4", "gradient accumulation", "trainable", "total", "4 for evaluation"):
        assert words in output, words
    assert list(tmp_path.iterdir()) == []


def test_bench_writes_one_row(config, tmp_path):
    out = tmp_path / "bench.json"
    align("bench", config, "eval.prompts=1", "--iterations", 1, "--out", out)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["nfe"] == 4 * 3 + 4 * (1 + 1 + 2)
    assert row["tflop"] > 0
    assert row["seconds"] == pytest.approx(row["seconds_sample"] + row["seconds_score"] + row["seconds_train"])
    assert 0 < row["model_flop_utilisation"] == row["hardware_flop_utilisation"]  # nothing is recomputed here
    assert row["peak_mb"] > 0


# -- bad input --------------------------------------------------------------------------------------------------


def test_a_missing_config_is_one_line(tmp_path):
    (line,) = refused("train", tmp_path / "nothing.yaml")
    assert "no file" in line


def test_all_mistakes_of_a_config_are_listed(config):
    lines = refused("train", config, "--dry-run", "train.iteration=3", "optm.lr=1", "train.group_size=x")
    assert sorted(line.split(":")[0] for line in lines) == ["optm", "train.group_size", "train.iteration"]
    assert any(line.endswith("(did you mean 'iterations'?)") for line in lines)


def test_yaml_that_cannot_be_read_is_one_line(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("train: {iterations: 3\nname: [")
    (line,) = refused("train", path)
    assert "not valid YAML" in line


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_bad_prompt_files_name_the_line(config, tmp_path, dry):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    (line,) = refused("train", config, *dry, f"prompts.train={path}", f"output_dir={tmp_path}")
    assert f"{path}:2" in line


@pytest.mark.parametrize("path", ["/no/such/folder", "./models/mine"])
def test_a_missing_model_folder_is_one_line(config, tmp_path, path):
    (line,) = refused("train", config, f"model.path={path}", f"output_dir={tmp_path}")
    assert line.startswith(f"model.path: no folder {path}")


def test_a_folder_that_is_no_model_is_one_line(config, tmp_path):
    (tmp_path / "empty").mkdir()
    (line,) = refused("train", config, f"model.path={tmp_path}/empty", f"output_dir={tmp_path}")
    assert "has no model_index.json" in line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [1.0]", "returned 1 scores for 4 images"),
        ("return images.mean(dim=(1, 2))", "returned shape (4, 64), expected (4,)"),
        ("return None", "returned NoneType"),
        ("raise RuntimeError('server is down')", "failed: RuntimeError: server is down"),
    ],
)
def test_a_reward_that_returns_the_wrong_thing_is_one_line(config, tmp_path, body, words):
    path = tmp_path / "mine.py"
    path.write_text(f"def score(images, prompts, metadata):\n    {body}\n")
    (line,) = refused("train", config, f"rewards.mine.type={path}:score", f"output_dir={tmp_path}")
    assert "reward 'mine'" in line
    assert words in line


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_reward_that_cannot_be_built_is_one_line(config, tmp_path, dry):
    (line,) = refused("train", config, *dry, "rewards.verifier.args.grade=1", f"output_dir={tmp_path}")
    assert line == "reward 'verifier': unknown argument 'grade'; did you mean 'graded'?"


def test_an_unknown_tracker_is_one_line(config, tmp_path):
    (line,) = refused("train", config, "trackers=[tensorbord]", f"output_dir={tmp_path}")
    assert "trackers" in line


def test_samples_that_cannot_be_split_are_one_line(config, tmp_path):
    (line,) = refused("train", config, "train.updates_per_iteration=3", f"output_dir={tmp_path}")
    assert "3 does not divide the 4 samples" in line


def test_report_of_a_folder_that_is_no_run_is_one_line(tmp_path):
    (line,) = refused("report", tmp_path)
    assert "is not the folder of a run" in line


def test_a_mistyped_run_names_its_neighbour(run):
    (line,) = refused("grid", run.parent / "tyny")
    assert line.endswith("(did you mean 'tiny'?)")


def test_a_run_without_adapter_says_so(run, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    (line,) = refused("sample", tmp_path, "a red circle")
    assert "the run is not finished" in line


def test_a_model_without_prompts_or_rewards_says_what_to_give(tmp_path):
    assert refused("eval", "playground", "--reward", "verifier") == [
        "give --prompts FILE (a .txt, a .jsonl, or playground:heldout_test)"
    ]
    assert refused("eval", "playground", "--prompts", "playground:heldout_test") == ["give at least one --reward NAME"]
    (line,) = refused("eval", "playground", "--prompts", "playground:seen_test", "--reward", "jpge")
    assert "did you mean 'jpeg'?" in line


# -- the installed command ----------------------------------------------------------------------------------------


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "align.cli", *arguments]
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def test_the_command_in_a_shell_ends_with_one_line_and_status_one(tmp_path):
    """No torch model is needed to learn that a config is wrong; --debug shows where it was noticed."""
    (tmp_path / "bad.yaml").write_text("sampler: {kernl: ode}\n")
    for extra, traceback in (([], False), (["--debug"], True)):
        done = command("train", "bad.yaml", *extra, cwd=tmp_path)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == traceback
        assert "sampler.kernl: unknown key (did you mean 'kernel'?)" in done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.yaml"]
