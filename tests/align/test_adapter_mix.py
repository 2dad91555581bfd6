"""Strengths and mixtures of adapters: their updates are scaled and added up in the weights, and strength 0 is the base."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from align.checkpoint import write_adapter
from align.errors import UserError
from align.evaluate import sample_images
from align.inference import Setup, Share, compare, load_target
from align.models.base import ImageModel, LoraSettings, ModelConfig, load_model
from align.prompts import Prompt
from align.sweep import read_sweep, sweep_columns

HERE = Path(__file__).parents[1]
TINY, UNET = (runpy.run_path(str(HERE / name)) for name in ("tiny.py", "tiny_unet.py"))
PROMPTS = ["a red circle", "two blue star"]
EPS = torch.finfo(torch.float32).eps
ADAPTERS = {"a": (2, 6, None), "b": (4, 4, None), "narrow": (3, 4.5, ["attn.to_q", "attn1.to_q"])}
"""name -> rank, alpha, targets: no two alike, and the last in a few layers only."""
MIX = {"a": 0.5, "b": -0.75, "narrow": 1.25}


@dataclass
class World:
    """A base model's folder, those of three adapters, and how much each multiplies B A by."""

    base: Path
    adapters: dict[str, Path]
    factor: dict[str, float]


def make_adapter(base: Path, folder: Path, seed: int, rank: int, alpha: float, targets: list[str] | None) -> Path:
    settings = LoraSettings(rank=rank, alpha=alpha, targets=targets)  # type: ignore[arg-type]
    model = load_model(ModelConfig(path=str(base), lora=settings))
    torch.manual_seed(seed)
    for parameter in model.add_lora(seed):
        torch.nn.init.normal_(parameter, std=0.3)
    write_adapter(model, folder)
    return folder


