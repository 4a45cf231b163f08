"""Hostile images, tables and names: they come out right, or are refused by the name of their file."""

import html.parser
import io
import json
import os
import re
import struct
import zipfile
import zlib
from types import SimpleNamespace

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fuzz.strategies import TEXTS, cases, damaged, edited, lawful, text_of
from penult.data import read
from penult.report import Page, markup
from penult.report.thumbnails import Thumbnail, gallery

MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "RGBX")


def encoded(mode="RGB", kind="png", size=(5, 4), **options):
    image = Image.radial_gradient("L").resize(size).convert("L")
    image = image.convert(mode) if mode not in ("PA", "I;16", "LAB", "RGBX") else Image.new(mode, size)
    image.save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def png(width, height, depth=8, colour=0, data=b""):
    """A PNG that claims any size."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def npy(shape, descr="|u1", data=b"", version=b"\x01\x00"):
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


def archive(path, packing=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, "w", packing) as file:
        for name, body in members.items():
            file.writestr(name.replace("__", "."), body)
    return path


PIXELS = 2**18  # where Pillow warns, for these tests; it refuses twice as many


@pytest.fixture(autouse=True)
def _few_pixels(monkeypatch):
    """A few bytes may else become an image of 179 million pixels, within Pillow's own limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Right images and files, and a folder for wrong ones."""
    folder = tmp_path_factory.mktemp("fuzz")
    images = [encoded(), encoded("L"), encoded("P"), encoded("RGBA"), encoded("I;16"), encoded("CMYK", "tiff")]
    images += [encoded("RGB", kind) for kind in ("jpeg", "gif", "bmp", "ppm", "tiff", "webp", "tga", "ico", "pcx")]
    exif = Image.Exif()
    exif[0x0112] = 6
    images += [encoded("RGB", "jpeg", exif=exif.tobytes()), encoded("RGB", "tiff", compression="tiff_lzw")]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    cells = [{"bytes": each, "path": None} for each in images[:2]]
    table = pa.table({"image": cells, "label": [0, 1]})
    layout = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    pq.write_table(table.cast(layout), folder / "right.parquet")
    numpy.savez_compressed(folder / "right.npz", x=numpy.full((2, 4, 5, 3), 7, "uint8"), y=numpy.arange(2))
    return SimpleNamespace(
        folder=folder,
        images=images,
        features=features,
        layout=layout,
        parquet=(folder / "right.parquet").read_bytes(),
        npz=(folder / "right.npz").read_bytes(),
    )


def look(path, **options):
    """All items of a set, as floats (C, H, W) in [0, 1]."""
    dataset = read(path, **options)
    items = [dataset[i] for i in range(len(dataset))]
    for item in items:
        image = item if dataset.labels is None else item[0]
        assert (image.dtype, image.ndim) == (torch.float32, 3)
        assert 0 < image[0].numel() <= 2 * PIXELS
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
    return dataset


@cases(300)
@given(st.data())
def test_image_bytes(whole, data):
    path = whole.folder / "one" / "image.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data.draw(st.sampled_from(whole.images).flatmap(damaged) | st.binary(max_size=60)))
    with lawful(path):
        look(
            path.parent, mode=data.draw(st.sampled_from([None, "L", "RGB"])), size=data.draw(st.sampled_from([None, 3]))
        )


@cases(150)
@given(st.data())
def test_parquet(whole, data):
    path = whole.folder / "some.parquet"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(whole.parquet)))
    else:
        text = st.sampled_from(["a.png", "../one/image.png", "/etc/hostname", "\0", "x" * 300, "b/../../c", ".", ""])
        cell = st.none() | st.fixed_dictionaries(
            {"bytes": st.none() | st.sampled_from(whole.images) | st.binary(max_size=9), "path": st.none() | text}
        )
        cells = pa.array(data.draw(st.lists(cell, max_size=3)), whole.layout.field("image").type)
        kinds = st.sampled_from([pa.int64(), pa.uint64(), pa.int8(), pa.float32(), pa.string(), pa.bool_(), pa.null()])
        labels = pa.nulls(len(cells), data.draw(kinds))
        if data.draw(st.booleans()):
            labels = pa.array(
                data.draw(
                    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 2), min_size=len(cells), max_size=len(cells))
                ),
                pa.uint64(),
            )
        table = (
            pa.table({"image": cells, data.draw(st.sampled_from(["label", "a.b", "image"])): labels})
            if data.draw(st.booleans())
            else pa.table({"image": cells, "label": labels})
        )
        told = text_of({"info": {"features": data.draw(edited(whole.features, edits=3))}})
        pq.write_table(table.replace_schema_metadata({"huggingface": told.encode("utf-8", "surrogatepass")}), path)
    with lawful(path):
        look(path)


