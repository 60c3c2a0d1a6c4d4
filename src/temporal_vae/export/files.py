"""Graphs as files that need neither this library nor, of ONNX, torch.

A folder has a file for each graph, and export.json, which says what goes in and comes out. ONNX
models share one file of weights; each package of `torch.export` has its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from temporal_vae.config import VAEConfig
from temporal_vae.export.formats import check
from temporal_vae.export.graphs import Graph, Graphs, Port, Size
from temporal_vae.files import atomic

OPSET = 21
"""The version of ONNX's operators: the first whose group norm is torch's."""
ABOUT = "export.json"
WEIGHTS = "weights.bin"
INLINE_BYTES = 1024
"""Below it a tensor stays in the ONNX model itself."""

Progress = Callable[[float, int | None], None]
"""Called with the number of graphs that are done, and of all."""


def write(
    graphs: Graphs,
    config: VAEConfig,
    folder: str | os.PathLike[str],
    format: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write graphs into a new folder, whole or not at all -> what its export.json says.

    Raises as `check`, and `OSError` where it cannot write.
    """
    check(folder, format)
    about: dict[str, Any] = {
        "made_by": f"temporal-video-vae {version('temporal-video-vae')}",
        "format": format,
        **({"opset": OPSET} if format == "onnx" else {}),
        "config": config.to_dict(),
        "graphs": {graph.name: describe(graph, format) for graph in graphs.graphs},
        "left_out": graphs.left_out,
    }
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with atomic.atomic_folder(folder) as part:
        write_one = OnnxModels(part) if format == "onnx" else Packages(part)
        for number, graph in enumerate(graphs.graphs):
            if progress is not None:
                progress(number, len(graphs.graphs))
            with _quiet():
                write_one(graph, about["graphs"][graph.name])
        (part / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    return about


def describe(graph: Graph, format: str) -> dict[str, Any]:
    """What export.json says of a graph, and the file itself too."""
    given = [port.name for port in graph.outputs]
    return {
        "file": f"{graph.name}.{format}",
        "inputs": [_described(port) for port in graph.inputs],
        "outputs": [_described(port) for port in graph.outputs],
        "state": [name.removeprefix("next_") for name in given if name.startswith("next_")],
        "delay": graph.delay,
        "note": graph.note,
    }


def _described(port: Port) -> dict[str, Any]:
    shape = [str(axis) if isinstance(axis, Size) else axis for axis in port.shape]
    return {
        "name": port.name, "shape": shape, "dtype": str(port.dtype).removeprefix("torch."),
    }  # fmt: skip


class Packages:
    """Writes packages of `torch.export`."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, graph: Graph, about: dict[str, Any]) -> None:
        """Write a graph."""
        extra = {ABOUT: json.dumps(about)}
        torch.export.save(graph.traced(), self._folder / about["file"], extra_files=extra)


class OnnxModels:
    """Writes ONNX models, whose weights lie in one file."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._places: dict[bytes, int] = {}

    def __call__(self, graph: Graph, about: dict[str, Any]) -> None:
        """Write a graph."""
        import onnx_ir

        program = torch.onnx.export(
            graph.traced(), (), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
        )  # fmt: skip
        assert program is not None
        model = program.model
        _name_sizes(model, (*graph.inputs, *graph.outputs))
        model.metadata_props.update(temporal_vae=json.dumps(about), delay=str(graph.delay))
        with (self._folder / WEIGHTS).open("ab") as file:
            for value in model.graph.initializers.values():
                if value.const_value.nbytes >= INLINE_BYTES:
                    value.const_value = self._placed(value.const_value, file)
        onnx_ir.save(model, self._folder / about["file"])

    def _placed(self, tensor: Any, file: Any) -> Any:
        """A tensor as a part of the file, where it is already if another graph has the same."""
        import onnx_ir

        data = tensor.tobytes()
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._places[key] = file.seek(0, os.SEEK_END)
            file.write(data)
        return onnx_ir.ExternalTensor(
            WEIGHTS, self._places[key], len(data), tensor.dtype,
            shape=onnx_ir.Shape(tensor.shape), name=tensor.name, base_dir=self._folder,
        )  # fmt: skip


def _name_sizes(model: Any, ports: tuple[Port, ...]) -> None:
    """Give sizes that vary the names that ports have for them, in place of numbered symbols."""
    import onnx_ir

    names = dict[str, str]()
    ends = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for port in ports:
        for axis, found in zip(port.shape, ends[port.name].shape, strict=True):
            symbols = re.findall(r"[a-z_]\w*", str(found))
            if isinstance(axis, Size) and len(symbols) == 1:
                names.setdefault(symbols[0], axis.name)
    values = [value for node in model.graph for value in node.outputs]
    for value in (*values, *model.graph.inputs):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                re.sub(r"[a-z_]\w*", lambda m: names.get(m[0], m[0]), str(axis.value))
                if isinstance(axis, onnx_ir.SymbolicDim) and axis.value else axis
                for axis in value.shape
            )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell their own developers, some of which takes most of the time."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
