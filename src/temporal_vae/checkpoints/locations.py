"""The files of a checkpoint by name: in a folder, or in a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

CONFIG_FILE = "config.json"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Folder:
    """What a folder holds; the files of a repository are fetched when asked for."""

    where: str
    names: frozenset[str]
    path: Callable[[str], Path]


def builtin_names() -> list[str]:
    """Names of the models inside the package."""
    root = resources.files("temporal_vae") / "weights"
    return sorted(entry.name for entry in root.iterdir() if (entry / CONFIG_FILE).is_file())


def local(folder: Path) -> Folder:
    """A folder on this machine."""
    names = frozenset(entry.name for entry in folder.iterdir() if entry.is_file())
    return Folder(str(folder), names, lambda name: folder / name)


def is_repository_id(name: str) -> bool:
    """Whether `name` has the form of a repository's: owner/name."""
    return _REPOSITORY.fullmatch(name) is not None


def repository(repo: str, subfolder: str | None, revision: str | None) -> Folder:
    """A folder of a repository; without the network, what of it lies in the Hub's own cache.

    Raises `FileNotFoundError` when there is no such repository or revision, `OSError` when the
    Hub cannot be asked and the cache does not have it.
    """
    from huggingface_hub import HfApi, constants  # late: it takes as long to import as a model

    where = f"{repo}{f'/{subfolder}' if subfolder else ''} on the Hugging Face Hub"
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        # One request that is not repeated: a download of something unknown is tried for minutes.
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        listing = HfApi().model_info(repo, revision=revision, timeout=seconds).siblings or []
    except Exception as error:  # each version of the Hub's library has another network library
        return _cached(repo, prefix, revision, error)
    files = (file.rfilename for file in listing if file.rfilename.startswith(prefix))
    inside = (file.removeprefix(prefix) for file in files)
    names = frozenset(name for name in inside if "/" not in name)
    return Folder(where, names, lambda name: _fetch(repo, prefix + name, revision))


def _fetch(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # see `repository`
        raise OSError(
            f"cannot fetch {name} of {repo} from the Hub: {_first_line(error)}"
        ) from error


def _cached(repo: str, prefix: str, revision: str | None, reason: Exception) -> Folder:
    """The folder in the Hub's cache; `reason` is why it was not asked for."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        config = hf_hub_download(
            repo, prefix + CONFIG_FILE, revision=revision, local_files_only=True
        )
    except FileNotFoundError:
        at = f" at revision {revision!r}" if revision else ""
        if isinstance(reason, (RepositoryNotFoundError, RevisionNotFoundError)):
            raise FileNotFoundError(
                f"the Hugging Face Hub shows no repository {repo!r}{at}: check the spelling; a "
                "private or gated one needs `hf auth login`"
            ) from reason
        raise OSError(
            f"cannot ask the Hugging Face Hub for {repo!r}{at} ({_first_line(reason)}), and "
            f"{prefix}{CONFIG_FILE} of it is not in the cache: connect, or run "
            f"`hf download {repo}` where there is a network, or name a local folder"
        ) from reason
    return local(Path(config).parent)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
