"""Where a sphere lies: the coordinates of activations in which it is round."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penult import special
from penult.head import Head

__all__ = ["Chart"]


class Chart(NamedTuple):
    """Coordinates u of activations h = loc + U'L u; a part that is None is zero, the identity, or the whole space.

    Attributes:
        loc: Centre (d,).
        scale_tril: L (m, m), lower triangular with a positive diagonal.
        subspace: Orthonormal rows U (m, d).
    """

    loc: Tensor | None
    scale_tril: Tensor | None
    subspace: Tensor | None

    @classmethod
    def of(cls, loc: Tensor | None, scale_tril: Tensor | None, subspace: Tensor | None) -> Chart:
        """A chart of tensors that are detached, dense and checked.

        Raises:
            ValueError: As for a :class:`~penult.Sphere`.
        """
        chart = cls(*(None if part is None else part.detach().contiguous() for part in (loc, scale_tril, subspace)))
        chart._check()
        return chart

    def _check(self) -> None:
        loc, tril, rows = self
        for name, part in self._asdict().items():
            if part is not None and not bool(part.isfinite().all()):
                raise ValueError(f"{name} of shape {tuple(part.shape)} holds NaN or infinity")
            if part is not None and part.numel() == 0:
                raise ValueError(
                    f"{name} of shape {tuple(part.shape)} is empty; a head whose rows are all equal spans nothing"
                )
        if loc is not None and loc.dim() != 1:
            raise ValueError(f"loc must have shape (d,); got {tuple(loc.shape)}")
        if rows is not None:
            if rows.dim() != 2 or not 1 <= rows.shape[0] <= rows.shape[1]:
                raise ValueError(f"subspace must hold m <= d rows (m, d); got {tuple(rows.shape)}")
            if loc is not None and loc.shape[0] != rows.shape[1]:
                raise ValueError(f"loc has dimension {loc.shape[0]}, but subspace lies in dimension {rows.shape[1]}")
            gram = special.in_double(rows) @ special.in_double(rows).T
            off = float((gram - torch.eye(rows.shape[0]).to(gram)).abs().max())
            if not off < 1e-4:
                raise ValueError(
                    f"the rows of subspace are not orthonormal (off by {off:.2g}); take them from "
                    "Head.span() or torch.linalg.qr"
                )
        if tril is not None:
            m = rows.shape[0] if rows is not None else loc.shape[0] if loc is not None else tril.shape[0]
            if tril.shape != (m, m):
                raise ValueError(f"scale_tril must have shape {(m, m)} here; got {tuple(tril.shape)}")
            if not bool((tril.diagonal() > 0).all()) or bool((tril.triu(1) != 0).any()):
                raise ValueError(
                    "scale_tril must be lower triangular with a positive diagonal: see torch.linalg.cholesky"
                )

    def in_features(self) -> int | None:
        """The dimension d of activations; None where any fits."""
        for part in (self.subspace, self.loc, self.scale_tril):
            if part is not None:
                return part.shape[-1]
        return None

    def dim(self) -> int | None:
        """The dimension m of coordinates; None where it is that of activations, any."""
        return self.subspace.shape[0] if self.subspace is not None else self.in_features()

    def read(self, h: Tensor) -> Tensor:
        """Coordinates u = L⁻¹U(h − loc) of activations (*S, d), shape (*S, m)."""
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
        """Activations h = loc + U'L u of coordinates (*S, m)."""
        h = u if self.scale_tril is None else u @ self.scale_tril.T.to(u.dtype)
        h = h if self.subspace is None else h @ self.subspace.to(u.dtype)
        return h if self.loc is None else h + self.loc.to(u.dtype)

    def pull(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, d) as w' = L'U w (B, m), and their products with ``loc`` (B,)."""
        offset = weight.new_zeros(len(weight)) if self.loc is None else weight @ self.loc.to(weight.dtype)
        pulled = weight if self.subspace is None else weight @ self.subspace.T.to(weight.dtype)
        if self.scale_tril is not None:
            pulled = pulled @ self.scale_tril.to(weight.dtype)
        return pulled, offset

    def project(self, h: Tensor) -> Tensor:
        """Activations (*S, d) without their deviation from ``loc`` outside the subspace."""
        if self.subspace is None:
            return h
        rows = self.subspace.to(h.dtype)
        if self.loc is None:
            return h @ rows.T @ rows
        return self.loc.to(h.dtype) + (h - self.loc.to(h.dtype)) @ rows.T @ rows

    def seen(self, head: Head) -> tuple[int, Tensor, Tensor]:
        """A head in the chart: its dimension m, norms ‖L'U w_y‖ (K,) of the centered rows, and b_y + w_y·loc (K,)."""
        work = special.working_dtype(head.weight.device)
        norms, offsets = head.full_bias.to(work, copy=True), head.full_bias.to(work, copy=True)
        for part, rows in head.centered_blocks():  # in place: what is kept between blocks would keep their memory, too
            pulled, offset = self.pull(rows.to(work))
            norms[part] = torch.linalg.vector_norm(pulled, dim=-1)
            offsets[part] += offset
        return self.dim() or head.in_features, norms, offsets
