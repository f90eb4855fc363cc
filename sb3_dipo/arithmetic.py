"""Where version 0.1 had its activation function: policies that it saved refer to it."""

from torch.nn import Mish

__all__ = ["Mish"]
