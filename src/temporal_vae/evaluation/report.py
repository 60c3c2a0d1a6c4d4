"""The report of an evaluation: one HTML file to look at, which needs no network and no other file.

What it does in a browser is in `report.js`, how it looks in `report.css` and `page.css`.
"""

from __future__ import annotations

import json
import math
import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources

import numpy as np

from temporal_vae.evaluation.charts import COLOURS, Curve, Line, chart, figure, legend, style
from temporal_vae.evaluation.results import INTERVAL, ClipResult, Evaluation, Mean, means
from temporal_vae.evaluation.series import LEAST_FRAMES
from temporal_vae.evaluation.shown import FULL_ERROR, HEAT, ORIGINAL, ShownClip
from temporal_vae.evaluation.values import BY_FRAME, SHOWN
from temporal_vae.files.atomic import atomic_path

SPEEDS = {"1": "full speed", "0.5": "half speed", "0.25": "a quarter", "0.1": "a tenth"}
LINES = 200
"""Faults, or failures, that the page lists at most."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What browsers hold the page to: it asks no host for anything."""


def write_report(
    path: str | os.PathLike[str], result: Evaluation, pictures: Mapping[str, ShownClip],
    cards: Mapping[str, str], command: str,
) -> None:  # fmt: skip
    """Write the page, whole or not at all.

    `pictures` are those of some of the clips, by their paths, `cards` the model cards of some of
    the models, `command` the line that the numbers come from.
    """
    with atomic_path(path) as part, part.open("w", encoding="utf-8", errors="replace") as file:
        for text in _Report(result, pictures, cards, command).parts():
            file.write(text)


@dataclass(frozen=True, slots=True)
class _Report:
    result: Evaluation
    pictures: Mapping[str, ShownClip]
    cards: Mapping[str, str]
    command: str

    @property
    def shown(self) -> list[tuple[ClipResult, ShownClip]]:
        """Clips with their pictures."""
        found = [(clip, self.pictures.get(clip.path)) for clip in self.result.clips]
        return [(clip, kept) for clip, kept in found if kept and kept.count(clip.models)]

    def parts(self) -> Iterator[str]:
        """The page, piece by piece."""
        title = f"{', '.join(self.result.models)} on {_number(len(self.result.clips), 'clip')}"
        yield (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
            f"<style>{style()}{_file('report.css')}</style>\n</head>\n<body>\n"
        )
        yield self._header()
        yield f"<main>{_results(self.result)}"
        for index, (clip, kept) in enumerate(self.shown):
            yield _clip(clip, kept, index, self.result)
        yield _elsewhere(self.result, {clip.path for clip, _ in self.shown})
        yield _stress(self.result)
        yield self._origin()
        yield f"</main>\n<script>{_file('report.js')}</script>\n</body>\n</html>\n"

    def _header(self) -> str:
        clips = self.result.clips
        links = [("#results", "Results")]
        links += [(f"#clip-{i}", clip.name) for i, (clip, _) in enumerate(self.shown)]
        links += [("#stress", "Noise and repetition")] * bool(_stress(self.result))
        links += [("#origin", "How this was made")]
        listed = "".join(f'<a href="{to}">{escape(name)}</a>' for to, name in links)
        counts = (
            (len(self.result.models), "model"), (len(clips), "clip"),
            (sum(clip.frames for clip in clips), "frame"),
        )  # fmt: skip
        return (
            "<header><h1>How well do these models bring a video back?</h1>\n"
            '<p class="lead">A video autoencoder turns a video into far fewer numbers and builds '
            "it again from them. This page shows what is lost on the way: "
            f"{', '.join(_number(*each) for each in counts)}.</p>\n"
            f'<nav aria-label="Parts of this page">{listed}</nav>'
            '<noscript><p class="message">The pictures below need JavaScript; the numbers do not.'
            "</p></noscript></header>\n"
        )

    def _origin(self) -> str:
        cards = "".join(
            f"<details><summary>Model card of {escape(name)}</summary>"
            f'<pre class="text">{escape(text)}</pre></details>'
            for name, text in self.cards.items()
            if text
        )
        return (
            '<section id="origin"><h2>How this was made</h2>\n<p>This command made the page:</p>'
            f'<pre tabindex="0" aria-label="Command">{escape(self.command)}</pre>\n'
            f"{_compression(self.shown, len(self.result.clips))}{cards}"
            f"<footer>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by temporal-vae</footer>"
            "</section>\n"
        )


