"""The report of an evaluation: what is in the file, and what it does in a browser."""

from __future__ import annotations

import json
import math
import re
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import command
from test_evaluation import Run, moving, noisy, tensors
from test_run_page import Page
from test_video import write

from temporal_vae.evaluation import report, shown
from temporal_vae.evaluation.charts import BINS, Curve
from temporal_vae.evaluation.measures import Pair
from temporal_vae.evaluation.results import ClipResult, Evaluation, ModelOnClip
from temporal_vae.evaluation.shown import FULL_ERROR, HEAT, ORIGINAL, ShownClip
from temporal_vae.video import Uint8Frames

NAME = "<script>alert(1)"
FRAMES, HEIGHT, WIDTH, BAD = 12, 48, 64, 7


def reconstruction() -> Uint8Frames:
    """Of `moving`, with one frame that is much worse."""
    frames = noisy(moving(FRAMES, HEIGHT, WIDTH))
    frames[BAD] = frames[BAD] // 2
    return frames


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report by the command itself: a clip with a hostile name, a model, a video."""
    folder = tmp_path_factory.mktemp("report")
    clip = write(folder / f"{NAME}.mkv", moving(FRAMES, HEIGHT, WIDTH))
    video = write(folder / "<!--<script>bad.mkv", reconstruction())
    with pytest.MonkeyPatch.context() as patch:
        status = command(
            patch, "evaluate", clip, "--model", "pca:4", "--model", f"video:{video}", "--width",
            WIDTH, "--protocol", "quick", "--quiet", "--report", folder / "out.html",
        )  # fmt: skip
    assert status == 0
    return folder / "out.html"


def data(text: str) -> list[dict[str, Any]]:
    """What the page gives to its script, for each clip."""
    return [json.loads(x) for x in re.findall(r'<script type="application/json">(.*?)</', text)]


def image(letters: str) -> Uint8Frames:
    from PIL import Image

    return np.asarray(Image.open(BytesIO(b64decode(letters))).convert("RGB"))


# The file --------------------------------------------------------------------------------------


def test_a_report_is_one_file_with_every_name_escaped(page: Path) -> None:
    text = page.read_text("utf-8")
    found = Page(text)
    assert NAME in found.words and f"<b>{NAME}" not in text
    assert not re.search(r"<script>\s*alert", text) and "<!--" not in text
    assert {link.split(":")[0].split("#")[0] for link in found.links} == {"", "data"}
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    policy = [m for m in found.metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert (policy[0]["content"] or "").startswith("default-src 'none'; img-src data:;")
    assert "tvae evaluate " in text and "bad frames" in text


def test_pictures_are_the_frames_and_errors_those_of_the_frames(page: Path) -> None:
    (clip,) = data(page.read_text("utf-8"))
    assert [track["name"] for track in clip["tracks"]][:2] == [ORIGINAL, "pca:4"]
    original, _, video = clip["tracks"]
    for track, frames in ((original, moving(FRAMES, HEIGHT, WIDTH)), (video, reconstruction())):
        assert np.array_equal(np.stack([image(x) for x in track["frames"]]), frames)
    assert not original["errors"]
    means = [image(x).astype(int).mean() for x in video["errors"]]
    assert len(means) == FRAMES and int(np.argmax(means)) == BAD


def test_colours_of_an_error_go_from_nothing_to_the_end_of_the_scale() -> None:
    colours = shown.heat(np.array([[0.0, FULL_ERROR, 1000.0]], np.float32))
    assert [tuple(c) for c in colours[0].tolist()] == [HEAT[0], HEAT[-1], HEAT[-1]]


def kept(
    frames: Uint8Frames, ours: Uint8Frames, room: int = 10**7, expected: int | None = None
) -> ShownClip:
    clip = ShownClip(25.0, 1, expected, room)
    measure = clip.measure("x")()
    for a, b in zip(tensors(frames), tensors(ours), strict=True):
        measure.add(Pair(a, b))
    return clip


def test_pictures_stay_within_their_room_and_their_seconds() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 24, 32, 3), np.uint8)
    whole = kept(noise, noise)
    assert whole.tracks["x"].format == 0 and whole.count("x") == round(shown.SECONDS * 25)
    assert whole.tracks["x"].closeness == math.inf
    small = kept(noise, noise, room=60_000)
    assert 0 < small.count("x") < 75
    assert sum(track.size for track in small.tracks.values()) <= 60_000
    wide = kept(np.zeros((1, 30, 1000, 3), np.uint8), np.zeros((1, 30, 1000, 3), np.uint8))
    assert wide.size == (15, 512)


def test_a_clip_that_begins_black_has_room_for_all_frames() -> None:
    frames = noisy(moving(20, 96, 128), 4.0)
    frames[:5] = 0
    clip = kept(frames, frames, room=2 * 20 * 14_000, expected=20)
    assert clip.count("x") == 20
    for track in clip.tracks.values():
        assert track.size <= 20 * 14_000 and track.format > 0 and 35 < track.closeness < 60
        assert not image_of(track.frames[0]).any()


def test_a_model_that_failed_on_the_way_does_not_shorten_the_others() -> None:
    frames = moving(6, 16, 16)
    clip = ShownClip(25.0, 2, 6, 10**7)
    for model, count in (("broken", 2), ("whole", 6)):
        measure = clip.measure(model)()
        for frame in tensors(frames)[:count]:
            measure.add(Pair(frame, frame * math.nan))
    assert clip.count(["whole"]) == 6 and clip.count(["broken"]) == 2
    assert not image_of(clip.tracks["whole"].frames[0]).any()


def image_of(picture: bytes) -> Uint8Frames:
    from PIL import Image

    return np.asarray(Image.open(BytesIO(picture)).convert("RGB"))


def test_only_the_first_clips_are_kept() -> None:
    pictures = shown.Pictures(9, 2)
    assert [pictures.of(str(i), 25.0, 5) is not None for i in range(9)] == [True] * 4 + [False] * 5


def evaluation(clips: int, **values: float) -> Evaluation:
    """Made-up results of two models."""
    found = {name: ModelOnClip({"psnr": 30.0 + i} | values, {"psnr": [30.0, 31.0]}, count=2,
                               missing={"vmaf": "<why>"})
             for i, name in enumerate(("a", "b"))}  # fmt: skip
    made = [ClipResult(f"clip {i}", f"{i}.mp4", 2, 32, 24, 25.0, found) for i in range(clips)]
    return Evaluation({"shares": [0.1, 0.2], "rounds": 2}, ("a", "b"), made, {"x": "<bad>"})


def test_a_report_claims_no_soundness_that_was_not_looked_for(tmp_path: Path) -> None:
    """Of two frames there are no faults in time to find; of sixteen there are."""
    clip, texts = moving(6, 24, 32), []
    for count in (2, 16):
        result = evaluation(1)
        result.clips[0] = replace(result.clips[0], frames=count)
        pictures = ShownClip(25.0, 2, 2, 10**7)
        for model in "ab":
            pictures.add(model, 0, Pair(tensors(clip)[0], tensors(clip)[0]))
        report.write_report(tmp_path / "x.html", result, {"0.mp4": pictures}, {}, "tvae")
        texts.append((tmp_path / "x.html").read_text())
    assert ["No fault was found" in text for text in texts] == [False, True]
    assert "from 5 frames on" in texts[0]


def test_a_report_says_what_is_not_in_it(tmp_path: Path) -> None:
    report.write_report(tmp_path / "x.html", evaluation(0), {}, {}, "tvae")
    text = (tmp_path / "x.html").read_text()
    assert "No clip could be measured" in text and "&lt;bad&gt;" in text
    result = evaluation(2, **{"psnr/noise 0.1": 28.0, "psnr/noise 0.2": 25.0, "psnr/round 2": 29.0})
    clip = moving(6, 24, 32)
    report.write_report(tmp_path / "x.html", result, {"1.mp4": kept(clip, clip)}, {}, "tvae")
    assert "clip-0" not in (tmp_path / "x.html").read_text()  # of the models a and b is no picture
    pictures = ShownClip(25.0, 2, 2, 10**7)
    for model in "ab":
        pictures.add(model, 0, Pair(tensors(clip)[0], tensors(clip)[0]))
    report.write_report(tmp_path / "x.html", result, {"1.mp4": pictures}, {"a": "<card>"}, "tvae")
    text = (tmp_path / "x.html").read_text()
    assert Page(text) and "&lt;card&gt;" in text
    for said in ("shown are the first 1", "first 1 of 2 clips", "not shown from here",
                 "Noise on the latents", "Again and again", "In brackets: 95 %", "&lt;bad&gt;",
                 "vmaf: &lt;why&gt;"):  # fmt: skip
        assert said in text, said


def test_a_report_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.html").write_text("before")
    monkeypatch.setattr(report, "_stress", None)
    with pytest.raises(TypeError):
        report.write_report(tmp_path / "x.html", evaluation(1), {}, {}, "tvae")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("x.html", "before")]


def test_a_folder_that_is_not_there_is_told_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("temporal_vae.evaluation.clips.measure_clip", None)
    clip = write(tmp_path / "a.mkv", moving(3))
    said = run("evaluate", clip, "--model", "pca:4", "--report", tmp_path / "none" / "x.html")
    assert said.returncode and "none" in said.stderr and "not a folder" in said.stderr


@pytest.mark.parametrize("count", [1, BINS, BINS + 1, 3 * BINS + 7])
def test_a_curve_of_values_keeps_their_mean_and_their_ends(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    values[count // 2 + 1 : count // 2 + 3] = np.nan
    curve, finite = Curve.of(values.tolist()), values[np.isfinite(values)]
    assert curve is not None and len(curve.steps) <= BINS
    assert (np.diff(curve.steps) > 0).all() and curve.not_finite == count - len(finite)
    assert curve.low.min() == finite.min() and curve.high.max() == finite.max()
    if count <= BINS:
        assert np.array_equal(curve.mean, finite)
        assert np.array_equal(curve.steps, np.flatnonzero(np.isfinite(values)))
    assert Curve.of([math.nan]) is None and Curve.of([]) is None


# In a browser ----------------------------------------------------------------------------------


class Tab:
    """The page in a browser's window, with what went wrong there."""

    def __init__(self, browser: Any, page: Path, width: int = 1280, scheme: str = "light"):
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.tab = self.context.new_page()
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", self._said)
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(page.as_uri())
        self.tab.wait_for_selector("canvas.right[data-frame]", timeout=60_000)

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.faults.append(message.text)

    def frames(self) -> list[int]:
        """The frame that each player shows, and the slider, without those that are equal."""
        shown = self.tab.evaluate(
            "[...document.querySelectorAll('canvas')].map(c => Number(c.dataset.frame))"
            ".concat(Number(document.querySelector('.seek').value))"
        )
        assert len(shown) == 6
        return sorted(set(shown))

    def pixels(self, canvas: str) -> Uint8Frames:
        """What a canvas shows (H, W, 3)."""
        values = self.tab.evaluate(
            "name => { const c = document.querySelector(name); return [...c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data] }", canvas
        )  # fmt: skip
        return np.array(values, np.uint8).reshape(HEIGHT, WIDTH, 4)[..., :3]

    def over(self, share: float) -> str:
        """What is to be seen of the stage at a share of its width: the class of the canvas."""
        self.tab.locator(".stage").scroll_into_view_if_needed()
        found: str = self.tab.evaluate(
            "share => { const box = document.querySelector('.stage').getBoundingClientRect();"
            "return document.elementFromPoint(box.left + share * box.width,"
            "box.bottom - 5).className }", share
        )  # fmt: skip
        return found

    def press(self, key: str, on: str = ".handle") -> None:
        self.tab.press(on, key)


