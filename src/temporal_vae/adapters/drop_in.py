"""A `TemporalVAE` with the interface of diffusers' own VAEs, one class for each of two kinds.

`DiffusersTemporalVAE` stands for `AutoencoderKL` and `AutoencoderKLTemporalDecoder`, which fold the
frames of clips into the batch: N = B*T images (N, C, H, W), and latents (N, L, H/f, W/f).
`DiffusersWanVAE` stands for `AutoencoderKLWan` and `AutoencoderKLQwenImage`, which take clips:
(B, C, 1 + r*k, H, W), and latents (B, L, 1 + k, H/f, W/f).

Pixels are in [-1, 1]; latents are not scaled. B is the number of clips, T that of frames, L that of
latent channels, f the downsample factor, r the number of frames per latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from temporal_vae.checkpoints import wan_names
from temporal_vae.config import TemporalVAEConfig, WanVAEConfig, config_from_dict
from temporal_vae.model import TemporalVAE
from temporal_vae.network.kernels.plain import transformed
from temporal_vae.network.lines import Operation
from temporal_vae.walks.budget import affordable
from temporal_vae.walks.plan import Plan

FORCE_UPCAST = False
"""Whether pipelines shall run a float16 model in float32. Those of diffusers ask for it, since the
VAEs of SDXL and SVD overflow in their wide layers. Ours scales the residual stream instead."""


class DropIn(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """What both kinds have in common: the model, its configuration, and switches of memory.

    `vae` is the `TemporalVAE` that does the work. Both share their weights, so moving or converting
    one does it to both. `config` has what pipelines read.

    Pipelines save it, and load it if the program has imported `temporal_vae`: diffusers does not
    import a library only because a file names it.

    Args:
        model: the fields of a `TemporalVAEConfig` or a `WanVAEConfig`.
        force_upcast: whether pipelines shall run a float16 model in float32, where they ask for it.
    """

    _supports_group_offloading = False  # bounded walks do not call the hooks that it needs
    _supports_gradient_checkpointing = True

    vae: TemporalVAE
    _clips: Callable[..., Tensor]
    """The operation, and what it takes -> clips (B, C, T, H, W), a view."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, model: dict[str, Any], force_upcast: bool = FORCE_UPCAST):
        super().__init__()
        with torch.device("meta" if _no_memory_wanted() else "cpu"):
            self._hold(TemporalVAE.from_config(config_from_dict(model)))

    @classmethod
    def around(cls, vae: TemporalVAE, force_upcast: bool = FORCE_UPCAST) -> Self:
        """The drop-in for a model, which is held, not copied."""
        with torch.device("meta"):
            module: Self = cls(model=vae.config.to_dict(), force_upcast=force_upcast)
        module._hold(vae)
        module.train(vae.training)
        return module

    def _hold(self, vae: TemporalVAE) -> None:
        # Encoder and decoder are the submodules, so that tensors have the names of our own files.
        # The model is set past nn.Module, which would name every tensor a second time.
        self.encoder, self.decoder = vae.encoder, vae.decoder
        object.__setattr__(self, "vae", vae)
        self.memory: int | str | None = None
        """A budget for `TemporalVAE.plan`, or "auto"; None for what `vae` itself is set to."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("encoder", "decoder") and "vae" in self.__dict__:  # which does the work
            setattr(self.vae, name, value)

    @property
    def config(self) -> FrozenDict:
        """The arguments of the constructor, and their values under diffusers' names."""
        return FrozenDict({**self._their_names(), **self._internal_dict})

    def _their_names(self) -> dict[str, Any]:
        """What pipelines read of the configuration, under diffusers' names."""
        raise NotImplementedError

    @property
    def quant_conv(self) -> nn.Module | None:
        """The convolution on the moments; pipelines look at its dtype."""
        return self.vae.encoder.quant_conv

    @property
    def post_quant_conv(self) -> nn.Module | None:
        """The convolution on the latent; pipelines look at its dtype."""
        return self.vae.decoder.post_quant_conv

    def enable_slicing(self) -> None:
        """Walk clips one by one from now on, with the same result."""
        self.vae.enable_slicing()

    def disable_slicing(self) -> None:
        """Walk all clips of a batch at once again."""
        self.vae.disable_slicing()

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        """Walk with the least memory from now on, with the same result.

        Arguments are ignored: there are no tiles whose sizes they could give.
        """
        self.vae.enable_tiling()

    def disable_tiling(self) -> None:
        """Walk as before `enable_tiling`."""
        self.vae.disable_tiling()

    def enable_layerwise_casting(self, *_: Any, **__: Any) -> None:
        """Raises `ValueError`: walks compute in the type of the weights, whatever hooks do."""
        raise ValueError(
            "the weights of this VAE are not cast layer by layer: it computes in the type that "
            "they have, so convert it with .to(torch.bfloat16)"
        )

    def set_attn_processor(self, processor: Any) -> None:
        """Raises `ValueError`: attention is computed here, by torch's fused kernels.

        `fuse_qkv_projections` and the switches for other kernels of attention have no effect, and
        change no result.
        """
        raise ValueError(
            f"attention of this VAE takes no processors, got {processor!r}: it uses torch's "
            "scaled_dot_product_attention"
        )

    def set_default_attn_processor(self) -> None:
        """Nothing: see `set_attn_processor`."""

    def decode_call(self, clips: Tensor) -> tuple[Tensor, dict[str, int]]:
        """The arguments with which `decode` takes clips of latents (B, L, T, h, w)."""
        raise NotImplementedError

    def plan_decode(
        self, z: Tensor, *, device: torch.device | None = None, **frames: int
    ) -> Plan | None:
        """How latents would be decoded, on a device, as `decode` takes them; values do not matter.

        None if `memory` is. Raises `BudgetError` where it is too little, naming the least.
        """
        return self._plan("decode", self._clips("decode", z, **frames), device)

    def _reconstruct(
        self,
        sample: Tensor,
        sample_posterior: bool,
        return_dict: bool,
        generator: torch.Generator | None,
        **frames: int,
    ) -> Any:
        posterior = self.encode(sample, **frames).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict, **frames)

    def _moments(self, clips: Tensor) -> Tensor:
        """Pixels (B, C, T, H, W) -> mean and log-variance, joined, (B, 2*L, ...)."""
        plan = self._plan("encode", clips)
        return torch.cat(self.vae.encode_with_distribution(clips, plan=plan), 1)

    def _check(self, x: Tensor, rank: int, order: str) -> Tensor:
        """The same tensor, if it has such a rank, and the weights have values."""
        if self.device.type == "meta":
            raise ValueError(
                "the weights are on no device; enable_sequential_cpu_offload moves them layer by "
                "layer, which our walks do not support: take enable_model_cpu_offload, and a "
                "memory budget for the activations"
            )
        if x.ndim != rank:
            raise ValueError(f"{order}, got {tuple(x.shape)}")
        return x

    def _own(self, x: Tensor) -> Tensor:
        """In the dtype of the weights, unless under autocast."""
        mixed = torch.is_autocast_enabled(x.device.type)
        return x.to(self.dtype) if x.is_floating_point() and not mixed else x

    def _plan(
        self, operation: Operation, clips: Tensor, device: torch.device | None = None
    ) -> Plan | None:
        """How to walk clips (B, C, T, H, W); None for what `vae` itself is set to."""
        if self.memory is None or self.vae.tiling_enabled or transformed():
            return None
        device = device or self.device
        budget = affordable(self.memory, device)
        runner = self.vae._runner
        wanted = runner.wants_gradients(operation, clips)
        shape = tuple(clips.shape)
        return runner.plan(shape, operation, clips.dtype, budget, device=device, gradients=wanted)

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Like `from_pretrained` of any `ModelMixin`."""
        loaded = super().from_pretrained(*args, **options)
        module: DropIn = loaded[0] if isinstance(loaded, tuple) else loaded
        for line in (module.encoder, module.decoder):
            line.fit_scales()  # from_pretrained set the weights one by one, unseen by the layers
        return loaded


class DiffusersTemporalVAE(DropIn):
    """A drop-in for diffusers' `AutoencoderKL` and `AutoencoderKLTemporalDecoder`; see `DropIn`.

    Made by `temporal_vae.to_diffusers`.
    """

    # a saved pipeline names this module, and diffusers looks the class up in it
    __module__ = "temporal_vae"

    def _their_names(self) -> dict[str, Any]:
        config = self.vae.config
        assert isinstance(config, TemporalVAEConfig)  # see `around`
        return {
            "in_channels": config.input_channels,
            "out_channels": config.input_channels,
            "latent_channels": config.latent_channels,
            "block_out_channels": config.widths,
            "layers_per_block": config.blocks_per_level,
            "scaling_factor": config.latent_scale_factor,
            "shift_factor": config.latent_shift_factor,
            "latents_mean": None,
            "latents_std": None,
            "use_quant_conv": config.quant_conv,
            "use_post_quant_conv": config.post_quant_conv,
        }

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, x: Tensor, return_dict: bool = True, num_frames: int = 1) -> Any:
        """Pixels (N, C, H, W) -> `.latent_dist`, a distribution of latents (N, L, H/f, W/f).

        Its `sample(generator)` draws the same noise as diffusers' VAEs. `num_frames` consecutive
        frames are one clip, which matters only if the encoder looks at other frames.

        Raises `ValueError` as `TemporalVAE.encode` does, for frames that `num_frames` does not
        divide, and for a budget that is too small, naming the least.
        """
        moments = self._moments(self._clips("encode", self._own(x), num_frames=num_frames))
        return _posterior(moments.transpose(1, 2).flatten(0, 1), return_dict)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(
        self,
        z: Tensor,
        num_frames: int = 1,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Latents (N, L, h, w) -> `.sample`, pixels (N, C, f*h, f*w), not clamped.

        `num_frames` consecutive frames are one clip. `generator`, which some pipelines pass, is not
        used. Raises as `encode` does.
        """
        z = self._own(z)
        clips = self._clips("decode", z, num_frames=num_frames)
        plan = self._plan("decode", clips)
        if torch.is_grad_enabled():
            pixels = self.vae.decode(clips, plan=plan).transpose(1, 2).flatten(0, 1)
        else:  # each frame is written to its place, so that there is no second copy of the result
            f, (n, _, h, w) = self.vae.downsample_factor, z.shape
            pixels = z.new_empty(n, self.vae.input_channels, f * h, f * w)
            into = pixels.unflatten(0, (len(clips), -1)).transpose(1, 2)
            self.vae.decode(clips, plan=plan, out=into)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        num_frames: int = 1,
    ) -> Any:
        """Pixels (N, C, H, W) -> `.sample`, their reconstruction; see `encode` and `decode`."""
        return self._reconstruct(
            sample, sample_posterior, return_dict, generator, num_frames=num_frames
        )

    def decode_call(self, clips: Tensor) -> tuple[Tensor, dict[str, int]]:
        """The arguments with which `decode` takes clips of latents (B, L, T, h, w)."""
        return clips.transpose(1, 2).flatten(0, 1), {"num_frames": clips.shape[2]}

    def _clips(self, operation: Operation, x: Tensor, num_frames: int = 1) -> Tensor:
        self._check(x, 4, "diffusers' VAEs take frames as (B*T, C, H, W)")
        count = len(x)
        if isinstance(num_frames, bool) or num_frames < 1 or count % num_frames:
            raise ValueError(
                f"num_frames must be above 0 and divide the {count} frames, got {num_frames!r}"
            )
        reach = self.vae.encode_reach if operation == "encode" else self.vae.decode_reach
        if reach == 0 and not self.vae.slicing_enabled:
            num_frames = count  # no frame depends on another: one clip has the better plans
        clips: Tensor = x.unflatten(0, (-1, num_frames)).transpose(1, 2)
        return clips


