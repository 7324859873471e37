"""Who may import whom: the rules of CONTRIBUTING.md, read off imports and #includes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ppkernels"
CSRC = ROOT / "csrc"

SHARED = ("ppkernels._checks", "ppkernels._powered", "ppkernels._resized")
FOR_USERS = ("ppkernels._optimizers", "ppkernels._text")
CHECKED = ("ppkernels._checks", "ppkernels._backend")
SEVERAL = ("ppkernels._many", "ppkernels._shares")
BITS = "ppkernels.ops._bits"
LAYOUT = "ppkernels.ops._layout"
ENTRIES = "ppkernels.ops._entries"
LIBRARY = "ppkernels.ops._library"
SPARSE = (ENTRIES, LIBRARY, "ppkernels.ops._operands", "ppkernels.ops.topology")
SHARED_BY_KERNELS = (
    LAYOUT,
    "ppkernels.ops._device",
    "ppkernels.ops._point",
    "ppkernels.ops._table",
    "ppkernels.ops._tile",
)
POWER_GPU = "ppkernels.ops.power.gpu"
TESTING = tuple(
    f"ppkernels.testing_{part}"
    for part in ("products", "selection", "sparse", "statistics", "steps")
)
USES_OPS = ("torch.*", "{room}.*", "ppkernels.ops", *SHARED)

# Files of the package, and what they may import besides the standard library; the first row that
# fits decides. "a.b" is that module and the public names in it, "a.b.*" everything below it too;
# {room} is the file's own folder.
IMPORTS = [
    ("__init__.py", ["ppkernels.*"]),
    ("_extension.py", ["torch.*"]),
    ("_backend.py", ["torch.*"]),
    ("_checks.py", ["torch.*"]),
    ("_many.py", ["torch.*"]),
    ("_shares.py", []),
    ("_text.py", []),
    ("_optimizers.py", ["torch.*"]),
    ("_powered.py", ["torch.*", "ppkernels.ops", "ppkernels._checks"]),
    ("_resized.py", ["torch.*", "ppkernels", "ppkernels._powered"]),
    ("autograd.py", ["ppkernels.ops.*"]),
    ("reference.py", ["ppkernels.ops.*"]),
    ("testing.py", ["torch.*", "mpmath", "ppkernels", *TESTING]),
    ("testing_products.py", ["torch.*", "ppkernels"]),
    ("testing_selection.py", ["torch.*", "mpmath", "ppkernels"]),
    ("testing_sparse.py", ["torch.*", "ppkernels", "ppkernels._backend"]),
    ("testing_statistics.py", ["torch.*", "ppkernels"]),
    ("testing_steps.py", ["torch.*", "mpmath", "ppkernels"]),
    ("ops/__init__.py", ["ppkernels.ops.*"]),
    ("ops/_bits.py", ["torch.*"]),
    ("ops/_device.py", ["torch.*"]),
    ("ops/_entries.py", ["torch.*"]),
    ("ops/_layout.py", ["torch.*"]),
    ("ops/_library.py", ["torch.*"]),
    ("ops/_operands.py", ["torch.*", *CHECKED]),
    ("ops/_point.py", ["triton.*"]),
    ("ops/_table.py", ["triton.*"]),
    ("ops/_tile.py", ["triton.*"]),
    ("ops/*/__init__.py", ["{room}.*"]),
    # A power and a product: the one room that is built on another.
    ("ops/power_linear/reference.py", ["torch.*", LAYOUT, "ppkernels.ops.power"]),
    ("ops/power_linear/gpu.py", ["torch.*", "triton.*", "{room}.*", *SHARED_BY_KERNELS, POWER_GPU]),
    ("ops/power_linear/kernels.py", ["triton.*", "ppkernels.ops._point", POWER_GPU]),
    ("ops/power_linear/op.py", ["torch.*", "{room}.*", *CHECKED, LAYOUT, "ppkernels.ops.power"]),
    ("ops/power_linear/model.py", ["torch.*", "ppkernels.ops._device"]),
    ("ops/power_linear/tiles.py", ["torch.*", "triton.*", "{room}.*", "ppkernels.ops._device"]),
    # Their masks are `BitMask`s.
    ("ops/select/op.py", ["torch.*", "{room}.*", *CHECKED, *SEVERAL, "ppkernels.ops.bitmask"]),
    ("ops/statistics/op.py", ["torch.*", "{room}.*", *CHECKED, *SEVERAL, "ppkernels.ops.bitmask"]),
    # θ as `power` makes it.
    ("ops/statistics/reference.py", ["torch.*", BITS, "ppkernels.ops.power.reference"]),
    ("ops/statistics/result.py", []),
    ("ops/statistics/gpu.py", ["torch.*", "triton.*", *SHARED_BY_KERNELS, POWER_GPU]),
    ("ops/select/keys.py", ["triton.*", "{room}.*", "ppkernels.ops._point"]),
    ("ops/select/kernels.py", ["triton.*", "{room}.*", *SHARED_BY_KERNELS]),
    # The weight of both is a `Topology` and its values.
    ("ops/topology/reference.py", ["torch.*", BITS, ENTRIES]),
    ("ops/topology/op.py", ["torch.*", "{room}.*", *CHECKED, ENTRIES, LIBRARY]),
    (
        "ops/topology/checks.py",
        ["torch.*", "{room}.*", *CHECKED, ENTRIES, "ppkernels.ops.bitmask"],
    ),
    (
        "ops/topology/topology.py",
        ["torch.*", "{room}.*", *CHECKED, ENTRIES, "ppkernels.ops.bitmask"],
    ),
    ("ops/spmm/reference.py", ["torch.*", ENTRIES, LAYOUT]),
    ("ops/spmm/op.py", ["torch.*", "{room}.*", *CHECKED, *SPARSE, LAYOUT]),
    ("ops/sparse_conv/reference.py", ["torch.*", ENTRIES]),
    ("ops/sparse_conv/op.py", ["torch.*", "{room}.*", *CHECKED, *SPARSE]),
    ("ops/*/reference.py", ["torch.*", BITS]),
    ("ops/*/gpu.py", ["torch.*", "triton.*", "{room}.*", *SHARED_BY_KERNELS]),
    ("ops/*/op.py", ["torch.*", "{room}.*", *CHECKED, BITS, LAYOUT]),
    ("ops/step/table.py", ["torch.*", LAYOUT, "ppkernels._checks"]),
    ("ops/step/kept.py", ["torch.*", "{room}.*", "ppkernels._checks"]),
    ("ops/step/lists.py", ["torch.*", "{room}.*", "ppkernels._checks", BITS]),
    ("ops/step/constants.py", ["triton.*", "{room}.*", "ppkernels.ops._point"]),
    ("ops/bitmask/bitmask.py", ["torch.*", "{room}.*", "ppkernels._checks"]),
    (
        "nn/*.py",
        [
            *(*USES_OPS, *FOR_USERS, "ppkernels.autograd"),
            *("ppkernels._extension", "ppkernels._shares"),
        ],
    ),
    ("optim/*.py", [*USES_OPS]),
    ("sparsity/plots.py", ["matplotlib.*", "{room}.*", "ppkernels._text"]),
    (
        "sparsity/entries.py",
        [*USES_OPS, "ppkernels.nn", "ppkernels.nn.choice", "ppkernels.nn.checkpoint"],
    ),
    ("sparsity/*.py", [*USES_OPS, *FOR_USERS, "ppkernels.nn", "ppkernels._shares"]),
]
PYTHON_FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported_names(source: str) -> list[str]:
    """Every imported name in full: ``from a.b import c`` is ``a.b.c``."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_allowed(name: str, allowed: list[str]) -> bool:
    module, _, last = name.rpartition(".")
    below = tuple(entry[:-1] for entry in allowed if entry.endswith("*"))
    return (
        name.split(".")[0] in sys.stdlib_module_names
        or name in allowed
        or (module in allowed and not is_private(last))
        or f"{name}.".startswith(below)
    )


