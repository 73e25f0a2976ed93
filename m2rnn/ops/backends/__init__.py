"""What the operators share: choice of a backend, checks, dtypes, compiled code."""

import os

IMPORTED_IN = os.getpid()  #: the process that imported this; another one was forked from it
