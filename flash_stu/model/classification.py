"""Classifiers of texts and other sequences, of pairs of them, and of tokens."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GenericForTokenClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils.generic import can_return_tuple

from flash_stu.errors import UserError
from flash_stu.model.cache import FlashSTUCache
from flash_stu.model.config import FlashSTUConfig
from flash_stu.model.modeling import FlashSTUModel
from flash_stu.model.pretrained import FlashSTUPreTrainedModel


class FlashSTUForSequenceClassification(FlashSTUPreTrainedModel):
    """A classifier of sequences by the last or the mean of their hidden states, or of pairs of sequences.

    config.classifier_pooling and config.classifier_towers say which; config.num_labels and config.problem_type are
    transformers'. Of a pair, both go through the same layers to u and v, and one hidden layer reads [u, v, u v, u - v].

    Source: Tay et al. 2021, Long Range Arena (arXiv 2011.04006), section 2, for the two towers of its retrieval task.
    """

    accepts_loss_kwargs = False  # the mean is over this batch's rows: accumulation has to divide it

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = FlashSTUModel(config)
        self.pooler = Pooler(config)
        self.score = nn.Linear(config.hidden_size, len(config.id2label or {}), bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: FlashSTUCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        input_values: torch.Tensor | None = None,
        **keywords: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Class scores of each row, and the loss if labels are given.

        Args:
            input_ids: (batch, length), of pairs (batch, 2, length); also input_values and inputs_embeds, with channels
                last, see FlashSTUModel.
            attention_mask: (batch, length), of pairs (batch, 2, length), 0 at padding. Without it, tokens
                config.pad_token_id at the end of a row do not count, but are read.
            position_ids, past_key_values, use_cache, keywords: see FlashSTUModel.
            labels: (batch,), class numbers, or what config.problem_type says.

        Returns:
            loss, logits (batch, num_labels), and what else was asked. Rows 2 i and 2 i + 1 of hidden states and
            attentions are pair i.

        Raises:
            UserError: for inputs of another shape, and as FlashSTUModel.
        """
        given = {"input_ids": input_ids, "input_values": input_values, "inputs_embeds": inputs_embeds}
        given |= {"attention_mask": attention_mask, "position_ids": position_ids}
        inputs = given
        if self.config.classifier_towers == 2:
            inputs = {name: None if tensor is None else pair_rows(name, tensor) for name, tensor in given.items()}
        outputs = self.model(
            **inputs, past_key_values=past_key_values, use_cache=use_cache, return_dict=True, **keywords
        )
        logits = self.score(self.pooler(outputs.last_hidden_state, inputs["input_ids"], inputs["attention_mask"]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def pair_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns both sequences of pairs (batch, 2, length, ...) as rows, (2 batch, length, ...).

    Raises:
        UserError: for another shape, with the argument's name.
    """
    dimensions = 4 if tensor.is_floating_point() else 3
    if tensor.ndim != dimensions or tensor.shape[1] != 2:
        last = ", channels" if dimensions == 4 else ""
        raise UserError(f"{name} has shape {tuple(tensor.shape)}; needed of pairs: (batch, 2, length{last})")
    return tensor.flatten(0, 1)


class Pooler(nn.Module):
    """Hidden states of a sequence, or of a pair, to one vector: (rows, length, hidden_size) to (batch, hidden_size).

    Args:
        config: hidden_size, classifier_pooling, classifier_towers and pad_token_id are read.
    """

    def __init__(self, config: FlashSTUConfig) -> None:
        super().__init__()
        self.towers, self.mean = config.classifier_towers, config.classifier_pooling == "mean"
        self.padding = config.pad_token_id
        self.dense = nn.Linear(4 * config.hidden_size, config.hidden_size) if self.towers == 2 else None

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the vectors.

        Args:
            hidden: (rows, length, hidden_size); rows are twice the batch for pairs.
            ids: (rows, length), token ids, where padding is known by them: without a mask.
            mask: (rows, length), 0 at padding.
        """
        if mask is None and ids is not None and self.padding is not None:
            mask = ids != self.padding
        if self.mean:
            vectors = _mean(hidden, mask)
        else:
            vectors = hidden[:, -1] if mask is None else hidden[torch.arange(len(hidden)), _last(mask)]
        if self.dense is None:
            return vectors
        u, v = vectors.unflatten(0, (-1, 2)).unbind(1)
        return nn.functional.gelu(self.dense(torch.cat([u, v, u * v, u - v], dim=-1)))


def _mean(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return hidden.mean(dim=1)
    weights = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _last(mask: torch.Tensor) -> torch.Tensor:
    """Returns the last column of each row that is no padding."""
    return (mask != 0).long().cumsum(dim=1).argmax(dim=1)


class FlashSTUForTokenClassification(GenericForTokenClassification, FlashSTUPreTrainedModel):
    """A linear classifier of tokens on their hidden states."""

    accepts_loss_kwargs = False
