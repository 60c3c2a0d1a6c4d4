"""The laws of the library, on awake models, each with a mutation that must turn it red."""

from __future__ import annotations

import ast
import contextlib
import inspect
import pickle
from collections.abc import Callable
from functools import cache, partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_awake, awake, difference, pixels, redraw, thinned
from torch import Tensor, nn

import temporal_vae
from temporal_vae import TemporalVAE, TemporalVAEConfig
from temporal_vae.convert import chunks
from temporal_vae.network import framewise, primitives, timewise
from temporal_vae.network.kernels import norm as norm_kernel
from temporal_vae.network.primitives import TimeConv
from temporal_vae.network.timewise import OverTime, TemporalAttention, TemporalBlock

ROOT = Path(__file__).parent.parent


# Law 3: the future never changes the past ----------------------------------------------------


def assert_future_is_unseen(model: TemporalVAE, frames: int = 9, batch: int = 2) -> None:
    video = pixels(frames, batch=batch).to(model.device, model.dtype)
    latent = torch.randn(batch, 4, frames, 4, 6, generator=torch.Generator().manual_seed(3))
    latent = latent.to(model.device, model.dtype)
    steps: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: torch.cat(model.encode_with_distribution(x), 1), video),
        (model.decode, latent),
    ]
    with torch.no_grad():
        for step, x in steps:
            before = step(x)
            for t in range(1, frames):
                changed = x.clone()
                changed[:, :, t] = changed[:, :, t].flip(-1) * 3
                after = step(changed)
                assert torch.equal(after[:, :, :t], before[:, :, :t]), f"frame {t} changed the past"
                assert not torch.equal(after[:, :, t], before[:, :, t])


CAUSAL = [
    {},
    {"temporal_kernel_size": 5, "num_temporal_layers": 2},
    {"temporal_kernel_size": 1},
    {"temporal_attention_reach": 0},
    {"temporal_attention_reach": 2},
]


@pytest.mark.parametrize(
    ("dtype", "options"), thinned(3, [torch.float64, torch.float32, torch.bfloat16], CAUSAL)
)
def test_the_future_never_changes_the_past(dtype: torch.dtype, options: dict[str, int]) -> None:
    assert_future_is_unseen(awake(dtype, causal_mode=True, **options))


def test_law_3_sees_a_convolution_that_looks_ahead() -> None:
    model = awake(causal_mode=True)
    conv = next(m for m in model.decoder.modules() if isinstance(m, TimeConv))
    conv.past, conv.future = 1, 1
    with pytest.raises(AssertionError, match="changed the past"):
        assert_future_is_unseen(model)


def test_law_3_sees_a_norm_over_the_clip() -> None:
    model = awake(causal_mode=True)
    block = next(m for m in model.encoder.modules() if isinstance(m, TemporalBlock))
    channels = block.conv1.bias.numel()
    block.norm1 = nn.GroupNorm(1, channels, dtype=torch.float64)
    with pytest.raises(AssertionError, match="changed the past"):
        assert_future_is_unseen(model)


def test_law_3_sees_attention_that_looks_ahead() -> None:
    model = awake(causal_mode=True)
    attention = next(m for m in model.encoder.modules() if isinstance(m, TemporalAttention))
    attention.past, attention.future = attention.past - 1, 1
    with pytest.raises(AssertionError, match="changed the past"):
        assert_future_is_unseen(model)


# Law 5: at birth video = image ---------------------------------------------------------------


def assert_born_as_image_vae(model: TemporalVAE) -> None:
    video = pixels(4, batch=2).to(model.device, model.dtype)
    with torch.no_grad():
        latent = model.encode(video, sample_mode=False)
        frames = model.decode(latent)
        for t in range(4):
            image = model.encode(video[:, :, t], sample_mode=False)
            assert difference(image, latent[:, :, t]) < 1e-12, "the encoder sees other frames"
            assert difference(model.decode(image), frames[:, :, t]) < 1e-12, "the decoder does"


