"""Chapter 4: synthetic anomalies are normal features plus Gaussian noise."""

from __future__ import annotations

import numpy as np
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

    Examples
    --------
    >>> features = torch.zeros(1000, 512)
    >>> noisy = add_noise(features, sigma=0.25, generator=torch.Generator().manual_seed(0))
    >>> round(float(noisy.std()), 2)
    0.25
    """
    noise = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    noise.normal_(0.0, sigma, generator=generator)
    return features + noise


def random_seed(seed: int, *stream: int) -> int:
    """A seed for one stream of random numbers, independent of every other stream's.

    Parameters
    ----------
    seed : int
        The seed of the configuration.
    stream : int
        Where the numbers are needed, such as the head, the purpose and the step.

    References
    ----------
    ``numpy.random.SeedSequence``, which spreads the streams.

    Examples
    --------
    >>> random_seed(0, 1, 2) == random_seed(0, 1, 2), random_seed(0, 1, 2) == random_seed(0, 1, 3)
    (True, False)
    """
    state = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)
    return int(state[0]) % 2**63
