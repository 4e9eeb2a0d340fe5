"""The rules of the house, read off the code: folders, floors, commands, circles, and each setting declared once."""

import ast
from collections import defaultdict

import pytest

from page_house import FLOORS, MEASURING, REPO, floors, modules

FILES = modules()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
COMMANDS = {name for name, file in FILES.items() if "run_cli(main)" in file.read_text(encoding="utf-8")} - {"console"}
# What a command may have of its own; METHOD is a key of both plans, and one command reads the imatrix that another writes.
OWN = set("model out tag result force config check dry_run method imatrix".split())


def imported(tree: ast.AST) -> dict[str, set[str]]:
    """Modules of src that a module imports, lazily or for types too, each with the names that it takes ("" for the module)."""
    found: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            found[node.module] |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in FILES:
                    found[alias.name].add("")
    return found


IMPORTS = {name: imported(tree) for name, tree in TREES.items()}


def test_every_module_has_a_floor():
    assert floors().keys() == FILES.keys()
    for folder, stories in FLOORS.items():
        assert {FILES[name].parent.name for names in stories.values() for name in names.split()} <= {folder}


def test_imports_go_down_only():
    floor = floors()
    up = [f"{a} -> {b}" for a, others in IMPORTS.items() for b in others if floor[b][:2] > floor[a][:2]]
    assert not up


def test_no_product_module_imports_what_measures():
    product = [name for name in FILES if not name.startswith(MEASURING)]
    assert not [f"{a} -> {b}" for a in product for b in IMPORTS[a] if b.startswith(MEASURING)]


def test_a_command_is_imported_by_commands_as_a_step_only():
    entries = defaultdict(set)
    for name, others in IMPORTS.items():
        for other in others.keys() & COMMANDS:
            assert name in COMMANDS, f"{name} is no command and imports the command {other}"
            entries[other] |= others[other]
    assert not {name: taken for name, taken in entries.items() if len(taken) > 1}


def test_no_circle_of_files():
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if state.get(name) == 1:
            pytest.fail("circle: " + " -> ".join([*path[path.index(name) :], name]))
        if name not in state:
            state[name] = 1
            for other in IMPORTS[name]:
                visit(other, (*path, name))
            state[name] = 2

    for name in FILES:
        visit(name, ())


def declared(tree: ast.AST) -> set[str]:
    """Names of the settings that a module declares: fields made by setting(), options of argparse."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            if isinstance(node.value.func, ast.Name) and node.value.func.id == "setting":
                found.add(node.target.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            if isinstance(node.args[0], ast.Constant) and str(node.args[0].value).startswith("--"):
                found.add(node.args[0].value.removeprefix("--").replace("-", "_"))
    return found


@pytest.mark.parametrize(
    ("folder", "plans"),
    [
        ("quant", "recipe calibration_text calibrated_pass rounders pack_plan plans quant_save gguf_pack"),
        ("distill", "opd_data"),
    ],
)
def test_a_key_of_a_recipe_or_plan_is_declared_once(folder, plans):
    where, floor = defaultdict(list), floors()
    for name, tree in TREES.items():
        if FILES[name].parent.name == folder and floor[name][2] not in ("measuring", "pages"):
            for key in declared(tree) - OWN:
                where[key].append(name)
    keys = set().union(*(declared(TREES[name]) for name in plans.split())) - OWN
    assert keys and not {key: where[key] for key in keys if len(where[key]) > 1}


def test_the_house_does_not_grow_unseen():
    """Wanted are 100 modules and 22,000 lines; whoever adds says so here, whoever deletes lowers the figures."""
    assert len(FILES) <= 116 and sum(len(file.read_text().splitlines()) for file in FILES.values()) <= 38_350
    assert len(list((REPO / "pipelines").glob("*.sh"))) <= 23
