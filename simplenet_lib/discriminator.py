"""Chapter 5: the discriminator gives every position one score."""

from __future__ import annotations

from torch import Tensor, nn


class Discriminator(nn.Module):
    """Linear, LeakyReLU, Linear on single feature vectors (paper, section 3.4, D_ψ).

    Parameters
    ----------
    channels : int
        Length A of a feature vector.
    hidden : int
        Width of the hidden layer.
    batchnorm : bool
        Normalise the hidden layer over the batch, as the published code does.
    """

    def __init__(self, channels: int, hidden: int, *, batchnorm: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.norm = nn.BatchNorm1d(hidden) if batchnorm else nn.Identity()
        self.activation = nn.LeakyReLU(0.2)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Score vectors (B, A) with one number each, (B,): high is normal, low is anomalous."""
        hidden = self.activation(self.norm(self.hidden(vectors)))
        scores: Tensor = self.score(hidden).squeeze(1)
        return scores
