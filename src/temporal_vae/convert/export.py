"""A model to files of graphs, which other programs run."""

from __future__ import annotations

import os
from typing import Any

from temporal_vae.export import files
from temporal_vae.export.graphs import Graphs
from temporal_vae.model import TemporalVAE


def export(
    model: TemporalVAE,
    folder: str | os.PathLike[str],
    format: str = "onnx",
    progress: files.Progress | None = None,
) -> dict[str, Any]:
    """Write the graphs of a model into a new folder -> what its export.json says.

    They are encode, decode and the steps of streams, in float32 on the CPU, where the model must
    be; latent channels that are masked are masked in them. docs/export.md says what goes in and
    comes out.

    Raises `ValueError` for an unknown format, missing packages, and a model of another dtype or
    device; `FileExistsError` for a folder that is there.
    """
    if (str(model.dtype), str(model.device)) != ("torch.float32", "cpu"):
        raise ValueError(
            f"a model is exported in float32 on the CPU, and this one is in {model.dtype} on "
            f"{model.device}: move it with .to('cpu', torch.float32)"
        )
    active = tuple(model.get_active_feature_indices())
    masked = active if len(active) < model.latent_channels else None
    graphs = Graphs.of(model.encoder.ready(), model.decoder.ready(), masked)
    return files.write(graphs, model.config, folder, format, progress)
