"""What becomes of images of every kind."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from penult.data import folder, npz
from penult.data._decode import decode

BARS = np.add.outer(np.arange(5) * 7, np.arange(8) * 30).astype("uint8")  # (5, 8), 0 to 238
COLOUR = np.stack([BARS, 255 - BARS, BARS // 2], axis=-1)


def tensor(array):
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.tensor(array.astype("float32")) / 255


def read(data, mode=None, size=None):
    image = decode(data, mode, size)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert image.min() >= 0
    assert image.max() <= 1
    return image


def test_grey_and_colour_stay_as_they_are(make):
    assert torch.equal(read(make.encode(Image.fromarray(BARS))), tensor(BARS))
    assert torch.equal(read(make.encode(Image.fromarray(COLOUR))), tensor(COLOUR))


def test_modes(make):
    grey, colour = make.encode(Image.fromarray(BARS)), make.encode(Image.fromarray(COLOUR))
    assert torch.equal(read(grey, "RGB"), tensor(BARS).expand(3, -1, -1))
    assert torch.equal(read(grey, "L"), tensor(BARS))
    luma = (tensor(COLOUR) * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    assert (read(colour, "L") - luma).abs().max() < 0.6 / 255


def test_what_is_transparent_lies_on_white(make):
    alpha = np.full_like(BARS, 255)
    alpha[:, :4] = 0
    alpha[:, 4] = 51
    expected = tensor(COLOUR)
    expected[:, :, :4] = 1
    expected[:, :, 4] = 0.2 * expected[:, :, 4] + 0.8
    image = read(make.encode(Image.fromarray(np.dstack([COLOUR, alpha]))))
    assert (image - expected).abs().max() < 1.1 / 255
    image = read(make.encode(Image.merge("LA", [Image.fromarray(BARS), Image.fromarray(alpha)])))
    assert image.shape == (1, 5, 8)
    assert (image[:, :, :4] == 1).all()
    assert torch.equal(image[:, :, 5:], tensor(BARS)[:, :, 5:])
    grey = read(make.encode(Image.fromarray(BARS), transparency=0))  # one value of grey stands for nothing
    assert grey.shape == (1, 5, 8)
    assert grey[0, 0, 0] == 1
    assert torch.equal(grey[:, 1:], tensor(BARS)[:, 1:])


def test_palettes(make):
    palette = Image.fromarray(COLOUR).quantize(255)
    assert palette.mode == "P"
    assert torch.equal(read(make.encode(palette)), tensor(np.asarray(palette.convert("RGB"))))
    assert read(make.encode(palette), "L").shape == (1, 5, 8)
    clear = read(make.encode(palette, transparency=palette.getpixel((0, 0))))
    assert clear.shape == (3, 5, 8)
    assert (clear[:, 0, 0] == 1).all()
    assert read(make.encode(palette, "gif")).shape == (3, 5, 8)


def test_bilevel(make):
    image = read(make.encode(Image.fromarray(BARS).convert("1")))
    assert image.shape == (1, 5, 8)
    assert set(image.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits(make, kind):
    deep = (np.arange(40).reshape(5, 8) * 1680).astype("uint16")
    data = make.encode(Image.fromarray(deep), kind)
    expected = torch.tensor(deep.astype("float32")).unsqueeze(0) / 65535
    assert torch.equal(read(data), expected)
    assert torch.equal(read(data, "RGB"), expected.expand(3, -1, -1))
    assert read(data, size=(2, 3)).shape == (1, 2, 3)


def test_ranges_that_are_not_known(make):
    with pytest.raises(ValueError, match="floating-point numbers of an unknown range"):
        decode(make.encode(Image.fromarray(BARS.astype("float32")), "tiff"), None, None)
    with pytest.raises(ValueError, match="run from -1 to 70000; expected 16 bits"):
        decode(make.encode(Image.fromarray(np.array([[-1, 70000]], "int32")), "tiff"), None, None)


def test_cmyk(make):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red in print
    for kind in ("jpeg", "tiff"):
        pixels = read(make.encode(image, kind))
        assert pixels.shape == (3, 8, 8)
        assert pixels[0].min() > 0.9
        assert pixels[1:].max() < 0.1
    assert read(make.encode(image, "tiff"), "L").shape == (1, 8, 8)


def test_orientation(make):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    turned = read(make.encode(Image.fromarray(COLOUR), exif=exif))
    assert torch.equal(turned, torch.rot90(tensor(COLOUR), -1, (1, 2)))
    assert read(make.encode(Image.fromarray(COLOUR), exif=exif), size=(2, 9)).shape == (3, 2, 9)


@pytest.mark.parametrize("size", [(5, 8), (3, 4), (11, 2), (20, 30)])
@pytest.mark.parametrize("array", [BARS, COLOUR], ids=["grey", "colour"])
def test_sizes_alike_for_files_and_arrays(make, tmp_path, array, size):
    resized = Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR)
    from_file = read(make.encode(Image.fromarray(array)), size=size)
    assert torch.equal(from_file, tensor(np.asarray(resized)))
    np.savez(tmp_path / "a.npz", images=array[None])
    from_array = npz(tmp_path / "a.npz", size=size)[0]
    assert from_array.shape == from_file.shape
    assert (from_array - from_file).abs().max() < 1.1 / 255  # Pillow rounds to 8 bits, twice


def test_bytes_that_are_no_image():
    with pytest.raises(ValueError, match="its format is unknown"):
        decode(b"words", None, None)


def test_pillow_is_asked_for(tmp_path, make, monkeypatch):
    make.grey(1).save(tmp_path / "a.png")
    dataset = folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'Pillow: pip install "penult\[data\]"') as caught:
        dataset[0]
    assert caught.value.name == "PIL"
