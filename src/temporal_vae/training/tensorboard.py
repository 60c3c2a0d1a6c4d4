"""The numbers and pictures of a run for TensorBoard, beside those in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from temporal_vae.video import Uint8Frames


class Events:
    """Writes TensorBoard's files into a folder, to watch with `tensorboard --logdir FOLDER`.

    `from_step` is the last step that a run has done before, 0 for a new one. What was written for
    later steps, by a run that was stopped after its last checkpoint, is then no longer shown, as
    those steps come again. Folders are made as needed.

    Raises `ValueError` if tensorboard is not installed.
    """

    def __init__(self, folder: Path, from_step: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "files for TensorBoard need the package tensorboard: "
                "pip install 'temporal-video-vae[train]'"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=from_step + 1)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write numbers by name; a name such as "latent/kl" goes to the group before the stroke."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Uint8Frames) -> None:
        """Write one picture, uint8 (H, W, 3) RGB. Raises `ValueError` for another type or shape."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"a picture is uint8 (H, W, 3), got {image.dtype} {image.shape}")
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is still in memory; nothing can be added afterwards."""
        self._writer.close()
