"""How far pictures are from others: LPIPS of pairs, FID and KID of sets. All by torchmetrics."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

LPIPS_FILE = "alexnet-owt-7be5be79.pth"  # torchvision's
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's
KID_SUBSET, KID_SUBSETS = 100, 100
PACKAGES = ("torchmetrics", "torch_fidelity", "torchvision")


def missing_packages() -> str | None:
    """What to do where the libraries are not all there, or do not load."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed: pip install 'esd-fast[eval]'"
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        return f"torchvision does not load ({first}): install the build that belongs to this torch"
    return None


def cached(name: str) -> Path:
    """Where torch.hub keeps a file that it has downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def check_plain(file: Path) -> None:
    """The libraries unpickle their weights, which may run code: of a file that is there only
    tensors get that far; what they download themselves is theirs to vouch for."""
    try:
        torch.load(file, weights_only=True, map_location="meta")
    except (UnpicklingError, RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"{file} holds more than tensors, or is damaged: {error}") from None


def bytes_first(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """(N, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class Lpips:
    """Mean LPIPS (Zhang et al., CVPR 2018) of pairs, AlexNet's. Raises ValueError for weights that
    hold more than tensors."""

    def __init__(self, device: str = "cpu") -> None:
        if cached(LPIPS_FILE).exists():
            check_plain(cached(LPIPS_FILE))
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        self.metric.to(device)
        self.device = device

    @property
    def told(self) -> dict[str, Any]:
        return {
            "detector": "LPIPS, AlexNet",
            "version": versions_of("torchmetrics", "torchvision"),
            "threshold": None,
        }

    @torch.no_grad()
    def mean(self, pairs: Iterable[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]]) -> float:
        """Of batches of pictures and their partners, (H, W, 3) uint8 each."""
        self.metric.reset()
        for one, other in pairs:
            first, second = (bytes_first(p).to(self.device).float() / 255 for p in (one, other))
            self.metric.update(first, second)
        return float(self.metric.compute())


class Inception:
    """FID (Heusel et al., 2017) and KID (Binkowski et al., 2018) on torch-fidelity's Inception v3."""

    def __init__(self, weights: Path | None = None, device: str = "cpu") -> None:
        """`weights`: the file; None: torch.hub's, downloaded where it is missing."""
        self.weights = weights or cached(INCEPTION_FILE)
        if self.weights.exists():
            check_plain(self.weights)
        from torchmetrics.image.fid import NoTrainInceptionV3

        path = str(self.weights) if self.weights.exists() else None
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], path)
        self.device = device

    @property
    def told(self) -> dict[str, Any]:
        return {
            "detector": f"Inception v3 ({self.weights.name})",
            "version": versions_of("torchmetrics", "torch-fidelity"),
            "threshold": None,
        }

    def fid(
        self, real: Iterable[Sequence[np.ndarray]], drawn: Iterable[Sequence[np.ndarray]]
    ) -> dict[str, Any]:
        """Of batches of pictures, (H, W, 3) uint8 each."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(self.network)
        counts = self.fed(metric, real, drawn)
        return {"value": float(metric.compute()), "images": counts}

    def kid(
        self, real: Iterable[Sequence[np.ndarray]], drawn: Iterable[Sequence[np.ndarray]]
    ) -> dict[str, Any]:
        """Mean and standard deviation over subsets."""
        from torchmetrics.image.kid import KernelInceptionDistance

        metric = KernelInceptionDistance(self.network, subsets=KID_SUBSETS, subset_size=KID_SUBSET)
        counts = self.fed(metric, real, drawn)
        metric.subset_size = min(KID_SUBSET, *counts)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # it draws subsets
            mean, deviation = metric.compute()
        return {
            "value": float(mean),
            "deviation": float(deviation),
            "images": counts,
            "subset_size": metric.subset_size,
        }

    @torch.no_grad()
    def fed(
        self,
        metric: Any,
        real: Iterable[Sequence[np.ndarray]],
        drawn: Iterable[Sequence[np.ndarray]],
    ) -> list[int]:
        metric.to(self.device)
        counts = []
        for batches, is_real in ((real, True), (drawn, False)):
            count = 0
            for batch in batches:
                metric.update(bytes_first(batch).to(self.device), real=is_real)
                count += len(batch)
            counts.append(count)
        return counts


def versions_of(*packages: str) -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
