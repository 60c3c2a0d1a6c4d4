"""Pipelines of Wan and Qwen-Image with our VAE: the same pictures, in any memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import difference
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from test_adapters import (
    assert_checked_before_the_first_step,
    embeds,
    generators,
    image_vae,
    living,
    quiet,
    sd_pipeline,
    seeded,
)
from test_wan import SMALL, STATISTICS, awaken, theirs
from test_wan import _exact_upsampling as _exact_upsampling
from test_wan import _few_ways as _few_ways
from torch import Tensor

import temporal_vae
from temporal_vae import TemporalVAE, WanVAEConfig, to_diffusers, upgrade
from temporal_vae.adapters import diffusers
from temporal_vae.walks import piecewise

pytestmark = pytest.mark.usefixtures("_few_ways")
"""And every test here compares with diffusers' upsampling in the dtype of the weights."""

HEIGHT, WIDTH, FRAMES = 64, 32, 9
LAYERED: dict[str, Any] = {
    "input_channels": 4, "z_dim": 8, **{key: 2 * value for key, value in STATISTICS.items()}
}  # fmt: skip
TOLERANCE = 1e-10
"""Of pictures that VAEs make in float64, whose values are up to 1."""


# Small pipelines -----------------------------------------------------------------------------


def lively(vae: Any) -> Any:
    """With so much contrast that a part of the pixels is clamped, and most are not."""
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(30)
    return vae


def parts(vae: str | Any) -> dict[str, Any]:
    """What all pipelines have; prompts are given as embeddings, so nothing encodes them."""
    vae = lively(theirs(vae)) if isinstance(vae, str) else vae
    scheduler = FlowMatchEulerDiscreteScheduler()
    return {"vae": vae, "scheduler": scheduler, "tokenizer": None, "text_encoder": None}


def wan_transformer(channels: int = 4, **options: Any) -> Any:
    kind = WanVACETransformer3DModel if "vace_layers" in options else WanTransformer3DModel
    return seeded(
        kind(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
            in_channels=channels, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=16,
            num_layers=1, rope_max_seq_len=32, **options,
        )
    )  # fmt: skip


def wan_pipeline(kind: Any = WanPipeline, vae: str | Any = "Wan 2.1", **options: Any) -> Any:
    channels = 12 if kind is WanImageToVideoPipeline and not options else 4
    vace = {"vace_layers": [0], "vace_in_channels": 72} if kind is WanVACEPipeline else {}
    return quiet(kind(transformer=wan_transformer(channels, **vace), **parts(vae), **options))


def qwen_transformer(
    kind: Any = QwenImageTransformer2DModel, channels: int = 4, **options: Any
) -> Any:
    model = kind(
        patch_size=2, in_channels=4 * channels, out_channels=channels, num_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4), **options,
    )  # fmt: skip
    return seeded(model).double()  # images are encoded in the dtype of the prompt


def qwen_pipeline(kind: Any = QwenImagePipeline, vae: str | Any = "Qwen-Image") -> Any:
    more: dict[str, Any] = {"transformer": qwen_transformer()}
    if "ControlNet" in kind.__name__:
        extra = 4 * ("Inpaint" in kind.__name__)
        more["controlnet"] = qwen_transformer(
            QwenImageControlNetModel, extra_condition_channels=extra
        )
    if "Edit" in kind.__name__ or kind is QwenImageLayeredPipeline:
        more["processor"] = None
    if kind is QwenImageLayeredPipeline:  # RGBA: as many channels would be taken for a latent
        more["transformer"] = qwen_transformer(
            channels=8, use_additional_t_cond=True, use_layer3d_rope=True
        )
        more["text_encoder"] = more["transformer"]  # of which it asks for the dtype
        vae = AutoencoderKLQwenImage(**SMALL | LAYERED).double().eval()
        awaken(vae)
        lively(vae)
    pipe = quiet(kind(**parts(vae) | more))
    if kind is QwenImageLayeredPipeline:
        pipe.get_image_caption = lambda *_, **__: "a photo"
    return pipe


def photo(seed: int = 4, mode: str = "RGB") -> Image.Image:
    draw = numpy.random.default_rng(seed)
    return Image.fromarray(
        draw.integers(0, 256, (HEIGHT, WIDTH, len(mode)), dtype=numpy.uint8), mode
    )


