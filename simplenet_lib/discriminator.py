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

    Examples
    --------
    >>> discriminator = Discriminator(channels=128, hidden=64, batchnorm=True)
    >>> discriminator(torch.zeros(2, 28, 28, 128)).shape
    torch.Size([2, 28, 28])
    """

    def __init__(self, channels: int, hidden: int, *, batchnorm: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.norm = nn.BatchNorm1d(hidden) if batchnorm else nn.Identity()
        self.activation = nn.LeakyReLU(0.2)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Score vectors (..., A) with one number each, (...): high is normal, low is anomalous."""
        hidden = self.hidden(vectors.reshape(-1, vectors.shape[-1]))  # BatchNorm wants one row each
        scores: Tensor = self.score(self.activation(self.norm(hidden)))
        return scores.view(vectors.shape[:-1])
