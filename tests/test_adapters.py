"""diffusers' pipelines with our VAE: the same pictures, whatever the chunks and the memory."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import awake, difference, redraw, thinned
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from test_foreign import theirs
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import temporal_vae
from temporal_vae import TemporalVAE, to_diffusers, upgrade
from temporal_vae.adapters import diffusers, drop_in
from temporal_vae.checkpoints import pretrained
from temporal_vae.walks import bounded, budget

TOLERANCE = 2e-5
"""Ours and stock in float32, of values up to 1; the awake weights enlarge rounding."""


# Small pipelines -----------------------------------------------------------------------------


def seeded(module: Any, scale: float = 1.0) -> Any:
    """A network of a pipeline with weights that are the same each time."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.05 * scale))
    return module.eval()


def image_vae(channels: int = 4, **options: Any) -> Any:
    """An awake `AutoencoderKL` of two levels, float32."""
    model = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        sample_size=16,
        **options,
    )
    redraw(model)
    return model.eval()


def svd_pipeline(vae: Any = None) -> Any:
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=8,
        cross_attention_dim=32,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        sample_size=16,
        num_frames=5,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=37,
        image_size=32,
        patch_size=8,
    )
    return quiet(
        StableVideoDiffusionPipeline(
            vae=theirs().float() if vae is None else vae,
            image_encoder=seeded(CLIPVisionModelWithProjection(vision)),
            unet=seeded(unet),
            scheduler=EulerDiscreteScheduler(),
            feature_extractor=CLIPImageProcessorPil(crop_size=32, size=32),
        )
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def svd_video(pipe: Any, **options: Any) -> Tensor:
    """(B, T, C, H, W) in [0, 1], after two steps."""
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    frames = pipe(
        image,
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
        **options,
    ).frames
    return living(frames)


def living(pixels: Tensor) -> Tensor:
    """Asserts that a picture is one: pipelines clamp, which would make wrong ones equal."""
    assert ((pixels > 0) & (pixels < 1)).float().mean() > 0.3, "nearly all is black or white"
    return pixels


def small_unet(**options: Any) -> Any:
    return seeded(
        UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            cross_attention_dim=8,
            sample_size=16,
            **options,
        )
    )


def scheduler() -> Any:
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def animatediff_pipeline(vae: Any = None) -> Any:
    motion = MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_num_attention_heads=4
    )
    return quiet(
        AnimateDiffPipeline(
            vae=image_vae() if vae is None else vae,
            text_encoder=None,
            tokenizer=None,
            unet=small_unet(),
            motion_adapter=seeded(motion),
            scheduler=scheduler(),
        )
    )


