"""Law 1: memory never changes the picture. Bounded walks equal the whole one, on awake models."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import awake, difference, drawn, thinned
from hypothesis import strategies as st
from torch import Tensor

from temporal_vae import TemporalVAE
from temporal_vae.network import framewise
from temporal_vae.network.framewise import Framewise, ResidualBlock, Upsample
from temporal_vae.network.kernels.norm import Moments
from temporal_vae.walks import bounded, stages, workspace
from temporal_vae.walks.stages import Bounds

SVD_LIKE: dict[str, Any] = {
    "temporal_norm": "clip",
    "clip_frames": 4,
    "temporal_encoder": False,
    "temporal_attention_reach": 0,
    "time_conv_out": True,
}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"causal_mode": True, "num_temporal_layers": 2},
    {"temporal_kernel_size": 5, "temporal_attention_reach": 2},
    SVD_LIKE,
    SVD_LIKE | {"temporal_encoder": True, "temporal_attention_reach": 3},
    {"num_temporal_layers": 0, "channel_multipliers": (2, 1, 3)},
    {"channel_multipliers": (3, 1)},
]
MODELS = {str(options): awake(**options) for options in LAYOUTS}


def inputs(model: TemporalVAE, batch: int, frames: int, cells: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + frames)
    size = [n * model.downsample_factor for n in cells]
    video = torch.randn(batch, 3, frames, *size, generator=generator)
    latent = torch.randn(batch, 4, frames, *cells, generator=generator)
    return [video.to(model.dtype), latent.to(model.dtype)]


@torch.no_grad()
def assert_bounded_equals_whole(
    model: TemporalVAE,
    bounds: Bounds,
    shape: tuple[int, int, tuple[int, int]],
    tolerance: float = 1e-10,
) -> None:
    for line, x in zip((model.encoder, model.decoder), inputs(model, *shape), strict=True):
        given, whole = x.clone(), line(x)
        y = bounded.walk(line, x, bounds)
        assert y.shape == whole.shape and y.is_contiguous()
        assert difference(y, whole) < tolerance
        assert torch.equal(x, given), "the caller's tensor was overwritten"


BOUNDS = [
    Bounds(frames=1, pixels=1),
    Bounds(frames=2, pixels=5),
    Bounds(frames=99, pixels=10**6),
    Bounds(frames=1, largest=400, pixels=9, channels=8),
    Bounds(rows=1, pixels=7),
    Bounds(rows=3, pixels=7),
    Bounds(rows=8, pixels=7),
    Bounds(rows=1, pixels=7, fused=True),
    Bounds(rows=3, pixels=7, fused=True),
    Bounds(rows=8, pixels=7, fused=True),
]


@pytest.mark.parametrize(("layout", "bounds"), thinned(2, MODELS, BOUNDS))
def test_bounded_equals_whole(layout: str, bounds: Bounds) -> None:
    assert_bounded_equals_whole(MODELS[layout], bounds, (1, 5, (3, 4)))


@drawn(
    12,
    100,
    layout=st.sampled_from(list(MODELS)),
    frames=st.integers(1, 4),
    pixels=st.integers(1, 40),
    rows=st.none() | st.integers(1, 12),
    fused=st.booleans(),
    larger=st.none() | st.integers(1, 4000),
    shape=st.tuples(
        st.integers(1, 2), st.integers(1, 6), st.tuples(st.integers(1, 5), st.integers(1, 5))
    ),
)
def test_any_bounds(
    layout: str,
    frames: int,
    pixels: int,
    rows: int | None,
    fused: bool,
    larger: int | None,
    shape: tuple[int, int, tuple[int, int]],
) -> None:
    bounds = Bounds(
        frames=frames, largest=larger, pixels=pixels, channels=larger, rows=rows, fused=fused
    )
    assert_bounded_equals_whole(MODELS[layout], bounds, shape)


@pytest.mark.parametrize("options", [{}, SVD_LIKE], ids=str)
@pytest.mark.parametrize("bounds", [Bounds(frames=2, pixels=5), Bounds(rows=3, pixels=7)], ids=str)
def test_in_float32(options: dict[str, Any], bounds: Bounds) -> None:
    model = awake(torch.float32, **options)
    assert_bounded_equals_whole(model, bounds, (1, 5, (3, 4)), 1e-4)


@pytest.mark.parametrize("options", [{}, SVD_LIKE], ids=str)
@pytest.mark.parametrize("bounds", [Bounds(frames=2, pixels=50), Bounds(rows=3, pixels=7)], ids=str)
@torch.no_grad()
def test_bfloat16_is_no_further_from_the_truth(options: dict[str, Any], bounds: Bounds) -> None:
    exact_model, model = awake(**options), awake(torch.bfloat16, **options)
    latent = inputs(exact_model, 1, 5, (6, 8))[1]
    exact = exact_model.decode(latent)
    errors = [
        float((y.double() - exact).square().mean().sqrt())
        for y in (
            bounded.walk(model.decoder, latent.bfloat16(), bounds),
            model.decode(latent.bfloat16()),
        )
    ]
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        (SVD_LIKE, Bounds(frames=1, pixels=5)),
        ({}, Bounds(rows=3)),
        ({}, Bounds(rows=3, fused=True)),
    ],
    ids=str,
)
def test_norms_do_not_depend_on_what_the_operator_does_with_its_outputs(
    options: dict[str, Any], bounds: Bounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's batch norm writes mean and 1/sigma into two of them, and then computes with those."""

    class AsOnCuda:
        @staticmethod
        def out(
            x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor,
            train: bool, momentum: float, eps: float, *,
            out: Tensor, save_mean: Tensor, save_invstd: Tensor,
        ) -> None:  # fmt: skip
            assert not train
            save_mean.resize_(mean.shape).copy_(mean)
            save_invstd.resize_(variance.shape).copy_((variance + eps).rsqrt())
            centred = (x - save_mean.view(1, -1, 1, 1)) * save_invstd.view(1, -1, 1, 1)
            out.copy_(centred * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1))

    monkeypatch.setattr(torch.ops.aten, "native_batch_norm", AsOnCuda)
    assert_bounded_equals_whole(MODELS[str(options)], bounds, (1, 5, (3, 4)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", MODELS)
@pytest.mark.parametrize(
    "bounds",
    [Bounds(frames=1, pixels=5), Bounds(rows=3), Bounds(rows=3, fused=True, offload="host")],
    ids=str,
)
@torch.no_grad()
def test_bounded_equals_whole_on_a_gpu(layout: str, bounds: Bounds) -> None:
    model, dtype = copy.deepcopy(MODELS[layout]).cuda(), torch.float64
    for line, x in zip((model.encoder, model.decoder), inputs(model, 2, 5, (6, 4)), strict=True):
        y = bounded.walk(line, x.to("cuda", dtype), bounds)
        assert difference(y, line(x.to("cuda", dtype))) < 1e-10


@torch.no_grad()
def test_groups_are_about_as_large_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """More frames of the coarse levels go together, never more than a group of the finest holds."""
    model, sizes, counts = awake(), set[int](), set[int]()
    honest = ResidualBlock.frames

    def watched(self: ResidualBlock, x: Tensor, *norm: Any) -> Tensor:
        counts.add(len(x))
        y = honest(self, x, *norm)
        sizes.add(x.numel() + y.numel())
        return y

    monkeypatch.setattr(ResidualBlock, "frames", watched)
    latent = inputs(model, 1, 9, (3, 4))[1]
    framewise = [layer for layer in model.decoder.layers() if isinstance(layer, Framewise)]
    shapes = stages.shapes_in(framewise, (1, 4, 9, 3, 4))
    frames = [shape[1] * shape[3] * shape[4] for shape in shapes]
    largest = max(a + b for a, b in pairwise(frames))
    assert largest == stages.largest_of(framewise, (1, 4, 9, 3, 4))
    bounded.walk(model.decoder, latent, Bounds(frames=1, largest=largest))
    assert {1, 2} <= counts and max(sizes) <= largest


@torch.no_grad()
def test_an_arena_in_a_file(tmp_path: Path) -> None:
    model = MODELS[str({})]
    x = inputs(model, 2, 5, (3, 4))[1]
    for bounds in (
        Bounds(offload=tmp_path),
        Bounds(offload=tmp_path, rows=3),
        Bounds(offload="host"),
    ):
        assert difference(bounded.walk(model.decoder, x, bounds), model.decode(x)) < 1e-10
    assert not list(tmp_path.iterdir())


def test_autograd_is_refused() -> None:
    model = MODELS[str({})]
    with pytest.raises(ValueError, match=r"torch.no_grad\(\)"):
        bounded.walk(model.decoder, inputs(model, 1, 2, (2, 2))[1], Bounds())


@torch.no_grad()
def test_attention_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a 4K image, whose pixels are too many to be asked at once."""
    model = MODELS[str({})]
    x = inputs(model, 1, 3, (5, 6))[1]
    whole = model.decode(x)
    monkeypatch.setattr(framewise, "ATTENTION_SCORES", 1)
    monkeypatch.setattr(framewise, "LEAST_QUERIES", 7)
    assert difference(model.decode(x), whole) < 1e-10
    assert_bounded_equals_whole(model, Bounds(rows=2), (1, 2, (5, 6)))


GROWS_A_LITTLE = awake(channel_multipliers=(1, 3))


def test_an_arena_moves_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a clip grows by less than twice, source and target of the move overlap."""
    monkeypatch.setattr(workspace, "MOVED_AT_A_TIME", 37)
    assert_bounded_equals_whole(GROWS_A_LITTLE, Bounds(frames=1, pixels=9), (1, 5, (3, 4)))


# Mutations -----------------------------------------------------------------------------------


def assert_red(layout: str, bounds: Bounds) -> None:
    with pytest.raises(AssertionError):
        assert_bounded_equals_whole(MODELS[layout], bounds, (1, 5, (3, 4)))


def test_law_1_sees_sums_per_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Moments, "join", lambda parts: parts[-1])
    assert_red(str(SVD_LIKE), Bounds(pixels=5))
    assert_red(str({}), Bounds(rows=3))


@pytest.mark.parametrize(
    ("layer", "halo"), [(ResidualBlock, (2, 1)), (ResidualBlock, (1, 2)), (Upsample, (0, 1))]
)
def test_law_1_sees_a_halo_one_short(
    layer: type[Framewise], halo: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "halo", halo)
    assert_red(str({}), Bounds(rows=2))


def test_law_1_sees_a_frame_read_after_it_was_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace.Arena, "back", lambda self, clip: clip)
    assert_red(str({}), Bounds())


def test_law_1_sees_halo_rows_summed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = lambda rows, scale: (int(rows[0] / scale), 10**6)  # noqa: E731
    monkeypatch.setattr(bounded, "rows_owned", everything)
    assert_red(str({}), Bounds(rows=3))


def test_law_1_sees_an_arena_moved_first_part_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MOVED_AT_A_TIME", 37)
    monkeypatch.setattr(workspace, "reversed", list, raising=False)
    with pytest.raises(AssertionError):
        assert_bounded_equals_whole(GROWS_A_LITTLE, Bounds(frames=1, pixels=9), (1, 5, (3, 4)))
