"""Classifiers of sequences and of tokens, with the heads and losses of transformers."""
# The heads of transformers carry no types:
# mypy: disable-error-code="misc,no-untyped-call"

from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from m2rnn.models.config import M2RNNConfig
from m2rnn.models.model import M2RNNPreTrainedModel


class M2RNNForSequenceClassification(GenericForSequenceClassification, M2RNNPreTrainedModel):
    """``M2RNNModel`` with a linear layer over the last token of each sequence that is not ``config.pad_token_id``.

    ``config.num_labels`` is the number of classes, ``config.problem_type`` the kind of loss, as in transformers.
    """


class M2RNNForTokenClassification(GenericForTokenClassification, M2RNNPreTrainedModel):
    """``M2RNNModel`` with a linear layer over every token, into ``config.num_labels`` classes."""


AutoModelForSequenceClassification.register(M2RNNConfig, M2RNNForSequenceClassification)
AutoModelForTokenClassification.register(M2RNNConfig, M2RNNForTokenClassification)
