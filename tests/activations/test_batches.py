"""Loaders and batches as people have them: each is read as it is meant, or refused in words."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from penult.activations import Activations, Tap, extract
from penult.head import find_head
from zoo import seeded, shake

N, K = 16, 20
X = seeded(N, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, K)

    def forward(self, x, scale=None, *, shift=0):
        h = self.body(x).tanh()
        return self.fc((h if scale is None else h * scale) + shift)


class Keywords(Net):
    def forward(self, **inputs):
        return super().forward(inputs["x"], inputs.get("scale"))


class Two(Net):
    def forward(self, left, right):
        return super().forward(left + right)


class Wrapped(nn.Module):
    """A forward by position alone."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, *args):
        return self.net(*args)


def tap_of(net=Net):
    model = shake(net())
    return Tap(model, find_head(model, **{"x": X[:5]}) if net is Keywords else find_head(model, X[:5]))


def sequential():
    model = shake(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, K)))
    return Tap(model, find_head(model, X[:5]))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


LABELS = torch.arange(N) // 2
ROW_NUMBERS = torch.arange(N)
SHUFFLED = torch.randperm(N, generator=torch.Generator().manual_seed(1))


# --- something else in place of a loader --------------------------------------------------------------------


class Samples(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], int(LABELS[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


class Table:
    """Rows like those of a data set of Hugging Face."""

    def __iter__(self):
        return ({"pixel_values": row, "label": label} for row, label in zip(X, LABELS, strict=True))


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (Samples(), r"loader is a Samples, a data set.*DataLoader\(dataset, batch_size=64\)"),
        (torch.utils.data.Subset(Samples(), [1, 2]), "loader is a Subset, a data set.*DataLoader"),
        (TensorDataset(X), "loader is a TensorDataset, a data set.*DataLoader"),
        (X, r"loader is a torch.float32 tensor; expected an iterable of batches. Pass \[batch\]"),
        (X.numpy(), r"loader is a ndarray; .* Pass \[batch\]"),
        ((X, LABELS), r"loader is one batch; .* Pass \[batch\]"),
        ([X, LABELS], r"loader is one batch"),
        ({"x": X, "y": LABELS}, r"loader is one batch"),
        ("data/*.parquet", "loader is a str; expected an iterable of batches"),
        (Activations(X, X), "loader is a Activations"),
        (7, "loader is a int; expected an iterable of batches"),
        ([(X[0], 3)], "a single number as its label, as one sample of a data set has"),
        (Table(), "a single number as its label"),
    ],
)
def test_what_is_no_loader(loader, words):
    with pytest.raises(TypeError, match=words):
        extract(tap_of(), loader)


@pytest.mark.parametrize("loader", [Stream(), list(X), DataLoader(TensorDataset(X), batch_size=None)])
def test_samples_without_labels(loader):
    with pytest.raises(ValueError, match=r"have shape \(20,\); expected \(batch, class\).*DataLoader"):
        extract(tap_of(), loader)


def test_a_compiled_tap_is_the_tap():
    tap = tap_of()
    assert torch.equal(extract(torch.compile(tap, backend="eager"), [X]).logits, extract(tap, [X]).logits)
    assert torch.equal(extract(nn.DataParallel(tap), [X]).logits, extract(tap, [X]).logits)


# --- mappings -----------------------------------------------------------------------------------------------

MORE = {"index": ROW_NUMBERS, "name": ["a"] * N, "weight": torch.ones(N)}


@pytest.mark.parametrize("tap", [tap_of, sequential, lambda: tap_of(Wrapped)])
@pytest.mark.parametrize("key", ["data", "image", "pixel_values", "input", "inputs", "x", "img"])
@pytest.mark.parametrize("label", ["label", "labels", "target", "targets", "y"])
def test_the_input_among_other_fields(tap, key, label):
    tap = tap()
    acts = extract(tap, [{"index": ROW_NUMBERS, label: LABELS, key: X, **MORE}])
    assert torch.equal(acts.logits, tap(X)[1].detach())
    assert torch.equal(acts.labels, LABELS)


