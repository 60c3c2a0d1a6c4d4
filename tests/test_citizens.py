"""What people's programs do to a VAE of diffusers works on ours too, or is refused in a sentence.

Each habit is done to diffusers' own models and to ours with the same weights, side by side: both
must give the same, within rounding.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import awake, difference, pixels, redraw
from diffusers import AutoencoderKL
from test_foreign import theirs
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from temporal_vae import TemporalVAE, to_diffusers
from temporal_vae.adapters import diffusers
from temporal_vae.network.kernels import dtypes
from temporal_vae.walks.stages import Bounds

FRAMES = 3


def image_vae() -> Any:
    """An awake `AutoencoderKL`, float64."""
    kinds = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    model = AutoencoderKL(block_out_channels=(32, 64), layers_per_block=2, **kinds)
    redraw(model.double())
    return model.eval()


STOCK: dict[str, Callable[[], Any]] = {"image": image_vae, "svd": theirs}


def pair(kind: str) -> tuple[Any, Any]:
    """diffusers' VAE, and ours with the same weights."""
    stock = STOCK[kind]()
    return stock, to_diffusers(diffusers._with_weights_of(copy.deepcopy(stock)))


def latents() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(FRAMES, 4, 4, 6, generator=generator, dtype=torch.float64)


def decoded(vae: Any, z: Tensor | None = None) -> Tensor:
    """Pixels of a clip (T, L, h, w), by the arguments that the class has."""
    z = latents() if z is None else z
    inner = getattr(vae, "_orig_mod", vae)
    extra = {} if isinstance(inner, AutoencoderKL) else {"num_frames": len(z)}
    pixels: Tensor = vae.decode(z, **extra).sample
    return pixels


def frames(x: Tensor) -> Tensor:
    """Features as frames (T, C, H, W): blocks of ours see clips (1, C, T, H, W)."""
    return x[0].transpose(0, 1) if x.ndim == 5 else x


# Habits: what is done to a VAE -> what both must give alike -----------------------------------


def gradient_of_latents(vae: Any) -> Tensor:
    z = latents().requires_grad_()
    decoded(vae, z).square().mean().backward()
    assert z.grad is not None
    return z.grad


def checkpointing(vae: Any) -> Tensor:
    vae.enable_gradient_checkpointing()
    assert vae.is_gradient_checkpointing
    return gradient_of_latents(vae.train())


def features(vae: Any, backward: bool = False) -> Tensor:
    """Kept by hooks: as they were given, and fit for a loss."""
    names = [
        "decoder.conv_in", "decoder.mid_block", "decoder.up_blocks.0", "decoder.up_blocks.1",
        "decoder.conv_norm_out", "decoder.conv_out",
    ]  # fmt: skip
    kept = dict[str, Tensor]()
    for name in names:
        vae.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: kept.__setitem__(name, out)
        )
    z = latents().requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        decoded(vae, z)
        if backward:
            torch.stack([kept[name].square().mean() for name in names]).sum().backward()
            assert z.grad is not None
            return z.grad
        return torch.cat([frames(kept[name]).flatten() for name in names])


def loss_on_features(vae: Any) -> Tensor:
    return features(vae, backward=True)


def encoder_features(vae: Any) -> Tensor:
    kept = list[Tensor]()
    for name in ("encoder.conv_in", "encoder.down_blocks.0", "encoder.mid_block"):
        vae.get_submodule(name).register_forward_hook(lambda _, args, out: kept.append(out))
    with torch.no_grad():
        vae.encode(pixels()[0].transpose(0, 1))
    return torch.cat([frames(x).flatten() for x in kept])


def resnet_inputs(vae: Any) -> Tensor:
    """Kept by hooks before a layer: nothing is written over them."""
    kept = list[Tensor]()
    block = vae.encoder.down_blocks[0].resnets[0]
    for part in (block.conv1, block.norm2, block.conv2):
        part.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        part.register_forward_hook(lambda _, args, out: kept.append(out))
    with torch.no_grad():
        vae.encode(pixels()[0].transpose(0, 1))
    return torch.cat([x.flatten() for x in kept])


