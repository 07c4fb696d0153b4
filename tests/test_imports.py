"""The one import rule, the size of files and the names of modules, read from the sources."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sweeps", "trainables", "engines", "analysis")
# sweeps -> trainables -> engines; sweeps may call analysis; analysis reads records and gates alone.
MAY_IMPORT = {
    "sweeps": ("sweeps", "trainables", "engines", "analysis"),
    "trainables": ("trainables", "engines"),
    "engines": ("engines",),
    "analysis": ("analysis", "trainables.record", "trainables.gates"),
}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(source: str) -> set[str]:
    """Full names of what a module imports, wherever in it, including names of modules imported from
    packages.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def broken(package: str, source: str) -> list[str]:
    own = [name for name in imported(source) if name.split(".")[0] in PACKAGES]
    allowed = MAY_IMPORT[package]
    return sorted(name for name in own if not any(f"{name}.".startswith(f"{word}.") for word in allowed))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    assert not broken(path.relative_to(ROOT).parts[0], path.read_text())


def test_the_rule_can_fail() -> None:
    assert broken("engines", "from trainables.record import Record")
    assert broken("trainables", "import sweeps.launch")
    assert broken("analysis", "def f():\n    from trainables import distill")
    assert broken("analysis", "from engines.errors import InputError")
    assert not broken("analysis", "from trainables.record import Record")
    assert not broken("sweeps", "from analysis import pareto")


def test_package_inits_are_empty() -> None:
    inits = [path for path in SOURCES if path.name == "__init__.py"]
    assert len(inits) >= len(PACKAGES)
    assert [path for path in inits if path.read_text().strip()] == []


def test_files_stay_readable() -> None:
    folders = [*PACKAGES, "tests", "benchmarks"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


def test_scripts_shadow_no_other_package() -> None:
    """`python sweeps/k_grid.py` puts sweeps/ first on the path: its modules must not hide anyone else's."""
    own = {path.stem for package in PACKAGES for path in (ROOT / package).glob("*.py")} - {
        "__init__",
        "__main__",
    }
    others = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    assert own & others == set()


def test_records_and_gates_need_no_torch() -> None:
    for name in ("record", "gates"):
        assert not any(word.split(".")[0] == "torch" for word in imported((ROOT / f"trainables/{name}.py").read_text()))


def test_constraints_are_name_and_version_alone() -> None:
    """Anything else (an address, an editable install) makes pip refuse the whole file, or look elsewhere."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!+-]+", line)] == []
    assert "torch==2.13.0" in lines