BIRTHS = [
    {},
    {"causal_mode": True, "num_temporal_layers": 2},
    {"temporal_kernel_size": 5},
    {"time_conv_out": True},
    {"temporal_norm": "clip", "clip_frames": 4, "temporal_encoder": False, "time_conv_out": True},
]


@pytest.mark.parametrize("options", BIRTHS, ids=str)
def test_at_birth_a_video_is_its_images(options: dict[str, Any]) -> None:
    model = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), seed=1, **options)
    assert_born_as_image_vae(model.double())


def test_a_new_model_equals_the_image_vae_with_its_spatial_weights() -> None:
    model = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), seed=1).double()
    image = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), num_temporal_layers=0).double()
    image.load_state_dict({k: v for k, v in model.state_dict().items() if "temporal" not in k})
    video = pixels(3)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(video), image.predict(video), rtol=0, atol=1e-12)


def test_law_5_sees_a_temporal_branch_that_does_not_start_at_zero() -> None:
    model = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), seed=1).double()
    block = next(m for m in model.decoder.modules() if isinstance(m, TemporalBlock))
    with torch.no_grad():
        block.conv2.weight.normal_(generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="the decoder does"):
        assert_born_as_image_vae(model)


# Law 7: nothing is decoration ----------------------------------------------------------------


