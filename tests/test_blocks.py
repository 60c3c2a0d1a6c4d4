"""Memory that a walk uses again: never that of a tensor which somebody holds, never for long."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from temporal_vae import TemporalVAE, WanVAEConfig
from temporal_vae.network.framewise import ResidualBlock
from temporal_vae.network.kernels import blocks, native, three_taps
from temporal_vae.network.kernels.blocks import Blocks, new_empty, used_again

LIKE = torch.empty(0)
LAYOUTS = ["page", "svd", "wan"]


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_taps, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(three_taps, "LEAST_PIXELS", 0)


def model_of(layout: str) -> TemporalVAE:
    """An awake model with layers wide enough for the kernels."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"channel_multipliers": (1, 2), "blocks_per_level": 1}
    if layout == "wan":
        model = TemporalVAE.from_config(
            WanVAEConfig(
                base_channels=16, channel_multipliers=(1, 2), temporal_downsample=(True,),
                blocks_per_level=1,
            )
        )  # fmt: skip
    elif layout == "svd":
        model = TemporalVAE(base_channels=32, temporal_norm="clip", clip_frames=5, **options)
    else:
        model = TemporalVAE(base_channels=32, **options)
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.05)
    return model.requires_grad_(False)


def latent_of(model: TemporalVAE, frames: int = 5) -> Tensor:
    return torch.randn(1, model.latent_channels, frames, 8, 6)


@torch.no_grad()
def test_no_two_tensors_share_a_block_and_no_more_is_kept_than_was_in_use() -> None:
    drawn, kept = random.Random(0), Blocks()
    held: list[tuple[Tensor, int]] = []
    in_use = most = 0
    for step in range(2000):
        if held and drawn.random() < 0.5:
            tensor, mark = held.pop(drawn.randrange(len(held)))
            assert bool((tensor == mark).all())
            in_use -= tensor.nbytes
            del tensor
        else:
            tensor = kept.empty(LIKE, (drawn.choice([4, 6, 9]), drawn.choice([5, 8])))
            held.append((tensor.fill_(step), step))
            in_use += tensor.nbytes
        most = max(most, in_use)
        assert in_use + sum(map(len, kept._free)) <= most
    assert all(bool((tensor == mark).all()) for tensor, mark in held)


@torch.no_grad()
def test_a_block_is_used_again_when_all_views_of_it_are_gone() -> None:
    with used_again():
        x = new_empty(LIKE, (3, 4))
        place, view = x.data_ptr(), x[1:]
        del x
        assert new_empty(LIKE, (3, 4)).data_ptr() != place
        del view
        y = new_empty(LIKE.double(), (6, 1))
        assert y.data_ptr() == place and y.dtype == torch.float64


@torch.no_grad()
def test_nothing_outlives_a_walk() -> None:
    with used_again():
        kept: Any = blocks._blocks.get()
        result = new_empty(LIKE, (3, 4)).fill_(2)
        new_empty(LIKE, (5, 4))
    assert blocks._blocks.get() is None and not kept._free
    del result
    assert not kept._free