def backward_hook(vae: Any) -> Tensor:
    kept = list[Tensor]()
    vae.decoder.up_blocks[0].register_full_backward_hook(
        lambda _, before, after: kept.append(after[0])
    )
    gradient_of_latents(vae)
    return frames(kept[0])


def replaced_output(vae: Any) -> Tensor:
    """A hook that gives another result is heard."""
    vae.decoder.mid_block.register_forward_hook(lambda _, args, out: out * 0.5)
    with torch.no_grad():
        return decoded(vae)


def compiled(vae: Any) -> Tensor:
    with torch.no_grad():
        return decoded(torch.compile(vae, backend="eager"))


def compiled_in_place(vae: Any) -> Tensor:
    vae.compile(backend="eager")
    with torch.no_grad():
        return decoded(vae)


def compiled_decode(vae: Any) -> Tensor:
    vae.decode = torch.compile(vae.decode, backend="eager")
    with torch.no_grad():
        return decoded(vae)


def copied(vae: Any) -> Tensor:
    with torch.no_grad():
        return decoded(copy.deepcopy(vae))


def pickled(vae: Any) -> Tensor:
    with torch.no_grad():
        return decoded(pickle.loads(pickle.dumps(vae)))


def averaged(vae: Any) -> Tensor:
    ema = AveragedModel(vae)
    for p in vae.parameters():
        p.data.mul_(0.5)
    ema.update_parameters(vae)
    ema.update_parameters(vae)
    with torch.no_grad():
        return decoded(ema.module)


def weight_norm(vae: Any) -> Tensor:
    parametrizations.weight_norm(vae.decoder.conv_in)
    vae.decoder.conv_in.parametrizations.weight.original0.data.mul_(2)
    with torch.no_grad():
        return decoded(vae)


def pruned(vae: Any) -> Tensor:
    prune.l1_unstructured(vae.decoder.conv_out, "weight", amount=0.5)
    prune.l1_unstructured(vae.decoder.mid_block.resnets[0].conv1, "weight", amount=0.5)
    with torch.no_grad():
        return decoded(vae)


def channels_last(vae: Any) -> Tensor:
    with torch.no_grad():
        return decoded(vae.to(memory_format=torch.channels_last))


def inference(vae: Any) -> Tensor:
    with torch.inference_mode():
        return decoded(vae)


def frozen_encoder(vae: Any) -> Tensor:
    vae.encoder.requires_grad_(False)
    decoded(vae, vae.encode(pixels()[0].transpose(0, 1)).latent_dist.mode()).mean().backward()
    gradient: Tensor = vae.decoder.conv_in.weight.grad
    return gradient


def switches(vae: Any) -> Tensor:
    vae.fuse_qkv_projections()
    vae.unfuse_qkv_projections()
    vae.set_default_attn_processor()
    with torch.no_grad():
        return decoded(vae)


def slicing_and_tiling(vae: Any) -> Tensor:
    """Of a clip that stock cuts into no tiles."""
    vae.enable_slicing()
    vae.enable_tiling()
    with torch.no_grad():
        cut = decoded(vae)
        vae.disable_slicing()
        vae.disable_tiling()
        return torch.stack([cut, decoded(vae)])


def stateless(vae: Any) -> Tensor:
    """`functional_call` with other weights."""
    weights = {name: p.detach() * 0.9 for name, p in vae.named_parameters()}
    given = functional_call(vae, weights, (pixels()[0].transpose(0, 1),))
    return given.sample  # type: ignore[no-any-return]


def functional_gradient(vae: Any) -> Tensor:
    found: Tensor = grad(lambda z: decoded(vae, z).square().mean())(latents())
    return found


def batched(vae: Any) -> Tensor:
    vae.requires_grad_(False)
    found: Tensor = vmap(lambda z: decoded(vae, z[None]))(latents())
    return found


def gradients_of_each(vae: Any) -> Tensor:
    vae.requires_grad_(False)
    found: Tensor = vmap(grad(lambda z: decoded(vae, z[None]).square().mean()))(latents())
    return found


