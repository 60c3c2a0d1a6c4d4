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

from temporal_vae.checkpoints import diffusers_names, wan_names
from temporal_vae.config import TemporalVAEConfig, WanVAEConfig
from temporal_vae.model import TemporalVAE
from temporal_vae.network.autoencoder import unwrapped
from temporal_vae.network.primitives import hooked
from temporal_vae.walks import bounded
from temporal_vae.walks.budget import parse_budget

if TYPE_CHECKING:
    from temporal_vae.adapters.drop_in import DropIn


def to_diffusers(vae: TemporalVAE) -> DropIn:
    """A module that diffusers' pipelines accept as their VAE, in a constructor or as `pipe.vae`.

    It shares every weight with `vae`, and has what pipelines use: `config`, `dtype`, `device`,
    `encode(x).latent_dist`, `decode(z).sample`, `forward`, and the switches for slicing and tiling,
    which change no result here. Tensors are as in diffusers, pixels in [-1, 1]: frames
    (B*T, C, H, W) and `num_frames`, or for models of Wan's kind clips (B, C, T, H, W), whose
    decoded pixels are clamped as diffusers clamps them. A pipeline with this module can be saved,
    and loaded after `import temporal_vae`.

    A pipeline that cuts clips into chunks still does so; `upgrade` changes that too.

    Raises `ImportError` without diffusers, naming the extra that installs it.
    """
    module: DropIn = _drop_ins().drop_in_for(vae)
    return module


def upgrade(pipe: Any, memory: int | str | None = "6GiB") -> Upgrade:
    """Put our VAE, with the pipeline's own weights, into a diffusers pipeline.

    A video is then decoded as one clip, whatever `decode_chunk_size` says, and a large image
    without tiles. The memory for that stays within `memory`, and the result is the same for any.
    Videos and images that a pipeline starts from are encoded so too.

    The weights are the pipeline's own tensors, shared by both modules, so they take no further
    memory. Moving or converting the pipeline moves both; offload of whole models
    (`enable_model_cpu_offload`) works as before. Images are encoded in the pipeline's dtype, where
    diffusers converts some VAEs to float32: ours does not overflow in float16.

    Args:
        pipe: a `StableVideoDiffusionPipeline`, an `AnimateDiffPipeline`, a pipeline of Wan that
            makes videos from text, an image, a video or VACE's conditions, or one of Stable
            Diffusion, SDXL, FLUX or Qwen-Image that makes images from text, images or inpainting
            (Qwen-Image: edits, layers and ControlNet too).
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
    drop_ins = _drop_ins()
    if memory != "auto":
        parse_budget(memory)
    known = _known(pipe)
    previous = pipe.__dict__.get(_MARK)
    if previous is not None and unwrapped(pipe.vae) is previous.module:
        raise ValueError("the pipeline is upgraded already: its undo() comes first")
    _refuse_hooks(pipe)
    stock = pipe.vae
    inner = unwrapped(stock)
    vae = inner.vae if isinstance(inner, drop_ins.DropIn) else _with_weights_of(inner)
    if not isinstance(vae.config, known.config):
        raise ValueError(
            f"a {type(pipe).__name__} does not work with the {type(inner).__name__} that is its "
            "vae: put one there that it was made for"
        )
    if previous is not None:  # another VAE was put in place of the upgraded one
        previous.undo()
    module = drop_ins.drop_in_for(vae)
    module.memory = memory
    done = Upgrade(pipe, vae, module, stock, pipe.__dict__.get("decode_latents"), known)
    done._apply()
    return done


FramesOf = Callable[..., tuple[Tensor, int]]
"""The arguments of a pipeline's `decode_latents` -> latents (B*T, L, h, w), and T."""
SizeOf = Callable[[Any, TemporalVAE, Mapping[str, Any]], tuple[int, ...] | None]
"""A pipeline, its VAE and the arguments of a call -> the latents that it will decode: samples,
latents along time, height and width; None where they are not known before."""


