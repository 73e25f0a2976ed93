"""Other people's models: lm-engine's checkpoints as this library's and back; M2RNN layers in transformers' hybrids.

And a model of either with W cut to a bound.
"""

from m2rnn.convert.conversion import Conversion, convert
from m2rnn.convert.cut import Cut, cut_state_weights
from m2rnn.convert.lm_engine import ConversionError
from m2rnn.convert.swapped import swapped_class
from m2rnn.convert.swapping import load_swapped, swap, swapped_parameters

__all__ = [
    "Conversion",
    "ConversionError",
    "Cut",
    "convert",
    "cut_state_weights",
    "load_swapped",
    "swap",
    "swapped_class",
    "swapped_parameters",
]
