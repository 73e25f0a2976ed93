"""The order of the folders is the order in which the library reads: imports only go back along it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "m2rnn"
ORDER = [
    *("ops", "layers", "models", "runs", "data", "problems"),
    *("training", "evaluation", "tasks", "bench", "convert", "cli"),
]
KNOW_NO_MODEL = {"runs": {"runs"}, "data": {"runs", "data"}, "problems": {"problems"}}


def part_of(module: str) -> str | None:
    """The part of the library a module belongs to; None for other packages and for ``m2rnn`` itself."""
    names = module.split(".")
    if names[:3] == ["m2rnn", "tasks", "problems"]:
        return "problems"
    return names[1] if names[0] == "m2rnn" and len(names) > 1 else None


def allowed_imports(part: str) -> set[str]:
    if part in KNOW_NO_MODEL:
        return KNOW_NO_MODEL[part]
    return set(ORDER[: ORDER.index(part) + 1])


def imported_modules(source: str, module: str) -> set[str]:
    """Every module that ``source`` imports anywhere, in functions too, with relative names resolved."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, *([base] if base else [])])
            modules |= {f"{base}.{alias.name}" for alias in node.names}
    return modules


def library_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def forbidden_imports(source: str, module: str) -> set[str]:
    part = part_of(module)
    assert part is not None
    found = {part_of(name) for name in imported_modules(source, module)} & set(ORDER)
    return {name for name in found if name is not None} - allowed_imports(part)


@pytest.mark.parametrize("path", library_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_back_along_the_order(path: Path) -> None:
    module = ".".join(["m2rnn", *path.relative_to(PACKAGE).with_suffix("").parts])
    assert not forbidden_imports(path.read_text(encoding="utf-8"), module)


def test_every_part_is_in_the_order() -> None:
    parts = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    parts |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert parts <= set(ORDER), "add the new part to ORDER, or put the code where its subject lives"


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("m2rnn.ops.scan.operator", "from m2rnn.layers import M2RNN", {"layers"}),
        ("m2rnn.ops.scan.operator", "def f():\n    import m2rnn.models.config", {"models"}),
        ("m2rnn.ops.scan", "from ..layers import mlp", {"layers"}),
        ("m2rnn.ops.scan", "from .. import training", {"training"}),
        ("m2rnn.ops.scan.operator", "from m2rnn import models", {"models"}),
        ("m2rnn.tasks.problems.word_problem", "from m2rnn.ops import m2rnn_scan", {"ops"}),
        ("m2rnn.tasks.problems.word_problem", "from m2rnn.tasks import settings", {"tasks"}),
        ("m2rnn.tasks.settings", "from m2rnn.tasks.problems import Group", set()),
        ("m2rnn.runs.folder", "import m2rnn.models", {"models"}),
        ("m2rnn.bench.operator", "from m2rnn.convert import convert", {"convert"}),
        ("m2rnn.models.model", "from m2rnn.layers import M2RNN\nfrom . import config\nimport torch", set()),
    ],
)
def test_the_check_sees_every_way_to_import(module: str, source: str, forbidden: set[str]) -> None:
    assert forbidden_imports(source, module) == forbidden


def test_no_backend_imports_the_public_operator() -> None:
    """It stands behind it; what both need has a file of its own."""
    backends = [path for path in (PACKAGE / "ops").rglob("*.py") if path.name not in ("__init__.py", "operator.py")]
    for path in backends:
        module = ".".join(["m2rnn", *path.relative_to(PACKAGE).with_suffix("").parts])
        imported = imported_modules(path.read_text(encoding="utf-8"), module)
        assert not [name for name in imported if ".operator." in f"{name}."], path
    assert len(backends) > 20


def test_no_function_of_the_tests_has_a_name_over_80_characters() -> None:
    names = [
        node.name
        for path in Path(__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(max(names, key=len)) <= 80, max(names, key=len)
