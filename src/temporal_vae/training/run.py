"""A run is a folder: what it was started with, how far it is, its checkpoints and its model.

    recipe.toml         the recipe as it runs, changes included
    state.json          how far it is
    metrics.jsonl       a line a step: step, loss and each term
    validation.jsonl    a line a measurement
    samples/            pictures of measurements
    run.html            curves and pictures, to watch while it goes
    checkpoints/        step-00000120/, ...: all that is needed to go on
    model/              the trained model, averaged, for `TemporalVAE.from_pretrained`

Everything in it is JSON, TOML or safetensors; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from temporal_vae.files.atomic import atomic_folder, atomic_path, held
from temporal_vae.model import TemporalVAE
from temporal_vae.training.recipe import Table, to_toml

FREE = {"steps", "hours", "save_minutes", "keep", "tensorboard", "validation"}
"""Keys of a recipe that may differ when a run goes on."""
FREE_DATA = {"workers"}
FORMAT = 1

Tensors = dict[str, Tensor]
State = dict[str, Any]


class Run:
    """A run's folder. Only one process writes to it."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.model = self.folder / "model"
        self.samples = self.folder / "samples"
        self._checkpoints = self.folder / "checkpoints"
        self._metrics = self.folder / "metrics.jsonl"
        self._validation = self.folder / "validation.jsonl"

    # Beginning and going on ------------------------------------------------------------------

    def look(self, table: Table, resume: bool) -> int | None:
        """The step of the checkpoint to go on from, or None; nothing is written.

        Raises `ValueError` for a folder that holds another run, or something else, or a run that
        should not be gone on with.
        """
        there = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        begun = self._checkpoints.is_dir() and (self.folder / "recipe.toml").is_file()
        if there and not begun:
            raise ValueError(f"{self.folder} is not empty and holds no run: take another folder")
        if begun and not resume:
            raise ValueError(
                f"{self.folder} holds a run already: --resume goes on with it, or take another "
                "folder"
            )
        if begun:
            self._refuse_other(table)
        return self.last()

    @contextmanager
    def opened(self, table: Table) -> Iterator[None]:
        """Make the folder, or drop what its records say of steps past the last checkpoint.

        Raises `ValueError` where another process is at work in it.
        """
        for folder in (self.folder, self._checkpoints, self.samples):
            folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self.folder / ".lock"))
            except BlockingIOError:
                raise ValueError(
                    f"another process trains in {self.folder}: wait for it, end it, or take "
                    "another folder"
                ) from None
            self._clean(table)
            yield

    def _clean(self, table: Table) -> None:
        for left in self._checkpoints.glob(".*"):  # unfinished, by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with atomic_path(self.folder / "recipe.toml") as part:
            part.write_text(to_toml(table), encoding="utf-8")
        for file in (self._metrics, self._validation):
            _keep_lines(file, self.last() or 0)

    def _refuse_other(self, table: Table) -> None:
        text = (self.folder / "recipe.toml").read_text(encoding="utf-8")
        ours, theirs = _fixed(tomllib.loads(to_toml(table))), _fixed(tomllib.loads(text))
        differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if differing:
            raise ValueError(
                f"{self.folder} holds a run of another recipe, which differs in "
                f"{', '.join(differing)}: go on with {self.folder / 'recipe.toml'}, or take "
                "another folder"
            )

    def last(self) -> int | None:
        """The step of the newest whole checkpoint; None if there is none."""
        steps = [int(p.name.removeprefix("step-")) for p in self._checkpoints.glob("step-*")
                 if p.name.removeprefix("step-").isdecimal()]  # fmt: skip
        return max(steps, default=None)

    # Checkpoints -----------------------------------------------------------------------------

    def _checkpoint(self, step: int) -> Path:
        return self._checkpoints / f"step-{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Tensors], state: State, keep: int) -> None:
        """Write a checkpoint whole or not at all, and remove all but the `keep` newest.

        `tensors` are files by name: "weights", "optimizer.0", ... Raises `OSError` when it cannot
        be written; the checkpoints before it are then still there.
        """
        target = self._checkpoint(step)
        if target.exists():
            return
        with atomic_folder(target) as part:
            for name, values in tensors.items():
                whole = {key: value.contiguous() for key, value in values.items()}
                _written(whole, part / f"{name}.safetensors")
            text = json.dumps({"format": FORMAT, "step": step, **state}, indent=1)
            (part / "state.json").write_text(text, encoding="utf-8")
        for old in sorted(self._checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, step: int) -> tuple[dict[str, Tensors], State]:
        """A checkpoint's tensors by file, and its state. Raises `ValueError` for a damaged one."""
        folder = self._checkpoint(step)
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            files = sorted(folder.glob("*.safetensors"))
            tensors = {file.name.removesuffix(".safetensors"): load_file(file) for file in files}
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{folder} cannot be read: {error}: remove it, and the run goes on from the "
                "checkpoint before it"
            ) from error
        if state.get("format") != FORMAT:
            raise ValueError(f"{folder} is of another version of this library")
        return tensors, state

    def save_model(self, model: TemporalVAE) -> None:
        """Write the trained model, and the recipe beside its weights."""
        self.model.mkdir(exist_ok=True)
        model.save_pretrained(self.model)
        with atomic_path(self.model / "recipe.toml") as part:
            shutil.copyfile(self.folder / "recipe.toml", part)

    # What is told on the way -----------------------------------------------------------------

    def add(self, record: Mapping[str, object]) -> None:
        """Append a step's record to metrics.jsonl."""
        _append(self._metrics, record)

    def add_validation(self, record: Mapping[str, object]) -> None:
        """Append a measurement to validation.jsonl."""
        _append(self._validation, record)

    def tell(self, **state: object) -> None:
        """Write state.json: how far the run is, for whoever watches."""
        with atomic_path(self.folder / "state.json") as part:
            part.write_text(json.dumps(state, indent=1), encoding="utf-8")


