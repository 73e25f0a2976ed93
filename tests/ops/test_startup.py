"""Before the first result: imports stay light, caches may be missing, slow choices are announced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from m2rnn.ops import available_backends
from m2rnn.ops.backends.cuda import compiler

needs_cpu = pytest.mark.skipif(
    available_backends().get("cpu", "no") is not None, reason="the cpu backend does not run here"
)

PROBLEM = """
import sys, warnings
import torch
torch.set_num_threads(1)
from m2rnn.ops import available_backends, m2rnn_scan
inputs = [torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), torch.full((1, 3, 1), 0.5)]
inputs.append(torch.eye(2)[None])
"""


def _child(script: str, **environment: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", PROBLEM + script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_import_leaves_heavy_libraries_alone_and_numba_may_be_missing() -> None:
    """One process: a light import; without numba the reference runs, says so once, and "cpu" is refused."""
    _child("""
heavy = {"numba", "transformers", "llvmlite"} & set(sys.modules)
assert not heavy, f"import m2rnn.ops imports {heavy}"

sys.modules["numba"] = None
assert "numba" in available_backends()["cpu"]
assert available_backends()["reference"] is None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y, _ = m2rnn_scan(*inputs)
messages = [str(w.message) for w in caught]
assert len(messages) == 1 and "reference" in messages[0] and "numba" in messages[0], messages
expected, _ = m2rnn_scan(*inputs, backend="reference")
assert torch.equal(y, expected)
try:
    m2rnn_scan(*inputs, backend="cpu")
except ValueError as error:
    assert "numba" in str(error), error
else:
    raise AssertionError("backend='cpu' ran without numba")
""")


@needs_cpu
def test_cache_folder_that_cannot_be_written_is_announced_and_survived(tmp_path: Path) -> None:
    """The kernels are compiled for this process alone."""
    file = tmp_path / "file"
    file.touch()
    _child(
        """
import numpy as np
from m2rnn.ops.scan import cpu
x = np.linspace(-3, 3, 100)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = cpu.tanh(x)  # the kernel that compiles fastest
np.testing.assert_allclose(y, np.tanh(x), rtol=1e-15)
assert any("cache" in str(w.message) for w in caught), [str(w.message) for w in caught]
""",
        NUMBA_CACHE_DIR=str(file / "below"),
    )


# A user without a home, as in a container that runs under a bare number
NO_HOME = """
import os, pwd
def unknown(user):
    raise KeyError(user)
pwd.getpwuid = unknown
for name in ("HOME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
"""


@needs_cpu
@pytest.mark.skipif(os.name != "posix", reason="homes are looked up elsewhere")
@pytest.mark.parametrize("chosen", [True, False])
def test_a_user_without_a_home_can_compile(chosen: bool, tmp_path: Path) -> None:
    environment = {"NUMBA_CACHE_DIR": str(tmp_path) if chosen else ""}
    _child(
        NO_HOME
        + f"""
import numpy as np
from m2rnn.ops.scan import cpu
from m2rnn.ops.backends.cuda import compiler
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = cpu.tanh(np.ones(3))
np.testing.assert_allclose(y, np.tanh(np.ones(3)), rtol=1e-15)
assert any("NUMBA_CACHE_DIR" in str(w.message) for w in caught) is not {chosen}, [str(w.message) for w in caught]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert compiler._cache_folder() is None
assert "XDG_CACHE_HOME" in str(caught[0].message), caught[0].message
""",
        **environment,
    )
    assert chosen == any(tmp_path.rglob("apply_tanh-64.o"))


def _cubin(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(compiler, "_cache_folder", lambda: folder)
    monkeypatch.setattr(compiler, "_compile", lambda *_: b"code")
    return compiler.cubin("forward", (), (9, 0))


def test_cuda_kernels_in_the_cache_are_for_all_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cubin(tmp_path, monkeypatch) == b"code"
    (file,) = tmp_path.iterdir()
    (plain := tmp_path / "plain").touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_a_cuda_cache_that_fails_is_announced_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder could be written when it was chosen; then the disk is full, or a file cannot be read."""
    with pytest.warns(UserWarning, match="cannot write compiled CUDA kernels"):
        assert _cubin(tmp_path / "gone", monkeypatch) == b"code"
    _cubin(tmp_path, monkeypatch)
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="cannot write compiled CUDA kernels"):
        assert _cubin(tmp_path, monkeypatch) == b"code"
    assert list(tmp_path.iterdir()) == [file]  # nothing half written is left


