"""Replace the STU layers of a model by linear dynamical systems, in closed form."""

import copy
from typing import TypeVar

import torch

from flash_stu.errors import UserError
from flash_stu.filters.spectral import BASES, TENSOR, spectral_filters
from flash_stu.model.layers import STU
from flash_stu.model.layers.exact import SpectralFilters
from flash_stu.model.pretrained import FlashSTUPreTrainedModel
from spectralds.bank import FilterBank
from spectralds.fit import LDSFit, fit_lds
from spectralds.options import AUTO, TOLERANCE

Model = TypeVar("Model", bound=FlashSTUPreTrainedModel)


def distill(model: Model, state_dim: int | str = 160, method: str = AUTO, tolerance: float = TOLERANCE) -> Model:
    """Distill a model: the same model with every STU layer replaced by an LDS layer.

    Args:
        model: of any class, with STU layers; it is not changed and shares no memory with the result.
        state_dim: states per layer and channel, or "auto".
        method, tolerance: see `fit_lds`.

    Returns:
        a new model of the same class on the same device, in the same mode, with config.lds_state_dim set. Weights
        keep their dtype, except that an LDS layer's readout is at least float32: its terms cancel, and half precision
        would lose them.

    Raises:
        UserError: for a model without STU layers, and as `fit_lds`.
    """
    require_stu_layers(model)
    fit = fit_lds(model_filters(model), state_dim, method, torch.float32, model.config.stu_dilation, tolerance)
    return replace_stu_layers(copy.deepcopy(model), fit)


def model_filters(model: FlashSTUPreTrainedModel) -> FilterBank:
    """Returns the filters a model was trained with, in float64.

    A checkpoint holds them in float32. Where those are the rounded filters of its configuration the exact
    ones are taken, so that no rounding is fitted; filters of another origin (a converted checkpoint) are
    taken as they are.
    """
    filters = next((module for module in model.modules() if isinstance(module, SpectralFilters)), None)
    if filters is None:
        raise ValueError("the model has no spectral filters")
    config, stored = model.config, filters.phi.detach().cpu()
    exact = spectral_filters(config.max_position_embeddings, config.num_filters, config.filter_basis)[1]
    rounding = 4 * torch.finfo(stored.dtype).eps * exact.abs().amax(dim=0)
    return FilterBank(exact if ((stored - exact).abs() <= rounding).all() else stored)


def replace_stu_layers(model: Model, fit: LDSFit) -> Model:
    """Build the distilled model from a model and the fit of its filters; it shares the other weights' memory."""
    config = copy.deepcopy(model.config)
    config.lds_state_dim, config.lds_trainable, config.decode_backend = len(fit.A), False, "auto"
    with torch.device("meta"):
        distilled = type(model)(config)

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, STU)}
    replaced = {f"{name}.{own}" for name in layers for own in ("M_filters", "M_phi")}
    replaced |= {f"{name}.phi" for name, module in model.named_modules() if isinstance(module, SpectralFilters)}
    named = [*model.named_parameters(), *model.named_buffers()]  # tied weights come once
    tensors = {name: tensor.detach() for name, tensor in named if name not in replaced}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in fold(fit, layer).items()}
    distilled.load_state_dict(tensors, assign=True, strict=False)
    distilled.tie_weights()
    left = [name for name, tensor in distilled.state_dict().items() if tensor.is_meta]
    if left or not tensors.keys() <= distilled.state_dict().keys():
        raise RuntimeError(f"weights of the distilled model that no layer gave: {left}; given: {sorted(tensors)}")
    if model.can_generate():
        distilled.generation_config = copy.deepcopy(model.generation_config)
    return distilled.train(model.training)


def fold(fit: LDSFit, layer: STU) -> dict[str, torch.Tensor]:
    """Compute the tensors of the LDS layer that replaces an STU layer, except its input projection.

    With h states, K filters and D channels the coefficients C (h, 2K) of the features U+, U- meet the
    layer's weights M+, M-. tensordot: readout = C+ M+ + C- M-, (h, D). full: readout = C of the features
    used, (h, F), and M_phi is kept, (F, D, D). A layer with shared branches uses even lags only, where a and
    -a coincide: its system runs on every second token with decays a^2 and the two halves' readouts added.

    Source: Shah et al. 2025, SpectraLDS (arXiv 2505.17868), section 4; the sum over filters is taken here,
    once.
    """
    weights = (layer.M_filters if layer.tensordot else layer.M_phi).detach()
    filters = weights.shape[1]
    plus, minus = fit.C[:, :filters], fit.C[:, filters:]
    decay = fit.A
    features = {"shared": plus + minus, "separate": fit.C, "positive": plus}[layer.branches]
    if layer.dilation == 2:
        half = len(decay) // 2
        decay, features = decay[:half] ** 2, features[:half] + features[half:]

    tensors = {"decay": decay.to(weights.device, torch.float32)}
    if layer.tensordot:
        features = features @ weights.flatten(0, 1).cpu().double()
    else:
        tensors["M_phi"] = weights.flatten(0, 1)
    tensors["readout"] = features.to(weights.device, torch.promote_types(weights.dtype, torch.float32))
    return tensors


def require_stu_layers(model: object) -> FlashSTUPreTrainedModel:
    """Returns the model if it can be distilled.

    Raises:
        UserError: for a model of another kind, a distilled one, one of tensor filters, or of attention layers only.
    """
    if not isinstance(model, FlashSTUPreTrainedModel):
        raise UserError(f"a {type(model).__name__} cannot be distilled; allowed: the FlashSTU model classes")
    if model.config.lds_state_dim is not None:
        raise UserError(
            f"the model is distilled already (lds_state_dim {model.config.lds_state_dim}): it has no STU layers left"
        )
    if model.config.filter_basis == TENSOR:
        raise UserError(f"filter_basis is tensor, whose filters no small LDS has; allowed: {', '.join(BASES)}")
    if not model.config.uses_stu:
        raise UserError("the model has no STU layers to distill: its layer_types are all sliding_attention")
    return model
