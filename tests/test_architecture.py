"""Arrows between the rooms point one way: align -> samplers, align -> rewards, and nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"samplers": {"align", "rewards"}, "rewards": {"align", "samplers"}}


def imported_packages(source: str) -> set[str]:
    """Top-level packages a module imports anywhere, also by a constant string handed to an import function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                found.add(node.args[0].value.split(".")[0])
    return found


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_room_does_not_import_what_it_must_not_know(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"no modules found in {ROOT / room}"
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in files
        if (bad := imported_packages(path.read_text(encoding="utf-8")) & FORBIDDEN[room])
    }
    assert wrong == {}


@pytest.mark.parametrize(
    "source",
    [
        "import align",
        "import torch, align.config as c",
        "from align.models.base import Velocity",
        "def late():\n    from align import train",
        "if TYPE_CHECKING:\n    import align.config",
        "importlib.import_module('align.train')",
    ],
)
def test_every_way_to_import_is_seen(source):
    assert "align" in imported_packages(source)


def test_other_imports_are_not_mistaken():
    assert imported_packages("from . import align\nfrom .align import x\nimport alignment\nname = 'align'") == {
        "alignment"
    }
