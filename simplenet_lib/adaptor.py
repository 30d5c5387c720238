"""Chapter 3: the adaptor moves ImageNet features towards the images at hand."""

from __future__ import annotations

from torch import Tensor, nn


class Adaptor(nn.Module):
    """One linear layer, applied at every position: a 1x1 convolution (paper, section 3.2, G_θ).

    Features come with their channels last, and there a linear layer does what a 1x1
    convolution does with its channels first.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels C of the frozen features and A of the adapted ones.

    Examples
    --------
    >>> adaptor = Adaptor(in_channels=1536, out_channels=128)
    >>> adaptor(torch.zeros(2, 28, 28, 1536)).shape
    torch.Size([2, 28, 28, 128])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., C) to adapted features (..., A)."""
        adapted: Tensor = self.linear(features)
        return adapted
