"""One process of a fleet: a model, loaded once, and erasures on it, one after the other."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from .outcomes import Failed, Made, Outcome, Unusable

if TYPE_CHECKING:
    from esd_fast.config import EraseConfig
    from esd_fast.models import Model


class Worker:
    """`loading`: a configuration of the fleet, all of which read the model alike. `base`: the
    digest (bases.py) that the model has to have; None: any. `threads` of torch's; None: its own.
    """

    def __init__(
        self, model: str | None, loading: EraseConfig, threads: int | None, base: str | None
    ) -> None:
        self.source, self.loading, self.threads, self.base = model, loading, threads, base
        self.model: Model | None = None

    def erase(self, config: EraseConfig) -> Outcome:
        """The model holds its own weights again afterwards, to the bit. Raises what is left of the
        device by an error that breaks it: this process is of no use then."""
        from safetensors.torch import save

        from esd_fast.cli import told
        from esd_fast.esd import run

        if self.model is None:
            try:
                self.model = self.loaded()
            except Exception as error:  # noqa: BLE001 -- whatever it is, others may do better
                return Unusable(told(error))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                erasure = run(self.model, config)
            except Exception as error:  # noqa: BLE001 -- whatever it is, the next job runs
                reason = told(error)
            else:
                reason = ""
        if reason:
            check_device(self.model)
            return Failed(reason)
        erasure.revert(self.model.pipeline)
        tensors = {name: tensor.contiguous() for name, tensor in erasure.tensors.items()}
        notes = tuple(str(w.message) for w in caught if w.category is UserWarning)
        return Made(save(tensors, erasure.metadata()), erasure.manifest, notes)

    def loaded(self) -> Model:
        import torch

        from esd_fast.bases import base_digest
        from esd_fast.models import load_model
        from esd_fast.pages import keep_pages

        keep_pages()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = load_model(self.source, self.loading)
        now = base_digest(model)
        if self.base not in (None, now):
            raise ValueError(
                f"{model.source} is another model (digest {now}) than that of the erasures that "
                f"are there ({self.base}), or in another dtype; name another --output"
            )
        return model


def check_device(model: Model) -> None:
    """Raises where the device does not compute any more, as after an illegal access on CUDA."""
    import torch

    torch.ones(1, device=model.device).add(1).item()