def test_fields_that_the_forward_names():
    tap, scale = tap_of(), torch.tensor(2.0)
    expected = tap(X, scale, shift=torch.ones(()))[1].detach()
    for name in ("x", "image"):
        batch = {name: X, "scale": scale, "shift": torch.ones(()), "label": LABELS, **MORE}
        assert torch.equal(extract(tap, [batch]).logits, expected)


def test_a_forward_of_any_keywords_gets_all():
    tap = tap_of(Keywords)
    batch = {"x": X, "scale": torch.tensor(2.0), "y": LABELS, **MORE}
    assert torch.equal(extract(tap, [batch]).logits, tap(x=X, scale=torch.tensor(2.0))[1].detach())


def two_inputs():
    model = shake(Two())
    return Tap(model, find_head(model, X[:5], X[:5]))


@pytest.mark.parametrize(
    ("tap", "batch", "words"),
    [
        (sequential, {"rgb": X, "index": ROW_NUMBERS, "label": LABELS}, r"'rgb', 'index', 'label'.*takes \['input'\]"),
        (sequential, {"image": X, "data": X, "label": LABELS}, r"\(batch\[INPUT\], batch\['label'\]\) for batch"),
        (two_inputs, {"image": X, "index": ROW_NUMBERS}, r"takes \['left', 'right'\].*\(batch\[INPUT\] for batch"),
        (two_inputs, {"left": X, "index": ROW_NUMBERS, "y": LABELS}, "expected one input, or inputs under the names"),
        (tap_of, {"x": X, "label": LABELS, "target": LABELS}, "labels under 'label' and 'target'; expected one"),
        (tap_of, {"name": ["a"], "label": LABELS}, "no input tensor"),
    ],
)
def test_fields_that_nobody_knows(tap, batch, words):
    with pytest.raises(TypeError, match=words):
        extract(tap(), [batch])


