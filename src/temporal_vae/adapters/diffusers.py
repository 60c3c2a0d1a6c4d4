"""Our model in diffusers: `upgrade` changes a pipeline, `to_diffusers` makes a module for one.

diffusers is imported only when one of them is called.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from temporal_vae.checkpoints import diffusers_names
from temporal_vae.model import TemporalVAE
from temporal_vae.network.autoencoder import unwrapped
from temporal_vae.network.primitives import hooked
from temporal_vae.walks import bounded
from temporal_vae.walks.budget import parse_budget

if TYPE_CHECKING:
    from temporal_vae.adapters.drop_in import DiffusersTemporalVAE


def to_diffusers(vae: TemporalVAE) -> DiffusersTemporalVAE:
    """A module that diffusers' pipelines accept as their VAE, in a constructor or as `pipe.vae`.

    It shares every weight with `vae`, and has what pipelines use: `config`, `dtype`, `device`,
    `encode(x).latent_dist`, `decode(z, num_frames=...).sample`, `forward`, and the switches for
    slicing and tiling, which change no result here. Tensors are as in diffusers: frames
    (B*T, C, H, W) in [-1, 1]. A pipeline with this module can be saved, and loaded after
    `import temporal_vae`.

    A pipeline that cuts clips into chunks still does so; `upgrade` changes that too.

    Raises `ImportError` without diffusers, naming the extra that installs it, and `ValueError` for
    a model of several frames a latent.
    """
    if vae.frames_per_latent > 1:
        raise ValueError(
            "the drop-in is for models of one latent a frame, as AutoencoderKL and "
            "AutoencoderKLTemporalDecoder are: save_pretrained(folder, format='diffusers') writes "
            "what diffusers' own class for this one loads"
        )
    module: DiffusersTemporalVAE = _drop_in_class().around(vae)
    return module


def upgrade(pipe: Any, memory: int | str | None = "6GiB") -> Upgrade:
    """Put our VAE, with the pipeline's own weights, into a diffusers pipeline.

    A video is then decoded as one clip, whatever `decode_chunk_size` says, and a large image
    without tiles. The memory for that stays within `memory`, and the result is the same for any.

    The weights are the pipeline's own tensors, shared by both modules, so they take no further
    memory. Moving or converting the pipeline moves both; offload of whole models
    (`enable_model_cpu_offload`) works as before. Images are encoded in the pipeline's dtype, where
    diffusers converts some VAEs to float32: ours does not overflow in float16.

    Args:
        pipe: a `StableVideoDiffusionPipeline`, an `AnimateDiffPipeline`, or a pipeline of Stable
            Diffusion, SDXL or FLUX that makes images from text, images or inpainting.
        memory: the most memory that a walk may use on top of weights and latents, decoded pixels
            included, but not what the pipeline does with them afterwards: a number of bytes, a size
            such as "6GiB", "least" for as little as possible, "auto" for what is free, or None for
            no limit. If less is free, the limit is what is free. `torch.compile` of the VAE with
            `fullgraph=True` needs None: a plan asks what is free, which is no part of a graph.

    Returns:
        An `Upgrade`: its `undo()` gives the pipeline back as it was, its `vae` is our model, and
        `verify()` decodes a little noise both ways and says how far they are from each other.

    Raises:
        ImportError: without diffusers, naming the extra that installs it.
        ValueError: for another kind of pipeline, a VAE or weights that cannot be read, a pipeline
            that is upgraded already, offload by layers, or an invalid budget. A budget that is too
            small is found when a video of a known size is decoded; the error names the least.
    """
    drop_in = _drop_in_class()
    if memory != "auto":
        parse_budget(memory)
    frames_of = _frames_of(pipe)
    previous = pipe.__dict__.get(_MARK)
    if previous is not None and unwrapped(pipe.vae) is previous.module:
        raise ValueError("the pipeline is upgraded already: its undo() comes first")
    _refuse_hooks(pipe)
    stock = pipe.vae
    inner = unwrapped(stock)
    vae = inner.vae if isinstance(inner, drop_in) else _with_weights_of(inner)
    if previous is not None:  # another VAE was put in place of the upgraded one
        previous.undo()
    module = drop_in.around(vae)
    module.memory = memory
    done = Upgrade(pipe, vae, module, stock, pipe.__dict__.get("decode_latents"), frames_of)
    done._apply()
    return done


FramesOf = Callable[..., tuple[Tensor, int]]
"""The arguments of a pipeline's `decode_latents` -> latents (B*T, L, h, w), and T."""


