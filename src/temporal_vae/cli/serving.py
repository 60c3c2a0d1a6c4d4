"""The words of `tvae serve`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec

from temporal_vae.checkpoints import locations
from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.cli.options import ModelOptions, RunOptions, sides
from temporal_vae.cli.report import say

MEMORIES = {"4GiB": 1 << 32, "1GiB": 1 << 30, "256MiB": 1 << 28}
"""Bounds that may be chosen on the page where they are below the one that the command was given."""


def resolution(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT as (height, width)."""
    try:
        return sides(text)
    except ValueError as error:
        raise ValueError(
            f"--max-resolution takes WIDTHxHEIGHT, such as 1280x720, got {text!r}"
        ) from error


@dataclass(frozen=True)
class ServeOptions(OptionGroup):
    """Where the page is, and what may be uploaded."""

    panel = "The page"
    host: str = option(
        "127.0.0.1", "ADDRESS", "Address to listen on. The default, 127.0.0.1, is reached from "
        "this machine only; 0.0.0.0 by all who reach this machine, without any password."
    )  # fmt: skip
    port: int = option(7860, "NUMBER", "Port to listen on. Default: 7860.")
    model: list[str] | None = option(
        None, "NAME", "A model to choose on the page, as --model takes it elsewhere; give several. "
        "Default: all that are built in.")  # fmt: skip
    queue: int = option(8, "NUMBER", "Uploads that may wait for their turn. Default: 8.")
    max_mib: int = option(64, "MIB", "The largest file that may be uploaded, in MiB. Default: 64.")
    max_frames: int = option(240, "NUMBER", "The longest clip, in frames. Default: 240.")
    max_resolution: tuple[int, int] = option(
        "1280x720", "WxH", "The most pixels a frame may have, in any shape. Default: 1280x720.",
        resolution)  # fmt: skip

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port takes a number from 1 to 65535, got {self.port}")
        for name in ("queue", "max_mib", "max_frames"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} takes a number from 1 on, got {getattr(self, name)}")


def check_installed() -> None:
    """Raise `ValueError` where Gradio is not installed, before anything else is done."""
    if find_spec("gradio") is None:
        from temporal_vae.evaluation.measures import missing

        raise ValueError(missing("Gradio, which makes the page,", "demo"))


def memories(given: str | None) -> list[str]:
    """The bounds to choose from: the command's own, or else "auto", and those that are smaller."""
    from temporal_vae.walks.budget import parse_budget

    most = given or "auto"
    size = sys.maxsize if most == "auto" else parse_budget(most)
    smaller = [word for word, own in MEMORIES.items() if isinstance(size, int) and own < size]
    return list(dict.fromkeys([most, *smaller, "least"]))


def serve(page: ServeOptions, run: RunOptions) -> None:
    """Load the models, and serve the page until the command is interrupted."""
    from temporal_vae.serve import page as serving
    from temporal_vae.serve.upload import Limits, Model

    words = memories(run.memory)
    options = ModelOptions(**asdict(run))
    names = dict.fromkeys(page.model or locations.builtin_names())
    models = [Model(name, *options.load_with_record(name)) for name in names]
    limits = Limits(page.max_mib << 20, page.max_frames, page.max_resolution)
    serving.serve(models, words, limits, page.host, page.port, page.queue, say)