@pytest.mark.parametrize("path", PYTHON_FILES, ids=str)
def test_package_imports(path: Path) -> None:
    rows = [allowed for pattern, allowed in IMPORTS if fnmatch(path.as_posix(), pattern)]
    assert rows, f"ppkernels/{path} has no row in IMPORTS: which layer does it belong to?"
    room = ".".join(("ppkernels", *path.parent.parts))
    allowed = [entry.format(room=room) for entry in rows[0]]
    names = imported_names((PACKAGE / path).read_text())
    assert [name for name in names if not is_allowed(name, allowed)] == []


def test_the_rules_refuse_what_they_should() -> None:
    rules = dict(IMPORTS)
    room = {"room": "ppkernels.ops.power"}
    op = [entry.format(**room) for entry in rules["ops/*/op.py"]]
    assert is_allowed("ppkernels.ops.power.gpu", op)
    assert not is_allowed("ppkernels.ops.step.reference", op)
    assert not is_allowed("triton", op)
    assert not is_allowed(".reference", op)
    assert is_allowed("ppkernels.ops.power", rules["nn/*.py"])
    assert not is_allowed("ppkernels.ops.power.op.Power", rules["nn/*.py"])
    assert not is_allowed("ppkernels.optim.PowerSGD", rules["nn/*.py"])
    assert not is_allowed("ppkernels.nn.PowerLinear", rules["optim/*.py"])
    assert not is_allowed("ppkernels.testing", rules["optim/*.py"])
    assert not is_allowed("tests.samples", rules["__init__.py"])


