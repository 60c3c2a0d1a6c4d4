"""Checkpoints of every family that is read, written by their own library, both ways; bad files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import awake, difference, pixels, redraw, thinned
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from test_foreign import inputs, rms_errors, theirs, worst
from torch import Tensor

from temporal_vae import TemporalVAE, TemporalVAEConfig
from temporal_vae.checkpoints import diffusers_names

WEIGHTS = "diffusion_pytorch_model.safetensors"


def image_vae(widths: tuple[int, ...] = (32, 64), layers: int = 2, **options: Any) -> Any:
    """An awake `AutoencoderKL`, float64."""
    model = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=layers,
        **options,
    )
    redraw(model.double())
    return model.eval()


FLUX: dict[str, Any] = {
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "SVD": theirs,
    "SD": image_vae,
    "SDXL": lambda: image_vae((32, 64, 64), scaling_factor=0.13025),
    "FLUX": lambda: image_vae(**FLUX),
    "another": lambda: image_vae(
        (16, 24), layers=1, norm_num_groups=8, in_channels=1, out_channels=1
    ),
    "half a pair": lambda: image_vae(use_post_quant_conv=False),
}  # fmt: skip
family = pytest.mark.parametrize("name", FAMILIES)


def given(mine: TemporalVAE, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A clip and a latent for this model."""
    f = mine.downsample_factor
    video, latent = inputs(2, 3, (8 * f, 6 * f), mine.input_channels, f, mine.latent_channels)
    return video.to(dtype), latent.to(dtype)


# Both ways -----------------------------------------------------------------------------------


@family
def test_what_diffusers_wrote_gives_its_numbers(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    model.save_pretrained(tmp_path)
    mine = TemporalVAE.from_pretrained(tmp_path, dtype=torch.float64)
    assert worst(model, mine, *given(mine)) < 1e-10
    assert mine.config.widths == tuple(model.config.block_out_channels)
    assert mine.latent_scale_factor == model.config.scaling_factor
    assert isinstance(mine.config, TemporalVAEConfig)
    assert mine.config.latent_shift_factor == (model.config.get("shift_factor") or 0.0)
    assert mine.parameter_count == sum(p.numel() for p in model.parameters())


def reads_what_we_write(model: Any, folder: Path) -> tuple[Any, TemporalVAE]:
    """A model of diffusers, through a model of ours and its files, and back; with ours."""
    model.save_pretrained(folder / "theirs")
    mine = TemporalVAE.from_pretrained(folder / "theirs", dtype=torch.float64)
    mine.save_pretrained(folder / "ours", format="diffusers")
    assert {file.name for file in (folder / "ours").iterdir()} == {"config.json", WEIGHTS}
    again = type(model).from_pretrained(folder / "ours", torch_dtype=torch.float64)
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    for option, value in model.config.items():
        if option != "sample_size" and not option.startswith("_"):
            assert _plain(again.config[option]) == _plain(value), option
    return again, mine


@family
def test_diffusers_reads_what_we_write(name: str, tmp_path: Path) -> None:
    again, mine = reads_what_we_write(FAMILIES[name](), tmp_path)
    assert worst(again, mine, *given(mine)) < 1e-10


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@family
def test_our_own_format_keeps_a_foreign_model(name: str, tmp_path: Path) -> None:
    FAMILIES[name]().float().save_pretrained(tmp_path / "theirs")
    mine = TemporalVAE.from_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "ours")
    again = TemporalVAE.from_pretrained(tmp_path / "ours")
    assert again.config == mine.config
    assert all(torch.equal(p, again.state_dict()[key]) for key, p in mine.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("name", ["SVD", "SD", "FLUX"])
def test_gradients_are_diffusers(
    name: str, dtype: torch.dtype, bound: float, tmp_path: Path
) -> None:
    model = FAMILIES[name]().to(dtype)
    model.save_pretrained(tmp_path)
    mine = TemporalVAE.from_pretrained(tmp_path, dtype=dtype)
    video, latent = (x[:1].requires_grad_() for x in given(mine, dtype))
    frames = video.shape[2]
    extra = {"num_frames": frames} if name == "SVD" else {}
    folded = [x.transpose(1, 2).flatten(0, 1).detach().requires_grad_() for x in (video, latent)]
    posterior = model.encode(folded[0]).latent_dist
    decoded = model.decode(folded[1], **extra).sample
    loss = posterior.mean.square().sum() + posterior.logvar.sum() + decoded.square().sum()
    loss.backward()
    mean, log_variance = mine.encode_with_distribution(video)
    ours = mean.square().sum() + log_variance.sum() + mine.decode(latent).square().sum()
    ours.backward()
    for x, y in zip((video, latent), folded, strict=True):
        assert x.grad is not None and y.grad is not None
        assert difference(x.grad.transpose(1, 2).flatten(0, 1), y.grad) < bound
    gradients = {key: p.grad for key, p in mine.named_parameters()}
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for key, p in model.named_parameters():
        gradient = gradients[diffusers_names.our_name(key)]
        assert gradient is not None
        # against the largest of all: the bias of attention's keys has none but rounding
        assert float((gradient - p.grad).abs().max()) < bound * max(
            float(p.grad.abs().max()), 1e-3 * largest
        ), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["SD", pytest.param("SDXL", marks=pytest.mark.slow)])