def test_labels_under_an_unknown_key_are_told():
    batch = {"image": X, "fine_label": LABELS, "coarse_label": LABELS // 2}
    with pytest.warns(UserWarning, match="'fine_label', 'coarse_label' of the batches are not passed.*no labels"):
        assert extract(sequential(), [batch, batch]).labels is None


def test_batches_of_numpy():
    tap = tap_of()
    expected = tap(X)[1].detach()
    for batch in (X.numpy(), (X.numpy(), LABELS.numpy()), {"image": X.numpy(), "label": LABELS.numpy(), **MORE}):
        acts = extract(tap, [batch])
        assert torch.equal(acts.logits, expected)
        assert acts.labels is None or torch.equal(acts.labels, LABELS)


# --- labels and row numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row_numbers", [ROW_NUMBERS, SHUFFLED, ROW_NUMBERS + 1000, SHUFFLED.int()])
def test_row_numbers_are_not_taken_for_labels(row_numbers, tmp_path):
    tap = tap_of()
    assert torch.equal(extract(tap, [(X, LABELS, row_numbers)]).labels, LABELS)
    loader = [(X[part], row_numbers[part], LABELS[part]) for part in (slice(10), slice(10, 16))]
    for out in (None, tmp_path / "a", tmp_path / "a"):
        with pytest.warns(UserWarning, match="the labels are taken from entry 2 of the batches"):
            labels = extract(tap, loader, out).labels
        assert torch.equal(labels, LABELS)


def test_predictions_tell_labels_that_do_not_repeat():
    model = nn.Linear(4, 4)
    nn.init.eye_(model.weight)
    nn.init.zeros_(model.bias)
    tap, y = Tap(model, find_head(model, X)), torch.tensor([2, 0, 3, 1])
    assert torch.equal(extract(tap, [(torch.eye(4)[y], y, torch.arange(4))]).labels, y)
    with pytest.warns(UserWarning, match="entry 2"):
        assert torch.equal(extract(tap, [(torch.eye(4)[y], torch.arange(4), y)]).labels, y)


@pytest.mark.parametrize(
    "others",
    [
        (ROW_NUMBERS, SHUFFLED),
        (LABELS, LABELS // 2),
        (ROW_NUMBERS, ROW_NUMBERS + 100),
        (LABELS + 100, ROW_NUMBERS),
        ("path", ROW_NUMBERS),
    ],
)
def test_where_the_values_do_not_tell(others):
    with pytest.raises(ValueError, match=r"batch has integers in the entries .* Pass pairs"):
        extract(tap_of(), [(X, *others)])


def test_other_entries_are_no_labels():
    tap = tap_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for more in (["path"] * N, torch.rand(N), torch.ones(N, dtype=torch.bool), None):
            assert torch.equal(extract(tap, [(X, LABELS, more)]).labels, LABELS)
    with pytest.warns(UserWarning, match="entry 2"):
        assert torch.equal(extract(tap, [(X, torch.rand(N), LABELS)]).labels, LABELS)


def test_pairs_of_input_and_row_number():
    tap = tap_of()
    for batch in ((X, ROW_NUMBERS), {"image": X, "y": ROW_NUMBERS}, (X, np.arange(N))):
        with pytest.warns(UserWarning, match="labels of the first batch are 0 to 15 in order.*are they row numbers"):
            extract(tap, [batch])
    with pytest.raises(ValueError, match="out of range"):
        extract(tap, [(X, ROW_NUMBERS + 100)])


@pytest.mark.parametrize("classes", [8, 10, 20])
def test_one_row_for_each_class_in_order_is_no_batch_of_row_numbers(classes):
    # An untrained model predicts the labels at chance level, too.
    model = shake(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)))
    x = seeded(2 * classes, 4)
    tap = Tap(model, find_head(model, x))
    assert torch.equal(extract(tap, [(x[:classes], torch.arange(classes))]).labels, torch.arange(classes))
    # Row numbers go on in the next batch.
    numbered = [(part, rows) for part, rows in zip(x.chunk(2), torch.arange(2 * classes).chunk(2), strict=True)]
    with pytest.raises(ValueError, match="out of range"):
        extract(tap, numbered)


# --- attention masks of other positions ---------------------------------------------------------------------


class Prompted(nn.Module):
    """A classifier of tokens that puts learned positions before them, or gives the logits of the last ones only."""

    def __init__(self, learned, last=None):
        super().__init__()
        self.embedding, self.fc, self.last = nn.Embedding(9, 8), nn.Linear(8, K), last
        self.prompt = nn.Parameter(seeded(learned, 8))

    def forward(self, input_ids, attention_mask=None):
        tokens = self.embedding(input_ids)
        joined = torch.cat([self.prompt.expand(len(tokens), -1, -1), tokens], dim=1).tanh()
        return self.fc(joined if self.last is None else joined[:, -self.last :])


@pytest.mark.parametrize(("learned", "last"), [(3, None), (1, None), (0, 2)])
def test_a_mask_of_other_positions_than_the_logits(learned, last):
    model = shake(Prompted(learned, last)).eval()
    ids, mask = torch.arange(24).reshape(4, 6) % 9, torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    tap = Tap(model, find_head(model, ids))
    batch, positions = {"input_ids": ids, "attention_mask": mask}, last or 6 + learned
    with pytest.raises(ValueError, match=rf"attention_mask has shape \(4, 6\).* {positions} positions.*-100"):
        extract(tap, [batch])
    labels = torch.full((4, positions), -100)
    labels[:, -1] = 2
    assert len(extract(tap, [batch | {"labels": labels}])) == 4


@pytest.mark.parametrize("shape", [(4, 1, 6, 6), (6, 6)])
def test_masks_that_say_which_positions_see_which_are_the_models_own(shape):
    model = shake(Prompted(0)).eval()
    ids = torch.arange(24).reshape(4, 6) % 9
    tap = Tap(model, find_head(model, ids))
    assert len(extract(tap, [{"input_ids": ids, "attention_mask": torch.ones(shape)}])) == 24
