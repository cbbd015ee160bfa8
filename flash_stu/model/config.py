"""The configuration of a model: names as in transformers where transformers has one."""

import difflib
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)
from transformers import AutoConfig, PreTrainedConfig

from flash_stu.errors import UserError
from flash_stu.filters.spectral import BASES, TENSOR
from flash_stu.ops import attention, conv, cross_entropy, futurefill
from flash_stu.settings import shown

LAYER_TYPES = ("linear_attention", "sliding_attention")
LARGEST_LENGTH = 2**24  # tokens; filters of this length take gigabytes
LARGEST_MODEL = 10**12  # parameters; with their gradients and moments in float32, 16 terabytes
BOUNDS = {  # of every number of a model, both ends allowed; far outside what anybody trains, well inside what can run
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "sliding_window": (1, 2**31 - 1),
    "max_position_embeddings": (1, LARGEST_LENGTH),
    "rope_theta": (1e-3, 1e12),
    "alibi_scale": (1e-6, 1e6),
    "attn_logit_softcapping": (1e-3, 1e6),
    "rms_norm_eps": (1e-12, 1.0),
    "dropout": (0, 0.999),
    "initializer_range": (0, 100),
    "num_filters": (1, 2**14),
    "tensor_filters": (1, 2**7),
    "stu_input_taps": (0, 256),
    "stu_output_taps": (0, 256),
    "lds_state_dim": (2, 2**14),
    "num_input_channels": (1, 2**17),
    "num_output_channels": (1, 2**17),
    "classifier_towers": (1, 2),
}
CHOICES = {
    "position_embedding": ("rope", "alibi", "none"),
    "filter_basis": (*BASES, TENSOR),
    "stu_type": ("tensordot", "full"),
    "stu_branches": ("shared", "separate", "positive"),
    "conv_backend": conv.BACKENDS,
    "attention_backend": attention.BACKENDS,
    "loss_backend": cross_entropy.BACKENDS,
    "lds_state_dtype": ("float32", "float64"),
    "decode_backend": ("auto", "lds", *futurefill.BACKENDS),
    "classifier_pooling": ("last", "mean"),
}
_LONGEST_REASON = 400  # characters of a message of another library, which may quote whole values