def test_rounding_is_no_worse_than_diffusers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    model.save_pretrained(tmp_path)
    mine = TemporalVAE.from_pretrained(tmp_path, dtype=torch.float64)
    for error, other in rms_errors(model, mine, dtype):
        assert error <= 1.5 * other


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, FLUX], ids=["SD", "FLUX"])
def test_full_size_image_vaes(options: dict[str, Any], tmp_path: Path) -> None:
    model = image_vae((128, 256, 512, 512), **options)
    model.save_pretrained(tmp_path / "theirs")
    mine = TemporalVAE.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    cells = mine.latent_channels
    assert worst(model, mine, *inputs(1, 2, (64, 96), factor=8, cells=cells)) < 1e-10
    mine.save_pretrained(tmp_path / "ours", format="diffusers")
    again = AutoencoderKL.from_pretrained(tmp_path / "ours", torch_dtype=torch.float64)
    assert worst(again, mine, *inputs(1, 1, (32, 32), factor=8, cells=cells)) < 1e-10
    single = save_single(model, tmp_path / "single.safetensors")
    alone = TemporalVAE.from_pretrained(
        single, dtype=torch.float64, latent_scale_factor=1.0, latent_shift_factor=0.0
    )
    assert worst(model, alone, *inputs(1, 1, (32, 32), factor=8, cells=cells)) < 1e-10
    inflated = TemporalVAE.from_image_vae(tmp_path / "theirs", dtype=torch.float64)
    assert worst(model, inflated, *inputs(1, 3, (32, 32), factor=8, cells=cells)) < 1e-10


@pytest.mark.slow
def test_full_size_svd(tmp_path: Path) -> None:
    model = theirs((128, 256, 512, 512))
    model.save_pretrained(tmp_path / "theirs")
    mine = TemporalVAE.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    assert mine.config == TemporalVAEConfig.svd()
    assert worst(model, mine, *inputs(1, 2, (64, 96), factor=8)) < 1e-10
    single = save_single(model, tmp_path / "svd.safetensors", "first_stage_model.")
    alone = TemporalVAE.from_pretrained(single, dtype=torch.float64)
    assert alone.config == TemporalVAEConfig.svd()
    assert worst(model, alone, *inputs(1, 2, (32, 32), factor=8)) < 1e-10


# Single files --------------------------------------------------------------------------------

SGM_TEMPORAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}
SGM_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}


def single_key(key: str, levels: int) -> str:
    """The name that the code of CompVis and Stability has for a parameter of diffusers'."""
    side, *rest = key.split(".")
    if side in ("quant_conv", "post_quant_conv"):
        return key
    match rest:
        case ["time_conv_out", kind]:
            return f"{side}.conv_out.time_mix_conv.{kind}"
        case ["conv_norm_out", kind]:
            return f"{side}.norm_out.{kind}"
        case ["mid_block", "attentions", _, layer, *last]:
            return f"{side}.mid.attn_1.{SGM_ATTENTION[layer]}.{last[-1]}"
        case ["mid_block", "resnets", n, *layer]:
            return f"{side}.mid.block_{int(n) + 1}.{_single_layer(layer)}"
        case ["down_blocks", n, "resnets", m, *layer]:
            return f"{side}.down.{n}.block.{m}.{_single_layer(layer)}"
        case ["down_blocks", n, "downsamplers", _, *layer]:
            return f"{side}.down.{n}.downsample.{'.'.join(layer)}"
        case ["up_blocks", n, "resnets", m, *layer]:
            return f"{side}.up.{levels - 1 - int(n)}.block.{m}.{_single_layer(layer)}"
        case ["up_blocks", n, "upsamplers", _, *layer]:
            return f"{side}.up.{levels - 1 - int(n)}.upsample.{'.'.join(layer)}"
    return key