def private_names(source: str) -> list[str]:
    """Names with a leading underscore that are taken from ppkernels."""
    tree = ast.parse(source)
    ours = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                if f"{module}.{alias.name}".strip(".").split(".")[0] == "ppkernels":
                    ours.add(alias.asname or alias.name.split(".")[0])
    found = [
        name
        for name in imported_names(source)
        if name.split(".")[0] == "ppkernels" and any(map(is_private, name.split(".")))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in ours:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("folder", ["tests", "bench", "examples"])
def test_users_take_public_names_only(folder: str) -> None:
    private = {
        str(path.relative_to(ROOT)): names
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (names := private_names(path.read_text()))
    }
    assert private == {}


def test_private_names_are_found() -> None:
    assert private_names("import ppkernels as pp\npp._backend.uses_reference()")
    assert private_names("from ppkernels._checks import check_alpha")
    assert private_names("from ppkernels import _extension")
    assert not private_names(
        "import ppkernels as pp\npp.power(weight, 2.0)\nself._size = pp.__name__"
    )


# ---- C++: simd <- kernels <- bindings

LAYERS = ("simd", "kernels", "bindings")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
INTRINSICS = re.compile(r"\w*intrin\.h|arm_(neon|sve)\.h|altivec\.h")


def kind(header: str) -> str:
    if INTRINSICS.fullmatch(header):
        return "intrinsics"
    if header == "Python.h":
        return "torch"
    folder = header.split("/")[0]
    return folder if folder in (*LAYERS, "torch", "ATen", "c10") else "standard"


# The bindings call kernels; a formula belongs below them.
INCLUDES = {
    "csrc/simd": {"standard", "intrinsics", "simd"},
    "csrc/kernels": {"standard", "simd", "kernels"},
    "csrc/bindings": {"standard", "kernels", "bindings", "torch"},
    "tests/cpp": {"standard", "simd", "kernels"},
}


@pytest.mark.parametrize(
    "path",
    [
        path.relative_to(ROOT)
        for folder in INCLUDES
        for path in sorted((ROOT / folder).glob("*"))
        if path.suffix in (".h", ".cpp")
    ],
    ids=str,
)
def test_includes(path: Path) -> None:
    source = (ROOT / path).read_text()
    allowed = INCLUDES[path.parent.as_posix()]
    headers = INCLUDE.findall(source)
    assert [header for header in headers if kind(header) not in allowed] == []
    if "intrinsics" not in allowed:
        assert re.findall(r"\b_mm\d*_\w+", source) == []


def test_torch_is_seen_by_bindings_alone() -> None:
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp")]
    seeing = [
        path.parent.name
        for path in sources
        if "torch" in map(kind, INCLUDE.findall(path.read_text()))
    ]
    assert set(seeing) == {"bindings"}


# ---- import ppkernels


def test_import_loads_no_triton_and_asks_for_no_gpu() -> None:
    script = """
import sys, warnings
import torch, torch.cuda

def asked(*args, **kwargs):
    raise AssertionError("import ppkernels asked for a GPU")

for name in ("is_available", "device_count", "init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, asked)
before = "triton" in sys.modules
warnings.simplefilter("ignore", RuntimeWarning)
import ppkernels
assert before or "triton" not in sys.modules, "import ppkernels imported triton"
assert not torch.cuda.is_initialized()
late = {"tests", "bench", "examples", "ppkernels.testing"} & set(sys.modules)
assert not late, late
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_long_file_says_why() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.cpp", "*.h"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        lines = (ROOT / name).read_text().splitlines()
        assert len(lines) <= 350 or "onger than 350 lines" in lines[1], (
            f"{name}: {len(lines)} lines"
        )
