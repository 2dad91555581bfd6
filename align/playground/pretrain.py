"""Make the playground's weights again: `python -m align.playground.pretrain [--base unet] --out DIR`.

Stages of the transformer: scenes, vae, latents, flow (text encoders and transformer), assess. The U-Net shares the
shipped transformer's autoencoder and first text encoder; its stages: scenes, latents, unet, assess. A finished stage is
not repeated and an interrupted one continues from its last saved state, as long as --work and the settings stay the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.playground.data import write_arrays
from align.playground.parallel import launch
from align.playground.train_transformer import FlowRecipe, flow_worker
from align.playground.train_unet import UNetRecipe, unet_worker
from align.playground.train_vae import VaeRecipe, latent_worker, render_worker, vae_worker

FIRST = Path(__file__).parent / "weights"
STAGES = {"transformer": ("scenes", "vae", "latents", "flow"), "unet": ("scenes", "latents", "unet")}


def _once(work: Path, stage: str, settings: dict[str, Any], run: Any) -> None:
    """Run a stage unless its marker says that it has finished; refuse a marker of other settings."""
    marker = work / f"{stage}.done"
    if marker.exists():
        done = json.loads(marker.read_text())
        if done["settings"] != settings:
            raise SystemExit(f"{work} holds the stage '{stage}' of other settings; delete it or choose another --work")
        return
    began = time.time()
    run()
    marker.write_text(json.dumps({"settings": settings, "seconds": round(time.time() - began, 1)}))


def _scenes(work: Path, count: int, processes: int, seed: int) -> dict[str, Any]:
    """The stage that both bases begin with; returns its settings."""
    work.mkdir(parents=True, exist_ok=True)
    data = {"count": count, "seed": seed}

    def render() -> None:
        write_arrays(work, count)
        launch(render_worker, processes, str(work), count, seed)

    _once(work, "scenes", data, render)
    return data


def pretrain(
    out: Path, work: Path, *, count: int, processes: int, vae: VaeRecipe, flow: FlowRecipe, prompts: int = 256
) -> None:
    """Run all stages of the transformer; the pipeline, its card and its figures end up in `out`."""
    data = _scenes(work, count, processes, vae.seed)
    _once(work, "vae", data | asdict(vae), lambda: launch(vae_worker, processes, str(work), vae))
    _once(work, "latents", data | asdict(vae), lambda: launch(latent_worker, processes, str(work)))
    everything = data | {"vae": asdict(vae), "flow": asdict(flow)}
    _once(work, "flow", everything, lambda: launch(flow_worker, processes, str(work), str(out), flow))
    assess(out, work, "transformer", processes=processes, prompts=prompts)


def pretrain_unet(
    out: Path, work: Path, *, count: int, processes: int, unet: UNetRecipe, prompts: int = 256, first: Path = FIRST
) -> None:
    """Run all stages of the U-Net on the parts of the base in the folder `first`; results end up in `out`."""
    data = _scenes(work, count, processes, unet.seed)
    latents = data | {"vae": _digest(first / "vae")}
    _once(work, "latents", latents, lambda: launch(latent_worker, processes, str(work), str(first)))
    everything = latents | {"text_encoder": _digest(first / "text_encoder"), "unet": asdict(unet)}
    _once(work, "unet", everything, lambda: launch(unet_worker, processes, str(work), str(out), unet, str(first)))
    assess(out, work, "unet", processes=processes, prompts=prompts)


def _digest(part: Path) -> str:
    """A short name of a part's weights, so that stages made with other weights are not taken for finished ones."""
    files = sorted(part.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def assess(out: Path, work: Path, base: str, *, processes: int, prompts: int = 256) -> None:
    """Measure the pipeline in `out`; writes pretrain.json and README.md into it and samples.png into `work`."""
    from align.playground.assess import assess_worker, load_pipeline, picture_grid, round_trip, summarise

    launch(assess_worker, processes, str(out), str(work), prompts)
    pipe = load_pipeline(out)
    stages = STAGES[base]
    training = json.loads((work / f"{stages[-1]}.json").read_text())
    modules = {name: part for name, part in pipe.components.items() if hasattr(part, "parameters")}
    figures = {
        "scores": summarise(work, processes),
        "vae": {"round_trip_full": round_trip(pipe.vae, 1000)},
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in modules.items()},
        "seconds": {s: json.loads((work / f"{s}.done").read_text())["seconds"] for s in stages[:-1]}
        | {stages[-1]: round(training["seconds"], 1)},
        "recipe": training["recipe"],
        "final_loss": round(training["loss"], 4),
        "processes": processes,
        "versions": _versions(),
    }
    if "vae" in stages:
        figures["vae"]["psnr_db"] = round(json.loads((work / "vae.json").read_text())["psnr"], 2)
    (out / "pretrain.json").write_text(json.dumps(figures, indent=1) + "\n")
    (out / "README.md").write_text(card(figures) if base == "transformer" else unet_card(figures))
    picture_grid(pipe).save(work / "samples.png", optimize=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version()} | {p: version(p) for p in ("torch", "diffusers", "transformers")}