@torch.no_grad()
def test_an_error_ends_it_too() -> None:
    with pytest.raises(ZeroDivisionError), used_again():
        raise ZeroDivisionError
    assert blocks._blocks.get() is None


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_what_is_held_of_a_walk_stays_as_it_was(layout: str) -> None:
    """By hooks on every part in turn, by the caller, and in another thread."""
    model = model_of(layout)
    z = latent_of(model)
    expected = model.decode(z)
    once = expected.clone()
    for part in [*model.decoder.modules()][1:]:
        held: list[tuple[Tensor, Tensor]] = []

        def keep(module: nn.Module, given: Any, y: Any, held: Any = held) -> None:
            found = [x for x in (*given, y) if isinstance(x, Tensor)]
            held.extend((x, x.clone()) for x in found)

        handle = part.register_forward_hook(keep)
        torch.testing.assert_close(model.decode(z), once, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert all(torch.equal(x, then) for x, then in held), type(part).__name__
    assert torch.equal(expected, once)


class Tap(nn.Module):
    """Keeps what goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.held.append((x, x.clone()))
        return x


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("hooked", [True, False])
@torch.no_grad()
def test_what_is_held_inside_of_a_sequence_stays_as_it_was(hooked: bool) -> None:
    model = model_of("page")
    z = latent_of(model)
    expected, taps = model.decode(z), []
    blocks_of: list[Any] = [m for m in model.decoder.modules() if isinstance(m, ResidualBlock)]
    for block in blocks_of:
        taps.append(Tap())
        if hooked:
            block.conv1.register_forward_hook(lambda module, given, y, tap=taps[-1]: tap(y))
            block.conv1 = nn.Sequential(block.conv1)
        else:
            block.conv1 = nn.Sequential(block.conv1, taps[-1])
    torch.testing.assert_close(model.decode(z), expected, rtol=1e-4, atol=1e-5)
    assert taps and all(tap.held and torch.equal(*tap.held[0]) for tap in taps)


class Hesitant(Blocks):
    """Lets other threads go on between reading a count and writing it."""

    @property
    def _in_use(self) -> int:
        found: int = self.__dict__["in_use"]
        time.sleep(1e-4)
        return found

    @_in_use.setter
    def _in_use(self, size: int) -> None:
        self.__dict__["in_use"] = size


@torch.no_grad()
def test_tensors_may_end_in_any_thread() -> None:
    kept = Hesitant()

    def use(n: int) -> None:
        for step in range(100):
            kept.empty(LIKE, (4 + (n + step) % 3, 8))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept._in_use == 0 and sum(map(len, kept._free)) <= kept._most


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_walks_at_once_keep_apart(layout: str) -> None:
    model = model_of(layout)
    inputs = [latent_of(model, frames) for frames in (2, 3, 5)]
    expected = [model.decode(z) for z in inputs]
    found: list[list[Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        with torch.no_grad():
            found[i].extend(model.decode(inputs[i]) for _ in range(4))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, exact in zip(found, expected, strict=True):
        assert len(each) == 4
        assert all(torch.allclose(one, exact, rtol=1e-4, atol=1e-5) for one in each)


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_walk_uses_its_blocks_again(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, made = model_of(layout), [0], [0]
    empty, of_blocks = torch.empty, Blocks.empty

    def counted(*args: Any, **options: Any) -> Tensor:
        made[0] += options.get("dtype") == torch.uint8
        return empty(*args, **options)

    def asking(self: Blocks, like: Tensor, shape: Any) -> Tensor:
        asked[0] += 1
        return of_blocks(self, like, shape)

    monkeypatch.setattr(Blocks, "empty", asking)
    monkeypatch.setattr(torch, "empty", counted)
    model.decode(latent_of(model))
    assert 0 < made[0] < asked[0] / 2


FAULTS = """
import resource, torch
from temporal_vae import TemporalVAE
from temporal_vae.network.kernels import blocks
vae = TemporalVAE(base_channels=32, channel_multipliers=(1, 1), blocks_per_level=3, seed=0)
z, found = torch.randn(1, 4, 1, 128, 128), []
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
with torch.no_grad():
    for times in range(4):
        if times == 2:
            blocks._blocks = type("Nobody", (), {
                "get": lambda self: None, "set": lambda self, x: None, "reset": lambda self, x: None
            })()
        begin = faults()
        vae.decode(z)
        found.append(faults() - begin)
print(min(found[2:]) / max(1, min(found[:2])))
"""


@pytest.mark.skipif(native.library() is None, reason="there is no C compiler")
def test_fewer_pages_are_fresh() -> None:
    """Where blocks are as large as the system's allocator never keeps."""
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True, timeout=300
    )
    assert float(ran.stdout) > 1.5
