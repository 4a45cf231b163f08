import copy
import io
import math
import pickle

import pytest
import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F
from torch import nn

from penult.head import Head, find_head


def seeded(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_head(classes=5, features=8, bias=True, dtype=torch.float64, seed=0):
    weight = seeded(classes, features, dtype=dtype, seed=seed)
    return Head(weight, seeded(classes, dtype=dtype, seed=seed + 1) if bias else None)


# ---- Head: construction -----------------------------------------------------------------------------------


def test_a_head_shares_the_storage_of_the_model():
    fc = nn.Linear(8, 3)
    head = Head(fc.weight, fc.bias)
    assert head.weight.data_ptr() == fc.weight.data_ptr()
    assert head.bias.data_ptr() == fc.bias.data_ptr()
    assert not head.weight.requires_grad
    assert not list(head.parameters())
    h = seeded(4, 8)
    assert torch.equal(head(h), fc(h))
    version = head.version
    with torch.no_grad():
        fc.weight.mul_(2)
    assert torch.equal(head(h), fc(h))
    assert head.version > version


def test_clone_has_its_own_storage():
    fc = nn.Linear(8, 3)
    head = Head(fc.weight, fc.bias, norm="rms")
    clone = head.clone()
    with torch.no_grad():
        fc.weight.zero_()
        fc.bias.zero_()
    assert clone.weight.abs().min() > 0
    assert clone.bias.abs().min() > 0
    assert clone.norm == "rms"
    assert clone.radius == pytest.approx(8**0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_and_dtypes(dtype, bias):
    head = random_head(5, 8, bias=bias, dtype=dtype)
    assert (head.num_classes, head.in_features) == (5, 8)
    assert head.mean_row.dtype == torch.promote_types(dtype, torch.float32)
    for shape in [(8,), (3, 8), (2, 3, 8), (0, 8)]:
        logits = head(torch.ones(shape, dtype=dtype))
        assert logits.shape == (*shape[:-1], 5)
        assert logits.dtype == dtype


def test_the_mean_row_is_computed_in_double():
    weight = torch.full((3, 2), 1.0) + torch.tensor([[0.0, 1e-7], [0.0, 0.0], [0.0, -1e-7]])
    head = Head(weight)
    assert torch.equal(head.mean_row, weight.double().mean(0).float())
    large = seeded(5000, 3000)  # more than one block
    assert torch.allclose(Head(large).mean_row, large.double().mean(0).float(), rtol=1e-6, atol=0)


def bad_weights():
    good = torch.ones(3, 4)
    nan = good.clone()
    nan[1, 2] = math.nan
    nan[2, 0] = math.inf
    zero = good.clone()
    zero[1] = 0
    return {
        "list": ([[1.0, 2.0]], None, TypeError, "weight is a list"),
        "integer": (good.long(), None, TypeError, "torch.int64"),
        "vector": (good[0], None, ValueError, r"shape \(4,\)"),
        "three dimensions": (good[None], None, ValueError, r"shape \(1, 3, 4\)"),
        "no features": (torch.ones(3, 0), None, ValueError, r"shape \(3, 0\)"),
        "no classes": (torch.ones(0, 4), None, ValueError, "at least two rows"),
        "one class": (good[:1], None, ValueError, r"K = 1.*sigmoid.*Head\(torch.stack\(\[-w / 2, w / 2\]\)"),
        "nan": (nan, None, ValueError, r"weight holds 2 values .*first at index \[1, 2\]"),
        "zero row": (zero, None, ValueError, r"class 1 are all zero.*Drop"),
        "bias shape": (good, torch.ones(4), ValueError, r"bias has shape \(4,\); expected \(3,\)"),
        "bias dtype": (good, torch.ones(3).double(), ValueError, r"bias is torch.float64.*bias.to\(weight\)"),
        "bias device": (good, torch.ones(3, device="meta"), ValueError, "on meta"),
        "bias nan": (good, torch.tensor([0, math.nan, 0]), ValueError, r"bias holds 1 .*\[1\]"),
        "bias list": (good, [1, 2, 3], TypeError, "bias is a list"),
    }


@pytest.mark.parametrize("case", bad_weights())
def test_bad_weights_are_named(case):
    weight, bias, error, words = bad_weights()[case]
    with pytest.raises(error, match=words):
        Head(weight, bias)


def test_a_bad_value_in_a_later_block_is_found():
    weight = seeded(3000, 2000)
    weight[2999, 7] = -math.inf
    with pytest.raises(ValueError, match=r"holds 1 values .*\[2999, 7\]"):
        Head(weight)


def test_the_remedy_for_one_logit_works():
    w, c, h = seeded(4), seeded(()), seeded(6, 4)
    head = Head(torch.stack([-w / 2, w / 2]), torch.stack([-c / 2, c / 2]))
    assert torch.allclose(head(h).softmax(1)[:, 1], torch.sigmoid(h @ w + c))


def test_bad_norm_and_bad_activations():
    with pytest.raises(ValueError, match="'batch'"):
        Head(torch.eye(2), norm="batch")
    head = random_head(5, 8)
    for h in (torch.ones(8, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"shape .*expected activations of shape \(\.\.\., 8\)"):
            head(h)
        with pytest.raises(ValueError, match="expected activations"):
            head.centered_logits(h)


# ---- Head: the same classifier in other words -------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [2, 3, 40])
def test_gauge(classes, bias):
    head, h = random_head(classes, 6, bias=bias), seeded(7, 6, dtype=torch.float64)
    posterior = head(h).softmax(-1)
    centered = head.centered()
    assert torch.allclose(centered(h).softmax(-1), posterior, atol=1e-12)
    assert centered.mean_row.abs().max() < 1e-15
    assert (centered.bias is None) == (not bias)
    if bias:
        assert abs(centered.bias.mean()) < 1e-15
    logits = head.centered_logits(h)
    shift = 0 if head.bias is None else head.bias.mean()
    assert torch.allclose(logits, centered(h) + shift, atol=1e-12)
    assert torch.allclose(head.centered_logits(h[0]), logits[0])


def test_centered_weight_by_index():
    head = random_head(5, 3)
    rows = head.weight - head.weight.mean(0)
    assert torch.allclose(head.centered_weight(), rows)
    index = torch.tensor([[3, 0], [1, 1]])
    assert torch.allclose(head.centered_weight(index), rows[index])
    assert torch.allclose(head.centered_weight(slice(1, 3)), rows[1:3])
    assert torch.allclose(head.centered_weight(2), rows[2])


def test_centering_may_give_a_zero_row():
    head = Head(torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 1.0]])).centered()
    assert torch.equal(head.weight[0], torch.zeros(2))
    assert head.clone().with_temperature(2).rescaled()[0].rank == 1


