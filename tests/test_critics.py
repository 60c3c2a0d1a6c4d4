"""The critic that plays against a VAE, and the distances of features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED, difference, pixels
from safetensors.torch import save_file
from torch import Tensor, nn

from temporal_vae.training import critics
from temporal_vae.training.critics import FeatureDistance, Lpips, PatchCritic

SQUEEZENET = SHARED / "weights" / "squeezenet_v1.1_imagenet_fp16.safetensors"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The critic ------------------------------------------------------------------------------------


def scores(critic: PatchCritic, video: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = critic(video)
    return found


@pytest.mark.parametrize(
    ("depth", "frames", "size", "expected"),
    [
        (3, 1, (16, 16), (1, 2, 2)),
        (3, 2, (16, 40), (1, 2, 5)),
        (3, 9, (17, 24), (3, 2, 3)),
        (1, 5, (16, 18), (5, 8, 9)),
        (4, 1, (16, 16), (1, 1, 1)),
    ],
)
def test_patches_of_any_clip(
    depth: int, frames: int, size: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    critic = PatchCritic(width=4, depth=depth)
    assert scores(critic, pixels(frames, *size, batch=2).float()).shape == (2, 1, *expected)


def test_a_critic_is_drawn_from_its_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = PatchCritic(width=8), PatchCritic(width=8), PatchCritic(width=8, seed=1)
    given = PatchCritic(width=8, seed=torch.Generator().manual_seed(1))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    video = pixels(2).float()
    assert torch.equal(scores(first, video), scores(again, video))
    assert torch.equal(scores(given, video), scores(other, video))
    assert difference(scores(other, video), scores(first, video)) > 0.01


def assert_samples_are_apart(critic: PatchCritic) -> None:
    video = pixels(3, batch=3)
    video[1] *= 0.1
    apart = torch.cat([scores(critic, sample[None]) for sample in video])
    assert difference(scores(critic, video), apart) < 1e-12, "the batch is seen"


def test_scores_do_not_depend_on_the_batch() -> None:
    assert_samples_are_apart(PatchCritic(width=8).double())


def test_a_norm_over_the_batch_is_seen() -> None:
    critic = PatchCritic(width=8).double()
    critic.layers[3] = nn.BatchNorm3d(16, dtype=torch.float64)
    with pytest.raises(AssertionError, match="the batch is seen"):
        assert_samples_are_apart(critic)


def test_every_parameter_of_a_critic_gets_a_gradient() -> None:
    critic = PatchCritic(width=8).double()
    critic(pixels(4)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-10 for p in critic.parameters())


def flicker(samples: int, seed: int) -> Tensor:
    """Still clips whose brightness shakes from frame to frame."""
    return still(samples, seed) + 0.3 * noise(samples, 1, 5, 1, 1, seed=seed + 1000)


def still(samples: int, seed: int) -> Tensor:
    return 0.3 * noise(samples, 1, 1, 16, 16, seed=seed).expand(-1, -1, 5, -1, -1)


def bright(samples: int, seed: int) -> Tensor:
    return still(samples, seed) + 0.4


def trained(real: Callable[[int, int], Tensor], fake: Callable[[int, int], Tensor]) -> PatchCritic:
    critic = PatchCritic(channels=1, width=8, depth=2)
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    for step in range(25):
        loss = critics.critic_loss(critic(real(8, 2 * step)), critic(fake(8, 2 * step + 1)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return critic


GAMES = [(bright, still), (still, bright), (still, flicker), (flicker, still)]


@pytest.mark.parametrize(("real", "fake"), GAMES)
def test_a_critic_learns_to_tell_two_kinds_apart(
    real: Callable[[int, int], Tensor], fake: Callable[[int, int], Tensor]
) -> None:
    critic = trained(real, fake)
    liked, made = scores(critic, real(16, 900)), scores(critic, fake(16, 901))
    assert critics.critic_loss(liked, made) < 0.5
    assert (liked.mean((1, 2, 3, 4)) > 0).float().mean() > 0.8
    assert (made.mean((1, 2, 3, 4)) < 0).float().mean() > 0.8


def test_the_generator_learns_to_fool_a_critic() -> None:
    """Its gradient makes dark clips brighter, until they are as bright as real ones."""
    critic = trained(bright, still)
    lift = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([lift], lr=0.02)
    made = still(16, 901)
    start = scores(critic, made).mean()
    for _ in range(20):
        optimizer.zero_grad()
        critics.generator_loss(critic(made + lift)).backward()
        optimizer.step()
    assert lift > 0.2
    assert scores(critic, made + lift.detach()).mean() > start + 0.5


def test_the_losses_are_their_definitions() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert critics.critic_loss(real, fake).item() == pytest.approx(
        0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    )
    assert critics.critic_loss(torch.zeros(4), torch.zeros(7)).item() == 1
    assert critics.generator_loss(fake).item() == pytest.approx(2 / 3)


def test_losses_are_float32_at_least(distance: FeatureDistance) -> None:
    scores = torch.tensor([0.1, 0.2, 0.3])
    half = scores.bfloat16()
    for loss in (critics.generator_loss, lambda x: critics.critic_loss(x, x)):
        assert torch.equal(loss(half), loss(half.float()))
        assert loss(scores.double()).dtype == torch.float64
    a, b = pixels(1, 17, 17).float(), pixels(1, 17, 17).float().flip(3)
    with torch.autocast("cpu", torch.bfloat16):
        rough = distance.float()(a, b)
    assert rough.dtype == torch.float32
    assert float(rough) == pytest.approx(float(distance(a, b)), rel=0.05)


@pytest.mark.parametrize("shape", [(1, 3, 4, 16), (1, 4, 1, 16, 16), (1, 3, 0, 16, 16)], ids=str)
def test_a_critic_names_the_shape_that_it_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(B, 3, T, H, W\)"):
        PatchCritic(width=4)(torch.zeros(shape))


def test_a_critic_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(ValueError, match="frames of 16x16 pixels or more, got 15x16"):
        PatchCritic(width=4)(torch.zeros(1, 3, 1, 15, 16))
    with pytest.raises(ValueError, match="32x32"):
        PatchCritic(width=4, depth=5)(torch.zeros(1, 3, 1, 16, 16))
    for name in ("channels", "width", "depth"):
        options: dict[str, int] = {name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            PatchCritic(**options)


# The weight of the adversarial loss ---------------------------------------------------------------


def test_the_adaptive_weight_is_its_definition() -> None:
    last = nn.Parameter(noise(3, 4))
    hidden = noise(4, 5, seed=1).requires_grad_()
    out = last @ hidden
    near, far = (out - 1).square().mean(), out.exp().mean()
    weight = critics.adaptive_weight(near, far, last)
    grads = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (near, far)]
    assert weight.item() == pytest.approx(float(grads[0] / (grads[1] + 1e-4)))
    assert weight.ndim == 0 and not weight.requires_grad
    assert last.grad is None and hidden.grad is None  # nothing is left behind
    pulls = torch.autograd.grad(weight * far, last, retain_graph=True)[0].norm()
    assert float(pulls) == pytest.approx(float(grads[0]), rel=1e-3)
    (near + weight * far).backward()
    assert last.grad is not None


def test_the_adaptive_weight_is_bounded() -> None:
    last = nn.Parameter(noise(3))
    weak = 1e-9 * last.sum()
    assert critics.adaptive_weight(last.square().sum(), weak, last) == 1e4
    assert critics.adaptive_weight(last.square().sum(), weak, last, most=7) == 7


def test_the_adaptive_weight_of_processes_is_that_of_the_whole_batch() -> None:
    """Each has a part of the batch, and the means of gradients: so they get one weight."""
    last = nn.Parameter(noise(4))
    batch = noise(6, 4, seed=1)

    def losses(part: Tensor) -> tuple[Tensor, Tensor]:
        return (part @ last - 1).square().mean(), (part @ last).exp().mean()

    means = [torch.autograd.grad(loss, last)[0] for loss in losses(batch)]
    waiting = iter(means)
    whole = critics.adaptive_weight(*losses(batch), last)
    part = critics.adaptive_weight(*losses(batch[:2]), last, average=lambda _: next(waiting))
    assert torch.equal(part, whole)
    assert critics.adaptive_weight(*losses(batch[:2]), last) != whole


def test_a_loss_without_a_way_to_the_last_layer_is_refused() -> None:
    last = nn.Parameter(torch.ones(3))
    apart = torch.ones(3, requires_grad=True).sum()
    with pytest.raises(ValueError, match="does not depend on the last parameter"):
        critics.adaptive_weight(last.sum(), apart, last)
    with pytest.raises(ValueError, match="detached"):
        critics.adaptive_weight(last.sum().detach(), apart, last)


# Distances of features ------------------------------------------------------------------------


def made_up(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Values that anybody can compute again, of the size of a network's."""
    return {name: _made_up(shape, k) for k, (name, shape) in enumerate(shapes.items())}