BOTH = [
    gradient_of_latents, checkpointing, features, loss_on_features, encoder_features, resnet_inputs,
    backward_hook, replaced_output, compiled, compiled_in_place, compiled_decode, copied, pickled,
    averaged, weight_norm, inference, frozen_encoder, switches, stateless,
    functional_gradient, batched, gradients_of_each,
]  # fmt: skip
CASES = [(habit, kind) for habit in BOTH for kind in STOCK] + [
    (habit, "image") for habit in (channels_last, pruned, slicing_and_tiling)
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("habit", "kind"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[0] is compiled_decode else ())
        for case in CASES
    ],
    ids=[f"{habit.__name__}-{kind}" for habit, kind in CASES],
)
def test_a_habit_gives_what_stock_gives(habit: Callable[[Any], Tensor], kind: str) -> None:
    stock, ours = pair(kind)
    expected = habit(stock)
    assert expected.abs().max() > 1e-6
    assert difference(habit(ours), expected) < 1e-6


def test_functional_gradients_of_temporal_attention() -> None:
    """Which has a learned bias: torch's fused kernel knows no derivative for that there."""
    model, z = awake(), latents().transpose(0, 1)[None].requires_grad_()
    (expected,) = torch.autograd.grad(model.decode(z).square().mean(), z)
    found = grad(lambda q: model.decode(q).square().mean())(z.detach())
    assert difference(found, expected) < 1e-10