# Numbers --------------------------------------------------------------------------------------


def _results(result: Evaluation) -> str:
    if not result.clips:
        return (
            '<section id="results"><h2>Results</h2><p>No clip could be measured.</p>'
            f"{_failures(result)}</section>"
        )
    several = len(result.clips) > 1
    brackets = (
        f"In brackets: {INTERVAL}." if several else "One clip is too few to say how sure a mean is."
    )
    of = f"Means over {_number(len(result.clips), 'clip')}"
    names = [name for name in SHOWN if any(name in values for values in result.mean.values())]
    words = "".join(
        f"<div><dt>{SHOWN[name].title}, {SHOWN[name].best} is best</dt>"
        f"<dd>{SHOWN[name].says}</dd></div>"
        for name in names
    )
    missing = "".join(
        f"<li>{escape(', '.join(values))}: {escape(reason)}</li>"
        for reason, values in result.missing.items()
    )
    return (
        '<section id="results"><h2>Results</h2>\n'
        f"{_table(of, result.mean)}"
        f'<p class="note">The best of each column is bold. {brackets}</p>\n'
        f'<details open><summary>What the columns mean</summary><dl class="words">{words}</dl>'
        f"</details>\n{_folded('Not measured', missing)}{_failures(result)}</section>\n"
    )


def _failures(result: Evaluation) -> str:
    lines = [f"<li>{escape(what)}: {escape(why)}</li>" for what, why in result.failed.items()]
    return _folded("Failed", "".join(lines[:LINES]), "open")


def _folded(title: str, lines: str, kind: str = "") -> str:
    if not lines:
        return ""
    return f"<details {kind}><summary>{title}</summary><ul>{lines}</ul></details>\n"


def _table(caption: str, rows: Mapping[str, Mapping[str, Mean]]) -> str:
    names = [name for name in SHOWN if any(name in values for values in rows.values())]
    heads = "".join(f'<th scope="col">{SHOWN[name].title}</th>' for name in names)
    best = {name: _best(name, rows) for name in names}
    body = "".join(
        f'<tr><th scope="row"><i class="swatch c{index % COLOURS}"></i>{escape(model)}</th>'
        f"{''.join(_cell(name, values.get(name), best[name]) for name in names)}</tr>"
        for index, (model, values) in enumerate(rows.items())
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f'<caption>{escape(caption)}</caption><thead><tr><th scope="col">Model</th>{heads}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>\n"
    )


def _best(name: str, rows: Mapping[str, Mapping[str, Mean]]) -> float | None:
    """The best mean of a column that several models have."""
    found = [values[name].mean for values in rows.values() if name in values]
    finite = [value for value in found if math.isfinite(value)]
    if len(finite) < 2:
        return None
    return {"highest": max(finite), "lowest": min(finite)}.get(SHOWN[name].best,
                                                                min(finite, key=abs))  # fmt: skip


def _cell(name: str, mean: Mean | None, best: float | None) -> str:
    if mean is None:
        return "<td>-</td>"
    digits = SHOWN[name].digits
    value, _, interval = mean.text(digits).partition(" [")
    is_best = best is not None and value == f"{best:z.{digits}f}"
    said = f'<b class="better">{value}</b>' if is_best else value
    return f"<td>{said}{f' <small>[{interval}</small>' if interval else ''}</td>"


