"""Chart of a sphere: coordinates of activations in which the sphere is round."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penult import special
from penult._checks import check_finite
from penult.head import Head

__all__ = ["Chart"]


class Chart(NamedTuple):
    """Coordinates u of activations h = loc + U'L u.

    Attributes:
        loc: Centre (d,). None for zero.
        scale_tril: L (m, m), lower triangular with a positive diagonal. None for the identity.
        subspace: Orthonormal rows U (m, d). None for the whole space.
    """

    loc: Tensor | None
    scale_tril: Tensor | None
    subspace: Tensor | None

    @classmethod
    def of(cls, loc: Tensor | None, scale_tril: Tensor | None, subspace: Tensor | None) -> Chart:
        """Make a chart of detached and contiguous tensors, and check them.

        Raises:
            ValueError: As for a :class:`~penult.Sphere`.
        """
        chart = cls(*(None if part is None else part.detach().contiguous() for part in (loc, scale_tril, subspace)))
        chart._check()
        return chart

    def _check(self) -> None:
        loc, tril, rows = self
        for name, part, shape in (("loc", loc, "(d,)"), ("scale_tril", tril, "(m, m)"), ("subspace", rows, "(m, d)")):
            if part is None:
                continue
            if part.dim() != (1 if name == "loc" else 2):
                raise ValueError(f"{name} has shape {tuple(part.shape)}; expected {shape}")
            if part.numel() == 0:
                raise ValueError(
                    f"{name} has shape {tuple(part.shape)}, which is empty; expected at least one value. The rows of a "
                    "head that are all equal span no subspace"
                )
            check_finite(name, part)
        if rows is not None:
            if rows.shape[0] > rows.shape[1]:
                raise ValueError(f"subspace has shape {tuple(rows.shape)}; expected (m, d) with m <= d")
            if loc is not None and loc.shape[0] != rows.shape[1]:
                raise ValueError(f"loc has dimension {loc.shape[0]}; expected {rows.shape[1]}, that of subspace")
            gram = special.in_double(rows) @ special.in_double(rows).T
            error = float((gram - torch.eye(rows.shape[0], device="cpu").to(gram)).abs().max())
            if not error < 1e-4:
                raise ValueError(
                    f"the products of the rows of subspace are wrong by {error:.2g}; expected orthonormal rows. Take "
                    "them from Head.span() or torch.linalg.qr"
                )
        if tril is not None:
            m = rows.shape[0] if rows is not None else loc.shape[0] if loc is not None else tril.shape[0]
            if tril.shape != (m, m):
                raise ValueError(f"scale_tril has shape {tuple(tril.shape)}; expected {(m, m)}")
            if not bool((tril.diagonal() > 0).all()) or bool((tril.triu(1) != 0).any()):
                raise ValueError(
                    "scale_tril is not lower triangular with a positive diagonal; take it from torch.linalg.cholesky"
                )

    def in_features(self) -> int | None:
        """Return the dimension d of activations, or None for any dimension."""
        for part in (self.subspace, self.loc, self.scale_tril):
            if part is not None:
                return part.shape[-1]
        return None

    def dim(self) -> int | None:
        """Return the dimension m of coordinates; None if any dimension is accepted."""
        return self.subspace.shape[0] if self.subspace is not None else self.in_features()

    def read(self, h: Tensor) -> Tensor:
        """Return coordinates u = L⁻¹U(h − loc) of activations (*S, d): (*S, m)."""
        u = h.to(torch.promote_types(h.dtype, torch.float32))
        u = u if self.loc is None else u - self.loc.to(u.dtype)
        if self.subspace is not None:
            u = u @ self.subspace.T.to(u.dtype)
        if self.scale_tril is not None:
            flat = u.reshape(-1, u.shape[-1])
            u = torch.linalg.solve_triangular(self.scale_tril.T.to(u.dtype), flat, upper=True, left=False).reshape(
                u.shape
            )
        return u

    def push(self, u: Tensor) -> Tensor:
        """Return activations h = loc + U'L u of coordinates (*S, m): (*S, d)."""
        h = u if self.scale_tril is None else u @ self.scale_tril.T.to(u.dtype)
        h = h if self.subspace is None else h @ self.subspace.to(u.dtype)
        return h if self.loc is None else h + self.loc.to(u.dtype)

    def pull(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return w' = L'U w (B, m) of rows (B, d), and their products with ``loc`` (B,)."""
        offset = weight.new_zeros(len(weight)) if self.loc is None else weight @ self.loc.to(weight.dtype)
        pulled = weight if self.subspace is None else weight @ self.subspace.T.to(weight.dtype)
        if self.scale_tril is not None:
            pulled = pulled @ self.scale_tril.to(weight.dtype)
        return pulled, offset

    def project(self, h: Tensor) -> Tensor:
        """Return activations (*S, d) without their deviation from ``loc`` outside the subspace."""
        if self.subspace is None:
            return h
        rows = self.subspace.to(h.dtype)
        if self.loc is None:
            return h @ rows.T @ rows
        return self.loc.to(h.dtype) + (h - self.loc.to(h.dtype)) @ rows.T @ rows

    def seen(self, head: Head) -> tuple[int, Tensor, Tensor]:
        """Return m, and the row norms ‖L'U w_y‖ (K,) and biases b_y + w_y·loc (K,) of a centered head in the chart."""
        work = special.working_dtype(head.weight.device)
        norms, offsets = head.full_bias.to(work, copy=True), head.full_bias.to(work, copy=True)
        # Results are written in place, since views of the blocks would keep their memory alive.
        for part, rows in head.centered_blocks():
            pulled, offset = self.pull(rows.to(work))
            norms[part] = torch.linalg.vector_norm(pulled, dim=-1)
            offsets[part] += offset
        return self.dim() or head.in_features, norms, offsets