def frames(count: int = FRAMES) -> list[Image.Image]:
    return [photo(seed) for seed in range(count)]


def size_of(pipe: Any) -> dict[str, int]:
    """Two latent rows at the least, in Wan 2.2 too."""
    f = pipe.vae.config.scale_factor_spatial
    return {"height": max(HEIGHT, 4 * f), "width": max(WIDTH, 2 * f)}


@torch.no_grad()
def video(pipe: Any, **options: Any) -> Tensor:
    """(B, T, C, H, W) in [0, 1], after two steps."""
    kind = next(one for one in type(pipe).__mro__ if one.__module__.startswith("diffusers."))
    given: dict[str, Any] = {"num_frames": FRAMES} | size_of(pipe)
    if kind.__name__ == "WanImageToVideoPipeline":
        given["image"] = photo()
    if kind.__name__ == "WanVACEPipeline":
        given["video"], given["reference_images"] = frames(), [photo(9)]
    if kind.__name__ == "WanVideoToVideoPipeline":
        given["video"] = frames()
        del given["num_frames"]
    found: Tensor = pipe(
        prompt_embeds=embeds(1, 4, 8),
        negative_prompt_embeds=embeds(1, 4, 8, seed=9),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
        **given | options,
    ).frames
    return living(found)


@torch.no_grad()
def picture(pipe: Any, **options: Any) -> Tensor:
    """Two images (2, C, H, W) in [0, 1], after two steps; of the layered pipeline two layers."""
    name = next(
        one.__name__ for one in type(pipe).__mro__ if one.__module__.startswith("diffusers.")
    )
    given: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}
    samples = 1 if "Edit" in name or "Layered" in name else 2
    if "Img2Img" in name or "Inpaint" in name or "Edit" in name:
        given["image"] = photo()
    if "Img2Img" in name or ("Inpaint" in name and "Control" not in name):
        given["strength"] = 1.0
    if "Inpaint" in name:
        given["mask_image"] = photo(5).convert("L")
    if "ControlNet" in name:
        given["control_image"] = photo(6)
    if name == "QwenImageControlNetInpaintPipeline":
        given["control_image"], given["control_mask"] = given.pop("image"), given.pop("mask_image")
    if name == "QwenImageLayeredPipeline":
        given = {"image": photo(mode="RGBA"), "layers": 2}
    torch.manual_seed(0)  # a mask of ControlNet is encoded with noise of no generator
    images = pipe(
        prompt_embeds=embeds(samples, 4, 8).double(),
        prompt_embeds_mask=torch.ones(samples, 4).long(),
        true_cfg_scale=1.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
        **given | options,
    ).images
    return living(images[0] if isinstance(images, list) else images)


Run = Callable[..., Tensor]
WAN: dict[str, Callable[[], Any]] = {
    "text": wan_pipeline,
    "image": lambda: wan_pipeline(WanImageToVideoPipeline),
    "video": lambda: wan_pipeline(WanVideoToVideoPipeline),
    "conditions": lambda: wan_pipeline(WanVACEPipeline),
    "text, Wan 2.2": lambda: wan_pipeline(WanPipeline, "Wan 2.2", expand_timesteps=True),
    "image, Wan 2.2": lambda: wan_pipeline(
        WanImageToVideoPipeline, "Wan 2.2", expand_timesteps=True
    ),
}
QWEN: dict[str, Any] = {
    "QwenImage": QwenImagePipeline,
    "QwenImageImg2Img": QwenImageImg2ImgPipeline,
    "QwenImageInpaint": QwenImageInpaintPipeline,
    "QwenImageControlNet": QwenImageControlNetPipeline,
    "QwenImageControlNetInpaint": QwenImageControlNetInpaintPipeline,
    "QwenImageEdit": QwenImageEditPipeline,
    "QwenImageEditInpaint": QwenImageEditInpaintPipeline,
    "QwenImageEditPlus": QwenImageEditPlusPipeline,
    "QwenImageLayered": QwenImageLayeredPipeline,
}
PIPELINES: dict[str, tuple[Callable[[], Any], Run]] = {
    **{name: (make, video) for name, make in WAN.items()},
    **{name: (partial(qwen_pipeline, kind), picture) for name, kind in QWEN.items()},
}


