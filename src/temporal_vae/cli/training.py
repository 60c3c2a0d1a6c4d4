"""The words of `tvae train`: its options, what it finds before the first step, how it goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from temporal_vae.cli.groups import OptionGroup, option
from temporal_vae.cli.info import Rows
from temporal_vae.cli.inputs import some_of
from temporal_vae.cli.options import choose_device, device_name
from temporal_vae.cli.report import Meter, say, show_rows

if TYPE_CHECKING:
    from temporal_vae.training.loop import Record
    from temporal_vae.training.recipe import Recipe, Table
    from temporal_vae.training.sources import Inputs, Skipped

RECIPES = (
    Path(__file__).parent.parent / "recipes",  # in an installed package
    Path(__file__).parents[3] / "recipes",  # in a checkout
)
FEW = 20
"""Skipped files that are listed; of more only the number is said."""


@dataclass(frozen=True)
class DataOptions(OptionGroup):
    """What is trained, on what, and where the run is kept."""

    panel = "Data and run"
    data: list[Path] | None = option(
        None, "FOLDER...", "Videos to train on: folders, .txt lists of files, .tar files as "
        "webdataset has them.")  # fmt: skip
    out: Path | None = option(None, "RUN", "Folder of the run: checkpoints, curves, the model.")
    validation: list[Path] | None = option(
        None, "FOLDER...", "Videos to measure on. Default: every twentieth of --data, by the hash "
        "of its name, which is then not trained on.")  # fmt: skip
    set: list[str] | None = option(
        None, "KEY=VALUE", "Change a value of the recipe, such as steps=500 or data.workers=2."
    )
    init: str | None = option(
        None, "MODEL", "Begin with the weights of this model: a built-in name, a folder, a file, "
        "owner/name.")  # fmt: skip
    resume: bool = option(False, "", "Go on with the run in --out, if there is one.")
    check: bool = option(
        False, "", "Only say what would be trained, and which files would be skipped."
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("--data is missing: folders, lists or tar files of videos")
        if self.out is None and not self.check:
            raise ValueError("--out is missing: the folder of the run")


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """Where it is computed, and by how many."""

    panel = "Computing"
    device: str = option(
        "auto", "NAME", "Where to train: cpu, cuda, cuda:1, mps, or auto, the default: a GPU if "
        "there is one.", device_name)  # fmt: skip
    strategy: str = option(
        "ddp", "NAME", "Under torchrun: ddp (every process holds the model) or fsdp (each a part "
        "of it). Default: ddp.")  # fmt: skip
    quiet: bool = option(False, "", "Print nothing but errors.")

    def __post_init__(self) -> None:
        if self.strategy not in ("ddp", "fsdp"):
            raise ValueError(f"--strategy must be ddp or fsdp, got {self.strategy!r}")

    @property
    def silent(self) -> bool:
        """Whether to say nothing: of several processes the first speaks."""
        return self.quiet or os.environ.get("RANK", "0") != "0"

    def say(self, message: str) -> None:
        """Print a line, unless silent."""
        if not self.silent:
            say(message)


def spread_lists(words: Sequence[str]) -> list[str]:
    """Command-line words with "--data a b" as "--data a --data b", as a shell's patterns give it.

    A recipe (.toml) ends such a list.
    """
    flag = ""
    spread: list[str] = []
    for word in words:
        if word.startswith("-"):
            flag = word if word in ("--data", "--validation") else ""
        elif flag and spread[-1] != flag:
            if word.endswith(".toml"):
                flag = ""
            else:
                spread.append(flag)
        spread.append(word)
    return spread


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the library.

    Raises `ValueError` naming those for what is neither.
    """
    if Path(name).is_file():
        return Path(name)
    here = next((folder for folder in RECIPES if folder.is_dir()), None)
    known = {} if here is None else {file.stem: file for file in sorted(here.glob("*.toml"))}
    if name not in known:
        raise ValueError(
            f"no recipe {name}: give a .toml file, or one that comes with the library: "
            f"{', '.join(known)}"
        )
    return known[name]


