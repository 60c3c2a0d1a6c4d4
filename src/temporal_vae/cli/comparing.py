"""The words of `tvae compare`, and what `tvae reconstruct` says of its own result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from temporal_vae.cli import inputs
from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.cli.info import Rows
from temporal_vae.cli.report import Meter
from temporal_vae.video import PIPE, Format, Options, VideoReader


@dataclass(frozen=True)
class CompareOptions(OptionGroup):
    """How two videos are shown in one."""

    panel = "Comparison"
    wipe: bool = option(
        False, "", "One picture, A on the left and B on the right of a line that moves. Default: "
        "both beside each other, and their difference.")  # fmt: skip
    gain: float = option(8.0, "NUMBER", "What the difference is multiplied by. Default: 8.")
    label_a: str | None = option(None, "TEXT", "What stands above A. Default: the file's name.")
    label_b: str | None = option(None, "TEXT", "What stands above B. Default: the file's name.")
    quiet: bool = option(False, "", "Print nothing but errors.")


@dataclass(frozen=True)
class ResultOptions(OptionGroup):
    """What is said and shown of a reconstruction."""

    panel = "The result beside its source"
    metrics: bool = option(
        False, "", "Measure PSNR, SSIM and flicker of the file that was written, codec and all; "
        "with --json they are keys of its line.")  # fmt: skip
    compare: Path | None = option(
        None, "OUT", "Write a video of source, reconstruction and their difference as well; for "
        "several inputs, into this folder.")  # fmt: skip

    def check(self, jobs: Sequence[inputs.Job], overwrite: bool) -> None:
        """Raise `ValueError` where a pipe would have to be read again, or a file be lost."""
        if (self.metrics or self.compare) and PIPE in map(str, jobs[0]):
            raise ValueError("--metrics and --compare read both files again: - cannot be")
        if self.compare is not None:
            used = [path for job in jobs for path in job]
            outs = [self._comparison(out, len(jobs) > 1) for _, out in jobs]
            _refuse_loss(outs, used, overwrite)

    def look(self, source: Path, target: Path, selected: Options, several: bool) -> Rows:
        """Do what was asked for; gives rows to print of what was measured."""
        if self.compare is not None:
            out = self._comparison(target, several)
            out.parent.mkdir(parents=True, exist_ok=True)
            compare(source, target, out, CompareOptions(), selected, overwrite=True)
        return _measured(source, target, selected) if self.metrics else {}

    def _comparison(self, target: Path, several: bool) -> Path:
        assert self.compare is not None
        return self.compare / target.name if several else self.compare


def _refuse_loss(outs: Sequence[Path], used: Sequence[Path], overwrite: bool) -> None:
    """Raise `ValueError` for a comparison in the place of what is compared, or of another file."""
    places = {path.resolve() for path in used}
    for out in outs:
        if out.resolve() in places:
            raise ValueError(f"{out} is one of the videos that are compared: name another file")
        if out.exists() and not overwrite:
            raise ValueError(f"{out} exists: give --overwrite to replace it")


def compare(
    first: Path, second: Path, target: Path, settings: CompareOptions,
    selected: Options | None = None, format: Format | None = None, overwrite: bool = False,
    of_both: bool = False,
) -> None:  # fmt: skip
    """Write the comparison of two videos; `selected` is of the first one, or `of_both`."""
    from temporal_vae.evaluation import compare as comparing

    _refuse_loss([target], [first, second], overwrite)
    labels = settings.label_a or first.name, settings.label_b or second.name
    layout = comparing.Layout(labels, settings.wipe, settings.gain)
    with (
        _open(first, selected) as a, _open(second, selected if of_both else None) as b,
        Meter(f"comparing {first.name}", settings.quiet) as meter,
    ):  # fmt: skip
        comparing.compare(a, b, target, layout, format, overwrite, meter)


def _open(path: Path, selected: Options | None) -> VideoReader:
    options: Options = {**(selected or {}), "channels": 3, "alpha": "drop"}
    return VideoReader(path, **options)


def _measured(source: Path, target: Path, selected: Options) -> Rows:
    from temporal_vae.evaluation.codecs import VideoCodec
    from temporal_vae.evaluation.compare import measure

    codec = VideoCodec(lambda: _open(target, None), str(target))
    with Meter(f"measuring {target.name}") as meter:
        done = iter(range(1, 1 << 62))
        values = measure(lambda: _open(source, selected), codec, lambda: meter(next(done), None))
    return {name: None if value is None else round(value, 6) for name, value in values.items()}