@dataclass(eq=False, repr=False)
class Upgrade:
    """An upgraded pipeline, and what is needed to undo that."""

    pipe: Any
    vae: TemporalVAE
    """Our model, with the pipeline's own weights."""
    module: Any
    """The pipeline's VAE now, what `to_diffusers` makes; its `memory` may be changed."""
    stock: Any
    """The VAE that was there before."""
    _own_decode: Any
    """What the pipeline object had as `decode_latents` before, beside its class's; mostly None."""
    _known: Known

    def __repr__(self) -> str:
        memory = "no limit of memory" if self.module.memory is None else self.module.memory
        return f"Upgrade({type(self.pipe).__name__}, memory={memory!r}): undo() ends it"

    @torch.no_grad()
    def verify(self, frames: int = 8, chunk: int = 2) -> Verification:
        """Decode a small clip of noise by the pipeline's VAE and by ours, with the same weights.

        Args:
            frames: latents of the clip along time; each has 8x8 cells.
            chunk: frames that the pipeline's VAE decodes at a time for the comparison with what
                pipelines do (`decode_chunk_size`), where there is such a pipeline.
        """
        stock = cast(Any, unwrapped(self.stock))
        noise = torch.Generator().manual_seed(0)
        clip = torch.randn(1, self.vae.latent_channels, frames, 8, 8, generator=noise)
        clip = clip.to(self.vae.device, self.vae.dtype)
        timed = "num_frames" in inspect.signature(stock.decode).parameters

        def theirs(part: Tensor) -> Tensor:
            z, options = self.module.decode_call(part)
            pixels: Tensor = stock.decode(z, **(options if timed else {})).sample
            return pixels

        z, options = self.module.decode_call(clip)
        ours, whole = self.module.decode(z, **options).sample, theirs(clip)
        cut = torch.cat([theirs(part) for part in clip.split(chunk, 2)]) if timed else whole
        return Verification(_decibels(ours, whole), _decibels(cut, whole), chunk)

    @torch.no_grad()  # as pipelines decode
    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise `BudgetError` if a call with these arguments could not decode within `memory`.

        A call whose size is not known from its arguments is not checked.
        """
        module = cast(Any, unwrapped(self.pipe.vae))
        if module is not self.module or arguments.get("output_type") == "latent":
            return
        size = self._known.size_of(self.pipe, self.vae, arguments)
        if size is None or min(size) < 1:  # the pipeline has its own words for nothing
            return
        samples, *rest = size
        latents = torch.empty(1, dtype=module.dtype, device="cpu")
        z, options = module.decode_call(latents.expand(samples, self.vae.latent_channels, *rest))
        device = torch.device(self.pipe._execution_device)  # where offload brings it
        device = torch.device("cpu") if device.type == "cpu" else device
        plan = module.plan_decode(z, **options, device=device)
        if plan is not None and plan.bounds is not None:
            bounded.refuse_hooks(self.vae.decoder)

    def _apply(self) -> None:
        with _without_hooks(self.pipe):
            self.pipe.vae = self.module
        self.pipe.__class__ = _checked_class(cast(Any, type(self.pipe)))
        if self._known.frames_of is not None:
            self.pipe.decode_latents = self._decode_latents
        setattr(self.pipe, _MARK, self)

    def _decode_latents(self, *args: Any, **options: Any) -> Tensor:
        """Replaces the pipeline's own: scaled latents -> pixels (B, C, T, H, W), without chunks."""
        vae, frames_of = unwrapped(self.pipe.vae), self._known.frames_of
        if frames_of is None or not isinstance(vae, _drop_ins().DropIn):
            # another VAE was put in place of the upgraded one
            theirs: Tensor = type(self.pipe).decode_latents(self.pipe, *args, **options)
            return theirs
        frames, num_frames = frames_of(*args, **options)
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
    """Of that VAE itself, `chunk` frames at a time; infinite for one that pipelines do not cut."""
    chunk: int

    def __str__(self) -> str:
        ours = f"ours {self.ours:.1f} dB from the pipeline's own VAE in one piece"
        cut = f"; that VAE in chunks of {self.chunk} frames {self.chunks:.1f} dB"
        return ours if self.chunks == math.inf else ours + cut


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


_MARK = "_temporal_vae_upgrade"
"""The attribute of a pipeline that holds its `Upgrade`."""


def _drop_ins() -> Any:
    """The module of the drop-ins, which needs diffusers."""
    try:
        from temporal_vae.adapters import drop_in
    except ImportError as error:
        raise ImportError(
            f"this needs diffusers ({error}): pip install 'temporal-video-vae[diffusers]'"
        ) from error
    return drop_in


# How pipelines decode ------------------------------------------------------------------------


def _svd_frames(latents: Tensor, num_frames: int, decode_chunk_size: int = 0) -> tuple[Tensor, int]:
    """Latents are (B, T, L, h, w); see `FramesOf`."""
    return latents.flatten(0, 1), num_frames


def _animatediff_frames(latents: Tensor, decode_chunk_size: int = 0) -> tuple[Tensor, int]:
    """Latents are (B, L, T, h, w); see `FramesOf`."""
    return latents.transpose(1, 2).flatten(0, 1), latents.shape[2]


def _samples(arguments: Mapping[str, Any]) -> int:
    """Samples that a call will decode."""
    each = arguments.get("num_images_per_prompt") or arguments.get("num_videos_per_prompt") or 1
    named = (arguments.get(name) for name in ("prompt", "prompt_embeds", "image"))
    given = next(value for value in (*named, "") if value is not None)
    return int(each * (len(given) if isinstance(given, (list, Tensor)) else 1))


def _size_of(
    pipe: Any, vae: TemporalVAE, arguments: Mapping[str, Any]
) -> tuple[int, int, int, int] | None:
    """Of Stable Diffusion's, FLUX's and SVD's pipelines; see `SizeOf`."""
    image = arguments.get("image")
    if "height" not in arguments and not _is_plain(image, vae.input_channels):
        return None
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
    f = vae.downsample_factor
    return _samples(arguments), frames, height // f, width // f


