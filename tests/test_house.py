"""The plan of the house: the rooms that rmlora_jax/README.md lists, and imports that keep to it."""

import ast
import itertools
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rmlora_jax"
PAGE = PACKAGE / "README.md"
# Public names that these modules import from higher floors, inside of functions.
MAY_REACH_UP = ("rmlora_jax", "rmlora_jax.hub")
PUBLIC = "rmlora_jax.public"  # what `rmlora_jax` hands on
CORE = ("adapt", "optim")
CORE_LIBRARIES = {"jax", "flax", "optax", "numpy"}  # numpy comes with jax


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the page, without its two head rows."""
    section = PAGE.read_text().split(f"\n## {heading}")[1].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def floors() -> dict[str, int]:
    """Each room with its floor."""
    return {room.strip("`"): int(floor) for floor, room, _ in table("The rooms")}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))} | {"run": ROOT / "run.py"}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    if module == "run":
        return "run.py"
    return module.split(".")[1] if "." in module else module


def not_at_once(tree: ast.Module) -> set[ast.AST]:
    """What does not run when a module is imported: functions, and what type checkers alone read."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    later = [node for node in ast.walk(tree) if isinstance(node, functions)
             or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return {inner for node in later for inner in ast.walk(node)}


def imports(module: str) -> list[tuple[str, str | None, bool]]:
    """(module, name or None, whether it is lazy) of every import, lazy ones included."""
    tree, found = TREES[module], []
    lazy = not_at_once(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, node in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import in line {node.lineno}"
            assert node.module
            found += [(node.module, alias.name, node in lazy) for alias in node.names]
    return found


def own_imports(module: str) -> list[tuple[str, str | None, bool]]:
    """Imports of this package: (module that is imported, name in it or None, lazy)."""
    found = []
    for target, name, lazy in imports(module):
        if target.split(".")[0] != "rmlora_jax":
            continue
        if name and f"{target}.{name}" in MODULES:
            target, name = f"{target}.{name}", None
        assert target in MODULES, f"{module} imports {target}"
        found.append((target, name, lazy))
    return found


def origin(module: str, name: str | None) -> str:
    """The module in which a name is written, where ``module`` only hands it on."""
    if module == "rmlora_jax":
        module = PUBLIC
    for target, given, _ in own_imports(module):
        if name and given == name:
            return origin(target, name)
    return module


def attributes(module: str) -> set[str]:
    """The modules behind ``rm.adapt``, where ``rm`` is a package that this module imports."""
    packages = {}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            packages |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return {
        origin(packages[node.value.id], node.attr)
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and packages.get(node.value.id) in MODULES
    }


def edges(module: str) -> set[str]:
    """The modules that ``module`` imports; names that are handed on lead to where they are from."""
    direct = {end for target, name, _ in own_imports(module)
              for end in (target, origin(target, name))}  # fmt: skip
    return direct | attributes(module)


def floor_of(module: str, known: dict[str, int]) -> float:
    if module == "rmlora_jax":  # the public names of the core, just above it
        return max(known[room] for room in CORE) + 0.5
    return known[room_of(module)]


def test_the_page_lists_every_room():
    rooms = {room_of(module) for module in MODULES} - {"rmlora_jax"}
    assert rooms == set(floors())
    numbers = list(floors().values())
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("room", sorted({room_of(module) for module in MODULES}))
def test_imports_lead_down(room):
    known, up = floors(), []
    for module in MODULES:
        if room_of(module) != room:
            continue
        for target, _, lazy in own_imports(module):
            if lazy and module in MAY_REACH_UP:
                continue
            same = room_of(target) == room
            if not same and floor_of(target, known) >= floor_of(module, known):
                up.append(f"{module} imports {target}")
    assert not up, "\n".join(sorted(set(up)))


def test_no_circle():
    graph = {
        module: {
            target for target, _, lazy in own_imports(module)
            if target != module and not (lazy and module in MAY_REACH_UP)
        }
        for module in MODULES
    }
    while True:  # modules that import none of those left are in no circle
        leaves = {module for module, targets in graph.items() if not targets}
        if not leaves:
            break
        graph = {m: targets - leaves for m, targets in graph.items() if m not in leaves}
    users = defaultdict(set)
    for module, targets in graph.items():
        for target in targets:
            users[target].add(module)
    while outer := {module for module in graph if not users[module]}:  # nor those above a circle
        graph = {m: targets for m, targets in graph.items() if m not in outer}
        for targets in users.values():
            targets -= outer
    assert not graph, "\n".join(f"{m} -> {', '.join(sorted(t))}" for m, t in graph.items())


@pytest.mark.parametrize("room", CORE)
def test_the_core_needs_jax_flax_and_optax_alone(room):
    for module in MODULES:
        if room_of(module) == room:
            libraries = {target.split(".")[0] for target, _, _ in imports(module)}
            strange = libraries - set(sys.stdlib_module_names) - CORE_LIBRARIES - {"rmlora_jax"}
            assert not strange, f"{module} imports {strange}"


def strings(module: str) -> set[str]:
    return {node.value for node in ast.walk(TREES[module])
            if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip


def joined(one: str, other: str) -> bool:
    """Whether one imports the other, or a registry of one names the other in full."""
    if other in edges(one) or one in edges(other):
        return True
    pairs = ((one, other), (other, one))
    return any(re.match(rf"{re.escape(b)}(:\w+)?$", text) for a, b in pairs for text in strings(a))


def test_one_batch_is_followed_in_ten_files():
    rows = table("One batch")
    assert [int(step) for step, *_ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) <= 10
    modules = [name_of(PACKAGE / file.strip("`")) for _, file, _ in rows]
    for module in modules:
        assert module in MODULES, module
    for one, other in itertools.pairwise(modules):
        assert joined(one, other), f"{one} and {other} do not import each other"
    assert any("tx.update" in MODULES[module].read_text() for module in modules)


def test_contributing_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:rmlora_jax|tests|configs)/[\w/.]+|\.ci/\w+)`", text)
    assert len(named) > 15
    assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
