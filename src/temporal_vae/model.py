"""`TemporalVAE`: pixels of a video to latents and back.

Letters: B batch, C input channels, L latent channels, T frames, H height, W width, f downsample
factor. Pixels are in [-1, 1]; tensors are (B, C, T, H, W) for video and (B, C, H, W) for images,
which are videos of one frame.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from fractions import Fraction
from functools import lru_cache, partial
from typing import Literal, Self, Unpack

import torch
from torch import Tensor, nn

from temporal_vae import checkpoint, geometry, losses
from temporal_vae.config import NormScope, TemporalOptions, TemporalVAEConfig
from temporal_vae.latents import LatentDistribution, ModelRecord, weights_sha256
from temporal_vae.layers import Timewise, draw_parameters, start_as_identity
from temporal_vae.network import Decoder, Encoder
from temporal_vae.walks import bounded, streamed
from temporal_vae.walks.available import available_bytes
from temporal_vae.walks.bounded import Bounds
from temporal_vae.walks.plan import (
    Budget,
    Offload,
    Operation,
    Plan,
    Question,
    make_plan,
    parse_budget,
)

LossFunction = Callable[[Tensor, Tensor], Tensor]
Layout = Literal["BCTHW", "BTCHW"]
StreamState = streamed.State
Stream = streamed.Stream


class TemporalVAE(nn.Module):
    """A variational autoencoder for video: 2-D spatial blocks with 1-D temporal blocks between.

    The encoder maps pixels (B, C, T, H, W) to latents (B, L, T, H/f, W/f), the decoder maps them
    back; time is never compressed. A new model is an image VAE frame by frame, until training
    wakes its temporal layers. Decoded pixels are not clamped: a trained model stays near [-1, 1].

    Sources: Rombach et al. 2022 (arXiv 2112.10752) for the spatial line, Blattmann et al. 2023
    (arXiv 2304.08818, 2311.15127) for the temporal layers.

    Args:
        input_channels: channels of a pixel: 1 grey, 3 RGB, 4 RGBA.
        latent_channels: channels of a latent cell.
        base_channels: width of the finest level.
        channel_multipliers: width of each level in units of `base_channels`, finest first; None
            means (1, 2, 4, 4). Each level but the last halves height and width.
        num_temporal_layers: temporal blocks after each spatial block; 0 makes an image VAE.
        temporal_kernel_size: frames a temporal convolution sees; odd.
        causal_mode: a frame depends on itself and the past only.
        latent_scale_factor: multiplier that brings latents to unit variance; None means 0.18215.
        loss_function: `(prediction, target) -> scalar`; None means mean squared error.
        seed: makes weights and the model's own sampling noise reproducible. The global random
            state is never touched; without a seed each model is drawn afresh.
        latent_shift_factor: subtracted from a latent before it is scaled.
        blocks_per_level: spatial residual blocks per encoder level; the decoder has one more.
        norm_groups: groups of every group norm; None takes a number that fits each width.
        quant_conv: a 1x1 convolution on the moments.
        post_quant_conv: a 1x1 convolution on the latent before decoding.
        temporal_encoder: whether the encoder has temporal layers; SVD's has none.
        temporal_attention_reach: frames temporal attention sees, back and (unless causal) ahead.
        temporal_norm: temporal blocks normalise one "position", or over the "clip" (SVD).
        time_conv_out: a last temporal convolution on the pixels (SVD).
        clip_frames: clip length the model was made for; required with `temporal_norm="clip"`.

    Raises:
        ValueError: for any argument that could not make a working model.
    """

    def __init__(
        self,
        input_channels: int = 3,
        latent_channels: int = 4,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] | None = None,
        num_temporal_layers: int = 1,
        temporal_kernel_size: int = 3,
        causal_mode: bool = False,
        latent_scale_factor: float | None = None,
        loss_function: LossFunction | None = None,
        seed: int | None = None,
        *,
        latent_shift_factor: float = 0.0,
        blocks_per_level: int = 2,
        norm_groups: int | None = None,
        quant_conv: bool = True,
        post_quant_conv: bool = True,
        temporal_encoder: bool = True,
        temporal_attention_reach: int = 8,
        temporal_norm: NormScope = "position",
        time_conv_out: bool = False,
        clip_frames: int | None = None,
    ):
        super().__init__()
        if channel_multipliers is None:
            channel_multipliers = (1, 2, 4, 4)
        if latent_scale_factor is None:
            latent_scale_factor = 0.18215
        if loss_function is not None and not callable(loss_function):
            raise ValueError(
                f"loss_function must be callable as (prediction, target) -> scalar, "
                f"got {loss_function!r}"
            )
        self.config = TemporalVAEConfig(
            input_channels=input_channels,
            latent_channels=latent_channels,
            base_channels=base_channels,
            channel_multipliers=channel_multipliers,  # type: ignore[arg-type]
            num_temporal_layers=num_temporal_layers,
            temporal_kernel_size=temporal_kernel_size,
            causal_mode=causal_mode,
            latent_scale_factor=latent_scale_factor,
            latent_shift_factor=latent_shift_factor,
            blocks_per_level=blocks_per_level,
            norm_groups=norm_groups,
            quant_conv=quant_conv,
            post_quant_conv=post_quant_conv,
            temporal_encoder=temporal_encoder,
            temporal_attention_reach=temporal_attention_reach,
            temporal_norm=temporal_norm,
            time_conv_out=time_conv_out,
            clip_frames=clip_frames,
        )
        self.default_loss_function: LossFunction = loss_function or losses.mean_squared_error
        self._generator = _seeded(seed)
        self._slicing = self._tiling = False
        self._budget: Budget = None
        with torch.device("meta"):  # torch's layers would draw from the global random state
            self.encoder = Encoder(self.config)
            self.decoder = Decoder(self.config)
        if torch.get_default_device().type == "meta":
            return  # as torch's own layers: shapes alone are wanted, to be filled from a file
        self.to_empty(device="cpu")
        draw_parameters(self, self._generator)
        if self.decoder.time_conv_out is not None:
            start_as_identity(self.decoder.time_conv_out)

    @classmethod
    def from_config(
        cls,
        config: TemporalVAEConfig,
        loss_function: LossFunction | None = None,
        seed: int | None = None,
    ) -> Self:
        """A new model of this architecture; see the class for `loss_function` and `seed`."""
        options = {field.name: getattr(config, field.name) for field in fields(config)}
        return cls(**options, loss_function=loss_function, seed=seed)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        latent_scale_factor: float | None = None,
        latent_shift_factor: float | None = None,
    ) -> Self:
        """Load a model: ours, diffusers' SVD and image VAEs, or Stability's and CompVis' own files.

        Weights give the numbers their own library gives. float32 weights on the CPU stay mapped
        from their file, so do not overwrite it in place while the model is in use (what this
        library and diffusers write replaces files as a whole).

        Args:
            path_or_hub_id: a built-in name such as "tiny" first, else a folder that
                `save_pretrained` of this library or of diffusers wrote, else a .safetensors file
                with the keys of CompVis' or Stability's code, alone or in a whole checkpoint, else
                a repository of the Hugging Face Hub, owner/name: only its config.json and
                safetensors are fetched, and its cache serves without the network.
            subfolder: of the folder or repository, such as "vae" in a pipeline.
            revision: branch, tag or commit of a repository; None means its main branch.
            variant: weights of another name, such as "fp16".
            dtype: of the weights; None means float32, whatever the file has.
            device: None means the CPU.
            latent_scale_factor: instead of the stored one; a single file does not always tell.
            latent_shift_factor: likewise.

        Raises:
            FileNotFoundError: when there is no such model.
            OSError: when the Hub cannot be asked, and its cache has no such model.
            ValueError: when a file is a pickle, damaged, of another class, has an option without
                counterpart here, or does not fit its configuration; or an option has no effect.
        """
        source = checkpoint.Source(path_or_hub_id, subfolder, revision, variant)
        stored = checkpoint.open_model(source, **_given(latent_scale_factor, latent_shift_factor))
        dtype = _floating(dtype)
        with torch.device("meta"):
            model = cls.from_config(stored.config)
        checkpoint.check_fit(stored, model.state_dict())
        checkpoint.fill(model, stored, dtype, device)
        return model

    @classmethod
    def from_image_vae(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        latent_scale_factor: float | None = None,
        latent_shift_factor: float | None = None,
        seed: int | None = None,
        **temporal: Unpack[TemporalOptions],
    ) -> Self:
        """An image VAE with temporal layers added: until it is trained, that image VAE, frame by frame.

        Takes what `from_pretrained` takes, if it is an image VAE. `temporal` are the temporal
        options of the class, at their defaults there (one layer after each block); `seed` draws
        their weights. `time_conv_out`, where there is one, starts as the identity.

        Raises as `from_pretrained`, and `ValueError` for a model that has temporal layers already.
        """
        source = checkpoint.Source(path_or_hub_id, subfolder, revision, variant)
        stored = checkpoint.open_model(source, **_given(latent_scale_factor, latent_shift_factor))
        config, dtype = stored.config.inflated(**temporal), _floating(dtype)
        with torch.device("meta"):
            image = cls.from_config(stored.config)
        checkpoint.check_fit(stored, image.state_dict())
        model = cls.from_config(config, seed=seed).to(device=device, dtype=dtype)
        checkpoint.fill(model, stored, dtype, device)
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        format: Literal["temporal_vae", "diffusers"] = "temporal_vae",
    ) -> None:
        """Write configuration and weights, in the weights' own dtype, into `folder`.

        "diffusers" writes what its `AutoencoderKLTemporalDecoder` (SVD's layout) or `AutoencoderKL`
        (no temporal layers) loads; `clip_frames` and options without effect are not kept there.

        Raises `ValueError` naming what that format cannot express; `OSError` if it cannot write.
        """
        checkpoint.save(folder, self.config, self.state_dict(), format)

    # Properties ------------------------------------------------------------------------------

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent cell along height and width: 2 ** (levels - 1)."""
        return self.config.downsample_factor

    @property
    def input_channels(self) -> int:
        """Channels of a pixel."""
        return self.config.input_channels

    @property
    def latent_channels(self) -> int:
        """Channels of a latent cell."""
        return self.config.latent_channels

    @property
    def latent_scale_factor(self) -> float:
        """Multiplier that brings latents to about unit variance."""
        return self.config.latent_scale_factor

    @property
    def is_causal(self) -> bool:
        """Whether a frame depends on itself and the past only."""
        return self.config.causal_mode

    @property
    def temporal_kernel_size(self) -> int:
        """Frames that a temporal convolution sees."""
        return self.config.temporal_kernel_size

    @property
    def encode_reach(self) -> int | None:
        """Frames that a latent depends on in each direction (back only when causal).

        None when it depends on the whole clip, through a norm over time.
        """
        return None if self.encoder.reach is None else self.encoder.reach[0]

    @property
    def decode_reach(self) -> int | None:
        """Latent frames that a decoded frame depends on in each direction; see `encode_reach`."""
        return None if self.decoder.reach is None else self.decoder.reach[0]

    @property
    def parameter_count(self) -> int:
        """Number of trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def supports_slicing(self) -> bool:
        """Whether a batch can be walked one sample at a time: yes, with the same result."""
        return True

    @property
    def supports_tiling(self) -> bool:
        """Whether a clip can be walked in small pieces: yes, with the same result, seamless."""
        return True

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights, and so of inputs and results."""
        return self.encoder.conv_in.weight.dtype

    @property
    def stream_scales(self) -> dict[str, float]:
        """What encoder and decoder carry their residual stream multiplied by.

        1.0, or in float16 the power of two that a probe of the weights found to keep it finite.
        """
        lines = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: line.ready().stream_scale for name, line in lines.items()}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.conv_in.weight.device

    # Memory ----------------------------------------------------------------------------------

    def plan(
        self,
        shape: Sequence[int],
        operation: Operation = "decode",
        dtype: torch.dtype | None = None,
        budget: Budget = None,
        *,
        stream: bool = False,
        offload: Offload = None,
    ) -> Plan:
        """The fastest walk of an input of this shape within a budget, and what it takes.

        Args:
            shape: of the input, (B, C, T, H, W) or (B, C, H, W): latents to decode, or pixels.
            operation: "decode" or "encode".
            dtype: the model's own if None.
            budget: memory over the weights and the input, the result included: a number of bytes,
                words such as "6GiB", "least" (or a little more, where that is faster), or None for
                any. No budget changes the result.
            stream: plan the steps of a stream; the shape is that of the largest piece.
            offload: where the clip's activation is to lie: "host" for the memory of the CPU, or a
                folder on disk. On CUDA "host" is taken by itself where nothing else fits.

        Raises:
            ValueError: for a budget that cannot be met, naming the smallest that can, and on the CPU
                for one above the memory that is free.
        """
        if operation not in ("encode", "decode"):
            raise ValueError(f"operation must be 'encode' or 'decode', got {operation!r}")
        if len(shape) not in (4, 5):
            raise ValueError(f"shape must be (B, C, T, H, W) or (B, C, H, W), got {tuple(shape)}")
        full = tuple(shape) if len(shape) == 5 else (*shape[:2], 1, *shape[2:])
        if not all(isinstance(n, int) and n > 0 for n in full):
            raise ValueError(f"shape must be whole numbers above 0, got {tuple(shape)}")
        pixels = operation == "encode"
        channels = self.input_channels if pixels else self.latent_channels
        if full[1] != channels:
            raise ValueError(f"to {operation}, shape must have {channels} channels, got {full[1]}")
        problem = geometry.indivisible(full[3], full[4], self.downsample_factor)
        if pixels and problem:
            raise ValueError(problem)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating point, got {dtype}")
        self._check_budget(budget)
        if stream and self._line(operation).reach is None:
            raise ValueError(
                f"this model normalises over the whole clip, so it cannot {operation} a stream"
            )
        places: tuple[Offload, ...] = (None,)
        if offload is not None:
            if offload == "host" and self.device.type == "cpu":
                raise ValueError("offload='host' is for a model on a GPU; this one is on the CPU")
            known = offload == "host" or isinstance(offload, (str, os.PathLike))
            if not known or (offload != "host" and not os.path.isdir(offload)):
                raise ValueError(f"offload must be 'host' or a folder, got {offload!r}")
            if offload != "host" and self.device.type != "cpu":
                raise ValueError(
                    f"offload to a folder needs the model on the CPU, it is on {self.device}: "
                    "take 'host'"
                )
            places = (offload,)
        elif self.device.type == "cuda" and budget is not None:
            places = (None, "host")
        asked = Question(operation, full, dtype or self.dtype, budget, stream, places, self.device)
        return _make_plan(self.config, asked)

    def _check_budget(self, budget: Budget) -> None:
        limit = parse_budget(budget)
        if isinstance(limit, int) and self.device.type == "cpu":
            free = available_bytes(self.device)
            if free is not None and limit > free:
                raise ValueError(
                    f"the budget {budget!r} is above the memory that is free, {free} bytes "
                    f"({free / 2**30:.3f} GiB): give less, or free some"
                )

    def _line(self, operation: Operation) -> Encoder | Decoder:
        return self.encoder.ready() if operation == "encode" else self.decoder.ready()

    def set_slicing_enabled(self, enabled: bool) -> None:
        """Walk the samples of a batch one by one from now on; the result stays the same."""
        self._slicing = bool(enabled)

    def set_tiling_enabled(self, enabled: bool) -> None:
        """Walk with the least memory from now on; the result stays the same. Needs `no_grad`.

        It goes before a memory budget, which holds again once it is off.
        """
        self._tiling = bool(enabled)

    def set_memory_budget(self, budget: Budget) -> None:
        """Plan every encode and decode for this budget from now on, see `plan`; None ends it.

        The steps of a stream are planned as well, each piece as it comes. A budget counts walks
        without gradients: under autograd the graph comes on top, and a bounded walk is refused.
        Raises `ValueError` for what is no budget.
        """
        parse_budget(budget)
        self._budget = budget

    @property
    def slicing_enabled(self) -> bool:
        """Whether the samples of a batch are walked one by one."""
        return self._slicing

    @property
    def tiling_enabled(self) -> bool:
        """Whether every walk is the one of least memory."""
        return self._tiling

    @property
    def memory_budget(self) -> Budget:
        """The budget that `set_memory_budget` stored."""
        return self._budget

    def _walk(
        self, operation: Operation, clip: Tensor, plan: Plan | None, out: Tensor | None = None
    ) -> Tensor:
        """The encoder or decoder over a clip (B, C, T, H, W), as planned or as stored."""
        plan = self._plan_for(operation, clip, plan)
        while True:
            try:
                return self._walk_once(operation, clip, plan, out)
            except torch.OutOfMemoryError:  # only a GPU raises it: take less, from the start
                if plan is None or (smaller := self._smaller(plan)) is None:
                    raise
                plan = smaller

    def _walk_once(
        self, operation: Operation, clip: Tensor, plan: Plan | None, out: Tensor | None
    ) -> Tensor:
        line = self._line(operation)
        if plan is not None and plan.bounds is not None:
            return bounded.walk(line, clip, plan.bounds, out)
        samples = clip.split(1) if self._slicing else (clip,)
        y = torch.cat([line(x) for x in samples]) if len(samples) > 1 else line(clip)
        return y if out is None else out.copy_(y)

    def _plan_for(
        self, operation: Operation, clip: Tensor, plan: Plan | None, *, stream: bool = False
    ) -> Plan | None:
        """The plan that was given, if it fits the input, or one for what the setters stored."""
        shape, budget = tuple(clip.shape), "least" if self._tiling else self._budget
        if plan is None:
            if budget is None or (stream and self._line(operation).reach is None):
                return None
            return self.plan(shape, operation, clip.dtype, budget, stream=stream)
        if not isinstance(plan, Plan):
            raise ValueError(f"plan must be what plan(...) gives, got {plan!r}")
        fits = (plan.operation, plan.dtype, plan.stream) == (operation, clip.dtype, stream)
        if stream:  # a shorter piece takes less
            fits = fits and shape[2] <= plan.shape[2]
            shape = (*shape[:2], plan.shape[2], *shape[3:])
        if not fits or plan.shape != shape:
            made_for = (plan.operation, plan.shape, plan.dtype, f"stream={plan.stream}")
            got = (operation, tuple(clip.shape), clip.dtype, f"stream={stream}")
            raise ValueError(
                f"the plan is for {made_for}, not for {got}: make one with plan(shape, operation, "
                "dtype)"
            )
        return plan

    def _smaller(self, plan: Plan) -> Plan | None:
        """A plan for the same with a third less memory, or as much less as can be."""
        for budget in (plan.peak_bytes * 2 // 3, "least"):
            with contextlib.suppress(ValueError):
                smaller = self.plan(
                    plan.shape, plan.operation, plan.dtype, budget, stream=plan.stream
                )
                if smaller.peak_bytes < plan.peak_bytes:
                    return smaller
        return None

    # Pixels to latents -----------------------------------------------------------------------

    def encode_with_distribution(
        self, video: Tensor, *, layout: Layout = "BCTHW", plan: Plan | None = None
    ) -> LatentDistribution:
        """The posterior of a video: `mean, log_variance = ...`, each shaped like the latent.

        Args:
            video: pixels in [-1, 1], (B, C, T, H, W) or an image (B, C, H, W); H and W multiples
                of `downsample_factor`.
            layout: "BTCHW" if the frames stand before the channels, in the result as well.
            plan: how to walk, from `plan`; None means as the setters say, the whole clip if nothing.

        Returns:
            Mean and log-variance, (B, L, T, H/f, W/f) or (B, L, H/f, W/f); the log-variance is
            clamped to [-30, 20]. Not scaled.

        Raises:
            ValueError: for a wrong rank, number of channels, size, dtype or device.
        """
        clip = self._pixels(video, "video", layout)
        moments = _restore(self._walk("encode", clip, plan), video, layout="BCTHW")
        mean, log_variance = LatentDistribution.from_moments(moments)
        return LatentDistribution(_relayout(mean, layout), _relayout(log_variance, layout))

    def encode(
        self,
        video: Tensor,
        sample_mode: bool = True,
        generator: torch.Generator | None = None,
        *,
        layout: Layout = "BCTHW",
        plan: Plan | None = None,
    ) -> Tensor:
        """Latents of a video, (B, L, T, H/f, W/f), not scaled; arguments as in the methods around.

        `sample_mode=True` draws from the posterior, with `generator` or the model's own one;
        False gives the posterior mean.
        """
        mean, log_variance = self.encode_with_distribution(video, layout=layout, plan=plan)
        if not sample_mode:
            return mean
        drawn = self.sample(
            _relayout(mean, layout), _relayout(log_variance, layout), generator=generator
        )
        return _relayout(drawn, layout)

    def sample(
        self,
        mean: Tensor,
        log_variance: Tensor,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """mean + exp(log_variance / 2) * noise, differentiable in both.

        With `seed` the noise is the same each time; with `generator` it is drawn from that; with
        neither from the model's own generator, which moves on.

        Raises `ValueError` for shapes that differ or are no latent's, or for both `seed` and
        `generator`.
        """
        if mean.shape != log_variance.shape:
            raise ValueError(
                f"mean and log_variance must have one shape, got {tuple(mean.shape)} and "
                f"{tuple(log_variance.shape)}"
            )
        if mean.ndim not in (4, 5):
            raise ValueError(
                f"moments must be (B, L, T, h, w) or (B, L, h, w), got {mean.ndim} axes"
            )
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        source = generator if seed is None else _seeded(seed)
        return LatentDistribution(mean, log_variance).sample(source or self._generator)

    # Latents to pixels -----------------------------------------------------------------------

    def decode(
        self,
        latent: Tensor,
        *,
        layout: Layout = "BCTHW",
        plan: Plan | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Pixels of an unscaled latent: (B, L, T, h, w) -> (B, C, T, f*h, f*w); images likewise.

        Deterministic and not clamped. With a `plan` memory is bounded and the result the same. With
        `out`, of the result's shape and any dtype or device, the frames are written there, in the
        bounded walk each as it is made, and `out` is returned; see `iter_decode` as well.
        Raises `ValueError` for a wrong rank, number of channels, dtype or device.
        """
        clip = self._clip(latent, self.latent_channels, "latent", layout)
        if out is None:
            return _restore(self._walk("decode", clip, plan), latent, layout)
        target = out.unsqueeze(2) if latent.ndim == 4 else _relayout(out, layout)
        shape = bounded.result_shape(self.decoder.layers(), tuple(clip.shape))
        if tuple(target.shape) != shape:
            raise ValueError(f"out must hold {shape} as {layout}, got {tuple(out.shape)}")
        if torch.is_grad_enabled() and (clip.requires_grad or self._trains(self.decoder)):
            raise ValueError("what is written into `out` has no gradient: use torch.no_grad()")
        self._walk("decode", clip, plan, target)
        return out

    def iter_decode(self, latent: Tensor, *, plan: Plan | None = None) -> Iterator[Tensor]:
        """`decode` of one clip (1, L, T, h, w), its frames (1, C, n, f*h, f*w) as they are made.

        For what takes frame after frame, such as a video writer: the result is never whole in
        memory. Without a plan, or with one of the whole walk, all frames come at once.
        Raises `ValueError` as `decode`, and for more than one sample.
        """
        clip = self._clip(self._piece(latent, "latent"), self.latent_channels, "latent", "BCTHW")
        if len(clip) != 1:
            raise ValueError(f"iter_decode takes one clip, got a batch of {len(clip)}")
        plan = self._plan_for("decode", clip, plan)
        if plan is None or plan.bounds is None:
            return iter([self._walk("decode", clip, plan).contiguous()])
        return bounded.pieces(self._line("decode"), clip.clone(), plan.bounds)

    def _trains(self, module: nn.Module) -> bool:
        return any(parameter.requires_grad for parameter in module.parameters())

    # Streams ---------------------------------------------------------------------------------

    def encode_step(
        self,
        frames: Tensor,
        state: StreamState | None = None,
        sample_mode: bool = True,
        generator: torch.Generator | None = None,
        plan: Plan | None = None,
    ) -> tuple[Tensor | None, StreamState]:
        """The next frames of a stream (B, C, n, H, W) -> latents that are certain, and the state.

        A causal model gives n latents, another one all that its `encode_reach` allows, None if that
        is none; `encode_finish` gives the rest. Any cutting gives the latents of the whole, sampled
        ones too, if one generator serves the stream. A state is a plain value, a nested tuple of
        tensors: keep it, copy it, go back to it, move it; joined along the batch it carries many
        streams. It is never changed. With a `plan` made for a stream the step is walked bounded.

        Raises:
            ValueError: as `encode`, and for a model with a norm over the clip, or a state of another
                model, size or dtype.
        """
        clip = self._pixels(self._piece(frames, "frames"), "frames")
        moments, state = self._step("encode", clip, state, plan)
        return moments if moments is None else self._latents(moments, sample_mode, generator), state

    def encode_finish(
        self,
        state: StreamState | None,
        sample_mode: bool = True,
        generator: torch.Generator | None = None,
        plan: Plan | None = None,
    ) -> Tensor | None:
        """The latents that an ended stream still owes; None if it owes none."""
        owed = list(self._owed_latents(state, sample_mode, generator, plan))
        return torch.cat(owed, 2) if owed else None

    def decode_step(
        self, latents: Tensor, state: StreamState | None = None, plan: Plan | None = None
    ) -> tuple[Tensor | None, StreamState]:
        """The next latents of a stream (B, L, n, h, w) -> frames that are certain, and the state.

        See `encode_step`; `decode_finish` gives the rest.
        """
        clip = self._clip(self._piece(latents, "latents"), self.latent_channels, "latents", "BCTHW")
        frames, state = self._step("decode", clip, state, plan)
        return None if frames is None else frames.contiguous(), state

    def decode_finish(self, state: StreamState | None, plan: Plan | None = None) -> Tensor | None:
        """The frames that an ended stream still owes; None if it owes none."""
        owed = list(self._owed_frames(state, plan))
        return torch.cat(owed, 2) if owed else None

    def encode_stream(
        self,
        sample_mode: bool = True,
        generator: torch.Generator | None = None,
        plan: Plan | None = None,
    ) -> Stream:
        """A stream to push frames into and get latents from; see `encode_step`."""
        how = (sample_mode, generator, plan)
        return Stream(
            lambda frames, state: self.encode_step(frames, state, *how),
            lambda state: self._owed_latents(state, *how),
        )

    def moments_stream(self, plan: Plan | None = None) -> Stream:
        """A stream to push frames into and get moments from, (B, 2*L, n, h, w); see `encode_step`.

        They are the mean and the clamped log-variance of `encode_with_distribution`, joined.
        """

        def step(frames: Tensor, state: StreamState) -> tuple[Tensor | None, StreamState]:
            clip = self._pixels(self._piece(frames, "frames"), "frames")
            moments, state = self._step("encode", clip, state, plan)
            return None if moments is None else _clamped(moments), state

        return Stream(step, lambda state: map(_clamped, self._owed("encode", state, plan)))

    def decode_stream(self, plan: Plan | None = None) -> Stream:
        """A stream to push latents into and get frames from; see `decode_step`."""
        return Stream(partial(self.decode_step, plan=plan), partial(self._owed_frames, plan=plan))

    def _step(
        self, operation: Operation, clip: Tensor, state: StreamState | None, plan: Plan | None
    ) -> tuple[Tensor | None, StreamState]:
        plan = self._plan_for(operation, clip, plan, stream=True)
        while True:
            try:
                return streamed.step(self._line(operation), clip, state, _bounds(plan))
            except torch.OutOfMemoryError:
                if plan is None or (smaller := self._smaller(plan)) is None:
                    raise
                plan = smaller

    def _owed_latents(
        self,
        state: StreamState | None,
        sample_mode: bool,
        generator: torch.Generator | None,
        plan: Plan | None,
    ) -> Iterator[Tensor]:
        for moments in self._owed("encode", state, plan):
            yield self._latents(moments, sample_mode, generator)

    def _owed_frames(self, state: StreamState | None, plan: Plan | None) -> Iterator[Tensor]:
        for frames in self._owed("decode", state, plan):
            yield frames.contiguous()

    def _owed(
        self, operation: Operation, state: StreamState | None, plan: Plan | None
    ) -> Iterator[Tensor]:
        line = self._line(operation)
        first = next((memory for memory in state or () if memory), None)
        if first is not None:  # the end is walked frame by frame
            plan = self._plan_for(operation, self._frame_of(line, first), plan, stream=True)
        return streamed.finish(line, state, _bounds(plan))

    def _frame_of(self, line: Encoder | Decoder, memory: tuple[Tensor, ...]) -> Tensor:
        """A frame that stands for a stream's input, by the memory of its first timewise layer."""
        scale = Fraction(1)
        for layer in line.layers():
            if isinstance(layer, Timewise):
                break
            scale *= layer.scale
        tail = memory[-1]
        channels = self.input_channels if line is self.encoder else self.latent_channels
        size = (int(side / scale) for side in tail.shape[3:])
        return tail.new_empty(1).expand(len(tail), channels, 1, *size)

    def _latents(
        self, moments: Tensor, sample_mode: bool, generator: torch.Generator | None
    ) -> Tensor:
        mean, log_variance = LatentDistribution.from_moments(moments)
        return self.sample(mean, log_variance, generator=generator) if sample_mode else mean

    def _piece(self, x: Tensor, name: str) -> Tensor:
        if isinstance(x, Tensor) and x.ndim != 5:
            raise ValueError(
                f"{name} of a stream must be (B, C, T, H, W), got {tuple(x.shape)}: one frame is "
                f"{name}.unsqueeze(2)"
            )
        return x

    # Diffusion -------------------------------------------------------------------------------

    def scale_latent(self, latent: Tensor) -> Tensor:
        """(latent - shift) * scale: what a diffusion model works on."""
        return (latent - self.config.latent_shift_factor) * self.latent_scale_factor

    def unscale_latent(self, latent: Tensor) -> Tensor:
        """latent / scale + shift: the inverse of `scale_latent`."""
        return latent / self.latent_scale_factor + self.config.latent_shift_factor

    def encode_video_for_diffusion(
        self,
        video: Tensor,
        sample_mode: bool = True,
        generator: torch.Generator | None = None,
        *,
        layout: Layout = "BCTHW",
    ) -> Tensor:
        """`encode`, then `scale_latent`: latents as a diffusion model wants them."""
        return self.scale_latent(self.encode(video, sample_mode, generator, layout=layout))

    def decode_video_from_diffusion(self, latent: Tensor, *, layout: Layout = "BCTHW") -> Tensor:
        """`unscale_latent`, then `decode`: a diffusion model's latents to pixels."""
        return self.decode(self.unscale_latent(latent), layout=layout)

    def latent_record(self, name: str | None = None) -> ModelRecord:
        """What a file of latents records of this model: scale, cells, and which weights these are.

        The hashes are of the weights as they are now: in a narrower dtype they are others.
        """
        config = self.config
        hashes = {}
        for key, line in (("encoder", self.encoder), ("decoder", self.decoder)):
            groups = ",".join(str(config.groups(width)) for width in config.widths)
            structure = f"{key} norm_groups={groups}"
            if any(isinstance(layer, Timewise) for layer in line.layers()):
                structure += f" causal={config.causal_mode} temporal_norm={config.temporal_norm}"
            hashes[f"{key}_sha256"] = weights_sha256(line.named_parameters(), structure)
        return ModelRecord(
            name=name,
            downsample_factor=self.downsample_factor,
            scale_factor=self.latent_scale_factor,
            shift_factor=config.latent_shift_factor,
            **hashes,
        )

    # Training --------------------------------------------------------------------------------

    def forward(
        self,
        video: Tensor,
        sample_posterior: bool = True,
        generator: torch.Generator | None = None,
        *,
        layout: Layout = "BCTHW",
    ) -> tuple[Tensor, LatentDistribution]:
        """Reconstruction and posterior of a video (B, C, T, H, W) or image (B, C, H, W)."""
        posterior = self.encode_with_distribution(video, layout=layout)
        mean, log_variance = (_relayout(moment, layout) for moment in posterior)
        latent = self.sample(mean, log_variance, generator=generator) if sample_posterior else mean
        return self.decode(_relayout(latent, layout), layout=layout), posterior

    def predict(self, video: Tensor, *, layout: Layout = "BCTHW") -> Tensor:
        """The reconstruction from the posterior mean, without gradients or side effects."""
        with torch.no_grad():
            latent = self.encode(video, sample_mode=False, layout=layout)
            return self.decode(latent, layout=layout)

    def kl_divergence(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """KL of the posterior from N(0, 1): nats summed over a sample, mean over the batch."""
        return losses.kl_divergence(mean, log_variance)

    # -----------------------------------------------------------------------------------------

    def _pixels(self, video: Tensor, name: str, layout: Layout = "BCTHW") -> Tensor:
        clip = self._clip(video, self.input_channels, name, layout)
        if problem := geometry.indivisible(clip.shape[3], clip.shape[4], self.downsample_factor):
            raise ValueError(problem)
        return clip

    def _clip(self, x: Tensor, channels: int, name: str, layout: Layout) -> Tensor:
        """Check an input at the door and bring it to (B, C, T, H, W)."""
        if layout not in ("BCTHW", "BTCHW"):
            raise ValueError(f"layout must be 'BCTHW' or 'BTCHW', got {layout!r}")
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        shape = tuple(x.shape)
        if x.ndim not in (4, 5):
            hint = f": add the batch with {name}.unsqueeze(0)" if x.ndim == 3 else ""
            raise ValueError(
                f"{name} must be video (B, C, T, H, W) or image (B, C, H, W), got {shape}{hint}"
            )
        if 0 in shape:
            raise ValueError(f"{name} must not be empty, got {shape}")
        self._check_channels(shape, channels, name, layout)
        self._check_dtype(x, name)
        if x.device != self.device:
            raise ValueError(
                f"{name} is on {x.device}, the model on {self.device}: move one with .to(...)"
            )
        return x.unsqueeze(2) if x.ndim == 4 else _relayout(x, layout)

    def _check_channels(
        self, shape: tuple[int, ...], channels: int, name: str, layout: Layout
    ) -> None:
        axis = 2 if len(shape) == 5 and layout == "BTCHW" else 1
        if shape[axis] == channels:
            return
        message = f"{name} must have {channels} channels on axis {axis}, got {shape}"
        if len(shape) == 5 and shape[3 - axis] == channels:
            other = "BTCHW" if layout == "BCTHW" else "BCTHW"
            message += f": these axes look like {other}, so pass layout={other!r}"
        elif len(shape) == 4 and shape[0] == channels:
            message += f": a video needs its batch, {name}.unsqueeze(0)"
        elif shape[-1] == channels:
            order = "0, 4, 1, 2, 3" if len(shape) == 5 else "0, 3, 1, 2"
            message += f": channels stand last, so pass {name}.permute({order})"
        raise ValueError(message)

    def _check_dtype(self, x: Tensor, name: str) -> None:
        if not x.is_floating_point():
            raise ValueError(
                f"{name} must be floating point, got {x.dtype}: 8-bit pixels become "
                f"{name}.to({self.dtype}) / 127.5 - 1"
            )
        if x.dtype != self.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"{name} is {x.dtype}, the model {self.dtype}: convert with {name}.to({self.dtype})"
            )


@lru_cache(maxsize=64)
def _make_plan(config: TemporalVAEConfig, asked: Question) -> Plan:
    """A plan depends on these alone; making one takes a second or two."""
    line = Encoder if asked.operation == "encode" else Decoder
    return make_plan(lambda: line(config), asked)


def _clamped(moments: Tensor) -> Tensor:
    return torch.cat(LatentDistribution.from_moments(moments), 1)


def _bounds(plan: Plan | None) -> Bounds | None:
    return None if plan is None else plan.bounds


def _given(scale: float | None, shift: float | None) -> dict[str, float]:
    """The latent's scale and shift as fields of a configuration, as far as they were given."""
    values = {"latent_scale_factor": scale, "latent_shift_factor": shift}
    return {name: value for name, value in values.items() if value is not None}


def _floating(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    return dtype


def _seeded(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(f"seed must be a whole number in [0, 2**63), got {seed!r}")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _relayout(x: Tensor, layout: Layout) -> Tensor:
    """Swap frames and channels of a video if `layout` says so; its own inverse."""
    return x.transpose(1, 2) if layout == "BTCHW" and x.ndim == 5 else x


def _restore(clip: Tensor, given: Tensor, layout: Layout) -> Tensor:
    """Bring a clip (B, C, T, H, W) to the rank and layout of what was given, contiguous."""
    return (clip.squeeze(2) if given.ndim == 4 else _relayout(clip, layout)).contiguous()
