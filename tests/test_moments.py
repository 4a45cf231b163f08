"""Moments: their sums, the pair of linear discriminant analysis that they define, and their files."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.utils.data import DataLoader, TensorDataset

import penult
from penult import Activations, Moments
from penult.io import FileFormatError
from penult.testing import check_pair
from tiers import thin


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def labelled(classes=5, dim=8, rows=600, seed=0, offset=0.0, dtype=torch.float64):
    """Rows of classes with unequal shares, another mean each, and one covariance."""
    g = seeded(seed)
    y = torch.multinomial(torch.arange(1.0, classes + 1), rows, replacement=True, generator=g)
    # Far from singular, so that logits are small numbers.
    factor = (
        torch.eye(dim, dtype=torch.float64) + 0.5 * torch.randn(dim, dim, generator=g, dtype=torch.float64) / dim**0.5
    )
    means = torch.randn(classes, dim, generator=g, dtype=torch.float64)
    h = torch.randn(rows, dim, generator=g, dtype=torch.float64) @ factor + means[y] + offset
    return h.to(dtype), y


def naive(h, y, classes):
    """Counts, means and scatters by the definitions."""
    counts = torch.bincount(y, minlength=classes)
    means = torch.stack([h[y == k].double().mean(0) if counts[k] else h.new_zeros(h.shape[1]) for k in range(classes)])
    scatters = torch.stack([(h[y == k] - means[k]).T @ (h[y == k] - means[k]) for k in range(classes)])
    return counts, means, scatters


def assert_equal(one, two, tolerance):
    assert torch.equal(one.counts, two.counts)
    assert one.digest == two.digest
    scale = max(1.0, float(two.scatter_matrix.abs().max()))
    assert float((one.means - two.means).abs().max()) <= tolerance * max(1.0, float(two.means.abs().max()))
    assert float((one.scatter_matrix - two.scatter_matrix).abs().max()) <= tolerance * scale


# --- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scatter", ["pooled", "class"])
def test_moments_are_those_of_the_definition(scatter):
    h, y = labelled()
    counts, means, scatters = naive(h, y, 6)
    moments = Moments.of(h, y, 6, scatter)
    assert torch.equal(moments.counts, counts)
    assert torch.allclose(moments.means, means, atol=1e-13)
    expected = scatters.sum(0) if scatter == "pooled" else scatters
    assert torch.allclose(moments.scatter_matrix, expected, atol=1e-10)
    assert (moments.scatter, moments.num_classes, moments.in_features, len(moments)) == (scatter, 6, 8, 600)
    assert moments.classes.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("scatter", ["pooled", "class"])
def test_all_kinds_of_rows_give_the_same_moments(scatter, tmp_path):
    h, y = labelled(dtype=torch.float32)
    whole = Moments.of(h, y, 5, scatter)
    acts = Activations(h, torch.zeros(len(h), 5), y)
    loader = DataLoader(TensorDataset(h, y), batch_size=64)
    same = [
        Moments.of(h.numpy(), y.numpy().astype(np.uint8), 5, scatter),
        Moments.of(acts, scatter=scatter),
        Moments.of(acts.save(tmp_path / "acts"), scatter=scatter),
        Moments.of(loader, num_classes=5, scatter=scatter),
        Moments.of(((x, labels) for x, labels in loader), scatter=scatter),
        Moments.of([acts[:100], acts[100:]], scatter=scatter),
        sum(Moments.of(x, labels, 5, scatter) for x, labels in loader),
    ]
    for moments in same:
        assert_equal(moments, whole, 1e-12)
        assert moments.dtype is torch.float32


def test_pre_activations_are_counted_as_the_head_reads_them():
    h, y = labelled(dtype=torch.float32)
    acts = Activations(h, torch.zeros(len(h), 5), y, pre_activation=True)
    assert torch.equal(Moments.of(acts).means, Moments.of(h.clamp_min(0), y, 5).means)


@pytest.mark.parametrize("scatter", ["pooled", "class"])
def test_any_order_of_merging_gives_the_same(scatter):
    h, y = labelled(offset=100.0)
    shards = [Moments.of(h[i::7], y[i::7], 5, scatter) for i in range(7)]
    whole = Moments.of(h, y, 5, scatter)
    one_by_one = sum(shards)
    backwards = sum(reversed(shards))
    tree = (shards[0] + shards[3]) + ((shards[1] + shards[6]) + (shards[2] + (shards[4] + shards[5])))
    by_class = sum(Moments.of(h[y == k], y[y == k], 5, scatter) for k in (3, 1, 4, 0, 2))
    for merged in (one_by_one, backwards, tree, by_class):
        assert_equal(merged, whole, 1e-10)


@pytest.mark.parametrize("offset", thin([0.0, 1e4, 1e6], keep=[1e6]))
def test_large_means_do_not_cancel(offset):
    h, y = labelled(offset=offset)
    exact = naive(h - offset, y, 5)[2].sum(0)
    # h itself has lost the digits beyond its own rounding.
    tolerance = 1e-12 + 1e-15 * offset
    parts = [Moments.of(h[i : i + 50], y[i : i + 50], 5) for i in range(0, 600, 50)]
    for moments in (Moments.of(h, y, 5), sum(parts)):
        error = float((moments.scatter_matrix - exact).abs().max() / exact.abs().max())
        assert error <= tolerance


def test_classes_are_matched_by_name_and_lists_grow():
    h, y = labelled(classes=4)
    left, right = y < 2, y >= 1
    one = Moments.of(h[left], y[left], class_names=["a", "b"])
    two = Moments.of(h[right], 3 - y[right], class_names=["d", "c", "b"])
    merged = one + two
    assert merged.class_names == ("a", "b", "d", "c")
    order = torch.tensor([0, 1, 3, 2])
    counts = torch.bincount(y[left], minlength=4) + torch.bincount(y[right], minlength=4)
    assert torch.equal(merged.counts, counts[order])
    assert torch.allclose(merged.means[2], h[y == 3].mean(0))
    # Without names, numbers are classes, and the longer list is kept.
    grown = Moments.of(h[y < 2], y[y < 2], 2) + Moments.of(h[y >= 2], y[y >= 2], 4)
    assert_equal(grown, Moments.of(h, y, 4), 1e-12)
    assert Moments.of(h, y, 4).with_class_names(list("wxyz")).class_names == ("w", "x", "y", "z")


# --- forgetting ---------------------------------------------------------------------------------------------


def test_a_class_is_forgotten_as_if_it_had_never_been_seen():
    h, y = labelled()
    never = Moments.of(h[y != 2], y[y != 2], 5, "class")
    forgotten = Moments.of(h, y, class_names=list("abcde"), scatter="class").forget("c")
    assert_equal(forgotten, never, 0.0)
    with pytest.warns(UserWarning, match="class 'c' has no rows, and is not in the head"):
        one = forgotten.pair()
    with pytest.warns(UserWarning, match="class 2 has no rows"):
        two = never.pair()
    assert torch.equal(one.head.weight, two.head.weight)
    assert one.head.num_classes == 4
    assert_equal(Moments.of(h, y, 5, "class").forget([0, 2]).forget(torch.tensor(1)), Moments.of(
        h[y > 2], y[y > 2], 5, "class"
    ), 0.0)  # fmt: skip


@pytest.mark.parametrize("scatter", ["pooled", "class"])
def test_rows_are_forgotten_as_if_they_had_never_been_seen(scatter):
    h, y = labelled(offset=10.0)
    whole = Moments.of(h, y, 5, scatter)
    some = torch.rand(len(h), generator=seeded(1)) < 0.3
    for gone in (some, y == 2, some | (y == 2)):
        assert_equal(whole.forget(h[gone], y[gone]), Moments.of(h[~gone], y[~gone], 5, scatter), 1e-9)
    assert_equal(whole.forget(h[y == 1], 1), whole.forget(h[y == 1], y[y == 1]), 0.0)
    everything = whole.forget(h, y)
    assert len(everything) == 0
    assert not everything.scatter_matrix.any()
    assert_equal(everything + whole, whole, 1e-12)


def test_what_cannot_be_forgotten_is_refused():
    h, y = labelled()
    pooled, by_class = Moments.of(h, y, 5), Moments.of(h, y, 5, "class")
    with pytest.raises(ValueError, match="scatter is pooled, and holds the rows of class 2 together"):
        pooled.forget(2)
    with pytest.raises(ValueError, match="class is 5; expected an integer from 0 to 4"):
        by_class.forget(5)
    with pytest.raises(ValueError, match="there is no class 'x'"):
        by_class.forget("x")
    with pytest.raises(TypeError, match=r"class is 1\.5"):
        by_class.forget(1.5)
    with pytest.raises(ValueError, match="other rows were counted for class 2"):
        pooled.forget(h[y == 2] + 1e-3, 2)
    with pytest.raises(ValueError, match=r"class 0 has \d+ rows, and \d+ are given"):
        pooled.forget(h, 0)
    with pytest.raises(ValueError, match="negative variance"):
        pooled.forget(h[y == 2][:4] * 100, 2)
    with pytest.raises(ValueError, match="h has dimension 7; expected 8"):
        pooled.forget(h[:, :7], y)
    with pytest.raises(ValueError, match="y is None; expected the labels of the rows"):
        pooled.forget(h)


# --- the pair -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(("classes", "dim"), thin([(2, 3), (5, 8), (30, 64)], keep=[(2, 3), (5, 8)]))
def test_the_head_is_that_of_scikit_learn(shrinkage, classes, dim):
    h, y = labelled(classes, dim, rows=2000)
    shares = torch.bincount(y, minlength=classes).double() / len(y)
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=shares.numpy()).fit(h, y)
    pair = Moments.of(h, y, classes).pair(shrinkage=shrinkage)
    logits, theirs = pair.head(h), torch.as_tensor(other.decision_function(h))
    if classes == 2:
        # scikit-learn has the difference of the two logits.
        assert torch.allclose(logits[:, 1] - logits[:, 0], theirs, atol=1e-6)
        return
    difference = logits - theirs
    assert float((difference - difference.mean(1, keepdim=True)).abs().max()) < 1e-6
    assert torch.allclose(pair.base.covariance_matrix, torch.as_tensor(other.covariance_), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prior_and_means_are_those_of_the_rows(dtype):
    h, y = labelled(dtype=dtype)
    moments = Moments.of(h, y, 5)
    pair = moments.pair()
    assert pair.head.weight.dtype is dtype
    shares = torch.bincount(y, minlength=5).double() / len(y)
    assert float((pair.prior.probs.double() - shares).abs().max()) < 1e-6
    # The rounding of W in float32 is multiplied by the condition of the covariance.
    tolerance = 1e-6 if dtype is torch.float64 else 4e-6
    assert float((pair.given(torch.arange(5)).mean.double() - moments.means).abs().max()) < tolerance
    assert pair.base.reference == moments.digest == penult.Gaussian.fit(pair.head, h).reference
    assert moments.pair(dtype=torch.float64).head.weight.dtype is torch.float64


def test_the_posterior_is_bayes_rule_of_the_class_distributions():
    h, y = labelled()
    pair = Moments.of(h, y, 5).pair()
    joint = pair.given(torch.arange(5)).log_prob(h[:20].unsqueeze(1)) + pair.prior.logits
    assert torch.allclose(joint.softmax(-1), pair.head(h[:20]).softmax(-1), atol=1e-9)
    check_pair(pair, samples=20_000)


def test_shrinkage_by_oas_is_that_of_scikit_learn_up_to_the_number_of_means():
    h, y = labelled(rows=60)
    moments = Moments.of(h, y, 5)
    deviations = (h - moments.means[y]).numpy()
    # scikit-learn counts N rows; N - K of the deviations are independent.
    ours, theirs = moments.covariance(), OAS(assume_centered=True).fit(deviations)
    plain = moments.covariance(0.0)
    scale = float(plain.trace() / 8)
    ours_rho = float((ours - plain)[0, 1] / -plain[0, 1])
    assert torch.allclose(plain, torch.as_tensor(deviations.T @ deviations / 60))
    assert ours_rho == pytest.approx(theirs.shrinkage_ * 61 / 56, rel=1e-9)
    assert torch.allclose(ours, (1 - ours_rho) * plain + ours_rho * scale * torch.eye(8, dtype=h.dtype), atol=1e-12)


def test_another_prior_moves_the_biases_alone():
    h, y = labelled()
    moments = Moments.of(h, y, 5)
    prior = torch.tensor([4.0, 1.0, 1.0, 1.0, 3.0])
    pair, shares = moments.pair(prior=prior), moments.pair()
    assert torch.allclose(pair.prior.probs, prior.double() / 10, atol=1e-9)
    assert torch.equal(pair.head.weight, shares.head.weight)
    again = moments.pair(prior=torch.distributions.Categorical(probs=prior)).head.bias
    assert torch.allclose(again, pair.head.bias, atol=1e-6)
    for wrong in (prior[:3], -prior, prior * float("nan")):
        with pytest.raises(ValueError, match="prior has shape"):
            moments.pair(prior=wrong)


def test_a_class_in_the_middle_of_the_others_has_a_row_of_zeros():
    h = torch.tensor([[-2.0], [0.0], [-1.0], [1.0], [0.0], [2.0]], dtype=torch.float64) * 2
    pair = Moments.of(h, torch.tensor([0, 0, 1, 1, 2, 2])).pair(shrinkage=0.0)
    assert pair.head.weight[1].item() == 0
    assert pair.head(torch.tensor([[0.0], [4.0]], dtype=torch.float64)).argmax(-1).tolist() == [1, 2]
    assert pair.head.certificate.empty == 1


def test_few_rows_are_warned_of():
    h = torch.randn(40, 64, generator=seeded())
    moments = Moments.of(h, torch.arange(40) % 5, 5)
    with pytest.warns(UserWarning, match="40 rows of dimension 64; with fewer rows than dimensions"):
        moments.pair()
    h, y = labelled()
    y[y == 4], y[0] = 3, 4
    with pytest.warns(UserWarning, match="class 4 has a single row, which is its mean"):
        Moments.of(h, y, 5).pair()


@pytest.mark.parametrize(
    ("h", "y", "arguments", "message"),
    [
        (torch.randn(9, 2), torch.zeros(9).long(), {}, "1 classes have rows; expected at least 2"),
        (torch.ones(9, 2), torch.arange(9) % 3, {}, "means of all classes are equal"),
        (torch.eye(3)[torch.arange(9) % 3], torch.arange(9) % 3, {}, "singular with shrinkage='oas'"),
        (torch.randn(9, 2), torch.arange(9) % 3, {"shrinkage": 2.0}, "shrinkage is 2.0"),
        (torch.randn(9, 2), torch.arange(9) % 3, {"shrinkage": "lw"}, "shrinkage is 'lw'"),
        (torch.randn(9, 2), torch.arange(9) % 3, {"dtype": torch.float16}, "dtype is torch.float16"),
    ],
)
def test_pairs_that_cannot_be_made_are_refused(h, y, arguments, message):
    with pytest.raises(ValueError, match=message):
        Moments.of(h, y).pair(**arguments)


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, (3.0, None), "h is a float; expected activations"),
        (TypeError, ([torch.zeros(2, 2)], None), "a batch is a torch.float32 tensor; expected a pair"),
        (ValueError, ([], None), "h has no rows"),
        (ValueError, (torch.zeros(4, 2), None), "y is None"),
        (ValueError, (torch.zeros(4, 2), torch.tensor([0, 1, 2, 3]), 3), "label 3; expected 0 to 2, for K=3"),
        (ValueError, (torch.zeros(4, 2), torch.tensor([0, 1, -1, 1])), "label -1; expected 0 or more"),
        (TypeError, (torch.zeros(4, 2), torch.zeros(4)), "y is a torch.float32 tensor"),
        (ValueError, (torch.full((4, 2), torch.nan), torch.zeros(4).long()), "4 of 4 rows of h hold NaN"),
        (ValueError, (torch.zeros(4), torch.zeros(4).long()), "h has shape"),
        (ValueError, (torch.zeros(4, 2), torch.zeros(4).long(), 1, "full"), "scatter is 'full'"),
        (
            ValueError,
            ([(torch.zeros(2, 2), [0, 1]), (torch.zeros(2, 3), [0, 1])], None),
            "h has dimension 3; expected 2",
        ),
    ],
)
def test_rows_that_cannot_be_counted_are_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        Moments.of(*arguments)


def test_moments_that_do_not_add_up_are_refused():
    h, y = labelled()
    moments = Moments.of(h, y, 5)
    with pytest.raises(ValueError, match="dimension 7; expected 8"):
        moments + Moments.of(h[:, :7], y, 5)
    with pytest.raises(ValueError, match=r"one scatter is 'pooled' and the other 'class'"):
        moments + Moments.of(h, y, 5, "class")
    with pytest.raises(ValueError, match="one of the moments has class names"):
        moments + Moments.of(h[1:], y[1:], class_names=list("abcde"))
    with pytest.raises(ValueError, match="class_names has 'a' twice"):
        moments.with_class_names(list("abcda"))
    with pytest.raises(TypeError):
        moments + 1
    with pytest.warns(UserWarning, match="both moments are of the same rows"):
        twice = moments + Moments.of(h.flip(0), y.flip(0), 5)
    assert torch.equal(twice.counts, 2 * moments.counts)
    assert_equal(Moments.of(h[:300], y[:300], 5, "class").pooled() + Moments.of(h[300:], y[300:], 5), moments, 1e-12)


# --- scores, realism and the certificate --------------------------------------------------------------------


def test_scores_and_realism_take_such_a_pair():
    h, y = labelled(rows=800, dtype=torch.float32)
    moments = Moments.of(h[:400], y[:400], 5)
    pair = moments.pair()
    for score in (penult.scores.energy, penult.scores.max_logit, penult.scores.density, penult.scores.msp):
        assert bool(score(pair, h[400:]).isfinite().all())
    assert float(penult.scores.density(pair, h[400:] + 20).min()) > float(penult.scores.density(pair, h[400:]).max())
    mahalanobis = penult.scores.Mahalanobis.fit(h[:400], y[:400])
    squared = (h[400:].double().unsqueeze(1) - moments.means) @ torch.linalg.cholesky(moments.covariance().inverse())
    nearest = squared.square().sum(-1).amin(-1)
    ranks = [x.argsort().argsort().double() for x in (mahalanobis.score(h[400:]).double(), nearest)]
    assert float((ranks[0] - ranks[1]).abs().max()) <= 1
    result = penult.realism.compare(pair, h[400:], y[400:], max_per_class=60)
    # Rows and samples are of one Gaussian, up to the errors of the estimates.
    assert result.base == "gaussian"
    assert max(result.pooled.auc.values()) < 0.65


def test_the_certificate_says_where_the_head_comes_from(tmp_path):
    h, y = labelled()
    pair = Moments.of(h, y, 5).pair()
    again = penult.load(pair.save(tmp_path / "m.penult.safetensors"))
    assert again.head.certificate == pair.head.certificate
    text = str(again.head.certificate)
    assert "moments 8->5  of no model: linear discriminant analysis of the moments of 600 labelled activations" in text
    assert "shrinkage oas" in text
    assert again.base.reference == pair.base.reference
    with pytest.raises(ValueError, match=r"head is of no model \(linear discriminant analysis"):
        penult.Tap(torch.nn.Linear(8, 5), pair.head)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scatter", ["pooled", "class"])
def test_files_keep_everything(scatter, tmp_path):
    h, y = labelled(dtype=torch.float32)
    moments = Moments.of(h, y, scatter=scatter, class_names=list("abcde"))
    again = Moments.load(moments.save(tmp_path / "m.safetensors"))
    assert_equal(again, moments, 0.0)
    assert (again.class_names, again.dtype, again.scatter) == (moments.class_names, torch.float32, scatter)
    assert repr(again) == f"Moments(N=600, d=8, K=5, scatter='{scatter}')"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = again + moments
    assert torch.equal(merged.counts, 2 * moments.counts)


def test_a_file_of_few_rows_is_warned_of(tmp_path):
    h, y = torch.randn(40, 64, generator=seeded()), torch.arange(40) % 5
    with pytest.warns(UserWarning, match="fewer rows than dimensions"):
        Moments.of(h, y, 5).save(tmp_path / "m.safetensors")


def test_damaged_files_are_refused(tmp_path):
    h, y = labelled()
    moments = Moments.of(h, y, 5)
    tensors = {"counts": moments.counts, "means": moments.means, "scatter_matrix": moments.scatter_matrix}
    record = {"class_names": None, "dtype": "float64"}
    path = tmp_path / "m.safetensors"
    for name, wrong in {
        "counts": -moments.counts,
        "means": moments.means[:, :3],
        "scatter_matrix": moments.scatter_matrix.tril(),
        "hashes": torch.zeros(3),
    }.items():
        penult.io.write(path, tensors | {name: wrong}, "moments", record)
        with pytest.raises(FileFormatError, match="moments cannot be rebuilt from the file"):
            Moments.load(path)
    for wrong in ({"dtype": "float8"}, {"class_names": ["a"]}, {"class_names": 3}):
        penult.io.write(path, tensors, "moments", record | wrong)
        with pytest.raises(FileFormatError, match="moments cannot be rebuilt from the file"):
            Moments.load(path)
    with pytest.raises(FileFormatError, match="is of kind 'pair'; expected 'moments'"):
        Moments.load(moments.pair().save(path))
    # Files without hashes are those of moments that were computed elsewhere.
    penult.io.write(path, tensors, "moments", record)
    assert Moments.load(path).digest is None


def test_moments_that_were_computed_elsewhere():
    h, y = labelled()
    counts, means, scatters = naive(h, y, 5)
    moments = Moments(counts.numpy(), means.numpy(), scatters.numpy())
    assert moments.scatter == "class"
    assert torch.allclose(moments.pair().head.weight, Moments.of(h, y, 5).pair().head.weight, atol=1e-9)
    assert (moments + Moments.of(h, y, 5, "class")).digest is None
    with pytest.raises(TypeError, match=r"counts is a torch.float64 tensor; expected integers \(K,\)"):
        Moments(counts.double(), means, scatters)
    with pytest.raises(ValueError, match="differs from its transpose"):
        Moments(counts, means, scatters.tril())
    with pytest.raises(ValueError, match="means holds 1 values that are NaN"):
        Moments(counts, means.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan).double()), scatters)