@pytest.fixture(scope="module", params=["sd3", "sd"])
def world(request, tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "sd3":
        base = TINY["sd35_pipeline"](root / "base", with_t5=False)
    else:
        base = UNET["sd_pipeline"](root / "base")
    adapters = {
        name: make_adapter(base, root / name, seed, *settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items(), 1)
    }
    return World(base, adapters, {name: alpha / rank for name, (rank, alpha, _) in ADAPTERS.items()})


def loaded(world: World) -> ImageModel:
    """The base with all adapters in the pipeline, under their own names."""
    model = load_model(ModelConfig(path=str(world.base)))
    for name, folder in world.adapters.items():
        model.load_adapter(folder, name=name)
    return model


def merged(model: ImageModel, strengths: dict[str, float]) -> dict[str, Tensor]:
    """module -> its weight with the active adapters merged into it by peft itself, float64; the network stays as it was."""
    model.pipe.set_adapters(list(strengths), adapter_weights=list(strengths.values()))
    found = {}
    for name, layer in model.network.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight = layer.get_base_layer().weight
            before = weight.data
            layer.merge(safe_merge=True)
            found[name] = weight.data.double()
            weight.data = before
            layer.merged_adapters.clear()
    assert found
    return found


def update(world: World, name: str) -> dict[str, Tensor]:
    """module -> alpha / rank B A in float64, from the adapter's file alone."""
    tensors = load_file(world.adapters[name] / "pytorch_lora_weights.safetensors")
    found = {}
    for key in tensors:
        if ".lora_A." in key:
            up, down = tensors[key.replace(".lora_A.", ".lora_B.")], tensors[key]
            module = key.split(".", 1)[1].split(".lora_A.")[0]
            found[module] = world.factor[name] * up.double() @ down.double()
    return found


def images(model: ImageModel) -> Tensor:
    return sample_images(model, PROMPTS, [0, 1], 2, 1.0, 7)


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Within the rounding of weights to float32: a merge rounds W a few times, and each entry of B A once a rank."""
    largest = max(float(w.abs().max()) for w in [*found.values(), *expected.values()])
    return all(float((found[k] - expected[k]).abs().max()) <= 16 * EPS * largest for k in expected)


# -- the weights ------------------------------------------------------------------------------------------------


def test_strength_zero_is_the_base_bit_for_bit(world):
    base = load_target(str(world.base))
    off = load_target(str(world.base), str(world.adapters["a"]), scale=0.0)
    on = load_target(str(world.base), str(world.adapters["a"]))
    assert torch.equal(images(off.model), images(base.model))
    assert (images(on.model) - images(base.model)).abs().max() > 0.05
    with on.model.reference():
        assert torch.equal(images(on.model), images(base.model))


def test_the_strength_is_linear_in_the_merged_weights(world):
    """W(s) - W(0) = s (W(1) - W(0)), also beyond [0, 1]."""
    model = loaded(world)
    off, on = (merged(model, {"a": strength}) for strength in (0.0, 1.0))
    assert max(float((on[k] - off[k]).abs().max()) for k in on) > 0.1
    for strength in (0.25, -1.0, 3.0):
        expected = {k: off[k] + strength * (on[k] - off[k]) for k in off}
        assert close(merged(model, {"a": strength}), expected), strength


def test_a_mixture_adds_up_the_updates_of_adapters_of_different_rank_scale_and_layers(world):
    """W(mix) - W(0) = sum of s_i (W_i - W(0)) as peft merges them, and as the files say."""
    model = loaded(world)
    off = merged(model, dict.fromkeys(MIX, 0.0))
    found = merged(model, MIX)
    expected, by_hand = dict(off), dict(off)
    for name, strength in MIX.items():
        alone, change = merged(model, {name: 1.0}), update(world, name)
        assert max(float(d.abs().max()) for d in change.values()) > 0.1
        assert len(change) == len(off) or name == "narrow"
        for module in off:
            expected[module] = expected[module] + strength * (alone[module] - off[module])
        for module in change:
            by_hand[module] = by_hand[module] + strength * change[module]
    assert 0 < len(update(world, "narrow")) < len(off)
    assert close(found, expected)
    assert close(found, by_hand)


def test_the_network_with_a_mixture_is_the_base_with_the_sum_in_its_weights(world):
    mixed, plain = loaded(world), load_model(ModelConfig(path=str(world.base)))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *plain.latent_shape, generator=generator)
    t = torch.tensor([0.7, 0.4])
    cond = plain.conditioning(PROMPTS)
    with torch.no_grad():
        before = plain.velocity(x, t, cond)
        for name, strength in MIX.items():
            for module, change in update(world, name).items():
                plain.network.get_submodule(module).weight += (strength * change).float()
        expected = plain.velocity(x, t, cond)
        mixed.pipe.set_adapters(list(MIX), adapter_weights=list(MIX.values()))
        found = mixed.velocity(x, t, cond)
        mixed.pipe.set_adapters(["a"], adapter_weights=[MIX["a"]])
        only_one = mixed.velocity(x, t, cond)
    assert (expected - before).abs().max() > 1e-2
    assert (expected - only_one).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# -- columns of a grid --------------------------------------------------------------------------------------------


def test_every_column_has_the_images_of_its_weights_alone(world):
    """Whatever came before in the same pipeline; each adapter is loaded once and weights that are the same sampled once."""
    a, b, narrow = world.adapters.values()
    adapters = {
        "tuned": [Share(a)],
        "mix": [Share(a, 0.5), Share(b, -0.75), Share(narrow, 1.25)],
        "half": [Share(a, 0.5)],
        "other": [Share(b, 2.0)],
        "off": [Share(a, 0.0), Share(b, 0.0)],
        "turned round": [Share(narrow, 1.25), Share(b, -0.75), Share(a, 0.5)],
        "twice": [Share(a, 0.25), Share(a, 0.25), Share(b, 0.0)],
    }
    setup = load_target(str(world.base), str(a), num_steps=2, seed=7)
    found = compare(setup, {}, [Prompt(p) for p in PROMPTS], Console(quiet=True), keep=2, adapters=adapters)
    assert list(found) == ["base", *adapters]
    (names,) = setup.model.pipe.get_list_adapters().values()
    assert len(names) == len(set(names)) == 3
    assert found["off"] is found["base"]
    assert found["turned round"] is found["mix"]
    assert found["twice"] is found["half"]
    for label in ("base", "tuned", "mix", "half", "other"):
        alone = load_model(ModelConfig(path=str(world.base)))
        shares = sorted(adapters.get(label, []), key=lambda share: share.folder)
        for number, share in enumerate(shares):
            alone.load_adapter(share.folder, name=f"n{number}")
        if shares:
            alone.pipe.set_adapters([f"n{i}" for i in range(len(shares))], [share.strength for share in shares])
        assert torch.equal(found[label].images, (images(alone) * 255).round() / 255), label
    for one, other in (("tuned", "base"), ("half", "tuned"), ("mix", "half"), ("other", "base")):
        assert (found[one].images - found[other].images).abs().max() > 0.02, (one, other)


def columns(adapter: Path | None, *given) -> list[tuple[str, str, dict[str, float]]]:
    """What `sweep_columns` makes of the options --scale, --scales, [--mix]: label, file, and folder -> strength."""
    setup = Setup(None, adapter, 2, 1.0, 0, None)  # type: ignore[arg-type]
    found = sweep_columns(read_sweep(*given), setup)
    return [(c.label, c.file, {str(s.folder): s.strength for s in c.shares}) for c in found]


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """Folders that look like two runs called `a`, a checkpoint of one, and a run without an adapter."""
    for folder in ("x/a/adapter", "y/a/adapter", "y/a/checkpoints/iteration-000003/adapter", "loose:1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "pytorch_lora_weights.safetensors").touch()
    (tmp_path / "x" / "started").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_columns_without_options_are_as_before():
    assert columns(None, None, None, None) == []
    assert columns(Path("k"), None, None, []) == [("tuned", "tuned.json", {"k": 1.0})]
    assert columns(Path("k"), 0.3, None, None) == [("tuned", "tuned.json", {"k": 0.3})]


def test_strengths_are_read_once_each_and_zero_is_the_base():
    assert columns(Path("k"), None, "0, 0.5,1,0.50,-0,-1.25,1e1", None) == [
        ("scale=0.5", "scale-0.5.json", {"k": 0.5}),
        ("scale=1", "scale-1.json", {"k": 1.0}),
        ("scale=-1.25", "scale--1.25.json", {"k": -1.25}),
        ("scale=10", "scale-10.json", {"k": 10.0}),
    ]
    assert columns(Path("k"), None, "0", None) == []
    near = columns(Path("k"), None, "0.3,0.3000000001", None)
    assert [label for label, *_ in near] == ["scale=0.3", "scale=0.3000000001"]
    with pytest.raises(UserError, match="no adapter to scale"):
        columns(None, None, "0,1", None)


def test_mixtures_are_named_after_their_runs(places):
    mixes = ["x/a:0.5,y/a/adapter:-2", "y/a/checkpoints/iteration-000003/adapter:1", "loose:1:0.25, x/a:0.5"]
    assert columns(None, None, None, [*mixes, mixes[0]]) == [
        ("x/a 0.5 + y/a -2", "mix-1.json", {"x/a/adapter": 0.5, "y/a/adapter": -2.0}),
        ("iteration-000003 1", "mix-2.json", {"y/a/checkpoints/iteration-000003/adapter": 1.0}),
        ("loose:1 0.25 + x/a 0.5", "mix-3.json", {"loose:1": 0.25, "x/a/adapter": 0.5}),
    ]
    assert [label for label, *_ in columns(Path("k"), 0.5, None, ["x/a:1"])] == ["tuned", "a 1"]
    assert [label for label, *_ in columns(Path("k"), None, "2", ["x/a:1"])] == ["scale=2", "a 1"]


@pytest.mark.parametrize("text", ["", "0,", "0,,1", "a", "0.5;1", "nan", "0,inf", "1e999"])
def test_strengths_that_cannot_be_read_name_the_option_and_an_example(text):
    with pytest.raises(UserError) as problem:
        read_sweep(None, text, None)
    assert str(problem.value) == f"--scales: '{text}' is not a list of finite numbers; for example --scales 0,0.5,1"


@pytest.mark.parametrize("text", ["", "x/a", "x/a:", ":0.5", "x/a:0.5,", "x/a:half", "x/a:nan", "x/a:0.5,y/a"])
def test_mixtures_that_cannot_be_read_name_the_option_and_an_example(places, text):
    with pytest.raises(UserError) as problem:
        read_sweep(None, None, [text])
    assert str(problem.value) == (
        f"--mix: '{text}' is not a list of FOLDER:STRENGTH; for example --mix outputs/a:0.5,outputs/b:0.5"
    )


def test_a_folder_without_an_adapter_is_told_with_what_to_do(places):
    def problem(mix: str) -> str:
        with pytest.raises(UserError) as caught:
            read_sweep(None, None, [mix])
        return str(caught.value)

    assert problem("x/b:1") == "--mix: there is no run or adapter folder x/b"
    assert problem("x/startet:1").endswith("x/startet (did you mean 'started'?)")
    assert problem("x/started:1").startswith("--mix: x/started has no pytorch_lora_weights.safetensors")
    (places / "y/a/adapter/pytorch_lora_weights.safetensors").unlink()
    (places / "y/a/checkpoints/iteration-000003/state.json").write_text("{}")
    assert problem("y/a:1").endswith("take a checkpoint's: y/a/checkpoints/iteration-000003/adapter")


def test_one_strength_and_several_are_refused_together():
    with pytest.raises(UserError, match=r"--scale is one strength and --scales are several"):
        read_sweep(1.0, "0,1", None)


# -- adapters that do not belong to the model ------------------------------------------------------------------------


def test_an_adapter_of_another_kind_size_or_depth_is_refused(world, tmp_path, capfd):
    """diffusers loads the first and the last without a word, and leaves out what has no place."""
    other = {"deep": {"layers_per_block": 2}, "wide": {"cross_attention_dim": 16, "block_out_channels": (8, 16, 64)}}
    bases = {name: UNET["sd_pipeline"](tmp_path / name, **settings) for name, settings in other.items()}
    made = {name: make_adapter(base, tmp_path / f"of-{name}", 9, 2, 2, None) for name, base in bases.items()}
    unet = load_model(ModelConfig(path=str(world.base))).denoiser_name == "unet"
    problems = {}
    capfd.readouterr()
    for name, folder in made.items():
        with pytest.raises(UserError) as caught:
            load_model(ModelConfig(path=str(world.base))).load_adapter(folder)
        problems[name] = str(caught.value)
        assert str(folder) in problems[name]
        assert "\n" not in problems[name]
    assert "unsuccessful" not in capfd.readouterr().err
    if unet:
        assert "a place for 112 of 176 tensors" in problems["deep"]
        assert "size mismatch" in problems["wide"]
    else:
        assert all("made for another kind of model" in problem for problem in problems.values())


def test_an_adapter_of_the_text_encoder_is_no_column(world, tmp_path):
    """Its embeddings are made once for all columns, so its strength would be ignored."""
    model = load_model(ModelConfig(path=str(world.base)))
    encoder = model.pipe.text_encoder
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="default")
    for name, parameter in encoder.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.add_lora(0)
    layers = {f"{model.denoiser_name}_lora_layers": get_peft_model_state_dict(model.network, adapter_name="default")}
    layers["text_encoder_lora_layers"] = get_peft_model_state_dict(encoder, adapter_name="default")
    model.pipe.save_lora_weights(tmp_path / "both", **layers)
    setup = load_target(str(world.base), num_steps=2)
    shares = {"mix": [Share(tmp_path / "both", 0.5)]}
    with pytest.raises(UserError, match="also changes the text_encoder"):
        compare(setup, {}, [Prompt(PROMPTS[0])], Console(quiet=True), keep=1, adapters=shares)
