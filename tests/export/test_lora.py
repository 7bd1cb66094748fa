"""An erasure as a LoRA, loaded by diffusers itself."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from esd_fast.erasure import Erasure
from esd_fast.export.lora import Spectrum

from . import tiny
from .tiny import erasure_of, original

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore::FutureWarning"
)
FORMATS = ("lora", "kohya")
METHODS = {"esd-x-strict": r"attn2\.to_[kv]\.weight", "esd-all": r"(?<!norm)\d?\.weight$"}


def matrices_of(pipe: Any, pattern: str) -> Erasure:
    """Of an erasure what a LoRA can hold: matrices and kernels."""
    erasure = erasure_of(pipe, "")
    modules = dict(pipe.unet.named_modules())
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return Erasure(
        {
            n: t
            for n, t in erasure.tensors.items()
            if re.search(pattern, n) and isinstance(modules[n.rpartition(".")[0]], kinds)
        },
        {"concept": "cat"},
    )


@torch.no_grad()
def asked(pipe: Any) -> torch.Tensor:
    """(2, 4, 8, 8), the UNet's answer."""
    g = torch.Generator().manual_seed(0)
    width = pipe.unet.config.cross_attention_dim
    extra = {}
    if pipe.unet.config.addition_embed_type:
        extra = {"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)}
    return pipe.unet(
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([10, 700]),
        torch.randn(2, 77, width, generator=g),
        added_cond_kwargs=extra or None,
    ).sample


def with_lora(family: str, file: Path) -> Any:
    pipe = copy.deepcopy(original(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no LoRA keys associated to the text encoder"
        pipe.load_lora_weights(file)
    return pipe


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_the_erased_unet(
    format: str, family: str, method: str, tmp_path: Path
) -> None:
    erasure = matrices_of(original(family), METHODS[method])
    file = tmp_path / "lora.safetensors"
    exported = erasure.export(file, format, model=original(family), energy=1.0, dtype="float32")
    assert exported.lora is not None
    assert exported.lora.kept == pytest.approx(1, abs=1e-12)
    assert exported.lora.layers == len(erasure.tensors)
    assert exported.lora.left_out == []
    erased = copy.deepcopy(original(family))
    erasure.apply(erased)
    expected, before = asked(erased), asked(original(family))
    assert (expected - before).abs().max() > 1e-3
    pipe = with_lora(family, file)
    torch.testing.assert_close(asked(pipe), expected, atol=2e-5, rtol=0)
    pipe.unload_lora_weights()
    torch.testing.assert_close(asked(pipe), before, atol=0, rtol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_as_stated(format: str, tmp_path: Path) -> None:
    """The energy is that of torch's own SVD, and the file's product is the best of its rank."""
    pipe = original("sd1")
    erasure = matrices_of(pipe, METHODS["esd-all"])
    file = tmp_path / "lora.safetensors"
    report = erasure.export(file, format, model=pipe, rank=3, dtype="float32").lora
    assert report is not None
    before = dict(pipe.unet.named_parameters())
    moves = {n: (t - before[n].detach()).double().flatten(1) for n, t in erasure.tensors.items()}
    squares = {n: torch.linalg.svdvals(m).square() for n, m in moves.items()}
    share = {n: float(s[:3].sum() / s.sum()) for n, s in squares.items()}
    kept = sum(s[:3].sum() for s in squares.values()) / sum(s.sum() for s in squares.values())
    assert report.kept == pytest.approx(float(kept), abs=1e-6)
    worst = min(share, key=share.__getitem__)
    assert report.worst_kept == pytest.approx(share[worst], abs=1e-6)
    assert report.worst_layer + ".weight" == worst
    loaded = with_lora("sd1", file)
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    fused = dict(loaded.unet.named_parameters())
    for name, move in moves.items():
        u, s, v = torch.linalg.svd(move, full_matrices=False)
        best = u[:, :3] * s[:3] @ v[:3]
        found = (fused[name].detach() - before[name].detach()).double().flatten(1)
        torch.testing.assert_close(found, best, atol=1e-6, rtol=0)


def test_smallest_rank_for_an_energy(tmp_path: Path) -> None:
    pipe = original("sd1")
    erasure = matrices_of(pipe, METHODS["esd-x-strict"])

    def kept(**settings: Any) -> Any:
        return erasure.export(
            tmp_path / "l.safetensors",
            "lora",
            model=pipe,
            dtype="float32",
            overwrite=True,
            **settings,
        ).lora

    found = kept(energy=0.7)
    assert found.kept >= 0.7 > kept(rank=found.rank - 1).kept
    assert kept().rank == 64


def test_biases_and_norms_are_reported(tmp_path: Path) -> None:
    pipe = original("sd1")
    erasure = erasure_of(pipe, "")
    report = erasure.export(tmp_path / "l.safetensors", "lora", model=pipe).lora
    assert report is not None
    before = dict(pipe.unet.named_parameters())
    squares = {
        n: float((t - before[n].detach()).double().square().sum())
        for n, t in erasure.tensors.items()
    }
    left = {n for n, t in erasure.tensors.items() if t.dim() == 1}
    assert set(report.left_out) == left
    expected = sum(squares[n] for n in left) / sum(squares.values())
    assert report.left_out_share == pytest.approx(expected)
    assert f"cannot hold {len(left)} biases and norms" in str(report)
    norms = Erasure({n: t for n, t in erasure.tensors.items() if n in left}, {})
    with pytest.raises(ValueError, match="moves no matrix"):
        norms.export(tmp_path / "n.safetensors", "lora", model=pipe)


@pytest.mark.parametrize(("family", "name"), [("sd1", "sd1"), ("sdxl", "sdxl")])
def test_kohyas_names(family: str, name: str, tmp_path: Path) -> None:
    """SDXL's are the original file's, SD's diffusers' own; alpha is the rank."""
    pipe = original(family)
    erasure = matrices_of(pipe, METHODS["esd-all"])
    file = tmp_path / "l.safetensors"
    erasure.export(file, "kohya", model=pipe, rank=2)
    tensors = load_file(file)
    modules = {n.partition(".")[0] for n in tensors}
    assert {n.partition(".")[2] for n in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    if name == "sdxl":
        head = "model.diffusion_model."
        known = {
            n.removeprefix(head).rpartition(".")[0]
            for n in tiny.key_list("sdxl")
            if n.startswith(head)
        }
    else:
        known = {n.rpartition(".")[0] for n in erasure.tensors}
    assert modules <= {"lora_unet_" + m.replace(".", "_") for m in known}
    assert all(t.dtype == torch.float16 for t in tensors.values())
    for module in modules:
        assert tensors[f"{module}.alpha"] == len(tensors[f"{module}.lora_down.weight"])
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (4, 3, 3, 3), (64, 2, 1, 1), (7, 1)])
@pytest.mark.parametrize("dependent", [False, True])
def test_factors(shape: tuple[int, ...], dependent: bool) -> None:
    torch.manual_seed(0)
    move = torch.randn(shape)
    if dependent:  # rank 1: the other singular values are zero
        move = torch.outer(move.flatten(1)[:, 0], move.flatten(1)[0]).reshape(shape)
    spectrum = Spectrum.of(move)
    matrix = move.double().flatten(1)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(spectrum.energies.sqrt(), values, atol=1e-6, rtol=0)
    for rank in (1, 2, 100):
        up, down = spectrum.factors(rank)
        assert up.shape[1] == down.shape[0] == min(rank, *matrix.shape)
        lost = (matrix - up @ down).square().sum()
        assert float(lost) == pytest.approx(float(values[rank:].square().sum()), abs=1e-12)
        assert up.isfinite().all()
        assert down.isfinite().all()
