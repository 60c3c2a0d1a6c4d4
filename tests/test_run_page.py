"""The page to watch a run by."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from temporal_vae.evaluation import charts
from temporal_vae.evaluation.charts import Curve, Line, chart, label
from temporal_vae.training import curves
from temporal_vae.training.curves import Thinned, read_last, read_records
from temporal_vae.training.page import write_page

VOID = {"meta", "img", "path", "link", "input"}


class Page(HTMLParser):
    """What a page has, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.classes: list[str] = []
        self.metas: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), "an attribute stands twice"
        self.links += [v or "" for k, v in attrs if k in ("href", "src", "xlink:href", "action")]
        self.classes += (found.get("class") or "").split()
        if tag == "meta":
            self.metas.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page(run: Path) -> Page:
    write_page(run)
    return Page((run / "run.html").read_text(encoding="utf-8"))


def write_lines(file: Path, records: Sequence[Any]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def metrics(steps: int, **others: Any) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "loss": 1 / step, "terms": {"reconstruction/log_error": -step / 7},
            "learning_rate": 3e-4, "frames_per_second": 250.0, "seconds": 2.0 * step,
            "waited": 0.03, "stage": "images" if step <= steps // 2 else "video", **others,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip


def measurement(step: int, psnr: float) -> dict[str, Any]:
    scores = {"psnr": psnr, "ssim": 0.8123, "flicker": 5.25}
    linear = {"psnr": 24.5, "ssim": 0.7, "flicker": 4.75}
    return {"step": step, "clips": 3, "noise": {"0": {**scores, "linear": linear},
            "0.1": {**scores, "psnr": psnr - 1, "linear": linear}}}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 20 steps, out of 40."""
    folder = tmp_path / "a run"
    (folder / "samples").mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", metrics(20))
    write_lines(folder / "validation.jsonl", [measurement(10, 21.0), measurement(20, 26.789)])
    (folder / "recipe.toml").write_text("seed = 7 # <seed>\n")
    state = {"status": "running", "step": 20, "steps": 40, "hours": None, "seconds": 40.0}
    (folder / "state.json").write_text(json.dumps(state))
    for name in ("step-000010-cat.png", "step-000020-cat.png", "step-000020-a dog.png", "x.png"):
        (folder / "samples" / name).write_bytes(b"png")
    return folder


# What stands in it -----------------------------------------------------------------------------


def test_a_page_tells_how_far_a_run_is(run: Path) -> None:
    text = page(run).text
    for words in (
        "a run",
        "running",
        "20 of 40",
        "about 40 s",
        "Frames/s 250",
        "3%",
        "Stage video",
    ):
        assert words in text, words


def test_a_page_shows_the_last_measurement(run: Path) -> None:
    found = page(run)
    for words in ("Step 20, mean of 3 clips", "26.79", "25.79", "0.8123", "5.25", "24.50", "4.75"):
        assert words in found.text, words
    assert found.classes.count("better") == 4  # PSNR and SSIM, not the flicker
    assert found.classes.count("dashed") == 3 * 2 + 1  # baselines, and what explains them


def test_a_page_shows_the_last_pictures_and_folds_the_others(run: Path) -> None:
    found = page(run)
    pictures = [link for link in found.links if link.endswith(".png")]
    assert pictures[::2] == pictures[1::2]  # a picture links to itself
    names = ["step-000020-a%20dog.png", "step-000020-cat.png", "step-000010-cat.png"]
    assert pictures[::2] == [f"samples/{name}" for name in names]
    text = (run / "run.html").read_text()
    assert text.index("step-000020-cat") < text.index("<details") < text.index("step-000010-cat")


@pytest.mark.parametrize("status", ["running", "done", "stopped", "failed"])
def test_a_page_reloads_while_a_run_goes_on(run: Path, status: str) -> None:
    (run / "state.json").write_text(json.dumps({"status": status, "message": "no room left"}))
    found = page(run)
    reloads = [meta for meta in found.metas if meta.get("http-equiv") == "refresh"]
    assert [meta["content"] for meta in reloads] == (["30"] if status == "running" else [])
    assert status in found.classes and "no room left" in found.text


def test_a_page_of_hours_tells_the_time_left(run: Path) -> None:
    state = {"status": "running", "step": 20, "steps": None, "hours": 2, "seconds": 1800.0}
    (run / "state.json").write_text(json.dumps(state))
    assert "30 min 0 s of 2 h" in page(run).text
    assert "about 1 h 30 min" in page(run).text


def test_a_page_needs_nothing_else(run: Path) -> None:
    found = page(run)
    assert found.links and all(link.startswith("samples/") for link in found.links)
    text = (run / "run.html").read_text()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)


def test_terms_may_stand_beside_the_loss(run: Path) -> None:
    flat = [{**r, **r.pop("terms")} for r in metrics(20)]
    before = (page(run), (run / "run.html").read_text())[1]
    write_lines(run / "metrics.jsonl", flat)
    page(run)
    assert "reconstruction/log_error" in before
    drawn = re.compile(r'<path class="line c0" d="([^"]+)"')
    assert sorted(drawn.findall((run / "run.html").read_text())) == sorted(drawn.findall(before))


def test_everything_is_escaped(run: Path) -> None:
    evil = "<script>alert('&\"')</script>"
    write_lines(run / "metrics.jsonl", metrics(4, **{evil: 1.0, "stage": evil}))
    twisted = measurement(3, 20.0)
    twisted["noise"] = {evil: twisted["noise"]["0"]}
    write_lines(run / "validation.jsonl", [twisted])
    state = {"status": evil, "message": evil, "step": 3, "skipped": {evil: evil}}
    (run / "state.json").write_text(json.dumps(state))
    (run / "recipe.toml").write_text(evil)
    (run / "samples" / "step-000099-<img onerror='x'>.png").write_bytes(b"png")
    found = page(run)
    text = (run / "run.html").read_text()
    assert text.count("<script>") == 1 and "<img onerror" not in text
    assert found.text.count("alert(") > 6  # told, in words
    renamed = run.rename(run.parent / "<b>")
    assert "<b>" not in (page(renamed), (renamed / "run.html").read_text())[1]


# Curves ----------------------------------------------------------------------------------------


def places(svg: str, kind: str = "line") -> list[tuple[float, float]]:
    path = re.search(rf'<path class="{kind} c0" d="M([^"Z]+)', svg)
    assert path
    return [(float(x), float(y)) for x, y in (p.split() for p in path[1].split("L"))]


def read_back(svg: str) -> list[tuple[float, float]]:
    """Steps and values of a chart's curve, by the numbers at its axes, as a reader would."""
    found = re.findall(r'<text class="tick" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', svg)
    bottom = max(float(y) for _, y, _ in found)
    across = [(float(x), float(text)) for x, y, text in found if float(y) == bottom]
    up = [(float(y) - 4, float(text)) for _, y, text in found if float(y) != bottom]
    (x0, s0), (x1, s1), (y0, v0), (y1, v1) = *across[:2], up[0], up[-1]
    return [
        (s0 + (x - x0) / (x1 - x0) * (s1 - s0), v0 + (y - y0) / (y1 - y0) * (v1 - v0))
        for x, y in places(svg)
    ]


def curve(values: Sequence[float], first: int = 1) -> Curve:
    numbers = np.array(values, np.float64)
    return Curve(np.arange(first, first + len(values), dtype=float), numbers, numbers, numbers)


def test_a_curve_shows_its_numbers() -> None:
    values = [3.0, -1.5, 2.25, 0.0, 8.5, 7.0, 7.5, -4.0]
    found = read_back(chart("loss", [Line(curve(values))]))
    assert [step for step, _ in found] == pytest.approx(range(1, 9), abs=0.02)
    assert [value for _, value in found] == pytest.approx(values, abs=0.02)


def test_a_curve_of_many_sizes_has_a_logarithmic_axis() -> None:
    values = [1.0, 10.0, 100.0, 1000.0, 100.0]
    svg = chart("loss", [Line(curve(values))])
    heights = [y for _, y in places(svg)]
    steps = np.diff(heights)
    assert steps[:3] == pytest.approx([steps[0]] * 3, abs=0.15) and steps[0] < 0
    assert heights[4] == pytest.approx(heights[2], abs=0.15)
    assert ">1k<" in svg and ">10<" in svg


def test_a_dot_tells_its_number() -> None:
    svg = chart("PSNR", [Line(curve([21.0, 26.789]), "model:"), Line(curve([2, 2]), dashed=True)])
    assert "<title>model: 26.79 at step 2</title>" in svg
    assert svg.count("<circle") == 2
    assert svg.index('class="line dashed c0"') < svg.index('class="line c0"')  # and lies below


def test_a_peak_does_not_flatten_a_curve() -> None:
    """Neither one in the mean of a bin, nor one that is only in its band."""
    thinned = Thinned()
    values = [1e6 if i == 5003 else 40 * math.sin(i / 900) + 5 * (i % 2) for i in range(8000)]
    thinned.add([{"step": i, "x": value} for i, value in enumerate(values)])
    found = thinned.curves()["x"]
    assert found.high.max() == 1e6 and found.mean.max() > 1e4
    heights = np.array([y for _, y in places(chart("x", [Line(found)]))])
    inside = heights[(heights > 0) & (heights < charts.HEIGHT)]
    assert len(inside) == len(heights) - 1
    assert inside.max() - inside.min() > 0.6 * charts.HEIGHT

    steady = Curve(found.steps, 0 * found.mean + 1, found.low, found.high)
    ticks = re.findall(r'text-anchor="end">([^<]+)<', chart("x", [Line(steady)]))
    assert 20 < float(ticks[-1]) < 100


def test_stages_are_lines() -> None:
    svg = chart("loss", [Line(curve([1, 2, 3, 4, 5]))], stages=[(3, "<video>"), (1, "at the edge")])
    assert svg.count('class="stage"') == 1 and ">&lt;video&gt;</text>" in svg


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0], [-1e-30, 1e-30], [1e30, -1e30]])
def test_a_curve_of_one_value_has_a_scale(values: list[float]) -> None:
    svg = chart("loss", [Line(curve(values))])
    assert svg.count('class="grid"') >= 4
    assert all(math.isfinite(n) for place in places(svg) for n in place)


