"""Fit a mixture of von Mises-Fisher distributions by gradient descent on the likelihood, without EM.

torch's MixtureSameFamily accepts VonMisesFisher, and log_prob has gradients with respect to every parameter.

Run: python examples/vmf_mixture.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily
from torch.nn.functional import normalize

from penult import VonMisesFisher


def mixture(logits: Tensor, directions: Tensor, log_kappa: Tensor) -> MixtureSameFamily:
    """Return the mixture with weights softmax(logits) (K,), means normalize(directions) (K, d), concentrations (K,)."""
    components = VonMisesFisher(normalize(directions, dim=-1), log_kappa.exp())
    return MixtureSameFamily(Categorical(logits=logits), components)


def fit(x: Tensor, components: int, steps: int = 150) -> MixtureSameFamily:
    """Fit a mixture to unit vectors (N, d), starting from data points that are far from each other."""
    means = x[:1]
    for _ in range(1, components):
        means = torch.cat([means, x[(x @ means.T).amax(-1).argmin()].unsqueeze(0)])
    directions = means.clone().requires_grad_()
    logits = torch.zeros(components, requires_grad=True)
    log_kappa = torch.full((components,), 2.0, requires_grad=True)
    optimizer = torch.optim.Adam([logits, directions, log_kappa], lr=0.05)
    for step in range(steps):
        loss = -mixture(logits, directions, log_kappa).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:3}  mean log-likelihood {-loss.item():.4f}")
    return mixture(logits.detach(), directions.detach(), log_kappa.detach())


if __name__ == "__main__":
    torch.manual_seed(0)
    truth = mixture(torch.tensor([0.5, 0.3, 0.2]).log(), torch.randn(3, 16), torch.tensor([20.0, 50.0, 100.0]).log())
    x = truth.sample((2000,))
    fitted = fit(x, components=3)
    order = fitted.mixture_distribution.probs.argsort(descending=True)
    components = fitted.component_distribution
    cosines = (components.loc[order] * truth.component_distribution.loc).sum(-1)
    print(f"truth: mean log-likelihood {truth.log_prob(x).mean():.4f}")
    print("weights       ", fitted.mixture_distribution.probs[order].tolist())
    print("concentrations", components.concentration[order].tolist())
    print("cosine between each mean and the true one", cosines.tolist())