def fingerprint(options: dict[str, Any], redrawn: bool = True) -> list[float]:
    """What a caller could measure of a model with these options."""
    base: dict[str, Any] = {
        "base_channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "seed": 0
    }  # fmt: skip
    base |= options
    model = awake(**base) if redrawn else TemporalVAE(**base).double()
    video = pixels(9, channels=model.input_channels)
    with torch.no_grad():
        mean, log_variance = model.encode_with_distribution(video)
        scaled = model.scale_latent(mean)
        output = model.decode(mean)
        loss = model.default_loss_function(output, video)
        noise = model.sample(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    tensors = (mean, log_variance, scaled, output, loss, noise)
    sums = [float(x.double().abs().sum()) for x in tensors]
    # the clips in which a command walks a long video
    return [*sums, model.parameter_count, chunks.clip_length(model, None) or 0]


ALTERNATIVES: dict[str, Any] = {
    "input_channels": 1,
    "latent_channels": 5,
    "base_channels": 16,
    "channel_multipliers": (1, 3),
    "num_temporal_layers": 2,
    "temporal_kernel_size": 5,
    "causal_mode": True,
    "latent_scale_factor": 0.5,
    "loss_function": lambda a, b: (a - b).abs().mean(),
    "seed": 1,
    "latent_shift_factor": 0.5,
    "blocks_per_level": 2,
    "norm_groups": 4,
    "quant_conv": False,
    "post_quant_conv": False,
    "temporal_encoder": False,
    "temporal_decoder": False,
    "temporal_attention_reach": 1,
    "temporal_norm": "clip",
    "time_conv_out": True,
    "clip_frames": 5,  # of a model that cannot stream: see `fingerprint`
}


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_every_constructor_argument_changes_something(name: str) -> None:
    common: dict[str, Any] = {}
    if name == "temporal_norm":
        common = {"clip_frames": 9}
    if name == "clip_frames":
        common = {"clip_frames": 9, "temporal_norm": "clip"}
    redrawn = name != "seed"
    changed = fingerprint(common | {name: ALTERNATIVES[name]}, redrawn)
    plain = str((common, redrawn))
    if plain not in PLAIN:
        PLAIN[plain] = fingerprint(common, redrawn)
        assert fingerprint(common, redrawn) == PLAIN[plain]  # it can be equal
    assert changed != PLAIN[plain]


PLAIN: dict[str, list[float]] = {}


def test_the_alternatives_name_every_argument() -> None:
    assert set(ALTERNATIVES) == set(inspect.signature(TemporalVAE).parameters)


def weakest_gradients(model: TemporalVAE, frames: int = 9) -> dict[str, float]:
    model.zero_grad()
    video = pixels(frames, channels=model.input_channels)
    reconstruction, posterior = model(video, generator=torch.Generator().manual_seed(0))
    target = pixels(frames, channels=model.input_channels).flip(2)
    loss = (reconstruction - target).square().mean() + model.kl_divergence(*posterior)
    loss.backward()
    return {
        name: 0.0 if p.grad is None else float(p.grad.abs().max())
        for name, p in model.named_parameters()
        if not name.endswith("to_k.bias")  # softmax cancels it
    }


SVD_LIKE: dict[str, Any] = {
    "temporal_norm": "clip",
    "clip_frames": 9,
    "temporal_encoder": False,
    "temporal_attention_reach": 0,
    "time_conv_out": True,
}


@pytest.mark.parametrize(
    "options", [{}, {"causal_mode": True, "num_temporal_layers": 2}, SVD_LIKE], ids=str
)
def test_every_parameter_gets_a_gradient(options: dict[str, Any]) -> None:
    weak = {n: g for n, g in weakest_gradients(awake(**options)).items() if g < 1e-10}
    assert not weak


def test_law_7_sees_a_parameter_that_nothing_uses() -> None:
    model = awake()
    block = next(m for m in model.decoder.modules() if isinstance(m, TemporalBlock))
    with mock.patch.object(block, "compute", lambda x: x):
        assert min(weakest_gradients(model).values()) < 1e-10


def assert_reach_is_as_stated(model: TemporalVAE) -> None:
    for step, reach, channels, size in (
        (lambda x: model.encode(x, False), model.encoder.reach, 3, 4),
        (model.decode, model.decoder.reach, 4, 2),
    ):
        assert reach is not None
        past, future = reach
        t, frames = future + 2, past + future + 5
        x = torch.randn(1, channels, frames, size, size, generator=torch.Generator().manual_seed(0))
        x = x.to(model.device, torch.float64)
        changed = x.clone()
        changed[:, :, t] = changed[:, :, t].flip(-1) * 2
        with torch.no_grad():
            moved = (step(x) - step(changed)).abs().amax(dim=(0, 1, 3, 4)) > 0
        seen = [i for i in range(frames) if moved[i]]
        assert seen[0] == t - future, "the reach ahead is not as stated"
        assert seen[-1] == t + past, "the reach back is not as stated"


REACHES = [
    {},
    {"causal_mode": True},
    {"temporal_kernel_size": 5, "blocks_per_level": 1},
    {"temporal_kernel_size": 1, "temporal_attention_reach": 3},
    {"temporal_kernel_size": 1, "temporal_attention_reach": 3, "causal_mode": True},
    {"temporal_attention_reach": 0, "time_conv_out": True},
    {"temporal_encoder": False},
    {"temporal_decoder": False},
]


@pytest.mark.parametrize("options", REACHES, ids=str)
def test_a_frame_reaches_as_far_as_stated(options: dict[str, Any]) -> None:
    assert_reach_is_as_stated(awake(**options))


def test_the_stated_reach_of_known_layouts() -> None:
    with torch.device("meta"):
        svd = TemporalVAE.from_config(TemporalVAEConfig.svd())
        tiny = TemporalVAE.from_config(TemporalVAEConfig.tiny())
    assert svd.encode_reach == 0
    assert svd.decode_reach is None  # norms over the clip
    assert (tiny.encode_reach, tiny.decode_reach) == (28, 36)


def test_law_7_sees_a_reach_one_frame_short() -> None:
    model = awake()
    conv = next(m for m in model.decoder.modules() if isinstance(m, TemporalBlock))
    assert conv.past is not None
    conv.past -= 1
    with pytest.raises(AssertionError, match="reach back"):
        assert_reach_is_as_stated(model)


def test_temporal_attention_alone_mixes_time() -> None:
    """With a kernel of one frame only attention can: `awake` asserts that something does."""
    model = awake(temporal_kernel_size=1)
    attentions = [m for m in model.modules() if isinstance(m, TemporalAttention)]
    assert len(attentions) == 2
    for attention in attentions:
        nn.init.zeros_(next(attention.to_out.parameters()))
    with pytest.raises(AssertionError, match="asleep"):
        assert_awake(model)


def test_temporal_attention_equals_its_definition() -> None:
    """Against a plain softmax over a masked score matrix, longer than a block of queries."""
    config = TemporalVAEConfig(base_channels=128, temporal_attention_reach=5)
    attention = TemporalAttention(128, config).double()
    redraw(attention)
    x = torch.randn(2, 128, 150, 3, dtype=torch.float64)
    tokens = attention.norm(x).permute(0, 3, 2, 1)
    q, k, v = (
        to(tokens).unflatten(3, (2, 64)).transpose(2, 3)
        for to in (attention.to_q, attention.to_k, attention.to_v)
    )
    scores = q @ k.transpose(-1, -2) / 8
    for i in range(150):
        for j in range(150):
            if abs(i - j) > 5:
                scores[..., i, j] = -torch.inf
            else:
                scores[..., i, j] += attention.distance_bias[:, j - i + 5]
    mixed = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3)
    expected = attention.to_out(mixed).permute(0, 3, 2, 1) + x
    assert difference(attention(x.unsqueeze(3)).squeeze(3), expected) < 1e-12


