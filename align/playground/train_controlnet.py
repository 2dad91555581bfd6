"""Make the playground's ControlNet: `python -m align.playground.train_controlnet --out DIR`.

It is the run of configs/playground/controlnet.yaml: a ControlNet made from the shipped U-Net, trained by the diffusion
loss alone on layouts of scenes. DIR is then a folder that `ControlNetModel.from_pretrained` loads, in float16, with the
scores of the run in controlnet.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from align.config import CONFIG_DIR, Config, load_config
from align.tracking import write_json
from align.train import train


def export(run_dir: Path, config: Config, summary: dict[str, Any], out: Path) -> None:
    """Write the result of the finished run in `run_dir` to `out`, with what is known of it."""
    from diffusers import ControlNetModel

    network = ControlNetModel.from_pretrained(run_dir / "controlnet", torch_dtype=torch.float16)
    network.save_pretrained(out)
    path = out / "config.json"
    settings = json.loads(path.read_text())
    settings.pop("_name_or_path", None)  # where it was read from: of no use to anyone else
    path.write_text(json.dumps(settings, indent=2) + "\n")
    (out / "diffusion_pytorch_model.safetensors").chmod(0o644)
    figures = {
        "command": "python -m align.playground.train_controlnet",
        "iterations": summary["iterations"],
        "batch": config.samples_per_iteration,
        "seed": config.train.seed,
        "parameters": sum(p.numel() for p in network.parameters()),
        "prompts": config.prompts.eval,
        "n": config.eval.prompts,
        "without_condition": {k: round(v, 4) for k, v in summary["base"].items()},
        "trained": {k: round(v, 4) for k, v in summary["tuned"].items()},
        "seconds": round(summary["seconds"], 1),
        "versions": json.loads((run_dir / "environment.json").read_text())["versions"],
    }
    write_json(out / "controlnet.json", figures)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m align.playground.train_controlnet", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the ControlNet")
    parser.add_argument("--work", type=Path, help="folder for the run, which continues there (default: OUT-work)")
    parser.add_argument("overrides", nargs="*", help="settings that win over the file, as in train.iterations=20")
    args = parser.parse_args()
    work = args.work or args.out.with_name(args.out.name + "-work")
    overrides = [*args.overrides, f"output_dir={work}", "name=run"]
    config = load_config(CONFIG_DIR / "playground" / "controlnet.yaml", overrides)
    summary = train(config, Console())
    if summary is not None:  # else it was stopped, and the same command continues
        export(config.run_dir, config, summary, args.out)


if __name__ == "__main__":
    main()
