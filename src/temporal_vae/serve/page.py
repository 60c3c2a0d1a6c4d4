"""The page on which an upload is tried, and the server of it, by Gradio."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from temporal_vae.serve.upload import Limits, Model, Reconstructed, Runs
from temporal_vae.video import VideoError
from temporal_vae.walks.budget import is_out_of_memory

KEPT_SECONDS = 3600
"""Uploads and results are kept so long, and then removed."""
SWEPT_SECONDS = 10
"""How often is looked for files that are to be removed."""
TITLE = "temporal-vae"
CSS = """
#message p { margin: 0; font-size: 1.1em } #message [role=alert] { color: #b91c1c }
.dark #message [role=alert] { color: #fca5a5 }
#numbers :is(table, tr, th, td) { border: 0; padding: 2px 16px 2px 0; vertical-align: top }
#numbers th { text-align: left; white-space: nowrap }
"""


def serve(
    models: Sequence[Model], memories: Sequence[str], limits: Limits, host: str, port: int,
    queue: int, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Serve the page until the process is interrupted; then all of its files are gone.

    The first of the models and of the bounds of memory is chosen at first. One upload is computed
    at a time, and `queue` more may wait. Raises `ValueError` for an address that cannot be had.
    """
    _check_address(host, port)
    with TemporaryDirectory(prefix="tvae-serve-", ignore_cleanup_errors=True) as folder:
        kept, work = Path(folder, "kept"), Path(folder, "work")
        work.mkdir()
        gradio = _offline_gradio(kept)
        runs = Runs({model.name: model for model in models}, limits)
        page = _page(gradio, runs, memories, work)
        page.queue(max_size=queue, default_concurrency_limit=1, api_open=False)
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        page.launch(
            server_name=host, server_port=port, share=False, prevent_thread_lock=True, quiet=True,
            max_file_size=limits.bytes, footer_links=[], enable_monitoring=False, ssr_mode=False,
            pwa=False, mcp_server=False, run_history=False, inbrowser=False, css=CSS,
            theme=gradio.themes.Default(**fonts).set(block_info_text_color="*neutral_500"),
        )  # fmt: skip
        say(f"the page is at {page.local_url} (Ctrl-C ends it)")
        try:
            with suppress(KeyboardInterrupt):
                while True:
                    time.sleep(SWEPT_SECONDS)
                    sweep(kept, KEPT_SECONDS)
        finally:
            page.close(verbose=False)
            runs.end()


def sweep(folder: Path, seconds: float) -> None:
    """Remove the files in a folder that have not changed for so long."""
    before = time.time() - seconds
    for file in folder.rglob("*"):
        with suppress(OSError):  # another has removed it
            if file.is_file() and file.stat().st_ctime < before:
                file.unlink()


def _check_address(host: str, port: int) -> None:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((host, port), family=family):
            pass
    except OSError as error:
        raise ValueError(
            f"--port {port} of --host {host} cannot be listened to: {error.strerror}: give another "
            "port, or an address of this machine"
        ) from error


def _offline_gradio(kept: Path) -> Any:
    """Gradio, which keeps uploads and results in this folder and asks nothing of the network."""
    os.environ |= {
        "GRADIO_TEMP_DIR": str(kept), "GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "*",
        "no_proxy": "*",
    }  # fmt: skip
    import gradio
    from gradio import processing_utils

    async def refuse(url: str, *_: object, **__: object) -> str:
        raise gradio.Error("an upload is a file, not an address", print_exception=False)

    # a request may name an address in place of a file, which would be fetched from here
    processing_utils.async_ssrf_protected_download = refuse
    return gradio


def _page(gradio: Any, runs: Runs, memories: Sequence[str], work: Path) -> Any:
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.Markdown(
            f"# {TITLE}\nWhat a video VAE keeps of a clip or a photo: upload one, and see its "
            f"reconstruction beside it.\n\nThe page takes {runs.limits}. Uploads and results are "
            "removed after an hour."
        )
        with gradio.Row():
            with gradio.Column(scale=1):
                given = [
                    gradio.File(label="Clip or photo", elem_id="upload"),
                    gradio.Dropdown(list(runs.models), label="Model", elem_id="model"),
                    gradio.Dropdown(
                        list(memories), label="Memory", elem_id="memory", info="What the model may "
                        "take over its weights: auto is most of what is free, least as little as "
                        "possible. It never changes the picture.",
                    ),
                ]  # fmt: skip
                button = gradio.Button("Reconstruct", variant="primary", elem_id="run")
            with gradio.Column(scale=2):
                message = gradio.HTML(elem_id="message")
                shown = [
                    message,
                    gradio.Video(
                        label="Comparison", show_label=False, visible=False, loop=True,
                        elem_id="video",
                    ),
                    gradio.Image(
                        label="Comparison", show_label=False, visible=False, type="filepath",
                        buttons=["download", "fullscreen"], elem_id="picture",
                    ),
                    gradio.HTML(elem_id="numbers"),
                    gradio.File(label="Latents", visible=False, elem_id="latents"),
                ]  # fmt: skip
        button.click(
            _on_click(gradio, runs, work),
            given,
            shown,
            show_progress_on=message,
            api_visibility="private",
        )
    return page


def _on_click(gradio: Any, runs: Runs, work: Path) -> Callable[..., Iterator[list[Any]]]:
    """What the button does; the files of a run lie in `work` while it goes on."""
    tracked = gradio.Progress()

    def run(
        upload: str | None, model: str, memory: str, progress: Any = tracked
    ) -> Iterator[list[Any]]:
        def tell(done: float, total: int | None, doing: str) -> None:
            progress((int(done), total), desc=doing, unit="frames")

        yield _said(gradio, "", None)
        with TemporaryDirectory(dir=work) as folder:
            try:
                if upload is None or not Path(upload).is_file():
                    raise ValueError("choose a clip or a photo first: none is here, or no longer")
                made = runs.run(Path(upload), Path(folder), model, memory, tell)
            except (VideoError, ValueError, OSError, MemoryError, RuntimeError) as error:
                said = str(error)
                if is_out_of_memory(error):
                    said = "out of memory: choose a smaller bound of memory, or a smaller upload"
                elif isinstance(error, RuntimeError):
                    raise
                text = " ".join(said.replace(f"{Path(upload or '').parent}/", "").split())
                yield _said(gradio, f"<p role=alert>{escape(text)}</p>", None)
            else:
                yield _said(gradio, "<p role=status>Done.</p>", made)  # copied before it goes on

    return run


def _said(gradio: Any, message: str, found: Reconstructed | None) -> list[Any]:
    """The message, the comparison as a video or as a picture, the numbers, the latents."""
    if found is None:
        hidden = gradio.update(value=None, visible=False)
        return [message, hidden, hidden, "", hidden]
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
        for name, text in found.numbers.items()
    )
    values = [found.comparison if found.comparison.suffix == suffix else None
              for suffix in (".mp4", ".png")]  # fmt: skip
    views = [gradio.update(value=value and str(value), visible=value is not None)
             for value in values]  # fmt: skip
    latents = gradio.update(value=str(found.latents), visible=True)
    return [message, *views, f"<table>{rows}</table>", latents]
