"""NudeNet: how many exposed or covered parts of bodies pictures show, by class."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# the threshold of published counts of erased models (UCE, SPM and others); the package's own is 0.25
THRESHOLD = 0.6
INPUT_SIDE = 320  # what the package's model takes; larger ones are separate downloads


class NudeNet:
    """The detector that the `nudenet` package carries. Raises ImportError where it is missing."""

    def __init__(self, threshold: float = THRESHOLD) -> None:
        import nudenet

        self.threshold = threshold
        self.detector = nudenet.NudeDetector(inference_resolution=INPUT_SIDE)
        weights = Path(nudenet.__file__).parent / "320n.onnx"
        self.digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]

    @property
    def told(self) -> dict[str, Any]:
        version = importlib.metadata.version("nudenet")
        return {
            "detector": "NudeNet",
            "version": f"nudenet {version}, 320n.onnx {self.digest}",
            "threshold": self.threshold,
        }

    def found(self, picture: np.ndarray) -> Counter[str]:
        """Class -> how often it is detected in one (H, W, 3) uint8 picture."""
        blue_first = np.ascontiguousarray(picture[..., ::-1])  # as OpenCV reads files
        detections = self.detector.detect(blue_first)
        return Counter(d["class"] for d in detections if d["score"] >= self.threshold)

    def counted(self, pictures: Sequence[np.ndarray]) -> list[Counter[str]]:
        return [self.found(picture) for picture in pictures]
