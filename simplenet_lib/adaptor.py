"""Chapter 3: the adaptor moves ImageNet features towards the images at hand."""

from __future__ import annotations

from torch import Tensor, nn


class Adaptor(nn.Module):
    """A 1x1 convolution: one linear layer, applied at every position (paper, section 3.2, G_θ).

    Parameters
    ----------
    in_channels, out_channels : int
        Channels C of the frozen features and A of the adapted ones.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        nn.init.xavier_normal_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, C, h, w) to adapted features (N, A, h, w)."""
        adapted: Tensor = self.conv(features)
        return adapted
