"""M2RNN: a non-linear recurrent layer for language models whose hidden state is a matrix."""
