"""The formats of exported graphs, and what is refused before torch is imported."""

from __future__ import annotations

import os
from importlib.util import find_spec

FORMATS = ("onnx", "pt2")


def check(folder: str | os.PathLike[str], format: str) -> None:
    """Raise for what cannot be written.

    Raises `ValueError` for an unknown format and for packages that are missing, `FileExistsError`
    for a folder that is there.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists: take another name, or remove it first")
    if format == "onnx" and not all(map(find_spec, ("onnx", "onnxscript"))):
        raise ValueError(
            "ONNX is written by the packages onnx and onnxscript, which are not installed: "
            "pip install 'temporal-video-vae[export]'"
        )
