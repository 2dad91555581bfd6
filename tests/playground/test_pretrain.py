"""The pieces that make the weights: attention, seeded batches, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align.playground import assess
from align.playground.components import build_transformer, build_unet, build_unet_pipeline, shared_parts
from align.playground.data import epoch_rows, fill_scenes, open_array, write_arrays
from align.playground.muon import Muon, orthogonalise
from align.playground.pretrain import pretrain_unet
from align.playground.train_transformer import FlowRecipe, MatmulAttention, Trainer, flow_batch
from align.playground.train_unet import MatmulCrossAttention, UNetRecipe, UNetTrainer, noise_batch, unet_worker
from align.playground.train_vae import latent_worker, render_worker

FIRST = Path(assess.__file__).parent / "weights"
RECIPE = FlowRecipe(steps=4, batch=4, layers=2, warmup=1)


def test_matmul_attention_is_the_attention_of_diffusers() -> None:
    torch.manual_seed(0)
    transformer = build_transformer(layers=2)
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 16, 128),
        "pooled_projections": torch.randn(2, 128),
        "timestep": torch.tensor([900.0, 100.0]),
        "return_dict": False,
    }
    with torch.no_grad():
        theirs = transformer(**inputs)[0]
        transformer.set_attn_processor(MatmulAttention())
        ours = transformer(**inputs)[0]
    assert (ours - theirs).abs().max() < 1e-5


def test_an_epoch_visits_every_row_once_and_epochs_differ() -> None:
    first = np.concatenate([epoch_rows(0, step, 4, 12) for step in range(3)])
    second = np.concatenate([epoch_rows(0, step, 4, 12) for step in range(3, 6)])
    assert sorted(first) == sorted(second) == list(range(12))
    assert list(first) != list(second)


def test_a_batch_does_not_depend_on_how_processes_share_it() -> None:
    latents = torch.randn(4, 4, 16, 16)
    whole = flow_batch(latents, 3, 7, 4, slice(0, 4), 0.3)
    halves = [flow_batch(latents[s], 3, 7, 4, s, 0.3) for s in (slice(0, 2), slice(2, 4))]
    for i, tensor in enumerate(whole):
        assert torch.equal(tensor, torch.cat([half[i] for half in halves]))
    assert not torch.equal(whole[1], flow_batch(latents, 3, 8, 4, slice(0, 4), 0.3)[1])


def test_flow_batch_lies_on_the_line_from_data_to_noise() -> None:
    latents = torch.randn(8, 4, 16, 16)
    x, t, target = flow_batch(latents, 0, 0, 8, slice(0, 8), 0.0)
    assert ((t > 0) & (t < 1)).all()
    assert torch.allclose(x - t[:, None, None, None] * target, latents, atol=1e-5)


def test_scenes_do_not_depend_on_the_split_of_the_work(tmp_path: Path) -> None:
    for name, parts in (("one", [range(4)]), ("two", [range(2, 4), range(2)])):
        write_arrays(tmp_path / name, 4)
        for rows in parts:
            assert list(fill_scenes(tmp_path / name, rows, seed=9)) == list(rows)
    for array in ("images", "ids"):
        assert np.array_equal(open_array(tmp_path / "one", array), open_array(tmp_path / "two", array))


def _advance(trainer: Trainer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 4, 16, 16, generator=generator)
    ids = trainer.empty.repeat(4, 1)
    for _ in range(steps):
        trainer.losses(latents, ids, slice(0, 4)).backward()
        trainer.update()


def test_continuing_from_a_state_is_bit_exact(tmp_path: Path) -> None:
    straight = Trainer(RECIPE, 0, 1)
    _advance(straight, 3)
    first = Trainer(RECIPE, 0, 1)
    _advance(first, 1)
    first.save(tmp_path / "state.pt")
    second = Trainer(RECIPE, 0, 1)
    second.load(tmp_path / "state.pt")
    _advance(second, 2)
    assert second.step_number == straight.step_number == 3
    for a, b in zip(second.parameters + second.average, straight.parameters + straight.average, strict=True):
        assert torch.equal(a, b)


def test_training_lowers_the_loss_of_a_fixed_batch() -> None:
    trainer = Trainer(replace(RECIPE, adam_lr=1e-2), 0, 1)
    generator = torch.Generator().manual_seed(1)
    latents, ids = torch.randn(4, 4, 16, 16, generator=generator), trainer.empty.repeat(4, 1)
    losses = []
    for _ in range(15):
        trainer.step_number = 0  # the same noise and times each time
        loss = trainer.losses(latents, ids, slice(0, 4))
        losses.append(loss.item())
        loss.backward()
        trainer.update()
    # The output starts at zero, so the first loss is the variance of noise - data, which is 2; sampled to 3 %.
    assert abs(losses[0] - 2) < 0.2
    assert losses[-1] < 0.8 * losses[0]


def test_orthogonalise_brings_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 32, 96), (2, 96, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)).float())
        assert values.min() > 0.5
        assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_moves_every_direction_alike(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(shape)
    weight.grad = torch.randn(shape, generator=generator)
    Muon([weight]).step(lr=0.1)
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    values = torch.linalg.svdvals(weight) / (0.1 * scale)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_takes_a_kernel_as_the_matrix_of_its_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(8, 4, 3, 3, generator=generator)
    kernel, matrix = torch.zeros(8, 4, 3, 3), torch.zeros(8, 36)
    kernel.grad, matrix.grad = grad, grad.flatten(1)
    for weight in (kernel, matrix):
        Muon([weight]).step(lr=0.1)
    assert torch.equal(kernel.flatten(1), matrix)


def test_matmul_cross_attention_is_the_attention_of_diffusers() -> None:
    torch.manual_seed(0)
    unet = build_unet()
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([900, 100]))
    states = torch.randn(2, 16, 64)
    with torch.no_grad():
        theirs = unet(*inputs, encoder_hidden_states=states).sample
        unet.set_attn_processor(MatmulCrossAttention())
        ours = unet(*inputs, encoder_hidden_states=states).sample
    assert (ours - theirs).abs().max() < 1e-5


def test_noise_batch_is_the_schedulers_forward_process() -> None:
    scheduler = build_unet_pipeline(*shared_parts(FIRST), build_unet()).scheduler
    latents = torch.randn(8, 4, 16, 16)
    x, t, noise = noise_batch(latents, scheduler.alphas_cumprod, 0, 0, 8, slice(0, 8))
    assert torch.allclose(x, scheduler.add_noise(latents, noise, t))
    half = noise_batch(latents[4:], scheduler.alphas_cumprod, 0, 0, 8, slice(4, 8))
    assert torch.equal(half[0], x[4:])


def test_unet_starts_at_zero_noise_and_learns() -> None:
    trainer = UNetTrainer(UNetRecipe(steps=40, batch=8, warmup=1), 0, 1, FIRST)
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = trainer.empty.repeat(8, 1)
    frozen = [p.clone() for p in trainer.text_encoder.parameters()]
    losses = []
    for _ in range(12):
        trainer.step_number = 0  # the same noise and times each time
        loss = trainer.losses(latents, ids, slice(0, 8))
        losses.append(loss.item())
        loss.backward()
        trainer.update()
    assert abs(losses[0] - 1) < 0.1  # the output starts at zero, so the first loss is the variance of the noise
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(frozen, trainer.text_encoder.parameters(), strict=True))


def test_unet_continues_bit_exactly_after_an_interruption(tmp_path: Path) -> None:
    recipe = UNetRecipe(steps=6, stop=4, batch=4, save_every=2, export_every=100)
    write_arrays(tmp_path, 8)
    render_worker(0, 1, str(tmp_path), 8, 0)
    latent_worker(0, 1, str(tmp_path), str(FIRST))
    weights = []
    for name, stops in (("straight", (4,)), ("interrupted", (2, 4))):
        (tmp_path / "unet_state.pt").unlink(missing_ok=True)
        for stop in stops:
            unet_worker(0, 1, str(tmp_path), str(tmp_path / name), replace(recipe, stop=stop), str(FIRST))
        weights.append((tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_latents_of_another_autoencoder_are_not_taken_for_finished(tmp_path: Path) -> None:
    settings = {"count": 8, "seed": 0}
    for stage, extra in (("scenes", {}), ("latents", {"vae": "another"})):
        (tmp_path / f"{stage}.done").write_text(json.dumps({"settings": settings | extra, "seconds": 0.0}))
    with pytest.raises(SystemExit, match="stage 'latents' of other settings"):
        pretrain_unet(tmp_path / "out", tmp_path, count=8, processes=1, unet=UNetRecipe())