def embeds(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def animation(pipe: Any, **options: Any) -> Tensor:
    frames = pipe(
        prompt_embeds=embeds(1, 4, 8),
        negative_prompt_embeds=embeds(1, 4, 8, seed=9),
        num_frames=5,
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
        **options,
    ).frames
    return living(frames)


def sd_pipeline(kind: Any = StableDiffusionPipeline, vae: Any = None) -> Any:
    return quiet(
        kind(
            vae=image_vae() if vae is None else vae,
            text_encoder=None,
            tokenizer=None,
            unet=small_unet(),
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl_pipeline(kind: Any = StableDiffusionXLPipeline) -> Any:
    unet = small_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        transformer_layers_per_block=(1, 2),
    )
    parts = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    vae = image_vae(scaling_factor=0.13025)
    options = {} if kind is StableDiffusionXLPipeline else {"requires_aesthetics_score": False}
    return quiet(
        kind(vae=vae, unet=unet, scheduler=scheduler(), add_watermarker=False, **parts, **options)
    )


def flux_pipeline(kind: Any = FluxPipeline) -> Any:
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    parts = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    vae = image_vae(
        16, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    return quiet(
        kind(
            vae=vae,
            transformer=seeded(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            **parts,
        )
    )


@torch.no_grad()
def picture(pipe: Any) -> Tensor:
    """Two images (2, C, H, W) in [0, 1], from images where the pipeline takes some."""
    name = type(pipe).__name__
    given: dict[str, Any] = {"prompt_embeds": embeds(2, 4, 8)}
    if "Img2Img" in name or "Inpaint" in name:
        given["image"] = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
        given["strength"] = 1.0
    if "Inpaint" in name:
        given["mask_image"] = (torch.arange(32) < 16).float().expand(2, 1, 32, 32)
    if "Img2Img" not in name or "Flux" in name:
        given |= {"height": 32, "width": 32}
    if "Flux" not in name:
        given["negative_prompt_embeds"] = embeds(2, 4, 8, seed=9)
    if "XL" in name:
        given["negative_pooled_prompt_embeds"] = embeds(2, 32, seed=9)
    if "XL" in name or "Flux" in name:
        given["pooled_prompt_embeds"] = embeds(2, 8 if "Flux" in name else 32)
    images = pipe(
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="pt",
        **given,
    ).images
    return living(images)


IMAGES: dict[str, Callable[[], Any]] = {
    "sd": sd_pipeline,
    "sd from an image": lambda: sd_pipeline(StableDiffusionImg2ImgPipeline),
    "sd inpainting": lambda: sd_pipeline(StableDiffusionInpaintPipeline),
    "sdxl": sdxl_pipeline,
    "sdxl from an image": lambda: sdxl_pipeline(StableDiffusionXLImg2ImgPipeline),
    "flux": flux_pipeline,
    "flux from an image": lambda: flux_pipeline(FluxImg2ImgPipeline),
}


# A video is one clip, whatever the chunks ----------------------------------------------------


def assert_chunks_do_nothing(pipe: Any, expected: Tensor) -> None:
    videos = []
    for chunk in (None, 1, 2, 5):
        videos.append(svd_video(pipe, decode_chunk_size=chunk))
        assert difference(videos[-1], expected) < TOLERANCE, f"{chunk} frames a chunk: another one"
    assert all(torch.equal(video, videos[0]) for video in videos)


@pytest.mark.parametrize(
    "memory",
    [None, "least", *(pytest.param(size, marks=pytest.mark.slow) for size in ("6GiB", "auto"))],
)
def test_svd_is_the_stock_one_without_its_chunks(memory: str | None) -> None:
    pipe = svd_pipeline()
    one_clip = svd_video(pipe, decode_chunk_size=5)
    # asleep, chunks would change nothing
    assert difference(svd_video(pipe, decode_chunk_size=2), one_clip) > 0.01
    upgrade(pipe, memory)
    assert_chunks_do_nothing(pipe, one_clip)


def test_two_svd_videos_at_once_are_two_clips() -> None:
    pipe = svd_pipeline()
    latents = embeds(2, 5, 4, 16, 16)
    with torch.no_grad():
        alone = torch.cat([pipe.decode_latents(one, 5, 5) for one in latents.split(1)])
        upgrade(pipe)
        together = pipe.decode_latents(latents, 5, 3)
    assert together.shape == (2, 3, 5, 32, 32)
    assert together.dtype is torch.float32
    assert difference(together, alone) < TOLERANCE


def test_the_chunk_test_sees_a_pipeline_that_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE alone in its place cannot do it."""
    pipe = svd_pipeline()
    one_clip = svd_video(pipe, decode_chunk_size=5)
    monkeypatch.setitem(diffusers._PIPELINES, "StableVideoDiffusionPipeline", diffusers.Known())
    upgrade(pipe)
    with pytest.raises(AssertionError, match="1 frames a chunk"):
        assert_chunks_do_nothing(pipe, one_clip)


@pytest.mark.parametrize("memory", [pytest.param(None, marks=pytest.mark.slow), "least"])
def test_animatediff_is_the_stock_one_without_its_chunks(memory: str | None) -> None:
    pipe = animatediff_pipeline()
    stock = [animation(pipe, decode_chunk_size=chunk) for chunk in (1, 2, 5)]
    upgrade(pipe, memory)
    mine = [animation(pipe, decode_chunk_size=chunk) for chunk in (1, 2, 5)]
    for one, other in zip(mine, stock, strict=True):
        assert difference(one, other) < TOLERANCE
        assert torch.equal(one, mine[0])


def test_animatediff_with_a_video_vae_decodes_one_clip() -> None:
    vae = awake(torch.float32)
    pipe = animatediff_pipeline(to_diffusers(vae))
    latents = embeds(1, 4, 5, 16, 16)
    with torch.no_grad():
        expected = vae.decode_video_from_diffusion(latents)
        frame_by_frame = pipe.decode_latents(latents, 2)
        upgrade(pipe, "least")
        mine = pipe.decode_latents(latents, 2)
    assert difference(mine, expected) < TOLERANCE
    assert difference(frame_by_frame, expected) > 0.01


@pytest.mark.parametrize(("kind", "memory"), thinned(2, IMAGES, ["least", "6GiB"]))
def test_images_are_the_stock_ones(kind: str, memory: str) -> None:
    """Those from an image too, which sample latents: the noise is diffusers' own."""
    pipe = IMAGES[kind]()
    stock = picture(pipe)
    done = upgrade(pipe, memory)
    assert difference(picture(pipe), stock) < TOLERANCE
    done.undo()
    assert torch.equal(picture(pipe), stock)


@pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning")
def test_sdxl_in_float16_is_upcast_where_it_is_asked_and_comes_back() -> None:
    pipe = sdxl_pipeline()
    pipe.vae.to(torch.float16)
    stock = picture(pipe)  # upcast: diffusers' VAE asks for it
    done = upgrade(pipe)
    assert pipe.vae.config.force_upcast is False and done.stock.config.force_upcast is True
    assert difference(picture(pipe), stock) < 0.01  # latents come in float32
    pipe.vae.register_to_config(force_upcast=True)
    assert difference(picture(pipe), stock) < TOLERANCE
    assert pipe.vae.dtype is done.stock.dtype is torch.float16


@torch.no_grad()
def test_loud_weights_stay_finite_in_float16(tmp_path: Path) -> None:
    """Loaded by diffusers, which sets weights one by one, and shared with a pipeline's VAE."""
    loud = image_vae()
    for module in (loud.encoder.conv_in, loud.decoder.conv_in):
        module.weight.mul_(2**13)
    latents = embeds(1, 4, 8, 8).half()
    exact = loud.double().decode(latents.double()).sample
    loud.half()
    assert not loud.decode(latents).sample.isfinite().all()
    pipe = sd_pipeline(vae=loud)
    done = upgrade(pipe)
    done.module.save_pretrained(tmp_path)
    loaded = temporal_vae.DiffusersTemporalVAE.from_pretrained(tmp_path, torch_dtype=torch.float16)
    for module in (done.module, loaded):
        assert max(module.vae.stream_scales.values()) < 1.0
        assert difference(module.decode(latents).sample.double(), exact) < 0.02


@torch.no_grad()
def test_weights_that_others_convert_are_seen() -> None:
    """Two pipelines with one VAE: the second's module learns of float16 when it is used."""
    loud = image_vae()
    for module in (loud.encoder.conv_in, loud.decoder.conv_in):
        module.weight.mul_(2**13)
    first, second = sd_pipeline(vae=loud), sd_pipeline(vae=loud)
    upgrade(first)
    other = upgrade(second)
    first.vae.half()
    assert other.module.dtype == torch.float16
    assert other.module.decode(embeds(1, 4, 8, 8)).sample.isfinite().all()
    assert max(other.vae.stream_scales.values()) < 1.0
    first.vae.float()
    assert other.vae.stream_scales == {"encoder": 1.0, "decoder": 1.0}


def test_another_vae_after_an_upgrade_is_taken_as_it_is() -> None:
    pipe = svd_pipeline()
    upgrade(pipe)
    pipe.vae = svd_pipeline().vae
    latents = torch.zeros(1, 2, 4, 4, 4)
    pixels = pipe.decode_latents(latents, 2, 1)
    assert pixels.shape[:3] == (1, 3, 2)


@pytest.mark.slow
def test_a_large_image_has_no_seams() -> None:
    """2048x2048 in Stable Diffusion's layout, narrow."""
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=512,
    )
    redraw(vae)
    pipe, latents = sd_pipeline(vae=vae), embeds(1, 4, 256, 256)
    with torch.no_grad():
        whole = pipe.vae.decode(latents).sample
        vae.enable_tiling()
        tiled = pipe.vae.decode(latents).sample
        vae.disable_tiling()
        done = upgrade(pipe, "1GiB")
        plan = done.vae.plan(latents.shape, budget="1GiB")
        mine = pipe.vae.decode(latents, return_dict=False)[0]
    print(f"\n{plan.explain()}")
    print(f"max|d|/max: ours {difference(mine, whole):.2e}, tiles {difference(tiled, whole):.2e}")
    assert plan.walk == "bounded"
    assert plan.peak_bytes <= 2**30
    assert difference(mine, whole) < TOLERANCE
    assert difference(tiled, whole) > 0.01


# There and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [svd_pipeline, animatediff_pipeline], ids=["svd", "animatediff"])
def test_undo_gives_the_same_objects_and_the_same_bits(build: Any) -> None:
    pipe = build()
    run = svd_video if build is svd_pipeline else animation
    stock, config = pipe.vae, dict(pipe.config)
    weights = {name: (id(p), p._version) for name, p in stock.named_parameters()}
    before, attributes = run(pipe, decode_chunk_size=2), set(vars(pipe))
    done = upgrade(pipe)
    run(pipe)
    assert pipe.vae is done.module
    done.undo()
    assert pipe.vae is stock
    assert set(vars(pipe)) == attributes
    assert pipe.decode_latents.__func__ is type(pipe).decode_latents
    assert dict(pipe.config) == config
    assert {name: (id(p), p._version) for name, p in stock.named_parameters()} == weights
    assert torch.equal(run(pipe, decode_chunk_size=2), before)
    done.undo()  # nothing left to undo
    again = upgrade(pipe)
    done.undo()  # and the second upgrade is not the first one's business
    assert pipe.vae is again.module


def test_undo_leaves_what_others_put_there() -> None:
    pipe = svd_pipeline()

    def own(latents: Tensor, num_frames: int, decode_chunk_size: int = 1) -> str:
        return "own"

    pipe.decode_latents = own
    done = upgrade(pipe)
    assert pipe.decode_latents is not own
    done.undo()
    assert pipe.decode_latents is own
    done, other = upgrade(pipe), theirs().float()
    pipe.vae = other
    done.undo()
    assert pipe.vae is other
    upgrade(pipe)
    pipe.vae = other
    upgrade(pipe).undo()  # what stood in its way is undone first
    assert (pipe.vae, pipe.decode_latents) == (other, own)


def test_weights_are_shared_and_move_together() -> None:
    pipe = svd_pipeline()
    pipe.vae.decoder.requires_grad_(False)
    done = upgrade(pipe)
    mine, stock = set(map(id, done.vae.parameters())), set(map(id, done.stock.parameters()))
    assert mine == stock == set(map(id, pipe.vae.parameters()))
    assert not any(p.requires_grad for p in done.stock.decoder.parameters())
    assert all(p.requires_grad for p in done.stock.encoder.parameters())
    pipe.to(torch.float64)
    assert done.vae.dtype is done.stock.dtype is pipe.vae.dtype is torch.float64


def test_a_drop_in_can_be_upgraded_too() -> None:
    pipe = svd_pipeline()
    one_clip = svd_video(pipe, decode_chunk_size=5)
    upgrade(pipe).undo()
    module = to_diffusers(diffusers._with_weights_of(pipe.vae))
    pipe.vae = module
    assert difference(svd_video(pipe, decode_chunk_size=5), one_clip) < TOLERANCE
    assert difference(svd_video(pipe, decode_chunk_size=2), one_clip) > 0.01
    done = upgrade(pipe)
    assert done.vae is module.vae
    assert difference(svd_video(pipe, decode_chunk_size=2), one_clip) < TOLERANCE
    done.undo()
    assert pipe.vae is module


LOADS = """
import sys
import torch
from diffusers import StableVideoDiffusionPipeline as Pipeline
sys.path.insert(0, sys.argv[2])
try:
    Pipeline.from_pretrained(sys.argv[1])
    raise SystemExit("loaded without temporal_vae")
except ValueError as error:
    assert "import temporal_vae" in str(error), error
import temporal_vae
assert "temporal_vae.adapters.drop_in" not in sys.modules
from test_adapters import quiet, svd_video
pipe = quiet(Pipeline.from_pretrained(sys.argv[1]))
assert type(pipe.vae) is temporal_vae.DiffusersTemporalVAE, type(pipe.vae)
torch.save(svd_video(pipe, decode_chunk_size=5), sys.argv[1] + "/again.pt")
half = Pipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
assert half.vae.dtype is half.vae.vae.dtype is torch.float16
"""


def test_a_pipeline_saves_and_loads_in_a_fresh_process(tmp_path: Path) -> None:
    pipe = svd_pipeline()
    upgrade(pipe)
    expected = svd_video(pipe)
    pipe.save_pretrained(tmp_path)
    here = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", LOADS, str(tmp_path), here], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "not expected" not in result.stderr, result.stderr
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    # to rounding: loaded weights lie elsewhere in memory, which the other networks feel
    assert difference(again, expected) < TOLERANCE
    alone = TemporalVAE.from_pretrained(tmp_path, subfolder="vae")
    assert alone.config == pipe.vae.vae.config
    assert all(
        torch.equal(p, alone.get_parameter(name)) for name, p in pipe.vae.vae.named_parameters()
    )


def test_a_model_of_our_own_saves_and_loads_in_a_pipeline(tmp_path: Path) -> None:
    vae = awake(torch.float32, causal_mode=True, latent_shift_factor=0.25)
    module = to_diffusers(vae)
    module.save_pretrained(tmp_path)
    loaded = temporal_vae.DiffusersTemporalVAE.from_pretrained(tmp_path)
    assert loaded.vae.config == vae.config
    assert dict(loaded.config) | {"_name_or_path": ""} == dict(module.config) | {
        "_name_or_path": ""
    }
    latents = embeds(5, 4, 4, 6)
    with torch.no_grad():
        mine, again = (m.decode(latents, num_frames=5).sample for m in (module, loaded))
    assert torch.equal(mine, again)
    pipe = svd_pipeline(loaded)  # as a constructor takes it
    assert pipe.config["vae"] == ("temporal_vae", pretrained.DROP_IN_CLASSES[0])
    assert svd_video(pipe).shape == (1, 5, 3, 32, 32)


# The drop-in ---------------------------------------------------------------------------------


def assert_samples_like(module: Any, stock: Any) -> None:
    pixels = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(7)).double() * 2 - 1
    mine, other = module.encode(pixels).latent_dist, stock.encode(pixels).latent_dist
    for a, b in ((mine.mode(), other.mode()), (mine.logvar, other.logvar), (mine.kl(), other.kl())):
        assert difference(a, b) < 1e-10
    for seeds in (5, [1, 2, 3]):  # one for all, or one for each frame
        drawn = [each.sample(generators(seeds)) for each in (mine, other)]
        assert drawn[0].shape == drawn[1].shape
        assert difference(*drawn) < 1e-10, "another draw"


def generators(seeds: int | list[int]) -> Any:
    if isinstance(seeds, int):
        return torch.Generator().manual_seed(seeds)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("build", [theirs, lambda: image_vae().double()], ids=["svd", "image"])
def test_latents_are_drawn_as_diffusers_draws_them(build: Any) -> None:
    stock = build()
    with torch.no_grad():
        assert_samples_like(to_diffusers(diffusers._with_weights_of(stock)), stock)


def test_the_draw_test_sees_our_own_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn frame by frame in float32, as `LatentDistribution` does."""
    stock = theirs()
    module = to_diffusers(diffusers._with_weights_of(stock))

    class Ours(DiagonalGaussianDistribution):  # type: ignore[misc]
        def sample(self, generator: Any = None) -> Tensor:
            noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32)
            sample: Tensor = self.mean + self.std * noise.to(self.mean)
            return sample

    monkeypatch.setattr(drop_in, "DiagonalGaussianDistribution", Ours)
    with torch.no_grad(), pytest.raises(AssertionError, match="another draw"):
        assert_samples_like(module, stock)


@pytest.mark.parametrize(("slicing", "tiling"), thinned(2, [False, True], [False, True]))
def test_every_call_of_the_drop_in_gives_the_stock_numbers(slicing: bool, tiling: bool) -> None:
    stock = theirs()
    module = to_diffusers(diffusers._with_weights_of(stock))
    for wanted, name in ((slicing, "slicing"), (tiling, "tiling")):
        getattr(module, f"{'enable' if wanted else 'disable'}_{name}")()
    assert (module.vae.slicing_enabled, module.vae.tiling_enabled) == (slicing, tiling)
    pixels = torch.rand(6, 3, 16, 24, generator=torch.Generator().manual_seed(7)).double() * 2 - 1
    latents = embeds(6, 4, 8, 12).double()
    generator = torch.Generator
    with torch.no_grad():
        pairs = [
            (module.decode(latents, num_frames=3).sample, stock.decode(latents, 3).sample),
            (module.decode(latents, 3, return_dict=False)[0], stock.decode(latents, 3).sample),
            (
                module.encode(pixels, return_dict=False)[0].mean,
                stock.encode(pixels).latent_dist.mean,
            ),
            (module(pixels, num_frames=2).sample, stock(pixels, num_frames=2).sample),
            (
                module(pixels, True, False, generator().manual_seed(1), num_frames=6)[0],
                stock(pixels, True, False, generator().manual_seed(1), num_frames=6)[0],
            ),
        ]
    for a, b in pairs:
        assert difference(a, b) < 1e-10


def test_the_drop_in_has_what_pipelines_read() -> None:
    stock = image_vae(16, shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False)
    module = to_diffusers(diffusers._with_weights_of(stock))
    for name in (
        "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block",
        "scaling_factor", "shift_factor", "latents_mean", "latents_std",
        "use_quant_conv", "use_post_quant_conv",
    ):  # fmt: skip
        assert getattr(module.config, name) == stock.config[name], name
    assert (module.dtype, module.device) == (stock.dtype, stock.device)
    assert module.quant_conv is None
    assert isinstance(module.post_quant_conv, nn.Module)
    assert set(module.state_dict()) == set(module.vae.state_dict())
    assert (module.training, module.train().training) == (False, True)


def test_frames_are_clips_of_one_unless_said_otherwise() -> None:
    vae = awake()
    module, latents = to_diffusers(vae), embeds(5, 4, 4, 6).double()
    pixels = torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(7)).double() * 2 - 1
    with torch.no_grad():
        alone = torch.cat([vae.decode(latent) for latent in latents.split(1)])
        assert difference(module.decode(latents).sample, alone) < 1e-10
        assert difference(module.decode(latents, num_frames=5).sample, alone) > 0.01
        alone = torch.cat([vae.encode(frame, False) for frame in pixels.split(1)])
        assert difference(module.encode(pixels).latent_dist.mean, alone) < 1e-10
        assert difference(module.encode(pixels, num_frames=5).latent_dist.mean, alone) > 0.01


def test_gradients_pass_through_the_drop_in() -> None:
    stock = theirs()
    module = to_diffusers(diffusers._with_weights_of(stock))
    gradients = []
    for model in (module, stock):
        latents = embeds(4, 4, 4, 4).double().requires_grad_()
        model.decode(latents, num_frames=4).sample.square().sum().backward()
        gradients.append(latents.grad)
    assert difference(*gradients) < 1e-10  # type: ignore[arg-type]


def test_memory_is_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = svd_pipeline()
    done = upgrade(pipe, "least")
    seen: list[Any] = []
    walk = bounded.walk

    def watched(line: Any, x: Tensor, bounds: Any, out: Tensor | None = None) -> Tensor:
        seen.append(tuple(x.shape))
        return walk(line, x, bounds, out)

    monkeypatch.setattr(bounded, "walk", watched)
    with torch.no_grad():
        pipe.decode_latents(embeds(1, 5, 4, 16, 16), 5, 1)
        assert seen == [(1, 4, 5, 16, 16)]  # one clip, once
        pipe.vae.encode(embeds(3, 3, 32, 32))
        assert seen.pop() == (1, 3, 3, 32, 32)  # images too, which has the better plans
        done.module.memory = None
        pipe.decode_latents(embeds(1, 5, 4, 16, 16), 5, 1)
        assert len(seen) == 1
    assert done.vae.memory_budget is None  # the model's own setters are not touched


@pytest.mark.parametrize(
    ("memory", "free", "expected"),
    [
        ("1GiB", 2**31, "1GiB"),
        ("least", 1, "least"),
        ("6GiB", 1000, 832),
        ("auto", 2**33, 7 * 2**30),
        ("6GiB", None, "6GiB"),
        ("auto", None, None),
    ],
)
def test_a_budget_is_no_more_than_what_is_free(
    memory: str, free: int | None, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "available_bytes", lambda device: free)
    assert budget.affordable(memory, torch.device("cpu")) == expected


def test_offload_of_whole_models_goes_on() -> None:
    """With the CPU as the accelerator: the hooks are the same."""
    pytest.importorskip("accelerate")
    pipe = svd_pipeline()
    one_clip = svd_video(pipe, decode_chunk_size=5)
    pipe.enable_model_cpu_offload(device="cpu")
    stock = pipe.vae
    assert hasattr(stock, "_hf_hook")
    done = upgrade(pipe)
    assert hasattr(pipe.vae, "_hf_hook")
    assert not hasattr(stock, "_hf_hook")
    assert difference(svd_video(pipe, decode_chunk_size=1), one_clip) < TOLERANCE
    done.undo()
    assert hasattr(stock, "_hf_hook")
    assert difference(svd_video(pipe, decode_chunk_size=5), one_clip) < TOLERANCE


# Bad input -----------------------------------------------------------------------------------


def test_pipelines_and_vaes_that_are_not_known_are_refused() -> None:
    unknown = DDPMPipeline(UNet2DModel(block_out_channels=(32, 32, 32, 32)), DDIMScheduler())
    with pytest.raises(ValueError, match=r"DDPMPipeline: only StableVideoDiffusionPipeline, Anim"):
        upgrade(unknown)
    with pytest.raises(ValueError, match="cannot upgrade a str"):
        upgrade("a pipeline")
    tiny = sd_pipeline(vae=AutoencoderTiny())
    with pytest.raises(ValueError, match="AutoencoderTiny: only AutoencoderKL, "):
        upgrade(tiny)
    odd = sd_pipeline(vae=image_vae(mid_block_add_attention=False))
    with pytest.raises(ValueError, match="mid_block_add_attention must be True"):
        upgrade(odd)
    fused = sd_pipeline()
    fused.fuse_qkv_projections(unet=False)
    with pytest.raises(ValueError, match=r"fused projections .*to_qkv"):
        upgrade(fused)
    for pipe in (tiny, odd, fused):
        assert not isinstance(pipe.vae, temporal_vae.DiffusersTemporalVAE)
        assert "_temporal_vae_upgrade" not in vars(pipe)


def test_a_decode_of_its_own_is_not_replaced() -> None:
    class Own(StableVideoDiffusionPipeline):  # type: ignore[misc]
        def decode_latents(self, latents: Tensor, *_: Any) -> Tensor:
            return latents

    class Plain(StableVideoDiffusionPipeline):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match="Own has a decode_latents of its own"):
        upgrade(Own(**svd_pipeline().components))
    upgrade(Plain(**svd_pipeline().components))


def test_upgrading_twice_is_refused() -> None:
    pipe = svd_pipeline()
    done = upgrade(pipe)
    with pytest.raises(ValueError, match="upgraded already"):
        upgrade(pipe, "least")
    assert pipe.vae is done.module


def test_a_budget_too_small_names_the_least() -> None:
    pipe = svd_pipeline()
    for wrong in ("much", 0, -1, 1.5, True):
        with pytest.raises(ValueError, match="a budget is"):
            upgrade(pipe, wrong)  # type: ignore[arg-type]
    done = upgrade(pipe, 1000)
    with torch.no_grad(), pytest.raises(ValueError, match="least") as error:
        pipe.decode_latents(embeds(1, 5, 4, 16, 16), 5)
    print(error.value)
    assert done.vae.memory_budget is None


def test_frames_that_make_no_clips_are_refused() -> None:
    module = to_diffusers(awake(torch.float32))
    for number in (2, 0, True):
        with pytest.raises(ValueError, match="divide the 5 frames"):
            module.decode(embeds(5, 4, 4, 6), num_frames=number)
    with pytest.raises(ValueError, match=r"frames as \(B\*T, C, H, W\)"):
        module.encode(embeds(1, 3, 5, 4, 6))


def test_offload_by_layers_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = sd_pipeline()
    accelerate.cpu_offload(pipe.vae, torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded by layers"):
        upgrade(pipe)
    pipe = sd_pipeline()
    upgrade(pipe)
    accelerate.cpu_offload(pipe.vae, torch.device("cpu"))
    with torch.no_grad(), pytest.raises(ValueError, match="weights are on no device"):
        pipe.vae.decode(embeds(1, 4, 8, 8))
    with pytest.raises(ValueError, match="roup offloading"):
        upgrade(sd_pipeline()).module.enable_group_offload(torch.device("cpu"))


def test_without_diffusers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "temporal_vae.adapters.drop_in")
    monkeypatch.delattr(temporal_vae.adapters, "drop_in")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"temporal-video-vae\[diffusers\]"):
        to_diffusers(awake(torch.float32))


def test_the_library_imports_without_diffusers() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = sys.modules['transformers'] = None; "
        "import temporal_vae; temporal_vae.TemporalVAE(base_channels=4, channel_multipliers=(1,)); "
        "assert not hasattr(temporal_vae, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_name_in_files_is_that_of_the_class() -> None:
    kinds = (temporal_vae.DiffusersTemporalVAE, temporal_vae.DiffusersWanVAE)
    assert tuple(kind.__name__ for kind in kinds) == pretrained.DROP_IN_CLASSES
    assert temporal_vae.ModelMixin.__module__.startswith("diffusers.")


# What an upgrade says ------------------------------------------------------------------------

PIPELINES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "svd": (svd_pipeline, svd_video), "animatediff": (animatediff_pipeline, animation),
} | {name: (make, picture) for name, make in IMAGES.items()}  # fmt: skip


def assert_checked_before_the_first_step(pipe: Any, run: Callable[[Any], Tensor]) -> None:
    """With the size that will be decoded: the check and the decoder see the same latents."""
    steps, seen = list[Any](), list[tuple[int, ...]]()
    network = getattr(pipe, "unet", None) or pipe.transformer
    network.register_forward_pre_hook(lambda *_: steps.append(1))
    vae = upgrade(pipe, "1GiB").module

    def noted(own: Callable[..., Any]) -> Callable[..., Any]:
        def note(z: Tensor, **options: Any) -> Any:
            seen.append((*z.shape, options.get("num_frames", 1)))
            return own(z, **options)

        return note

    vae.plan_decode, vae.decode = noted(vae.plan_decode), noted(vae.decode)
    run(pipe)
    assert len(seen) == 2 and seen[0] == seen[1] and steps
    steps.clear()
    vae.memory = 2**12
    with pytest.raises(budget.BudgetError, match="is below the least"):
        run(pipe)
    assert not steps


@pytest.mark.parametrize("name", PIPELINES)
def test_a_budget_is_checked_before_the_first_step(name: str) -> None:
    make, run = PIPELINES[name]
    assert_checked_before_the_first_step(make(), run)


def test_an_unusable_budget_matters_only_where_something_is_decoded() -> None:
    pipe = svd_pipeline()
    upgrade(pipe, 2**12)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    own = pipe.vae.encode

    def encode(*args: Any, **options: Any) -> Any:
        pipe.vae.memory = None
        posterior = own(*args, **options)
        pipe.vae.memory = 2**12
        return posterior

    pipe.vae.encode = encode
    latents = pipe(image, height=32, width=32, num_inference_steps=1, output_type="latent").frames
    assert latents.shape == (1, 5, 4, 16, 16)


def test_an_upgrade_says_little_and_verifies_itself() -> None:
    pipe = svd_pipeline()
    kind = type(pipe)
    done = upgrade(pipe)
    assert repr(done) == "Upgrade(StableVideoDiffusionPipeline, memory='6GiB'): undo() ends it"
    assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
    found = done.verify()
    assert found.ours > 90 and found.chunks < 60, str(found)
    with torch.no_grad():
        done.vae.decoder.conv_out.weight = nn.Parameter(done.vae.decoder.conv_out.weight * 1.01)
    assert done.verify().ours < 60  # the mutation
    done.undo()
    assert type(pipe) is kind
    assert upgrade(sd_pipeline()).verify().ours > 90


def test_an_upgraded_pipeline_is_pickled_and_copied() -> None:
    pipe = svd_pipeline()
    upgrade(pipe)
    expected = svd_video(pipe)
    for other in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert torch.equal(svd_video(other, decode_chunk_size=2), expected)
        assert other.vae is not pipe.vae


@pytest.mark.parametrize("before", [True, False])
def test_a_compiled_vae_is_looked_through(before: bool) -> None:
    pipe = svd_pipeline()
    one_clip = svd_video(pipe, decode_chunk_size=5)
    if before:
        pipe.vae = torch.compile(pipe.vae, backend="eager")
    stock, done = pipe.vae, upgrade(pipe)
    if not before:
        pipe.vae = torch.compile(pipe.vae, backend="eager")
    assert difference(svd_video(pipe, decode_chunk_size=2), one_clip) < TOLERANCE
    done.undo()
    assert pipe.vae is stock


def test_the_check_never_gets_in_the_way() -> None:
    """Images in forms whose size is not known before, sizes that the pipeline refuses itself."""
    pipe = sd_pipeline(StableDiffusionImg2ImgPipeline)
    upgrade(pipe, "1GiB")
    pixels = torch.rand(3, 32, 48)
    forms = [pixels, [pixels], [pixels.permute(1, 2, 0).numpy()], torch.randn(1, 4, 16, 24)]
    for image in forms:
        found = pipe(
            image=image, prompt_embeds=embeds(1, 4, 8), negative_prompt_embeds=embeds(1, 4, 8),
            num_inference_steps=2, strength=1.0, output_type="np",
        )  # fmt: skip
        assert found.images.shape[1:3] == (32, 48)
    pipe = sd_pipeline()
    upgrade(pipe, "1GiB")
    with pytest.raises(ValueError, match=r"height.*width.*divisible"):
        pipe(
            prompt_embeds=embeds(1, 4, 8), negative_prompt_embeds=embeds(1, 4, 8), height=1, width=1
        )


def test_offload_does_not_hide_a_budget() -> None:
    pipe = sd_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    upgrade(pipe, 2**12)
    steps = list[int]()
    pipe.unet.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(budget.BudgetError, match="below the least"):
        picture(pipe)
    assert not steps


def test_hooks_are_told_before_they_are_lost() -> None:
    pipe = svd_pipeline()
    pipe.vae.enable_gradient_checkpointing()
    handle = pipe.vae.decoder.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"put them on pipe\.vae after"):
        upgrade(pipe)
    handle.remove()
    done = upgrade(pipe, "least")
    assert done.vae.is_gradient_checkpointing
    steps = list[int]()
    pipe.unet.register_forward_pre_hook(lambda *_: steps.append(1))
    pipe.vae.decoder.mid_block.register_forward_hook(lambda *_: None)
    assert done.module.plan_decode(torch.empty(5, 4, 16, 16), num_frames=5).bounds is not None
    with pytest.raises(ValueError, match="a hook on"):
        svd_video(pipe)
    assert not steps
