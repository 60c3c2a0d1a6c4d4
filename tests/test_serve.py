"""The page of `tvae serve`: what it does in a browser, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import command, difference
from test_evaluation import Run
from test_video import smooth, write

from temporal_vae import TemporalVAE, read_latents
from temporal_vae.cli import serving
from temporal_vae.serve import page, upload
from temporal_vae.video import VideoReader

WATCHED = """
import socket, sys

def watched(own):
    def call(first, *rest, **more):
        host = rest[0][0] if isinstance(first, socket.socket) and type(rest[0]) is tuple else first
        if isinstance(host, str) and host not in ("127.0.0.1", "localhost"):
            print("ASKED THE NETWORK FOR", host, file=sys.stderr, flush=True)
        return own(first, *rest, **more)
    return call

socket.socket.connect = watched(socket.socket.connect)
socket.getaddrinfo = watched(socket.getaddrinfo)
from temporal_vae.cli.main import main
main()
"""
"""The command, which tells of all but this machine that it turns to."""
LIMITS = upload.Limits(1 << 20, 20, (64, 96))


@dataclass
class Server:
    """The command that serves, its address, and the folder of its temporary files."""

    process: subprocess.Popen[str]
    address: str
    folder: Path

    def files(self) -> set[str]:
        return {file.name for file in self.folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def server(
    browser: Any, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The page by the command itself; it says nothing but its address, and leaves nothing."""
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed: make test")
    folder = tmp_path_factory.mktemp("temporary")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = f"serve --port {port} --max-frames 20 --max-resolution 96x64 --max-mib 1 --queue 1"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WATCHED, *words.split(), "--model", "tiny",
         "--model", str(small_model)],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(folder)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `&` ignores it
    )  # fmt: skip
    assert process.stderr is not None
    said = process.stderr.readline()
    address = f"http://127.0.0.1:{port}/"
    assert said == f"tvae: the page is at {address} (Ctrl-C ends it)\n"
    yield Server(process, address, folder)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "")
    assert list(folder.iterdir()) == []


class Tab:
    """The page in a window of its own."""

    def __init__(self, browser: Any, server: Server, **looks: Any):
        self.context = browser.new_context(accept_downloads=True, **looks)
        self.context.set_default_timeout(120_000)  # of milliseconds: a machine may be busy
        self.tab = self.context.new_page()
        self.requests: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(server.address)
        self.tab.wait_for_selector("#run")

    def choose(self, box: str, value: str) -> None:
        self.tab.click(f"#{box} input")
        self.tab.get_by_role("option", name=value, exact=True).click()

    def upload(self, file: Path) -> None:
        if self.tab.locator("#upload [aria-label='Clear']").count():
            self.tab.click("#upload [aria-label='Clear']")
        self.tab.set_input_files("#upload input[type=file]", file)
        self.tab.wait_for_selector(f"#upload :text('{file.suffix}')")

    def run(self) -> str:
        """Press the button; gives what is said in the end."""
        mark = "for (const p of document.querySelectorAll('#message p')) p.dataset.before = 1"
        self.tab.evaluate(mark)
        self.tab.click("#run")
        self.tab.wait_for_selector("#message p[role]:not([data-before])")
        return str(self.tab.inner_text("#message").strip())

    def numbers(self) -> dict[str, str]:
        rows = [row.inner_text().split("\t") for row in self.tab.locator("#numbers tr").all()]
        return dict(rows)


@pytest.fixture
def tab(browser: Any, server: Server) -> Iterator[Tab]:
    opened = Tab(browser, server)
    yield opened
    local = (server.address, "data:", "blob:")
    assert [url for url in opened.requests if not url.startswith(local)] == []
    opened.context.close()


