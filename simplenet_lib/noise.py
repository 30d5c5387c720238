"""Chapter 4: synthetic anomalies are normal features plus Gaussian noise."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def add_noise(features: Tensor, sigma: float, generator: Generator | None = None) -> Tensor:
    """Return z + ε with ε ~ N(0, σ²), drawn anew for every entry (paper, section 3.3).

    Parameters
    ----------
    features : Tensor
        Adapted features z, any shape.
    sigma : float
        Standard deviation σ, in the units of the features.
    generator : torch.Generator, optional
        Source of randomness, on the features' device; torch's own by default.
    """
    noise = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    noise.normal_(0.0, sigma, generator=generator)
    return features + noise
