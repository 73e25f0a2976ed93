"""``python -m m2rnn``: the ``m2rnn`` command, for ``torchrun -m m2rnn train …``."""

from m2rnn.cli import main

if __name__ == "__main__":
    main()