@pytest.mark.parametrize("row_norm", [1 / math.sqrt(3), 2.0])
def test_rescaled(row_norm):
    head = Head(seeded(4, 6, dtype=torch.float64) + 3, seeded(4, dtype=torch.float64), norm="layer")
    new, scale = head.rescaled(row_norm)
    h = seeded(7, 6, dtype=torch.float64)
    assert torch.allclose(new(scale * h), head(h))
    assert new.centered_weight().norm(dim=1).mean().item() == pytest.approx(row_norm)
    assert new.radius == pytest.approx(scale * math.sqrt(6))
    assert new.certificate is None
    assert isinstance(scale, float)
    assert torch.equal(new.bias, head.bias)


def test_rescaled_needs_distinct_rows():
    with pytest.raises(ValueError, match="all rows of weight are equal"):
        Head(torch.full((3, 4), 0.1)).rescaled()
    with pytest.raises(ValueError, match="row_norm is -1"):
        random_head().rescaled(-1)


def test_temperature():
    head, h = random_head(), seeded(7, 8, dtype=torch.float64)
    warm = head.with_temperature(2).with_temperature(1.5)
    assert warm.temperature == 3.0
    assert torch.allclose(warm(h), head(h) / 3)
    assert warm.clone().centered().temperature == 3.0
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature is"):
            head.with_temperature(wrong)


def nll_slope(logits, labels, temperature):
    beta = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(beta * logits.double(), labels).backward()
    return beta.grad.item()


@pytest.mark.parametrize("true", [0.05, 0.5, 1.0, 3.0, 60.0])
@pytest.mark.parametrize("classes", [2, 3, 100])
def test_calibrate_finds_the_optimum(true, classes):
    generator = torch.Generator().manual_seed(classes)
    head = random_head(classes, 4, dtype=torch.float32)
    logits = 3 * torch.randn(3000, classes, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator)[:, 0]
    found = head.calibrate(logits * true, labels)
    assert found.temperature == pytest.approx(true, rel=0.2)
    # To the optimum of this sample, however far from the start: Newton's slope there is rounding.
    scale = (logits * true).abs().max().item()
    assert abs(nll_slope(logits * true, labels, found.temperature)) < 1e-11 * scale
    assert torch.equal(found.weight, head.weight / found.temperature)


def test_calibrate_in_the_flat_tail():
    # All but one of many samples are right by a margin of 40: Newton alone would crawl along the tail.
    logits = torch.zeros(100_001, 2, dtype=torch.float64)
    logits[:, 0] = 40.0
    labels = torch.zeros(100_001, dtype=torch.int64)
    labels[7] = 1
    beta = 1 / random_head(2).calibrate(logits, labels).temperature
    assert beta == pytest.approx(math.log(100_000) / 40, rel=1e-9)


