"""Other people's models: lm-engine's checkpoints as this library's and back; M2RNN layers in transformers' hybrids."""

from m2rnn.convert.conversion import Conversion, convert
from m2rnn.convert.lm_engine import ConversionError
from m2rnn.convert.swapping import load_swapped, swap, swapped_parameters

__all__ = ["Conversion", "ConversionError", "convert", "load_swapped", "swap", "swapped_parameters"]