@pytest.fixture(autouse=True)
def _small_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines of edits choose a size of a megapixel by themselves."""
    for kind in QWEN.values():
        module = sys.modules[kind.__module__]
        if hasattr(module, "calculate_dimensions"):
            sides = module.calculate_dimensions(1024 * 1024, 1.0)
            small = (WIDTH, HEIGHT, None)[: len(sides)]
            monkeypatch.setattr(module, "calculate_dimensions", lambda *_, small=small: small)


# The same pictures ---------------------------------------------------------------------------


SLOW = ("image, Wan 2.2", "conditions", "text, Wan 2.2", "QwenImageInpaint", "QwenImageControlNet",
        "QwenImageControlNetInpaint", "QwenImageEditInpaint", "QwenImageEditPlus")  # fmt: skip
pipelines = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PIPELINES],
)


@pipelines
def test_pictures_are_the_stock_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the least memory too, and with whatever switch of diffusers."""
    make, run = PIPELINES[name]
    pipe = make()
    stock, expected = pipe.vae, run(pipe)
    assert (expected == 0).any() and (expected == 1).any(), "nothing is clamped"
    walked, walk = list[Any](), piecewise.walk

    def noted(line: Any, *arguments: Any) -> Tensor:
        walked.append(line)
        return walk(line, *arguments)

    monkeypatch.setattr(piecewise, "walk", noted)
    done = upgrade(pipe, "least")
    assert difference(run(pipe), expected) < TOLERANCE
    assert any(line is done.vae.decoder for line in walked)
    encodes = name not in ("text", "text, Wan 2.2", "image, Wan 2.2", "QwenImage")
    assert any(line is done.vae.encoder for line in walked) == encodes
    done.module.memory = None
    assert difference(run(pipe), expected) < TOLERANCE
    done.undo()
    assert pipe.vae is stock
    assert torch.equal(run(pipe), expected)


def test_every_pipeline_that_is_known_is_tested() -> None:
    served = {name for name, known in diffusers._PIPELINES.items() if known.config is WanVAEConfig}
    wan = (WanPipeline, WanImageToVideoPipeline, WanVideoToVideoPipeline, WanVACEPipeline)
    assert served == {kind.__name__ for kind in (*wan, *QWEN.values())}


def test_the_picture_test_sees_pixels_that_are_not_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pipeline keeps its pixels in their range by itself, the VAE's own result tells."""
    stock = lively(theirs("Wan 2.1"))
    module = to_diffusers(diffusers._with_weights_of(stock))
    z = embeds(1, 4, 2, 4, 4).double()
    with torch.no_grad():
        expected = stock.decode(z).sample
        assert expected.max() == 1 and expected.min() == -1
        assert difference(module.decode(z).sample, expected) < TOLERANCE
        monkeypatch.setattr(Tensor, "clamp_", lambda self, *_: self)
        assert difference(module.decode(z).sample, expected) > 0.01


@pytest.mark.parametrize(
    "name", [pytest.param("video", marks=pytest.mark.slow), "QwenImageImg2Img"]
)
def test_tiling_and_slicing_change_no_picture(name: str) -> None:
    """Of tiles as small as these, which in diffusers make another picture."""
    make, run = PIPELINES[name]
    pipe = make()
    expected = run(pipe)
    tiles = {f"tile_sample_{what}_{side}": size for side in ("height", "width")
             for what, size in (("min", 16), ("stride", 8))}  # fmt: skip
    pipe.vae.enable_tiling(**tiles)
    assert difference(run(pipe), expected) > 1e-3
    pipe.vae.disable_tiling()
    module = upgrade(pipe).module
    for what in ("tiling", "slicing"):
        getattr(module, f"enable_{what}")(**(tiles if what == "tiling" else {}))
        assert getattr(module.vae, f"{what}_enabled")
        assert difference(run(pipe), expected) < TOLERANCE, what
        getattr(module, f"disable_{what}")()
        assert not getattr(module.vae, f"{what}_enabled")


