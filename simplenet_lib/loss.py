"""Chapter 6: the margin loss asks for a gap between normal and noisy scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def margin_loss(normal: Tensor, noisy: Tensor, margin: float = 0.5) -> Tensor:
    """Mean of max(0, m - D(z)) plus mean of max(0, m + D(z')) (paper, section 3.5).

    A score beyond its margin costs nothing and has no gradient. A discriminator
    that answers 0 everywhere costs 2m: a loss stuck there has learned nothing.

    Parameters
    ----------
    normal, noisy : Tensor
        Scores D(z) of normal vectors and D(z') of noisy ones, (B,).
    margin : float
        Margin m.

    Returns
    -------
    Tensor
        The loss, a scalar.

    Examples
    --------
    >>> margin_loss(torch.tensor([0.5, 2.0]), torch.tensor([-0.5]))  # all beyond the margin
    tensor(0.)
    >>> margin_loss(torch.zeros(2), torch.zeros(2))
    tensor(1.)
    """
    return F.relu(margin - normal).mean() + F.relu(margin + noisy).mean()


def cross_entropy_loss(normal: Tensor, noisy: Tensor) -> Tensor:
    """Cross-entropy with D as the logit of "normal": mean of log(1 + e^-D(z)) and log(1 + e^D(z')).

    Unlike the margin loss it never calls a score good enough. Its best D is the
    logarithm of the ratio of the two densities, everywhere, and not only its sign.

    Parameters
    ----------
    normal, noisy : Tensor
        Scores D(z) of normal vectors and D(z') of noisy ones, (B,).

    Returns
    -------
    Tensor
        The loss, a scalar; 2 log 2 for a discriminator that answers 0 everywhere.

    References
    ----------
    Gutmann, Hyvärinen: Noise-contrastive estimation, AISTATS 2010.

    Examples
    --------
    >>> cross_entropy_loss(torch.zeros(2), torch.zeros(2))
    tensor(1.3863)
    """
    return F.softplus(-normal).mean() + F.softplus(noisy).mean()