def _table(figures: dict[str, Any]) -> str:
    """The scores of every setting, categories left out, as a Markdown table."""
    rows = [
        f"| {name} | {s['n']} | {s['full']:.3f} | {s['graded']:.3f} |"
        for name, s in figures["scores"].items()
        if "=" in name.split()[-1]
    ]
    return "\n".join(["| prompts | n | full | graded |", "|---|---|---|---|", *rows])


def card(figures: dict[str, Any]) -> str:
    """The README of the transformer's folder."""
    millions = sum(figures["parameters"].values()) / 1e6
    return f"""# Playground weights

A tiny Stable Diffusion 3 pipeline ({millions:.1f} M parameters, float16) that draws 64x64 scenes of coloured shapes.
It was trained from scratch on procedural scenes by `python -m align.playground.pretrain --out DIR`; no other data was
used.

```python
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained("align/playground/weights", text_encoder_3=None, tokenizer_3=None)
image = pipe("a red circle", num_inference_steps=28, guidance_scale=4, max_sequence_length=0).images[0]
image.resize((256, 256)).save("circle.png")
```

Pass `max_sequence_length=0`: there is no third text encoder, and the default would append 256 zero tokens that the
model has never seen. T is the number of Euler steps, CFG the guidance scale; "full" is the share of images that
show exactly what the prompt asks, "graded" the mean partial credit. Held-out prompts name colour-shape pairs that
training never showed.

{_table(figures)}

The autoencoder reaches {figures["vae"]["psnr_db"]:.1f} dB; after it the verifier still reads
{100 * figures["vae"]["round_trip_full"]:.1f} % of 1,000 renders in full. More figures: `pretrain.json`.
"""


def unet_card(figures: dict[str, Any]) -> str:
    """The README of the U-Net's folder."""
    millions = sum(figures["parameters"].values()) / 1e6
    return f"""# Playground weights, U-Net

A tiny Stable Diffusion pipeline ({millions:.1f} M parameters, float16) that draws 64x64 scenes of coloured shapes.
Autoencoder and text encoder are those of `align/playground/weights`: of its first text encoder, all but the last layer,
with a plain final norm. The U-Net was trained from scratch on procedural scenes to predict the noise by
`python -m align.playground.pretrain --base unet --out DIR`; no other data was used.

```python
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("align/playground/unet_weights")
image = pipe("a red circle", num_inference_steps=20, guidance_scale=3).images[0]
image.resize((256, 256)).save("circle.png")
```

T is the number of DDIM steps, CFG the guidance scale and eta the noise of DDIM; "full" is the share of images that show
exactly what the prompt asks, "graded" the mean partial credit. Held-out prompts name colour-shape pairs that training
never showed.

{_table(figures)}

This pipeline knows no shift of the latents, so their mean is about 0.3. After the autoencoder the verifier still reads
{100 * figures["vae"]["round_trip_full"]:.1f} % of 1,000 renders in full. More figures: `pretrain.json`.
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=sorted(STAGES), default="transformer", help="which of the two to train")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--work", type=Path, help="folder for data and states (default: OUT with '-work' appended)")
    parser.add_argument("--count", type=int, default=60_000, help="number of training images (12 kB each on disk)")
    parser.add_argument("--vae-steps", type=int, default=VaeRecipe.steps)
    parser.add_argument("--flow-stop", type=int, default=FlowRecipe.stop, help=f"at most {FlowRecipe.steps}")
    parser.add_argument("--unet-stop", type=int, default=UNetRecipe.stop, help=f"at most {UNetRecipe.steps}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=256, help="prompts of each split that the figures are means of")
    parser.add_argument("--processes", type=int, default=2 if (os.cpu_count() or 1) > 1 else 1)
    parser.add_argument("--fresh", action="store_true", help="discard what --work holds")
    args = parser.parse_args()
    work = args.work or args.out.with_name(args.out.name + "-work")
    if args.fresh and work.exists():
        shutil.rmtree(work)
    if VaeRecipe.batch % args.processes or FlowRecipe.batch % args.processes:
        parser.error(f"--processes must divide the batches of {VaeRecipe.batch} and {FlowRecipe.batch}")
    common = {"count": args.count, "processes": args.processes, "prompts": args.prompts}
    if args.base == "unet":
        unet = UNetRecipe(stop=min(args.unet_stop, UNetRecipe.steps), seed=args.seed)
        pretrain_unet(args.out, work, unet=unet, **common)
        return
    vae = VaeRecipe(steps=args.vae_steps, seed=args.seed)
    flow = FlowRecipe(stop=min(args.flow_stop, FlowRecipe.steps), seed=args.seed)
    pretrain(args.out, work, vae=vae, flow=flow, **common)


if __name__ == "__main__":
    main()
