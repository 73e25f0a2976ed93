"""Other people's models: checkpoints of lm-engine as this library's, and back."""

from m2rnn.convert.conversion import Conversion, convert
from m2rnn.convert.lm_engine import ConversionError

__all__ = ["Conversion", "ConversionError", "convert"]