def _made_up(shape: torch.Size, k: int) -> Tensor:
    steps = torch.arange(shape.numel()).mul_(7919).add_(k * 104729).remainder_(10007)
    values = (steps.double() / 5003 - 1).reshape(shape)
    scale: float = (math.prod(shape[1:]) / 6) ** -0.5 if len(shape) > 1 else 0.1
    return (values * scale).float()


def shapes(trunk: critics._Trunk) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in trunk.state_dict().items()}


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Trunk and heads of both networks, with made-up values."""
    folder = tmp_path_factory.mktemp("lpips")
    found = {}
    for name, make in (("squeeze", critics._squeezenet), ("vgg", critics._vgg16)):
        trunk, heads = folder / f"{name}.safetensors", folder / f"{name}_heads.safetensors"
        network = make()
        widths = {
            f"lin{i}.model.1.weight": torch.Size((1, n, 1, 1)) for i, n in enumerate(network.widths)
        }
        save_file(made_up(shapes(network)), trunk)
        save_file({name: value.abs() for name, value in made_up(widths).items()}, heads)
        found[name] = trunk, heads
    return found


def two_clips() -> tuple[Tensor, Tensor]:
    a = 10 * _made_up(torch.Size((2 * 3 * 2 * 24 * 20,)), 5).reshape(2, 3, 2, 24, 20)
    return a, (a * 0.8 + 0.1) * torch.linspace(0.5, 1, 20)


@pytest.mark.parametrize(
    ("network", "expected"), [("squeeze", 0.06762709767114482), ("vgg", 0.024176852388222314)]
)
def test_lpips_is_what_its_package_computes(
    lpips_files: dict[str, tuple[Path, Path]], network: str, expected: float
) -> None:
    """The numbers are of lpips 0.1.4 with these values, over torchvision's layers, in float64."""
    distance = Lpips.from_files(*lpips_files[network])
    assert distance(*two_clips()).item() == pytest.approx(expected, rel=1e-5)


