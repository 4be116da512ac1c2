"""Holds imports and includes to the floors: one direction, no circles, no back doors."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("deepfusion_kernels", "deepfusion")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NATIVE = sorted(
    path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")
)

# a file may import files of its own floor or a lower one
KERNEL_FLOORS = (
    ("_triton", "_native", "checks", "cases", "cross_tokenizer"),
    ("backends", "ops.shared"),
    ("ops",),
    ("nn", "patching"),
    ("catalog",),
    ("bench", "__main__"),
)
DRIVER_FLOORS = (
    ("config", "config_tables", "config_recipes", "config_rules", "files", "seeding", "metrics")
    + ("messages", "plots", "ranks"),
    ("models", "data", "wire", "checkpoints", "ledger"),
    ("step_checkpoint",),
    ("training", "stages"),
    ("device", "server", "report", "report_privacy", "report_trust"),
    ("asked", "library", "uploads"),
    ("assess", "starts", "trust"),
    ("pipeline",),
    ("flower",),
    ("cli",),
)
LONE_IMPORTERS = {
    "triton": ("deepfusion_kernels/_triton.py",),
    "flwr": ("deepfusion/flower/",),
    "transformers": (
        "deepfusion_kernels/patching.py",
        "deepfusion/models/",
        "deepfusion/data/corpora.py",
    ),
    "torch.distributed": (
        "deepfusion/server/shard.py",
        "deepfusion_kernels/ops/fused_linear_kl/vocabulary_parallel.py",
    ),
}
FORBIDDEN_NAMES = {"utils", "common", "misc", "helpers", "v2"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCES}


def imports_of(path: Path) -> Iterator[str]:
    """Every module a file imports, absolute; `from a import b` gives a.b where that is one."""
    own = name_of(path).split(".")
    package = own if path.name == "__init__.py" else own[:-1]
    tree = ast.parse(path.read_text())
    for_types_alone = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types_alone:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in MODULES else base


IMPORTS = {name_of(path): sorted(set(imports_of(path))) for path in SOURCES}


def floor_of(module: str) -> int | None:
    package, _, inner = module.partition(".")
    floors = KERNEL_FLOORS if package == "deepfusion_kernels" else DRIVER_FLOORS
    levels = [
        (len(prefix), level)
        for level, prefixes in enumerate(floors)
        for prefix in prefixes
        if inner == prefix or inner.startswith(prefix + ".")
    ]
    return max(levels)[1] if levels else None


def test_kernels_never_import_the_driver_nor_either_the_tests() -> None:
    for module, imported in IMPORTS.items():
        for other in imported:
            root = other.split(".")[0]
            assert root not in ("benchmarks", "tests"), f"{module} imports {other}"
            if module.startswith("deepfusion_kernels"):
                assert root != "deepfusion", f"{module} imports {other}"


def test_every_module_has_a_floor_and_imports_go_down() -> None:
    for module, imported in IMPORTS.items():
        if module in PACKAGES:
            continue
        floor = floor_of(module)
        assert floor is not None, (
            f"{module} stands on no floor: give it a row in this test and in docs/floors.md"
        )
        for other in imported:
            if other.split(".")[0] != module.split(".")[0] or other in PACKAGES:
                continue
            below = floor_of(other)
            assert below is not None, f"{module} imports {other}, which stands on no floor"
            assert below <= floor, f"{module} imports {other}, which stands above it"


def test_no_import_circles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import circle: {' -> '.join((*path, module))}"
        if module in done:
            return
        for other in IMPORTS[module]:
            if other in IMPORTS and other != module and other not in PACKAGES:
                visit(other, (*path, module))
        done.add(module)

    for module in IMPORTS:
        visit(module, ())


def test_an_op_never_imports_another() -> None:
    for module, imported in IMPORTS.items():
        if not module.startswith("deepfusion_kernels.ops."):
            continue
        stem = module.split(".")[2]
        for other in imported:
            if other.startswith("deepfusion_kernels.ops."):
                assert other.split(".")[2] in (stem, "shared"), f"{module} imports {other}"


def test_implementations_stay_inside_their_op() -> None:
    private = re.compile(r"deepfusion_kernels\.ops\.(\w+)\.(\w*_impl|reference|cases)$")
    for module, imported in IMPORTS.items():
        for other in imported:
            match = private.match(other)
            if match and match[1] != "shared":
                assert module.startswith(f"deepfusion_kernels.ops.{match[1]}."), (
                    f"{module} imports {other}"
                )


@pytest.mark.parametrize("library", sorted(LONE_IMPORTERS))
def test_one_door_to_each_library(library: str) -> None:
    for module, imported in IMPORTS.items():
        where = MODULES[module].relative_to(ROOT).as_posix()
        if any(other == library or other.startswith(library + ".") for other in imported):
            assert where.startswith(LONE_IMPORTERS[library]), f"{where} imports {library}"


def test_only_native_files_call_the_native_library_and_only_backends_read_the_environment() -> None:
    for path in SOURCES:
        where, text = path.relative_to(ROOT).as_posix(), path.read_text()
        if "torch.ops.deepfusion_native" in text:
            assert path.name in ("native_impl.py", "native_cuda.py"), where
        if where.startswith("deepfusion_kernels/") and "os.environ" in text:
            assert path.name == "backends.py", where


def test_backend_names_do_not_appear_above_the_ops() -> None:
    names = re.compile(r"backend\s*=\s*[\"'](triton|cuda|cpu|reference)[\"']")
    for path in SOURCES:
        where = path.relative_to(ROOT).as_posix()
        if not where.startswith("deepfusion_kernels/ops/"):
            assert not names.search(path.read_text()), f"{where} names a backend"


def test_devices_and_server_never_meet() -> None:
    for module, imported in IMPORTS.items():
        for other in imported:
            assert not (
                module.startswith("deepfusion.device") and other.startswith("deepfusion.server")
            ), module
            assert not (
                module.startswith("deepfusion.server") and other.startswith("deepfusion.device")
            ), module


def test_init_files_hand_names_on_and_define_nothing() -> None:
    for path in SOURCES:
        if path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text()).body:
            named = isinstance(node, ast.Assign) and all(
                isinstance(target, ast.Name) and target.id.startswith("__")
                for target in node.targets
            )
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert named or docstring or isinstance(node, ast.Import | ast.ImportFrom), (
                f"{path}: line {node.lineno}"
            )


def test_no_pickle_no_remote_code_no_swallowed_errors_no_junk_drawers() -> None:
    pickles = re.compile(r"torch\.(load|save)\(|\bpickle\b|trust_remote_code\s*=\s*True")
    for path in SOURCES:
        text = path.read_text()
        found = pickles.search(text)
        assert not found, f"{path}: {found and found[0]}"
        assert path.stem not in FORBIDDEN_NAMES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name | type(None)):
                broad = node.type is None or node.type.id in ("Exception", "BaseException")
                reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                assert not broad or reraises, f"{path}:{node.lineno}: a broad except that goes on"


def test_size_bars() -> None:
    """No file over 300 lines, no function over 60 (a kernel 90)."""
    for path in (*SOURCES, *NATIVE):
        lines = path.read_text().count("\n")
        assert lines <= 300, f"{path}: {lines} lines; find its second idea"
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                kernel = node.name.endswith("_kernel")
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= (90 if kernel else 60), f"{path}: {node.name} has {length} lines"


def test_native_sources_include_downwards() -> None:
    for path in NATIVE:
        stem, text = path.parent.name, path.read_text()
        if "m.def(" in text:
            assert path.name == "library.cpp", path
        for included in re.findall(r'#include [<"]([^>"]+)[>"]', text):
            if included.startswith(("torch/", "ATen/", "c10/")):
                assert included.startswith(
                    ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/")
                ), f"{path} includes {included}"
                assert path.name != "bindings.cpp", f"bindings.cpp includes {included}"
            elif "/" in included and (ROOT / "csrc" / included).exists():
                allowed = ("common",) if stem == "common" else ("common", stem)
                allowed = (*allowed, "common") if stem != "tests" else ("common",)
                assert included.split("/")[0] in allowed, f"{path} includes {included}"
