"""The linear layer whose draw depends on the depth of the model."""

from torch import nn


class DepthScaledLinear(nn.Linear):
    """A linear layer with weights drawn (2 layers)^-1/2 smaller than others: one in every branch that is linear in it.

    The variance of the residual stream, to which the branches are added, then does not grow with the depth.
    Source: Radford et al. 2019, GPT-2, section 2.3.
    """