def test_calibrate_multiplies_and_takes_many_integer_types():
    head, logits = random_head(2).with_temperature(2), torch.tensor([[1.0, -1.0]] * 4)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        labels = torch.tensor([0, 0, 0, 1], dtype=dtype)
        assert head.calibrate(logits, labels).temperature == pytest.approx(4 / math.log(3))


def test_calibrate_says_why_not():
    head = random_head(3, 4)
    logits, labels = seeded(10, 3), torch.arange(10) % 3
    with pytest.raises(ValueError, match=r"100.0% are predicted right.*more held-out data"):
        head.calibrate(logits, logits.argmax(1))
    with pytest.raises(ValueError, match="say nothing about these labels"):
        head.calibrate(logits, logits.argmin(1))
    with pytest.raises(ValueError, match=r"labels\[4\] is 3, out of range \(2 such labels\); expected 0 to 2"):
        head.calibrate(logits, torch.tensor([0, 1, 2, 0, 3, 0, 0, 0, -1, 0]))
    with pytest.raises(ValueError, match=r"labels has shape \(9,\); expected \(10,\)"):
        head.calibrate(logits, labels[:9])
    with pytest.raises(ValueError, match=r"logits has shape \(10, 2\); expected \(N, 3\)"):
        head.calibrate(logits[:, :2], labels)
    with pytest.raises(ValueError, match=r"logits has shape \(0, 3\)"):
        head.calibrate(logits[:0], labels[:0])
    with pytest.raises(TypeError, match=r"torch\.float32"):
        head.calibrate(logits, labels.float())
    logits[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"logits holds? 1 values .*\[3, 1\]"):
        head.calibrate(logits, labels)


# ---- Head: rank and span ----------------------------------------------------------------------------------


def projector(rows):
    return rows.mT @ rows


