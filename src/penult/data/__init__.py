"""Readers of image data sets, and domain shifts.

`read` chooses the reader by the kind of its argument. Images are decoded at access:

    >>> from torch.utils.data import DataLoader
    >>> from penult.data import ShiftedDataset, read
    >>> dataset = read("digits", mode="RGB", size=32)
    >>> dataset
    ImageDataset(N=1797, K=10, source=digits)
    >>> images, labels = next(iter(DataLoader(ShiftedDataset(dataset, "texture", 0.5), batch_size=64)))
    >>> images.shape
    torch.Size([64, 3, 32, 32])

The readers need the extra ``data``; shifts need only torch.
"""

import sys

from penult.data import _dataset, _shifts
from penult.data._dataset import ImageDataset, Images, RowNames
from penult.data._decode import Normalization
from penult.data._folder import folder
from penult.data._npz import holds_activations, npz, read_activations
from penult.data._parquet import parquet
from penult.data._read import digits, read
from penult.data._shifts import SHIFTS, ShiftedDataset, shift

__all__ = [
    "SHIFTS",
    "ImageDataset",
    "Images",
    "ShiftedDataset",
    "digits",
    "folder",
    "npz",
    "parquet",
    "read",
    "shift",
]

# Lent to other rooms of the package; not public.
_Normalization = Normalization
_RowNames = RowNames
_holds_activations, _read_activations = holds_activations, read_activations

# Pickles that earlier versions wrote name these modules.
sys.modules["penult.data._images"] = _dataset
sys.modules["penult.data._shifted"] = _shifts
