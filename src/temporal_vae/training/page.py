"""A page to watch a run by: what its folder says, as one HTML file that needs nothing else.

The page reloads itself while the run goes on. It opens from disk, without a server, and refers to
nothing but the pictures beside it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from temporal_vae.evaluation.charts import Curve, Line, chart, figure, label, legend, style
from temporal_vae.files.atomic import atomic_path
from temporal_vae.training.curves import (
    Record,
    Thinned,
    number,
    read_last,
    read_records,
    reading_stride,
)

PAGE = "run.html"
RELOAD_SECONDS = 30

_RECENT = 50
"""Records of which the mean stands beside a curve: a single step says little."""
_STAGES = 12
_OLDER_SAMPLES = 30
"""Steps before the last whose pictures the page offers: more are in the folder."""
_PICTURES = 20
"""Pictures of one step, at most."""
_TEXT_BYTES = 2**18
_STATE_BYTES = 2**26
_SAMPLE = re.compile(r"step-(\d{1,15})-(.+)\.png")
_MEASURES = {"psnr": "PSNR, dB", "ssim": "SSIM", "flicker": "Flicker, 8-bit units"}
_DIGITS = {"psnr": 2, "ssim": 4, "flicker": 2}
_APART = {"learning_rate", "frames_per_second", "waited"}
"""What a record says beside its terms."""
_NO_CURVES = {"terms", "stage", "seconds"}
_NAMES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "frames_per_second": "Frames per second",
    "waited": "Share of time waiting for data",
    "gradient_norm": "Gradient norm",
}


def write_page(run: Path) -> None:
    """Write `run/run.html`, whole or not at all, from what else there is in the folder.

    Read are `state.json`, `metrics.jsonl`, `validation.jsonl`, `recipe.toml` and the names of
    `samples/step-*-*.png`. What is missing, damaged or half written is left out of the page. A
    million lines take some seconds and no memory to speak of; the page stays below a megabyte.

    Raises `FileNotFoundError` if there is no such folder, and `PermissionError` if it cannot be
    written in.
    """
    with atomic_path(run / PAGE) as part:
        part.write_text(_page(run), encoding="utf-8", errors="replace")


# What the folder says -------------------------------------------------------------------------


@dataclass(slots=True)
class _Training:
    """The records of all steps, as far as a page can show them."""

    curves: dict[str, Curve] = field(default_factory=dict)
    recent: dict[str, float] = field(default_factory=dict)
    stages: list[tuple[int, str]] = field(default_factory=list)
    every: int = 1
    """Of so many lines one was read."""

    @property
    def steps(self) -> tuple[float, float]:
        """The first and the last that any curve shows."""
        ends = [(float(c.steps[0]), float(c.steps[-1])) for c in self.curves.values()]
        return min(first for first, _ in ends), max(last for _, last in ends)


def _read_training(file: Path) -> _Training:
    thinned, found = Thinned(), _Training(every=reading_stride(file))
    for records in read_records(file, found.every):
        _note_stages(records, found.stages)
        thinned.add(_flat(records), without=_NO_CURVES)
    found.curves = thinned.curves()
    last = _flat(read_last(file, _RECENT))
    for name in found.curves:
        values = np.array([v for r in last if (v := number(r.get(name))) is not None])
        if len(values := values[np.isfinite(values)]):
            found.recent[name] = float(values.mean())
    return found


def _flat(records: Sequence[Record]) -> list[Record]:
    """Records with their terms, if they are apart, beside the rest."""
    return [
        {**terms, **record} if isinstance(terms := record.get("terms"), dict) else record
        for record in records
    ]


def _note_stages(records: Sequence[Record], stages: list[tuple[int, str]]) -> None:
    for record in records:
        name = record.get("stage")
        if isinstance(name, str) and (not stages or stages[-1][1] != name):
            stages.append((record["step"], name))
    del stages[_STAGES:]


@dataclass(slots=True)
class _Validation:
    """Measurements: `curves` by noise share, measure and "linear" or "", and the last of them."""

    curves: dict[tuple[str, str, str], Curve] = field(default_factory=dict)
    last: Record = field(default_factory=dict)

    @property
    def shares(self) -> list[str]:
        """Shares of noise as they are written, from the least."""
        shares = dict.fromkeys(share for share, _, _ in self.curves)
        return sorted(shares, key=_share)


def _read_validation(file: Path) -> _Validation:
    thinned, found = Thinned(), _Validation()
    for records in read_records(file):
        thinned.add([_flat_scores(record) for record in records])
        for record in records:
            found.last = record if _scores(record) else found.last
    for name, curve in thinned.curves().items():
        share, measure, of = name.split("\n")
        found.curves[share, measure, of] = curve
    return found


def _scores(record: Record) -> dict[tuple[str, str, str], float]:
    """Numbers by noise share, measure and whose they are."""
    found = {}
    for share, ours in _table_of(record.get("noise")).items():
        theirs = _table_of(ours).get("linear")
        for of, scores in (("", _table_of(ours)), ("linear", _table_of(theirs))):
            for measure in _MEASURES:
                if (value := number(scores.get(measure))) is not None:
                    found[share.replace("\n", " "), measure, of] = value
    return found


def _table_of(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat_scores(record: Record) -> Record:
    scores = {"\n".join(key): value for key, value in _scores(record).items()}
    return {"step": record["step"], **scores}


def _share(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return float("inf"), text


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(_read_text(file, _STATE_BYTES))
    except (ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _read_text(file: Path, most: int = _TEXT_BYTES) -> str:
    """The beginning of a text file; nothing if it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(most).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _read_samples(folder: Path) -> dict[int, list[tuple[str, str]]]:
    """File and name of each picture by step, the newest first."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return {}
    found: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        if match := _SAMPLE.fullmatch(name):
            found.setdefault(int(match[1]), []).append((name, match[2]))
    return dict(sorted(found.items(), reverse=True))


# The page -------------------------------------------------------------------------------------


def _page(run: Path) -> str:
    state = _read_state(run / "state.json")
    training = _read_training(run / "metrics.jsonl")
    running = state.get("status") == "running"
    reload = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">' if running else ""
    name = escape(run.resolve().name)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"{reload}<title>{name}</title>\n<style>{_style()}</style>\n</head>\n<body>",
            _header(name, state, training),
            _validation(_read_validation(run / "validation.jsonl")),
            _samples(_read_samples(run / "samples")),
            _curves(training),
            _folded("Skipped files", _skipped(state.get("skipped"))),
            _folded("Recipe", _read_text(run / "recipe.toml")),
            f"<script>{_SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


@dataclass(frozen=True, slots=True)
class _Progress:
    """How far a run is; None for what is not known."""

    step: float | None
    steps: float | None
    seconds: float | None
    hours: float | None

    @property
    def share(self) -> float | None:
        """From 0 to 1, by steps or by hours, whichever the run lasts for."""
        if self.step is not None and self.steps:
            return min(1.0, self.step / self.steps)
        if self.seconds is not None and self.hours:
            return min(1.0, self.seconds / (3600 * self.hours))
        return None

    @property
    def seconds_left(self) -> float | None:
        """If it goes on as fast as it went so far."""
        if not self.seconds or not self.share:
            return None
        return self.seconds * (1 / self.share - 1)


def _amount(value: object) -> float | None:
    """A number that can be shown as it is."""
    found = number(value)
    return found if found is not None and 0 <= found < 1e12 else None


def _header(name: str, state: Mapping[str, Any], training: _Training) -> str:
    status = str(state.get("status", "unknown"))
    known = status if status in ("running", "done", "stopped", "failed") else "unknown"
    progress = _Progress(*(_amount(state.get(k)) for k in ("step", "steps", "seconds", "hours")))
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"  # a killed run cannot say that it is none
    facts = [("As of", now), *_how_far(progress, status == "running"), *_how_well(training)]
    shown = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    share = progress.share
    done = "" if share is None else f'<div class="bar"><i style="width:{share:.2%}"></i></div>'
    message = state.get("message")
    told = f'<p class="message">{escape(str(message))}</p>' if message else ""
    title = f'<h1>{name} <span class="status {known}">{escape(status)}</span></h1>'
    return f'<header>{title}\n{done}<dl class="facts">{shown}</dl>{told}</header>'


def _how_far(progress: _Progress, running: bool) -> Iterable[tuple[str, str]]:
    """Names and texts for the header."""
    if progress.step is not None:
        of = f" of {progress.steps:,.0f}" if progress.steps else ""
        yield "Step", f"{progress.step:,.0f}{of}"
    if progress.seconds is not None:
        of = f" of {progress.hours:g} h" if progress.hours else ""
        yield "Time", f"{_duration(progress.seconds)}{of}"
    if running and progress.seconds_left is not None:
        yield "Time left", f"about {_duration(progress.seconds_left)}"


def _how_well(training: _Training) -> Iterable[tuple[str, str]]:
    recent = training.recent
    if training.stages:
        yield "Stage", training.stages[-1][1]
    if "frames_per_second" in recent:
        yield "Frames/s", label(recent["frames_per_second"])
    if "waited" in recent:
        yield "Waiting for data", f"{recent['waited']:.0%}"
    if "loss" in recent:
        yield "Loss", label(recent["loss"])


def _duration(seconds: float) -> str:
    """A time in the two largest of its units.

    >>> _duration(7500)
    '2 h 5 min'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24:,} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# Measurements -----------------------------------------------------------------------------------


