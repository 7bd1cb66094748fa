"""An erasure as a LoRA: every changed matrix's move, cut to its largest singular values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esd_fast.tensor_files import Lazy, write_tensors

from .original_layout import unet_names
from .whole_model import said

if TYPE_CHECKING:
    import torch

    from .base import Base
    from .merge import Merged


@dataclass(frozen=True)
class LoraReport:
    """What a LoRA keeps of the move, by energy (squared norm).

    `kept`: of what such a file can hold at all; `worst_layer` keeps `worst_kept` of its own.
    `left_out`: tensors that it cannot hold (biases, norms), with `left_out_share` of all energy.
    """

    rank: int
    kept: float
    worst_layer: str
    worst_kept: float
    layers: int
    left_out: list[str] = field(default_factory=list)
    left_out_share: float = 0.0

    def __str__(self) -> str:
        text = (
            f"rank {self.rank}: {self.kept:.4%} of the energy of {self.layers} layers kept; least "
            f"in {self.worst_layer}: {self.worst_kept:.4%}"
        )
        if self.left_out:
            text += (
                f"; a LoRA cannot hold {len(self.left_out)} biases and norms, "
                f"{self.left_out_share:.4%} of all energy: left out"
            )
        return text


@dataclass(frozen=True)
class Spectrum:
    """A move D as a matrix (rows, columns), float64, with the vectors of its smaller side (as
    columns, largest first) and the energy that each holds."""

    matrix: torch.Tensor
    vectors: torch.Tensor
    energies: torch.Tensor

    @property
    def tall(self) -> bool:
        return self.matrix.shape[0] > self.matrix.shape[1]

    @classmethod
    def of(cls, move: torch.Tensor) -> Spectrum:
        """Eigenvectors of D Dᵀ (or Dᵀ D, the smaller) are D's singular vectors. Projecting D onto
        them needs no division, so at full rank nothing but rounding is lost."""
        import torch

        matrix = move.double().flatten(1)
        smaller = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        energies, vectors = torch.linalg.eigh(smaller @ smaller.T)
        return cls(matrix, vectors.flip(1), energies.flip(0).clamp_min(0))

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """up (rows, r), down (r, columns) with r <= rank, up @ down the best such fit of D."""
        kept = self.vectors[:, :rank]
        up, down = (
            (self.matrix @ kept, kept.T) if self.tall else (kept, kept.T @ self.matrix)
        )  # one is orthogonal, the other carries the size: shared out, so that neither is tiny
        size = self.energies[:rank].sqrt().sqrt()
        size = size.where(size > 0, 1)
        return (up / size, down * size[:, None]) if self.tall else (up * size, down / size[:, None])


def write_lora(
    base: Base,
    merged: Merged,
    target: Path,
    *,
    names: str = "diffusers",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float16",
) -> LoraReport:
    """One .safetensors file, and what it keeps.

    `names`: "diffusers" (peft's, for `load_lora_weights`) or "kohya" (sd-scripts', with alpha, for
    A1111, Forge and ComfyUI; convolutions as LoCon has them). `rank`, or the smallest one that
    keeps `energy` (0 to 1) of the move; by default rank 64. A layer whose matrix has a smaller
    rank takes that. Raises ValueError where nothing that a LoRA can hold has changed.
    """
    import torch

    moves = {n: t.float() - merged.original[n].float() for n, t in merged.tensors.items()}
    held = {n: m for n, m in moves.items() if n.endswith(".weight") and m.dim() in (2, 4)}
    total = sum(float(m.double().square().sum()) for m in moves.values())
    spectra = {n: Spectrum.of(m) for n, m in held.items() if m.any()}
    if not spectra:
        raise ValueError("the erasure moves no matrix: a LoRA could hold nothing of it")
    if rank is None:
        rank = 64 if energy is None else rank_for(spectra, energy)
    stored: dict[str, torch.Tensor] = {}
    kept: dict[str, float] = {}
    rename = kohya_names(base) if names == "kohya" else None
    for name, spectrum in spectra.items():
        up, down = (f.to(getattr(torch, dtype)) for f in spectrum.factors(rank))
        kept[name] = energy_kept(spectrum.matrix, up.double() @ down.double())
        shape = held[name].shape
        if len(shape) == 4:  # a convolution to r channels, then one by one
            up, down = up[:, :, None, None], down.reshape(-1, *shape[1:])
        module = name.removesuffix(".weight")
        stored |= kohya(rename(module), up, down) if rename else peft(module, up, down)
    energies = {n: float(s.energies.sum()) for n, s in spectra.items()}
    worst = min(kept, key=kept.__getitem__)
    left_out = [n for n in moves if n not in held and moves[n].any()]
    report = LoraReport(
        rank=rank,
        kept=sum(kept[n] * e for n, e in energies.items()) / sum(energies.values()),
        worst_layer=worst.removesuffix(".weight"),
        worst_kept=kept[worst],
        layers=len(spectra),
        left_out=left_out,
        left_out_share=sum(float(moves[n].double().square().sum()) for n in left_out) / total,
    )
    write_tensors(
        target, {n: Lazy.of(t.contiguous()) for n, t in stored.items()}, told(report, names, merged)
    )
    return report


def energy_kept(move: torch.Tensor, fit: torch.Tensor) -> float:
    """1 - |move - fit|² / |move|², of the numbers as they are stored."""
    return 1 - float((move - fit).square().sum() / move.square().sum())


def rank_for(spectra: Mapping[str, Spectrum], energy: float) -> int:
    """The smallest rank that keeps the share `energy` of all layers' together."""
    import torch

    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy!r}; it must be above 0 and at most 1, such as 0.99")
    longest = max(len(s.energies) for s in spectra.values())
    total = torch.zeros(longest, dtype=torch.float64)
    for spectrum in spectra.values():
        total[: len(spectrum.energies)] += spectrum.energies
    kept = total.cumsum(0) / total.sum()
    return min(int((kept < energy - 1e-12).sum()) + 1, longest)


def peft(module: str, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}


def kohya(module: str, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    name = "lora_unet_" + module.replace(".", "_")
    rank = torch.tensor(float(len(down)), dtype=down.dtype)  # alpha = rank: scale 1
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": rank}


def kohya_names(base: Base) -> Any:
    """sd-scripts has diffusers' UNet for SD 1 and 2, Stability's own for SDXL."""
    if not any(name.startswith("add_embedding.") for name in base.unet):
        return lambda module: module
    original = unet_names(list(base.unet))
    modules = {n.rpartition(".")[0]: o.rpartition(".")[0] for n, o in original.items()}
    return modules.__getitem__


def told(report: LoraReport, names: str, merged: Merged) -> dict[str, str]:
    metadata = {
        "format": "pt",
        **said(merged),
        "esd_fast_lora": json.dumps({"rank": report.rank, "energy_kept": report.kept}),
    }
    if names == "kohya":
        alpha = str(float(report.rank))
        metadata |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(report.rank),
            "ss_network_alpha": alpha,
        }
    return metadata