def _written(tensors: Tensors, file: Path) -> None:
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # it wraps what the system says, such as a full disk
        raise OSError(f"{file.parent.parent}: cannot write a checkpoint: {error}") from error


def _append(file: Path, record: Mapping[str, object]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def _keep_lines(file: Path, step: int) -> None:
    """Drop the records past a checkpoint, and a last line that was cut off."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as lines, atomic_path(file) as part:
        part.write_text("".join(_until(lines, step)), encoding="utf-8")


def _until(lines: Iterator[str], step: int) -> Iterator[str]:
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                yield line if line.endswith("\n") else line + "\n"


def _fixed(table: Table) -> Table:
    """What of a recipe must stay the same when a run goes on, by dotted names."""
    flat = {name: value for name, value in _flat(table, "") if name.split(".")[0] not in FREE}
    return {n: v for n, v in flat.items() if n not in {f"data.{free}" for free in FREE_DATA}}


def _flat(table: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{name}.")
        else:
            yield where + name, value


# Weights and optimizers as tensors by name ----------------------------------------------------


def pack(optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's state, "name/value" by the names of its parameters."""
    found = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(p, {}).items():
                found[f"{name}/{key}"] = _whole(value)
    return found


def unpack(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Give an optimizer the state that `pack` made of it."""
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            own = {k.rpartition("/")[2]: v for k, v in tensors.items()
                   if k.rpartition("/")[0] == name}  # fmt: skip
            optimizer.state[p] = {
                key: value if key == "step" else _like(value, p) for key, value in own.items()
            }


def _whole(value: Tensor) -> Tensor:
    """A tensor on the CPU; of one that is spread over processes, all of it."""
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().to("cpu", copy=True)


def _like(value: Tensor, p: Tensor) -> Tensor:
    """A whole tensor on the device of a parameter, and spread over processes as it is."""
    moved = value.to(p.device)
    if not hasattr(p, "device_mesh"):
        return moved
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(p, DTensor)
    return distribute_tensor(moved, p.device_mesh, p.placements)


def weights(parameters: Mapping[str, Tensor]) -> Tensors:
    """Parameters as whole tensors on the CPU."""
    return {name: _whole(p) for name, p in parameters.items()}


@torch.no_grad()
def restore(parameters: Mapping[str, Tensor], tensors: Tensors) -> None:
    """Write `weights` back into the parameters. Raises `ValueError` unless they are the same."""
    names: Sequence[str] = sorted(parameters.keys() ^ tensors.keys())
    odd = names or [n for n, p in parameters.items() if p.shape != tensors[n].shape]
    if odd:
        raise ValueError(
            f"the checkpoint is of another architecture, or trains other parts: {odd[0]} differs"
        )
    for name, parameter in parameters.items():
        parameter.copy_(_like(tensors[name].to(parameter.dtype), parameter))
