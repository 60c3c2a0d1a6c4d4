"""Videos that are opened before their turn, so that a model need not wait for them."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from typing import Self

from temporal_vae.convert import ends
from temporal_vae.model import TemporalVAE
from temporal_vae.video import Options

Path = str | os.PathLike[str]


class ReadAhead:
    """Opens `sources` in their order, `jobs` at a time: the one that is taken, and the next ones.

    A thread for each takes its checksum, opens it, and begins to decode; the frames that wait are
    as few as for any video that is read. What is made of them does not depend on `jobs`.
    """

    def __init__(
        self, sources: Sequence[Path], model: TemporalVAE, options: Options | None, jobs: int
    ):
        self._sources, self._model, self._options = deque(sources), model, options
        self._jobs = jobs
        self._ahead: deque[_Opening] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for opening in self._ahead:
            opening.drop()

    def take(self, source: Path) -> ends.OpenVideo:
        """The next video that is wanted; those before it in the order are let go.

        Raises what opening it has raised.
        """
        while True:
            self._open(self._jobs)
            opening = self._ahead.popleft()
            if opening.source == source:
                self._open(self._jobs - 1)
                return opening.result()
            opening.drop()

    def _open(self, many: int) -> None:
        while self._sources and len(self._ahead) < many:
            opening = _Opening(self._sources.popleft(), self._model, self._options)
            self._ahead.append(opening)


class _Opening:
    """A video that a thread opens."""

    def __init__(self, source: Path, model: TemporalVAE, options: Options | None):
        self.source = source
        self._done = threading.Lock()
        self._found: ends.OpenVideo | BaseException | None = None
        self._dropped = False
        self._thread = threading.Thread(
            target=self._open, args=(model, options), name="video opener", daemon=True
        )
        self._thread.start()

    def _open(self, model: TemporalVAE, options: Options | None) -> None:
        found: ends.OpenVideo | BaseException
        try:
            found = ends.open_video(self.source, model, options)
            found.reader.start()
        except BaseException as error:  # whatever it is, it is raised where the video is taken
            found = error
        with self._done:
            self._found = found
        if self._dropped:
            self.drop()

    def result(self) -> ends.OpenVideo:
        self._thread.join()
        if isinstance(self._found, BaseException):
            raise self._found
        assert self._found is not None
        return self._found

    def drop(self) -> None:
        """Let go of it now, or as soon as it is open."""
        with self._done:
            self._dropped = True
            found, self._found = self._found, None
        if isinstance(found, ends.OpenVideo):
            found.reader.close()