@pytest.fixture
def tab(browser: Any, page: Path) -> Iterator[Tab]:
    opened = Tab(browser, page)
    yield opened
    assert not opened.faults
    assert opened.requests == [page.as_uri()], "the page asked for something"
    opened.context.close()


def test_it_plays_and_steps_all_videos_together(tab: Tab) -> None:
    assert tab.frames() == [0]
    tab.press(".")
    tab.press(".")
    tab.press(",")
    assert tab.frames() == [1]
    tab.press(",")
    tab.press(",")
    assert tab.frames() == [FRAMES - 1]
    tab.tab.select_option(".speed", "0.1")
    tab.press(" ")
    assert tab.tab.get_attribute(".play", "aria-label") == "Pause"
    for _ in range(100):
        tab.tab.wait_for_timeout(100)
        if tab.frames()[0] not in (0, FRAMES - 1):
            break
    else:
        pytest.fail(f"it stays at {tab.frames()}")
    tab.tab.click(".play")
    assert tab.tab.get_attribute(".play", "aria-label") == "Play"
    assert len(tab.frames()) == 1


def test_a_click_in_a_curve_shows_that_frame_in_all_players(tab: Tab) -> None:
    chart = tab.tab.locator("svg.chart").first
    left, right, first, last = map(float, (chart.get_attribute("data-axis") or "").split())
    for frame in (5, BAD):
        box = chart.bounding_box()
        x = (left + (frame - first) / (last - first) * (right - left)) / 480 * box["width"]
        chart.click(position={"x": x, "y": box["height"] / 2})
        assert tab.frames() == [frame]
    assert np.array_equal(tab.pixels("canvas.left"), moving(FRAMES, HEIGHT, WIDTH)[BAD])
    tab.tab.select_option("select.right", "2")
    assert np.array_equal(tab.pixels("canvas.right"), reconstruction()[BAD])
    tab.press("Home", ".seek")
    assert tab.frames() == [0]
    tab.tab.click(".goto")  # the fault's own frame
    assert tab.frames() == [BAD]
    box = tab.tab.locator(".slice").first.bounding_box()
    tab.tab.locator(".slice").first.click(position={"x": box["width"] - 2, "y": 9})
    assert tab.frames() == [FRAMES - 1]