@needs_cpu
def test_warm_start_imports_no_compiler() -> None:
    """The next process loads its kernels from the cache: it needs neither numba nor torch's own compiler."""
    from m2rnn.ops.backends.cpu import code as cpu_code

    for name in ("forward", "backward"):
        cpu_code.kernel(name, 32)
    _child("""
for x in inputs:
    x.requires_grad_()
y, _ = m2rnn_scan(*inputs, backend="cpu")
y.sum().backward()
compilers = {"numba", "torch._dynamo"} & set(sys.modules)
assert not compilers, compilers
""")


@needs_cpu
@pytest.mark.parametrize("damage", ["cut short", "other bytes", "empty"])
def test_damaged_cache_file_is_not_loaded(damage: str, tmp_path: Path) -> None:
    from m2rnn.ops.backends.cpu import code as cpu_code  # which needs numba's LLVM

    code = bytes(range(256)) * 8
    path = tmp_path / "folder" / "kernel.o"
    assert cpu_code._read(path) is None
    cpu_code._write(path, code)
    assert cpu_code._read(path) == code
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes({"cut short": content[:700], "other bytes": content, "empty": b""}[damage])
    assert cpu_code._read(path) is None


@needs_cpu
def test_kernels_in_the_cache_are_for_this_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home may be shared by machines, whose processors do not have all of each other's instructions."""
    from m2rnn.ops.backends.cpu import code as cpu_code

    paths = {cpu_code._cache_path(name, bits) for name in ("forward", "backward") for bits in (32, 64)}
    monkeypatch.setattr(cpu_code, "_features", lambda: "+other")
    paths.add(cpu_code._cache_path("forward", 32))
    monkeypatch.setattr(cpu_code.llvm, "get_host_cpu_name", lambda: "other")
    paths.add(cpu_code._cache_path("forward", 32))
    assert len(paths) == 6


@needs_cpu
def test_kernels_in_the_cache_are_of_this_source() -> None:
    """All that the kernels are made of counts, else an upgrade would run those of the version before."""
    _child("""
from pathlib import Path
before = set(sys.modules)
import m2rnn.ops.scan.cpu_kernels, m2rnn.ops.vector_scan.cpu_kernels
from m2rnn.ops.backends.cpu import code as cpu_code
new = {Path(module.__file__) for name, module in sys.modules.items() if name[:5] == "m2rnn" and name not in before}
new = {path for path in new if path.parent.name == "cpu" or path.name == "cpu_kernels.py"}
assert new == set(cpu_code._SOURCES), new
""")


@needs_cpu
def test_threads_may_be_the_first_to_use_a_kernel_together() -> None:
    """Each may load one, of which one is kept: those that are dropped take nothing of the others with them."""
    _child("""
import gc, threading
import numpy as np
from m2rnn.ops.scan import cpu
started = threading.Barrier(8)
right = []
def work(dtype):
    x = np.linspace(-3, 3, 100, dtype=dtype)
    started.wait()
    right.append(np.allclose(cpu.tanh(x), np.tanh(x), rtol=1e-5))
threads = [threading.Thread(target=work, args=(dtype,)) for dtype in (np.float32, np.float64) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
gc.collect()
assert right == [True] * 8, right
m2rnn_scan(*inputs, backend="cpu")
""")


@needs_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_may_be_the_first_to_use_the_kernels() -> None:
    """Only the parent ran PyTorch's OpenMP threads, which do not survive the fork: the child would wait forever."""
    _child("""
import os, time
torch.set_num_threads(2)
torch.ones(1000, 1000).sin()
child = os.fork()
if child == 0:
    with torch.no_grad():
        m2rnn_scan(*(x.repeat(4, *[1] * (x.dim() - 1)) for x in inputs[:4]), inputs[4], backend="cpu")
    os._exit(0)
for _ in range(600):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")
assert status == 0, status
""")
