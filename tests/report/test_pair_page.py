"""The page on a pair: what it says is what the library measures, whatever the head, the base and the names."""

import math
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import penult
from penult import scores
from penult.realism import _two_sample
from penult.report import Section, plots, thumbnails
from penult.report import figures as house
from penult.report import pair as pages
from penult.report.palette import THEMES
from penult.report.scores import comparison, roc, separation, spread
from report.test_browser import BROWSER, WIDTHS, seen
from tiers import thin

HOSTILE = '<script>alert("&")</script>'
TITLES = ["The head", "Identity and laws", "Class geometry", "Real and sampled activations", "Outlier scores"]


class Reader(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.headings = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        self.headings += [int(tag[1])] if re.fullmatch(r"h\d", tag) else []

    def values(self, name, tag=None):
        return [value for own, key, value in self.attributes if key == name and tag in (None, own)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def head_of(k, d, seed=0, dtype=torch.float32):
    return penult.Head(3 * torch.randn(k, d, generator=generator(seed), dtype=dtype) / math.sqrt(d))


def acts_of(head, count, seed=1, labels=False, names=None, shift=0.0):
    h = torch.randn(count, head.in_features, generator=generator(seed), dtype=head.weight.dtype) + shift
    logits = head(h)
    y = torch.multinomial(logits.softmax(-1), 1, generator=generator(seed)).squeeze(1) if labels else None
    return penult.Activations(h, logits, y, names)


def small(k=4, d=6, count=60, base="elliptic", **options):
    head = head_of(k, d)
    pool = acts_of(head, 300, seed=9).activations
    law = {
        "elliptic": lambda: penult.Sphere.fit(head, pool, shape="elliptic"),
        "gaussian": lambda: penult.Gaussian.fit(head, pool),
        "bank": lambda: penult.Marginal.fit(head, pool, kind="bank"),
    }[base]()
    return penult.GenerativePair(head, law), acts_of(head, count, **options)


@pytest.fixture(scope="module", autouse=True)
def _little_training():
    """Tests of realism take a few steps: how good they are is tested where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_two_sample, "_STEPS", 3)
        yield


@pytest.fixture
def _undrawn(monkeypatch):
    """Pages whose figures are made, but not written, which takes most of the time."""
    monkeypatch.setattr(Section, "figure", lambda section, figure, caption, alt: section.text(caption))


@pytest.fixture(scope="module")
def full():
    """A page with one of everything, under hostile names, and what it was made of."""
    names = [HOSTILE, "a class with a name that is far longer than any place for it", "cost $5 and $6"]
    pair, familiar = small(k=3, count=240, labels=True, names=names)
    others = {HOSTILE: acts_of(pair.head, 80, 3, shift=1.0), "far": acts_of(pair.head, 5, 4, shift=9.0)}
    images = torch.rand(240, 1, 8, 8, generator=generator())
    given = {
        "images": images,
        "other_images": {
            HOSTILE: [(image, 0) for image in torch.rand(80, 3, 20, 30)],
            "far": torch.rand(5, 1, 200, 99),
        },
    }
    before = torch.random.get_rng_state()
    page, facts = pages.build(pair, familiar, others, **given, false_alarm=0.1)
    assert torch.equal(torch.random.get_rng_state(), before)
    return pair, familiar, others, page, facts


def test_all_sections_are_there_and_nothing_of_a_name_is_markup(full):
    page = full[3]
    assert [section.title for section in page.sections] == [*TITLES, "Most and least familiar inputs"]
    reader = Reader(page.html())
    assert "script" not in reader.tags
    assert not [key for _, key, _ in reader.attributes if key.startswith("on")]
    assert reader.headings == [1, *[2] * 7]
    loaded = [value for name in ("src", "href") for value in reader.values(name) if not value.startswith("#")]
    assert all(value.startswith("data:") for value in loaded)
    alts = reader.values("alt", "img")
    assert len(alts) == 8 * 4 + 5  # of the third set all five are at one end, and none are left for the other
    assert all(
        re.match(r"Input \d+ of .*, classified as .* with probability [01]\.\d\d, directional -?[\d.e+-]+, p-value", a)
        for a in alts
    )
    assert any(f"classified as {HOSTILE} with" in alt for alt in alts)
    scrolled = [value for tag, key, value in reader.attributes if (tag, key) == ("div", "class") and "scroll" in value]
    assert len(reader.values("tabindex", "div")) == len(scrolled)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("theme", THEMES)
def test_nothing_is_cut_in_either_theme_at_any_width(full, theme, tmp_path):
    for found, width in zip(seen(full[3], theme, tmp_path), WIDTHS, strict=True):
        assert found["width"] == width
        assert found["content"] <= width
        assert found["cut"] == []
        assert found["outside"] == []
        assert found["overlapping"] == []


def test_figures_are_those_of_the_library(full):
    pair, familiar, others, page, facts = full
    order = torch.randperm(240, generator=generator())
    rows = familiar.activations
    threshold = scores.Threshold.fit(scores.directional, rows[order[:120]], pair=pair, false_alarm=0.1)
    assert facts["score"] == "directional"
    assert facts["threshold"] == pytest.approx(threshold.value, abs=1e-5)
    assert facts["false_alarm_bound"] == threshold.rate_bound()
    assert facts["false_alarm_measured"] == threshold(rows[order[120:]]).double().mean()
    assert (facts["calibrated_on"], facts["judged"]) == (120, 120)
    for name, acts in others.items():
        found = facts["others"][name]
        assert found["strange"] == threshold(acts.activations).double().mean()
        truth = np.repeat([0, 1], [120, len(acts)])
        for each, score in {
            "directional": scores.directional,
            "max logit": scores.max_logit,
            "msp": scores.msp,
        }.items():
            both = torch.cat([score(pair, rows[order[120:]]), score(pair, acts.activations)])
            assert found["scores"][each]["auroc"] == pytest.approx(roc_auc_score(truth, both), abs=1e-6)
    assert set(facts["realism"]["auc"]) == {"logistic", "mlp", "knn"}
    assert facts["realism"]["labels"] == "stored"
    assert all(law["bar"] is None or law["measured"] <= law["bar"] for law in facts["laws"])
    assert "Some checks failed" not in page.html()


@pytest.mark.slow
def test_the_same_arguments_give_the_same_page():
    pair, familiar = small(k=2, count=40)
    first, second = (pages.page(pair, familiar).html() for _ in range(2))
    assert first == second


@pytest.mark.usefixtures("_undrawn")
def test_the_seed_counts():
    pair, familiar = small(k=2)
    assert pages.page(pair, familiar, seed=1).html() != pages.page(pair, familiar).html()


@pytest.mark.parametrize("k", thin([2, 20, 1000], keep=[2, 20]))
@pytest.mark.usefixtures("_undrawn")
def test_any_number_of_classes(k):
    pair, familiar = small(k=k, d=16)
    page = pages.page(pair, familiar, {"more": familiar})
    assert [section.title for section in page.sections] == TITLES
    text = page.html()
    assert ("opposite" in text) == (k == 2)
    assert ("closest pairs" in text) == (k == 1000)
    assert ("of the 8 most frequent classes" in text) == (k > 10)
    assert "Realism was not measured: " in text  # of sixty rows
    assert "Colours are predictions" in text


@pytest.mark.usefixtures("_undrawn")
def test_without_labels_they_are_drawn_and_colours_are_predictions():
    pair, familiar = small(k=2, d=3, count=200)
    page, facts = pages.build(pair, familiar, fitted=True)
    assert facts["realism"]["labels"] == "drawn"
    assert facts["others"] == {}
    assert page.html().count("was fitted to these very activations") == 2


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.parametrize(("base", "exact"), [("gaussian", "exact"), ("bank", "estimated")])
def test_other_bases_have_no_directions(base, exact):
    pair, familiar = small(base=base)
    page, facts = pages.build(pair, familiar, {"more": familiar})
    assert facts["score"] == "energy"
    assert list(facts["others"]["more"]["scores"]) == ["energy", "max logit", "msp"]
    assert f'<td class="l">{exact}' in page.html()
    assert len([law for law in facts["laws"] if "∇" in law["name"]]) == (exact == "exact")


@pytest.mark.usefixtures("_undrawn")
def test_another_score_can_be_asked_for():
    pair, familiar = small(count=40)
    assert pages.build(pair, familiar, score=scores.max_logit)[1]["score"] == "max logit"
    fitted = scores.KNN.fit(familiar, k=3)
    assert pages.build(pair, familiar, score=fitted)[1]["score"] == "KNN"


@pytest.mark.usefixtures("_undrawn")
@pytest.mark.usefixtures("_undrawn")
def test_the_page_says_whether_the_alarm_works():
    pair, familiar = small(count=400)
    same, far = acts_of(pair.head, 300, 5), acts_of(pair.head, 300, 6, shift=9.0)
    page, facts = pages.build(pair, familiar, {"far": far})
    assert "<strong>The alarm works.</strong> False alarms on familiar inputs" in page.html()
    assert "% of “far”" in page.html()
    assert facts["others"]["far"]["hardly_separated"] is False

    page, facts = pages.build(pair, familiar, {"same": same, "far": far})
    assert "<strong>Of 2 other sets, the alarm works on 1, hardly works on 1.</strong>" in page.html()
    assert "“same” is hardly told apart from familiar inputs" in page.html()
    assert "None of the compared scores does better" in page.html()
    assert facts["others"]["same"]["hardly_separated"] is True
    assert facts["others"]["same"]["better_score"] is None

    halves = penult.Activations(torch.cat([far.activations[:90], same.activations[:210]]), torch.zeros(300, 4))
    page, facts = pages.build(pair, familiar, {"halves": halves})
    assert "<strong>The alarm works in part.</strong>" in page.html()

    page, facts = pages.build(pair, familiar, {"far": far}, score=lambda h: 0 * h.sum(-1))
    assert "<strong>The alarm hardly works.</strong>" in page.html()
    assert "none of 300 (below 0.99 % with 95 % confidence) are above" in page.html()
    assert facts["others"]["far"]["better_score"] == "directional"
    assert "<em>directional</em> does better (AUROC" in page.html()

    assert "Whether the alarm detects outliers was not measured" in pages.page(pair, familiar).html()


@pytest.mark.usefixtures("_undrawn")
def test_a_score_that_was_fitted_to_the_familiar_activations_is_named():
    pair, familiar = small(count=100)
    score = scores.Composite.fit(pair, familiar)
    assert "The score was fitted to these very activations" in pages.page(pair, familiar, score=score).html()
    other = scores.Composite.fit(pair, acts_of(pair.head, 100, 5))
    page, facts = pages.build(pair, familiar, {"far": acts_of(pair.head, 50, 6, shift=9.0)}, score=other)
    assert "was fitted to these very activations" not in page.html()
    compared = {"Composite", "energy", "max logit", "msp", "direction alone", "distance alone"}
    assert set(facts["others"]["far"]["scores"]) == compared


def test_pre_activations_are_read_as_the_head_reads_them():
    pair, familiar = small()
    before = penult.Activations(familiar.activations, pair.head(familiar.activations.relu()), pre_activation=True)
    after = penult.Activations(familiar.activations.relu(), before.logits)
    one, other = (pages.build(pair, acts)[1] for acts in (before, after))
    assert one["threshold"] == other["threshold"]
    assert next(law for law in one["laws"] if "stored" in law["name"])["measured"] < 1e-6


@pytest.mark.usefixtures("_undrawn")
def test_halves_are_read_by_a_head_in_double_precision():
    pair, familiar = small()
    wide = penult.GenerativePair(pair.head.clone().double(), pair.base.double())
    halves = penult.Activations(familiar.activations.half(), familiar.logits.half())
    facts = pages.build(wide, halves)[1]
    assert all(law["bar"] is None or law["measured"] <= law["bar"] for law in facts["laws"])


@pytest.mark.usefixtures("_undrawn")
def test_a_wrong_normaliser_is_told():
    class Wrong(penult.Sphere):
        def log_mgf(self, weight):
            return 1.3 * super().log_mgf(weight)

    pair, familiar = small()
    base = pair.base
    wrong = Wrong(base.radius, base.loc, base.scale_tril, log_weights=base.log_weights)
    assert "Some checks failed" in pages.page(penult.GenerativePair(pair.head, wrong), familiar).html()


@pytest.mark.usefixtures("_undrawn")
def test_bad_input_says_what_to_do():
    pair, familiar = small()
    constant = penult.Activations(familiar.activations[:1].expand(60, 6), familiar.logits[:1].expand(60, 4))
    broken = penult.Activations(familiar.activations.clone().fill_(math.nan), familiar.logits)
    other = acts_of(head_of(4, 7), 60)
    for arguments, options, message in [
        ((constant,), {}, "all 60 familiar activations are the same"),
        ((familiar[:39],), {}, "39 familiar activations.*at least 40"),
        ((familiar,), {"false_alarm": 0.001}, "at least 1997, because.*Give more, or allow more"),
        ((familiar,), {"false_alarm": 0.0}, "between 0 and 1"),
        ((other,), {}, "dimension 7 and 4 classes, but the head reads 6"),
        ((broken,), {}, "'familiar'.*NaN or infinity"),
        ((familiar, {"x": familiar[:0]}), {}, r"'x' has shape \(0, 6\)"),
        ((familiar, {"familiar": familiar}), {}, "expected names that are neither empty nor 'familiar'"),
        ((familiar,), {"images": torch.rand(3, 1, 8, 8)}, "60 activations and 3 images"),
        ((familiar,), {"other_images": {"x": []}}, "'x'; expected only names of other sets"),
        ((familiar,), {"score": lambda pair, h: h[:, 0] * math.nan}, "and 60 NaN"),
        ((familiar,), {"images": torch.rand(60, 2, 8, 8)}, "thumbnail"),
    ]:
        with pytest.raises(ValueError, match=message):
            pages.page(pair, *arguments, **options)
    for arguments, options in [((familiar.activations,), {}), ((familiar,), {"score": "energy"})]:
        with pytest.raises(TypeError):
            pages.page(pair, *arguments, **options)
    with pytest.raises(TypeError, match="GenerativePair"):
        pages.page(pair.head, familiar)


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (torch.rand(1, 8, 8), (96, 96)),
        (torch.rand(3, 32, 16), (48, 96)),
        (torch.rand(60, 80), (80, 60)),
        (torch.randint(0, 256, (3, 300, 600), dtype=torch.uint8), (96, 48)),
        (5 * torch.randn(1, 1, 1), (96, 96)),
    ],
)
def test_thumbnails(image, size):
    data, width, height = thumbnails.png(image)
    opened = Image.open(BytesIO(data))
    assert opened.size == (width, height) == size
    assert opened.mode == ("RGB" if image.ndim == 3 and len(image) == 3 else "L")


def test_small_images_keep_their_pixels():
    image = torch.rand(1, 8, 8)
    shown = np.asarray(Image.open(BytesIO(thumbnails.png(image)[0])))
    assert np.array_equal(shown[6::12, 6::12], (image[0] * 255).round().numpy())
    wide = torch.tensor([[-1.0, 3.0]])  # stretched
    assert sorted(set(np.asarray(Image.open(BytesIO(thumbnails.png(wide)[0]))).ravel())) == [0, 255]


def test_figures_of_scores_take_what_comes():
    figure = spread({"a": [1.0, 1.0], "b": [math.inf, -math.inf]}, 2.0, "score")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "threshold"]
    assert len(spread({"a": [1.0]}, None, "score").legends[0].get_texts()) == 1
    found = penult.scores.compare(
        {"one": lambda h: h[:, 0], "other": lambda h: -h[:, 0]},
        torch.zeros(1, 2),
        {"a": torch.ones(1, 2), "b": torch.zeros(3, 2)},
    )
    assert "other" in house.svg(comparison(found), alt="points")
    assert "chance" in house.svg(roc({"a": separation([1.0, 2.0], [1.5, 3.0])}), alt="curves")


def test_points_of_no_colour_are_named():
    figure = plots.scatter([[0, 0], [1, 1]], [0, -1], ["cat"], rest="other classes")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "other classes"]