@pytest.mark.parametrize(("classes", "features"), [(2, 1), (2, 6), (5, 8), (6, 5), (8, 5), (3000, 7), (1025, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_span(classes, features, dtype):
    head = Head(seeded(classes, features, dtype=dtype) + 1)
    span = head.span()
    q = min(classes - 1, features)
    assert head.rank == q
    assert span.shape == (q, features)
    assert span.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(span @ span.mT, torch.eye(q, dtype=dtype), atol=tolerance)
    rows = head.weight.double() - head.weight.double().mean(0)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    assert torch.allclose(projector(span).double(), projector(vectors[:q]), atol=tolerance)
    assert torch.allclose((rows @ span.double().mT).norm(dim=0), values[:q], rtol=1e-5)
    assert (span.gather(1, span.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("classes", "features", "q"), [(3, 50, 1), (40, 30, 3), (4000, 20, 5), (200, 300, 64)])
def test_rank_deficient(classes, features, q, dtype):
    weight = seeded(classes, q, dtype=dtype) @ seeded(q, features, dtype=dtype, seed=1)
    head = Head(weight)
    assert head.rank == min(q, classes - 1)
    assert Head(weight + 10 * seeded(features, dtype=dtype, seed=2)).rank == min(q, classes - 1)
    assert head.centered().rank == head.rank


def test_a_small_direction_counts():
    weight = seeded(50, 4)
    weight[:, 3] *= 1e-4
    assert Head(weight).rank == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rank(dtype):
    head = Head(seeded(300, 128).to(dtype))
    assert head.rank == 128
    assert head.span().dtype == torch.float32
    assert Head(seeded(10, 128).to(dtype)).rank == 9


def test_equal_rows_span_nothing():
    head = Head(torch.full((4, 3), 0.1))
    assert head.rank == 0
    assert head.span().shape == (0, 3)


def test_the_span_is_kept_until_the_weight_changes():
    fc = nn.Linear(6, 3)
    head = Head(fc.weight, fc.bias)
    span = head.span()
    assert head.span() is span
    with torch.no_grad():
        fc.weight.copy_(seeded(3, 6))
    assert head.span() is not span
    assert torch.allclose(head.span(), Head(seeded(3, 6)).span(), atol=1e-6)
    head.double()
    assert head.span().dtype == torch.float64
    other = random_head(3, 6, dtype=torch.float64, seed=5)
    head.load_state_dict(other.state_dict())
    assert torch.equal(head.span(), other.span())
    head.weight = seeded(3, 6, dtype=torch.float64, seed=9)
    assert torch.equal(head.span(), Head(head.weight).span())


# ---- Head: an nn.Module like any other --------------------------------------------------------------------


def test_state_dict_round_trip():
    source, target = random_head(seed=1), random_head(seed=2)
    assert set(source.state_dict()) == {"weight", "bias"}
    nn.ModuleList([target]).load_state_dict(nn.ModuleList([source]).state_dict())
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.mean_row, source.mean_row)
    assert set(random_head(bias=False).state_dict()) == {"weight"}


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies(way):
    model = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 3))
    head = find_head(model, seeded(5, 4)).with_temperature(2)
    span = head.span()
    if way == "pickle":
        other = pickle.loads(pickle.dumps(head))
    elif way == "deepcopy":
        other = copy.deepcopy(head)
    else:
        buffer = io.BytesIO()
        torch.save(head, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    h = seeded(7, 8)
    assert torch.equal(other(h), head(h))
    assert torch.equal(other.span(), span)
    assert other.certificate == head.certificate
    assert (other.temperature, other.norm, other.radius) == (2.0, "rms", head.radius)
    assert other.weight.data_ptr() != head.weight.data_ptr()


def test_to_leaves_the_model_alone():
    fc = nn.Linear(4, 3)
    head = Head(fc.weight, fc.bias).double()
    assert fc.weight.dtype == torch.float32
    assert head.weight.dtype == head.mean_row.dtype == head.span().dtype == torch.float64


def test_built_under_inference_mode():
    with torch.inference_mode():
        head = random_head()
        assert head.rank == 4
        head(seeded(3, 8, dtype=torch.float64))


def test_repr():
    head = random_head(3, 4, bias=False)
    assert repr(head) == "Head(num_classes=3, in_features=4, bias=False)"
    head = Head(torch.eye(2), norm="rms").with_temperature(1.5)
    assert repr(head) == "Head(num_classes=2, in_features=2, bias=False, norm='rms', temperature=1.5)"


@pytest.mark.usefixtures("compiler")
def test_compiles_in_one_graph():
    head, h = random_head(), seeded(3, 8, dtype=torch.float64)
    compiled = torch.compile(lambda h: (head(h), head.centered_logits(h)), backend="eager", fullgraph=True)
    for found, expected in zip(compiled(h), (head(h), head.centered_logits(h)), strict=True):
        assert torch.equal(found, expected)


def test_gradients_flow_to_h():
    head, h = random_head(), seeded(3, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(head, (h,))
    assert torch.autograd.gradcheck(head.centered_logits, (h,))


def biased_answers(num_classes, rows, seed=0):
    """Logits and labels drawn from softmax(logits / 2 + c), and c."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, num_classes, generator=generator)
    biases = torch.randn(num_classes, generator=generator)
    labels = torch.multinomial((logits / 2 + biases).softmax(1), 1, generator=generator)[:, 0]
    return logits, labels, biases - biases.mean()


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_calibration_with_biases_finds_the_temperature_and_the_biases(num_classes):
    logits, labels, biases = biased_answers(num_classes, 20_000)
    head = Head(torch.eye(num_classes), torch.zeros(num_classes)).calibrate(logits, labels, biases=True)
    assert head.temperature == pytest.approx(2, rel=0.05)
    torch.testing.assert_close(head.bias - head.bias.mean(), biases, atol=0.2, rtol=0)


def test_calibration_with_biases_is_the_minimum_of_the_penalised_likelihood():
    logits, labels, _ = biased_answers(3, 200)
    labels[labels == 2] = 0  # no row of one class
    head = Head(torch.eye(3), torch.zeros(3)).calibrate(logits, labels, biases=True)

    def objective(parameters):
        rows = parameters[0] * logits.double().numpy() + parameters[1:]
        normaliser = scipy.special.logsumexp(rows, axis=1)
        fit = (normaliser - rows[range(len(rows)), labels.numpy()]).sum()
        return fit + 0.5 * (parameters[1:] ** 2).sum()

    best = scipy.optimize.minimize(objective, [1.0, 0, 0, 0], tol=1e-12).x
    assert 1 / head.temperature == pytest.approx(best[0], rel=1e-4)
    torch.testing.assert_close(head.bias.double(), torch.tensor(best[1:]), atol=1e-4, rtol=0)


def test_calibration_keeps_the_certificate_and_adds_to_the_bias():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    head = find_head(model, torch.randn(8, 4))
    logits, labels, _ = biased_answers(3, 300)
    calibrated = head.calibrate(logits, labels.to(torch.uint8), biases=True)
    assert calibrated.certificate == head.certificate
    torch.testing.assert_close(calibrated.weight, head.weight / calibrated.temperature)
    with pytest.raises(TypeError, match=r"labels is a torch\.float32 tensor"):
        head.calibrate(logits, labels.float(), biases=True)