def _wan_size(pipe: Any, vae: TemporalVAE, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Of Wan's pipelines, whose frames and patches are whole numbers; see `SizeOf`.

    Raises `ValueError` for a video of another number of frames, of which stock drops some.
    """
    given, video = arguments.get("latents"), arguments.get("video")
    if isinstance(given, Tensor) and given.ndim == 5:
        return len(given), *given.shape[2:]
    if "num_frames" in arguments:
        latents, samples = arguments["num_frames"] // vae.frames_per_latent + 1, _samples(arguments)
    elif isinstance(video, list) and hasattr(video[0], "getbands"):  # one video a prompt
        latents = vae.latent_frames(len(video))
        samples = _samples({**arguments, "num_videos_per_prompt": 1})
    else:
        return None
    _, *patch = (pipe.transformer or pipe.transformer_2).config.patch_size
    sides = (arguments[name] for name in ("height", "width"))
    f = vae.downsample_factor
    cells = (side // (f * cut) * cut for side, cut in zip(sides, patch, strict=True))
    return samples, latents, *cells


def _qwen_size(pipe: Any, vae: TemporalVAE, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Of Qwen-Image's pipelines, which pack squares of 2x2 cells; see `SizeOf`."""
    side = pipe.default_sample_size * vae.downsample_factor
    sides = (arguments[name] or side for name in ("height", "width"))
    return _samples(arguments), 1, *(side // (2 * vae.downsample_factor) * 2 for side in sides)


def _unknown_size(pipe: Any, vae: TemporalVAE, arguments: Mapping[str, Any]) -> None:
    """Of pipelines that choose the size by an image, which they encode first at about that size."""


class Known(NamedTuple):
    """What an upgrade has to know of a pipeline."""

    config: type = TemporalVAEConfig
    """Of the models that it works with."""
    frames_of: FramesOf | None = None
    """What replaces the chunks of its `decode_latents`; None if it passes all latents at once."""
    size_of: SizeOf = _size_of


_IMAGES = Known()
_WAN = Known(WanVAEConfig, size_of=_wan_size)
_QWEN = Known(WanVAEConfig, size_of=_qwen_size)
_QWEN_EDITS = Known(WanVAEConfig, size_of=_unknown_size)
_PIPELINES: dict[str, Known] = {
    "StableVideoDiffusionPipeline": Known(frames_of=_svd_frames),
    "AnimateDiffPipeline": Known(frames_of=_animatediff_frames),
    "StableDiffusionPipeline": _IMAGES,
    "StableDiffusionImg2ImgPipeline": _IMAGES,
    "StableDiffusionInpaintPipeline": _IMAGES,
    "StableDiffusionXLPipeline": _IMAGES,
    "StableDiffusionXLImg2ImgPipeline": _IMAGES,
    "StableDiffusionXLInpaintPipeline": _IMAGES,
    "FluxPipeline": _IMAGES,
    "FluxImg2ImgPipeline": _IMAGES,
    "FluxInpaintPipeline": _IMAGES,
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN,
    "WanVideoToVideoPipeline": _WAN,
    "WanVACEPipeline": _WAN,
    "QwenImagePipeline": _QWEN,
    "QwenImageImg2ImgPipeline": _QWEN,
    "QwenImageInpaintPipeline": _QWEN,
    "QwenImageControlNetPipeline": _QWEN,
    "QwenImageControlNetInpaintPipeline": _QWEN,
    "QwenImageEditPipeline": _QWEN_EDITS,
    "QwenImageEditInpaintPipeline": _QWEN_EDITS,
    "QwenImageEditPlusPipeline": _QWEN_EDITS,
    "QwenImageLayeredPipeline": _QWEN_EDITS,
}


def _known(pipe: Any) -> Known:
    """What is known of the pipeline. Raises `ValueError` for an unknown one."""
    for ancestor in type(pipe).__mro__:
        if _MARK in vars(ancestor):
            continue  # of an upgraded pipeline: what it was before comes next
        if ancestor.__module__.startswith("diffusers.") and ancestor.__name__ in _PIPELINES:
            known = _PIPELINES[ancestor.__name__]
            own = vars(ancestor).get("decode_latents")
            if known.frames_of and type(pipe).decode_latents is not own:
                raise ValueError(
                    f"{type(pipe).__name__} has a decode_latents of its own, which an upgrade "
                    "would replace: put temporal_vae.to_diffusers(vae) into it as its vae"
                )
            return known
    raise ValueError(
        f"cannot upgrade a {type(pipe).__name__}: only {', '.join(_PIPELINES)}; another pipeline "
        "may work with temporal_vae.to_diffusers(vae) as its vae"
    )


# Weights and hooks ---------------------------------------------------------------------------


def _with_weights_of(stock: Any) -> TemporalVAE:
    """Our model, made of the parameters of one of diffusers' VAEs."""
    name = type(stock).__name__
    names = wan_names if name in wan_names.CLASSES else diffusers_names
    if name not in names.CLASSES:
        *others, last = (*diffusers_names.CLASSES, *wan_names.CLASSES)
        raise ValueError(
            f"cannot read the pipeline's VAE, a {name}: only {', '.join(others)} and {last} are "
            "known"
        )
    with torch.device("meta"):
        model = TemporalVAE.from_config(names.read_config(stock.config))
    given = {names.our_name(key): parameter for key, parameter in stock.named_parameters()}
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
