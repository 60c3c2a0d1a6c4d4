"""A model on disk: a folder with `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from temporal_vae.config import TemporalVAEConfig
from temporal_vae.files import atomic_path

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def builtin_names() -> list[str]:
    """Names of the models inside the package."""
    root = resources.files("temporal_vae") / "weights"
    return sorted(entry.name for entry in root.iterdir() if (entry / CONFIG_FILE).is_file())


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder of a model: a built-in name first, then a path.

    Raises `FileNotFoundError` naming what was looked for.
    """
    if str(name_or_path) in builtin_names():
        return Path(str(resources.files("temporal_vae") / "weights" / str(name_or_path)))
    folder = Path(name_or_path)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no model {str(name_or_path)!r}: neither a built-in one "
                f"({', '.join(builtin_names())}) nor a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
            )
    return folder


def load(name_or_path: str | os.PathLike[str]) -> tuple[TemporalVAEConfig, dict[str, Tensor]]:
    """Configuration and weights of a model, the weights in the dtype they were saved in.

    Raises `FileNotFoundError` when there is no such model, `ValueError` when a file is damaged.
    """
    folder = find(name_or_path)
    config = read_config(folder / CONFIG_FILE)
    try:
        return config, load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {error}") from error


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` listing tensors that are missing, unexpected or misshapen."""
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + ("; ..." if len(problems) > 8 else "")
        raise ValueError(
            f"the weights do not fit the configuration: {len(problems)} problems: {shown}"
        )


def read_config(file: Path) -> TemporalVAEConfig:
    """The configuration in a `config.json` of ours. Raises `ValueError` for anything else."""
    try:
        record: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != "temporal_vae":
        raise ValueError(f"{file} is not a temporal_vae configuration")
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format version {record.get('format_version')!r}, this library reads "
            f"{FORMAT_VERSION}: install a newer temporal-video-vae"
        )
    if not isinstance(record.get("model"), dict):
        raise ValueError(f"{file} has no configuration under 'model'")
    return TemporalVAEConfig.from_dict(record["model"])


def save(
    folder: str | os.PathLike[str], config: TemporalVAEConfig, state: dict[str, Tensor]
) -> None:
    """Write a model into `folder`, made if need be; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"format": "temporal_vae", "format_version": FORMAT_VERSION, "model": config.to_dict()}
    with atomic_path(folder / WEIGHTS_FILE) as file:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    with atomic_path(folder / CONFIG_FILE) as file:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
