"""`TemporalVAE`: pixels of a video to latents and back.

Letters: B batch, C input channels, L latent channels, T frames, H height, W width, f downsample
factor. Pixels are in [-1, 1]; videos (B, C, T, H, W), and images, of one frame, (B, C, H, W).
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, BinaryIO, Literal, Self, Unpack, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram

from temporal_vae import geometry, losses, metadata, parameters
from temporal_vae.checkpoints import pretrained, records
from temporal_vae.config import NormScope, TemporalOptions, TemporalVAEConfig, VAEConfig
from temporal_vae.export.graphs import reconstruction
from temporal_vae.files import atomic
from temporal_vae.inputs import (
    Bytes,
    Door,
    Layout,
    as_clips,
    bytes_file,
    channel_axis,
    check_has_values,
    check_moments,
    floating_dtype,
    given,
    like_given,
    one_clip,
    relayout,
    restore,
    seeded_generator,
)
from temporal_vae.latents import LatentDistribution, ModelRecord, scaling
from temporal_vae.latents import latent_channels as channels_of
from temporal_vae.losses import LossFunction, callable_loss
from temporal_vae.metadata import ModelMetadata
from temporal_vae.network.initialise import initialise
from temporal_vae.network.lines import Operation, decoder_of, encoder_of
from temporal_vae.walks.budget import Budget
from temporal_vae.walks.peak import Offload
from temporal_vae.walks.plan import Plan
from temporal_vae.walks.runner import Runner, Settings, Steps, Stream
from temporal_vae.walks.streamed import State as StreamState
from temporal_vae.walks.switches import Switches


class TemporalVAE(Switches):
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
        temporal_decoder: whether the decoder has temporal layers.
        temporal_attention_reach: frames temporal attention sees, back and (unless causal) ahead.
        temporal_norm: temporal blocks normalise one "position", or over the "clip" (SVD).
        time_conv_out: a last temporal convolution on the pixels (SVD).
        clip_frames: clip length the model was made for; required with `temporal_norm="clip"`.

    Raises:
        ValueError: for any argument that could not make a working model.

    Example:
        >>> vae = TemporalVAE(base_channels=32, channel_multipliers=(1, 2), seed=0)
        >>> video = torch.rand(1, 3, 5, 16, 24) * 2 - 1
        >>> latent = vae.encode(video, sample_mode=False)
        >>> tuple(latent.shape), tuple(vae.decode(latent).shape)
        ((1, 4, 5, 8, 12), (1, 3, 5, 16, 24))
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
        temporal_decoder: bool = True,
        temporal_attention_reach: int = 8,
        temporal_norm: NormScope = "position",
        time_conv_out: bool = False,
        clip_frames: int | None = None,
    ):
        super().__init__()
        self._build(TemporalVAEConfig.of(locals()), loss_function, seed)  # fields by their names

    def _build(self, config: VAEConfig, loss: LossFunction | None, seed: int | None) -> None:
        self.config = config
        # beside the modules: the parameters of a loss are not the model's
        self.__dict__["_loss_function"] = callable_loss(loss)
        self._generator, self._settings = seeded_generator(seed), Settings()
        with torch.device("meta"):  # torch's layers would draw from the global random state
            self.encoder, self.decoder = encoder_of(config), decoder_of(config)
        initialise(self, self._generator, getattr(self.decoder, "time_conv_out", None))

    @classmethod
    def from_config(
        cls,
        config: VAEConfig,
        loss_function: LossFunction | None = None,
        seed: int | None = None,
    ) -> Self:
        """A new model of this architecture, such as `WanVAEConfig.wan21()`; see the class."""
        if isinstance(config, TemporalVAEConfig):
            options = {field.name: getattr(config, field.name) for field in fields(config)}
            return cls(**options, loss_function=loss_function, seed=seed)
        model = cls.__new__(cls)
        Switches.__init__(model)
        model._build(config, loss_function, seed)
        return model

    @classmethod
    def _on_meta(cls, config: VAEConfig, loss_function: LossFunction | None = None) -> Self:
        """A model of shapes alone, to be filled."""
        with torch.device("meta"):
            return cls.from_config(config, loss_function)

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
        """Load a model: ours, diffusers' SVD, Wan, Qwen-Image and image VAEs, or original files.

        Weights give the numbers their own library gives. float32 weights on the CPU stay mapped
        from their file, so do not overwrite it in place while the model is in use (what this
        library and diffusers write replaces files as a whole).

        Args:
            path_or_hub_id: a built-in name such as "tiny" first, else a folder that
                `save_pretrained` of this library or of diffusers wrote, else a .safetensors file
                with the keys of CompVis', Stability's or Wan's code, alone or in a checkpoint, else
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
        source = pretrained.Source(path_or_hub_id, subfolder, revision, variant)
        stored = pretrained.open_model(source, **given(latent_scale_factor, latent_shift_factor))
        dtype = floating_dtype(dtype)
        model = cls._on_meta(stored.config)
        pretrained.check_fit(stored, model.state_dict())
        pretrained.fill(model, stored, dtype, device)
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
        source = pretrained.Source(path_or_hub_id, subfolder, revision, variant)
        stored = pretrained.open_model(source, **given(latent_scale_factor, latent_shift_factor))
        config, dtype = stored.config.inflated(**temporal), floating_dtype(dtype)
        pretrained.check_fit(stored, cls._on_meta(stored.config).state_dict())
        model = cls.from_config(config, seed=seed).to(device=device, dtype=dtype)
        pretrained.fill(model, stored, dtype, device)
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        format: Literal["temporal_vae", "diffusers"] = "temporal_vae",
    ) -> None:
        """Write configuration and weights, in the weights' own dtype, into `folder`.

        "diffusers" writes what its `AutoencoderKL`, `AutoencoderKLTemporalDecoder`, `AutoencoderKLWan`
        or `AutoencoderKLQwenImage` loads; `clip_frames` and options without effect are not kept there.

        Raises `ValueError` naming what that format cannot express, and weights that are not those
        of the architecture (an adapter's); `OSError` if it cannot write.
        """
        pretrained.save(folder, self.config, self._own_state(), format)

    # State -----------------------------------------------------------------------------------

    def save_state(self, file: BinaryIO) -> None:
        """Write the model as a record, one safetensors stream, from the file's position on.

        It holds configuration, weights in their own dtype, the name of the loss if it is not the
        usual one, and checksums; neither the loss itself, the random state, nor setters such as
        `set_tiling_enabled`. Nothing is sought, so a pipe will do; the file is flushed, not closed,
        and takes more records after this one. `safetensors` reads a file of one record.

        Raises:
            TypeError: for None and what has no `write`.
            ValueError: for a text file, one that is closed or read-only, and a model without values
                (on the meta device), with others than floating-point ones, or with other weights
                than its architecture has (an adapter's).
        """
        loss = losses.loss_name(self.default_loss_function)
        records.write_record(file, self.config, self._own_state(), loss)

    def load_state(self, file: BinaryIO) -> None:
        """Take the weights of one record, read from the file's position on; the rest stays unread.

        Values are cast to the dtype and device of each parameter, which stays the same object. The
        whole record is checked before a value is changed: configuration (not seed and loss), names,
        shapes, checksums. What it takes over the model is the record's weights, on the CPU.

        Raises:
            TypeError: for None and what has no `read`.
            ValueError: for a text file, one that is closed or write-only, and a model on the meta
                device.
            CheckpointError: for a record that is cut short, damaged, of another version or
                architecture, or whose own loss the model does not have. Nothing is changed, but
                the file's position is somewhere in the record.
        """
        self._take(records.read_record(file))

    def serialize(self) -> bytes:
        """The record of `save_state` as bytes."""
        file = io.BytesIO()
        self.save_state(file)
        return file.getvalue()

    def deserialize(self, data: Bytes) -> None:
        """`load_state` from bytes, which must be one record and nothing else."""
        self._take(records.read_record(*bytes_file(data)))

    @classmethod
    def from_bytes(
        cls,
        data: Bytes,
        loss_function: LossFunction | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A new model from one record, and nothing else, such as `serialize` gives.

        Args:
            data: the record; what is not `bytes` is copied first.
            loss_function: must be given for a record that names one; any will do.
            dtype: of the weights; None means as they were saved.
            device: None means the CPU.

        Raises as `load_state`, and `ValueError` for a dtype that is not floating point.
        """
        record = records.read_record(*bytes_file(data))
        return cls._of_record(record, loss_function, dtype, device)

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Write the record of `save_state` as a file, whole or not at all; folders are made.

        Raises `TypeError` for what is no path, `ValueError` for a blank one, `OSError` where it
        cannot write.
        """
        with atomic.new_file(path) as file:
            self.save_state(file)

    def load_model(self, path: str | os.PathLike[str]) -> None:
        """`load_state` from a file, which must be one record and nothing else.

        Raises as that, as `save_model`, and `FileNotFoundError` where there is none.
        """
        with atomic.whole_file(path) as (file, size):
            self._take(records.read_record(file, size))

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        loss_function: LossFunction | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A new model from a file that `save_model` wrote; see `from_bytes` and `load_model`."""
        with atomic.whole_file(path) as (file, size):
            record = records.read_record(file, size)
            return cls._of_record(record, loss_function, dtype, device)

    def _own_state(self) -> dict[str, Tensor]:
        """All weights by name. Raises `ValueError` if they are not those of the architecture."""
        state = self.state_dict()
        pretrained.check_own(state, self._on_meta(self.config).state_dict())
        return state

    def _take(self, record: records.Record) -> None:
        weights = check_has_values(self.state_dict())
        record.check_config(self.config)
        record.check_loss(losses.loss_name(self.default_loss_function))
        self.load_state_dict(record.tensors(weights), strict=False)

    @classmethod
    def _of_record(
        cls,
        record: records.Record,
        loss_function: LossFunction | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> Self:
        dtype = None if dtype is None else floating_dtype(dtype)
        if loss_function is None:
            record.check_loss(None)
        model = cls._on_meta(record.config, loss_function)
        tensors = record.tensors(model.state_dict(), dtype, device)
        model.load_state_dict(tensors, strict=False, assign=True)
        return model

    # Properties ------------------------------------------------------------------------------

    @property
    def downsample_factor(self) -> int:
        """Pixels per latent cell along height and width."""
        return self.config.downsample_factor

    @property
    def frames_per_latent(self) -> int:
        """Frames per latent along time: 1, or of Wan's kind 4, but for the first, which is alone."""
        return self.config.frames_per_latent

    def latent_frames(self, frames: int) -> int:
        """Latents along time of so many frames. Raises `ValueError` for a number that does not fit."""
        return geometry.latent_frames(frames, self.frames_per_latent)

    def video_frames(self, latents: int) -> int:
        """Frames of so many latents along time: the inverse of `latent_frames`."""
        return geometry.video_frames(latents, self.frames_per_latent)

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
        """Multiplier that brings latents to unit variance; `ValueError` where each channel has one."""
        return scaling.scale_factor(self.config)

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
    def default_loss_function(self) -> LossFunction:
        """What compares a prediction with its target when a call names no loss.

        A loss that is a module stays outside of this one: `.to` does not move it, and its
        parameters are not counted, saved or trained.
        """
        return cast(LossFunction, self.__dict__["_loss_function"])

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
        keep_state: bool = True,
        offload: Offload = None,
        gradients: bool = False,
        ranks: int = 1,
    ) -> Plan:
        """The fastest walk of an input of this shape within a budget, and what it takes.

        Args:
            shape: of the input, (B, C, T, H, W) or (B, C, H, W): latents to decode, or pixels.
            operation: "decode" or "encode".
            dtype: the model's own if None.
            budget: memory over weights and input, the result included: bytes, "6GiB", "least" (or
                a little more, where that is faster), None for any. It never changes the result.
            stream: plan the steps of a stream; the shape is that of the largest piece.
            keep_state: False for a stream (`encode_stream`, `decode_stream`) that lets go of each
                state as the next is made, and within a budget on the CPU writes over it.
            offload: where the clip's activation is to lie: "host" for the memory of the CPU, or a
                folder on disk. On CUDA "host" is taken by itself where nothing else fits.
            gradients: for training: gradients are those of the whole walk, to rounding, and the
                budget holds to the end of `backward`, gradients of trained weights included.
            ranks: how many processes share the clip (`temporal_vae.sharded`); for the largest part.

        Raises:
            ValueError: for gradients with a stream or offload; for a budget that cannot be met,
                naming the least, and on the CPU for one above the memory that is free.

        Example:
            >>> vae = TemporalVAE(base_channels=32, channel_multipliers=(1, 2), seed=0)
            >>> plan, latent = vae.plan((1, 4, 9, 32, 32), budget="least"), torch.randn(1, 4, 9, 32, 32)
            >>> with torch.no_grad():
            ...     same = torch.allclose(vae.decode(latent, plan=plan), vae.decode(latent), atol=1e-5)
            >>> plan.walk, same
            ('bounded', True)
        """
        return self._runner.plan(
            shape, operation, dtype or self.dtype, budget,
            stream=stream, keep_state=keep_state, offload=offload, gradients=gradients, ranks=ranks,
        )  # fmt: skip

    @property
    def _runner(self) -> Runner:
        return Runner(self.encoder, self.decoder, self._settings)

    @property
    def _door(self) -> Door:
        config = self.config
        return Door(
            config.input_channels, config.latent_channels, config.downsample_factor,
            config.frames_per_latent, self.dtype, self.device,
        )  # fmt: skip

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
        clip = self._door.pixels(video, "video", layout)
        found = (like_given(moment, video) for moment in self._runner.encode(clip, plan))
        return LatentDistribution(*(relayout(moment, layout) for moment in found))

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
        posterior = self.encode_with_distribution(video, layout=layout, plan=plan)
        moments = LatentDistribution(*(relayout(moment, layout) for moment in posterior))
        return relayout(self._drawn(moments, sample_mode, generator), layout)

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
        check_moments(mean, log_variance)
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        source = generator if seed is None else seeded_generator(seed)
        return LatentDistribution(mean, log_variance).sample(source or self._generator)

    def _drawn(
        self, posterior: LatentDistribution, sample_mode: bool, generator: torch.Generator | None
    ) -> Tensor:
        """A latent from a posterior (B, L, ...): its mean, or a sample in the active channels."""
        if not sample_mode:
            return posterior.mean
        return self._runner.mask(self.sample(*posterior, generator=generator))

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
        clip = self._door.latents(latent, "latent", layout)
        if out is None:
            return restore(self._runner.decode(clip, plan), latent, layout)
        self._runner.decode(clip, plan, self._door.target(out, latent, layout))
        return out

    def iter_decode(self, latent: Tensor, *, plan: Plan | None = None) -> Iterator[Tensor]:
        """`decode` of one clip (1, L, T, h, w), its frames (1, C, n, f*h, f*w) as they are made.

        For what takes frame after frame, such as a video writer: the result is never whole in
        memory. Without a plan, or with one of the whole walk, all frames come at once.
        Raises `ValueError` as `decode`, and for more than one sample.
        """
        clip = self._door.latents(one_clip(latent), "latent")
        return self._runner.pieces(clip, plan)

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

        Example:
            >>> vae = TemporalVAE(base_channels=8, channel_multipliers=(1,), causal_mode=True, seed=0)
            >>> video, state, found = torch.rand(1, 3, 6, 8, 8) * 2 - 1, None, []
            >>> for frames in video.split(2, 2):
            ...     latents, state = vae.encode_step(frames, state, sample_mode=False)
            ...     found.append(latents)
            >>> torch.allclose(torch.cat(found, 2), vae.encode(video, sample_mode=False), atol=1e-5)
            True
        """
        return self._latent_steps(sample_mode, generator, plan).step(frames, state)

    def encode_finish(
        self,
        state: StreamState | None,
        sample_mode: bool = True,
        generator: torch.Generator | None = None,
        plan: Plan | None = None,
    ) -> Tensor | None:
        """The latents that an ended stream still owes; None if it owes none."""
        return self._latent_steps(sample_mode, generator, plan).finish(state)

    def decode_step(
        self, latents: Tensor, state: StreamState | None = None, plan: Plan | None = None
    ) -> tuple[Tensor | None, StreamState]:
        """The next latents of a stream (B, L, n, h, w) -> frames that are certain, and the state.

        See `encode_step`; `decode_finish` gives the rest.
        """
        return self._frame_steps(plan).step(latents, state)

    def decode_finish(self, state: StreamState | None, plan: Plan | None = None) -> Tensor | None:
        """The frames that an ended stream still owes; None if it owes none."""
        return self._frame_steps(plan).finish(state)

    def encode_stream(
        self,
        sample_mode: bool = True,
        generator: torch.Generator | None = None,
        plan: Plan | None = None,
    ) -> Stream:
        """A stream to push frames into and get latents from; see `encode_step`."""
        return Stream(self._latent_steps(sample_mode, generator, plan))

    def moments_stream(self, plan: Plan | None = None) -> Stream:
        """A stream to push frames into and get moments from, (B, 2*L, n, h, w); see `encode_step`.

        They are the mean and the clamped log-variance of `encode_with_distribution`, joined.
        """
        runner = self._runner

        def moments(piece: Tensor) -> Tensor:
            return torch.cat([*runner.posterior(piece)], 1)

        return Stream(Steps(runner, "encode", self._door.next_frames, moments, plan))

    def decode_stream(self, plan: Plan | None = None) -> Stream:
        """A stream to push latents into and get frames from; see `decode_step`."""
        return Stream(self._frame_steps(plan))

    def _latent_steps(
        self, sample_mode: bool, generator: torch.Generator | None, plan: Plan | None
    ) -> Steps:
        runner = self._runner

        def latents(moments: Tensor) -> Tensor:
            return self._drawn(runner.posterior(moments), sample_mode, generator)

        return Steps(runner, "encode", self._door.next_frames, latents, plan)

    def _frame_steps(self, plan: Plan | None) -> Steps:
        def frames(piece: Tensor) -> Tensor:
            return piece.clone(memory_format=torch.contiguous_format)

        return Steps(self._runner, "decode", self._door.next_latents, frames, plan)

    # Diffusion -------------------------------------------------------------------------------

    def scale_latent(self, latent: Tensor, *, layout: Layout = "BCTHW") -> Tensor:
        """What a diffusion model works on: (latent - shift) * scale, or of Wan's kind each channel's
        (latent - mean) / deviation; `ValueError` for another number of channels there."""
        return scaling.scale(latent, self.config, channel_axis(latent, layout))

    def unscale_latent(self, latent: Tensor, *, layout: Layout = "BCTHW") -> Tensor:
        """The inverse of `scale_latent`."""
        return scaling.unscale(latent, self.config, channel_axis(latent, layout))

    def encode_video_for_diffusion(
        self,
        video: Tensor,
        sample_mode: bool = True,
        generator: torch.Generator | None = None,
        *,
        layout: Layout = "BCTHW",
    ) -> Tensor:
        """`encode`, then `scale_latent`: latents as a diffusion model wants them."""
        return self.scale_latent(
            self.encode(video, sample_mode, generator, layout=layout), layout=layout
        )

    def decode_video_from_diffusion(self, latent: Tensor, *, layout: Layout = "BCTHW") -> Tensor:
        """`unscale_latent`, then `decode`: a diffusion model's latents to pixels."""
        return self.decode(self.unscale_latent(latent, layout=layout), layout=layout)

    def latent_record(self, name: str | None = None) -> ModelRecord:
        """What a file of latents records of this model: scale, cells, and which weights these are.

        The hashes are of the weights as they are now: in a narrower dtype they are others.
        """
        return metadata.record(name, self.encoder, self.decoder)

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
        mean, log_variance = (relayout(moment, layout) for moment in posterior)
        latent = self.sample(mean, log_variance, generator=generator) if sample_posterior else mean
        return self.decode(relayout(latent, layout), layout=layout), posterior

    def predict(self, video: Tensor, *, layout: Layout = "BCTHW") -> Tensor:
        """The reconstruction from the posterior mean, without gradients or side effects.

        Pixels in [-1, 1], (B, C, T, H, W) or (B, C, H, W), to the same shape, not clamped. Nothing
        is drawn. Raises `ValueError` as `encode`.
        """
        with torch.no_grad():
            latent = self.encode(video, sample_mode=False, layout=layout)
            return self.decode(latent, layout=layout)

    def kl_divergence(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """KL of the posterior from N(0, 1): nats summed over a sample, mean over the batch.

        Both (B, L, T, h, w) or (B, L, h, w); differentiable. Raises `ValueError` for shapes that
        differ. Source: Kingma and Welling 2014, arXiv 1312.6114.
        """
        return losses.kl_divergence(mean, log_variance)

    def train_step(
        self, input: Tensor, target: Tensor | None = None, learning_rate: float = 1e-4
    ) -> dict[str, float]:
        """One step of plain gradient descent, in place: parameter - learning_rate * gradient.

        The loss is that of a VAE: `default_loss_function(reconstruction, target)`, through a latent
        drawn by the model's own generator, plus `losses.KL_WEIGHT` times the KL divergence in nats
        per number of the latent. The clip is walked whole, whatever the setters say.
        Frozen parameters stay as they are; `.grad` and the mode are left as found.

        Args:
            input: pixels in [-1, 1], (B, C, T, H, W) or (B, C, H, W).
            target: what to reconstruct, such as the clean version of a noisy input; None means
                `input`.
            learning_rate: above 0.

        Returns:
            The losses before the step: "reconstruction", "kl" (weighted) and "loss", their sum.

        Example:
            >>> vae = TemporalVAE(base_channels=8, channel_multipliers=(1,), seed=0)
            >>> video = torch.rand(1, 3, 2, 8, 8) * 2 - 1
            >>> sorted(vae.train_step(video, learning_rate=1e-2))
            ['kl', 'loss', 'reconstruction']

        Raises:
            ValueError: for a wrong input or rate, and for a loss that is not finite, or whose
                gradient is not; no parameter is changed then.
        """
        parameters.check_learning_rate(learning_rate)
        with parameters.recording(input, target) as (x, y):
            terms = self._sampled_terms(x, y)
            found = losses.finite_values(terms)
            gradients = parameters.gradients(terms["loss"], self.parameters())
        self.apply_gradients(gradients, learning_rate)
        return found

    def _sampled_terms(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        found, posterior = self._runner.reconstruct(self._door.pixels(x, "input"), self.sample)
        prediction = like_given(found, x)
        return losses.vae_terms(self.default_loss_function, prediction, target, *posterior)

    def compute_gradients(
        self, input: Tensor, target: Tensor, loss: LossFunction | None = None
    ) -> Tensor:
        """The gradient of `loss(predict(input), target)`, (N,), in the order of `get_parameters`.

        By automatic differentiation, exact; zeros for parameters that are frozen or have no part in
        it. The clip is walked whole, whatever the setters say. Parameters, `.grad`, the mode and
        every random state are left as found, also when the loss raises.

        Args:
            input: pixels in [-1, 1], (B, C, T, H, W) or (B, C, H, W).
            target: whatever the loss compares a prediction with: pixels for the default one.
            loss: `(prediction, target) -> scalar`; None means `default_loss_function`.

        Raises:
            ValueError: for a wrong input, and for a loss that gives no scalar.

        Example:
            >>> vae = TemporalVAE(base_channels=8, channel_multipliers=(1,), seed=0)
            >>> video = torch.rand(1, 3, 2, 8, 8) * 2 - 1
            >>> gradients = vae.compute_gradients(video, video)
            >>> len(gradients) == vae.parameter_count
            True
            >>> vae.apply_gradients(gradients, learning_rate=1e-3)
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), parameters.recording(input, target) as (x, y):
            prediction, _ = self._runner.reconstruct(self._door.pixels(x, "input"), None)
            value = (loss or self.default_loss_function)(like_given(prediction, x), y)
            return parameters.gradients(losses.scalar_loss(value), self.parameters())

    def apply_gradients(self, gradients: Tensor, learning_rate: float) -> None:
        """parameter - learning_rate * gradient, in place, for a vector (N,) as `compute_gradients`
        gives.

        Raises `ValueError` for a wrong length or rank, for what is not finite, and for a rate that
        is not above 0; nothing is changed then.
        """
        parameters.check_learning_rate(learning_rate)
        way_out = "take a smaller loss, or a wider dtype"
        vector = parameters.check(gradients, self.parameters(), "gradients", way_out=way_out)
        parameters.descend(vector, self.parameters(), learning_rate)
        self._weights_written()

    # Parameters ------------------------------------------------------------------------------

    @property
    def supports_parameter_initialization(self) -> bool:
        """Whether there are parameters to set: yes."""
        return self.parameter_count > 0

    def get_parameters(self) -> Tensor:
        """A copy of every parameter, (N,), in the order of `named_parameters`.

        In the dtype and on the device of the weights, N being `parameter_count`, without gradient.
        """
        return parameters.gather(self.parameters())

    def set_parameters(self, vector: Tensor) -> None:
        """Write a vector (N,) into the parameters: the inverse of `get_parameters`.

        It is cast to the dtype and device of the weights. The parameters stay the objects they are,
        so an optimizer keeps hold of them.

        Raises `ValueError` for a wrong length or rank, no floating point, or values that are not
        finite in the dtype of the weights; nothing is changed then.

        Example:
            >>> vae = TemporalVAE(base_channels=8, channel_multipliers=(1,), seed=0)
            >>> vae.set_parameters(vae.get_parameters() * 0.5)
            >>> vae.set_parameters(torch.zeros(3))
            Traceback (most recent call last):
            ValueError: vector must be one flat vector of 17378 numbers, as many as ... got (3,)
        """
        parameters.scatter(self._checked(vector), self.parameters())
        self._weights_written()

    def with_parameters(self, vector: Tensor) -> Self:
        """A `clone` with these parameters; this model stays as it is. See `set_parameters`."""
        self._checked(vector)
        model = self.clone()
        model.set_parameters(vector)
        return model

    def sanitize_parameters(self, vector: Tensor) -> Tensor:
        """The vector (N,) with the current value wherever it is not finite.

        In the dtype and on the device of the weights, so that `set_parameters` takes it; what is
        too large for that dtype counts as not finite. Raises `ValueError` for a wrong length or
        rank, or no floating point.
        """
        checked = parameters.check(vector, self.parameters(), "vector")
        return parameters.sanitised(checked, self.get_parameters())

    def _checked(self, vector: Tensor) -> Tensor:
        way_out = "sanitize_parameters puts the current ones in their place"
        return parameters.check(vector, self.parameters(), "vector", way_out=way_out)

    def _weights_written(self) -> None:
        """In float16 the stream's scales depend on the weights; see `Line.fit_scales`."""
        self.encoder.fit_scales()
        self.decoder.fit_scales()

    # Copies ----------------------------------------------------------------------------------

    def clone(self) -> Self:
        """An independent copy: the same to the last bit, and nothing shared.

        Configuration, weights and buffers with their dtype, device and `requires_grad`, mode,
        slicing, tiling, memory budget, active features, compilation, the state of the generator,
        and a copy of the loss. Gradients are not copied. Takes the memory of one more model.
        """
        with torch.inference_mode(False):  # what is made in it could not be trained
            return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        # as bytes: neither a generator nor a tensor of its own makes its way to another process
        noise = self._generator.get_state().numpy().tobytes()
        return {**self.__dict__, "_generator": noise}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator()
        generator.set_state(torch.frombuffer(bytearray(state["_generator"]), dtype=torch.uint8))
        super().__setstate__({**state, "_generator": generator})  # type: ignore[no-untyped-call]

    def deep_copy(self) -> Self:
        """The same as `clone`, by the page's other name; `copy.deepcopy` does it too."""
        return self.clone()

    # Features --------------------------------------------------------------------------------

    def get_active_feature_indices(
        self,
        data: Tensor | Iterable[Tensor] | None = None,
        threshold: float = channels_of.ACTIVE_VARIANCE,
    ) -> list[int]:
        """The latent channels in use, in rising order.

        Without data: those that `set_active_feature_indices` left, at first all. With data, pixels
        (B, C, T, H, W) or several of such: those of them whose posterior mean varies over the data
        by more than `threshold`, a variance (active units: Burda et al. 2016, arXiv 1509.00519).
        """
        active = self._settings.active or tuple(range(self.latent_channels))
        if data is None:
            return list(active)
        with torch.no_grad():
            units = channels_of.active_units(
                as_clips(data), self.encode_with_distribution, threshold
            )
        return [channel for channel in units if channel in active]

    def set_active_feature_indices(self, indices: Iterable[int]) -> None:
        """Use these latent channels alone: the others are 0 in `encode`, and taken for 0 in `decode`.

        Their posterior is the prior, mean 0 and log-variance 0, so their KL is 0. Holds for streams
        and gradients too. `range(latent_channels)` ends it.
        Raises `ValueError` for no index, one out of range, or one twice; nothing is changed then.

        Example:
            >>> vae = TemporalVAE(base_channels=8, channel_multipliers=(1,), seed=0)
            >>> vae.set_active_feature_indices([0, 2])
            >>> [vae.is_feature_used(channel) for channel in range(4)]
            [True, False, True, False]
        """
        active = channels_of.check_indices(indices, self.latent_channels)
        used = None if len(active) == self.latent_channels else active
        self._settings = replace(self._settings, active=used)

    def is_feature_used(self, index: int) -> bool:
        """Whether a latent channel is active. Raises `IndexError` for what is no channel."""
        if not 0 <= channels_of.index(index) < self.latent_channels:
            raise IndexError(f"latent channels are 0 to {self.latent_channels - 1}, got {index}")
        return index in self.get_active_feature_indices()

    def get_feature_importance(
        self, data: Tensor | Iterable[Tensor] | None = None
    ) -> dict[str, channels_of.ChannelImportance]:
        """How much each latent channel matters: "channel_0", ... -> share, kl, decibels.

        With data, pixels (B, C, T, H, W) or several of such, on the mean of all: the KL divergence
        of the channel in nats per cell, the PSNR in dB that masking it costs the reconstruction,
        and its share of the KL. Without data: its share of the decoder's first weights, which is
        what it could do; the two others are None. Shares add up to 1. Nothing is drawn.
        Raises `ValueError` as `encode`, and for data without a clip.
        """
        if data is None:
            before, first = self.decoder.post_quant_conv, self.decoder.conv_in
            return channels_of.by_weights(first.weight, None if before is None else before.weight)
        with torch.no_grad():
            return channels_of.measure(
                as_clips(data), self.encode_with_distribution, self.decode, self.latent_channels
            )

    # Compilation and description -------------------------------------------------------------

    @property
    def supports_jit_compilation(self) -> bool:
        """Whether the network can be compiled and exported: yes."""
        return True

    def compile(self, **options: Any) -> None:
        """Compile the network with `torch.compile`, at the first use for each kind of shape.

        What is compiled, as one graph each: the moments, the decoder, and the steps of a causal
        stream; used by every method that walks whole. Results are the same to rounding. Bounded
        walks (tiling, a budget, a plan) and the steps of a model that looks ahead are not
        compiled; switching slicing or tiling afterwards has the effect it has otherwise. Sampling
        stays outside, since a generator breaks a graph.

        `options` are those of `torch.compile`; fullgraph=True unless said otherwise.
        """
        options = {"fullgraph": True} | options
        self._settings = replace(self._settings, compile_options=options, compiled={})

    def export_computation_graph(self, example: Tensor) -> ExportedProgram:
        """`predict` as a graph of torch operations, by `torch.export`.

        Batch, frames, height and width may vary, H and W in multiples of `downsample_factor` from
        two of them on. No loop over pieces is in it, so it takes more memory than the model; masked
        channels are. The weights are the model's own: a step of training shows in both.

        Args:
            example: pixels (B, C, T, H, W), or an image (B, C, H, W), of which rank the graph will
                take its input; of any size.

        Raises:
            ValueError: as `encode`.

        Example:
            >>> vae = TemporalVAE(base_channels=8, channel_multipliers=(1,), seed=0)
            >>> program = vae.export_computation_graph(torch.zeros(2, 3, 3, 8, 8))
            >>> tuple(program.module()(torch.zeros(1, 3, 7, 16, 24)).shape)
            (1, 3, 7, 16, 24)
        """
        self._door.pixels(example, "example")
        encoder, decoder = self.encoder.ready(), self.decoder.ready()
        return reconstruction(encoder, decoder, self._settings.active, example)

    def get_metadata(self) -> ModelMetadata:
        """What this model is: configuration, parameters by part, reach and delay, dtype, device.

        Example:
            >>> meta = TemporalVAE(base_channels=8, causal_mode=True).get_metadata()
            >>> meta.decode_reach, meta.decode_delay
            (64, 0)
        """
        active = tuple(self.get_active_feature_indices())
        return metadata.describe(type(self).__name__, self.encoder, self.decoder, active)