def test_the_wipe_slides_by_pointer_and_by_keys(tab: Tab) -> None:
    assert [tab.over(0.3), tab.over(0.7)] == ["left", "right"]
    box = tab.tab.locator(".stage").bounding_box()
    across = [(box["x"] + share * box["width"], box["y"] + 60) for share in (0.5, 0.4, 0.2)]
    tab.tab.mouse.move(*across[0])
    tab.tab.mouse.down()
    for place in across[1:]:
        tab.tab.mouse.move(*place)
    tab.tab.mouse.up()
    assert tab.tab.get_attribute(".handle", "aria-valuenow") == "20"
    assert [tab.over(0.1), tab.over(0.3)] == ["left", "right"]
    for key, now in (("ArrowRight", "22"), ("PageUp", "32"), ("End", "100"), ("Home", "0")):
        tab.press(key)
        assert tab.tab.get_attribute(".handle", "aria-valuenow") == now
    assert tab.over(0.02) == "right"


def test_the_error_takes_the_place_of_reconstructions(tab: Tab) -> None:
    original = tab.pixels("canvas.left")
    before = tab.pixels("canvas.right")
    assert not tab.tab.is_visible(".scale")
    tab.press("e")
    assert tab.tab.is_visible(".scale")
    assert tab.tab.text_content(".tag.right") == "error of pca:4"
    assert np.array_equal(tab.pixels("canvas.left"), original)
    assert not np.array_equal(tab.pixels("canvas.right"), before)
    tab.press("e")
    assert np.array_equal(tab.pixels("canvas.right"), before)


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 1280)])
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(
    browser: Any, page: Path, scheme: str, width: int
) -> None:
    tab = Tab(browser, page, width, scheme)
    assert tab.tab.evaluate("document.documentElement.scrollWidth") == width
    colours = {
        name: tab.tab.evaluate(
            "name => { const all = getComputedStyle(document.body); const probe ="
            "document.body.appendChild(document.createElement('i'));"
            "probe.style.color = all.getPropertyValue(name); "
            "return getComputedStyle(probe).color.match(/[0-9.]+/g).map(Number) }", name
        )
        for name in ("--paper", "--card", "--ink", "--soft", "--c0", "--good", "--bad")
    }  # fmt: skip
    assert (luminance(colours["--paper"]) < 0.1) == (scheme == "dark")
    for ground in ("--paper", "--card"):
        for name in ("--ink", "--soft", "--c0", "--good", "--bad"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    assert not tab.faults
    tab.context.close()


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
              for c in (value / 255 for value in colour)]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: list[float], b: list[float]) -> float:
    """By WCAG 2, from 1 to 21."""
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_everything_that_can_be_used_has_a_name(tab: Tab) -> None:
    nameless = tab.tab.evaluate(
        "[...document.querySelectorAll('button, input, select, [role=slider], img, "
        "canvas.small, svg.chart')].filter(e => !(e.ariaLabel || e.alt || e.textContent.trim()"
        " || e.closest('label'))).map(e => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