@dataclass(eq=False, repr=False)
class Upgrade:
    """An upgraded pipeline, and what is needed to undo that."""

    pipe: Any
    vae: TemporalVAE
    """Our model, with the pipeline's own weights."""
    module: Any
    """The pipeline's VAE now, a `DiffusersTemporalVAE`; its `memory` may be changed."""
    stock: Any
    """The VAE that was there before."""
    _own_decode: Any
    """What the pipeline object had as `decode_latents` before, beside its class's; mostly None."""
    _frames_of: FramesOf | None

    def __repr__(self) -> str:
        memory = "no limit of memory" if self.module.memory is None else self.module.memory
        return f"Upgrade({type(self.pipe).__name__}, memory={memory!r}): undo() ends it"

    @torch.no_grad()
    def verify(self, frames: int = 8, chunk: int = 2) -> Verification:
        """Decode a small clip of noise by the pipeline's VAE and by ours, with the same weights.

        Args:
            frames: of the clip; it has 8x8 latents a frame.
            chunk: frames that the pipeline's VAE decodes at a time for the comparison with what
                pipelines do (`decode_chunk_size`).
        """
        stock, config = cast(Any, unwrapped(self.stock)), self.vae.config
        noise = torch.Generator().manual_seed(0)
        z = torch.randn(frames, config.latent_channels, 8, 8, generator=noise)
        z = z.to(self.vae.device, self.vae.dtype)
        timed = "num_frames" in inspect.signature(stock.decode).parameters

        def theirs(at_a_time: int) -> Tensor:
            options = ({"num_frames": len(part)} if timed else {} for part in z.split(at_a_time))
            parts = zip(z.split(at_a_time), options, strict=True)
            return torch.cat([stock.decode(part, **option).sample for part, option in parts])

        ours = self.module.decode(z, num_frames=frames).sample
        whole, cut = theirs(frames), theirs(chunk)
        return Verification(_decibels(ours, whole), _decibels(cut, whole), chunk)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise `BudgetError` if a call with these arguments could not decode within `memory`.

        A call whose size is not known from its arguments is not checked.
        """
        module = cast(Any, unwrapped(self.pipe.vae))
        if module is not self.module or arguments.get("output_type") == "latent":
            return
        if (size := _size_of(self.pipe, arguments)) is None:
            return
        batch, frames, height, width = size
        f, channels = self.vae.downsample_factor, self.vae.latent_channels
        shape = (batch * frames, channels, height // f, width // f)
        if min(shape) < 1:  # the pipeline has its own words for that
            return
        latents = torch.empty(1, dtype=module.dtype, device="cpu").expand(shape)
        device = torch.device(self.pipe._execution_device)  # where offload brings it
        device = torch.device("cpu") if device.type == "cpu" else device
        plan = module.plan_decode(latents, frames, device)
        if plan is not None and plan.bounds is not None:
            bounded.refuse_hooks(self.vae.decoder)

    def _apply(self) -> None:
        with _without_hooks(self.pipe):
            self.pipe.vae = self.module
        self.pipe.__class__ = _checked_class(cast(Any, type(self.pipe)))
        if self._frames_of is not None:
            self.pipe.decode_latents = self._decode_latents
        setattr(self.pipe, _MARK, self)

    def _decode_latents(self, *args: Any, **options: Any) -> Tensor:
        """Replaces the pipeline's own: scaled latents -> pixels (B, C, T, H, W), without chunks."""
        vae = unwrapped(self.pipe.vae)
        if self._frames_of is None or not isinstance(vae, _drop_in_class()):
            # another VAE was put in place of the upgraded one
            theirs: Tensor = type(self.pipe).decode_latents(self.pipe, *args, **options)
            return theirs
        frames, num_frames = self._frames_of(*args, **options)
        pixels = vae.decode(1 / vae.config.scaling_factor * frames, num_frames=num_frames).sample
        clips: Tensor = pixels.unflatten(0, (-1, num_frames)).transpose(1, 2)
        return clips.float()

    def undo(self) -> None:
        """Put the same VAE object and methods back as before; what others have put there stays.

        If the pipeline has been moved or converted since, so have the weights of that VAE.
        """
        if unwrapped(self.pipe.vae) is self.module:
            with _without_hooks(self.pipe):
                self.pipe.vae = self.stock
        own = self.pipe.__dict__
        if own.get("decode_latents") == self._decode_latents:
            del self.pipe.decode_latents
            if self._own_decode is not None:
                self.pipe.decode_latents = self._own_decode
        if own.get(_MARK) is self:
            delattr(self.pipe, _MARK)
            self.pipe.__class__ = type(self.pipe).__mro__[1]


