"""The words of `tvae export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.cli.report import Meter, say, show_rows
from temporal_vae.export.formats import check
from temporal_vae.files.atomic import clear_partials


@dataclass(frozen=True)
class ExportOptions(OptionGroup):
    """What is written."""

    panel = "Output"
    format: str = option(
        "onnx", "onnx|pt2", "ONNX models, or packages of torch.export. Default: onnx."
    )
    quiet: bool = option(False, "", "Print nothing but errors.")


def export(model: str, out: Path, options: ExportOptions) -> None:
    """Write the graphs of a model, and say which there are."""
    check(out, options.format)
    clear_partials([out])
    from temporal_vae.convert.export import export as write
    from temporal_vae.model import TemporalVAE

    vae = TemporalVAE.from_pretrained(model)
    with Meter(f"exporting {model}", options.quiet, unit="graphs") as meter:
        about = write(vae, out, options.format, meter)
    if options.quiet:
        return
    show_rows(
        {str(out / graph["file"]): graph["note"] for graph in about["graphs"].values()}, False
    )
    for name, reason in about["left_out"].items():
        say(f"note: {name} is left out: {reason}")
