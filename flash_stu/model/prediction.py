"""Prediction of numbers from numbers, step by step: forecasting, control, identification of nonlinear systems."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput, can_return_tuple

from flash_stu.errors import UserError
from flash_stu.model.cache import FlashSTUCache
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.modeling import FlashSTUModel
from flash_stu.model.pretrained import FlashSTUPreTrainedModel


@dataclass
class PredictionOutput(ModelOutput):
    """Results of FlashSTUForTimeSeriesPrediction.

    Attributes:
        loss: mean squared error, float32, if labels were given.
        predictions: (batch, length, output channels).
        past_key_values: the cache, if one was asked for.
        hidden_states, attentions: as in transformers, if asked for.
    """

    loss: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    past_key_values: FlashSTUCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class FlashSTUForTimeSeriesPrediction(FlashSTUPreTrainedModel):
    """Numbers to numbers: at every step a prediction (output channels) from the inputs (input channels) up to it.

    A linear map takes the inputs, another makes the predictions; config.num_input_channels and
    config.num_output_channels say how many. Inputs and outputs are best scaled to variance one. With a cache it
    continues, so that a distilled model predicts its own next input at constant time and memory a step.
    """

    accepts_loss_kwargs = False  # the mean is over this batch: accumulation has to divide it
    main_input_name = "input_values"

    def __init__(self, config: FlashSTUConfig) -> None:
        if config.num_input_channels is None:
            raise UserError("num_input_channels is null; a model that predicts numbers needs the number of its inputs")
        super().__init__(config)
        self.model = FlashSTUModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_output_channels or config.num_input_channels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: FlashSTUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **keywords: Any,
    ) -> PredictionOutput:
        """Predict at every step, and the loss if labels are given.

        Args:
            input_values: (batch, length, input channels).
            attention_mask: (batch, length), 0 at padding, which the loss leaves out.
            past_key_values, inputs_embeds, use_cache, keywords: see FlashSTUModel.
            labels: (batch, length, output channels), what each step is to predict. NaN does not count.

        Raises:
            UserError: for inputs or labels of another shape, and as FlashSTUModel.
        """
        outputs = self.model(
            input_values=input_values,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **keywords,
        )
        predictions = self.head(outputs.last_hidden_state)
        loss = None if labels is None else squared_error(predictions, labels, attention_mask)
        return PredictionOutput(
            loss=loss,
            predictions=predictions,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def squared_error(predictions: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the mean squared error over the labels that count, float32; arguments as in the model's forward."""
    if labels.shape != predictions.shape:
        raise UserError(f"labels has shape {tuple(labels.shape)}; needed: {tuple(predictions.shape)}")
    labels = labels.to(predictions.device, torch.float32)
    counts = ~labels.isnan()
    if attention_mask is not None:
        counts = counts & (attention_mask[:, -labels.shape[1] :, None] != 0)
    error = torch.where(counts, predictions.float() - labels, 0.0)
    return error.square().sum() / counts.sum().clamp(min=1)
