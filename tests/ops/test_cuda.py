"""What the CUDA backend needs no GPU for: its sources compile for every architecture it names, and its choices."""

import re

import pytest
import torch

from m2rnn.ops.cuda import compiler, launch

pytest.importorskip("cuda.core", reason="cuda-core is not installed")
nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
try:
    nvrtc.nvrtcVersion()
except Exception as error:
    pytest.skip(f"NVRTC does not load: {error}", allow_module_level=True)

BFLOAT16 = launch._Variant(value_dim=16, tiles=2, warps=2, slots=1, dtype=torch.bfloat16, parts=1, clip=True)
FLOAT16 = launch._Variant(value_dim=8, tiles=1, warps=1, slots=2, dtype=torch.float16, parts=2)
FLOAT32 = launch._Variant(value_dim=8, tiles=1, warps=1, slots=1, dtype=torch.float32, parts=3, clip=True)


@pytest.mark.parametrize("source", ["forward", "backward"])
@pytest.mark.parametrize(
    ("variant", "capability"), [(BFLOAT16, (8, 0)), (FLOAT16, (9, 0)), (FLOAT32, (12, 0))], ids=["8.0", "9.0", "12.0"]
)
def test_kernels_compile(
    source: str, variant: launch._Variant, capability: tuple[int, int], tmp_path, monkeypatch
) -> None:
    """With the shared memory that the launcher reserves, which the sources check."""
    monkeypatch.setattr(compiler, "_cache_folder", lambda: tmp_path)
    code = compiler.cubin(source, variant.macros(source), capability)
    assert code.startswith(b"\x7fELF")
    assert f"m2rnn_{source}".encode() in code
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == code
    file.write_bytes(b"from the cache")
    assert compiler.cubin(source, variant.macros(source), capability) == b"from the cache"


def test_a_compiler_error_shows_its_message() -> None:
    with pytest.raises(Exception, match="nonsense"):
        compiler._compile("nonsense x;", (("V", 16),), "sm_90")


def test_rows_are_split_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of rows cover the state once, in whole tiles, each within the shared memory and threads of a block."""
    for limit in (99 << 10, 227 << 10):
        monkeypatch.setattr(launch, "_shared_limit", lambda device, limit=limit: limit)
        for dtype, parts in ((torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 3)):
            for value_dim in (8, 16, 32, 64):
                for key_dim in (1, 16, 17, 64, 100, 256, 1000):

                    def variant(rows: int, value_dim=value_dim, dtype=dtype, parts=parts) -> launch._Variant:
                        return launch._Variant(value_dim, 1, -(-rows // 16), 1, dtype, parts)

                    if variant(16).shared_bytes("backward") > limit:  # what why_not says
                        assert value_dim == 64
                        assert parts > 1
                        continue
                    groups = launch._row_groups(variant, key_dim, torch.device("cuda"))
                    assert [row for g in groups for row in range(g.start, g.stop)] == list(range(key_dim))
                    for g in groups:
                        assert g.start % 16 == 0
                        needed = variant(g.stop - g.start)
                        assert needed.shared_bytes("backward") <= limit, (limit, dtype, value_dim, key_dim)
                        assert needed.threads <= 512


@pytest.mark.parametrize("source", ["forward", "backward"])
def test_two_tiles_a_warp_only_where_they_fit(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles of rows are padded to four, and many heads would have two tiles a warp."""
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: 132)
    for limit, fits in ((227 << 10, False), (1 << 20, True)):
        monkeypatch.setattr(launch, "_shared_limit", lambda device, limit=limit: limit)

        def variant(tiles: int) -> launch._Variant:
            return launch._Variant(32, tiles, -(-48 // (16 * tiles)), 1, torch.float32, 3)

        assert variant(1).shared_bytes("backward") <= limit
        tiles = launch._tiles(source, 1000, variant, torch.device("cuda"))
        assert tiles == (2 if fits or source == "forward" else 1)
        assert variant(tiles).shared_bytes(source) <= limit
        assert launch._tiles(source, 10, variant, torch.device("cuda")) == 1


def test_every_source_names_its_macros() -> None:
    """A macro that the launcher does not define would silently be 0 in an #if."""
    names = {name for name, _ in BFLOAT16.macros("forward")}
    for source in ("common.cuh", "forward.cu", "backward.cu"):
        text = (compiler._HERE / source).read_text()
        names |= set(re.findall(r"#define (\w+)", text))
        for condition in re.findall(r"#(?:el)?if (.*)", text):
            assert set(re.findall(r"[A-Z]\w+", condition)) <= names, condition