def test_no_curve_no_chart() -> None:
    assert chart("loss", []) == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [(12000, "12k"), (1.5e6, "1.5M"), (0.0001, "1e-4"), (0.25, "0.25"), (0.0, "0"), (-3e9, "-3G"),
     (999.96, "1000"), (4.3159e-5, "4.316e-5"), (1e30, "1e30"), (-0.5, "-0.5")],
)  # fmt: skip
def test_numbers_in_few_letters(value: float, expected: str) -> None:
    assert label(value) == expected


# Long, damaged and missing files ---------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@example(400, 0, 400, 0)
@example(401, 0, 401, 0)
@given(st.integers(1, 5000), st.integers(0, 10**6), st.integers(1, 700), st.integers(0, 99))
def test_bins_keep_ends_and_means(count: int, first: int, piece: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(count)
    thinned = Thinned()
    records = [{"step": first + i, "x": float(value)} for i, value in enumerate(values)]
    for start in range(0, count, piece):
        thinned.add(records[start : start + piece])
    width = next(w for w in (1, 2, 4, 8, 16) if (count - 1) // w < charts.BINS)
    bins = [np.arange(i, min(i + width, count)) for i in range(0, count, width)]
    found = thinned.curves()["x"]
    assert found.steps == pytest.approx(np.array([first + i.mean() for i in bins]))
    assert found.mean == pytest.approx(np.array([values[i].mean() for i in bins]))
    assert found.low.tolist() == [values[i].min() for i in bins]
    assert found.high.tolist() == [values[i].max() for i in bins]


def test_values_that_are_no_numbers_are_passed_over() -> None:
    thinned = Thinned()
    odd: list[object] = [1.0, math.nan, math.inf, "7", None, True, [1], 10**400, 1e300, 3]
    thinned.add([{"step": i, "x": value, "y": "text"} for i, value in enumerate(odd)])
    found = thinned.curves()
    assert list(found) == ["x"]
    assert found["x"].mean.tolist() == [1.0, 3.0]
    assert found["x"].not_finite == 3
    thinned.add([{"step": 50, "x": 10**400}, {"step": 51, "x": 9}])
    assert thinned.curves()["x"].mean.tolist() == [1.0, 3.0, 9.0]


def test_steps_that_are_none_are_passed_over(tmp_path: Path) -> None:
    steps: list[object] = [-1, 0, True, 1.0, "1", None, 10**30, 7]
    write_lines(tmp_path / "lines", [*({"step": step} for step in steps), {"loss": 1}, [1], 1])
    assert [*read_records(tmp_path / "lines")] == [[{"step": 0}, {"step": 7}]]


def test_many_names_end_somewhere() -> None:
    thinned = Thinned()
    thinned.add([{"step": 1, **{f"term {i}": 1.0 for i in range(500)}}])
    assert len(thinned.curves()) == curves.NAMES


DAMAGES = [
    b"", b"\x00\xff\xfe", b"{", b"[]", b"null", b"[" * 5000, b'{"step": -1}', b'{"step": "x"}',
    b'{"step": 1e400, "loss": 2}', b'{"step": 3, "noise": [1]}',
    b'{"step": 3, "noise": {"0": 5, "x": {"psnr": "high", "linear": 2}}}',
    b'{"step": 5, "loss": 1e39, "terms": 7, "stage": 8}', b'{"status": ["running"], "step": []}',
    b'{"step": 1e300, "steps": 1e-300, "seconds": NaN, "hours": 1e-9, "status": "running"}',
    b'{"step": 4, "loss": "\\ud800"}',
    b'{"step": 9007199254740991, "loss": 1e-320}\n{"step": 0, "loss": 1e38}',
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_file_is_survived(run: Path, damage: bytes) -> None:
    good = metrics(3)
    for name in ("metrics.jsonl", "validation.jsonl", "state.json", "recipe.toml"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(damage)
        page(run)
        (run / name).write_bytes(before)
    lines = [json.dumps(record).encode() for record in good]
    (run / "metrics.jsonl").write_bytes(b"\n".join([lines[0], damage, b"", *lines[1:]]))
    assert page(run).text.count("0.6111") == 2 or b'"loss"' in damage  # the mean of 1, 1/2, 1/3


def test_a_line_that_is_being_written_is_left_out(run: Path) -> None:
    whole = re.sub(r"20\d\d-.{14} UTC", "", page(run).text)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "loss": 555.5, "ter')
    assert re.sub(r"20\d\d-.{14} UTC", "", page(run).text) == whole


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "validation.jsonl", "state.json", "recipe.toml", "samples"]
)
def test_a_missing_file_is_left_out(run: Path, name: str) -> None:
    (run / name).rename(run.parent / "away")
    page(run)
    (run / name).mkdir()  # and a folder in its place, too
    page(run)


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    text = page(tmp_path).text
    assert "Nothing measured yet" in text and "No step yet" in text
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "none")


def test_a_page_appears_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_page(run)
    before = (run / "run.html").read_bytes()

    def torn(path: Path, text: str, **_: str) -> None:
        path.write_bytes(text[:99].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="no space"):
        write_page(run)
    assert (run / "run.html").read_bytes() == before
    assert len(list(run.iterdir())) == 6


def test_a_long_run_is_read_in_no_time(run: Path) -> None:
    """100,000 lines, of which half are read; the page stays small."""
    lines = "".join(
        f'{{"step": {i}, "loss": {1 + i % 7}, "a": {i}, "b": 0.123456789, "stage": "s"}}\n'
        for i in range(100_000)
    )
    (run / "metrics.jsonl").write_text(lines)
    start = time.process_time()
    found = page(run)
    assert time.process_time() - start < 3
    assert (run / "run.html").stat().st_size < 300_000
    assert "Of 2 steps one is read" in found.text
    assert "100k" in found.text or "80k" in found.text


def test_of_many_lines_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not always the same of what comes back every few steps; and the last ones in any case."""
    monkeypatch.setattr(curves, "LINES", 5000)
    monkeypatch.setattr(curves, "_READ_BYTES", 2**14)
    file = tmp_path / "metrics.jsonl"
    write_lines(file, [{"step": i, "x": float(i % 2)} for i in range(15_000)])
    assert curves.reading_stride(file) == 3
    assert curves.reading_stride(tmp_path / "none") == 1
    kept = [record for records in read_records(file, every=2) for record in records]
    assert 7200 < len(kept) < 7800
    assert 0.45 < np.mean([record["x"] for record in kept]) < 0.55
    assert [record["step"] for record in read_last(file, 3)] == [14_997, 14_998, 14_999]


def test_older_pictures_are_thinned_out(run: Path) -> None:
    for step in range(100, 400):
        (run / "samples" / f"step-{step:06d}-cat.png").write_bytes(b"png")
    found = page(run)
    assert 15 < found.classes.count("samples") + sum(".png" in link for link in found.links) < 80
    assert "more steps are in samples/" in found.text
    assert charts.COLOURS >= 4
