"""A model on disk or in a stream: what is stored there under our names, and back again.

Weights are safetensors throughout: folders and files with weights, and records, which are one
stream with configuration and weights (see `files`). A pickle is refused: reading one can run any
code in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from temporal_vae.checkpoints import diffusers_names, locations, single_file, wan_names
from temporal_vae.checkpoints.locations import builtin_names as builtin_names
from temporal_vae.config import VAEConfig, WanVAEConfig, config_from_dict
from temporal_vae.files.atomic import atomic_path
from temporal_vae.files.streams import CheckpointError

FORMAT_VERSION = 1
CONFIG_FILE = locations.CONFIG_FILE
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
DIFFUSERS_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
DROP_IN_CLASSES = ("DiffusersTemporalVAE", "DiffusersWanVAE")
"""The classes of `adapters.drop_in`, as the files that diffusers writes of them name them."""

_PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Source:
    """Where to look for a model; see `TemporalVAE.from_pretrained`."""

    name: str | os.PathLike[str]
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None

    def refuse(self, *options: str) -> None:
        """Raise `ValueError` if one of these was given, which would have no effect."""
        for option in options:
            if getattr(self, option) is not None:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} means nothing for {str(self.name)!r}, "
                    "which is on this machine: leave it out"
                )


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its name there, its shape here."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Stored:
    """A model on disk: its configuration, and where each tensor lies, under our names."""

    where: str
    config: VAEConfig
    entries: Mapping[str, Entry]


# ---------------------------------------------------------------------------------------------
# Finding


def open_model(source: Source, **latent: float) -> Stored:
    """What is stored under a name, read as far as headers go; `latent` overrides the scale.

    Raises `FileNotFoundError` when there is no such model, `OSError` when the Hub cannot be asked,
    `ValueError` when a file is damaged, a pickle, or of something else.
    """
    if not isinstance(source.name, (str, os.PathLike)) or not os.fspath(source.name):
        raise ValueError(f"the name of a model must be a name or a path, got {source.name!r}")
    path = Path(source.name)
    if path.is_file() and str(source.name) not in builtin_names():
        source.refuse("subfolder", "revision", "variant")
        stored = _read_single_file(path, latent)
    else:
        stored = _read_folder(_folder(source), source.variant)
    if latent:
        stored = replace(stored, config=_rescaled(stored.config, latent))
    check_size(stored)
    return stored


def read_card(name: str) -> str:
    """The model card of a model, the README.md beside its weights; "" where there is none."""
    path = Path(name)
    try:
        is_weights = path.is_file() and name not in builtin_names()
        folder = locations.local(path.parent) if is_weights else _folder(Source(name))
        there = CARD_FILE in folder.names
        return folder.path(CARD_FILE).read_text("utf-8", errors="replace") if there else ""
    except OSError:
        return ""


def _rescaled(config: VAEConfig, latent: Mapping[str, float]) -> VAEConfig:
    if isinstance(config, WanVAEConfig):
        raise ValueError(
            f"{' and '.join(sorted(latent))} means nothing for this model, which scales each "
            "latent channel by a mean and a deviation of its own: leave it out"
        )
    return replace(config, **latent)  # type: ignore[arg-type]


def _folder(source: Source) -> locations.Folder:
    """The folder of a model: a built-in name first, then a path, then a repository."""
    name, path = str(source.name), Path(source.name)
    if name in builtin_names():
        source.refuse("subfolder", "revision", "variant")
        return locations.local(Path(str(resources.files("temporal_vae") / "weights" / name)))
    if path.is_dir():
        source.refuse("revision")
        inside = path / (source.subfolder or "")
        if not inside.is_dir():
            raise FileNotFoundError(f"{path} has no folder {source.subfolder!r}")
        return locations.local(inside)
    is_file = path.suffix in (".safetensors", *_PICKLES)
    if isinstance(source.name, str) and locations.is_repository_id(name) and not is_file:
        return locations.repository(name, source.subfolder, source.revision)
    raise FileNotFoundError(
        f"no model {name!r}: neither a built-in one ({', '.join(builtin_names())}) nor a folder, "
        "a .safetensors file, or a repository of the Hugging Face Hub (owner/name)"
    )


def _read_folder(folder: locations.Folder, variant: str | None) -> Stored:
    if CONFIG_FILE not in folder.names:
        hint = ": it is a whole pipeline, so give subfolder='vae'" * (
            "model_index.json" in folder.names
        )
        raise FileNotFoundError(
            f"no model in {folder.where}: neither a built-in one ({', '.join(builtin_names())}) "
            f"nor a folder with {CONFIG_FILE} and weights{hint}"
        )
    record = _read_json(folder.path(CONFIG_FILE))
    where = f"{folder.where}/{CONFIG_FILE}"
    config: VAEConfig
    if record.get("format") == "temporal_vae":
        config = _read_config(record, where)
        files = _weights(folder, WEIGHTS_FILE, variant)
        return Stored(folder.where, config, _entries(files, str))
    if record.get("_class_name") in DROP_IN_CLASSES:
        config = _read_model(record, where)
        files = _weights(folder, DIFFUSERS_WEIGHTS_FILE, variant)
        return Stored(folder.where, config, _entries(files, str))
    if "_class_name" not in record:
        raise ValueError(f"{where} is not a temporal_vae configuration, nor one of diffusers'")
    theirs = wan_names if record["_class_name"] in wan_names.CLASSES else diffusers_names
    try:
        config = theirs.read_config(record)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    files = _weights(folder, DIFFUSERS_WEIGHTS_FILE, variant)
    return Stored(folder.where, config, _entries(files, theirs.our_name))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        record: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is not a temporal_vae configuration, nor an object at all")
    return record


def _read_config(record: Mapping[str, Any], where: str) -> VAEConfig:
    """The configuration in a `config.json` of ours."""
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {record.get('format_version')!r}, this library reads "
            f"{FORMAT_VERSION}: install a newer temporal-video-vae"
        )
    return _read_model(record, where)


def _read_model(record: Mapping[str, Any], where: str) -> VAEConfig:
    if not isinstance(record.get("model"), dict):
        raise ValueError(f"{where} has no configuration under 'model'")
    return config_from_dict(record["model"])


def _weights(folder: locations.Folder, name: str, variant: str | None) -> list[Path]:
    """The weights of a folder: one file, or the several that an index lists."""
    stem, suffix = Path(name).stem, Path(name).suffix
    single = f"{stem}.{variant}{suffix}" if variant else name
    index = f"{name}.index.{variant}.json" if variant else f"{name}.index.json"
    if single in folder.names:
        return [folder.path(single)]
    if index in folder.names:
        listed = _read_json(folder.path(index)).get("weight_map")
        parts = listed.values() if isinstance(listed, dict) else []
        unknown = [part for part in parts if not isinstance(part, str) or part not in folder.names]
        if not parts or unknown:
            raise ValueError(
                f"{folder.where}/{index} does not list files that are there: {unknown[:3]}"
            )
        return [folder.path(part) for part in sorted(set(parts))]
    pickles = sorted(file for file in folder.names if file.endswith(_PICKLES))
    others = sorted(
        file for file in folder.names if file.endswith((suffix, f"{suffix}.index.json"))
    )
    if pickles and not others:
        raise ValueError(_pickle_message(f"{folder.where}/{pickles[0]}"))
    raise FileNotFoundError(
        f"no {single} in {folder.where}"
        + (f", but {', '.join(others[:5])}: variant=... chooses" if others else "")
    )


def _read_single_file(file: Path, latent: Mapping[str, float]) -> Stored:
    """The VAE in one file with the keys of CompVis' or Stability's own code."""
    if file.suffix in _PICKLES:
        raise ValueError(_pickle_message(str(file)))
    with _opened(file) as opened:
        if (opened.metadata() or {}).get("format") == "temporal_vae":
            raise ValueError(f"{file} is a record that save_model wrote: from_file reads it")
    found = _entries([file], str)
    shapes = {key: entry.shape for key, entry in found.items()}
    prefix = wan_names.original_prefix(shapes)
    config: VAEConfig
    try:
        if prefix is not None:
            config, names = wan_names.read_original(shapes, prefix)
        else:
            config, names = single_file.read_single_file(shapes, latent)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Stored(str(file), config, _entries([file], names.get))


def _pickle_message(file: str) -> str:
    return (
        f"{file} is a pickle, and reading a pickle can run any code in it: convert it once, with "
        "torch's safe reader: d = torch.load(FILE, map_location='cpu', weights_only=True); "
        "d = d.get('state_dict', d); safetensors.torch.save_file({k: v.contiguous() for k, v in "
        "d.items() if isinstance(v, torch.Tensor)}, 'NEW.safetensors')"
    )


# ---------------------------------------------------------------------------------------------
# Reading


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, mapped: no bytes are read before they are used."""
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        with file.open("rb") as raw:
            start = raw.read(4)
        if start.startswith(_PICKLE_STARTS):
            raise ValueError(_pickle_message(str(file))) from error
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from error