def _validation(found: _Validation) -> str:
    if not found.curves:
        return "<section><h2>Validation</h2><p>Nothing measured yet.</p></section>"
    lines = {
        measure: [
            Line(curve, _line_name(share, of), found.shares.index(share), dashed=of == "linear")
            for (share, name, of), curve in found.curves.items()
            if name == measure
        ]
        for measure in _MEASURES
    }
    figures = [
        figure(_MEASURES[measure], chart(_MEASURES[measure], drawn))
        for measure, drawn in lines.items()
        if drawn
    ]
    return (
        f"<section><h2>Validation</h2>\n{_legend(found.shares)}"
        f'<div class="grid3">{"".join(figures)}</div>\n{_table(found.last)}</section>'
    )


def _line_name(share: str, of: str) -> str:
    return f"{of or 'model'}, noise {share}:"


def _legend(shares: Sequence[str]) -> str:
    keys = legend([f"noise {share}" for share in shares], "linear baseline")
    return (
        f'{keys}<p class="note">Noise is a share of the '
        "latents' own deviation, added before decoding. The linear baseline takes principal "
        "components of 8x8 blocks, with the same noise. Higher is better, but for flicker.</p>"
    )


def _table(record: Record) -> str:
    """The last measurement: a row for each share of noise, the baseline beside the model."""
    scores = _scores(record)
    shares = sorted({share for share, _, _ in scores}, key=_share)
    measures = [measure for measure in _MEASURES if any(measure == m for _, m, _ in scores)]
    heads = "".join(f"<th>{_MEASURES[measure]}</th><th>linear</th>" for measure in measures)
    rows = []
    for share in shares:
        cells = [_cells(scores, share, measure) for measure in measures]
        rows += [f"<tr><th>{escape(share)}</th>{''.join(cells)}</tr>"]
    clips = _amount(record.get("clips"))
    of = "" if clips is None else f", mean of {clips:,.0f} clips"
    return (
        f'<div class="wide"><table>'
        f"<caption>Step {record['step']:,}{of}</caption><thead><tr><th>Noise</th>{heads}"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cells(scores: Mapping[tuple[str, str, str], float], share: str, measure: str) -> str:
    ours, theirs = (scores.get((share, measure, of), math.nan) for of in ("", "linear"))
    better = ours < theirs if measure == "flicker" else ours > theirs
    kind = ' class="better"' if better else ""
    digits = _DIGITS[measure]
    return f'<td{kind}>{ours:.{digits}f}</td><td class="other">{theirs:.{digits}f}</td>'


# Curves and pictures ----------------------------------------------------------------------------


def _curves(training: _Training) -> str:
    """The loss, then its terms, then the rest."""
    names = sorted(training.curves, key=lambda name: (name in _APART, name != "loss"))
    figures = []
    for name in names:
        curve, title = training.curves[name], _NAMES.get(name, name)
        recent = training.recent.get(name)
        notes = [] if recent is None else [label(recent)]
        notes += [f"not finite: {curve.not_finite:,}"] if curve.not_finite else []
        drawn = chart(title, [Line(curve)], training.steps, training.stages[1:])
        figures += [figure(title, drawn, ", ".join(notes))]
    if not figures:
        return "<section><h2>Training</h2><p>No step yet.</p></section>"
    thinned = f"Of {training.every} steps one is read." if training.every > 1 else ""
    note = (
        '<p class="note">A line is the mean of neighbouring steps, a band goes from the least to '
        f"the most of them. The number is the mean of the last {_RECENT} steps. {thinned}</p>"
    )
    return f'<section><h2>Training</h2>{note}<div class="grid3">{"".join(figures)}</div></section>'


def _samples(found: Mapping[int, Sequence[tuple[str, str]]]) -> str:
    """The pictures of the last step large, those of steps before it folded."""
    if not found:
        return ""
    (last, pictures), *older = found.items()
    shown = older[:: max(1, -(-len(older) // _OLDER_SAMPLES))]
    folded = [
        f'<details id="step-{step}"><summary>Step {step:,}</summary>{_pictures(files)}</details>'
        for step, files in shown
    ]
    more = len(older) - len(shown)
    note = f'<p class="note">{more:,} more steps are in samples/.</p>' if more else ""
    return (
        f'<section class="samples"><h2>Pictures, step {last:,}</h2>{_pictures(pictures)}'
        f"{''.join(folded)}{note}</section>"
    )


def _pictures(files: Sequence[tuple[str, str]]) -> str:
    return "".join(
        f'<figure><figcaption>{escape(name)}</figcaption><a href="{path}">'
        f'<img loading="lazy" src="{path}" alt="{escape(name)}"></a></figure>\n'
        for file, name in files[:_PICTURES]
        for path in (f"samples/{quote(os.fsencode(file))}",)
    )


def _skipped(reasons: object) -> str:
    """Files that could not be trained on, a line each."""
    if not isinstance(reasons, dict):
        return ""
    return "\n".join(f"{name}: {why}" for name, why in list(reasons.items())[:500])


def _folded(title: str, text: str) -> str:
    if not text:
        return ""
    return (
        f'<section><details id="{title.split()[0].lower()}"><summary>{title}</summary>'
        f"<pre>{escape(text[:_TEXT_BYTES])}</pre></details></section>"
    )


def _style() -> str:
    own = resources.files(__package__) / "page.css"
    return style() + own.read_text(encoding="utf-8")


_SCRIPT = """
// what was unfolded stays so when the page reloads
for (const fold of document.querySelectorAll("details")) try {
  const key = location.pathname + fold.id;
  fold.open = sessionStorage.getItem(key) !== null;
  fold.addEventListener("toggle", () => fold.open ? sessionStorage.setItem(key, "")
    : sessionStorage.removeItem(key));
} catch { /* pages from disk may have no storage */ }
"""