def test_a_clip_gives_a_comparison_numbers_and_the_latents_that_encode_writes(
    tab: Tab, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write(tmp_path / "clip.mp4", smooth(7, 48, 64))
    tab.upload(clip)
    tab.choose("model", str(small_model))
    assert tab.run() == "Done."
    found = tab.numbers()
    assert found["Upload"] == "7 frames of 64x48" and found["PSNR"].endswith(" dB")
    assert found["Latents"].startswith("4x7x24x32, ") and "walks, in " in found["Memory"]
    tab.tab.wait_for_function("document.querySelector('#video video')?.readyState >= 2")
    size = tab.tab.evaluate("(v => [v.videoWidth, v.duration])(document.querySelector('video'))")
    assert size[0] == 3 * 64 and size[1] == pytest.approx(7 / 25, abs=0.05)
    tab.tab.evaluate("document.querySelector('video').play()")
    tab.tab.wait_for_function("document.querySelector('video').currentTime > 0.1")
    with tab.tab.expect_download() as download:
        tab.tab.click("#latents a")
    download.value.save_as(tmp_path / "taken.safetensors")
    own = tmp_path / "clip.safetensors"
    assert command(monkeypatch, "encode", clip, own, "--model", small_model, "--quiet") == 0
    (ours, our_info), (theirs, their_info) = (
        read_latents(path) for path in (tmp_path / "taken.safetensors", own)
    )
    assert our_info == their_info and difference(ours, theirs) < 1e-4
    assert download.value.suggested_filename == own.name


def test_a_photo_gives_a_picture_on_a_phone_in_the_dark(
    browser: Any, server: Server, tmp_path: Path
) -> None:
    from PIL import Image

    tab = Tab(browser, server, viewport={"width": 360, "height": 700}, color_scheme="dark")
    photo = tmp_path / "photo.png"
    pixels = Image.fromarray(smooth(1, 45, 61)[0])
    pixels.putalpha(128)
    pixels.save(photo)
    tab.upload(photo)
    tab.choose("memory", "least")
    assert tab.run() == "Done."
    assert tab.numbers()["Upload"] == "a photo of 61x45" and tab.numbers()["Flicker"] == "-"
    tab.tab.wait_for_function("document.querySelector('#picture img')?.naturalWidth >= 3 * 61")
    assert not tab.tab.is_visible("#video")
    assert tab.tab.evaluate("document.documentElement.scrollWidth") == 360
    tab.context.close()


def test_what_cannot_be_taken_is_one_line_on_the_page(
    tab: Tab, server: Server, tmp_path: Path
) -> None:
    (tmp_path / "notes.mp4").write_text("no video\n" * 50)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/secret.mp4\n")
    write(tmp_path / "long.mp4", smooth(21, 16, 16))
    write(tmp_path / "wide.mp4", smooth(2, 66, 96))
    assert tab.run().startswith("choose a clip or a photo")
    for name, said in {
        "notes.mp4": "notes.mp4: not a video that can be read",
        "list.m3u8": "list.m3u8 is no video, but text",
        "long.mp4": "long.mp4 has 21 frames or more",
        "wide.mp4": "wide.mp4 is 96x66: this page takes at most",
    }.items():
        tab.upload(tmp_path / name)
        line = tab.run()
        assert said in line and "\n" not in line and str(server.folder) not in line
        assert tab.tab.locator("#message p[role=alert]").count() == 1
        assert not tab.tab.is_visible("#latents") and tab.numbers() == {}
    (tmp_path / "big.mp4").write_bytes(bytes(LIMITS.bytes + 1))
    tab.tab.click("#upload [aria-label='Clear']")
    tab.tab.set_input_files("#upload input[type=file]", tmp_path / "big.mp4")
    tab.tab.wait_for_selector(":text('exceed the maximum allowed size of 1.0 Mb')")
    sent = tab.context.request.post(
        f"{server.address}gradio_api/upload", multipart={"files": tmp_path / "big.mp4"}
    )
    assert sent.status == 413 and "big.mp4" not in server.files()


def test_an_address_in_place_of_a_file_is_not_fetched(tab: Tab, server: Server) -> None:
    """The server's own fixture sees that no network was asked."""
    config = tab.tab.evaluate("window.gradio_config")
    (index,) = (event["id"] for event in config["dependencies"])
    file = {"path": "http://elsewhere.example/a.mp4", "meta": {"_type": "gradio.FileData"}}
    joined = tab.context.request.post(
        f"{server.address}gradio_api/queue/join",
        data={"data": [file, "tiny", "auto"], "fn_index": index, "session_hash": "one"},
    )
    assert joined.ok
    events = tab.context.request.get(f"{server.address}gradio_api/queue/data?session_hash=one")
    ends = [json.loads(line[5:]) for line in events.text().splitlines() if line]
    (end,) = (event for event in ends if event["msg"] == "process_completed")
    assert not end["success"] and "not an address" in end["output"]["error"]


def test_more_uploads_than_may_wait_are_sent_away(
    browser: Any, server: Server, tmp_path: Path
) -> None:
    """The last test: the server is ended while it computes."""
    clip = write(tmp_path / "clip.mp4", smooth(20, 64, 96))
    tabs = [Tab(browser, server) for _ in range(3)]
    for each in tabs:
        each.upload(clip)
    for each in tabs:
        each.tab.click("#run")
        each.tab.wait_for_timeout(500)
    tabs[2].tab.wait_for_selector(":text('currently busy')")
    for each in tabs:
        each.context.close()


# Without a browser -----------------------------------------------------------------------------


def test_a_file_that_does_not_tell_its_length_is_stopped(
    small_model: Path, ffmpeg: str, tmp_path: Path
) -> None:
    loaded = TemporalVAE.from_pretrained(small_model)
    model = upload.Model("small", loaded, loaded.latent_record("small"))
    limits = replace(LIMITS, frames=3)
    for frames in (3, 4):
        told, clip = tmp_path / f"{frames}.mp4", tmp_path / f"{frames}.h264"
        write(told, smooth(frames, 16, 16))
        subprocess.run([ffmpeg, "-loglevel", "error", "-i", told, clip], check=True)
        with VideoReader(clip) as reader:
            assert reader.info.expected_frames is None
        folder = tmp_path / str(frames)
        folder.mkdir()
        if frames == 3:
            made = upload.reconstruct(clip, folder, model, "auto", limits, lambda *_: None)
            assert made.numbers["Upload"] == "3 frames of 16x16"
        else:
            with pytest.raises(ValueError, match=f"{clip.name} has 4 frames or more: this page"):
                upload.reconstruct(clip, folder, model, "auto", limits, lambda *_: None)
            assert list(folder.iterdir()) == []


def test_old_files_are_swept_and_new_ones_are_not(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
        page.sweep(tmp_path, 0.5)
        time.sleep(0.7 if name == "old" else 0)
    page.sweep(tmp_path, 0.5)
    assert [file.parent.name for file in tmp_path.rglob("file")] == ["new"]


def test_memories_to_choose_from_are_at_most_what_the_command_was_given() -> None:
    assert serving.memories(None) == ["auto", "4GiB", "1GiB", "256MiB", "least"]
    assert serving.memories("2GiB") == ["2GiB", "1GiB", "256MiB", "least"]
    assert serving.memories("least") == ["least"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", 0], "--port takes a number from 1 to 65535, got 0"),
        (["--max-frames", 0], "--max-frames takes a number from 1 on, got 0"),
        (["--max-resolution", "big"], "--max-resolution takes WIDTHxHEIGHT"),
        (["--memory", "much"], "a budget is a number of bytes"),
        (["--model", "none"], "none"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 cannot be listened to"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[object], said: str
) -> None:
    monkeypatch.setattr(serving, "check_installed", lambda: None)
    done = run("serve", *words)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1


def test_without_gradio_one_line_says_how_to_install_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda _: None)
    done = run("serve")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install 'temporal-video-vae[demo]'" in done.stderr