def test_the_comparison_sees_what_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: in place although hooks hold it."""
    stock, ours = pair("image")
    for room in ("primitives", "framewise", "timewise"):
        module = importlib.import_module(f"temporal_vae.network.{room}")
        if hasattr(module, "unseen"):
            monkeypatch.setattr(module, "unseen", lambda module: True)
    # which would go by the hooks
    monkeypatch.setattr("temporal_vae.network.primitives.ActivatedNorm", type("None", (), {}))
    assert difference(resnet_inputs(ours), resnet_inputs(stock)) > 1e-3


# Adapters ------------------------------------------------------------------------------------

LORA = [
    "to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut",
    "quant_conv", "post_quant_conv", "conv",
]  # fmt: skip
"""The targets that recipes name."""


def adapted(vae: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=LORA, init_lora_weights=False)
    peft.inject_adapter_in_model(config, vae)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(vae.named_parameters(), key=lambda item: item[0].split("quant")[-1]):
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1)
    return vae.double()


def test_lora_gives_what_stock_gives() -> None:
    stock, ours = map(adapted, pair("image"))
    plain = pair("image")[0]
    with torch.no_grad():
        expected = decoded(stock)
        assert difference(decoded(plain), expected) > 1e-2
        assert difference(decoded(ours), expected) < 1e-6
        ours.enable_tiling()
        assert difference(decoded(ours), expected) < 1e-6
        ours.disable_tiling()
    assert difference(gradient_of_latents(ours), gradient_of_latents(stock)) < 1e-6


@pytest.mark.parametrize("options", [{}, {"causal_mode": True, "time_conv_out": True}], ids=str)
def test_lora_on_convolutions_over_time_is_exact_in_every_walk(options: dict[str, Any]) -> None:
    model = awake(**options)
    before = model.decode(z := latents().transpose(0, 1)[None]).detach()
    wrapped = adapted(model)
    assert any(isinstance(m, peft.tuners.lora.layer.Conv3d) for m in wrapped.modules())
    with torch.no_grad():
        whole = model.decode(z)
        assert difference(before, whole) > 1e-2
        assert difference(model.decode(z, plan=model.plan(z.shape, budget="least")), whole) < 1e-10
        stream = model.decode_stream()
        parts = [*map(stream.push, z.split(1, 2)), stream.finish()]
        assert difference(torch.cat([p for p in parts if p is not None], 2), whole) < 1e-10


SAVES: list[Callable[[TemporalVAE, Path], object]] = [
    lambda model, folder: model.save_pretrained(folder / "folder"),
    lambda model, folder: model.save_model(folder / "a.safetensors"),
    lambda model, folder: model.serialize(),
]


@pytest.mark.parametrize("save", SAVES, ids=["folder", "file", "bytes"])
def test_weights_that_no_file_of_the_model_holds_are_not_saved(
    tmp_path: Path, save: Callable[[TemporalVAE, Path], object]
) -> None:
    """A file with them could not be read again: it is refused when it is written."""
    lora, normed, headed = (awake(torch.float32) for _ in range(3))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["conv1"]), lora)
    parametrizations.weight_norm(normed.decoder.conv_in)
    headed.add_module("head", nn.Linear(2, 2))
    for model, name in (
        (lora, r"conv1\.base_layer"),
        (normed, r"conv_in\.parametrizations"),
        (headed, r"head\.weight"),
    ):
        with pytest.raises(ValueError, match=f"could not be read again.*{name}.*: merge"):
            save(model, tmp_path)
    assert not list(tmp_path.iterdir())
    parametrize.remove_parametrizations(normed.decoder.conv_in, "weight")
    save(normed, tmp_path)


def test_lora_in_float16_that_needs_scales_is_refused() -> None:
    model = awake(torch.float32)
    with torch.no_grad():
        model.decoder.conv_in.weight.mul_(500)
    model.half()
    assert model.stream_scales["decoder"] != 1.0
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["conv1"]), model)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.decode(torch.zeros(1, 4, 1, 4, 4, dtype=torch.float16))


# Hooks and gradients in walks that cannot have them ------------------------------------------


@torch.no_grad()
def test_a_hook_that_a_walk_would_not_call_is_refused() -> None:
    model = awake()
    z = latents().transpose(0, 1)[None]
    plan, called = model.plan(z.shape, budget="least"), list[nn.Module]()
    for module in (model.decoder, model.decoder.mid_block, model.decoder.mid_block.resnets[0]):
        handle = module.register_forward_hook(lambda module, *_: called.append(module))
        model.decode(z)
        assert called == [module]
        called.clear()
        for walk in (
            lambda: model.decode(z, plan=plan),
            lambda: next(model.iter_decode(z, plan=plan)),
            lambda: model.decode_stream().push(z),
            lambda: model.decode_step(z),
        ):
            with pytest.raises(ValueError, match="walked whole: take it off"):
                walk()
        handle.remove()
    model.decode(z, plan=plan)


@pytest.mark.slow
def test_gradients_of_latents_within_a_budget_are_those_without() -> None:
    _, ours = pair("svd")
    expected = gradient_of_latents(ours)
    ours.memory = "least"
    assert difference(gradient_of_latents(ours), expected) < 1e-10
    many = latents().repeat(4, 1, 2, 2)
    ours.memory = 2**19
    with pytest.raises(ValueError, match=r"with gradients; torch.no_grad\(\) takes less"):
        # the weights alone want one, as those of every model that was just loaded
        decoded(ours, many)
    ours.memory = "least"
    ours.requires_grad_(False)
    decoded(ours, many)
    model, z = ours.vae.requires_grad_(True), many.transpose(0, 1)[None].requires_grad_()
    (expected,) = torch.autograd.grad(model.decode(z).square().mean(), z)
    for switch in (model.enable_tiling, lambda: model.set_memory_budget("least")):
        switch()
        (gradient,) = torch.autograd.grad(model.decode(z).square().mean(), z)
        assert difference(gradient, expected) < 1e-10
        model.disable_tiling()


def test_checkpointing_keeps_less() -> None:
    """The numbers that autograd keeps for the way back."""

    def kept(model: Any) -> int:
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel() if x.untyped_storage().data_ptr() not in weights else 0
            return x

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.decode(latents().transpose(0, 1)[None].requires_grad_())
        return total

    model = awake()
    plain = kept(model)
    model.enable_gradient_checkpointing()
    assert kept(model) < 0.5 * plain
    model.disable_gradient_checkpointing()
    assert kept(model) == plain


# What is put around a part, or in its place ---------------------------------------------------


class Halved(nn.Module):
    """A wrapper whose result is another one."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x) * 0.5
        return y


@torch.no_grad()
def test_what_is_wrapped_around_a_line_is_called() -> None:
    compiled = list[int]()

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    models: list[Any] = [awake(), to_diffusers(awake())]
    for model in models:
        z = latents().transpose(0, 1)[None] if hasattr(model, "latent_channels") else latents()
        before = model.decode(z)
        before = getattr(before, "sample", before)
        compiled.clear()
        model.decoder = torch.compile(model.decoder, backend=backend)
        found = model.decode(z)
        assert compiled and difference(getattr(found, "sample", found), before) < 1e-10
        handle = model.decoder.register_forward_hook(lambda _, args, out: out * 0.5)
        found = model.decode(z)
        assert difference(2 * getattr(found, "sample", found), before) < 1e-10
        handle.remove()
        other = awake(seed=1).decoder
        model.decoder = other
        found = model.decode(z)
        assert difference(getattr(found, "sample", found), before) > 1e-2