@cases(250)
@given(st.data())
def test_npz(whole, data):
    path = whole.folder / "some.npz"
    kind = data.draw(st.sampled_from(["bytes", "member", "header"]))
    if kind == "bytes":
        path.write_bytes(data.draw(damaged(whole.npz)))
    elif kind == "member":
        archive(path, x__npy=data.draw(damaged(npy((2, 4, 5, 3), data=bytes(120)))))
    else:
        side = st.sampled_from([-1, 0, 1, 2, 3, 5, 2**31, 2**40, 2**63, 10**30])
        shape = tuple(data.draw(st.lists(side, max_size=5)))
        descr = data.draw(
            st.sampled_from(["|u1", "<f4", "<f8", ">f2", "|b1", "|O", "<M8[s]", "<U3", "|V0", "<i8", "<c8", "x"])
        )
        body = data.draw(st.sampled_from([b"", bytes(60), bytes(120), b"\xff" * 240]))
        packing = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
        version = data.draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]))
        archive(path, packing, x__npy=npy(shape, descr, body, version), y__npy=npy((2,), descr, body))
    with lawful(path):
        look(path, channels=data.draw(st.sampled_from([None, "first"])), size=data.draw(st.sampled_from([None, 3])))


class Reader(html.parser.HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(sorted(name for name, _ in attrs))))

    def handle_data(self, data):
        self.texts.append(data)


def page_of(name):
    page = Page(name, subtitle=name, lead=name, footer=name)
    section = page.section(name, name)
    section.facts({name: name})
    section.table([name, "n"], [[name, name], [name, 1]], caption=name)
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><rect width="9" height="9"/></svg>'
    section.figure(svg, caption=name, alt=name + "x")
    section.code(name, label=name)
    gallery(section, [Thumbnail(torch.zeros(1, 2, 2), [name, name], name)])
    return page.html()


HOSTILE = (
    st.sampled_from(TEXTS) | st.text(max_size=40) | st.text("<>&\"'`*/=!- \n{%}#ab;\x00\x1b\u202e\ud800", max_size=40)
)


@cases(200)
@given(HOSTILE)
def test_names_on_a_page(name):
    document = page_of(name)
    assert document.encode().decode() == document
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", document)
    made = {"code", "strong", "em"}  # which the little markup of a text may make
    tags = [each for each in Reader(document).tags if each[0] not in made or each[1]]
    plain = [each for each in Reader(page_of("plain" if name.strip() else name)).tags if each[0] not in made or each[1]]
    assert set(tags) <= set(plain) | {("p", ())}


def test_very_long_names_take_no_time():
    for name in ("**a " * 20_000, "*a " * 20_000, "`" * 60_000, "<!--" * 20_000, "\n " * 30_000):
        assert len(str(markup.inline(name))) >= len(name)
        assert page_of(name[:9999]).encode()


def test_stars_still_mark():
    assert str(markup.inline("**a** and ** b, **c d**, **x*y** 2**3")) == (
        "<strong>a</strong> and ** b, <strong>c d</strong>, <strong>x*y</strong> 2**3"
    )


def test_a_name_in_a_figure_holds_no_control_characters():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text>a\x1bb\ud800</text></svg>'
    page = Page("x")
    page.section("y").figure(svg, "caption", "alt")
    assert "a\ufffdb\ufffd" in page.html()


def test_ghostscript_is_never_run(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    run = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **more: run.append(args))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image: its format is unknown; expected one of"):
        read(tmp_path)[0]
    assert not run


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(60_000, 60_000), "exceeds limit"),
        (png(2**31 - 1, 2**31 - 1), "exceeds limit|format is unknown"),
        (png(0, 0), "format is unknown"),
        (encoded()[:40], "truncated|format is unknown"),
        (b"", "it is empty"),
    ],
)
def test_images_that_are_none(tmp_path, data, words):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=f"a.png cannot be read as an image: .*({words})"):
        read(tmp_path)[0]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(tmp_path, mode):
    kind = "tiff" if mode in ("PA", "CMYK", "YCbCr", "LAB", "F", "I", "RGBX") else "png"
    if mode in ("HSV", "PA"):
        pytest.skip("no format stores it")
    (tmp_path / "a.png").write_bytes(encoded(mode, kind))
    if mode == "F":
        with pytest.raises(ValueError, match=r"a.png .*its pixels are floating"):
            read(tmp_path)[0]
    else:
        assert look(tmp_path)[0].shape == (1 if mode in ("1", "L", "LA", "I", "I;16") else 3, 4, 5)


