import json
import re

import pytest
import torch

import penult
import penult.generate
from penult import demo
from penult.data import digits
from penult.demo.networks import DigitsNet, DigitsStudent
from penult.testing import check_base, check_pair


def the_classifier_learns_and_its_head_is_found(finished):
    assert finished.results["classifier"]["test_accuracy"] > 0.95
    certificate = finished.head.certificate
    assert certificate.path == "fc"
    assert certificate.support == "orthant"
    assert certificate.residual < 1e-6


def the_identity_holds(finished):
    assert finished.results["identity"]["float32"] <= 1e-5
    assert finished.results["identity"]["float64"] <= 1e-9


def every_pair_of_a_trained_classifier_keeps_its_laws(finished):
    assert len(finished.pairs) == 5
    for pair in finished.pairs.values():
        check_pair(pair, samples=20_000)
        check_base(pair.base, pair.head, samples=10_000)


def draws_without_data_are_classified_as_asked(finished):
    facts = finished.results["without_data"]
    assert facts["dimension"] == 9
    assert facts["accuracy"] > 0.85
    assert facts["confidence"] == pytest.approx(0.95, abs=0.02)
    assert 0.4 < facts["radius"] / facts["real_norm_in_span"] < 2.5


def span_is_closer_to_real_activations_than_the_ambient_sphere(finished):
    fit = finished.results["fit"]
    gaps = {name: abs(f["cosine_real"] - f["cosine_law"]) for name, f in fit.items()}
    assert gaps["span(W), round"] < gaps["R^d, round"]
    for facts in fit.values():
        assert facts["accuracy"] == pytest.approx(facts["confidence"], abs=0.05)  # exact pairs are calibrated


def bases_are_ranked_and_the_best_model_of_them_goes_on(finished):
    bases = finished.results["bases"]
    worst = {name: abs(bases[name]["worst_auc"] - 0.5) for name in ("sphere", "gaussian", "mixture", "bank")}
    assert max(worst["bank"], worst["mixture"]) < worst["sphere"]
    assert max(bases["bank"]["auc"].values()) < 0.7  # real activations, but for which of them were drawn
    assert bases["sphere"]["worst_auc"] > 0.95
    assert bases["fitted"] == finished.chosen
    assert finished.chosen in ("mixture", "class")
    page = (finished.out / "index.html").read_text()
    for name, row in bases.items():
        if name not in ("best", "fitted", "real"):
            assert f"{row['worst_auc']:.3f}" in page
            assert f"{row['floats']:,}" in page


def draws_of_the_chosen_pair_are_classified_as_real_ones(finished):
    real, pair = finished.test_activations, finished.pairs[finished.chosen]
    drawn = pair.given(real.labels).sample(generator=torch.Generator().manual_seed(0))
    right = [float((pair.head(h).argmax(-1) == real.labels).double().mean()) for h in (drawn, real.activations)]
    assert right[0] == pytest.approx(right[1], abs=0.05)


def students_under_a_shift(finished):
    found = finished.results["distill"]
    assert list(found) == ["no shift", "texture", "inversion"]
    mean = {name: {m: sum(each) / len(each) for m, each in facts["students"].items()} for name, facts in found.items()}
    page = (finished.out / "index.html").read_text()
    for name, facts in found.items():
        assert set(mean[name]) == {"cross-entropy", "Hinton", "FitNets", "gated, soft", "gated, hinted"}
        assert facts["gate"]["rows"] == 200
        assert all(f"{each:.1%}" in page for each in (facts["teacher"], *mean[name].values()))
    assert found["no shift"]["teacher"] > 0.95
    assert 0.35 < found["texture"]["teacher"] < 0.65
    assert found["inversion"]["teacher"] < 0.35
    for name in ("texture", "inversion"):  # few seeds: what a user sees must hold by far
        for ours in ("gated, soft", "gated, hinted"):
            assert mean[name][ours] > mean[name]["Hinton"] + 0.15
            assert mean[name][ours] > mean[name]["cross-entropy"] - 0.04
        assert found[name]["gate"]["belief"] < 0.5 < found["no shift"]["gate"]["belief"]


