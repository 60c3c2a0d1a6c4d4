"""Into diffusers and back: `upgrade` for a pipeline, `to_diffusers` for a module.

diffusers is imported when one of them is called, not before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from temporal_vae.checkpoints import diffusers_names
from temporal_vae.model import TemporalVAE
from temporal_vae.walks.budget import parse_budget

if TYPE_CHECKING:
    from temporal_vae.adapters.drop_in import DiffusersTemporalVAE


def to_diffusers(vae: TemporalVAE) -> DiffusersTemporalVAE:
    """A module that diffusers' pipelines take for their VAE: in a constructor, or as `pipe.vae`.

    It shares every weight with `vae`, and has what pipelines use: `config`, `dtype`, `device`,
    `encode(x).latent_dist`, `decode(z, num_frames=...).sample`, `forward`, and the switches for
    slicing and tiling, which change no result here. Tensors are diffusers': frames (B*T, C, H, W)
    in [-1, 1]. A pipeline with it saves and loads, after `import temporal_vae`.

    A pipeline that cuts clips itself still does: see `upgrade`.

    Raises `ImportError` without diffusers, naming the extra that has it.
    """
    module: DiffusersTemporalVAE = _drop_in_class().around(vae)
    return module


def upgrade(pipe: Any, memory: int | str | None = "6GiB") -> Upgrade:
    """Our VAE with the pipeline's own weights into a diffusers pipeline, and its way to decode too.

    A video is decoded as one clip, so `decode_chunk_size` has no influence on it; a large image
    without tiles. What that takes stays within `memory`, and the result is the same for any.

    The weights are the pipeline's own tensors, used by both modules: no byte more. Moving or
    converting the pipeline moves both; offload of whole models (`enable_model_cpu_offload`) stays
    as it is. Images are encoded in the pipeline's dtype, where diffusers takes float32 for some:
    float16 does not overflow here. What the pipeline does with the pixels afterwards comes on top
    of `memory`.

    Args:
        pipe: a `StableVideoDiffusionPipeline`, an `AnimateDiffPipeline`, or a pipeline of Stable
            Diffusion, SDXL or FLUX that makes images from text, images or inpainting.
        memory: budget over weights and latents, the pixels included: a number of bytes, words such
            as "6GiB", "least", "auto" for what is free, or None for any. Where less is free, that
            is taken.

    Returns:
        An `Upgrade`: its `undo()` gives the pipeline back as it was; its `vae` is our model.

    Raises:
        ImportError: without diffusers, naming the extra that has it.
        ValueError: for another pipeline, a VAE or weights that cannot be read, a pipeline that is
            upgraded already, offload by layers, or what is no budget. A budget that is too small is
            seen where the size of the video is known: when it is decoded, naming the least.
    """
    drop_in = _drop_in_class()
    if memory != "auto":
        parse_budget(memory)
    takeover = _takeover(pipe)
    previous = pipe.__dict__.get(_MARK)
    if previous is not None and pipe.vae is previous.module:
        raise ValueError("the pipeline is upgraded already: its undo() comes first")
    _refuse_hooks(pipe)
    stock = pipe.vae
    vae = stock.vae if isinstance(stock, drop_in) else _with_weights_of(stock)
    if previous is not None:  # someone has put another VAE in its place
        previous.undo()
    module = drop_in.around(vae)
    module.memory = memory
    done = Upgrade(pipe, vae, module, stock, pipe.__dict__.get("decode_latents"), takeover)
    done._apply()
    return done


@dataclass(eq=False)
class Upgrade:
    """An upgraded pipeline, and the way back."""

    pipe: Any
    vae: TemporalVAE
    """Our model, with the pipeline's own weights."""
    module: Any
    """The pipeline's VAE now, a `DiffusersTemporalVAE`; its `memory` may be changed."""
    stock: Any
    """The VAE that was there before."""
    _own_decode: Any
    _takeover: Callable[..., Tensor] | None

    def _apply(self) -> None:
        with _without_hooks(self.pipe):
            self.pipe.vae = self.module
        if self._takeover is not None:
            self._takeover = partial(self._takeover, self.pipe)
            self.pipe.decode_latents = self._takeover
        setattr(self.pipe, _MARK, self)

    def undo(self) -> None:
        """The same VAE object and the same methods as before; what else was put there stays.

        Weights are where, and of the dtype, that the pipeline has moved them to since.
        """
        if self.pipe.vae is self.module:
            with _without_hooks(self.pipe):
                self.pipe.vae = self.stock
        own = self.pipe.__dict__
        if self._takeover is not None and own.get("decode_latents") is self._takeover:
            del self.pipe.decode_latents
            if self._own_decode is not None:
                self.pipe.decode_latents = self._own_decode
        if own.get(_MARK) is self:
            delattr(self.pipe, _MARK)


