"""CLIP: how well pictures fit their prompts, and which of several concepts they show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .concepts import OBJECT, STYLE, Concepts
from .recogniser import refuse_unknown

BATCH = 64
# for want of classes of its own a picture is compared with one sentence a concept
TEMPLATES = {OBJECT: "a photo of a {}", STYLE: "a picture in the style of {}"}


class Clip:
    """Any CLIP that transformers' CLIPModel loads. Both kinds of embeddings have length 1."""

    def __init__(self, source: str, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.source = source
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    @classmethod
    def load(cls, source: str, device: str = "cpu") -> Clip:
        """From a local folder or a hub id. Raises OSError or ValueError where it is no CLIP."""
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        model: Any = CLIPModel.from_pretrained(source)
        return cls(
            source,
            model.to(device),
            CLIPTokenizer.from_pretrained(source),
            CLIPImageProcessorPil.from_pretrained(source),
        )

    @property
    def version(self) -> str:
        import transformers

        commit = getattr(self.model.config, "_commit_hash", None)
        at = f" at {commit[:12]}" if commit else ""
        return f"{Path(self.source).name}{at}, transformers {transformers.__version__}"

    @torch.no_grad()
    def pictures(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """(N, D) of (H, W, 3) uint8 each."""
        inputs = self.image_processor(
            list(pictures), input_data_format="channels_last", return_tensors="pt"
        )
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return unit(self.model.visual_projection(pooled))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, D); what goes beyond the 77 tokens that CLIP reads is cut off."""
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt"
        ).to(self.model.device)
        pooled = self.model.text_model(**inputs).pooler_output
        return unit(self.model.text_projection(pooled))

    def scores(self, pictures: torch.Tensor, texts: torch.Tensor) -> list[float]:
        """100 max(cos, 0) of each picture and its text, embeddings (N, D) both (Hessel et al.,
        EMNLP 2021, whose factor is 2.5; torchmetrics has this one)."""
        return [100 * max(float(cosine), 0.0) for cosine in (pictures * texts).sum(-1)]


def unit(features: torch.Tensor) -> torch.Tensor:
    features = features.float()
    return features / features.norm(dim=-1, keepdim=True)


class ClipRecogniser:
    """Zero-shot: a picture shows the object whose sentence is most similar to it, and the style.

    A domain of fewer than two concepts cannot be told from anything, and is not known.
    """

    def __init__(self, clip: Clip, concepts: Concepts) -> None:
        self.clip = clip
        self.domains = {
            domain: names
            for domain in TEMPLATES
            if len(names := [n for n, d in concepts.items() if d == domain]) > 1
        }
        self.sentences = {
            domain: clip.texts([TEMPLATES[domain].format(name) for name in names])  # (C, D)
            for domain, names in self.domains.items()
        }

    @property
    def told(self) -> dict[str, Any]:
        each = " and of ".join(f"{len(names)} {d}s" for d, names in self.domains.items())
        return {
            "detector": f"CLIP {self.clip.source}",
            "version": self.clip.version,
            "threshold": f"the most similar of {each}",
            "sentences": {domain: TEMPLATES[domain] for domain in self.domains},
        }

    def knows(self, concept: str) -> bool:
        return any(concept in names for names in self.domains.values())

    def shows(self, pictures: Sequence[np.ndarray], concepts: Sequence[str]) -> np.ndarray:
        refuse_unknown(self, concepts)
        batches = [pictures[first : first + BATCH] for first in range(0, len(pictures), BATCH)]
        rows = [self.of_embeddings(self.clip.pictures(batch), concepts) for batch in batches]
        return np.concatenate([np.zeros((0, len(concepts)), dtype=bool), *rows])

    def of_embeddings(self, embeddings: torch.Tensor, concepts: Sequence[str]) -> np.ndarray:
        """The same for pictures whose embeddings (N, D) are there already."""
        shown = np.zeros((len(embeddings), len(concepts)), dtype=bool)
        for domain, names in self.domains.items():
            nearest = (embeddings @ self.sentences[domain].T).argmax(-1).tolist()  # (N,)
            for row, index in enumerate(nearest):
                if names[index] in concepts:
                    shown[row, list(concepts).index(names[index])] = True
        return shown
