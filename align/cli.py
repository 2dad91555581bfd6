"""The `align` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from align.fit_artifact import fit_artifact_command
from align.fit_direction import fit_direction_command
from align.serve import serve_command
from align.train import print_summary, readable_errors, save_comparison, train_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune text-to-image models towards a reward and see what it did. First: align train configs/demo.yaml",
)
app.command("train")(train_command)
app.command("serve-reward")(serve_command)
app.command("fit-artifact")(fit_artifact_command)
app.command("fit-direction")(fit_direction_command)

Target = Annotated[
    str, typer.Argument(help="a run's folder (outputs/NAME), or a model: diffusers folder, hub id, or playground")
]
Adapter = Annotated[str | None, typer.Option(help="folder with pytorch_lora_weights.safetensors (default: the run's)")]
Prompts = Annotated[
    str | None, typer.Option(help=".txt, .jsonl or playground:SPLIT (default: the run's held-out prompts)")
]
Steps = Annotated[int | None, typer.Option(min=1, help="sampling steps (default: the run's, else 28)")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale (default: the run's, else 1)")]
Seed = Annotated[int | None, typer.Option(min=0, help="noise seed (default: the run's, else 0)")]
Reward = Annotated[list[str] | None, typer.Option(help="a reward to score with; repeatable (default: the run's)")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Scale = Annotated[float | None, typer.Option(help="strength of the adapter; 0 is the base (default: 1)")]
Scales = Annotated[
    str | None, typer.Option(help="several strengths, a column each, as in 0,0.5,1; below 0 and above 1 too")
]
Mix = Annotated[
    list[str] | None,
    typer.Option(
        metavar="A:0.5,B:0.5",
        help="a further column: the adapters of these runs or folders, each with its strength; repeatable",
    ),
]


@app.command()
def sample(
    target: Target,
    prompt: Annotated[list[str], typer.Argument(help="prompts")],
    out: Annotated[Path, typer.Option(help="folder for the images")] = Path("outputs/samples"),
    n: Annotated[int, typer.Option(min=1, help="images per prompt")] = 4,
    adapter: Adapter = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    scale: Scale = None,
    debug: Debug = False,
) -> None:
    """Generate images of one or more prompts, and a contact sheet of all of them.

    For example: align sample outputs/demo "a red circle" "two blue stars" --n 4
    """
    console = Console()
    with readable_errors(console, debug):
        from align.evaluate import sample_images
        from align.grids import as_image, image_sheet, save_png
        from align.inference import load_target

        setup = load_target(target, adapter, steps, guidance, seed, 1.0 if scale is None else scale)
        texts = [p for p in prompt for _ in range(n)]
        images = []
        with console.status(f"sampling {len(texts)} images"):
            for first in range(0, len(texts), 16):
                index = list(range(first, min(first + 16, len(texts))))
                chunk = [texts[i] for i in index]
                images += list(
                    sample_images(setup.model, chunk, index, setup.num_steps, setup.guidance_scale, setup.seed)
                )
        for i, image in enumerate(images):
            save_png(as_image(image), out / f"{i:04d}.png")
        sheet = save_png(image_sheet(images, texts, columns=n), out / "sheet.png")
        console.print(f"{len(images)} images in {out}, all on {sheet}", highlight=False, soft_wrap=True)


@app.command()
def grid(
    target: Target,
    prompts: Prompts = None,
    n: Annotated[
        int | None, typer.Option(min=1, help="number of prompts (default: 8), or of trajectories (default: 1)")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG to write (default: grid.png, sweep.png or trajectory.png in RUN/grids)")
    ] = None,
    trajectory: Annotated[
        bool, typer.Option("--trajectory", help="instead: one prompt's trajectory, every state completed and scored")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option(help="with --trajectory: its prompt (default: the first held-out one)")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="with --trajectory: the first one's number, which names its noise")
    ] = 0,
    adapter: Adapter = None,
    reward: Reward = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    scale: Scale = None,
    scales: Scales = None,
    mix: Mix = None,
    debug: Debug = False,
) -> None:
    """Draw prompts x {base, tuned} from the same noise, with scores under each image; or one trajectory, step by step.

    --scales and --mix draw other columns beside the base: strengths of the adapter, and sums of several adapters.
    --trajectory samples as the run trains (a model: flow_sde, 10 steps) and marks turning points; there TARGET may also
    be a run's YAML file or adapter folder. For example:
    align grid playground --trajectory --reward verifier --prompt "a red circle" --n 2
    """
    console = Console()
    with readable_errors(console, debug):
        from align.errors import UserError
        from align.evaluate import conditions_of
        from align.inference import chosen_prompts, chosen_rewards, compare, load_target
        from align.sweep import read_sweep, sweep_columns

        sweep = read_sweep(scale, scales, mix)  # a mistake is told now, not after the model is loaded
        if trajectory and sweep.given:
            raise UserError("--scales and --mix go with a grid of prompts; --trajectory takes one strength, --scale")
        if trajectory:
            from align.trajectory import chosen_prompt, load_setup, sample_trajectories, save_trajectories

            setup = load_setup(target, adapter, seed, sweep.scale)
            with console.status("sampling and scoring"):
                numbers = range(sample, sample + (n or 1))
                found = sample_trajectories(
                    setup, chosen_prompt(setup, prompt, prompts), numbers, reward or [], steps, guidance
                )
            folder = Path(target) / "grids" if (Path(target) / "config.yaml").is_file() else Path("outputs")
            path = save_trajectories(out or folder / "trajectory.png", found)
        elif prompt is not None or sample:
            raise UserError("--prompt and --sample go with --trajectory; a grid takes --prompts FILE")
        else:
            setup = load_target(target, adapter, steps, guidance, seed, sweep.scale)
            adapters = {column.label: column.shares for column in sweep_columns(sweep, setup)}
            rows = chosen_prompts(setup, prompts, n or 8)
            rewards = chosen_rewards(setup, reward or [])
            columns = compare(setup, rewards, rows, console, keep=len(rows), adapters=adapters)
            name = "sweep.png" if sweep.given else "grid.png"
            path = out or (Path(target) / "grids" if setup.config else Path("outputs")) / name
            save_comparison(path, columns, len(rows), conditions_of(setup.model, rows))
        console.print(f"grid: {path}", highlight=False, soft_wrap=True)


@app.command("eval")
def eval_command(
    target: Target,
    prompts: Prompts = None,
    n: Annotated[int | None, typer.Option(min=1, help="use only the first n prompts")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for JSON and grid (default: RUN/eval/STEPS-steps)")] = None,
    adapter: Adapter = None,
    reward: Reward = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    scale: Scale = None,
    scales: Scales = None,
    mix: Mix = None,
    debug: Debug = False,
) -> None:
    """Score base and tuned on held-out prompts: JSON, grid and a table with paired 95 % intervals.

    A run brings its own prompts, rewards, steps and guidance; options win over them. A model needs --prompts and
    --reward. --reward takes a name of the run's config, a registered reward (jpeg, clip, verifier) or FILE.py:NAME.
    --scales and --mix score other columns against the base: strengths of the adapter, and sums of several adapters.
    """
    console = Console()
    with readable_errors(console, debug):
        from align.errors import UserError
        from align.evaluate import conditions_of, paired_interval
        from align.inference import chosen_prompts, chosen_rewards, compare, load_target
        from align.sweep import print_sweep, read_sweep, save_sweep, sweep_columns
        from align.tracking import write_json

        sweep = read_sweep(scale, scales, mix)
        setup = load_target(target, adapter, steps, guidance, seed, sweep.scale)
        rewards = chosen_rewards(setup, reward or [])
        if not rewards:
            raise UserError("give at least one --reward NAME")
        found = chosen_prompts(setup, prompts, n)
        shown = sweep_columns(sweep, setup)
        adapters = {column.label: column.shares for column in shown}
        columns = compare(setup, rewards, found, console, keep=8, adapters=adapters)
        name = f"{setup.num_steps}-steps" + ("-sweep" if sweep.given else "")
        folder = out or (Path(target) if setup.config else Path("outputs")) / "eval" / name
        if sweep.given:
            print_sweep(save_sweep(folder, columns, shown, min(8, len(found))), len(found), console)
            return
        for label, evaluation in columns.items():
            write_json(folder / f"{label}.json", evaluation.to_json())
        shown_rows = min(8, len(found))
        path = save_comparison(
            folder / "grid.png", columns, shown_rows, conditions_of(setup.model, found[:shown_rows])
        )
        scores = {label: evaluation.scores for label, evaluation in columns.items()}
        means = {label: {k: s.mean(k) for k in rewards} for label, s in scores.items()}
        base, tuned = scores["base"].values, scores["tuned"].values if "tuned" in scores else {}
        summary = {
            **means,
            "delta_ci95": {k: paired_interval(base[k], tuned[k]) for k in tuned},
            "adapter": str(setup.adapter) if setup.adapter else None,
            "grid": str(path),
            "report": str(folder),
        }
        write_json(folder / "summary.json", summary)
        print_summary(summary, len(found), console)


@app.command("score")
def score_command(
    images: Annotated[
        str | None, typer.Argument(help="an image, a folder of images, or a .jsonl with image and prompt in each line")
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="a registered name, FILE.py:NAME or package.module:NAME; repeatable")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="the prompt of every image")] = None,
    prompts: Annotated[str | None, typer.Option(help=".txt or .jsonl with a prompt for each image, by name")] = None,
    arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="argument of the reward; repeatable")
    ] = None,
    check: Annotated[
        str | None, typer.Option(metavar="REWARD", help="instead: does this reward keep the contract, point by point?")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write as well")] = None,
    debug: Debug = False,
) -> None:
    """Score image files with any reward, or check a reward of your own.

    For example: align score photos --reward jpeg; align score --check my_reward.py:MyReward --arg floor=0.1
    """
    console = Console()
    with readable_errors(console, debug):
        from align.score import run_check, run_score

        if check is None:
            run_score(images, reward or [], console, prompt=prompt, prompts=prompts, arguments=arg or [], out=out)
        elif not run_check(check, console, source=images, prompt=prompt, prompts=prompts, arguments=arg or [], out=out):
            raise SystemExit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="a run's folder")], debug: Debug = False) -> None:
    """Write report.html of a run, finished or not."""
    console = Console()
    with readable_errors(console, debug):
        from align.report import write_report

        console.print(f"report: {write_report(run)}", highlight=False, soft_wrap=True)


@app.command("compare")
def compare_command(
    runs: Annotated[list[str], typer.Argument(help="folders of runs, finished or not", metavar="RUN...")],
    prompts: Annotated[
        str | None, typer.Option(help=".txt, .jsonl or playground:SPLIT (default: the first run's held-out prompts)")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="prompts in the grid")] = 8,
    seed: Annotated[int | None, typer.Option(min=0, help="noise seed of the grid (default: the first run's)")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="a curve to draw, as in train/kl; repeatable (default: the rewards)")
    ] = None,
    x: Annotated[
        list[str] | None, typer.Option("--x", help="iteration, nfe or seconds; repeatable (default: all three)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write (default: outputs/compare-A-B)")] = None,
    no_grid: Annotated[bool, typer.Option("--no-grid", help="scores and curves only; loads no model")] = False,
    debug: Debug = False,
) -> None:
    """Put runs side by side: scores with paired intervals, curves at equal cost, pictures from the same noise.

    For example: align compare outputs/ddpo outputs/b2
    """
    console = Console()
    with readable_errors(console, debug):
        from align.compare import compare_runs

        compare_runs(
            runs, console, prompts=prompts, count=rows, seed=seed, metrics=metric or [], costs=x or [], out=out,
            pictures=not no_grid,
        )  # fmt: skip


@app.command()
def bench(
    config: Annotated[str, typer.Argument(help="YAML file of a run")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings that win over the file, as in train.group_size=8")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="timed iterations, after one warm-up")] = 3,
    random: Annotated[
        str | None, typer.Option(help="time a model of this size with random weights: sd15, sdxl or sd35-medium")
    ] = None,
    out: Annotated[Path, typer.Option(help="result file")] = Path("benchmarks/results/bench.json"),
    debug: Debug = False,
) -> None:
    """Time full iterations of a config: seconds per stage, peak memory, FLOP utilisation. Trains nothing that is kept."""
    console = Console()
    with readable_errors(console, debug):
        from align.bench import run_bench
        from align.config import load_config

        run_bench(load_config(config, overrides or []), iterations, random, out, console)


@app.command()
def calibrate(
    config: Annotated[str, typer.Argument(help="YAML file of a run with sampler.kernel flow_sde")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="settings that win over the file, as in calibration.samples=64")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="table to write (default: where sampler.psi=auto finds it)")] = None,
    debug: Debug = False,
) -> None:
    """Measure the noise of each sampling step (psi) that explores most while gains and losses stay balanced.

    Writes the table and a chart of it. Training takes the table with sampler.psi=FILE, or sampler.psi=auto.
    """
    console = Console()
    with readable_errors(console, debug):
        from align.calibrate import run_calibration
        from align.config import load_config

        run_calibration(load_config(config, overrides or []), out, console)


def main() -> None:
    """Console entry point."""
    app()


if __name__ == "__main__":
    main()
