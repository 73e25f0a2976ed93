"""What every test gets: poisoned memory, one thread, a fixed seed, one run per backend of this machine."""

import ctypes
import gc
import os
import random
import signal
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
# numba fixes its largest pool at import; the thread-count tests want more threads than two cores have.
os.environ.setdefault("NUMBA_NUM_THREADS", str(max(4, os.cpu_count() or 1)))

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from m2rnn.ops import available_backends

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests of Ctrl-C send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():  # triton reads it when it is imported: its kernels run on the CPU, for test_triton.py
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

settings.register_profile(
    "m2rnn", derandomize=True, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("m2rnn")


def _poison_uninitialised_memory() -> None:
    """A read of memory that nobody wrote must show: torch's is NaN, malloc's (numpy, numba) huge or NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        m_perturb = -6  # glibc: fresh memory is filled with the complement of this byte, freed memory with the byte
        ctypes.CDLL(None).mallopt(m_perturb, 0x80)  # 0x7f7f7f7f is 3.4e38 in float32, NaN in float16
    except (AttributeError, OSError, TypeError):
        pass  # not glibc


_poison_uninitialised_memory()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="also what takes minutes: tanh of every float32, every launch configuration of fla",
    )
    parser.addoption("--fuzz-seconds", type=float, default=2.0, help="how long the seeded fuzz runs")
    parser.addoption("--fuzz-seed", type=int, default=0, help="first seed of the fuzz")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        reasons = available_backends()
        if INTERPRETED:
            reasons["triton"] = "no GPU; test_triton.py interprets its kernels, too slow for all cases"
        metafunc.parametrize(
            "backend",
            [
                pytest.param(name, marks=[] if reason is None else pytest.mark.skip(reason=f"{name}: {reason}"))
                for name, reason in reasons.items()
            ],
            scope="session",
        )


@pytest.fixture(scope="session")
def device(backend: str) -> str:
    """Where the tensors of a test of ``backend`` live."""
    return "cuda" if backend in ("triton", "cuda") else "cpu"


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (for libraries that still use the global generator)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _large_memory_goes_back() -> Iterator[None]:
    """Several test processes share a GPU, and PyTorch keeps what a test with large tensors has freed."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 1 << 30:
        gc.collect()
        torch.cuda.empty_cache()
