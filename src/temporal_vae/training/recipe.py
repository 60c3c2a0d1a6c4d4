"""A recipe: all that says how a model is trained, in plain values, read from a TOML file.

A recipe has sections ([model], [data], [optimizer], [loss], [critic], [validation]) and, if the
training has several parts, [[stage]] tables. A stage takes a `share` of the whole run and may
override any value of the sections, by the same names:

    [[stage]]
    name = "frames"
    share = 0.5
    data.batch = [{samples = 16, frames = 1, crop = 64}]
    optimizer.learning_rate = 2e-3
"""

from __future__ import annotations

import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

T = TypeVar("T")
Table = dict[str, Any]

PARTS = ("encoder.spatial", "encoder.temporal", "decoder.spatial", "decoder.temporal")
"""Parts of a model that are frozen, or trained at a rate of their own."""


def _positive(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(section, name)}")


def _shares(section: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(section, name) <= 1:
            raise ValueError(f"{name} is a share, 0 to 1, got {getattr(section, name)}")


def _not_negative(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a number, 0 or more, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a batch is: `samples` clips of `frames` frames, each a square of `crop` pixels.

    Where a recipe has several kinds of batches, each step draws one, with probabilities in
    proportion to `chance`.
    """

    samples: int = 1
    frames: int = 16
    crop: int = 64
    chance: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "samples", "frames", "crop")
        _not_negative(self, "chance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Which model is trained, and which parts of it."""

    init: str | None = None
    """A model to begin with: a built-in name, a folder, a file, owner/name. None: new weights."""
    preset: Literal["default", "tiny", "svd", "tiny-wan"] = "default"
    """The layout of new weights."""
    start: Literal["random", "linear"] = "random"
    """How new weights begin: drawn, or, in Wan 2.1's layout, as a linear autoencoder fitted to
    clips in closed form (see `linear_start`), which saves hours."""
    config: Table = field(default_factory=dict)
    """Fields of the model's configuration that differ from the preset's, or from `init`'s layout:
    `init`'s weights are then taken as far as the layouts agree (see `build.build_model`)."""
    train: tuple[str, ...] = PARTS
    """What is trained: of `PARTS`, where "encoder" and "decoder" mean both of their parts; the
    others are frozen."""
    temporal: bool = True
    """Whether temporal layers are computed. Without, the model is trained as an image VAE, which is
    what it is at birth; its temporal layers stay as they are."""
    branches: bool = True
    """Whether residual branches are computed. Without, a new model of Wan's kind is trained as what
    lies between them, at a twelfth of the time; its branches begin at zero, so that what follows
    goes on from there."""
    gradient_checkpointing: bool = False
    """Compute every layer again for its gradients: less memory, about a third more time."""
    memory: str | None = None
    """What the decoder's gradients may take, such as "6GiB"; see `TemporalVAE.plan`."""

    def __post_init__(self) -> None:
        if self.start == "linear" and self.init is not None:
            raise ValueError(
                f"model.start = 'linear' is for new weights, and model.init = {self.init!r} has "
                "some already: leave one of both away"
            )
        if not self.train:
            raise ValueError(f"model.train names nothing to train: there are {', '.join(PARTS)}")
        for name in self.train:
            if not any(part in (name, f"{name}.spatial", f"{name}.temporal") for part in PARTS):
                raise ValueError(
                    f"model.train is a list of {', '.join(PARTS)} (or encoder, decoder), "
                    f"got {name!r}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """How clips are drawn from the files."""

    batch: tuple[Batch, ...] = (Batch(),)
    widths: tuple[int, ...] = ()
    """Pixels across to which a source is scaled, one of them drawn for each sample; empty: as it
    is."""
    strides: tuple[int, ...] = (1,)
    """Of the frames every n-th is taken, n drawn for each sample."""
    fps: float | None = None
    """Frames a second, by timestamps, in place of strides: frames are repeated or left out."""
    exclude: tuple[str, ...] = ()
    """Patterns of file names that are left out, such as "bbb_*"."""
    flips: bool = True
    """Mirror half of the samples, and turn a few upside down or by their diagonal."""
    colours: float = 0.0
    """Share of samples whose colours are changed: channels exchanged, grey, other brightness."""
    fades: float = 0.0
    """Share of samples that are synthetic fades between two flat colours, which real clips have
    few of."""
    workers: int = 1
    """Processes that read and decode ahead; 0 reads in the training process."""
    cache: str = "1GiB"
    """Memory that each worker may keep decoded clips in, so that they are not decoded again."""

    def __post_init__(self) -> None:
        if not self.batch or sum(batch.chance for batch in self.batch) <= 0:
            raise ValueError("data.batch needs a kind of batch with a chance above 0")
        if not self.strides:
            raise ValueError("data.strides needs one stride at least, such as [1]")
        for name in ("widths", "strides"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"data.{name} must be 1 or more each, got {getattr(self, name)}")
        if self.fps is not None and self.strides != (1,):
            raise ValueError("data.fps and data.strides both choose frames: give one of them")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"data.fps must be above 0, got {self.fps}")
        _not_negative(self, "workers")
        _shares(self, "colours", "fades")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """How weights follow their gradients."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` takes orthogonal steps for the matrices inside the network, and AdamW's for the
    rest."""
    learning_rate: float = 1e-4
    rates: Table = field(default_factory=dict)
    """Multiples of the learning rate by part (see `PARTS`), such as {"decoder.temporal" = 3.0}."""
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 50
    """Steps over which the rate rises from 0."""
    final_rate: float = 0.02
    """The fraction of the learning rate that is left at the end of the half cosine."""
    clip_norm: float = 1.0
    """The gradients' largest norm; larger ones are scaled down. 0: as they are."""
    accumulate: int = 1
    """Batches whose gradients are averaged to one step."""
    ema: float = 0.999
    """Decay of the averaged weights, which are validated and saved; 0: none are kept."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Numbers the network is computed with (weights stay float32). "auto" takes bfloat16 where the
    device has instructions for it."""

    def __post_init__(self) -> None:
        _not_negative(self, "learning_rate", "clip_norm", "weight_decay", "warmup_steps")
        _shares(self, "final_rate")
        _positive(self, "accumulate")
        if not 0 <= self.ema < 1:
            raise ValueError(f"optimizer.ema must be in [0, 1), got {self.ema}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are two numbers in [0, 1), got {self.betas}")
        for name, value in self.rates.items():
            known = (*PARTS, "encoder", "decoder")
            if (
                name not in known
                or not isinstance(value, (int, float))
                or not 0 <= value < math.inf
            ):
                raise ValueError(
                    f"optimizer.rates gives a factor for each of {', '.join(known)}, "
                    f"got {name!r} = {value!r}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Weights of the loss's terms (0: not computed), and the noise on the latents."""

    l1: float = 0.0
    """Mean absolute error of pixels."""
    mse: float = 0.0
    """Mean squared error of pixels."""
    log_mse: float = 1.0
    """Mean log of each frame's squared error: a decibel counts the same in every frame."""
    colour: float = 0.15
    """The same of frames shrunk 8 times: errors of mean colours."""
    temporal: float = 0.0
    """The same of differences of neighbouring frames: flicker."""
    kl: float = 0.0
    """KL divergence of the posterior, in nats per number of the latent."""
    feature: float = 0.0
    """Distance of the features of a frozen image network, `feature_weights`."""
    lpips: float = 0.0
    """LPIPS (Zhang et al. 2018), by the weights `lpips_trunk` and `lpips_heads`."""
    adversarial: float = 0.0
    """What a critic trained along says of the reconstruction; see [critic]."""
    distill: float = 0.0
    """Squared distance of the latents, where they have one shape, to those of `teacher`."""
    feature_weights: str | None = None
    lpips_trunk: str | None = None
    lpips_heads: str | None = None
    teacher: str | None = None
    """A model whose reconstruction is the target in place of the video: distillation."""
    noise: float = 0.0
    """The largest share of noise on the latents, in their deviations (measured at the end of each
    stage that trains the encoder): what diffusion models hand to a decoder. Each clip has a share
    of its own, uniform up to this, and each frame of a latent noise of its own."""
    clean: float = 0.25
    """The part of the clips that has no noise, where `noise` is above 0."""
    sample: bool = False
    """Decode samples of the posterior, as a VAE does, in place of its mean."""

    def __post_init__(self) -> None:
        numbers = [f.name for f in fields(self) if isinstance(f.default, float)]
        _not_negative(self, *numbers)
        _shares(self, "clean")
        if self.feature and not self.feature_weights:
            raise ValueError(
                "loss.feature needs loss.feature_weights, a .safetensors file of SqueezeNet 1.1"
            )
        if self.lpips and not (self.lpips_trunk and self.lpips_heads):
            raise ValueError(
                "loss.lpips needs its weights: loss.lpips_trunk and loss.lpips_heads, .safetensors "
                "files of a torchvision trunk and of the heads of the package lpips"
            )
        if self.distill and not self.teacher:
            raise ValueError("loss.distill needs loss.teacher, a model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """The adversarial critic, which sees patches of several frames, if it weighs."""

    start: float = 0.5
    """From which part of the stage on it counts, 0 to 1; until then the decoder learns alone."""
    width: int = 32
    depth: int = 3
    learning_rate: float = 1e-4
    adaptive: bool = True
    """Bring the critic's gradient at the decoder's last layer to the size of the other terms'."""

    def __post_init__(self) -> None:
        _positive(self, "width", "depth")
        _not_negative(self, "learning_rate")
        _shares(self, "start")


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """When and how the model is measured on clips that it is not trained on."""

    every: int = 500
    """Steps between two measurements; 0: only at the end."""
    clips: int = 8
    """Clips at most."""
    frames: int = 16
    width: int = 128
    noise: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4)
    """Shares of noise on the latents at which it is measured."""

    def __post_init__(self) -> None:
        _not_negative(self, "every", "clips")
        if not self.noise or min(self.noise) < 0:
            raise ValueError(f"validation.noise are shares, 0 or more each, got {self.noise}")
        _positive(self, "frames", "width")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A whole training. Either `steps` or `hours` says how long it lasts."""

    seed: int = 0
    steps: int | None = None
    hours: float | None = None
    first_step: int = 0
    """Steps that earlier runs have done, whose weights `init` holds: the batches, the schedule and
    the count of steps go on from there."""
    save_minutes: float = 10.0
    """Minutes between two checkpoints: what a crash loses at most. 0: after every step."""
    keep: int = 2
    """Checkpoints that are kept."""
    tensorboard: bool = False
    """Write what TensorBoard shows, too (needs the extra `train`)."""
    name: str = ""
    """Of the stage."""
    share: float = 1.0
    """The part of the run that the stage takes, in proportion to the shares of the others."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loss: Loss = field(default_factory=Loss)
    critic: Critic = field(default_factory=Critic)
    validation: Validation = field(default_factory=Validation)
    stage: tuple[Table, ...] = ()

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.hours is None):
            raise ValueError("a recipe lasts for `steps` or for `hours`: give one of them")
        if self.steps is not None:
            _positive(self, "steps")
            if self.first_step >= self.steps:
                raise ValueError(f"first_step must be below steps, which is {self.steps}")
        if self.hours is not None and not self.hours > 0:
            raise ValueError(f"hours must be above 0, got {self.hours}")
        if self.hours is not None and self.first_step:
            raise ValueError("first_step counts steps: give steps in place of hours")
        _positive(self, "keep")
        _not_negative(self, "save_minutes", "share", "first_step")

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """A recipe of what a TOML file holds.

        Raises `ValueError` for unknown keys and for values of the wrong kind, in stages too.
        """
        recipe = _build(cls, table, "")
        recipe.stages()
        return recipe

    @classmethod
    def read(
        cls, path: str | Path, changes: Sequence[str] = (), init: str | None = None
    ) -> tuple[Self, Table]:
        """The recipe of a TOML file with `changes` such as "data.workers=4", and its table.

        "stage.NAME.data.workers=4" changes a stage; `init` takes the place of the model to begin
        with; `steps` in the changes takes the place of the file's `hours`, and the other way round.
        Raises `ValueError` naming the file for what is no recipe.
        """
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
            for change in changes:
                _set(table, change)
            if init is not None:
                table.setdefault("model", {})["init"] = init
            return cls.from_table(table), table
        except (ValueError, UnicodeError) as error:  # tomllib's error is a ValueError
            raise ValueError(f"{path}: {error}") from error

    def stages(self) -> list[Self]:
        """The recipe of each stage: this one with what the stage overrides."""
        if not self.stage:
            return [self]
        whole = _plain(self)
        del whole["stage"]
        for index, table in enumerate(self.stage):
            _refuse_in_stage(table, f"stage {index + 1}: ")
        return [
            _build(type(self), _merged(whole, table), f"stage {index + 1}: ")
            for index, table in enumerate(self.stage)
        ]

    def bounds(self) -> list[float]:
        """At which part of the run each stage ends; the last at 1."""
        shares = [stage.share for stage in self.stages()]
        if sum(shares) <= 0:
            raise ValueError("the shares of the stages add up to 0: give one of them a share")
        ends = [end / sum(shares) for end in accumulate(shares)]
        return [*ends[:-1], 1.0]


def _set(table: Table, change: str) -> None:
    """Put "a.b=value" into a table; the value as TOML says it, or else as a text."""
    key, equals, text = change.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ValueError(f"--set takes key=value, such as data.workers=2, got {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for other in {"steps": ["hours"], "hours": ["steps"]}.get(key.strip(), []):
        table.pop(other, None)
    inner = table
    if names[0] == "stage" and len(names) > 2:
        inner, names = _stage(table, names[1]), names[2:]
    elif own := [s.get("name", "") for s in table.get("stage", []) if _has(s, names)]:
        raise ValueError(
            f"--set {change}: the stages {', '.join(own)} have a value of their own: "
            f"--set stage.{own[0]}.{change} changes it"
        )
    for name in names[:-1]:
        inner = inner.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set {change}: {name} is a value, not a section")
    inner[names[-1]] = value


def _stage(table: Table, name: str) -> Table:
    """The table of a stage by its name."""
    found: Table | None = next((s for s in table.get("stage", []) if s.get("name") == name), None)
    if found is None:
        known = ", ".join(str(s.get("name")) for s in table.get("stage", [])) or "none"
        raise ValueError(f"there is no stage {name}: there are {known}")
    return found


def _has(table: Mapping[str, Any], names: Sequence[str]) -> bool:
    """Whether a table holds a value, or a part of one, under these names."""
    for name in names:
        if not isinstance(table, Mapping) or name not in table:
            return False
        table = table[name]
    return True


IN_STAGES = {"name", "share", "model", "data", "optimizer", "loss", "critic"}
OF_MODEL = {"train", "temporal", "branches", "gradient_checkpointing", "memory"}


def _refuse_in_stage(table: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for keys that would change the whole run, not a stage."""
    model = table.get("model", {})
    odd = sorted(set(table) & ({f.name for f in fields(Recipe)} - IN_STAGES))
    if isinstance(model, Mapping):
        odd += [f"model.{n}" for n in model if n in {f.name for f in fields(Model)} - OF_MODEL]
    if odd:
        raise ValueError(f"{where}{', '.join(odd)}: a run has one of these, not each stage its own")


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Table:
    """`above` over `below`, section by section."""
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        merged[name] = value
    return merged


def plain_table(recipe: Recipe) -> Table:
    """A recipe as a TOML table."""
    table: Table = _plain(recipe)
    return table


def _plain(value: Any) -> Any:
    """Dataclasses as tables, without what is None."""
    if is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {name: _plain(inner) for name, inner in pairs if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def _build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """A dataclass of a table, whose keys and kinds of values are checked."""
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(table) - set(hints)):
        raise ValueError(
            f"{where}unknown {'key' if len(unknown) == 1 else 'keys'} {', '.join(unknown)}: "
            f"there are {', '.join(hints)}"
        )
    values = {name: _value(hints[name], value, f"{where}{name}") for name, value in table.items()}
    return cls(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as a field's type says, or a `ValueError`."""
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _build(typing.cast(Any, kind), value, f"{where}.")
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _value(inner[0], value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(inner[0], one, f"{where}[{i}]") for i, one in enumerate(value))
    if origin is Literal:
        if value in inner:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(repr, inner))}, got {value!r}")
    plain = origin or kind
    if plain is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{where} must be a finite number, got {value}")
        return float(value)
    if type(value) is not plain:
        name = {tuple: "a list", dict: "a table", str: "a text", bool: "true or false",
                int: "a whole number", float: "a number"}.get(plain, "a table")  # fmt: skip
        raise ValueError(f"{where} must be {name}, got {value!r}")
    return value


# As TOML again --------------------------------------------------------------------------------


def to_toml(table: Mapping[str, Any]) -> str:
    """A recipe's table as a TOML file, which `Recipe.read` reads back."""
    plain = {name: value for name, value in table.items() if not isinstance(value, Mapping)}
    stages = plain.pop("stage", [])
    lines = [f"{name} = {_inline(value)}" for name, value in plain.items()]
    for name, section in table.items():
        if isinstance(section, Mapping):
            lines += ["", f"[{name}]", *(f"{_key(k)} = {_inline(v)}" for k, v in section.items())]
    for stage in stages:
        lines += ["", "[[stage]]", *(f"{_key(k)} = {_inline(v)}" for k, v in stage.items())]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").isalnum()
    return name if bare else json.dumps(name)


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