def read_recipe(name: str, changes: Sequence[str], init: str | None) -> tuple[Recipe, Table]:
    """The recipe of a file or a name, with the changes of the command line, and its table."""
    from temporal_vae.training.recipe import Recipe

    return Recipe.read(find_recipe(name), changes, init)


def checked(recipe: Recipe, inputs: Inputs, device: str) -> Rows:
    """What a training would be: the data, the model, and what it is computed with."""
    from temporal_vae.training.build import build_model, refuse_misfit
    from temporal_vae.training.loop import computing_type
    from temporal_vae.training.optimizers import freeze

    stages = recipe.stages()
    model, anew = build_model(recipe.model, recipe.seed)
    refuse_misfit(model, stages)
    trained = freeze(model, stages[-1].model)
    kinds = [asdict(batch) for stage in stages for batch in stage.data.batch]
    batches = "; ".join(f"{k['samples']} x {k['frames']} frames of {k['crop']}²" for k in kinds)
    dtype = computing_type(recipe.optimizer.dtype, choose_device(device))
    rows: Rows = {
        "clips": len(inputs.clips),
        "seconds": round(sum(clip.seconds for clip in inputs.clips), 1),
        "held_out": len(inputs.held),
        "skipped": len(inputs.skipped),
        "model": recipe.model.init or f"new, {recipe.model.preset}",
        "parameters": model.parameter_count,
        "trained": sum(p.numel() for p in trained.values()),
        "begin_anew": len(anew),
        "batches": batches,
        "steps": recipe.steps or f"{recipe.hours:g} hours",
        "computed_in": str(dtype).removeprefix("torch."),
    }
    return rows


def tell_step(meter: Meter, recipe: Recipe, record: Record) -> None:
    """Show how far a training is, how fast, and its losses."""
    terms = [
        f"{name.partition('/')[2]} {value:.3f}" for name, value in record.items() if "/" in name
    ]
    words = f"{record['frames_per_second']:.1f} frames/s, loss {record['loss']:.4f}"
    if recipe.hours:
        words = f"{record['seconds'] / 3600:.2f} of {recipe.hours:g} hours, {words}"
    meter(record["step"], recipe.steps, more=f", {words} ({', '.join(terms)})")


def tell_skipped(skipped: Skipped, found: int) -> None:
    """List the files that were passed over, with reasons."""
    if not skipped:
        return
    say(f"skipped {len(skipped)} of {found} files:")
    for name, reason in list(skipped.reasons.items())[:FEW]:
        say(f"  {name}: {reason}")
    if len(skipped) > FEW:
        say(f"  and {some_of(list(skipped.reasons)[FEW:])}")


def train(name: str, data: DataOptions, options: RunOptions) -> None:
    """Look at the data, then train, or only say what would be trained."""
    recipe, table = read_recipe(name, data.set or [], data.init)
    from temporal_vae.training.sources import Inputs

    quiet, inputs = options.silent, Inputs(data.data or [], data.validation or [])
    with Meter("looking at the data", quiet, unit="files") as meter:
        inputs.look(recipe, meter)
    found = len(inputs.clips) + len(inputs.held) + len(inputs.skipped)
    if data.check:
        show_rows(checked(recipe, inputs, options.device), False)
    else:
        _run(recipe, table, inputs, data, options)
    if not quiet:
        tell_skipped(inputs.skipped, found)


def _run(
    recipe: Recipe, table: Table, inputs: Inputs, data: DataOptions, options: RunOptions
) -> None:
    from temporal_vae.training import loop

    assert data.out is not None
    records = loop.train(
        recipe, inputs, data.out, resume=data.resume, table=table,
        device=choose_device(options.device), say=options.say,
        strategy="fsdp" if options.strategy == "fsdp" else "ddp",
    )  # fmt: skip
    with Meter("training", options.silent, unit="steps") as meter, closing(records):
        for record in records:
            meter.begun = meter.begun or record["step"] - 1
            tell_step(meter, recipe, record)
    options.say(f"the model is in {data.out / 'model'}; {data.out / 'run.html'} shows how it went")