def _single_layer(layer: list[str]) -> str:
    match layer:
        case ["temporal_res_block", name, kind]:
            return f"time_stack.{SGM_TEMPORAL[name]}.{kind}"
        case ["time_mixer", "mix_factor"]:
            return "mix_factor"
        case ["spatial_res_block", *inner]:
            return _single_layer(inner)
        case ["conv_shortcut", kind]:
            return f"nin_shortcut.{kind}"
    return ".".join(layer)


def single_state(model: Any) -> dict[str, Tensor]:
    """The weights as their own training code stores them; attention is of 1x1 convolutions."""
    levels = len(model.config.block_out_channels)
    state = {single_key(key, levels): tensor for key, tensor in model.state_dict().items()}
    return {
        key: tensor[:, :, None, None] if ".attn_1." in key and tensor.ndim == 2 else tensor
        for key, tensor in state.items()
    }


def save_single(model: Any, file: Path, prefix: str = "", **others: Tensor) -> Path:
    state = {prefix + key: tensor.contiguous() for key, tensor in single_state(model).items()}
    save_file(state | others, file)
    return file


def test_the_converter_of_this_test_writes_published_names() -> None:
    keys = single_state(theirs((32, 64))).keys()
    for key in (
        "encoder.down.0.block.0.norm1.weight",
        "encoder.down.0.downsample.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.mid.attn_1.q.weight",
        "encoder.norm_out.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.up.0.block.2.time_stack.in_layers.2.weight",
        "decoder.up.0.block.0.mix_factor",
        "decoder.mid.block_1.time_stack.out_layers.3.bias",
        "decoder.conv_out.time_mix_conv.weight",
        "quant_conv.weight",
    ):
        assert key in keys
    assert not any("blocks" in key or "resnets" in key for key in keys)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("name", ["SVD", "SD", "SDXL", "FLUX", "half a pair"])