def _elsewhere(result: Evaluation, shown: set[str]) -> str:
    """Faults in clips of which the page has no pictures."""
    lines = [
        f"<li>{escape(clip.name)}, {escape(model)}: {escape(line)}</li>"
        for clip in result.clips
        if clip.path not in shown
        for model, found in clip.models.items()
        for line in found.diagnosis
    ]
    if not lines:
        return ""
    more = f"<li>and {len(lines) - LINES} more</li>" if len(lines) > LINES else ""
    return (
        "<section><h2>Faults in clips that are not shown</h2>"
        f'<ul class="faults">{"".join(lines[:LINES])}{more}</ul></section>\n'
    )


def _stress(result: Evaluation) -> str:
    """Curves over noise on the latents, and over rounds, where the protocol has them."""
    percent = {f"noise {share:g}": 100 * share for share in result.protocol.get("shares", ())}
    rounds = {f"round {n}": float(n) for n in range(2, result.protocol.get("rounds", 1) + 1)}
    kinds = (
        ("Noise on the latents", 0.0, percent, "percent of noise",
         "A model that generates videos never hits latents exactly. Here noise was put on them "
         "before decoding, in percent of their own deviation. The flatter a line, the better; a "
         "band is the interval of the mean."),
        ("Again and again", 1.0, rounds, "round",
         "Each reconstruction was reconstructed once more. The flatter a line, the better."),
    )  # fmt: skip
    parts = [_swept(result, *kind) for kind in kinds]
    drawn = "".join(part for part in parts if part)
    return f'<section id="stress">{drawn}</section>\n' if drawn else ""


def _swept(
    result: Evaluation, title: str, first: float, further: Mapping[str, float], by: str, says: str
) -> str:
    figures = []
    for name in ("psnr", "flicker"):
        lines = [
            Line(curve, model, index)
            for index, model in enumerate(result.models)
            if (curve := _sweep(result.mean[model], name, first, further))
        ]
        if lines:
            label, better = BY_FRAME[name]
            figures += [figure(label, chart(label, lines, by=by), better)]
    if not figures:
        return ""
    return (
        f'<h2>{title}</h2><p class="note">{says} Across: {by}.</p>{legend(result.models)}'
        f'<div class="grid3">{"".join(figures)}</div>'
    )


def _sweep(
    values: Mapping[str, Mean], name: str, first: float, further: Mapping[str, float]
) -> Curve | None:
    """A value as it is, and under what else was done; None where that was not done."""
    places = {name: first} | {f"{name}/{what}": place for what, place in further.items()}
    found = [(place, values[key]) for key, place in places.items() if key in values]
    found = [(place, mean) for place, mean in found if math.isfinite(mean.mean)]
    if len(found) < 2:
        return None
    table = [(place, m.mean, *(e if math.isfinite(e) else m.mean for e in (m.low, m.high)))
             for place, m in found]  # fmt: skip
    return Curve(*np.array(table).T)


# One clip -------------------------------------------------------------------------------------


def _clip(clip: ClipResult, kept: ShownClip, index: int, result: Evaluation) -> str:
    names, count = list(clip.models), kept.count(clip.models)
    colours = {name: result.models.index(name) for name in names}
    rows = {name: means([clip.models[name].values]) for name in names}
    own = _table(f"Values of {clip.name}", rows) if len(result.clips) > 1 else ""
    charts = _curves(clip, count, colours)
    facts = (
        f"{_number(clip.frames, 'frame')} of {clip.width} x {clip.height} pixels, "
        f"{clip.fps:g} in a second"
    )
    less = "" if count == clip.frames else f"; shown are the first {count}"
    return (
        f'<section class="clip" id="clip-{index}" aria-labelledby="name-{index}">'
        f'<h2 id="name-{index}">{escape(clip.name)}</h2><p class="note">{facts}{less}.</p>\n'
        f"{_faults(clip, count)}"
        f'<div class="watch">{_player(clip.name, names, kept, count)}'
        f'<div class="beside">{legend(names)}{"".join(charts[:2])}</div></div>\n'
        f"{_side_by_side(names, kept)}"
        f'<p class="hint">Click in a curve, or in a slice of time below, to go to that frame.</p>'
        f'<div class="grid3">{"".join(charts[2:])}</div>\n'
        f"{_slices(names, kept, count)}"
        f"{own}{_data(names, kept, count)}</section>\n"
    )


