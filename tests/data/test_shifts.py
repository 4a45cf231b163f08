import pickle
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from penult.data import SHIFTS, ShiftedDataset, read, shift
from penult.data._shifts import Draws

SEVERITIES = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)


def pictures(n=12, channels=3, height=28, width=28, seed=0, dtype=torch.float32):
    """Smooth pictures with full contrast."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(n, channels, 7, 7, generator=g)
    images = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return images.to(dtype)


def test_the_kinds():
    assert SHIFTS == ("texture", "noise", "blur", "rotation", "inversion", "pixelation", "contrast")


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 17, 23), (1, 1, 1), (4, 2, 9), (3, 64, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SHIFTS)
def test_shape_dtype_and_range(kind, dtype, shape):
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = x.clone()
    for severity in (0.3, 1):
        out = shift(x, kind, severity)
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert out.min() >= 0
        assert out.max() <= 1
    assert torch.equal(x, kept)
    assert shift(x[:0], kind, 0.5).shape == (0, *shape)


@pytest.mark.parametrize("kind", SHIFTS)
def test_nothing_is_the_identity(kind):
    x = pictures()
    out = shift(x, kind, 0)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    assert torch.equal(shift(x, kind, 0.0), x)
    tiny = shift(x, kind, 1e-200)
    assert tiny.isfinite().all()
    if kind != "pixelation":  # any severity makes blocks of two
        assert (tiny - x).abs().max() < 1e-5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", SHIFTS)
def test_effect_grows_with_severity(kind, channels):
    x = pictures(64, channels)
    if kind == "rotation":  # corners that turn black are most at 45 degrees: a wedge of light in a dark disc instead
        across, down = torch.meshgrid(*[torch.linspace(-1, 1, 28)] * 2, indexing="xy")
        x = ((across + 1) / 2 * (torch.hypot(across, down) < 0.9)).expand(1, channels, -1, -1)
    change = [float((shift(x, kind, s) - x).abs().mean()) for s in SEVERITIES]
    assert change[0] == 0
    assert all(a < b for a, b in pairwise(change)), change
    assert change[-1] > 0.1


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 7), (3, 33, 31)])
@pytest.mark.parametrize("kind", SHIFTS)
def test_images_are_changed_alike_in_any_batch(kind, shape):
    x = pictures(200, *shape)
    whole = shift(x, kind, 0.37, seed=5)
    assert torch.equal(shift(x[5:10], kind, 0.37, seed=5, first=5), whole[5:10])
    assert torch.equal(shift(x[77:], kind, 0.37, seed=5, first=77), whole[77:])
    assert torch.equal(torch.cat([shift(x[i : i + 1], kind, 0.37, seed=5, first=i) for i in range(200)]), whole)
    assert torch.equal(shift(x.to(memory_format=torch.channels_last), kind, 0.37, seed=5), whole)
    strided = x.repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(shift(strided, kind, 0.37, seed=5), whole)


@pytest.mark.parametrize("kind", SHIFTS)
def test_randomness_is_of_seed_and_number(kind):
    x = pictures(1).expand(6, -1, -1, -1)
    out = shift(x, kind, 0.5, seed=1)
    assert torch.equal(out, shift(x, kind, 0.5, seed=1))
    random = kind in ("texture", "noise")
    assert torch.equal(out[0], out[1]) != random
    for other in (shift(x, kind, 0.5, seed=2), shift(x, kind, 0.5, seed=1, first=6), shift(x, kind, 0.5, seed=-1)):
        same = [torch.equal(a, b) for a in out for b in other]
        assert any(same) != random


def test_no_two_images_share_a_seed():
    class Recorder(torch.Generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return super().manual_seed(seed)

    seeds = []
    for seed in (0, 1, 2, 12345, 2**31, -1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("penult.data._shifts.Generator", Recorder)
            Draws(seed, 0, 5000)(lambda _: torch.zeros(()))
    per_seed = [set(seeds[i : i + 5000]) for i in range(0, len(seeds), 5000)]
    assert len(per_seed) == 6
    assert all(len(each) == 5000 for each in per_seed)  # exact within a seed
    assert len(set(seeds)) > 0.999 * len(seeds)  # and few are shared between seeds
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("kind", SHIFTS)
def test_global_randomness_is_left_alone(kind):
    before = torch.random.get_rng_state()
    shift(pictures(3), kind, 0.5)
    ShiftedDataset(read("digits"), kind, 0.5)[3]
    assert torch.equal(torch.random.get_rng_state(), before)


# --- what each kind is --------------------------------------------------------------------------------------


def test_texture_is_a_convex_mix():
    x = pictures()
    textures = shift(x, "texture", 1.0, seed=3)
    assert torch.allclose(shift(x, "texture", 0.3, seed=3), 0.7 * x + 0.3 * textures, atol=1e-6)
    assert torch.equal(textures, shift(torch.zeros_like(x), "texture", 1.0, seed=3))  # nothing of x is left


def test_procedural_textures_have_equal_power_in_every_octave():
    t = shift(torch.zeros(2000, 3, 32, 32), "texture", 1.0)
    assert float(t.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(t.std()) == pytest.approx(0.24, abs=0.01)
    correlation = torch.corrcoef(t.transpose(0, 1).flatten(1))
    assert correlation[0, 1].item() == pytest.approx(0.64, abs=0.03)
    power = torch.fft.fft2(t - 0.5).abs().square().mean((0, 1))
    frequency = torch.hypot(*torch.meshgrid(*[torch.fft.fftfreq(32).abs() * 32] * 2, indexing="ij"))
    flat = [(power * frequency**2)[(frequency >= low) & (frequency < 2 * low)].mean() for low in (1, 2, 4, 8)]
    assert max(flat) / min(flat) < 1.2  # 1/f², which integrates to the same over each octave of the plane
    grey = shift(torch.zeros(50, 1, 32, 32), "texture", 1.0)
    assert grey.shape == (50, 1, 32, 32)
    assert grey.std() > 0.2


def test_given_textures_are_cropped():
    x, ramp = torch.zeros(300, 1, 4, 5), torch.arange(2 * 7 * 9).view(2, 1, 7, 9) / 200
    out = shift(x, "texture", 1.0, textures=ramp)
    corners = set()
    for image in out:
        corner = int((200 * image[0, 0, 0]).round())
        which, place = divmod(corner, 63)
        top, left = divmod(place, 9)
        assert torch.equal(image, ramp[which, :, top : top + 4, left : left + 5])
        corners.add(corner)
    assert len(corners) == 2 * 4 * 5  # every crop there is
    assert torch.equal(shift(x[:9], "texture", 1.0, textures=ramp, first=7), out[7:16])
    colour = shift(torch.zeros(2, 3, 4, 5), "texture", 1.0, textures=ramp)  # grey ones for colour images
    assert torch.equal(colour[:, 0], colour[:, 2])
    assert torch.equal(shift(x[:3].double(), "texture", 1.0, textures=ramp), out[:3].double())


def test_noise_has_the_severity_for_deviation():
    x = torch.full((100, 3, 16, 16), 0.5)
    difference = shift(x, "noise", 0.1) - x
    assert float(difference.std()) == pytest.approx(0.1, rel=0.02)
    assert abs(float(difference.mean())) < 0.002
    flat = difference.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(100)).abs().max() < 0.2  # each image has its own


def test_blur_has_the_deviation_it_says():
    point = torch.zeros(1, 1, 65, 81, dtype=torch.float64)
    point[0, 0, 32, 40] = 1
    out = shift(point, "blur", 0.4)[0, 0]
    assert float(out.sum()) == pytest.approx(1, abs=1e-9)
    for axis, middle in ((1, 32), (0, 40)):
        profile = out.sum(axis)
        places = torch.arange(len(profile)) - middle
        assert float((profile * places**2).sum()) == pytest.approx((0.4 * 65 / 8) ** 2, rel=1e-3)
    even = torch.full((1, 3, 9, 11), 0.3)
    assert torch.allclose(shift(even, "blur", 1.0), even, atol=1e-6)  # edges are not darkened


def test_rotation_is_counterclockwise():
    square = pictures(height=21, width=21)
    assert torch.allclose(shift(square, "rotation", 1.0), torch.rot90(square, 1, (2, 3)), atol=1e-4)
    long = torch.zeros(1, 1, 9, 15)
    long[..., 4, 7:11] = 1  # from the middle to the right
    up = torch.zeros(1, 1, 9, 15)
    up[..., 1:5, 7] = 1
    assert torch.allclose(shift(long, "rotation", 1.0), up, atol=1e-4)
    assert (shift(torch.ones(1, 1, 21, 21), "rotation", 0.5)[..., [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()


def test_inversion():
    x = pictures()
    assert torch.allclose(shift(x, "inversion", 1.0), 1 - x)
    assert torch.allclose(shift(x, "inversion", 0.5), torch.full_like(x, 0.5))


def test_pixelation_means_over_blocks():
    x = pictures(height=16, width=23)
    out = shift(x, "pixelation", 0.5)  # blocks of 4
    for top in range(0, 16, 4):
        for left in range(0, 23, 4):
            block = (..., slice(top, top + 4), slice(left, left + 4))
            mean = x[block].mean((2, 3), keepdim=True)
            assert torch.allclose(out[block], mean.expand_as(out[block]), atol=1e-6)
    square = pictures(height=12, width=12)
    assert torch.allclose(
        shift(square, "pixelation", 1.0), square.mean((2, 3), keepdim=True).expand_as(square), atol=1e-6
    )


def test_contrast():
    x = pictures()
    mean = x.mean((2, 3), keepdim=True)
    assert torch.allclose(shift(x, "contrast", 0.6), mean + 0.4 * (x - mean), atol=1e-6)
    assert torch.allclose(shift(x, "contrast", 1.0), mean.expand_as(x), atol=1e-6)


# --- refusals -----------------------------------------------------------------------------------------------


def test_refusals():
    x = pictures(2)
    with pytest.raises(
        ValueError, match="kind is 'fog'; expected 'texture' or 'noise' or 'blur' or 'rotation' or 'inversion' or 'pix"
    ):
        shift(x, "fog", 0.5)
    for severity in (-0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"severity is .*; expected a number from 0 to 1"):
            shift(x, "noise", severity)
    with pytest.raises(TypeError, match=r"images is a torch\.uint8 tensor; expected a floating-point tensor"):
        shift((255 * x).byte(), "noise", 0.5)
    with pytest.raises(ValueError, match=r"images has shape \(3, 28, 28\); expected \(N, C, H, W\)"):
        shift(x[0], "noise", 0.5)
    for wrong in (x + 0.5, x - 0.5, torch.where(x > 0.9, torch.nan, x)):
        with pytest.raises(ValueError, match=r"images has values from .*; expected 0 to 1\. Shift before normalising"):
            shift(wrong, "noise", 0)
    with pytest.raises(ValueError, match="first is -1"):
        shift(x, "noise", 0.5, first=-1)


def test_textures_that_are_refused():
    x = pictures(2)
    for textures, reason in (
        (torch.rand(2, 3, 27, 30), "textures are 27×30; expected at least 28×28"),
        (torch.rand(2, 2, 30, 30), "textures have 2 channels; expected 3, as the images"),
        (torch.rand(3, 30, 30), r"textures has shape \(3, 30, 30\)"),
        (2 + torch.rand(2, 3, 30, 30), "textures has values from 2"),
        (torch.rand(0, 3, 30, 30), "expected at least one texture"),
    ):
        with pytest.raises(ValueError, match=reason):
            shift(x, "texture", 0.5, textures=textures)
    with pytest.raises(ValueError, match="kind is 'blur', which takes no textures"):
        shift(x, "blur", 0.5, textures=torch.rand(2, 3, 30, 30))
    with pytest.raises(ValueError, match="kind is 'fog'"):
        ShiftedDataset(read("digits"), "fog", 0.5)
    with pytest.raises(ValueError, match="severity is 2"):
        ShiftedDataset(read("digits"), "blur", 2)


# --- data sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHIFTS)
def test_a_shifted_set_is_the_set_shifted(kind):
    dataset = read("digits")
    whole = dataset.load()
    shifted = ShiftedDataset(dataset, kind, 0.4, seed=2)
    assert len(shifted) == 1797
    assert torch.equal(shifted.labels, whole.labels)
    assert shifted.class_names == whole.class_names
    expected = shift(whole.images, kind, 0.4, seed=2)
    for i in (0, 7, 1796, -1):
        image, label = shifted[i]
        assert torch.equal(image, expected[i])
        assert label == whole.labels[i]
    batch, labels = next(iter(DataLoader(Subset(shifted, range(100, 140)), 40)))
    assert torch.equal(batch, expected[100:140])
    assert torch.equal(labels, whole.labels[100:140])


def test_workers_and_pickles():
    textures = torch.rand(5, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    shifted = ShiftedDataset(read("digits"), "texture", 0.4, 2, textures=textures)
    expected = shift(read("digits").load().images, "texture", 0.4, seed=2, textures=textures)
    loader = DataLoader(Subset(shifted, range(60)), 16, num_workers=2)
    assert torch.equal(torch.cat([images for images, _ in loader]), expected[:60])
    copy = pickle.loads(pickle.dumps(shifted))
    assert torch.equal(copy[9][0], expected[9])
    assert repr(copy) == ("ShiftedDataset(ImageDataset(N=1797, K=10, source=digits), 'texture', 0.4, seed=2)")


def test_other_sets_can_be_shifted():
    x, extra = pictures(4), torch.arange(4)
    image, first, second = ShiftedDataset(TensorDataset(x, extra, extra), "contrast", 0.4)[2]
    assert torch.equal(image, shift(x, "contrast", 0.4)[2])
    assert first == second == 2
    alone = ShiftedDataset(Plain(x), "noise", 0.4, transform=lambda image: image - 1)
    assert alone.labels is None
    assert alone.class_names is None
    assert torch.equal(alone[3], shift(x, "noise", 0.4)[3] - 1)
    assert len(list(alone)) == 4
    with pytest.raises(IndexError, match="no image 4 among 4"):
        alone[4]
    with pytest.raises(ValueError, match="Shift before normalising"):
        ShiftedDataset(Plain(2 * x), "noise", 0.4)[0]


class Plain(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]