def test_single_files(name: str, prefix: str, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    other = "model.diffusion_model.out.2.bias" if prefix else "loss.logvar"
    file = save_single(model, tmp_path / "a.safetensors", prefix, **{other: torch.zeros(3)})
    mine = TemporalVAE.from_pretrained(
        file, dtype=torch.float64, latent_scale_factor=0.5, latent_shift_factor=0.0
    )
    assert worst(model, mine, *given(mine)) < 1e-10
    assert mine.latent_scale_factor == 0.5
    assert isinstance(mine.config, TemporalVAEConfig)
    assert mine.config.time_conv_out == (name == "SVD")


@pytest.mark.parametrize(
    ("name", "other", "scale"),
    [("SDXL", None, 0.18215), ("SDXL", "model.diffusion_model.label_emb.0.0.weight", 0.13025)],
)
def test_a_scale_that_is_guessed_is_said(
    name: str, other: str | None, scale: float, tmp_path: Path
) -> None:
    extra = {other: torch.zeros(3)} if other else {}
    file = save_single(FAMILIES[name](), tmp_path / "a.safetensors", "first_stage_model.", **extra)
    with pytest.warns(UserWarning, match="does not say its latent scale"):
        assert TemporalVAE.from_pretrained(file).latent_scale_factor == scale


def test_half_of_an_answer_is_asked_again(tmp_path: Path) -> None:
    file = save_single(FAMILIES["FLUX"](), tmp_path / "a.safetensors", "")
    with pytest.warns(UserWarning, match="latent_scale_factor and latent_shift_factor"):
        TemporalVAE.from_pretrained(file, latent_scale_factor=1.5305)
    TemporalVAE.from_pretrained(file, latent_scale_factor=1.5305, latent_shift_factor=0.0609)


def test_svd_as_stability_published_it_has_no_quant_conv(tmp_path: Path) -> None:
    model = theirs((32, 64))
    with torch.no_grad():
        model.quant_conv.weight.copy_(torch.eye(8, dtype=torch.float64)[:, :, None, None])
        model.quant_conv.bias.zero_()
    state = {key: t.contiguous() for key, t in single_state(model).items() if "quant" not in key}
    save_file(state, tmp_path / "svd.safetensors")
    mine = TemporalVAE.from_pretrained(tmp_path / "svd.safetensors", dtype=torch.float64)
    assert isinstance(mine.config, TemporalVAEConfig)
    assert not mine.config.quant_conv
    assert worst(model, mine, *given(mine)) < 1e-10


SCALES: list[tuple[str, str, float, float]] = [
    ("SD", "cond_stage_model.transformer.x", 0.18215, 0.0),
    ("SDXL", "conditioner.embedders.1.model.positional_embedding", 0.13025, 0.0),
    ("SDXL", "conditioner.embedders.0.model.positional_embedding", 0.13025, 0.0),
    ("SVD", "conditioner.embedders.0.open_clip.model.x", 0.18215, 0.0),
    ("FLUX", "model.diffusion_model.joint_blocks.0.x", 1.5305, 0.0609),  # is SD3 then
]


@pytest.mark.parametrize(("name", "other", "scale", "shift"), SCALES)
def test_a_whole_checkpoint_tells_its_latent_scale(
    name: str, other: str, scale: float, shift: float, tmp_path: Path
) -> None:
    file = tmp_path / "whole.safetensors"
    save_single(FAMILIES[name]().float(), file, "first_stage_model.", **{other: torch.zeros(1)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = TemporalVAE.from_pretrained(file).config
    assert isinstance(config, TemporalVAEConfig)
    assert (config.latent_scale_factor, config.latent_shift_factor) == (scale, shift)


@pytest.mark.parametrize(("name", "scale"), [("SD", 0.18215), ("FLUX", 0.3611)])
def test_a_vae_alone_in_a_file_says_that_its_scale_is_a_guess(
    name: str, scale: float, tmp_path: Path
) -> None:
    file = save_single(FAMILIES[name]().float(), tmp_path / "alone.safetensors")
    with pytest.warns(UserWarning, match="latent_scale_factor .*to choose") as caught:
        assert TemporalVAE.from_pretrained(file).latent_scale_factor == scale
    assert caught[0].filename == __file__
    given_scale = TemporalVAE.from_pretrained(
        file, latent_scale_factor=0.13025, latent_shift_factor=0.0
    )
    assert given_scale.latent_scale_factor == 0.13025


# Old keys, parts, variants -------------------------------------------------------------------

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite the weights in a folder of diffusers."""
    state = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file({key: t.contiguous() for key, t in change(state).items()}, folder / WEIGHTS)


@pytest.mark.parametrize("as_convolutions", [False, True])
@pytest.mark.parametrize("name", ["SD", "SVD"])
def test_old_attention_keys(name: str, as_convolutions: bool, tmp_path: Path) -> None:
    model = FAMILIES[name]()
    model.save_pretrained(tmp_path)

    def age(state: dict[str, Tensor]) -> dict[str, Tensor]:
        aged = {}
        for key, tensor in state.items():
            old = key
            for now, then in OLD.items():
                old = old.replace(f".{now}.", f".{then}.")
            if as_convolutions and old != key and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            aged[old] = tensor
        assert any("proj_attn" in key for key in aged)
        return aged

    edit(tmp_path, age)
    mine = TemporalVAE.from_pretrained(tmp_path, dtype=torch.float64)
    assert worst(model, mine, *given(mine)) < 1e-10


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(variant: str | None, tmp_path: Path) -> None:
    model = image_vae()
    model.save_pretrained(tmp_path, max_shard_size="500KB", variant=variant)
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    assert not (tmp_path / WEIGHTS).exists()
    mine = TemporalVAE.from_pretrained(tmp_path, dtype=torch.float64, variant=variant)
    assert worst(model, mine, *given(mine)) < 1e-10


def test_variants(tmp_path: Path) -> None:
    model = image_vae()
    model.half().save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"no diffusion_pytorch_model\.safetensors .*fp16"):
        TemporalVAE.from_pretrained(tmp_path)
    mine = TemporalVAE.from_pretrained(tmp_path, variant="fp16")
    assert mine.dtype == torch.float32
    expected = model.state_dict()["decoder.conv_in.weight"]
    assert torch.equal(mine.decoder.conv_in.weight, expected.float())
    half = TemporalVAE.from_pretrained(tmp_path, dtype=torch.float16, variant="fp16")
    assert half.dtype == torch.float16
    with pytest.raises(FileNotFoundError, match=r"no .*bf16"):
        TemporalVAE.from_pretrained(tmp_path, variant="bf16")


def test_a_pipeline_has_its_vae_in_a_subfolder(tmp_path: Path) -> None:
    image_vae().float().save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="subfolder='vae'"):
        TemporalVAE.from_pretrained(tmp_path)
    mine = TemporalVAE.from_pretrained(tmp_path, subfolder="vae")
    assert mine.config.widths == (32, 64)
    with pytest.raises(FileNotFoundError, match="no folder 'unet'"):
        TemporalVAE.from_pretrained(tmp_path, subfolder="unet")


def test_weights_stay_mapped_but_their_file_is_never_written(tmp_path: Path) -> None:
    image_vae().float().save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    mine = TemporalVAE.from_pretrained(tmp_path)
    with torch.no_grad():
        for p in mine.parameters():
            p.mul_(2)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    mine.save_pretrained(tmp_path, format="diffusers")  # over the file that it is mapped to
    again = TemporalVAE.from_pretrained(tmp_path)
    assert all(torch.equal(p, again.state_dict()[key]) for key, p in mine.state_dict().items())
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())


def test_no_random_numbers_are_drawn(tmp_path: Path) -> None:
    image_vae().float().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    TemporalVAE.from_pretrained(tmp_path)
    TemporalVAE.from_image_vae(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


# The Hub -------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys, time
from temporal_vae import TemporalVAE
for name, revision in {asked!r}:
    start = time.perf_counter()
    try:
        model = TemporalVAE.from_pretrained(name, subfolder="vae", revision=revision)
        print("loaded", model.config.widths)
    except Exception as error:
        print(type(error).__name__, isinstance(error, OSError), *str(error).split())
    print(f"{{time.perf_counter() - start:.1f}} seconds", file=sys.stderr)
"""


THING = ("someone/thing", None)


def in_a_fresh_process(
    cache: Path, *asked: tuple[str, str | None], **environment: str
) -> list[str]:
    """What loading each (name, revision) says; the Hub's library reads the environment at import.

    One process for all of them, as each takes its two seconds.
    """
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = known | {"HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    settings["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", LOAD.format(asked=asked)],
        env=settings, capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    seconds = re.findall(r"([\d.]+) seconds", result.stderr)
    assert len(seconds) == len(asked) and max(map(float, seconds)) < 15, result.stderr
    return result.stdout.splitlines()


def cache_of_the_hub(cache: Path) -> None:
    """someone/thing as the Hub's library keeps it, with the VAE in vae/."""
    repository = cache / "hub" / "models--someone--thing"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    image_vae().float().save_pretrained(repository / "snapshots" / COMMIT / "vae")


def test_the_cache_of_the_hub_serves_offline(tmp_path: Path) -> None:
    cache_of_the_hub(tmp_path)
    asked = (THING, ("someone/thing", COMMIT), ("someone/other", None))
    *loaded, refused = in_a_fresh_process(tmp_path, *asked, HF_HUB_OFFLINE="1")
    assert loaded == ["loaded (32, 64)"] * 2
    assert "OSError True cannot ask the Hugging Face Hub for 'someone/other'" in refused


def test_without_a_network_the_cache_serves_and_else_an_error_comes_fast(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    cache_of_the_hub(tmp_path)
    loaded, refused = in_a_fresh_process(tmp_path, THING, ("someone/other", None), **nowhere)
    assert loaded == "loaded (32, 64)"
    assert "OSError True cannot ask the Hugging Face Hub for 'someone/other'" in refused
    assert "hf download someone/other" in refused


@contextmanager
def fake_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """A server that speaks as much of the Hub as is needed; (its address, what was asked for)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def answer(self) -> None:
            asked.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0]
            if path.startswith("/api/models/someone/thing"):
                if "/revision/nowhere" in path:
                    return self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
                files = [str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()]
                listing = {"id": "someone/thing", "sha": COMMIT}
                siblings = [{"rfilename": file} for file in files]
                return self.reply(200, json.dumps(listing | {"siblings": siblings}).encode())
            file = root / re.sub(r"^/someone/thing/resolve/[^/]+/", "", path)
            if not file.is_file():
                return self.reply(404, b"", X_Error_Code="RepoNotFound")
            return self.reply(
                200, file.read_bytes(), ETag=f'"{abs(hash(file.name))}"', X_Repo_Commit=COMMIT
            )

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_of_a_repository_only_what_is_needed_is_fetched(tmp_path: Path) -> None:
    vae = tmp_path / "repository" / "vae"
    model = image_vae().float()
    model.save_pretrained(vae)
    model.save_pretrained(vae, variant="fp16")
    (vae / "diffusion_pytorch_model.bin").write_bytes(b"never")
    (tmp_path / "repository" / "model_index.json").write_text("{}")
    with fake_hub(tmp_path / "repository") as (address, asked):
        hub = {"HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
        both = (THING, ("someone/thing", "nowhere"))
        loaded, missing = in_a_fresh_process(tmp_path / "cache", *both, **hub)
    assert loaded == "loaded (32, 64)"
    fetched = {line.split("/")[-1] for line in asked if line.startswith("GET /someone")}
    assert fetched == {"config.json", WEIGHTS}
    assert "FileNotFoundError" in missing and "no repository 'someone/thing' at rev" in missing
    assert in_a_fresh_process(tmp_path / "cache", THING, HF_HUB_OFFLINE="1") == [loaded]


# Bad input -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that diffusers wrote."""
    folder = tmp_path_factory.mktemp("good")
    image_vae().float().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def assert_refused(path: Path | str, message: str, error: type[Exception] = ValueError) -> None:
    for load in (TemporalVAE.from_pretrained, TemporalVAE.from_image_vae):
        start = time.perf_counter()
        with pytest.raises(error, match=message):
            load(path)
        assert time.perf_counter() - start < 5


SPOILED: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("truncated", lambda data: data[: len(data) // 2], "is damaged"),
    ("one byte short", lambda data: data[:-1], "is damaged"),
    ("empty", lambda data: b"", "is damaged"),
    ("noise", lambda data: bytes(range(256)) * 50, "is damaged"),
    ("header cut", lambda data: data[:100], "is damaged"),
    ("a pickle under another name", lambda data: b"PK\x03\x04" + data, "is a pickle"),
    ("an old pickle", lambda data: b"\x80\x02}q\x00." + data[:50], "is a pickle"),
]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in SPOILED], ids=[case[0] for case in SPOILED]
)
def test_spoiled_files(change: Callable[[bytes], bytes], message: str, folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(change(weights.read_bytes()))
    assert_refused(folder, f"{re.escape(WEIGHTS)} {message}")
    single = folder / "single.safetensors"
    weights.rename(single)
    assert_refused(single, f"single.safetensors {message}")


@pytest.mark.parametrize("suffix", ["ckpt", "bin", "pt", "pth"])
def test_pickles_are_refused_and_the_way_to_convert_them_works(
    suffix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    model = image_vae().float()
    pickle = folder / f"model.{suffix}"
    torch.save({"state_dict": single_state(model), "step": 3}, pickle)
    assert_refused(pickle, f"model.{suffix} is a pickle, and reading a pickle can run any code")
    with pytest.raises(ValueError) as error:
        TemporalVAE.from_pretrained(pickle)
    recipe = str(error.value).split("safe reader: ")[1].replace("FILE", repr(str(pickle)))
    exec(f"import torch, safetensors.torch; {recipe}")
    mine = TemporalVAE.from_pretrained("NEW.safetensors", latent_scale_factor=0.18215)
    assert torch.equal(mine.encoder.conv_in.weight, model.encoder.conv_in.weight)
    (folder / WEIGHTS).unlink()
    (folder / "NEW.safetensors").unlink()
    pickle.rename(folder / "diffusion_pytorch_model.bin")
    assert_refused(folder, r"diffusion_pytorch_model.bin is a pickle")


MISFITS: list[tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (
        "missing",
        lambda s: {k: t for k, t in s.items() if k != "decoder.conv_in.bias"},
        "1 problems: missing decoder.conv_in.bias",
    ),
    (
        "unexpected",
        lambda s: s | {"decoder.conv_on.bias": torch.zeros(2)},
        "1 problems: unexpected decoder.conv_on.bias",
    ),
    (
        "misshapen",
        lambda s: s | {"decoder.conv_in.bias": torch.zeros(2)},
        r"decoder.conv_in.bias is \(2,\), not \(64,\)",
    ),
    (
        "whole numbers",
        lambda s: s | {"decoder.conv_in.bias": torch.zeros(64, dtype=torch.int64)},
        "decoder.conv_in.bias is I64, not floating point",
    ),
    (
        "twice",
        lambda s: s | {"decoder.mid_block.attentions.0.query.bias": torch.zeros(64)},
        "to_q.bias is stored twice",
    ),
    (
        "of a video VAE",
        lambda s: s | {"decoder.time_conv_out.bias": torch.zeros(3)},
        "unexpected decoder.time_conv_out.bias",
    ),
    ("nothing", lambda s: {}, "asks for at least 10 blocks"),
]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in MISFITS], ids=[case[0] for case in MISFITS]
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str, folder: Path
) -> None:
    edit(folder, change)
    assert_refused(folder, message)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"_class_name": "UNet2DConditionModel"}, "cannot read a UNet2DConditionModel"),
    ({"_class_name": None}, "cannot read a None"),
    ({"_class_name": ["AutoencoderKL"]}, "cannot read a "),
    ({"mid_block_add_attention": False}, "mid_block_add_attention must be True"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types must be"),
    ({"up_block_types": "UpDecoderBlock3D"}, "up_block_types must be"),
    ({"act_fn": "relu"}, "act_fn must be 'silu'"),
    ({"latents_mean": [0.0] * 4}, "latents_mean must be None"),
    ({"attention_free": True}, "unknown here: attention_free=True"),
    ({"out_channels": 4}, "in_channels and out_channels must be equal"),
    ({"in_channels": 5, "out_channels": 5}, "input_channels must be"),
    ({"block_out_channels": []}, "block_out_channels must be a list"),
    ({"block_out_channels": "big"}, "block_out_channels must be a list"),
    ({"block_out_channels": [32, 64.0]}, "block_out_channels must be a list"),
    ({"block_out_channels": [32, -64]}, "block_out_channels must be a list"),
    ({"block_out_channels": [32, 96]}, "problems: .*not .96"),
    ({"block_out_channels": [32, 64, 64]}, "70 problems: .*; ...$"),
    ({"block_out_channels": [2**40, 2**41]}, "asks for at least 10 blocks and .* numbers"),
    ({"block_out_channels": [32] * 100_000}, "asks for at least 500000 blocks"),
    ({"layers_per_block": 10**9}, "asks for at least 4000000002 blocks"),
    ({"layers_per_block": 10**400}, "asks for at least"),
    ({"latent_channels": 10**12}, "asks for at least"),
    ({"norm_num_groups": 10**12}, "norm_groups must divide"),
    ({"norm_num_groups": None}, "norm_num_groups must be"),
    ({"scaling_factor": 0}, "above 0"),
    ({"scaling_factor": 10**400}, "must be finite"),
    ({"scaling_factor": float("nan")}, "must be finite"),
    ({"scaling_factor": "0.18"}, "must be a number"),
    ({"shift_factor": [1]}, "must be a number"),
    ({"use_quant_conv": 1}, "quant_conv must be True or False"),
    ({"use_quant_conv": False}, "unexpected quant_conv.bias"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=lambda c: str(c)[:60])
def test_configurations_are_not_trusted(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_channels": 10**15}, "asks for at least"),
        ({"num_temporal_layers": 10**12}, "asks for at least"),
        ({"temporal_kernel_size": 10**12 + 1}, "asks for at least"),
        ({"temporal_attention_reach": 10**15}, "asks for at least"),
        ({"latent_scale_factor": 10**400}, "finite"),
    ],
    ids=str,
)
def test_our_own_configuration_is_not_trusted_either(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    awake(torch.float32).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["model"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("\xff", "not JSON"),
        ("3", "not a temporal_vae configuration"),
        ("{}", "not a temporal_vae configuration, nor one of diffusers'"),
    ],
    ids=["cut", "deep", "bytes", "number", "nothing"],
)
def test_a_configuration_that_is_none(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert_refused(folder, message)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": {}},
        {"weight_map": {"a": "../secret.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": 3}},
        {"weight_map": [WEIGHTS]},
        {"weight_map": {"a": ["x"]}},
        {"weight_map": {"a": "gone.safetensors"}},
    ],
    ids=str,
)
def test_an_index_that_lists_other_places(index: dict[str, Any], folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert_refused(folder, "index.json does not list files that are there")


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    image_vae().float().save_pretrained(tmp_path, max_shard_size="500KB")
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    assert_refused(tmp_path, "does not list files that are there")


def test_what_is_no_model_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_file({"encoder.down.0.x": torch.zeros(3)}, tmp_path / "half.safetensors")
    model = image_vae().float()
    model.save_pretrained(tmp_path / "theirs")
    for path, message, error in (
        ("", "must be a name or a path", ValueError),
        ("no such thing", "neither a built-in one", FileNotFoundError),
        ("gone.safetensors", "neither a built-in one", FileNotFoundError),
        ("folder/gone.safetensors", "neither a built-in one", FileNotFoundError),
        (tmp_path / "a" / "b", "neither a built-in one", FileNotFoundError),
        ("a/b/c", "neither a built-in one", FileNotFoundError),
        ("notes.txt", "no safetensors file", ValueError),
        ("other.safetensors", "other.safetensors: no encoder.down", ValueError),
        ("half.safetensors", "conv1.weight is missing or misshapen", ValueError),
        (f"theirs/{WEIGHTS}", "which has a config.json, name the folder", ValueError),
    ):
        assert_refused(path, message, error)
    with pytest.raises(ValueError, match="got 3"):
        TemporalVAE.from_pretrained(3)  # type: ignore[arg-type]


def test_options_without_effect_are_refused(folder: Path) -> None:
    for options, message in (
        ({"revision": "main"}, "revision='main' means nothing"),
        ({"dtype": torch.int64}, "dtype must be a floating-point torch.dtype"),
        ({"dtype": "vae"}, "dtype must be a floating-point torch.dtype"),
        ({"latent_scale_factor": -1.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TemporalVAE.from_pretrained(folder, **options)
    with pytest.raises(ValueError, match="subfolder='vae' means nothing for 'tiny'"):
        TemporalVAE.from_pretrained("tiny", subfolder="vae")
    with pytest.raises(ValueError, match="variant='fp16' means nothing"):
        TemporalVAE.from_pretrained(folder / WEIGHTS, variant="fp16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "norm_groups=None .there: 32., .*temporal_norm='position' .there: 'clip'"),
        ({"num_temporal_layers": 0, "base_channels": 36}, r"AutoencoderKL cannot express norm_gr"),
        (
            {"num_temporal_layers": 0, "time_conv_out": True},
            "AutoencoderKLTemporalDecoder cannot express .*num_temporal_layers=0",
        ),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express_is_named(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"base_channels": 8, "channel_multipliers": (1, 2)}
    model = TemporalVAE(**(small | options))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "new", format="diffusers")
    with pytest.raises(ValueError, match=r"format must be .*got 'pickle'"):
        model.save_pretrained(tmp_path / "new", format="pickle")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_failed_write_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = TemporalVAE.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.conv_in.weight.zero_()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder, format="diffusers")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# Inflation -----------------------------------------------------------------------------------

INFLATIONS: list[dict[str, Any]] = [
    {},
    {"causal_mode": True, "num_temporal_layers": 2, "temporal_kernel_size": 5},
    {"temporal_attention_reach": 0, "temporal_encoder": False},
    {"time_conv_out": True},
    {"time_conv_out": True, "causal_mode": True, "temporal_kernel_size": 5},
    {
        "time_conv_out": True,
        "temporal_norm": "clip",
        "clip_frames": 14,
        "temporal_encoder": False,
        "temporal_attention_reach": 0,
    },
]


@pytest.mark.parametrize(("name", "options"), thinned(2, ["SD", "FLUX"], INFLATIONS))
def test_an_inflated_image_vae_is_that_image_vae(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = FAMILIES[name]()
    model.save_pretrained(tmp_path)
    image = TemporalVAE.from_pretrained(tmp_path, dtype=torch.float64)
    mine = TemporalVAE.from_image_vae(tmp_path, dtype=torch.float64, seed=1, **options)
    assert mine.dtype == torch.float64
    assert mine.parameter_count > image.parameter_count
    for option, value in options.items():
        assert getattr(mine.config, option) == value
    assert mine.latent_scale_factor == image.latent_scale_factor
    video, latent = given(mine)
    assert worst(model, mine, video, latent) < 1e-10
    for a, b in zip(
        mine.encode_with_distribution(video), image.encode_with_distribution(video), strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(mine.decode(latent), image.decode(latent))
    twin = TemporalVAE.from_image_vae(tmp_path, dtype=torch.float64, seed=1, **options)
    assert all(torch.equal(p, twin.state_dict()[key]) for key, p in mine.state_dict().items())
    redraw(mine)  # its temporal layers are there, and wake
    swapped = latent[:, :, [1, 0, 2]]
    assert difference(mine.decode(swapped)[:, :, [1, 0, 2]], mine.decode(latent)) > 0.01


def test_what_else_can_be_inflated(tmp_path: Path) -> None:
    ours = TemporalVAE(base_channels=8, num_temporal_layers=0, seed=3)
    ours.save_pretrained(tmp_path / "ours")
    mine = TemporalVAE.from_image_vae(tmp_path / "ours", causal_mode=True)
    assert isinstance(mine.config, TemporalVAEConfig)
    assert (mine.is_causal, mine.config.num_temporal_layers) == (True, 1)
    video = pixels(3).float()
    assert torch.equal(mine.encode(video, False), ours.encode(video, False))
    file = save_single(image_vae().float(), tmp_path / "sd.safetensors")
    scaled = TemporalVAE.from_image_vae(file, latent_scale_factor=0.13025)
    assert scaled.latent_scale_factor == 0.13025


def test_what_cannot_be_inflated(tmp_path: Path) -> None:
    theirs().float().save_pretrained(tmp_path / "svd")
    for source in (tmp_path / "svd", "tiny"):
        with pytest.raises(ValueError, match=r"a video VAE already.*from_pretrained"):
            TemporalVAE.from_image_vae(source)
    image_vae().float().save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match=r"unknown temporal options \['casual_mode'\]"):
        TemporalVAE.from_image_vae(tmp_path / "sd", casual_mode=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="must be odd"):
        TemporalVAE.from_image_vae(tmp_path / "sd", temporal_kernel_size=4)
    with pytest.raises(ValueError, match="clip_frames"):
        TemporalVAE.from_image_vae(tmp_path / "sd", temporal_norm="clip")