class DiffusersWanVAE(DropIn):
    """A drop-in for diffusers' `AutoencoderKLWan` and `AutoencoderKLQwenImage`; see `DropIn`.

    Made by `temporal_vae.to_diffusers`. Unlike those, `encode` takes no number of frames of which
    it would drop some: it must be one behind a multiple of the frames per latent.
    """

    __module__ = "temporal_vae"  # as above

    def _their_names(self) -> dict[str, Any]:
        config = self.vae.config
        assert isinstance(config, WanVAEConfig)  # see `around`
        theirs, _ = wan_names.to_diffusers(config, {})
        return {name: value for name, value in theirs.items() if name != "_class_name"}

    @property
    def temperal_downsample(self) -> list[bool]:
        """For each level but the last, whether it halves the frames; pipelines read it."""
        found: list[bool] = self.config.temperal_downsample
        return found

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Pixels (B, C, 1 + r*k, H, W) -> `.latent_dist`, of latents (B, L, 1 + k, H/f, W/f).

        Its `sample(generator)` draws the same noise as diffusers' VAEs.

        Raises `ValueError` as `TemporalVAE.encode` does, for another number of frames, naming both
        that are nearest, and for a budget that is too small, naming the least.
        """
        return _posterior(self._moments(self._clips("encode", self._own(x))), return_dict)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """Latents (B, L, 1 + k, h, w) -> `.sample`, pixels (B, C, 1 + r*k, f*h, f*w) in [-1, 1].

        They are clamped, as diffusers clamps them. Raises as `encode` does.
        """
        clips = self._clips("decode", self._own(z))
        pixels = self.vae.decode(clips, plan=self._plan("decode", clips))
        clamped = pixels.clamp(-1, 1) if torch.is_grad_enabled() else pixels.clamp_(-1, 1)
        return DecoderOutput(sample=clamped) if return_dict else (clamped,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Pixels (B, C, 1 + r*k, H, W) -> `.sample`, their reconstruction."""
        return self._reconstruct(sample, sample_posterior, return_dict, generator)

    def decode_call(self, clips: Tensor) -> tuple[Tensor, dict[str, int]]:
        """The arguments with which `decode` takes clips of latents (B, L, T, h, w)."""
        return clips, {}

    def _clips(self, operation: Operation, x: Tensor) -> Tensor:
        return self._check(x, 5, "VAEs of Wan's kind take clips as (B, C, T, H, W)")


def drop_in_for(vae: TemporalVAE) -> DropIn:
    """The drop-in for a model, of the kind that its configuration has."""
    kind = DiffusersWanVAE if isinstance(vae.config, WanVAEConfig) else DiffusersTemporalVAE
    module: DropIn = kind.around(vae)
    return module


def _posterior(moments: Tensor, return_dict: bool) -> Any:
    posterior = DiagonalGaussianDistribution(moments)
    return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


def _no_memory_wanted() -> bool:
    """Whether new modules are on the meta device: accelerate does that to load weights later."""
    return nn.Linear(1, 1, bias=False).weight.is_meta