@torch.no_grad()
def test_a_hook_on_a_compiled_model_is_called() -> None:
    model: Any = awake()
    z = latents().transpose(0, 1)[None]
    expected = model.decode(z)
    model.compile(backend="eager")
    model.decoder.register_forward_hook(lambda _, args, out: out * 0.5)
    assert difference(2 * model.decode(z), expected) < 1e-10


@torch.no_grad()
def test_walks_in_pieces_refuse_what_they_would_pass_over() -> None:
    z = latents().transpose(0, 1)[None]

    plan = awake().plan(z.shape, budget="least")
    assert plan.bounds is not None

    def check(model: Any, words: str = "") -> None:
        whole = model.decode(z)
        walks: list[Callable[[], Any]] = [
            lambda: model.decode(z, plan=plan), lambda: model.decode_stream().push(z),
        ]  # fmt: skip
        for walk in walks:
            if words:
                with pytest.raises(ValueError, match=words):
                    walk()
            else:
                found = walk()
                assert found is None or difference(found, whole) < 1e-10

    model: Any = awake()
    model.decoder.mid_block = torch.compile(model.decoder.mid_block, backend="eager")
    check(model)
    model.decoder.mid_block.register_forward_hook(lambda _, args, out: out * 0.5)
    check(model, "a hook on mid_block")
    model = awake()
    model.decoder.up_blocks[0].resnets[0] = Halved(model.decoder.up_blocks[0].resnets[0])
    check(model, "in its place")
    model = awake()
    kept = list[Tensor]()
    norm = model.decoder.mid_block.attentions[0].group_norm
    norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    check(model, "a hook on")


class HalvedNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y * 0.5


@torch.no_grad()
@pytest.mark.parametrize(
    "norm", [HalvedNorm(4, 8), nn.Identity(), nn.GroupNorm(4, 8, affine=False)]
)
def test_another_norm_is_not_gathered_from_pieces(norm: nn.Module) -> None:
    model: Any = awake()
    z = latents().transpose(0, 1)[None]
    plan = model.plan(z.shape, budget="least")
    model.decoder.up_blocks[1].resnets[0].norm2 = norm.double()
    model.double()
    model.decode(z)
    with pytest.raises(ValueError, match="cannot be gathered from pieces"):
        model.decode(z, plan=plan)