def test_lpips_is_its_formula(lpips_files: dict[str, tuple[Path, Path]]) -> None:
    """Written out for the first layer of VGG; the heads of the others are zero."""
    trunk, heads = lpips_files["vgg"]
    distance = Lpips.from_files(trunk, heads)
    for i in range(1, 5):
        distance.get_buffer(f"head{i}").zero_()
    weights = made_up(shapes(critics._vgg16()))
    units = []
    for clip in two_clips():
        x = clip.transpose(1, 2).reshape(4, 3, 24, 20)
        x = x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        x = x / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        for layer in ("features.0", "features.2"):
            x = F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=1).relu()
        units.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    head = _made_up(torch.Size((1, 64, 1, 1)), 0).abs()
    expected = ((units[0] - units[1]).square() * head).sum(1).mean()
    assert distance(*two_clips()).item() == pytest.approx(float(expected), rel=1e-5)


@pytest.fixture
def distance(tmp_path_factory: pytest.TempPathFactory) -> FeatureDistance:
    """Of made-up values, in float64."""
    file = tmp_path_factory.mktemp("trunk") / "squeezenet.safetensors"
    named = made_up(shapes(critics._squeezenet()))
    save_file({critics._CAFFE[name]: value for name, value in named.items()}, file)
    return FeatureDistance.from_file(file).double()