def _entries(files: list[Path], rename: Callable[[str], str | None]) -> dict[str, Entry]:
    """Every tensor of the files under our names; what `rename` has no name for is left out."""
    found: dict[str, Entry] = {}
    for file in files:
        with _opened(file) as opened:
            for key in list(opened.keys()):
                name = rename(key)
                if name is None:
                    continue
                if name in found:
                    raise ValueError(f"{name} is stored twice: {found[name].key}, {key} in {file}")
                tensor = opened.get_slice(key)
                shape = diffusers_names.our_shape(name, tuple(tensor.get_shape()))
                found[name] = Entry(file, key, shape, tensor.get_dtype())
    return found


def check_size(stored: Stored) -> None:
    """Refuse a configuration that asks for more than the file holds, before anything is built.

    A configuration is text that anyone can write: a zero too many in it could ask for terabytes.
    These are lower bounds, for speed; `check_fit` compares every shape.
    """
    blocks, numbers = stored.config.least_size
    stored_numbers = sum(_count(entry.shape) for entry in stored.entries.values())
    if blocks > len(stored.entries) or numbers > stored_numbers:
        raise CheckpointError(
            f"the weights do not fit the configuration in {stored.where}: it asks for at least "
            f"{blocks} blocks and {numbers} numbers, they are {len(stored.entries)} tensors with "
            f"{stored_numbers} numbers"
        )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def check_fit(stored: Stored, expected: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` listing tensors missing, unexpected, misshapen or no floats."""
    entries = stored.entries
    problems = [f"missing {name}" for name in expected.keys() - entries.keys()]
    problems += [f"unexpected {entries[name].key}" for name in entries.keys() - expected.keys()]
    for name in expected.keys() & entries.keys():
        entry, shape = entries[name], tuple(expected[name].shape)
        if entry.shape != shape:
            problems.append(f"{entry.key} is {entry.shape}, not {shape}")
        if entry.dtype not in _FLOATS:
            problems.append(f"{entry.key} is {entry.dtype}, not floating point")
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + ("; ..." if len(problems) > 8 else "")
        raise CheckpointError(
            f"the weights do not fit the configuration in {stored.where}: {len(problems)} "
            f"problems: {shown}"
        )


def check_own(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` naming tensors with which a file of a model could not be read again."""
    unlike = state.keys() ^ expected.keys()
    unlike |= {n for n in state.keys() & expected.keys() if state[n].shape != expected[n].shape}
    if unlike:
        shown = ", ".join(sorted(unlike)[:4]) + (", ..." if len(unlike) > 4 else "")
        raise ValueError(
            f"{len(unlike)} tensors are not those of the model's architecture, so a file with them "
            f"could not be read again: {shown}: merge what is wrapped around its layers into them, "
            "or take it off and save it by itself (an adapter: merge and unload)"
        )


def fill(
    model: nn.Module, stored: Stored, dtype: torch.dtype, device: torch.device | str | None
) -> None:
    """Give the parameters of `model` that are stored their values; they must fit.

    Tensors in the wanted dtype on the CPU stay mapped from their file, copied on the first write,
    others are converted one by one: never more in memory than the model and one file.
    """
    by_file: dict[Path, dict[str, Entry]] = {}
    for name, entry in stored.entries.items():
        by_file.setdefault(entry.file, {})[name] = entry
    state: dict[str, Tensor] = {}
    for file, entries in by_file.items():
        with _opened(file) as opened:
            for name, entry in entries.items():
                tensor = opened.get_tensor(entry.key).reshape(entry.shape)
                state[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(state, strict=False, assign=True)


# ---------------------------------------------------------------------------------------------
# Writing


def save(
    folder: str | os.PathLike[str],
    config: VAEConfig,
    state: Mapping[str, Tensor],
    format: str = "temporal_vae",
) -> None:
    """Write a model into `folder`, made if need be; each file appears whole or not at all.

    Raises `ValueError` for an unknown format, or a configuration that it cannot express.
    """
    if format == "temporal_vae":
        record: dict[str, Any] = {"format": format, "format_version": FORMAT_VERSION}
        record["model"], name = config.to_dict(), WEIGHTS_FILE
    elif format == "diffusers":
        if isinstance(config, WanVAEConfig):
            record, state = wan_names.to_diffusers(config, state)
        else:
            record, state = diffusers_names.to_diffusers(config, state)
        name = DIFFUSERS_WEIGHTS_FILE
    else:
        raise ValueError(f"format must be 'temporal_vae' or 'diffusers', got {format!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Neither takes its place before both are written: a full disk changes nothing.
    with atomic_path(folder / CONFIG_FILE) as text, atomic_path(folder / name) as weights:
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        text.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
