"""The CUDA kernels without a GPU: their source as C++ for the processor, run by ``emulated_gpu.hpp``."""

import ctypes
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from m2rnn.ops.backends.cuda.compiler import source_of
from m2rnn.ops.backends.cuda.gpu import Gpu, Launch, Limits, gpus
from m2rnn.ops.scan.cuda import launch
from m2rnn.ops.scan.problem import Problem

COMPILER = shutil.which("g++")
OLDEST = 12  # of g++, which has half precision


def why_not() -> str | None:
    """Why no GPU can be emulated here."""
    if platform.system() != "Linux":
        return "fibers as Linux has them"
    if COMPILER is None:
        return f"g++ {OLDEST} or newer"
    version = subprocess.run([COMPILER, "-dumpversion"], check=True, capture_output=True, text=True).stdout
    return None if int(version.partition(".")[0]) >= OLDEST else f"g++ {OLDEST} or newer, not {version.strip()}"


H100 = Limits(multiprocessors=132, shared_total=228 << 10, shared_limit=227 << 10)

LAUNCH = """
static unsigned char arguments_[sizeof({struct})];
static void thread_() {{ m2rnn_{name}(*(const {struct}*)arguments_); }}
extern "C" bool run(unsigned blocks, unsigned threads, bool backwards, const void* arguments, unsigned long size) {{
    if (size != sizeof({struct})) return false;
    std::memcpy(arguments_, arguments, size);
    for (unsigned i = 0; i < blocks; i++) emulated::run_block(i, threads, backwards, thread_);
    return true;
}}
"""


class EmulatedGpu(Gpu):
    """Compiles kernels into ``folder``, each with its macros once, and runs them block after block."""

    def __init__(self, folder: Path, limits: Limits = H100) -> None:
        self.folder, self.limits, self.backwards = folder, limits, False
        self.kernels: dict[tuple[str, tuple[tuple[str, int], ...]], ctypes.CDLL] = {}
        self.launched: list[tuple[str, int]] = []  # kernels, and how many blocks of them

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """``launch.forward`` and ``launch.backward`` take tensors on the CPU."""
        with patch.dict(gpus, {torch.device("cpu"): self}):
            yield

    def kernel(self, source: str, macros: tuple[tuple[str, int], ...], threads: int, shared_bytes: int) -> Launch:
        if (source, macros) not in self.kernels:
            self.kernels[source, macros] = self._compile(source, macros)
        library = self.kernels[source, macros]

        def launch_kernel(blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
            self.launched.append((source, blocks))
            size = ctypes.c_ulong(ctypes.sizeof(arguments))
            ran = library.run(blocks, threads, self.backwards, ctypes.byref(arguments), size)
            assert ran, f"the launcher's arguments are not those of {source}.cu"

        return launch_kernel

    def current(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _compile(self, name: str, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
        defined = "".join(f"#define {macro} {value}\n" for macro, value in macros)
        header = (Path(__file__).parent / "emulated_gpu.hpp").read_text()
        footer = LAUNCH.format(name=name, struct=name.capitalize())
        source = self.folder / f"{name}-{len(self.kernels)}.cpp"
        source.write_text(header + defined + as_cpp(source_of(f"{name}.cu")) + footer)
        library = source.with_suffix(".so")
        options = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
        subprocess.run([COMPILER, *options, "-o", library, source], check=True)
        loaded = ctypes.CDLL(str(library))
        loaded.run.restype = ctypes.c_bool
        return loaded


def as_cpp(source: str) -> str:
    """CUDA C++ with each PTX instruction as a call: ``asm("a.b %0, %1;" : "=r"(d) : "r"(x))`` is ``a_b(d, x)``."""
    parts = []
    while found := re.search(r"\basm\b(?:\s+volatile)?\s*\(", source):
        end = _closing(source, found.end())
        text, *operands = _split(source[found.end() : end], ":")
        instruction = "".join(re.findall(r'"([^"]*)"', text)).split(" ")[0].rstrip(";")
        named = [x for part in operands[:2] for x in _split(part, ",") if x.strip()]  # outputs, then inputs
        expressions = [re.sub(r'^\s*"[^"]*"\s*', "", x) for x in named]  # without "=r" and the like
        # One without a name only hides something from the compiler
        call = f"{instruction.replace('.', '_')}({', '.join(expressions)})" if instruction else "(void)0"
        parts += [source[: found.start()], call]
        source = source[end + 1 :]
    return "".join(parts) + source


def _closing(source: str, start: int) -> int:
    """Where the parenthesis closes that is open at ``start``."""
    depth, quoted = 1, False
    for place in range(start, len(source)):
        character = source[place]
        quoted ^= character == '"'
        depth += 0 if quoted else (character == "(") - (character == ")")
        if depth == 0:
            return place
    raise ValueError("a parenthesis that does not close")


def _split(text: str, separator: str) -> list[str]:
    """At separators that stand in no quotes, parentheses or brackets."""
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += 0 if quoted else (character in "([") - (character in ")]")
        if character == separator and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts


class Scan(torch.autograd.Function):
    """The recurrence by the CUDA backend's launcher."""

    @staticmethod
    def forward(ctx, cu_seqlens, state_clip, q, k, v, f, weight, initial_state):
        problem = Problem(q, k, v, f, weight, initial_state, cu_seqlens, state_clip)
        y, final, saved = launch.forward(problem, True)
        ctx.save_for_backward(q, k, v, f, weight, initial_state, cu_seqlens, saved)
        ctx.state_clip = state_clip
        return y, final

    @staticmethod
    def backward(ctx, dy: Tensor, d_final: Tensor):
        *tensors, saved = ctx.saved_tensors
        return None, None, *launch.backward(Problem(*tensors, ctx.state_clip), saved, dy, d_final)
