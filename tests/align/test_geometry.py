"""How an iteration's samples are spread, and the sizes that a dry run promises."""

import dataclasses

import pytest

from align.config import Config, OptimConfig, TrainConfig
from align.errors import UserError
from align.geometry import Geometry, geometry, local_order, memory_estimate
from align.models.base import LoraSettings, ModelConfig, load_model
from align.objectives import ObjectiveConfig
from samplers.config import SamplerConfig


def shape_of(processes: int, updates: int, groups: int = 12, size: int = 4) -> Geometry:
    train = TrainConfig(prompts_per_iteration=groups, group_size=size, updates_per_iteration=updates)
    return geometry(Config(train=train), processes)


@pytest.mark.parametrize("updates", [1, 2, 3, 6])
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_sample_belongs_to_one_process_and_one_update(processes, updates):
    shape = shape_of(processes, updates)
    orders = [local_order(shape, rank, seed=5, iteration=2) for rank in range(processes)]
    assert sorted(i for order in orders for update in order for i in update) == list(range(48))
    assert {len(update) for order in orders for update in order} == {48 // processes // updates}


@pytest.mark.parametrize("updates", [1, 2, 3, 6])
def test_an_update_trains_the_same_samples_on_any_number_of_processes(updates):
    def by_update(processes: int) -> list[set[int]]:
        shape = shape_of(processes, updates)
        orders = [local_order(shape, rank, seed=5, iteration=2) for rank in range(processes)]
        return [{i for order in orders for i in order[u]} for u in range(updates)]

    assert by_update(1) == by_update(2) == by_update(4) == by_update(8)


def test_groups_stay_whole_within_an_update_and_are_shuffled_between_iterations():
    shape = shape_of(processes=1, updates=3)
    updates = local_order(shape, 0, seed=0, iteration=0)
    for update in updates:
        groups = {i // 4 for i in update}
        assert sorted(update) == sorted(4 * g + j for g in groups for j in range(4))
    assert local_order(shape, 0, seed=0, iteration=0) == updates
    assert local_order(shape, 0, seed=0, iteration=1) != updates
    assert local_order(shape, 0, seed=1, iteration=0) != updates


@pytest.mark.parametrize(("processes", "updates"), [(5, 1), (1, 5), (3, 32)])
def test_samples_that_cannot_be_divided_are_refused_with_the_numbers(processes, updates):
    with pytest.raises(UserError, match=rf"= 48 images cannot be split over {processes} processes x {updates} updates"):
        shape_of(processes, updates)


@pytest.mark.parametrize(
    ("sampler", "objective", "pairs"),
    [
        (SamplerConfig(num_steps=10), ObjectiveConfig(), 9),
        (SamplerConfig(num_steps=10, plan="window", window_size=3), ObjectiveConfig(), 3),
        (SamplerConfig(num_steps=10, kernel="ode"), ObjectiveConfig(type="forward_process"), 4),
        (SamplerConfig(num_steps=10, kernel="ode"), ObjectiveConfig(type="forward_process", times_per_sample=0), 8),
    ],
)
def test_pairs_an_image_and_accumulation(sampler, objective, pairs):
    train = TrainConfig(prompts_per_iteration=12, group_size=4, updates_per_iteration=2, micro_batch=10)
    shape = geometry(Config(train=train, sampler=sampler, objective=objective), 2)
    assert (shape.local_samples, shape.pairs_per_sample, shape.pairs_per_update) == (24, pairs, 12 * pairs)
    # the last micro-batch may be smaller, but none is left out or empty
    assert 0 <= shape.accumulation * 10 - shape.pairs_per_update < 10


@pytest.fixture(scope="module")
def playground():
    return ModelConfig(path="playground", lora=LoraSettings(rank=8, alpha=8))


def test_the_promised_parameter_counts_are_those_of_the_loaded_model(playground):
    promised = memory_estimate(Config(model=playground))
    model = load_model(playground)
    assert promised["denoiser_parameters"] == sum(p.numel() for p in model.network.parameters())
    assert promised["vae_parameters"] == sum(p.numel() for p in model.pipe.vae.parameters())
    assert promised["trainable_parameters"] == sum(p.numel() for p in model.add_lora(seed=0))


def test_memory_grows_with_what_needs_memory(playground):
    def total(model: ModelConfig = playground, **rooms) -> float:
        return memory_estimate(Config(model=model, **rooms))["total_gib"]

    usual = total()
    assert total(train=TrainConfig(micro_batch=16)) > usual
    assert total(dataclasses.replace(playground, gradient_checkpointing=True)) < usual
    assert total(dataclasses.replace(playground, precision="bf16")) < usual
    assert total(optim=OptimConfig(ema_decay=0.0)) < usual
    assert total(sampler=SamplerConfig(guidance_scale=4.5)) > usual
    # the playground has no T5, whose tokens the setting would otherwise add, and 64 pixels are its own size
    assert total(dataclasses.replace(playground, max_sequence_length=0)) == usual
    assert total(dataclasses.replace(playground, resolution=64)) == usual


def test_a_lora_target_that_matches_nothing_is_one_clear_line(playground):
    broken = dataclasses.replace(playground, lora=LoraSettings(targets=["to_query"]))
    with pytest.raises(UserError, match="model.lora.targets: .*to_query"):
        memory_estimate(Config(model=broken))