def assert_one_memory_order(options: dict[str, Any], frames: int, batch: int) -> None:
    """Every layer gets and gives B T H W C memory, as views, and torch's kernels know it."""

    def watched(fold: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        view = fold(x)
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "a copy"
        _, c, h, w = view.shape
        assert view.stride() == (h * w * c, 1, w * c, c), "the order is lost"
        return view

    def given(unfold: Callable[..., Tensor], y: Tensor, size: Any) -> Tensor:
        assert y.is_contiguous(memory_format=torch.channels_last), "a copy is due"
        return unfold(y, size)

    model = awake(**options)
    with contextlib.ExitStack() as patched:
        for room in (framewise, timewise, primitives, norm_kernel):
            for name in ("fold_frames", "unfold_frames", "fold_pixels", "unfold_pixels"):
                if own := getattr(room, name, None):
                    watch = partial(given if name.startswith("un") else watched, own)
                    patched.enter_context(mock.patch.object(room, name, watch))
        for line, channels in ((model.encoder, 3), (model.decoder, 4)):
            x = pixels(frames, channels=channels, batch=batch)
            x = x.contiguous(memory_format=torch.channels_last_3d)
            for layer in line.layers():
                with torch.no_grad():
                    x = layer(x)
                assert x.is_contiguous(memory_format=torch.channels_last_3d), type(layer).__name__


@pytest.mark.parametrize("options", [{}, {"causal_mode": True}, SVD_LIKE], ids=str)
@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (9, 1), (1, 2), (9, 2)])
def test_layers_see_views_in_one_memory_order(
    options: dict[str, Any], frames: int, batch: int
) -> None:
    assert_one_memory_order(options, frames, batch)


@pytest.mark.parametrize("room", [primitives, timewise], ids=lambda room: room.__name__)
def test_the_memory_order_test_sees_a_hidden_one(
    room: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "fold_pixels", lambda x: x.flatten(3))
    with pytest.raises(AssertionError, match="the order is lost"):
        assert_one_memory_order({}, 1, 1)


def test_a_temporal_convolution_equals_conv3d() -> None:
    x = torch.randn(2, 6, 7, 4, 5, dtype=torch.float64)
    for kernel, causal in ((1, False), (3, False), (5, True)):
        conv = OverTime(TimeConv.of(6, kernel, causal)).double()
        redraw(conv)
        padded = F.pad(x, (0, 0, 0, 0, conv.past, conv.future))
        expected = F.conv3d(
            padded, conv.get_parameter("conv.weight"), conv.get_parameter("conv.bias")
        )
        torch.testing.assert_close(conv(x), expected)


# The same laws on a GPU ----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"causal_mode": True}], ids=str)
def test_laws_on_a_gpu(options: dict[str, Any]) -> None:
    model = awake(**options).to("cuda")
    if model.is_causal:
        assert_future_is_unseen(model)
    assert_reach_is_as_stated(model)
    on_cpu = awake(**options).predict(pixels())
    assert difference(model.predict(pixels().to("cuda")).cpu(), on_cpu) < 1e-10
    newborn = TemporalVAE(base_channels=8, channel_multipliers=(1, 2), seed=1, **options)
    assert_born_as_image_vae(newborn.double().to("cuda"))
    for seed in (torch.Generator().manual_seed(1) for _ in range(2)):
        latent = model.encode(pixels().to("cuda"), generator=seed)
        expected = awake(**options).encode(pixels(), generator=torch.Generator().manual_seed(1))
        assert difference(latent.cpu(), expected) < 1e-10