# The drop-in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Wan 2.1", "Wan 2.2", "Qwen-Image"])
def test_every_call_of_the_drop_in_gives_the_stock_numbers(family: str) -> None:
    stock = theirs(family)
    module = to_diffusers(diffusers._with_weights_of(stock))
    f = module.vae.downsample_factor
    x = torch.rand(2, 3, 5, 2 * f, 3 * f, generator=generators(7)).double() * 2 - 1
    z = embeds(2, 4, 2, 2, 3).double()
    with torch.no_grad():
        mine, other = module.encode(x).latent_dist, stock.encode(x, return_dict=False)[0]
        pairs = [
            (mine.mode(), other.mode()), (mine.logvar, other.logvar), (mine.kl(), other.kl()),
            (module.decode(z).sample, stock.decode(z).sample),
            (module.decode(z, False)[0], stock.decode(z, False)[0]),
            (module(x).sample, stock(x).sample),
            (module(x, True, False, generators(1))[0], stock(x, True, False, generators(1))[0]),
        ]  # fmt: skip
        pairs += [
            (mine.sample(generators(seeds)), other.sample(generators(seeds)))
            for seeds in (5, [1, 2])
        ]
    for found, expected in pairs:
        assert found.shape == expected.shape and difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["Wan 2.1", "Wan 2.2", "Qwen-Image"])
def test_the_drop_in_has_what_pipelines_read(family: str) -> None:
    stock = theirs(family)
    module = to_diffusers(diffusers._with_weights_of(stock))
    options = {name: value for name, value in stock.config.items() if name[0] != "_"}
    if family != "Wan 2.2":
        options.pop("decoder_base_dim", None)  # None, or the same number
    for name, value in options.items():
        assert getattr(module.config, name) == value, name
    assert module.temperal_downsample == stock.temperal_downsample
    assert (module.dtype, module.device) == (stock.dtype, stock.device)
    assert module.quant_conv is module.vae.encoder.quant_conv
    assert set(module.state_dict()) == set(module.vae.state_dict())


def test_gradients_pass_through_the_drop_in() -> None:
    stock = theirs("Wan 2.1")
    module = to_diffusers(diffusers._with_weights_of(stock))
    gradients = []
    for model in (module, stock):
        z = embeds(1, 4, 2, 2, 2).double().requires_grad_()
        model.decode(z).sample.square().sum().backward()
        gradients.append(z.grad)
    assert difference(*gradients) < TOLERANCE  # type: ignore[arg-type]
    module.memory = "1GiB"
    with pytest.raises(ValueError, match=r"leave the budget out.* torch\.no_grad\(\)"):
        module.decode(embeds(1, 4, 2, 2, 2).double())


# There and back ------------------------------------------------------------------------------


def test_a_pipeline_saves_and_loads(tmp_path: Path) -> None:
    pipe = wan_pipeline(WanVideoToVideoPipeline)
    done = upgrade(pipe)
    expected = video(pipe)
    pipe.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["vae"] == ["temporal_vae", "DiffusersWanVAE"]
    again = quiet(
        WanVideoToVideoPipeline.from_pretrained(
            tmp_path / "ours", tokenizer=None, text_encoder=None,
            dtype={"vae": torch.float64, "default": torch.float32},
        )
    )  # fmt: skip
    assert type(again.vae) is temporal_vae.DiffusersWanVAE
    assert again.vae.vae.config == done.vae.config
    # to rounding: loaded weights lie elsewhere in memory, which the other networks feel
    assert difference(video(again), expected) < 1e-5
    alone = TemporalVAE.from_pretrained(tmp_path / "ours", subfolder="vae", dtype=torch.float64)
    assert alone.config == done.vae.config
    assert all(torch.equal(p, alone.get_parameter(n)) for n, p in done.vae.named_parameters())
    done.undo()
    pipe.save_pretrained(tmp_path / "stock")
    index = json.loads((tmp_path / "stock" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]


def test_weights_are_shared_and_move_together() -> None:
    pipe = wan_pipeline()
    done = upgrade(pipe)
    assert set(map(id, done.vae.parameters())) == set(map(id, done.stock.parameters()))
    pipe.to(torch.bfloat16)
    assert done.vae.dtype is done.stock.dtype is pipe.vae.dtype is torch.bfloat16
    assert video(pipe).isfinite().all()


def test_offload_of_whole_models_goes_on() -> None:
    """With the CPU as the accelerator: the hooks are the same."""
    pytest.importorskip("accelerate")
    pipe = wan_pipeline(WanImageToVideoPipeline)
    expected = video(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    stock, done = pipe.vae, upgrade(pipe)
    assert hasattr(pipe.vae, "_hf_hook") and not hasattr(stock, "_hf_hook")
    assert difference(video(pipe), expected) < TOLERANCE
    done.undo()
    assert pipe.vae is stock and hasattr(stock, "_hf_hook")
    assert difference(video(pipe), expected) < TOLERANCE


def test_an_upgrade_verifies_itself() -> None:
    done = upgrade(wan_pipeline())
    found = done.verify(frames=3)
    assert found.ours > 250 and str(found).endswith("own VAE in one piece")
    with torch.no_grad():
        done.vae.decoder.conv_out.weight = torch.nn.Parameter(done.vae.decoder.conv_out.weight * 2)
    assert done.verify(frames=3).ours < 60  # the mutation


# Bad input -----------------------------------------------------------------------------------

SIZED = [name for name in PIPELINES if "Edit" not in name and "Layered" not in name]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SIZED],
)
def test_a_budget_is_checked_before_the_first_step(name: str) -> None:
    make, run = PIPELINES[name]
    assert_checked_before_the_first_step(make(), run)


