"""The house: which module may import which, what is public, and that the map of it in CONTRIBUTING is true."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_probes"
CONTRIBUTING = " ".join((ROOT / ".github" / "CONTRIBUTING.md").read_text().split())

FLOORS = [
    {"options", "distributed", "precision"},
    {"tasks"},
    {"probes"},
    {"network"},
    {"replay"},
    {"checkpoints", "progress"},
    {"figures"},
    {"report"},
    {"training"},
    {"posthoc"},
    {"charts"},
    {"images"},
    {"loggers"},
    {"callback"},
    {"cli"},
]
"""From the ground up: a module imports from its own room and from those below."""


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"}


@cache
def imported_by(module: str) -> tuple[set[str], set[str]]:
    """Modules of the package that a module imports, wherever in it, and the packages of others."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            names = [node.module or ""]
        else:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            inside = name.removeprefix("lightning_probes.")
            if name.split(".")[0] != "lightning_probes":
                others.add(name.split(".")[0])
            else:
                assert inside in MODULES, f"{module} imports {name}, which is no module but a room"
                own.add(inside)
    return own, others


def reached_from(module: str) -> set[str]:
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for other in imported_by(waiting.pop())[0] - found:
            found.add(other)
            waiting.append(other)
    return found


def floor_of(module: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if module.split(".")[0] in rooms)


def test_every_room_is_on_a_floor_and_every_floor_has_its_rooms() -> None:
    assert {module.split(".")[0] for module in MODULES} == set().union(*FLOORS)


def test_imports_point_down() -> None:
    up = [
        (module, other) for module in MODULES for other in imported_by(module)[0] if floor_of(other) > floor_of(module)
    ]
    assert not up


def test_imports_have_no_circle() -> None:
    assert not [module for module in MODULES if module in reached_from(module)]


def test_probes_know_no_network_and_no_lightning() -> None:
    for module in filter(lambda module: module.startswith("probes."), MODULES):
        for reached in {module, *reached_from(module)}:
            assert reached.split(".")[0] in ("probes", "tasks", "distributed", "precision"), (module, reached)
            assert not imported_by(reached)[1] & {"lightning", "pytorch_lightning"}, (module, reached)


def test_contributing_lists_the_modules_that_import_lightning() -> None:
    importing = {module for module in MODULES if imported_by(module)[1] & {"lightning", "pytorch_lightning"}}
    sentence = re.search(r"[Oo]nly (.*?) import Lightning\.", CONTRIBUTING)
    assert sentence is not None
    assert modules_named(sentence[1]) == importing


def modules_named(text: str) -> set[str]:
    return {name.replace("/", ".") for name in re.findall(r"`([\w/]+)\.py`", text)}


def test_the_map_has_every_module_in_its_room() -> None:
    table = (ROOT / ".github" / "CONTRIBUTING.md").read_text().split("## Architecture")[1].split("**The walk")[0]
    found = set()
    for line in table.splitlines():
        if (room := re.match(r"\| `(\w+)/` \|", line)) is not None:
            found |= {f"{room[1]}.{name}" for name in modules_named(line)}
        elif line.startswith("| `"):
            found |= modules_named(line.split("|")[1])
    assert found == set(MODULES)


def test_the_walk_of_an_activation_is_short() -> None:
    text = re.search(r"\*\*The walk of an activation\*\*(.*?)\*\*What is saved", CONTRIBUTING)
    assert text is not None
    at_a_point, between = text[1].split("Between points")
    walk = modules_named(at_a_point)
    assert at_a_point.count(" -> ") + 1 == len(walk) <= 7
    assert len(walk - {"training.refit", "probes.fit"} | modules_named(between)) <= 7
    # From the callback all of them can be reached by imports alone.
    assert walk | modules_named(between) <= reached_from("callback")


def test_tested_versions_are_those_of_the_constraints() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    table = text.split("[tool.lightning-probes.tested]")[1].split("\n\n")[0]
    tested = {name: re.findall(r'"(.*?)"', minors) for name, minors in re.findall(r"^([\w-]+) = \[(.*)\]", table, re.M)}
    needed = re.search(r"^dependencies = \[(.*)\]", text, re.M)
    assert needed is not None
    assert {re.split(r"\W", name)[0] for name in re.findall(r'"(.*?)"', needed[1])} <= tested.keys()
    for name in ("", "-oldest"):
        lines = (ROOT / "tests" / f"constraints{name}.txt").read_text().splitlines()
        pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
        for package, minors in tested.items():
            assert ".".join(pinned[package].split(".")[:2]) in minors, package