def _faults(clip: ClipResult, count: int) -> str:
    """The lines of the diagnosis; a frame's number goes to the frame, if the player has it."""

    def linked(found: re.Match[str]) -> str:
        return found.expand(_BUTTON) if int(found[1]) < count else found[0]

    lines = [
        f"<li><b>{escape(model)}</b>: {_FRAME.sub(linked, escape(line))}</li>"
        for model, found in clip.models.items()
        for line in found.diagnosis
    ]
    if lines:
        return f'<h3>Faults that were found</h3><ul class="faults">{"".join(lines)}</ul>\n'
    if clip.frames < LEAST_FRAMES:
        return f'<p class="fine">Faults in time are looked for from {LEAST_FRAMES} frames on.</p>\n'
    return (
        '<p class="fine">No fault was found of those that are looked for: flicker of brightness, '
        "seams and other periods, drift of brightness and colour, frozen and bad frames.</p>\n"
    )


_FRAME = re.compile(r"\bframe (\d+)")
_BUTTON = r'<button type="button" class="goto" data-frame="\1">frame \1</button>'


def _player(clip: str, names: Sequence[str], kept: ShownClip, count: int) -> str:
    height, width = kept.size
    canvas = f'width="{width}" height="{height}"'
    tracks = [ORIGINAL, *names]
    colours = ", ".join(f"rgb({r} {g} {b})" for r, g, b in HEAT)
    speeds = "".join(f'<option value="{value}">{says}</option>' for value, says in SPEEDS.items())
    return f"""<div class="player" role="group" aria-label="Player of {escape(clip)}">
<div class="stage" style="--aspect: {width / height:.4f}" aria-busy="true">
<canvas class="left" {canvas}></canvas><canvas class="right" {canvas}></canvas>
<span class="tag left" aria-hidden="true"></span><span class="tag right" aria-hidden="true"></span>
<div class="handle" role="slider" tabindex="0" aria-label="Wipe: how much of the left video is seen"
 aria-valuemin="0" aria-valuemax="100" aria-valuenow="50" aria-valuetext="50 percent"></div></div>
<div class="controls"><button type="button" class="play" aria-label="Play">{_PLAY}</button>
<button type="button" class="step" data-step="-1" aria-label="One frame back">{_BACK}</button>
<button type="button" class="step" data-step="1" aria-label="One frame on">{_ON}</button>
<input type="range" class="seek" aria-label="Frame" min="0" max="{count - 1}" value="0" step="1">
<output class="place"></output></div>
<div class="controls"><label>Left {_select("left", tracks, 0)}</label>
<label>Right {_select("right", tracks, 1)}</label>
<label>Speed <select class="speed">{speeds}</select></label>
<label class="switch"><input type="checkbox" class="heat"> Show the error</label>
<span class="scale" hidden><span>0</span><i style="background: linear-gradient(to right, {colours})"
></i><span>{FULL_ERROR:g} levels of 255 or more</span></span></div>
<p class="hint">Drag the line over the picture. Keys: space plays, comma and full stop step a frame,
e shows the error, arrows move the line or the place that is focused.</p></div>
"""


_ICON = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="{}"/></svg>'
_PLAY = _ICON.format("M4 2l10 6-10 6z")
_BACK = _ICON.format("M12 2v12l-8-6zM3 2h2v12H3z")
_ON = _ICON.format("M4 2v12l8-6zM11 2h2v12h-2z")


def _select(kind: str, names: Sequence[str], chosen: int) -> str:
    options = "".join(
        f'<option value="{i}"{" selected" * (i == chosen)}>{escape(name)}</option>'
        for i, name in enumerate(names)
    )
    return f'<select class="{kind}">{options}</select>'