def test_links_in_circles(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(encoded())
        for number in range(4):
            (tmp_path / name / f"up{number}").symlink_to(tmp_path)
            (tmp_path / name / f"self{number}").symlink_to(tmp_path / name)
    dataset = read(tmp_path)
    assert dataset.class_names == ("a", "b")
    assert len(dataset) == 4  # each class sees itself, and the other through its links


def test_odd_file_names(tmp_path):
    for name in ("a b.png", "-x.png", "$(touch y).png", "\u202egnp.png", "\n.png", "κ.PNG", os.fsdecode(b"\xff.png")):
        (tmp_path / name).write_bytes(encoded())
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.warns(UserWarning, match=r"1 file \(pipe.png\) .*left out"):
        assert len(look(tmp_path)) == 7


def table(path, cell, labels=(0,), **features):
    layout = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = cell if isinstance(cell, pa.Array) else pa.array([cell] * len(labels), layout)
    made = pa.table({"image": cells, "label": labels if isinstance(labels, pa.Array) else pa.array(labels)})
    told = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", **features}}}})
    pq.write_table(made.replace_schema_metadata({"huggingface": told}), path)
    return path


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "{root}/secret.png", "../data2/x.png"])
def test_a_row_names_no_file_outside_its_folder(tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded())
    path = table(folder / "a.parquet", {"bytes": None, "path": name.format(root=tmp_path)})
    with pytest.raises(
        ValueError, match=r"row 0 of .*a.parquet .*leads out of .*Write the images into the parquet file"
    ):
        read(path)[0]


@pytest.mark.parametrize("name", ["in/a.png", "./in/../in/a.png", "{root}/in/a.png"])
def test_a_row_names_a_file_within_its_folder(tmp_path, name, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded())
    table(tmp_path / "a.parquet", {"bytes": None, "path": name.format(root=tmp_path)})
    monkeypatch.chdir(tmp_path)
    assert read("a.parquet")[0][0].shape == (3, 4, 5)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", ".", ""])
def test_a_row_names_what_is_no_file(tmp_path, name):
    path = table(tmp_path / "a.parquet", {"bytes": None, "path": name})
    with pytest.raises(FileNotFoundError, match=r"row 0 of .*a.parquet has no bytes but the path"):
        read(path)[0]


def test_a_path_that_is_no_text(tmp_path):
    spans = pa.py_buffer(struct.pack("<ii", 0, 2))
    text = pa.Array.from_buffers(pa.string(), 1, [None, spans, pa.py_buffer(b"\xff\xfe")])
    cells = pa.StructArray.from_arrays([pa.array([None], pa.binary()), text], ["bytes", "path"])
    path = table(tmp_path / "a.parquet", cells)
    with pytest.raises(ValueError, match=r"row 0 of .*a.parquet cannot be read: .*utf-8"):
        read(path)[0]


@pytest.mark.parametrize("names", [5, "ab", {"a": 0}, True])
def test_class_names_of_a_wrong_type(tmp_path, names):
    path = table(tmp_path / "a.parquet", {"bytes": encoded(), "path": None}, names=names)
    with pytest.raises(
        ValueError, match=r"class names in the metadata of .*a.parquet cannot be used: class_names is .*expected"
    ):
        read(path)


def test_labels_beyond_64_bits(tmp_path):
    path = table(tmp_path / "a.parquet", {"bytes": encoded(), "path": None}, pa.array([2**64 - 1], pa.uint64()))
    with pytest.raises(ValueError, match=r"the column 'label' of .*a.parquet cannot be read: .*18446744073709551615"):
        read(path)


def test_metadata_nested_too_deep(tmp_path):
    made = pa.table({"image": [encoded()], "label": [0]}).replace_schema_metadata({"huggingface": "[" * 100_000})
    pq.write_table(made, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").class_names is None


def test_damaged_labels_name_their_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image": [encoded()] * 99, "label": list(range(99))}),
        path,
        compression="snappy",
        use_dictionary=False,
    )
    found = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    at = found.data_page_offset + 30
    data[at : at + 20] = b"\xff" * 20
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"the column 'label' of .*a.parquet cannot be read"):
        read(path)


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("sprung",))


