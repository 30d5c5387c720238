"""SimpleNet (Liu et al., CVPR 2023), piece by piece.

One module per chapter of the book, and each name lives in one place::

    from simplenet_lib.dataset import AnomalyDataset
    from simplenet_lib.model import SimpleNet
    from simplenet_lib.training import train

This file imports nothing, so that ``simplenet --help`` answers at once.
"""

__version__ = "0.1.0"