def test_a_trunk_is_given_the_pixels_that_it_was_trained_on(distance: FeatureDistance) -> None:
    """BGR in 0..255 less the means: written out for the first layer, one seventh of the whole."""
    for i in range(1, 7):
        distance.get_buffer(f"head{i}").zero_()
    weights = made_up(shapes(critics._squeezenet()))
    units = []
    for clip in two_clips():
        red, green, blue = (clip.double().transpose(0, 1).flatten(1, 2) + 1) * 127.5
        x = torch.stack([blue - 104, green - 117, red - 123], 1)
        w, b = (weights[f"features.0.{kind}"].double() for kind in ("weight", "bias"))
        units.append(F.normalize(F.conv2d(x, w, b, stride=2).relu(), dim=1))
    expected = (units[0] - units[1]).square().sum(1).mean() / 7
    assert distance(*two_clips()).item() == pytest.approx(float(expected), rel=1e-6)


def test_equal_clips_are_at_no_distance(
    distance: FeatureDistance, lpips_files: dict[str, tuple[Path, Path]]
) -> None:
    a = pixels(2, 20, 24)
    assert distance(a, a) == 0
    assert Lpips.from_files(*lpips_files["squeeze"])(a, a) == 0
    assert 0 < distance(a, a.flip(4)) <= 2
    assert distance(a, a.flip(4)).item() == pytest.approx(distance(a.flip(4), a).item())


def test_a_distance_is_the_mean_over_frames(distance: FeatureDistance) -> None:
    a, b = pixels(3, batch=2, height=20), pixels(3, batch=2, height=20).flip(3)
    each = [
        distance(a[i : i + 1, :, t : t + 1], b[i : i + 1, :, t : t + 1])
        for i in range(2)
        for t in range(3)
    ]
    assert difference(distance(a, b), torch.stack(each).mean()) < 1e-12


def test_the_gradient_of_a_distance(distance: FeatureDistance) -> None:
    """Equal to that of finite steps, finite where features are zero, none for the weights."""
    a, b = pixels(1, 17, 17), pixels(1, 17, 17).flip(3)
    moved = a.clone().requires_grad_()
    distance(moved, b).backward()
    assert moved.grad is not None
    way = moved.grad / moved.grad.norm()
    steps = [float(distance(a + h * way, b)) for h in (1e-5, -1e-5)]
    assert (steps[0] - steps[1]) / 2e-5 == pytest.approx(float(moved.grad.norm()), rel=1e-3)
    assert not any(p.requires_grad for p in distance.parameters())
    assert not distance.training

    silent = torch.zeros(1, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    critics._unit(silent).sum().backward()
    assert silent.grad is not None and silent.grad.isfinite().all()
    small = critics._unit(1e-6 * torch.ones(1, 4, 1, 1)).flatten()
    assert small.tolist() == pytest.approx([0.5] * 4, rel=1e-3)


def test_grey_is_three_equal_channels(distance: FeatureDistance) -> None:
    a, b = pixels(2, 20, channels=1), pixels(2, 20, channels=1).flip(3)
    three = distance(a.repeat(1, 3, 1, 1, 1), b.repeat(1, 3, 1, 1, 1))
    assert torch.equal(distance(a, b), three)


def test_clips_that_no_distance_takes(distance: FeatureDistance) -> None:
    with pytest.raises(ValueError, match=r"3 channels, or 1 for grey, got \(1, 4, 2, 20, 20\)"):
        distance(torch.zeros(1, 4, 2, 20, 20), torch.zeros(1, 4, 2, 20, 20))
    with pytest.raises(ValueError, match="3 channels"):
        distance(torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 20, 20))
    with pytest.raises(ValueError, match="17 pixels or more each way, got 16x20"):
        distance(torch.zeros(1, 3, 2, 16, 20), torch.zeros(1, 3, 2, 16, 20))
    with pytest.raises(ValueError, match="one shape"):
        distance(torch.zeros(1, 3, 2, 20, 20), torch.zeros(1, 3, 1, 20, 20))


