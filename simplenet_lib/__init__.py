"""SimpleNet (Liu et al., CVPR 2023), piece by piece.

A trained model in a program::

    from simplenet_lib import SimpleNet

    model = SimpleNet.load("runs/nut-fast-0")
    result = model.predict("photo.jpg")
    print(result.verdict, result.score, result.regions)

Beyond that, one module per chapter of the book, and each name lives in one place::

    from simplenet_lib.dataset import AnomalyDataset
    from simplenet_lib.training import train

This file imports nothing until ``SimpleNet`` is asked for, so that ``simplenet --help``
answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simplenet_lib.model import SimpleNet

__all__ = ["SimpleNet", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "SimpleNet":
        from simplenet_lib.model import SimpleNet

        return SimpleNet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