# Law 8: the plan holds -----------------------------------------------------------------------

FLOORS = {
    "config": 1, "files": 1, "geometry": 1, "losses": 1, "parameters": 1,
    "checkpoints": 2, "network": 2, "video": 2,
    "latents": 3,
    "walks": 4,
    "export": 5, "inputs": 5, "metadata": 5, "model": 5,
    "adapters": 6, "convert": 6, "evaluation": 6, "sharded": 6,
    "dataset": 7, "serve": 7, "training": 7,
    "cli": 8,
    "__main__": 9,
}  # fmt: skip
"""The floor of each room: a folder of the package, or a file beside the folders.

A room imports from lower floors, and from itself as long as there is no circle."""
SAME_FLOOR = {("model", "export"), ("model", "inputs"), ("model", "metadata")}
"""The public face may use the rooms beside it: a function each of its members calls."""


def imports(source: str) -> set[str]:
    """Modules of the package that a source imports, anywhere in it; "model" for the package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {a.name for a in node.names if a.name.startswith("temporal_vae.")}
            found |= {name.removeprefix("temporal_vae.") for name in names}
        elif isinstance(node, ast.ImportFrom) and node.module == "temporal_vae":
            names = {a.name for a in node.names}
            found |= names & set(FLOORS) | ({"model"} if names - set(FLOORS) else set())
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("temporal_vae."):
            module = (node.module or "").removeprefix("temporal_vae.")
            inside = {f"{module}.{a.name}" for a in node.names} & set(modules())
            found |= inside or {module}
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def upward(module: str, source: str) -> set[str]:
    """Imports of other rooms that do not go down."""
    here = room(module)
    return {
        other
        for other in imports(source)
        if room(other) != here
        and FLOORS[room(other)] >= FLOORS[here]
        and (here, room(other)) not in SAME_FLOOR
    }


@cache
def modules() -> dict[str, str]:
    """Sources by module; a package stands for what its `__init__` gathers."""
    root = Path(temporal_vae.__file__).parent
    found = {}
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if file.stem == "__init__" else parts
        if parts:
            found[".".join(parts)] = file.read_text()
    return found


def test_imports_go_down() -> None:
    found = modules()
    assert {room(name) for name in found} == set(FLOORS), "a room without a floor"
    assert len(SAME_FLOOR) <= 10
    assert {name: up for name, text in found.items() if (up := upward(name, text))} == {}


def test_no_imports_go_round() -> None:
    TopologicalSorter({name: imports(text) for name, text in modules().items()}).prepare()


def test_law_8_sees_imports_that_go_up_or_round() -> None:
    assert upward("network.framewise", "from temporal_vae.model import TemporalVAE") == {"model"}
    assert upward("walks.plan", "def f():\n    import temporal_vae.model") == {"model"}
    assert upward("latents.info", "from temporal_vae import TemporalVAE") == {"model"}
    assert upward("adapters.drop_in", "from temporal_vae.convert import chunks")
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_public_names_are_the_documented_ones() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in temporal_vae.__all__:
        assert f"`{name}`" in readme, f"README does not name {name}"
    public = {
        name
        for name in dir(temporal_vae)
        if not name.startswith("_") and not isinstance(getattr(temporal_vae, name), ModuleType)
    }
    assert public == set(temporal_vae.__all__)
    starred: dict[str, object] = {}
    exec("from temporal_vae import *", starred)
    assert starred.keys() - {"__builtins__"} == public
    assert pickle.loads(pickle.dumps(temporal_vae.TemporalVAEConfig)) is TemporalVAEConfig
    with pytest.raises(AttributeError, match="no attribute 'TemporalVEA'"):
        _ = temporal_vae.TemporalVEA