def _side_by_side(names: Sequence[str], kept: ShownClip) -> str:
    height, width = kept.size
    canvases = "".join(
        f'<figure><figcaption>{escape(name)}</figcaption><canvas class="small" data-track="{i}" '
        f'width="{width}" height="{height}" role="img" aria-label="{escape(name)}"></canvas>'
        "</figure>"
        for i, name in enumerate([ORIGINAL, *names])
    )
    return f'<div class="videos">{canvases}</div>\n'


def _curves(clip: ClipResult, count: int, colours: Mapping[str, int]) -> list[str]:
    """A figure for each value that frames have."""
    figures = []
    ends = (0.0, float(max(1, clip.frames - 1)))
    stages = [(count, "not shown from here")] if count < clip.frames else []
    for name, (title, better) in BY_FRAME.items():
        lines = [
            Line(curve, model, colours[model])
            for model, found in clip.models.items()
            if (curve := Curve.of(found.frames.get(name, [])))
        ]
        if lines:
            drawn = chart(title, lines, ends, stages, by="frame")
            figures += [figure(title, drawn, better)]
    return figures


def _slices(names: Sequence[str], kept: ShownClip, count: int) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>"
        f'<div class="slice" data-frames="{count}"><img alt="Time slice of {escape(name)}" '
        f'src="{_source(kept.tracks[name].time_slice(count))}"></div>'
        '<div class="arrow"><span>frame 0</span><i></i><span>'
        f"time, to frame {count - 1}</span></div></figure>"
        for name in (ORIGINAL, *names)
    )
    return (
        "<h3>Slices of time</h3><p>Each picture follows one column of pixels, the one in the "
        "middle of the frame, from the first frame at the left to the last at the right. "
        "<b>Look for upright stripes that the original does not have: they are flicker</b>; and "
        "for lines that are smooth in the original and ragged in a reconstruction.</p>"
        f'<div class="slices">{figures}</div>\n'
    )


def _data(names: Sequence[str], kept: ShownClip, count: int) -> str:
    """The pictures, for the page's script."""
    tracks = [
        {
            "name": name,
            "frames": [_letters(picture) for picture in kept.tracks[name].frames[:count]],
            "errors": [_letters(picture) for picture in kept.tracks[name].errors[:count]],
        }
        for name in (ORIGINAL, *names)
    ]
    text = json.dumps({"fps": kept.fps, "count": count, "tracks": tracks})
    text = text.replace("<", "\\u003c")  # no name ends the script
    return f'<script type="application/json">{text}</script>'


def _source(picture: bytes) -> str:
    kind = "jpeg" if picture.startswith(b"\xff\xd8") else "webp"
    return f"data:image/{kind};base64,{_letters(picture)}"


def _letters(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _compression(shown: Sequence[tuple[ClipResult, ShownClip]], clips: int) -> str:
    """How the pictures were made, and which are not there."""
    if not shown:
        return ""
    lines = []
    for clip, kept in shown:
        height, width = kept.size
        scaled = f", scaled to {width} x {height}" if width != clip.width else ""
        lines += [f"<li>{escape(clip.name)}: {_kept_as(clip, kept)}{scaled}</li>"]
    some = (
        f"The page has pictures of the first {len(shown)} of {clips} clips; tables are of all. "
        if len(shown) < clips
        else ""
    )
    return (
        "<h3>About the pictures</h3><p>Values and pictures of the error were computed from the "
        "frames themselves, before any compression. Each frame in this page is an image of its "
        f"own, so that all players show the same frame. {some}At most three seconds of a clip are "
        "kept, or as much as there is room for; --start and --frames choose another part."
        f"</p><ul>{''.join(lines)}</ul>\n"
    )


def _kept_as(clip: ClipResult, kept: ShownClip) -> str:
    least = min(kept.tracks[name].closeness for name in (ORIGINAL, *clip.models))
    if math.isinf(least):
        return "lossless WebP, so colours are exactly those that were measured"
    return (
        f"JPEG of full colour resolution, as there was no room for lossless pictures; their PSNR "
        f"to the frames that were measured is {least:.1f} dB or more"
    )


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