def images_of_every_class(finished):
    found, test = finished.results["generate"], finished.test
    chosen = finished.chosen
    laws = ("bank", chosen, f"{chosen}, confident")
    rows = {f"{name}, {law}" for name in ("VAE", "GAN") for law in laws}
    assert set(found) == rows | {"VAE, sphere without data", "real images"}
    assert found["real images"]["accuracy"] > 0.95
    without = found["VAE, sphere without data"]
    for name in ("VAE", "GAN"):  # by far: few images, one seed
        assert found[f"{name}, {chosen}"]["accuracy"] > 0.88
        assert found[f"{name}, {chosen}, confident"]["accuracy"] > 0.93
        for law in ("bank", chosen):
            assert found[f"{name}, {law}"]["frechet"] < without["frechet"] / 2
            assert found[f"{name}, {law}"]["coverage"] > without["coverage"] + 0.15
            assert found[f"{name}, {law}"]["cas"] > 0.7
    page = (finished.out / "index.html").read_text()
    assert all(f"{facts['frechet']:.3g}" in page for facts in found.values())
    varied = finished.results["generate_variety"]
    assert all(0 < share < 1 and f"{share:.0%} " in page for share in varied.values())

    y = torch.arange(10).repeat_interleave(20)
    for name, kind in (("vae", penult.generate.ActivationVAE), ("gan", penult.generate.ActivationGAN)):
        generator = penult.generate.load(finished.out / f"digits-{name}.safetensors")  # no classifier, no data
        assert isinstance(generator, kind)
        assert generator.stored_activations == 0
        drawn = generator.generate(y, confident=0.9, generator=torch.Generator().manual_seed(0))
        assert drawn.shape == (200, *test.images.shape[1:])
        with torch.no_grad():
            assert float((finished.model(drawn).argmax(-1) == y).double().mean()) > 0.9


def strangers_are_told_and_familiar_digits_mostly_pass(finished):
    found = finished.results["scores"]
    assert found["strange"].pop("digits") < 0.13  # of 180, where 0.05 is asked for
    assert set(found["strange"]) == set(found["auroc"])
    assert len(found["auroc"]) == 6
    for name in ("rotated by 45°", "heavy texture", "scrambled", "noise"):
        assert found["auroc"][name]["composite"] > 0.85
        assert found["strange"][name] > 0.4
    means = {s: sum(each[s] for each in found["auroc"].values()) for s in ("composite", "energy")}
    assert means["composite"] > means["energy"]


def the_page_is_whole_and_loads_nothing(finished):
    page = (finished.out / "index.html").read_text()
    for title in (
        "A classifier",
        "Its head",
        "Activations without data",
        "Fitted without labels",
        "Which base",
        "A student under a domain shift",
        "Images of every class, without labels",
        "Outlier scores",
        "One file, no model",
    ):
        assert title in page
    assert page.count("<svg") >= 10
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    names = sorted(p.name for p in finished.out.iterdir())
    assert names == [
        "activations.png", "digits-gan.safetensors", "digits-vae.safetensors", "digits.penult.safetensors",
        "index.html",
    ]  # fmt: skip


def the_pair_is_read_without_the_model(finished):
    pair = penult.load(finished.out / "digits.penult.safetensors")
    h = finished.test_activations.activations
    assert torch.allclose(pair.posterior(h).probs, finished.test_activations.logits.softmax(-1), atol=1e-5)
    score = penult.scores.load(finished.out / "digits.penult.safetensors")
    assert torch.allclose(score(h), finished.score(h), atol=1e-5)
    assert finished.results["file"]["log_prob_error"] < 1e-3  # of values around a hundred, in float32
    json.dumps(finished.results)


def test_the_whole_demo(tmp_path):
    """One run, and all that holds of it: it is what users see first, so it is run as they run it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    state = torch.random.get_rng_state()
    finished = demo.run(tmp_path, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.set_num_threads(threads)
    for check in (
        the_classifier_learns_and_its_head_is_found,
        the_identity_holds,
        every_pair_of_a_trained_classifier_keeps_its_laws,
        draws_without_data_are_classified_as_asked,
        span_is_closer_to_real_activations_than_the_ambient_sphere,
        bases_are_ranked_and_the_best_model_of_them_goes_on,
        draws_of_the_chosen_pair_are_classified_as_real_ones,
        students_under_a_shift,
        images_of_every_class,
        strangers_are_told_and_familiar_digits_mostly_pass,
        the_page_is_whole_and_loads_nothing,
        the_pair_is_read_without_the_model,
    ):
        check(finished)


def test_digits_and_their_parts():
    whole = digits()
    assert whole.images.shape == (1797, 1, 8, 8)
    assert 0 <= float(whole.images.min()) < float(whole.images.max()) == 1
    assert whole.class_names == tuple("0123456789")
    parts = whole.split(0.6, 0.2, 0.2, seed=3)
    assert sum(len(p.labels) for p in parts) == 1797
    assert torch.equal(parts[1].images, whole.split(0.6, 0.2, 0.2, seed=3)[1].images)
    assert not torch.equal(parts[0].labels, whole.split(0.6, 0.2, 0.2, seed=4)[0].labels)
    assert len(whole.split(0.1)[0].labels) == 180
    with pytest.raises(ValueError, match="sum to at most 1"):
        whole.split(0.9, 0.2)


def test_the_network_takes_digits():
    assert DigitsNet(width=16)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    student = DigitsStudent(classes=4)
    assert student(torch.zeros(3, 1, 8, 8)).shape == (3, 4)
    assert student.features(torch.zeros(3, 1, 8, 8)).shape == (3, student.features_out)
