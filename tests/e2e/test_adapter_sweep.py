"""`align grid` and `align eval` with strengths and mixtures, on two runs trained by the real command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from align.cli import app
from align.errors import UserError
from align.evaluate import paired_interval

CONFIG = """\
preset: [playground, nft]
model: {precision: fp32}
sampler: {num_steps: 3}
objective: {times_per_sample: 1}
eval_rewards: {size: {type: jpeg}}
optim: {lr: 0.01}
train: {iterations: 1, prompts_per_iteration: 2, group_size: 2, micro_batch: 4, rollout_batch: 4}
eval: {every: 0, prompts: 4, during: 2, num_steps: 2, grid_prompts: 2}
trackers: []
"""
CELL = 192 + 18
"""Pixels of a column of 64-pixel images and the gap before it."""

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerator():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def invoke(*arguments) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})


def align(*arguments) -> str:
    result = invoke(*arguments)
    if result.exit_code:
        raise AssertionError(result.output) from result.exception
    return result.output


def refused(*arguments) -> str:
    """The one error line of a command that must fail; with --debug it must raise instead."""
    result = invoke(*arguments)
    assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.output
    (line,) = (line for line in result.output.splitlines() if line)
    assert isinstance(invoke(*arguments, "--debug").exception, UserError)
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folder of two finished runs, `a` and `b`, whose adapters have different ranks."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.yaml").write_text(CONFIG + f"output_dir: {folder}\n")
    for seed, (name, rank) in enumerate((("a", 32), ("b", 4))):
        align("train", folder / "tiny.yaml", f"name={name}", f"model.lora.rank={rank}", f"train.seed={seed}")
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def cells(page: np.ndarray, column: int) -> np.ndarray:
    """The pictures of one column of a grid with two prompts, without its heading and scores."""
    left = 28 + 230 + 18 + column * CELL
    tops = [top for top in range(len(page) - 192) if is_picture(page, top, left)]
    rows = [top for top in tops if top - 1 not in tops]
    assert len(rows) == 2
    return np.stack([page[top : top + 192, left : left + 192] for top in rows])


def is_picture(page: np.ndarray, top: int, left: int) -> bool:
    """Scenes are on dark ground and the paper is white: a dark column of 192 pixels below a white one."""
    edge = page[top : top + 192, left].max(axis=1)
    return bool((edge < 200).all()) and bool((page[top - 1, left] > 200).all())


def scores(folder: Path, name: str) -> dict[str, list[float]]:
    return json.loads((folder / name).read_text())["scores"]


def test_grid_has_a_column_a_strength_beside_the_base(runs, tmp_path):
    shared = ["--n", 2, "--reward", "size", "--out"]
    align("grid", runs / "a", *shared, tmp_path / "plain.png")
    printed = align("grid", runs / "a", "--scales", "0,0.5,1,0.5", *shared, tmp_path / "sweep.png")
    assert f"grid: {tmp_path / 'sweep.png'}" in printed
    plain, sweep = pixels(tmp_path / "plain.png"), pixels(tmp_path / "sweep.png")
    assert sweep.shape[1] - plain.shape[1] == CELL  # base, 0.5 and 1 instead of base and tuned
    assert (cells(sweep, 0) == cells(plain, 0)).all()
    assert (cells(sweep, 2) == cells(plain, 1)).all()
    assert np.abs(cells(sweep, 1) - cells(plain, 0)).max() > 5
    assert np.abs(cells(sweep, 1) - cells(plain, 1)).max() > 5


def test_grid_of_a_mixture_stands_beside_base_and_tuned(runs, tmp_path):
    mixes = [f"{runs}/a:0.5,{runs}/b:0.5", f"{runs}/b/adapter:1"]
    out = runs / "a" / "grids" / "sweep.png"
    printed = align("grid", runs / "a", "--mix", mixes[0], "--mix", mixes[1], "--n", 2, "--reward", "size")
    assert f"grid: {out}" in printed
    align("grid", runs / "b", "--n", 2, "--reward", "size", "--out", tmp_path / "b.png")
    page, of_b = pixels(out), pixels(tmp_path / "b.png")
    assert page.shape[1] == of_b.shape[1] + 2 * CELL
    assert (cells(page, 0) == cells(of_b, 0)).all()
    assert (cells(page, 3) == cells(of_b, 1)).all()
    for other in (0, 1, 3):
        assert np.abs(cells(page, 2) - cells(page, other)).max() > 5


def test_eval_of_strengths_has_every_mean_with_its_interval(runs):
    shared = ["eval", runs / "a", "--n", 4]
    align(*shared)
    printed = align(*shared, "--scales", "0,0.25,0.5,1,-1", "--reward", "verifier", "--reward", "size")
    folder, plain = runs / "a" / "eval" / "2-steps-sweep", runs / "a" / "eval" / "2-steps"
    summary = json.loads((folder / "summary.json").read_text())
    labels = ["base", "scale=0.25", "scale=0.5", "scale=1", "scale=-1"]
    assert list(summary["columns"]) == labels
    files = {summary["columns"][label]["scores"] for label in labels}
    assert {path.name for path in folder.iterdir()} == files | {"grid.png", "summary.json"}
    assert scores(folder, "base.json") == scores(plain, "base.json")
    assert scores(folder, "scale-1.json") == scores(plain, "tuned.json")
    base = scores(folder, "base.json")
    for label in labels:
        column = summary["columns"][label]
        found = scores(folder, column["scores"])
        for reward in ("verifier", "size"):
            assert column["mean"][reward] == pytest.approx(np.mean(found[reward]), abs=1e-9)
            if label == "base":
                continue
            interval = paired_interval(torch.tensor(base[reward]), torch.tensor(found[reward]))
            # JSON keeps every digit of the scores, which are float32
            assert column["delta_ci95"][reward] == pytest.approx(interval, abs=1e-6)
            assert column["adapters"] == [
                {"folder": f"{runs}/a/adapter", "strength": float(label.removeprefix("scale="))}
            ]
    assert summary["columns"]["base"]["adapters"] == []
    assert summary["columns"]["base"]["delta_ci95"] == {}
    assert len({tuple(scores(folder, name)["size"]) for name in files}) == len(labels)
    table = [line for line in printed.splitlines() if re.match(r" *(base|scale=\S+) ", line)]
    assert [line.split()[0] for line in table] == labels
    assert all(line.count("[") == 2 for line in table[1:])
    assert "4 prompts" in printed
    assert str(folder / "grid.png") in printed


def test_the_plain_command_writes_what_it_did_before(runs):
    """Scripts read these keys; a sweep beside it leaves them alone."""
    align("eval", runs / "b", "--n", 2, "--mix", f"{runs}/a:1")
    align("eval", runs / "b", "--n", 2)
    summary = json.loads((runs / "b" / "eval" / "2-steps" / "summary.json").read_text())
    assert set(summary) == {"base", "tuned", "delta_ci95", "adapter", "grid", "report"}
    assert set(summary["base"]) == set(summary["tuned"]) == set(summary["delta_ci95"]) == {"verifier", "size"}
    assert list(json.loads((runs / "b" / "eval" / "2-steps-sweep" / "summary.json").read_text())["columns"]) == [
        "base",
        "tuned",
        "a 1",
    ]


def test_eval_of_a_mixture_on_a_model(runs, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\na blue star\n")
    mix = ["--mix", f"{runs}/a:0.5,{runs}/b:0.5", "--mix", f"{runs}/a:1"]
    options = ["--prompts", tmp_path / "p.txt", "--reward", "jpeg", "--steps", 2, "--seed", 5, "--guidance", 1, "--out"]
    printed = align("eval", "playground", *mix, *options, tmp_path / "eval")
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert list(summary["columns"]) == ["base", "a 0.5 + b 0.5", "a 1"]
    assert [c["scores"] for c in summary["columns"].values()] == ["base.json", "mix-1.json", "mix-2.json"]
    assert "a 0.5 + b 0.5" in printed
    made_of = json.loads((tmp_path / "eval" / "mix-1.json").read_text())["adapters"]
    assert made_of == [{"folder": f"{runs}/{name}/adapter", "strength": 0.5} for name in ("a", "b")]
    align("eval", "playground", "--adapter", runs / "a" / "adapter", *options, tmp_path / "of-a")
    assert scores(tmp_path / "eval", "mix-2.json") == scores(tmp_path / "of-a", "tuned.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scales", "0,x"], "--scales: '0,x' is not a list of finite numbers; for example --scales 0,0.5,1"),
        (["--scale", "1", "--scales", "0,1"], "give one of the two"),
        (["--mix", "{runs}/a"], "for example --mix outputs/a:0.5,outputs/b:0.5"),
        (["--mix", "{runs}/nowhere:1"], "there is no run or adapter folder"),
    ],
)
@pytest.mark.parametrize("command", ["grid", "eval"])
def test_options_that_cannot_be_read_are_one_line(runs, command, options, words):
    assert words in refused(command, runs / "a", *(option.format(runs=runs) for option in options))


@pytest.mark.parametrize("options", [["--scales", "0,1"], ["--mix", "{runs}/a:1"]])
def test_a_trajectory_has_no_columns(runs, options):
    words = [option.format(runs=runs) for option in options]
    assert "--trajectory takes one strength" in refused("grid", runs / "a", "--trajectory", *words)


def test_a_model_has_no_strength_and_no_foreign_adapter(runs):
    prompts = ["--prompts", "playground:seen_test", "--n", "1"]
    assert "no adapter to scale" in refused("grid", "playground", "--scales", "0,1", *prompts)
    line = refused("grid", "playground-unet", "--mix", f"{runs}/a:1", *prompts)
    assert (
        line == f"adapter: {runs}/a/adapter holds none for UNet2DConditionModel; it was made for another kind of model"
    )