class Verification(NamedTuple):
    """How far decoded clips are from those of the pipeline's VAE in one piece, in decibels.

    PSNR over the range of pixels: float32's rounding is at about 130 dB; below some 45 dB people
    see differences.
    """

    ours: float
    chunks: float
    """Of that VAE itself, `chunk` frames at a time; infinite for a VAE of images."""
    chunk: int

    def __str__(self) -> str:
        return (
            f"ours {self.ours:.1f} dB from the pipeline's own VAE in one piece; that VAE in chunks "
            f"of {self.chunk} frames {self.chunks:.1f} dB"
        )


def _decibels(a: Tensor, b: Tensor) -> float:
    error = (a.double() - b.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def _is_plain(image: Any, channels: int) -> bool:
    """Whether it is known how a pipeline takes an image: PIL's, or pixels as (B, C, H, W)."""
    first = image[0] if isinstance(image, list) and image else image
    if isinstance(first, Tensor):
        return not isinstance(image, list) and first.ndim == 4 and first.shape[1] == channels
    return hasattr(first, "getbands")


@lru_cache(maxsize=64)
def _checked_class(kind: Any) -> Any:
    """The same class of pipelines, whose call first checks that its result can be decoded."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        own = vars(self).get(_MARK)
        if own is not None:
            bound = inspect.signature(kind.__call__).bind(self, *args, **options)
            bound.apply_defaults()
            own.check(bound.arguments)
        return kind.__call__(self, *args, **options)

    def reduce(self: Any, protocol: object) -> Any:  # such a class is found by no name
        return _empty, (kind,), vars(self)

    members = {
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
        "__call__": functools.wraps(kind.__call__)(call),
        "__reduce_ex__": reduce, _MARK: None,
    }  # fmt: skip
    return type(kind.__name__, (kind,), members)


def _empty(kind: Any) -> Any:
    """A pipeline of such a class, to be filled with what was pickled."""
    checked = _checked_class(kind)
    return checked.__new__(checked)


def _size_of(pipe: Any, arguments: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    """Samples, frames, height and width of what a call will decode; None where it is not known."""
    image = arguments.get("image")
    if "height" not in arguments and not _is_plain(image, pipe.vae.config.in_channels):
        return None
    each = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1
    named = (arguments.get(name) for name in ("prompt", "prompt_embeds", "image"))
    given = next(value for value in (*named, "") if value is not None)
    batch = each * (len(given) if isinstance(given, (list, Tensor)) else 1)
    frames = arguments.get("num_frames") or 1
    if "num_frames" in arguments and arguments["num_frames"] is None:
        frames = pipe.unet.config.num_frames
    height, width = arguments.get("height"), arguments.get("width")
    if height is None or width is None:
        if "height" not in arguments:
            first = image[0] if isinstance(image, list) else image
            known = pipe.image_processor.get_default_height_width(first, height, width)
        else:
            network = getattr(pipe, "unet", None) or pipe.transformer
            side = getattr(pipe, "default_sample_size", None) or network.config.sample_size
            sides = (side, side) if isinstance(side, int) else side
            known = tuple(n * pipe.vae_scale_factor for n in sides)
        height, width = height or known[0], width or known[1]
    return batch, frames, height, width


_MARK = "_temporal_vae_upgrade"
"""The attribute of a pipeline that holds its `Upgrade`."""


def _drop_in_class() -> Any:
    try:
        from temporal_vae.adapters.drop_in import DiffusersTemporalVAE
    except ImportError as error:
        raise ImportError(
            f"this needs diffusers ({error}): pip install 'temporal-video-vae[diffusers]'"
        ) from error
    return DiffusersTemporalVAE


# How pipelines decode ------------------------------------------------------------------------


def _svd_frames(latents: Tensor, num_frames: int, decode_chunk_size: int = 0) -> tuple[Tensor, int]:
    """Latents are (B, T, L, h, w); see `FramesOf`."""
    return latents.flatten(0, 1), num_frames


def _animatediff_frames(latents: Tensor, decode_chunk_size: int = 0) -> tuple[Tensor, int]:
    """Latents are (B, L, T, h, w); see `FramesOf`."""
    return latents.transpose(1, 2).flatten(0, 1), latents.shape[2]


_PIPELINES: dict[str, FramesOf | None] = {
    "StableVideoDiffusionPipeline": _svd_frames,
    "AnimateDiffPipeline": _animatediff_frames,
    # these pass all their latents to the VAE at once, so only the VAE is replaced
    "StableDiffusionPipeline": None,
    "StableDiffusionImg2ImgPipeline": None,
    "StableDiffusionInpaintPipeline": None,
    "StableDiffusionXLPipeline": None,
    "StableDiffusionXLImg2ImgPipeline": None,
    "StableDiffusionXLInpaintPipeline": None,
    "FluxPipeline": None,
    "FluxImg2ImgPipeline": None,
    "FluxInpaintPipeline": None,
}


def _frames_of(pipe: Any) -> FramesOf | None:
    """What replaces the chunks of the pipeline's `decode_latents`; None if nothing has to.

    Raises `ValueError` for an unknown pipeline.
    """
    for ancestor in type(pipe).__mro__:
        if _MARK in vars(ancestor):
            continue  # of an upgraded pipeline: what it was before comes next
        if ancestor.__module__.startswith("diffusers.") and ancestor.__name__ in _PIPELINES:
            frames_of = _PIPELINES[ancestor.__name__]
            if frames_of and type(pipe).decode_latents is not vars(ancestor)["decode_latents"]:
                raise ValueError(
                    f"{type(pipe).__name__} has a decode_latents of its own, which an upgrade "
                    "would replace: put temporal_vae.to_diffusers(vae) into it as its vae"
                )
            return frames_of
    raise ValueError(
        f"cannot upgrade a {type(pipe).__name__}: only {', '.join(_PIPELINES)}; another pipeline "
        "may work with temporal_vae.to_diffusers(vae) as its vae"
    )


# Weights and hooks ---------------------------------------------------------------------------


def _with_weights_of(stock: Any) -> TemporalVAE:
    """Our model, made of the parameters of one of diffusers' VAEs."""
    name = type(stock).__name__
    if name not in (diffusers_names.IMAGE_CLASS, diffusers_names.SVD_CLASS):
        raise ValueError(
            f"cannot read the pipeline's VAE, a {name}: only {diffusers_names.IMAGE_CLASS} and "
            f"{diffusers_names.SVD_CLASS} are known"
        )
    with torch.device("meta"):
        model = TemporalVAE.from_config(diffusers_names.read_config(stock.config))
    given = {
        diffusers_names.our_name(key): parameter for key, parameter in stock.named_parameters()
    }
    wanted = dict(model.named_parameters())
    wrong = sorted(given.keys() ^ wanted.keys())
    wrong += [
        key
        for key in given.keys() & wanted.keys()
        if given[key].shape != wanted[key].shape or not given[key].is_floating_point()
    ]
    if wrong:
        raise ValueError(
            f"the weights of the pipeline's {name} are not those of its class; adapters, fused "
            f"projections and quantisation have to be taken off first: {wrong[:4]}"
        )
    for key, parameter in wanted.items():  # what is loaded takes this flag from what it replaces
        parameter.requires_grad_(given[key].requires_grad)
    # the same parameter objects, not only the same storage: to() on either module moves both
    model.load_state_dict(given, assign=True)
    if stock.is_gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train(stock.training)


def _refuse_hooks(pipe: Any) -> None:
    """Raise `ValueError` if hooks on layers move the weights: our walks do not call such hooks."""
    if pipe.hf_device_map is not None:
        raise ValueError("the pipeline has a device map: call pipe.reset_device_map() first")
    layers = list(unwrapped(pipe.vae).modules()) if isinstance(pipe.vae, nn.Module) else []
    for layer in layers[1:]:  # the hook of enable_model_cpu_offload is on the VAE as a whole
        if hooked(layer) and not (hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook")):
            raise ValueError(
                f"a {type(layer).__name__} of the pipeline's VAE has hooks, or a forward of its "
                "own, which an upgrade would leave behind: take them off, and put them on pipe.vae "
                "after the upgrade"
            )
    if pipe.__dict__.get("_all_hooks"):
        layers = layers[1:]  # the hook of enable_model_cpu_offload is on the VAE as a whole
    if any(hasattr(layer, hook) for layer in layers for hook in ("_hf_hook", "_diffusers_hook")):
        raise ValueError(
            "the pipeline's VAE is offloaded by layers: take enable_model_cpu_offload instead of "
            "enable_sequential_cpu_offload or group offload, and `memory` for the activations"
        )


@contextlib.contextmanager
def _without_hooks(pipe: Any) -> Iterator[None]:
    """Without the hooks of enable_model_cpu_offload while a module is changed; then with them."""
    offloaded = bool(pipe.__dict__.get("_all_hooks"))
    if offloaded:
        pipe.remove_all_hooks()
    try:
        yield
    finally:
        if offloaded:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
