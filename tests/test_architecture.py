"""The house stands: arrows point down, the front door is light, and nothing runs what it was only asked to read."""

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import periplus

HOUSE = Path(periplus.__file__).parent
#: Rooms by floor; a name stands for a module or for a package with all that is in it.
FLOORS = [
    {"errors", "files", "seeds", "objectives", "metrics", "channels", "information"},
    {"data", "networks", "piecewise", "passes", "autoencoders", "stacking", "pictures", "inversion", "paths"},
    {"config", "machine", "locks", "checkpoints", "runs", "training", "features"},
    {"evaluation", "scoring", "comparing", "locating", "passages", "path_judge"},
    {"plots", "report", "console", "engines", "sweeps", "textbook", "benchmarking"},
    # the doors; __init__ is the front one
    {
        "study",
        "doctor",
        "sweep_command",
        "bench_command",
        "compare_command",
        "latent_commands",
        "explorer",
        "commands",
        "cli",
        "__main__",
        "__init__",
    },
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
#: Within floor 0 the mathematics knows nothing but what can go wrong.
TRAINING_FLOOR = FLOOR_OF["training"]


def modules() -> dict[str, Path]:
    """Dotted names below `periplus`, with the file of each: `config`, `data`, `data.images`, `__init__`."""
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Modules of this house that a module imports, anywhere in it, lazily or not."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (within(alias.name) for alias in node.names if alias.name.split(".")[0] == "periplus")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide where an arrow points"
            if node.module and node.module.split(".")[0] == "periplus":
                for alias in node.names:
                    longer = within(f"{node.module}.{alias.name}")
                    yield longer if longer in MODULES else within(node.module)


def within(dotted: str) -> str:
    return dotted.removeprefix("periplus").removeprefix(".") or "__init__"


def floor(module: str) -> int:
    return FLOOR_OF[module.split(".")[0]]


def calls(module: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by the text of what is called: `torch.load`, `eval`, `loss.backward`."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_room_is_on_a_floor():
    rooms = {module.split(".")[0] for module in MODULES}
    assert rooms <= set(FLOOR_OF), f"put these on a floor: {rooms - set(FLOOR_OF)}"
    assert set(FLOOR_OF) - rooms <= {"study"}, f"these are gone: {set(FLOOR_OF) - rooms}"
    assert sum(map(len, FLOORS)) == len(FLOOR_OF), "a room is on two floors"


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str):
    for target in imports(module):
        assert target in MODULES, f"{module} imports {target}, which does not exist"
        assert floor(target) <= floor(module), f"{module} (floor {floor(module)}) imports {target} (floor {floor(target)})"


def test_there_are_no_cycles():
    sorter = graphlib.TopologicalSorter({module: set(imports(module)) for module in MODULES})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a cycle: {' -> '.join(reversed(error.args[1]))}")


def test_the_ground_floor_is_mathematics():
    """`objectives` and `metrics` import nothing of the house but its errors and their own rooms; no files, no networks, no optimisers."""
    for module in (m for m in MODULES if m.split(".")[0] in ("objectives", "metrics", "channels", "information")):
        room = module.split(".")[0]
        assert {target for target in imports(module) if target.split(".")[0] != room} <= {"errors"}
        names = {ast.unparse(node) for node in ast.walk(tree(module)) if isinstance(node, (ast.Attribute, ast.Name))}
        assert not {"open", "Path", "torch.optim", "os"} & names
    assert not set(imports("errors")) and set(imports("files")) == {"errors"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_below_training_differentiates_or_optimises_parameters(module: str):
    if module.split(".")[0] in ("training", "textbook") or module == "features.recipe":  # loops as well: of what ours is timed against, of the judge
        return
    for name, call in calls(module):
        assert not name.endswith(".backward"), f"{module}:{call.lineno} calls {name}"
    if floor(module) < TRAINING_FLOOR:
        assert "torch.optim" not in ast.unparse(tree(module)), f"{module} knows of optimisers"


FORBIDDEN_IMPORTS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "os.system", "torch.jit.load", "yaml.load"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_is_read_can_run(module: str):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found = {(node.module or "").split(".")[0]}
            imported = {f"{node.module}.{alias.name}" for alias in node.names}
            assert not imported & FORBIDDEN_CALLS, f"{module}:{node.lineno} imports {imported & FORBIDDEN_CALLS}"
        else:
            continue
        assert not found & FORBIDDEN_IMPORTS, f"{module}:{node.lineno} imports {found & FORBIDDEN_IMPORTS}"
    for name, call in calls(module):
        assert name not in FORBIDDEN_CALLS, f"{module}:{call.lineno} calls {name}"
        for keyword in call.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            assert keyword.arg not in ("allow_pickle", "shell") or is_false, f"{module}:{call.lineno}: {name}({ast.unparse(keyword)})"


HEAVY = ("tyro", "rich", "matplotlib", "typst", "jinja2", "sklearn", "PIL", "scipy.stats", "hypothesis", "pytest")


def test_the_front_door_is_light():
    code = f"import sys, periplus; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=HOUSE.parent)
    assert run.stdout.split() == [] and run.stderr == ""


def test_the_front_door_opens_what_it_names():
    assert all(hasattr(periplus, name) for name in periplus.__all__)
    assert periplus.__all__ == sorted(periplus.__all__)
