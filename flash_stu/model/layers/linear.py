"""The projection that ends a branch."""

from torch import nn


class ResidualLinear(nn.Linear):
    """A linear layer whose output is added to the residual stream.

    The model draws its weights (2 layers)^-1/2 smaller than others, so that the stream's variance does not grow with
    the depth. Source: Radford et al. 2019, GPT-2, section 2.3.
    """