@torch.no_grad()
def test_a_layer_in_two_places_is_applied_twice() -> None:
    for chain, first, second in (("mid_block", 0, 0), ("mid_block", 0, 1), ("up_blocks.0", 0, 0)):
        model: Any = awake(causal_mode=True, num_temporal_layers=2)
        mid = model.decoder.get_submodule(chain)
        mid.temporals[second][1 - second] = mid.temporals[first][0]
        calls, z = list[int](), latents().transpose(0, 1)[None]
        handle = mid.temporals[0][0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        whole = model.decode(z)
        assert len(calls) == 2
        handle.remove()
        plan = model.plan((1, 4, 1, *z.shape[3:]), stream=True)
        for bounds in (None, Bounds(frames=1, pixels=5)):
            parts = streamed(model, z, replace(plan, bounds=bounds))
            assert difference(parts, whole) < 1e-10


def streamed(model: Any, z: Tensor, plan: Any) -> Tensor:
    stream = model.decode_stream(plan)
    parts = [*map(stream.push, z.split(1, 2)), stream.finish()]
    return torch.cat([part for part in parts if part is not None], 2)


def test_plain_parts_in_place_of_ours_convert() -> None:
    model: Any = awake(torch.float32)
    block = model.decoder.mid_block.resnets[0]
    block.conv2 = nn.Conv2d(16, 16, 3, padding=1)
    z = latents().transpose(0, 1)[None]
    with torch.no_grad():
        expected = model.double().decode(z)
        found = model.decode(z, plan=model.plan(z.shape, budget="least"))
        assert difference(found, expected) < 1e-10
        model.load_state_dict(model.state_dict())
        model.decoder.conv_in.weight.mul_(3000)
        with pytest.raises(ValueError, match="in place of conv2"):
            model.half()
        with pytest.raises(ValueError, match="in place of conv2"):
            model.decode(z.half())
        block.conv2 = model.decoder.mid_block.resnets[1].conv2
        assert model.decode(z.half()).isfinite().all() and model.decoder.stream_scale < 1


def test_a_pruned_model_and_hooks_that_cannot_be_copied_become_float16() -> None:
    model: Any = awake(torch.float32)
    block, lock = model.decoder.mid_block.resnets[0], threading.Lock()
    prune.l1_unstructured(block.conv1, "weight", amount=0.5)

    def holds_a_lock(*_: object) -> None:
        assert not lock.locked()

    block.register_forward_hook(holds_a_lock)
    z = latents().transpose(0, 1)[None]
    with torch.no_grad():
        model.decoder.conv_in.weight.mul_(3000)
        expected = copy.deepcopy(model.decoder.state_dict())
        exact = model.decode(z.float())
        found = model.half().decode(z.half())
    assert model.decoder.stream_scale < 1 and difference(found.float(), exact) < 0.01
    for name, value in model.decoder.state_dict().items():
        assert torch.equal(value, expected[name].half()), name


@torch.no_grad()
def test_what_a_hook_holds_in_float16_is_not_scaled() -> None:
    model: Any = awake(torch.float32)
    model.decoder.conv_in.weight.mul_(3000)
    model.half()
    assert model.decoder.stream_scale < 1
    kept = list[tuple[Tensor, Tensor]]()
    for module in model.decoder.modules():
        module.register_forward_pre_hook(
            lambda _, args: kept.append((args[0], args[0].clone())) if args else None
        )
    model.decode(latents().transpose(0, 1)[None].half())
    assert len(kept) > 50 and all(torch.equal(held, copy) for held, copy in kept)


def test_wrapped_blocks_are_checkpointed_too() -> None:
    model: Any = awake()
    model.decoder.up_blocks[0].resnets[0] = Halved(model.decoder.up_blocks[0].resnets[0])
    calls = list[int]()
    model.enable_gradient_checkpointing()
    conv = model.decoder.up_blocks[0].resnets[0].module.conv1
    conv.register_forward_hook(lambda *_: calls.append(1))
    model.decode(latents().transpose(0, 1)[None].requires_grad_()).mean().backward()
    assert len(calls) == 2


# Numbers that a processor has no instructions for --------------------------------------------


def test_a_slow_type_is_told_once_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for slow, said in ((True, 1), (False, 0)):
        for cached in (dtypes.is_slow, dtypes.warn_if_slow):
            cached.cache_clear()
        with monkeypatch.context() as patched, warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            patched.setattr(dtypes, "_has", lambda dtype, slow=slow: not slow)
            model: Any = awake().bfloat16()
            model.plan((1, 4, 3, 4, 6))
            assert (
                len([w for w in told if "no instructions for bfloat16" in str(w.message)]) == said
            )
            model.plan((1, 4, 3, 4, 6))
            assert len([w for w in told if "take float32" in str(w.message)]) == said
    for cached in (dtypes.is_slow, dtypes.warn_if_slow):
        cached.cache_clear()


def test_weights_of_eight_bits_are_no_type_to_compute_in() -> None:
    """Not told to convert the input to it; nor cast layer by layer, which walks would not see."""
    model = awake(torch.float32).to(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=r"no layer computes: convert the model"):
            model.decode(torch.zeros(1, 4, 1, 4, 4).to(dtype))
    with pytest.raises(ValueError, match=r"not cast layer by layer.*bfloat16"):
        to_diffusers(awake()).enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)


def test_weights_on_no_device_are_told() -> None:
    with pytest.raises(ValueError, match="the weights are on no device"):
        awake(torch.float32).to("meta").decode(torch.zeros(1, 4, 1, 4, 4))


def test_the_drop_in_compiles_as_one_graph() -> None:
    ours = pair("svd")[1]
    with torch.no_grad():
        expected = decoded(ours)
        ours.decode = torch.compile(ours.decode, fullgraph=True, backend="aot_eager")
        assert difference(decoded(ours), expected) < 1e-6
