"""Files that others write to: modes are kept, and what was opened is what is read, or an error."""

import io as memory
import os
import pickle
import shutil
import stat

import pytest
import torch
from torch.utils.data import DataLoader

import penult
from penult import io
from penult.activations import Activations
from penult.data import parquet


def activations(seed, rows=6):
    h = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return Activations(h, h[:, :3], torch.arange(rows) % 3)


# --- modes --------------------------------------------------------------------------------------------------


WRITERS = {
    "pair": lambda path: penult.GenerativePair(penult.Head(torch.eye(3))).save(path),
    "tensors": lambda path: io.write(path, {"x": torch.ones(2)}, "note", {}),
    "bytes": lambda path: io.write_bytes(path, b"<p>"),
}


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o664, 0o700])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_keeps_its_mode(write, mode, tmp_path, umask):
    path = tmp_path / "a.safetensors"
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(mode)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_private_file_is_private_while_it_is_written(tmp_path, umask):
    path = tmp_path / "a"
    path.touch(mode=0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    for target in (path, link):
        with io.aside(target) as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600


# --- activations --------------------------------------------------------------------------------------------


CHANGES = {
    "written again": lambda folder: activations(2).save(folder, overwrite=True),
    "with other rows": lambda folder: activations(2, rows=9).save(folder, overwrite=True),
    "copied over": lambda folder: shutil.copytree(activations_in(folder.parent / "b"), folder, dirs_exist_ok=True),
}


def activations_in(folder):
    activations(2).save(folder)
    return folder


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(
    "derived",
    [
        lambda acts: acts,
        lambda acts: acts[2:],
        lambda acts: acts.split(0.5, 0.5)[1],
        lambda acts: Activations.concatenate([activations(3), acts]),
        lambda acts: pickle.loads(pickle.dumps(acts)),
    ],
)
def test_a_set_does_not_give_the_rows_of_another(change, derived, tmp_path):
    part = derived(activations(1).save(tmp_path / "a"))
    change(tmp_path / "a")
    for read in (lambda: part.activations, lambda: part.predicted, lambda: list(part.batches(2))):
        with pytest.raises(io.FileFormatError, match=r"was written or changed after it was opened.*Open it again"):
            read()
    now = Activations.open(tmp_path / "a")
    assert torch.equal(now.activations, activations(2, rows=len(now)).activations)


def test_rows_that_were_read_stay(tmp_path):
    one = activations(1).save(tmp_path / "a")
    rows = one.activations
    activations(2).save(tmp_path / "a", overwrite=True)
    assert torch.equal(rows, activations(1).activations)


# --- parquet ------------------------------------------------------------------------------------------------


def write_parquet(path, values):
    """Write grey images of these values, with the values as labels."""
    pyarrow = pytest.importorskip("pyarrow")
    from PIL import Image
    from pyarrow import parquet as files

    images = []
    for value in values:
        Image.new("L", (2, 2), 20 * value).save(png := memory.BytesIO(), "png")
        images.append({"bytes": png.getvalue(), "path": None})
    files.write_table(pyarrow.table({"image": images, "label": list(values)}), path, row_group_size=2)


@pytest.mark.parametrize("values", [range(5, -1, -1), range(3), [0] * 6])
@pytest.mark.parametrize("derived", [lambda data: data, lambda data: pickle.loads(pickle.dumps(data))])
def test_images_do_not_get_labels_of_others(values, derived, tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, range(6))
    dataset = derived(parquet(path))
    # A row group that is in memory stays right.
    assert dataset[0][1] == 0
    write_parquet(path, values)
    with pytest.raises(ValueError, match="was written or changed after it was opened"):
        next(iter(DataLoader(dataset, batch_size=6)))
    for image, label in parquet(path):
        assert round(float(image.mean()) * 255 / 20) == label


# --- pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda head, h: None,
        lambda head, h: penult.Gaussian.fit(head, h),
        lambda head, h: penult.Marginal.fit(head, h, kind="bank"),
    ],
    ids=["without data", "gaussian", "bank"],
)
def test_a_pair_does_not_change_with_its_file(make, tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    saved = []
    for seed, path in zip((1, 2), paths, strict=True):
        g = torch.Generator().manual_seed(seed)
        head, h = penult.Head(torch.randn(3, 4, generator=g)), torch.randn(50, 4, generator=g)
        saved.append(penult.GenerativePair(head, make(head, h)))
        saved[-1].save(path)
    pair = penult.load(paths[0])
    shutil.copyfile(paths[1], paths[0])
    state, other = pair.state_dict(), penult.load(paths[0]).state_dict()
    for name, tensor in saved[0].state_dict().items():
        assert torch.equal(state[name], tensor)
    assert any(not torch.equal(state[name], other[name]) for name in state)