def test_given_latents_are_what_is_checked() -> None:
    """Not the size beside them, which a pipeline does not look at then; and without gradients, of
    which a pipeline wants none, wherever it is called."""
    pipe = wan_pipeline()
    vae = upgrade(pipe, "1GiB").module
    seen, own = list[tuple[int, ...]](), vae.plan_decode

    def noted(z: Tensor, **options: Any) -> Any:
        seen.append(tuple(z.shape))
        return own(z, **options)

    vae.plan_decode = noted
    with torch.enable_grad():
        run: Any = video  # whose decorator is passed by
        found = run.__wrapped__(pipe, latents=embeds(1, 4, 2, 4, 4), num_frames=81)
    assert found.shape[1] == 5
    assert seen == [(1, 4, 2, 4, 4)]


def test_numbers_of_frames_that_do_not_fit_are_refused() -> None:
    """Stock would make a video of fewer frames, in silence."""
    pipe = wan_pipeline(WanVideoToVideoPipeline)
    assert video(pipe, video=frames(8)).shape[1] == 5
    steps = list[int]()
    pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    module = upgrade(pipe).module
    arrays = numpy.stack([numpy.asarray(one) for one in frames(8)]) / 255
    for given in (frames(8), arrays):
        with pytest.raises(ValueError, match=r"8 frames are no whole .* take 5 frames or 9"):
            video(pipe, video=given)
    for memory in ("1GiB", None):
        module.memory = memory
        with torch.no_grad(), pytest.raises(ValueError, match="take 5 frames or 9"):
            module.encode(torch.zeros(1, 3, 8, 16, 16))
    assert not steps
    text = wan_pipeline()
    upgrade(text)
    assert video(text, num_frames=8).shape[1] == 9, "where the pipeline rounds, it goes on to"


@pytest.mark.parametrize("memory", ["1GiB", None])
@torch.no_grad()
def test_tensors_that_do_not_fit_are_refused(memory: str | None) -> None:
    module = upgrade(wan_pipeline(), memory).module
    with pytest.raises(ValueError, match=r"must have 4 channels.*(16|\(1, 16, 2, 4, 4\))"):
        module.decode(torch.zeros(1, 16, 2, 4, 4))
    with pytest.raises(ValueError, match=r"take clips as \(B, C, T, H, W\), got \(2, 4, 4, 4\)"):
        module.decode(torch.zeros(2, 4, 4, 4))
    with pytest.raises(ValueError, match="must have 3 channels"):
        module.encode(torch.zeros(1, 4, 5, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8, got 12x16"):
        module.encode(torch.zeros(1, 3, 5, 12, 16))


def test_vaes_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    other = wan_pipeline()
    other.vae = AutoencoderTiny()
    images, frames = wan_pipeline(), sd_pipeline()
    images.vae, frames.vae = image_vae(), theirs("Wan 2.1")
    odd = theirs("Wan 2.1")
    odd.register_to_config(dropout=0.5)
    for pipe, words in (
        (other, r"AutoencoderTiny: only AutoencoderKL, .* and AutoencoderKLQwenImage are known"),
        (images, "a WanPipeline does not work with the AutoencoderKL that is its vae"),
        (frames, "a StableDiffusionPipeline does not work with the AutoencoderKLWan"),
        (wan_pipeline(vae=odd), "dropout must be 0.0 in a AutoencoderKLWan, got 0.5"),
    ):
        kind, held = type(pipe), dict(vars(pipe))
        with pytest.raises(ValueError, match=words):
            upgrade(pipe)
        assert type(pipe) is kind and vars(pipe) == held