@strict
class FlashSTUConfig(PreTrainedConfig):
    """Shape and variant of a Flash STU model; the defaults are the 340M model of the Flash STU paper.

    Args:
        vocab_size: token ids, padded up as wanted.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the gated MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of an attention layer; divides hidden_size.
        num_key_value_heads: heads of keys and values; divides num_attention_heads. None: as many.
        sliding_window: keys a query sees, its own included.
        max_position_embeddings: length of the spectral filters and the longest input of a model with STU layers.
        layer_types: per block "linear_attention" (STU, or LDS once distilled) or "sliding_attention". None:
            alternating, STU first.
        position_embedding: "rope", "alibi" or "none", in the attention layers.
        rope_theta: base of the rotary frequencies.
        alibi_scale: factor on the ALiBi slopes.
        attn_logit_softcapping: attention scores pass through c tanh(score / c); None for none.
        rms_norm_eps: added to the mean square in RMSNorm.
        dropout: on embeddings, attention weights and the outputs of mixers and MLPs, while training.
        bias: biases in attention, MLP and head.
        tie_word_embeddings: the head is the embedding.
        initializer_range: standard deviation of embeddings; linear layers use hidden_size^-1/2-scaled draws.
        num_filters: spectral filters K.
        filter_basis: "hankel", "hankel_l" or "tensor", see flash_stu.filters.spectral.
        tensor_filters: k of filter_basis "tensor", which makes num_filters k squared; null for the others.
        stu_type: "tensordot" or "full", see flash_stu.model.layers.stu.
        stu_branches: "shared", "separate" or "positive", see flash_stu.model.layers.stu.
        stu_input_taps: k_u, newest inputs that an STU layer, distilled or not, adds to its outputs with weights of
            their own; 0 as Flash STU publishes, 3 as Spectral SSM. See flash_stu.model.layers.taps.
        stu_output_taps: k_y, last outputs that it feeds back (AR-STU of Spectral SSM, with 2 or 32); 0 for none.
        lds_state_dim: state dimension of the LDS layers of a distilled model, even; None for STU layers.
        lds_trainable: train the decays of the LDS layers too, see flash_stu.model.layers.lds.
        lds_state_dtype: "float32" or "float64", of the states that generation carries from token to token.
        decode_backend: how the past is carried from token to token: "lds" for a distilled model; "futurefill",
            "futurefill_epoched" or "naive" for STU layers, see flash_stu.ops.futurefill; "auto" is the first that fits.
            Read at every prefill, so it can be changed on a model in use.
        conv_backend: how the STU layers convolve, see flash_stu.ops.conv.choice.
        attention_backend: how the attention layers attend, see flash_stu.ops.attention.choice.
        loss_backend: how head and loss are computed, see flash_stu.ops.cross_entropy.choice.
        bidirectional: every position sees the whole sequence: an STU or LDS layer is two, of which one reads it from
            its end, and attention looks ahead as far as back. For classifiers; a language model must not look ahead.
        num_input_channels: numbers of a step where the inputs are `input_values`, which a linear map takes in place of
            an embedding; null for token ids.
        num_output_channels: numbers of a step that FlashSTUForTimeSeriesPrediction predicts; null: num_input_channels.
        classifier_pooling: what FlashSTUForSequenceClassification looks at, "last" or "mean" of the hidden states.
        classifier_towers: sequences that it reads for one answer; 2 for pairs, each through the same layers.
        use_cache: generate with a cache.
        pad_token_id: token id of padding; None for none.
        bos_token_id: token id that begins a text; None for none.
        eos_token_id: token id, or ids, that end a text; None for none.
    """

    model_type = "flash_stu"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 200064
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    sliding_window: int = 1024
    max_position_embeddings: int = 8192
    layer_types: list[str] | None = None
    position_embedding: str = "rope"
    rope_theta: float | int = 10000.0
    alibi_scale: float | int = 1.0
    attn_logit_softcapping: float | int | None = 50.0
    rms_norm_eps: float = 1e-6
    dropout: float | int = 0.0
    bias: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    num_filters: int = 24
    filter_basis: str = "hankel"
    tensor_filters: int | None = None
    stu_type: str = "tensordot"
    stu_branches: str = "shared"
    stu_input_taps: int = 0
    stu_output_taps: int = 0
    lds_state_dim: int | None = None
    lds_trainable: bool = False
    lds_state_dtype: str = "float32"
    decode_backend: str = "auto"
    conv_backend: str = "auto"
    attention_backend: str = "auto"
    loss_backend: str = "auto"
    bidirectional: bool = False
    num_input_channels: int | None = None
    num_output_channels: int | None = None
    classifier_pooling: str = "last"
    classifier_towers: int = 1
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_bounds(self.__dict__)  # before anything is built from them
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPES[i % 2] for i in range(self.num_hidden_layers)]
        if self.tensor_filters is not None:
            self.num_filters = self.tensor_filters**2
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    @classmethod
    def from_user(cls, values: dict) -> "FlashSTUConfig":
        """Build a configuration from entries that a user wrote.

        Raises:
            UserError: for an unknown key, a wrong type or an invalid combination, naming the key.
        """
        known = [f.name for f in fields(cls)]
        own = set(cls.__annotations__)
        for key in values:
            if key not in own:
                close = difflib.get_close_matches(key, own, n=1) or difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(sorted(own))}"
                raise UserError(f"model.{key} is not a configuration key; {hint}")
        try:
            return cls(**values)
        except (StrictDataclassFieldValidationError, StrictDataclassClassValidationError, ValueError) as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"model: {reason.split('. Errors:')[0][:_LONGEST_REASON]}") from None

    def to_user(self) -> dict:
        """Returns all entries that `from_user` takes."""
        return {key: getattr(self, key) for key in type(self).__annotations__}

    @property
    def block_types(self) -> list[str]:
        """`layer_types`, which construction has filled in: one for each block."""
        return self.layer_types or []

    @property
    def stu_dilation(self) -> int:
        """Distance between the lags an STU layer mixes, in tokens: 2 if its branches are shared."""
        return 2 if self.stu_branches == "shared" else 1

    @property
    def uses_stu(self) -> bool:
        """Whether any layer convolves with the spectral filters."""
        return "linear_attention" in self.block_types and self.lds_state_dim is None

    def require_language_model(self) -> None:
        """Check that this is the shape of a language model: token ids in, nothing seen ahead.

        Raises:
            UserError: for settings of other models, naming the first.
        """
        for key in ("num_input_channels", "bidirectional"):
            if value := getattr(self, key):
                off = "null" if key == "num_input_channels" else "false"
                raise UserError(f"model.{key} is {shown(value)}; allowed for a language model: {off}")

    def resolve_decode_backend(self) -> str:
        """Returns the decode back end in use: decode_backend, or the one that "auto" means for this model.

        Raises:
            UserError: for one that this model's layers do not have.
        """
        if "linear_attention" not in self.block_types:
            kind, allowed = "only attention layers", ("auto",)
        elif self.lds_state_dim is not None:
            kind, allowed = "LDS layers", ("lds", "auto")
        else:
            kind, allowed = "STU layers", (*futurefill.BACKENDS, "auto")
        if self.decode_backend not in allowed:
            raise UserError(
                f"decode_backend is {self.decode_backend!r}, but the model has {kind}; allowed: {', '.join(allowed)}"
            )
        return allowed[0] if self.decode_backend == "auto" else self.decode_backend

    def validate_architecture(self) -> None:
        """Called by transformers on construction: raises a ValueError of one line for a model that cannot be built."""
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {shown(getattr(self, key))}; allowed: {', '.join(allowed)}")
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if value == [] or not all(0 <= token < self.vocab_size for token in ids):
                raise ValueError(f"{key} is {shown(value)}; allowed: 0 to {self.vocab_size - 1}, or null")
        if len(self.block_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.block_types)} layers; num_hidden_layers is {self.num_hidden_layers}"
            )
        for kind in self.block_types:
            if kind not in LAYER_TYPES:
                raise ValueError(f"layer_types has {shown(kind)}; allowed: {', '.join(LAYER_TYPES)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.position_embedding == "rope" and self.hidden_size // self.num_attention_heads % 2:
            raise ValueError("position_embedding 'rope' needs an even hidden_size / num_attention_heads")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if (self.filter_basis == TENSOR) != (self.tensor_filters is not None):
            raise ValueError(
                f"tensor_filters is {self.tensor_filters} and filter_basis {self.filter_basis!r}; "
                f"allowed: filter_basis 'tensor' with a number, the others with null"
            )
        if self.filter_basis == TENSOR and self.conv_backend not in conv.ANY_FILTER_BACKENDS:
            allowed = ", ".join(conv.ANY_FILTER_BACKENDS)
            raise ValueError(f"conv_backend is {self.conv_backend!r}; allowed with filter_basis 'tensor': {allowed}")
        if self.bidirectional and "sliding_attention" in self.block_types and self.attn_logit_softcapping is not None:
            raise ValueError(
                f"attn_logit_softcapping is {self.attn_logit_softcapping}; allowed for bidirectional attention: null"
            )
        if self.filter_basis == TENSOR and self.lds_state_dim is not None:
            raise ValueError("filter_basis 'tensor' has no LDS layers; lds_state_dim: allowed: null")
        if self.num_filters > self.max_position_embeddings:
            raise ValueError(
                f"num_filters is {self.num_filters}; at most max_position_embeddings, {self.max_position_embeddings}"
            )
        if self.lds_state_dim is not None and (self.lds_state_dim < 2 or self.lds_state_dim % 2):
            raise ValueError(f"lds_state_dim is {self.lds_state_dim}; allowed: an even number from 2 on, or null")
        if self.lds_trainable and self.lds_state_dim is None:
            raise ValueError("lds_trainable is true, but lds_state_dim is null: the model has no LDS layers to train")
        self.resolve_decode_backend()
        if (weights := self.count_weights()) > LARGEST_MODEL:
            raise ValueError(f"the model would have {weights:,} weights; at most {LARGEST_MODEL:,}")

    def count_weights(self) -> int:
        """Returns how many numbers the model stores: parameters, a tied head once, and constants such as filters.

        The heads of classifiers and of predictions are not counted.
        """
        hidden, inner, bias = self.hidden_size, self.intermediate_size, int(self.bias)
        keys = (self.num_key_value_heads or self.num_attention_heads) * (hidden // self.num_attention_heads)
        attention = 2 * (hidden + keys) * (hidden + bias)
        filters = self.num_filters * (2 if self.stu_branches == "separate" else 1)
        tensordot = self.stu_type == "tensordot"
        linear = hidden * hidden if tensordot else filters * hidden * hidden
        if self.lds_state_dim is not None:
            states = self.lds_state_dim // self.stu_dilation
            linear += states * (1 + (hidden if tensordot else filters)) * (2 if self.lds_trainable else 1)
        elif tensordot:
            linear += filters * hidden
        linear += (self.stu_input_taps + self.stu_output_taps) * hidden * (1 if tensordot else hidden)
        linear *= 2 if self.bidirectional else 1
        block = 2 * hidden + 3 * hidden * inner + bias * (2 * inner + hidden)
        layers = sum(block + (linear if kind == "linear_attention" else attention) for kind in self.block_types)
        ends = self.vocab_size * (hidden + bias + (0 if self.tie_word_embeddings else hidden)) + hidden
        if self.num_input_channels is not None:
            ends = (self.num_input_channels + 2) * hidden
        return layers + ends + (self.max_position_embeddings * self.num_filters if self.uses_stu else 0)


def check_bounds(values: dict) -> None:
    """Compare the numbers of a model's configuration with `BOUNDS`; other kinds of values are left to type checks.

    Raises:
        ValueError: for the first that is outside, naming it and what is allowed.
    """
    for key, (low, high) in BOUNDS.items():
        value = values.get(key)
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"{key} is {shown(value)}; allowed: {low} to {high}")


AutoConfig.register(FlashSTUConfig.model_type, FlashSTUConfig, exist_ok=True)