def blurred(clip: Tensor, width: float) -> Tensor:
    reach = torch.arange(-6, 7)
    weights = torch.exp(-0.5 * (reach / width) ** 2)
    kernel = (weights / weights.sum()).view(1, 1, 1, -1, 1)
    for axes in (kernel, kernel.transpose(3, 4)):
        pad = (0, 0, 6, 6) if axes is kernel else (6, 6, 0, 0)
        padded = F.pad(clip, (*pad, 0, 0), mode="replicate")
        clip = F.conv3d(padded, axes.expand(3, 1, 1, *axes.shape[3:]), groups=3)
    return clip


def test_real_features_see_blur_more_than_brightness() -> None:
    """With trained weights: the distance grows with blur, and a gain of equal error costs less."""
    if not SQUEEZENET.is_file():
        pytest.skip(f"no weights of SqueezeNet at {SQUEEZENET}")
    distance = FeatureDistance.from_file(SQUEEZENET)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    waves = torch.stack([(rows * k).sin() * (columns * (k + 0.2)).cos() for k in (0.3, 0.5, 0.9)])
    clip = 0.6 * waves[None, :, None] + 0.2 * (rows > columns)
    by_blur = [float(distance(blurred(clip, width), clip)) for width in (0.4, 0.8, 1.6, 3.2)]
    assert by_blur == sorted(by_blur) and by_blur[0] > 0
    blur = blurred(clip, 0.8)
    error = (blur - clip).square().mean().sqrt()
    assert distance(clip + error, clip) < 0.5 * by_blur[1]
    moved = blur.clone().requires_grad_()
    distance(moved, clip).backward()
    assert moved.grad is not None and moved.grad.isfinite().all() and moved.grad.abs().max() > 0
    assert float(distance(blur - 0.003 * moved.grad / moved.grad.abs().max(), clip)) < by_blur[1]


# Files of weights that are refused ----------------------------------------------------------------


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    absent, pickle = tmp_path / "absent.safetensors", tmp_path / "trunk.pth"
    torch.save({"conv1.weight": torch.zeros(1)}, pickle)
    reads: list[Callable[[Path], object]] = [
        FeatureDistance.from_file,
        lambda file: Lpips.from_files(file, file),
    ]
    for read in reads:
        with pytest.raises(ValueError, match=r"absent\.safetensors is not a file: .* safetensors"):
            read(absent)
        with pytest.raises(ValueError, match=r"pickle, .* safetensors\.torch\.save_file"):
            read(pickle)
        with pytest.raises(ValueError, match="is not a file"):
            read(tmp_path)


def test_files_that_lack_layers(tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    save_file({"conv1.weight": torch.zeros(64, 3, 3, 3), "conv1.bias": torch.zeros(64)}, file)
    with pytest.raises(ValueError, match=r"no SqueezeNet v1\.1: it lacks 'fire2\.squeeze1x1"):
        FeatureDistance.from_file(file)
    with pytest.raises(ValueError, match=r"neither torchvision's squeezenet1_1 nor its vgg16"):
        Lpips.from_files(file, file)


def test_files_that_do_not_fit(tmp_path: Path, lpips_files: dict[str, tuple[Path, Path]]) -> None:
    (squeeze, squeeze_heads), (vgg, vgg_heads) = lpips_files["squeeze"], lpips_files["vgg"]
    with pytest.raises(ValueError, match=r"'lin3\.model\.1\.weight' in .* must be \(1, 384, 1, 1"):
        Lpips.from_files(squeeze, vgg_heads)
    with pytest.raises(ValueError, match=r"must be \(1, 512, 1, 1\), got \(1, 384, 1, 1\)"):
        Lpips.from_files(vgg, squeeze_heads)
    with pytest.raises(ValueError, match=r"vgg\.safetensors lacks 'lin0\.model\.1\.weight'"):
        Lpips.from_files(vgg, vgg)
    with pytest.raises(ValueError, match=r"heads .* safetensors"):
        Lpips.from_files(squeeze, tmp_path / "absent")
    wrong = made_up(shapes(critics._squeezenet())) | {"features.0.bias": torch.zeros(5)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"'features\.0\.bias' in .* must be \(64,\), got \(5,\)"):
        Lpips.from_files(tmp_path / "wrong.safetensors", squeeze_heads)
