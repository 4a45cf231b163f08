"""Realism of the samples of each base, on seven networks.

The bases are fitted without labels to half of a network's test activations (EfficientNet-Lite0: 20,000 of 24,000).
Their samples are compared with the other half by `penult.realism`, class by true class, with real activations against
real ones as the reference, for three seeds of the split. Marginals are fitted with the head at the temperature that
fits the labels of the first half (`Head.calibrate`), the other bases with the unchanged head.

Some bases are defined only in this script: ``data-free + BN``, the sphere without data with the mean computed from
the BatchNorm statistics of the network; ``marginal ML``, the Gaussian and the elliptic sphere fitted by the
likelihood of their true marginal instead of soft labels; and ``mixture, 100/24``, ``mixture, 16/64`` and ``mixture,
plain``, mixtures of other sizes, and one that is neither rectified nor positive.

Networks and their activations are those of `networks.py`, which prepares them if they are not in the cache. A run
that was stopped continues: the results for one network and seed are stored in the cache.

Example:
    python benchmarks/realism.py --data ../shared/data --cache /tmp/penult-cache
    python benchmarks/realism.py --data ../shared/data --cache /tmp/penult-cache --only mnist-relu --jobs 1
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import networks
import penult
import tables
from penult.bases import Base, Gaussian, Marginal, Sphere
from penult.bases._sphere_fit import RadialHistogram
from penult.distributions import Bank, PrincipalMixture
from penult.realism._compare import RealStatistics, measure, measure_real
from penult.realism._matched_rows import source_with_labels
from record import load, machine, short, versions, write

HERE = Path(__file__).resolve().parent
LAYOUT = 1  # of the JSON file
SEEDS = (0, 1, 2)
PER_CLASS = 250
PACKAGES = ("torch", "scikit-learn", "zuko")
BARS = {  # of AUCs: of each test, and how far real against real may be from 0.5
    "real": 0.03,
    "mixture": {"logistic": 0.60, "mlp": 0.70, "knn": 0.70, "floats": 40_000},
    "bank": {"logistic": 0.60},
    "gaussian": {"logistic": 0.75},
    "rectified": {"mlp": 0.70},
    "goal": {"mlp": 0.60, "knn": 0.60, "floats": 40_000},
}


@dataclass
class Case:
    """One network and one split.

    Attributes:
        name: The network.
        model: The network itself.
        head: Its head.
        calibrated: The head at its temperature.
        fit: Activations to fit to.
        test: Activations to compare with.
        plain: `fit`, as the head reads it; differs for pre-activations.
    """

    name: str
    model: nn.Module
    head: penult.Head
    calibrated: penult.Head
    fit: penult.Activations
    test: penult.Activations
    plain: Tensor


Fit = Callable[[Case], Base]


# --- bases that are the script's own ------------------------------------------------------------------------


def data_free(case: Case, batchnorm: bool = False) -> Base:
    """`Sphere.from_head`, with the mean of BatchNorm statistics outside of span(W)."""
    base = Sphere.from_head(case.head)
    if not batchnorm:
        return base
    mean = batchnorm_mean(case.model)
    span = case.head.span()
    outside = mean - mean @ span.T @ span
    return Sphere(base.radius, loc=outside, subspace=span, log_weights=base.log_weights)


def batchnorm_mean(model: nn.Module) -> Tensor:
    """Mean activation (d,) of a ResNet by its BatchNorm parameters alone, each map taken for independent normals."""

    def rectified(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        sd = variance.clamp_min(1e-12).sqrt()
        a = mean / sd
        cdf, bell = torch.special.ndtr(a), torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
        first = mean * cdf + sd * bell
        return first, ((mean.square() + variance) * cdf + mean * sd * bell - first.square()).clamp_min(0)

    mean, variance = rectified(model.bn1.bias.double(), model.bn1.weight.double().square())
    for block in (*model.layer1, *model.layer2, *model.layer3):
        pad = (block.padding, block.padding)
        mean, variance = nn.functional.pad(mean, pad), nn.functional.pad(variance, pad)
        mean, variance = rectified(mean + block.bn2.bias, variance + block.bn2.weight.double().square())
    return mean.float().detach()


def gaussian_by_marginal(case: Case, steps: int = 300) -> Base:
    """Maximises the mean of log m(h) + logsumexp(logits) − log Z over m = N(loc, L L'), from the closed form."""
    start = Gaussian.fit(case.head, case.plain)
    h, weight, bias = case.plain, case.head.centered_weight(), case.head.full_bias
    loc = start.loc.clone().requires_grad_()
    raw = torch.linalg.cholesky(start.covariance_matrix)
    log_diagonal = raw.diagonal().log().clone().requires_grad_()
    below = raw.tril(-1).clone().requires_grad_()
    constant = torch.logsumexp(h @ weight.T + bias, -1).mean()
    optimizer = torch.optim.LBFGS([loc, log_diagonal, below], max_iter=steps, line_search_fn="strong_wolfe")

    def factor() -> Tensor:
        return below.tril(-1) + torch.diag(log_diagonal.exp())

    def loss() -> Tensor:
        optimizer.zero_grad()
        root = factor()
        z = torch.linalg.solve_triangular(root, (h - loc).T, upper=False)
        log_m = -0.5 * z.square().sum(0).mean() - log_diagonal.sum()
        log_z = torch.logsumexp(bias + weight @ loc + 0.5 * (weight @ root).square().sum(-1), -1)
        value = -(log_m + constant - log_z)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    root = factor().detach()
    return Gaussian(loc.detach(), root @ root.T)


def elliptic_by_marginal(case: Case, steps: int = 200) -> Base:
    """The same for the elliptic sphere: centre and shape by the likelihood of direction given radius.

    The radius r = |u|, u = L^-1 (h - c), is log-normal for the fit; the base then takes the observed radii.
    """
    start = Sphere.fit(case.head, case.plain, shape="elliptic")
    d, weight, bias = case.head.in_features, case.head.centered_weight(), case.head.full_bias
    h, logits = case.plain, case.head.centered_logits(case.plain)
    centre = start.loc.clone().requires_grad_()
    log_diagonal = start.scale_tril.diagonal().log().clone().requires_grad_()
    below = start.scale_tril.tril(-1).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([centre, log_diagonal, below], max_iter=steps, line_search_fn="strong_wolfe")

    def read() -> tuple[Tensor, Tensor, Tensor]:
        root = below.tril(-1) + torch.diag(log_diagonal.exp())
        r = torch.linalg.solve_triangular(root, (h - centre).T, upper=False).norm(dim=0)
        kappa = (weight @ root).norm(dim=-1)
        return root, r, kappa

    def normaliser(r: Tensor, kappa: Tensor) -> Tensor:
        mgf = penult.special.log_sphere_mgf(d, r.unsqueeze(-1) * kappa)
        return torch.logsumexp(bias + weight @ centre + mgf, -1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        _, r, kappa = read()
        log_r = r.log()
        value = log_r.std().log() + d * log_r.mean() + log_diagonal.sum()
        value = value - (logits.logsumexp(-1) - normaliser(r, kappa)).mean()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        root, r, kappa = read()
        histogram = RadialHistogram()
        histogram.update(r)
        radii, shares = histogram.atoms(256)
        log_weights = shares.log() - normaliser(radii.to(r), kappa).double()
        return Sphere(radii.to(r), centre.detach(), root, log_weights=log_weights.to(r))


def bank(case: Case) -> Base:
    """Without replacement: a row drawn twice would lie in both halves of a test, and give the draws away."""
    base = Marginal.fit(case.calibrated, case.fit, kind="bank")
    return Marginal(case.calibrated, Bank(base.distribution.activations, replacement=False))


def marginal(case: Case, plain: bool = False, **options: Any) -> Base:
    """`Marginal.fit` on the calibrated head."""
    if plain:
        options |= {"rectified": False, "positive": False}
    return Marginal.fit(case.calibrated, case.plain if plain else case.fit, **options)


LAWS: dict[str, Fit] = {
    "data-free sphere": data_free,
    "data-free + BN": partial(data_free, batchnorm=True),
    "sphere": lambda case: Sphere.fit(case.head, case.plain),
    "elliptic": lambda case: Sphere.fit(case.head, case.plain, shape="elliptic"),
    "gaussian": lambda case: Gaussian.fit(case.head, case.plain),
    "gaussian, marginal ML": gaussian_by_marginal,
    "elliptic, marginal ML": elliptic_by_marginal,
    "class": partial(marginal, kind="class"),
    "mixture, plain": partial(marginal, plain=True),
    "mixture, 100/24": partial(marginal, components=100, dims=24),
    "mixture, 16/64": partial(marginal, components=16, dims=64),
    "mixture": marginal,
    "flow": partial(marginal, kind="flow"),
    "bank": bank,
}
LARGE: dict[str, Fit] = {  # for K = 1000 and d = 1280
    **{name: LAWS[name] for name in ("data-free sphere", "sphere", "elliptic", "gaussian", "class")},
    "mixture": marginal,
    "mixture, 100/256": partial(marginal, components=100, dims=256),
    "mixture, 400/64": partial(marginal, components=400, dims=64),
    "bank": bank,
}


def laws_of(name: str) -> dict[str, Fit]:
    """The bases that are fitted to a network."""
    if name == "efficientnet-lite0":
        return LARGE
    return {law: fit for law, fit in LAWS.items() if law != "data-free + BN" or name.startswith("cifar")}


# --- measuring ----------------------------------------------------------------------------------------------


def case_of(name: str, seed: int, data: Path, cache: Path) -> Case:
    """The split of a seed."""
    pre = name == "mnist-relu"
    acts = networks.activations(name, data, cache, pre_activation=pre)
    shares = (5 / 6, 1 / 6) if acts.labels is None else (0.5, 0.5)
    fit, test = acts.split(*shares, seed=seed)
    head = networks.head(name, data, cache)
    calibrated = head if fit.labels is None else head.calibrate(fit.logits, fit.labels)
    rows = fit.activations
    return Case(
        name, networks.model(name, data, cache), head, calibrated, fit, test, rows.clamp_min(0) if pre else rows
    )


def statistics_of(head: penult.Head, case: Case, seed: int) -> RealStatistics:
    """Compute the statistics of the real activations."""
    generator = torch.Generator().manual_seed(seed)
    source, label_origin = source_with_labels(head, case.test, None, generator)
    other, _ = source_with_labels(head, case.fit, None, generator, label_origin == "drawn", "reference")
    return measure_real(source, label_origin, other, seed, PER_CLASS)


def facts_of(case: Case, real: RealStatistics, seed: int) -> dict[str, Any]:
    """What is known of a network without any base."""
    tests = real.two_sample_tests(seed)
    side, collapse = tests.average or tests.pooled, real.collapse
    return {
        "temperature": short(case.calibrated.temperature),
        "accuracy": None if real.accuracy is None else short(real.accuracy),
        "confidence": short(real.confidence),
        "ece": None if real.ece is None else short(real.ece),
        "auc": {test: short(value) for test, value in side.auc.items()},
        "energy": short(side.energy),
        "tilt_identity": None if real.tilt_identity.ratio is None else short(real.tilt_identity.ratio),
        "weight_norm_cv": short(collapse.weight_norm_cv),
        "alignment": [short(collapse.mean_alignment_raw), short(collapse.mean_alignment_centered)],
        "zeros": short(float((case.plain == 0).float().mean())),
        "fitted": len(case.fit),
        "held_out": len(case.test),
    }


def measured(fit: Fit, case: Case, sides: dict[int, RealStatistics], seed: int) -> dict[str, Any]:
    """One base."""
    start = time.process_time()
    base = fit(case)
    seconds = time.process_time() - start
    head = base.head if isinstance(base, Marginal) else case.head
    if id(head) not in sides:
        sides[id(head)] = statistics_of(head, case, seed)
    pair = penult.GenerativePair(head, base)
    found = measure(pair, sides[id(head)], seed)
    floats = base.num_parameters if isinstance(base, Marginal) else sum(b.numel() for b in base.state_dict().values())
    chart = found.chart_cosine
    return {
        "auc": {test: short(value) for test, value in found.auc.items()},
        "pooled": {test: short(value) for test, value in found.pooled.auc.items()},
        "energy": short(found.energy),
        "floats": floats,
        "seconds": short(seconds, 3),
        "accuracy": short(found.calibration.drawn_accuracy),
        "confidence": short(found.calibration.drawn_confidence),
        "ece": short(found.calibration.drawn_ece),
        "effective_classes": short(found.prior.effective_classes),
        "norm_distance": short(found.norm.distance),
        "cosine": [short(found.cosine.real_mean), short(found.cosine.drawn_mean)],
        "chart_cosine": None if chart is None else [short(chart.real_mean), short(chart.law_mean or math.nan)],
        "least": short(float(pair.sample((1000,), generator=torch.Generator().manual_seed(seed))[0].min())),
    }


def run_group(name: str, seed: int, data: Path, cache: Path, fresh: bool) -> tuple[str, int, dict[str, Any]]:
    """One network and seed, base by base, kept in the cache after each."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # of fitting to rectified activations, which is done on purpose
    path = cache / "realism" / f"{name}-{seed}.json"
    stamp = {"layout": LAYOUT, "versions": versions(PACKAGES), "per_class": PER_CLASS}
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not fresh else {}
    if kept.get("stamp") != stamp:
        kept = {"stamp": stamp, "network": None, "laws": {}}
    missing = [law for law in laws_of(name) if law not in kept["laws"]]
    if missing or kept["network"] is None:
        case = case_of(name, seed, data, cache)
        sides = {id(case.head): statistics_of(case.head, case, seed)}
        kept["network"] = facts_of(case, sides[id(case.head)], seed)
        for law in missing:
            kept["laws"][law] = measured(laws_of(name)[law], case, sides, seed)
            write(path, kept)
            print(f"{name} {seed} {law}: {kept['laws'][law]['auc']}", flush=True)
    return name, seed, kept


# --- what rare classes cost, and whose expectation maximisation ---------------------------------------------


def rare(data: Path, cache: Path) -> dict[str, Any]:
    """CPU time of class draws: classes of prior 1e-2 to 1e-6, and 20 draws of each of 1000 classes."""
    torch.set_num_threads(1)
    case = case_of("cifar-resnet32", 0, data, cache)
    law = Marginal.fit(case.calibrated, case.fit).distribution
    rows, draws = {}, 10
    for prior in (1e-2, 1e-4, 1e-6):
        bias, off = case.calibrated.full_bias.clone(), 0.0
        for _ in range(20):  # the bias that makes class 0 so rare
            head = case.calibrated.with_bias(bias + off * nn.functional.one_hot(torch.tensor(0), 10))
            base = Marginal(head, law)
            off += math.log(prior) - float(base.log_prior[0])
        start = time.process_time()
        base.tilt(head.centered_weight(torch.tensor(0))).sample((draws,), generator=torch.Generator().manual_seed(0))
        rows[f"{prior:g}"] = short((time.process_time() - start) / draws, 3)
    large = case_of("efficientnet-lite0", 0, data, cache)
    thousand = {}
    for kind in ("mixture", "bank"):
        base = Marginal.fit(large.head, large.fit, kind=kind)
        labels = torch.arange(1000).repeat_interleave(20)
        start = time.process_time()
        h = base.draw(large.head.centered_weight(), labels, torch.Generator().manual_seed(0))
        thousand[kind] = {
            "seconds": short(time.process_time() - start, 3),
            "draws": len(h),
            "least_prior": short(float(base.log_prior.exp().min()), 3),
        }
    return {"seconds_a_draw": rows, "thousand_classes": thousand}


def expectation_maximisation(data: Path, cache: Path) -> dict[str, Any]:
    """Ours beside scikit-learn's `GaussianMixture`, on the same principal components: CPU time and held-out nats."""
    from sklearn.mixture import GaussianMixture

    torch.set_num_threads(1)
    cells: dict[str, Any] = {}
    for name in ("cifar-resnet32", "mnist-linear"):
        for components, dims in ((32, 45), (100, 24)):
            ours, theirs = [], []
            for seed in SEEDS:
                case = case_of(name, seed, data, cache)
                start = time.process_time()
                law = PrincipalMixture.fit(case.plain, components, dims, seed=seed)
                spent = time.process_time() - start
                rows = (case.plain, case.test.activations)
                seen, judged = (((some - law.loc) @ law.components.T).double() for some in rows)
                own = PrincipalMixture(  # in the plane alone
                    torch.zeros(dims).double(), torch.eye(dims).double(), law.logits.double(), law.means.double(),
                    law.scale_tril.double(), torch.zeros(()).double(),
                )  # fmt: skip
                ours.append((spent, float(own.log_prob(judged).mean())))
                start = time.process_time()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    other = GaussianMixture(components, max_iter=100, tol=1e-3, random_state=seed).fit(seen.numpy())
                theirs.append((time.process_time() - start, float(other.score(judged.numpy()))))
            cells[f"{name}, {components} in {dims}"] = {
                who: {
                    "seconds": short(sum(s for s, _ in runs) / len(runs), 3),
                    "nats": short(sum(n for _, n in runs) / len(runs)),
                }
                for who, runs in (("penult", ours), ("scikit-learn", theirs))
            }
    return cells


# --- the command line ---------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print."""
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files and published weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder for networks, activations and finished parts")
    parser.add_argument("--only", action="append", help="only this network, `rare` or `em` (repeatable; default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the split")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes, with one thread each")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "realism.json", help="results file")
    options = parser.parse_args(arguments)
    known = [*networks.NETWORKS, "rare", "em"]
    wanted = options.only or known
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
    results = load(options.out, "realism", LAYOUT)

    def section(name: str) -> dict[str, Any]:
        found: dict[str, Any] = results["sections"].setdefault(name, {"cells": {}})
        found |= {"settings": {"seed": list(SEEDS), "per_class": PER_CLASS}, "versions": versions(PACKAGES)}
        found["machine"] = machine() | {"threads_used": 1}
        return found

    groups = [(name, seed) for seed in options.seeds for name in networks.NETWORKS if name in wanted]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        work = [pool.submit(run_group, *group, options.data, options.cache, options.fresh) for group in groups]
        for done in as_completed(work):
            name, seed, kept = done.result()
            section("realism")["bars"] = BARS
            cell = section("realism")["cells"].setdefault(name, {})
            cell[str(seed)] = {"network": kept["network"], "laws": {law: kept["laws"][law] for law in laws_of(name)}}
            write(options.out, results)
    for name, run in (("rare", rare), ("em", expectation_maximisation)):
        if name in wanted and (options.fresh or not results["sections"].get(name, {}).get("cells")):
            section(name)["cells"] = run(options.data, options.cache)
            write(options.out, results)
    tables.show("realism", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