def test_arrays_of_objects_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numpy.savez("a.npz", x=numpy.array([[[Trap()]]], dtype=object))
    numpy.savez("b.npz", x=numpy.zeros((1, 2, 2), "uint8"), y=numpy.array([Trap()], dtype=object))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read .*allow_pickle=False"):
            read(name)
    assert not os.path.exists("sprung")


@pytest.mark.parametrize("shape", [(10**12,), (4 * 10**9, 1, 1), (2**62, 2**62, 2), (-1, 2, 2), (3, 2, 2)])
def test_an_archive_that_claims_more_than_it_holds(tmp_path, shape):
    path = archive(tmp_path / "a.npz", x__npy=npy(shape, data=bytes(8)))
    with pytest.raises(ValueError, match=r"a.npz cannot be read .*header of x.npy says uint8 of shape"):
        read(path)


def test_an_archive_whose_directory_lies_as_well(tmp_path):
    member = npy((10**12, 1, 1))
    path = archive(tmp_path / "a.npz", zipfile.ZIP_STORED, x__npy=member)
    data = path.read_bytes()
    # 4 GB is the most that a directory without the zip64 extension can claim
    member = npy((2**32 - 1 - len(npy((2**32 - 1, 1, 1))), 1, 1))
    path = archive(tmp_path / "a.npz", zipfile.ZIP_STORED, x__npy=member)
    data = path.read_bytes()
    at = data.rindex(b"PK\x01\x02") + 24
    path.write_bytes(data[:at] + struct.pack("<I", 2**32 - 1) + data[at + 4 :])
    with pytest.raises(ValueError, match=r"a.npz cannot be read"):
        read(path)


def test_packings_that_have_no_bound(tmp_path):
    path = archive(tmp_path / "a.npz", zipfile.ZIP_BZIP2, x__npy=npy((1, 2, 4), data=bytes(8)))
    with pytest.raises(ValueError, match=r"a.npz .*compression of .* is unknown to NumPy"):
        read(path)


def test_members_that_are_no_arrays(tmp_path):
    path = archive(tmp_path / "a.npz", x=b"hello, I am text")
    with pytest.raises(ValueError, match=r"a.npz cannot be read as an .npz file of plain arrays"):
        read(path)
    numpy.save(tmp_path / "b.npy", numpy.zeros((2, 2, 2), "uint8"))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"b.npz is a NumPy array .*expected a zip archive"):
        read(tmp_path / "b.npz")


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 3, 0, 0), (2, 0, 0, 1)])
def test_arrays_without_pixels(tmp_path, shape):
    numpy.savez(tmp_path / "a.npz", x=numpy.zeros(shape, "uint8"))
    with pytest.raises(ValueError, match=r"a.npz has shape .*at least one pixel"):
        read(tmp_path / "a.npz", size=4)


def test_numbers_that_no_float32_holds(tmp_path):
    numpy.savez(tmp_path / "a.npz", x=numpy.full((2, 2, 2), 1e300))
    with pytest.raises(ValueError, match=r"a.npz has values from .*expected 0 to 1"):
        read(tmp_path / "a.npz")


def test_a_row_group_that_is_not_as_long_as_it_was(tmp_path):
    path = table(tmp_path / "a.parquet", {"bytes": encoded(), "path": None}, (0, 1, 0))
    dataset = read(path)
    table(path, {"bytes": encoded(), "path": None}, (0,))
    with pytest.raises(ValueError, match=r"a.parquet was written or changed after it was opened"):
        dataset[2]


@pytest.mark.parametrize(("labels", "row"), [((0,), 2), ((0, 1), 2), ((0,), 1)])
def test_a_row_that_is_missing_in_its_row_group(tmp_path, monkeypatch, labels, row):
    path = table(tmp_path / "a.parquet", {"bytes": encoded(), "path": None}, (0, 1, 0))
    dataset = read(path)
    table(path, {"bytes": encoded(), "path": None}, labels)
    # As if the file were written between the look at its identity and the read.
    monkeypatch.setattr("penult.data._parquet._check_unchanged", lambda *_: None)
    with pytest.raises(ValueError, match=rf"row {row} of .*a.parquet is missing, although the metadata .* count it"):
        dataset[row]
    assert dataset[0]