_MARK = "_temporal_vae_upgrade"


def _drop_in_class() -> Any:
    try:
        from temporal_vae.adapters.drop_in import DiffusersTemporalVAE
    except ImportError as error:
        raise ImportError(
            f"this needs diffusers ({error}): pip install 'temporal-video-vae[diffusers]'"
        ) from error
    return DiffusersTemporalVAE


# How pipelines decode ------------------------------------------------------------------------


def _decode_svd(pipe: Any, latents: Tensor, num_frames: int, decode_chunk_size: int = 0) -> Tensor:
    """Scaled latents (B, T, L, h, w) -> pixels (B, C, T, H, W), float32; no chunks."""
    if not isinstance(pipe.vae, _drop_in_class()):  # someone has put another VAE in its place
        return _as_before(pipe, latents, num_frames, decode_chunk_size or num_frames)
    return _decode_clips(pipe, latents.flatten(0, 1), num_frames)


def _decode_animatediff(pipe: Any, latents: Tensor, decode_chunk_size: int = 0) -> Tensor:
    """Scaled latents (B, L, T, h, w) -> pixels (B, C, T, H, W), float32; no chunks."""
    if not isinstance(pipe.vae, _drop_in_class()):
        return _as_before(pipe, latents, decode_chunk_size or latents.shape[2])
    return _decode_clips(pipe, latents.transpose(1, 2).flatten(0, 1), latents.shape[2])


def _as_before(pipe: Any, *args: Any) -> Tensor:
    pixels: Tensor = type(pipe).decode_latents(pipe, *args)
    return pixels


def _decode_clips(pipe: Any, frames: Tensor, num_frames: int) -> Tensor:
    frames = 1 / pipe.vae.config.scaling_factor * frames
    pixels = pipe.vae.decode(frames, num_frames=num_frames).sample
    clips: Tensor = pixels.unflatten(0, (-1, num_frames)).transpose(1, 2)
    return clips.float()


_TAKEOVERS: dict[str, Callable[..., Tensor] | None] = {
    "StableVideoDiffusionPipeline": _decode_svd,
    "AnimateDiffPipeline": _decode_animatediff,
    # these hand all their latents to the VAE at once
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


def _takeover(pipe: Any) -> Callable[..., Tensor] | None:
    """How the pipeline is to decode; None as it does. Raises `ValueError` for an unknown one."""
    for ancestor in type(pipe).__mro__:
        if ancestor.__module__.startswith("diffusers.") and ancestor.__name__ in _TAKEOVERS:
            takeover = _TAKEOVERS[ancestor.__name__]
            if takeover and type(pipe).decode_latents is not vars(ancestor)["decode_latents"]:
                raise ValueError(
                    f"{type(pipe).__name__} has a decode_latents of its own, which an upgrade "
                    "would replace: put temporal_vae.to_diffusers(vae) into it as its vae"
                )
            return takeover
    raise ValueError(
        f"cannot upgrade a {type(pipe).__name__}: only {', '.join(_TAKEOVERS)}; another pipeline "
        "may work with temporal_vae.to_diffusers(vae) as its vae"
    )


# Weights and hooks ---------------------------------------------------------------------------


def _with_weights_of(stock: Any) -> TemporalVAE:
    """Our model around the very parameters of one of diffusers' VAEs."""
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
    for key, parameter in wanted.items():  # loading would thaw what is frozen
        parameter.requires_grad_(given[key].requires_grad)
    # The parameters themselves, not only their storage: to() on either module moves both.
    model.load_state_dict(given, assign=True)
    return model.train(stock.training)


def _refuse_hooks(pipe: Any) -> None:
    """Raise `ValueError` where hooks on layers move weights, since our walks do not call them."""
    if pipe.hf_device_map is not None:
        raise ValueError("the pipeline has a device map: call pipe.reset_device_map() first")
    layers = list(pipe.vae.modules()) if isinstance(pipe.vae, nn.Module) else []
    if pipe.__dict__.get("_all_hooks"):
        layers = layers[1:]  # the one of enable_model_cpu_offload stands on the whole VAE
    if any(hasattr(layer, hook) for layer in layers for hook in ("_hf_hook", "_diffusers_hook")):
        raise ValueError(
            "the pipeline's VAE is offloaded by layers: take enable_model_cpu_offload instead of "
            "enable_sequential_cpu_offload or group offload, and `memory` for the activations"
        )


@contextlib.contextmanager
def _without_hooks(pipe: Any) -> Iterator[None]:
    """The hooks of enable_model_cpu_offload off while a module is changed, then on all again."""
    offloaded = bool(pipe.__dict__.get("_all_hooks"))
    if offloaded:
        pipe.remove_all_hooks()
    try:
        yield
    finally:
        if offloaded:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
