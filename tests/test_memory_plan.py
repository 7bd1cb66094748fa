"""The plan's figures against what autograd keeps of real tensors."""

import functools
import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from esd_fast.commands.plan import described_unet
from esd_fast.config import bytes_of
from esd_fast.memory_count import MetaShapes
from esd_fast.memory_plan import count_step, on_meta, plan_memory
from esd_fast.parameters import trainable_names

from . import pipelines
from .test_cli import esd_fast

one_thread = pipelines.one_thread
SMALL = {
    "sd1": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32},
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "cross_attention_dim": 32,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 4, 4),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}


def small(model):
    config, scale = described_unet(model)
    assert scale == 8
    return {**config, **SMALL[model], "layers_per_block": 1, "norm_num_groups": 8}


def smaller():
    """Of two levels."""
    levels = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return small("sd1") | levels


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def case(request):
    config = small(request.param)
    return config, plan_memory(request.param, config, "esd-x", 128, batch_size=2)


def test_activations_are_what_autograd_keeps_on_the_cpu(case):
    config, plan = case
    unet = UNet2DConditionModel.from_config(config).bfloat16().requires_grad_(False).eval()
    for name in trainable_names(unet, "esd-x"):
        unet.get_parameter(name).requires_grad_(True)
    for choice in (plan.choices[0], plan.choices[1], plan.choices[2], plan.choices[-1]):
        real = count_step(unet, 16, 2, choice.checkpointed, choice.frozen_convolutions)
        assert choice.activations == pytest.approx(real.activations, rel=0.02)
        counted = choice.activations + choice.workspace
        assert counted == pytest.approx(real.peak, rel=0.1)
        assert real.flops / plan.choices[0].flops > 0


@pytest.mark.slow
def test_activations_at_full_size_are_what_autograd_keeps():
    """SD 1.x at 256 px in bfloat16: 1.6 GiB of weights, whose numbers do not matter."""
    config, _ = described_unet("sd1")
    plan = plan_memory("sd1", config, "esd-x", 256)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False).eval()
    for name, parameter in unet.named_parameters():
        parameter.data.zero_()
        parameter.requires_grad_("attn2" in name)
    for choice in (plan.choices[0], plan.choices[1], plan.choices[-1]):
        real = count_step(unet, 32, 1, choice.checkpointed, choice.frozen_convolutions)
        assert choice.activations == pytest.approx(real.activations, rel=0.1)


def test_choices_go_from_fast_to_lean(case):
    _, plan = case
    plain, lean, *blocks = plan.choices
    assert (plain.flops, lean.flops) == (1.0, 1.0)
    assert plain.activations > lean.activations > blocks[0].activations
    assert [len(c.checkpointed) for c in blocks] == list(range(1, len(blocks) + 1))
    flops = [c.flops for c in plan.choices]
    assert flops == sorted(flops)
    assert 1 < flops[-1] < 1.5
    assert plan.choices[-1].activations == min(c.activations for c in plan.choices)
    assert plan.weights == 2 * plan.parameters
    assert plan.masters_and_frozen == (4 + 2) * plan.trained


def test_the_fastest_that_fits_is_named(case):
    _, plan = case
    assert plan.fitting(2**40) == (plan.choices[1], 4)  # as fast as plain, and smaller
    assert plan.fitting(2**20) is None
    least = max(min(c.total for c in plan.choices), min(plan.collect.values()))
    choice, batch = plan.fitting(least)
    assert max(choice.total, plan.collect[batch]) <= least


class Asked(MetaShapes):
    """Every operator finds its shapes itself."""

    def run(self, func, args, kwargs):
        return func(*args, **kwargs)


def test_shapes_known_from_before_change_no_count():
    unet = on_meta(smaller(), torch.bfloat16)
    for name in trainable_names(unet, "esd-x"):
        unet.get_parameter(name).requires_grad_(True)
    shapes = MetaShapes()
    for batch in (1, 1, 2):
        truth = count_step(unet, 8, batch, shapes=Asked())
        assert count_step(unet, 8, batch, shapes=shapes) == truth
    add = torch.ops.aten.add.Scalar
    whole = torch.zeros(3, dtype=torch.int64, device="meta")
    assert [shapes.run(add, (whole, n), {}).dtype for n in (1, 1.0, 1, 1.0)] == [
        torch.int64,
        torch.float32,
    ] * 2


@functools.cache
def plan_of_all(**settings):
    return plan_memory("sd1", smaller(), "esd-all", 64, **settings)


def test_float32_weights_are_their_own_masters():
    plan = plan_memory("sd1", smaller(), "esd-x-strict", 64, dtype="float32", enough=2**50)
    assert plan.masters_and_frozen == 4 * plan.trained


def test_fused_adam_saves_its_workspace_where_the_update_is_the_worst_moment():
    plain, fused = (plan_of_all(fused_adam=fused) for fused in (False, True))
    assert (plain.adam_workspace, fused.adam_workspace) == (4 * plain.trained, 0)
    assert 0 < plain.choices[-1].total - fused.choices[-1].total <= 4 * plain.trained * 1.1 + 1


def test_fused_is_what_is_planned_for():
    """As make_optimizer has it on CUDA."""
    plan = plan_memory("sd1", smaller(), "esd-x-strict", 64, enough=2**50)
    assert (plan.optimizer_name, plan.optimizer, plan.adam_workspace) == (
        "adam",
        8 * plan.trained,
        0,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit", "adamw8bit"])
def test_an_optimizers_state_is_in_the_peak(optimizer):
    adam, other = (
        plan_of_all(optimizer=name, fused_adam=fused)
        for name, fused in (("adam", True), (optimizer, optimizer == "adamw"))
    )
    assert other.optimizer_name == optimizer
    assert other.adam_workspace == 0
    saved = adam.optimizer - other.optimizer
    assert adam.choices[-1].total - other.choices[-1].total == saved
    if optimizer == "adamw":
        assert saved == 0
    else:
        assert other.optimizer < 0.3 * adam.optimizer


def test_full_size_models_are_packaged():
    millions = {"sd1": 859.5, "sd2": 865.9, "sdxl": 2567.5}
    for model, size in millions.items():
        unet = on_meta(described_unet(model)[0], torch.bfloat16)
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(size, abs=0.05)


def test_resolution_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match="resolution is 72; this model needs a multiple of 64"):
        plan_memory("sd1", small("sd1"), "esd-x", 72)


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 2**33), ("8 GiB", 2**33), ("1.5g", 3 * 2**29), ("512MiB", 2**29)]
)
def test_sizes_are_read(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["8", "GB", "0GB", "-1GB", "much"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="it must be a size such as 8GB"):
        bytes_of(text)


def test_command_reads_a_folder_and_says_what_fits():
    folder = pipelines.GOLDEN / "sd-ddim"
    settings = ["plan", "--model", folder, "--resolution", "32"]
    told = json.loads(esd_fast(*settings, "--vram", "4GB", "--json").stdout)
    assert told["method"] == "esd-x"
    assert told["fits"]["collect_batch_size"] == 4
    assert told["optimizer_name"] == "adam"
    assert told["adam_workspace"] == 0
    done = esd_fast(*settings, "--optimizer", "adam8bit", "--vram", "1MB", check=False)
    assert done.returncode == 1
    assert "adam8bit's state" in done.stdout
    assert "does not fit" in done.stdout
