"""The cache of compiled code: found again, never damaged, shared by processes, and no more than slow where it fails."""

import ast
import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import m2rnn
from m2rnn.ops import available_backends
from m2rnn.ops.backends import cache
from m2rnn.ops.backends.cuda import compiler

needs_cpu = pytest.mark.skipif(
    available_backends().get("cpu", "no") is not None, reason="the cpu backend does not run here"
)
VARIABLES = ("M2RNN_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
CODE = bytes(range(256)) * 8


@pytest.fixture(autouse=True)
def _a_process_that_has_not_warned_with_a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_warned", False)
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # as Windows calls it


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("M2RNN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _asked(code: bytes = CODE, kind: str = "cpu", name: str = "forward-32", key: str = "key") -> tuple[bytes, int]:
    """What the cache gives, and how often it compiled."""
    count = 0

    def compile_code() -> bytes:
        nonlocal count
        count += 1
        return code

    return cache.compiled(kind, name, key, compile_code), count


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_code_is_compiled_once(folder: Path) -> None:
    assert _asked() == (CODE, 1)
    assert _asked(b"never compiled") == (CODE, 0)
    assert [path.parent for path in _files(folder)] == [folder / "cpu"]


@pytest.mark.parametrize("other", [{"key": "other"}, {"name": "backward-32"}, {"kind": "cuda"}])
def test_another_key_name_or_kind_is_other_code(other: dict[str, str], folder: Path) -> None:
    _asked()
    assert _asked(b"other", **other) == (b"other", 1)
    assert _asked() == (CODE, 0)
    assert len(_files(folder)) == 2


@pytest.mark.parametrize(
    ("chosen", "kind", "expected"),
    [
        (("M2RNN_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"), "cpu", "M2RNN_CACHE_DIR/cpu"),
        (("M2RNN_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"), "cuda", "M2RNN_CACHE_DIR/cuda"),
        (("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"), "cpu", "NUMBA_CACHE_DIR/m2rnn/cpu"),
        (("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"), "cuda", "XDG_CACHE_HOME/m2rnn/cuda"),
        (("NUMBA_CACHE_DIR",), "cuda", "home/.cache/m2rnn/cuda"),
        (("XDG_CACHE_HOME",), "cpu", "XDG_CACHE_HOME/m2rnn/cpu"),
        ((), "cpu", "home/.cache/m2rnn/cpu"),
    ],
)
@pytest.mark.parametrize("others", ["unset", "empty"])
def test_the_folder_follows_from_the_variables_in_their_order(
    chosen: tuple[str, ...], kind: str, expected: str, others: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in VARIABLES:
        if variable in chosen:
            monkeypatch.setenv(variable, str(tmp_path / variable))
        elif others == "empty":
            monkeypatch.setenv(variable, "")
    _asked(kind=kind)
    assert [path.parent for path in _files(tmp_path)] == [tmp_path / expected]


def test_a_tilde_in_the_variable_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell replaces it in a Dockerfile or a service's settings."""
    monkeypatch.setenv("M2RNN_CACHE_DIR", "~/kernels")
    _asked()
    assert [path.parent for path in _files(tmp_path)] == [tmp_path / "home" / "kernels" / "cpu"]


@pytest.mark.parametrize("damage", ["cut short", "cut to its digest", "other bytes", "another digest", "empty"])
def test_a_damaged_file_is_compiled_anew_and_mended(damage: str, folder: Path) -> None:
    _asked()
    (file,) = _files(folder)
    whole = file.read_bytes()
    content = bytearray(whole)
    content[0 if damage == "another digest" else 1000] ^= 1
    kept = {"cut short": 700, "cut to its digest": 32, "empty": 0}.get(damage)
    file.write_bytes(content if kept is None else whole[:kept])
    assert _asked() == (CODE, 1)
    assert file.read_bytes() == whole
    assert _asked(b"never compiled") == (CODE, 0)


def test_files_are_for_all_users(folder: Path) -> None:
    """As the user's mask says, not for the user alone as temporary files are."""
    _asked()
    (file,) = _files(folder)
    (plain := folder / "plain").touch()
    assert file.stat().st_mode == plain.stat().st_mode


def _full_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Which takes the first bytes of a file."""

    def write(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write)


def _read_only_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir()
    (folder / "cpu").mkdir(mode=0o555)
    if os.access(folder / "cpu", os.W_OK):  # the superuser may write all the same

        def write(path: Path, content: bytes) -> int:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(Path, "write_bytes", write)


def _file_in_the_way(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.touch()


FAILURES: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "No space left on device": _full_disk,
    "Permission denied": _read_only_folder,
    "(?:Not a directory|File exists)": _file_in_the_way,
}


@pytest.mark.skipif(os.name != "posix", reason="the system's words for errors are others")
@pytest.mark.parametrize("reason", FAILURES)
def test_a_cache_that_cannot_be_written_is_announced_and_survived(
    reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call compiles, and one warning names the folder, the reason and the variable to set."""
    FAILURES[reason](monkeypatch, folder)
    before = _files(folder)
    with pytest.warns(UserWarning, match=rf"in {folder}/cpu \({reason}\).* Set M2RNN_CACHE_DIR to a folder"):
        assert _asked() == (CODE, 1)
    assert _asked() == (CODE, 1)
    assert _asked(kind="cuda") == (CODE, 1)
    assert _files(folder) == before, "nothing half written is left"


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_warning_names_the_folder_that_was_tried(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot keep") as caught:
        _asked()
    own = "" if variable == "M2RNN_CACHE_DIR" else "/m2rnn"
    assert f"in {tmp_path}/file{own}/cpu (" in str(caught[0].message).replace(os.sep, "/")


def test_a_file_that_cannot_be_replaced_is_announced_and_survived(folder: Path) -> None:
    _asked()
    (file,) = _files(folder)
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="M2RNN_CACHE_DIR"):
        assert _asked() == (CODE, 1)
    assert list(file.parent.iterdir()) == [file], "nothing half written is left"


def test_a_read_only_cache_that_has_the_code_needs_no_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image with the kernels compiled beforehand."""
    _asked()
    monkeypatch.setattr(Path, "write_bytes", None)
    monkeypatch.setattr(Path, "mkdir", None)
    assert _asked(b"never compiled") == (CODE, 0)


def test_an_interrupt_leaves_nothing_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _asked()
    assert not _files(folder)


@pytest.mark.parametrize("chosen", [None, "~/kernels"])
def test_a_user_without_a_home_compiles_each_time_and_is_told(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chosen:
        monkeypatch.setenv("M2RNN_CACHE_DIR", chosen)
    _without_a_home(monkeypatch)
    said = f"in {chosen or '~/.cache/m2rnn'}/cuda (Could not determine home directory.)"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [_asked(kind=kind) for kind in ("cuda", "cuda", "cpu")] == [(CODE, 1)] * 3
    assert len(caught) == 1
    assert said in str(caught[0].message)
    assert "M2RNN_CACHE_DIR" in str(caught[0].message)


def test_a_user_without_a_home_may_choose_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_a_home(monkeypatch)
    assert _asked() == (CODE, 1)
    assert _asked() == (CODE, 0)


def _without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a bare number."""

    def unknown(user: object) -> None:
        raise KeyError(user)

    pwd = pytest.importorskip("pwd", reason="homes are looked up elsewhere")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")


WRITER = """
import sys, time
from m2rnn.ops.backends import cache
open(sys.argv[1], "w").close()
code = bytes(1 << 21)
for _ in range(100):
    cache._write("cpu", "forward", code)
"""


def test_processes_that_write_the_same_file_at_once_leave_it_whole(folder: Path, tmp_path: Path) -> None:
    """From the first time on that there is a file, its code can be read, and no write fails."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", WRITER]
    begun = [tmp_path / name for name in ("first", "second")]
    writers = [subprocess.Popen([*command, str(path)], stderr=subprocess.PIPE, text=True) for path in begun]
    codes: list[bytes | None] = []
    while any(writer.poll() is None for writer in writers):
        if (folder / "cpu" / "forward").exists():
            codes.append(cache._read("cpu", "forward"))
    for writer in writers:
        errors = writer.communicate()[1]
        assert writer.returncode == 0, errors
    assert len(codes) > 10
    assert set(codes) == {bytes(1 << 21)}
    assert all(path.exists() for path in begun)
    assert [path.name for path in _files(folder)] == ["forward"]


def _cpu_code():
    """Which needs numba's LLVM."""
    from m2rnn.ops.backends.cpu import code

    return code


@needs_cpu
def test_cpu_kernels_go_through_the_cache(folder: Path) -> None:
    """The kernel that compiles fastest: another process loads it, unless it is damaged."""
    import numpy as np

    kernel = _cpu_code().kernel.__wrapped__

    def tanh_of_one() -> float:
        x, y = np.ones(16), np.empty(16)
        kernel("apply_tanh", 64)(x.ctypes.data, y.ctypes.data, 16)
        return float(y[0])

    expected = pytest.approx(np.tanh(1.0), rel=1e-15)
    assert tanh_of_one() == expected
    (file,) = _files(folder)
    assert file.parent == folder / "cpu"
    assert file.name.startswith("apply_tanh-64-")
    before = file.stat()
    assert tanh_of_one() == expected
    assert file.stat() == before
    file.write_bytes(file.read_bytes()[:-1])
    assert tanh_of_one() == expected
    assert file.stat().st_size == before.st_size


@needs_cpu
def test_cpu_kernels_are_for_this_processor_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home may be shared by machines, whose processors do not have all of each other's instructions."""
    code = _cpu_code()
    keys = {code._key()}
    for module, name in (
        (code, "_features"),
        (code.llvm, "get_host_cpu_name"),
        (code.llvm, "get_process_triple"),
        (code.importlib.metadata, "version"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: "other")
            keys.add(code._key())
    assert len(keys) == 5


@needs_cpu
def test_cpu_kernels_are_of_this_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the library's that a kernel's module imports counts, else an upgrade would run the version before."""
    code = _cpu_code()
    reached: set[Path] = set()
    modules = {f"m2rnn.ops.{module}" for module, _ in code.KERNELS.values()} | {code.__name__}
    while modules:
        path = _file_of(modules.pop())
        if path is None or path in reached or path.name == "__init__.py" or path == Path(cache.__file__):
            continue
        reached.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
            elif isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
    assert {path.name for path in reached} >= {"cpu_kernels.py", "layout.py", "simd.py", "code.py"}
    assert reached <= set(code._SOURCES), reached - set(code._SOURCES)

    for number, source in enumerate(code._SOURCES):
        changed = tmp_path / source.name
        changed.write_text(source.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        sources = list(code._SOURCES)
        before = code._key()
        with monkeypatch.context() as patch:
            sources[number] = changed
            patch.setattr(code, "_SOURCES", sources)
            assert code._key() != before


def _file_of(module: str) -> Path | None:
    """Of a module of the library; None for packages and for what is no module."""
    first, *names = module.split(".")
    path = Path(m2rnn.__file__).parent.joinpath(*names).with_suffix(".py")
    return path if first == "m2rnn" and path.is_file() else None


class _Compiler:
    """Stands for NVRTC, which is not needed to ask the cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        monkeypatch.setattr(compiler, "_compile", self)

    def __call__(self, source: str, options: object) -> bytes:
        self.runs += 1
        return f"code {self.runs}".encode()


def test_cuda_kernels_go_through_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged one, which the driver would refuse or run, is compiled anew."""
    nvrtc = _Compiler(monkeypatch)
    for _ in range(2):
        assert compiler.cubin("forward", (("V", 16),), (9, 0)) == b"code 1"
    (file,) = _files(folder)
    assert file.parent == folder / "cuda"
    assert file.name.startswith("forward-")
    file.write_bytes(file.read_bytes()[:-1])
    assert compiler.cubin("forward", (("V", 16),), (9, 0)) == b"code 2"
    assert nvrtc.runs == 2


def test_cuda_kernels_are_of_this_source_compiler_and_architecture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvrtc = _Compiler(monkeypatch)
    kernel = ("forward", (("V", 16),), (9, 0))
    compiler.cubin(*kernel)
    compiler.cubin("backward", *kernel[1:])
    compiler.cubin("forward", (("V", 8),), (9, 0))
    compiler.cubin("forward", (("V", 16),), (12, 0))
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_versions", lambda: ("cuda-core 9",))
        compiler.cubin(*kernel)
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "source_of", lambda file: "other")
        compiler.cubin(*kernel)
    assert nvrtc.runs == len(_files(folder)) == 6
    assert compiler.cubin(*kernel) == b"code 1"
