"""The shape of the code: imports run downwards, torch stays where it belongs, public names are declared."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "whyrank"
MAX_FILE_LINES = 450
MAX_BODY_LINES = 60
HEAVY = ("torch", "transformers", "tokenizers", "safetensors", "matplotlib", "jinja2", "vllm")

# From the ground up. A part imports from lower lines only, never from another part of its own line; a part is a module
# or a whole package, and the longest name that fits decides.
LAYERS = (
    ("errors", "records", "progress", "label_lines", "sentences", "generators", "generators.labels"),
    ("store", "generators.explanations", "calibration", "estimates"),
    ("recipe", "template", "datasets", "search", "waves"),
    ("passages", "combining", "ledger", "documents", "search_queries"),
    ("checkpoint", "judging", "ranking", "evaluation"),
    ("generators.hf", "generators.endpoint", "generators.chat_wire", "generators.scripted", "generators.overlap"),
    ("generators.vllm", "auto"),
    ("generators.opening",),
    ("rerank",),
    ("mining", "training", "almanac"),
    ("stages",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
# Neighbours on one line that may look at each other, because together they are one backend.
PAIRS = {("generators.endpoint", "generators.chat_wire"), ("generators.overlap", "generators.scripted")}
# Loading these loads torch. Everything else, the command line above all, must start without it.
NEEDS_TORCH = (
    "generators.hf",
    "generators.vllm",
    "training",
    "demo",
    "stages.distill",
    "stages.refine",
    "stages.following",
)
BUT_NOT = {"training", "training.config", "training.refine_config", "demo", "demo.config"}
# Functions that have a public name for the sake of tests or neighbours in their file, and are not offered to others.
NOT_OFFERED = {
    "cli.options": {"attribute_docs"},
    "datasets.formats": {"no_repeated_keys"},
    "generators.overlap": {"content_words"},
    "ranking": {"impute"},
}


@cache
def modules() -> Mapping[str, ast.Module]:
    """Every module below `whyrank.`, by its name without that prefix; the package itself is ''."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def statements(tree: ast.AST, *, is_top_level: bool) -> Iterator[ast.AST]:
    """All nodes, or those that run when the module is loaded (function bodies and TYPE_CHECKING blocks left out)."""
    for node in ast.iter_child_nodes(tree):
        is_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if is_top_level and (is_later or is_for_types):
            continue
        yield node
        yield from statements(node, is_top_level=is_top_level)


def imports(module: str, *, is_top_level: bool = False) -> set[str]:
    """What a module imports: own modules as `.name`, others by their first name."""
    found = set()
    for node in statements(modules()[module], is_top_level=is_top_level):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            origin, _, rest = str(node.module).partition(".")
            for alias in node.names:
                deeper = f"{rest}.{alias.name}".lstrip(".")
                found.add(origin if origin != "whyrank" else f".{deeper if deeper in modules() else rest}")
    return found


def own(module: str, *, is_top_level: bool = False) -> set[str]:
    """The modules of whyrank that a module imports."""
    return {name[1:] for name in imports(module, is_top_level=is_top_level) if name.startswith(".")}


def is_within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


@cache
def place(module: str) -> tuple[int, str]:
    """Layer and part of a module."""
    fitting = [(len(part), layer, part) for layer, parts in enumerate(LAYERS) for part in parts if fits(module, part)]
    assert fitting, f"{module} belongs to no layer: add it to LAYERS"
    _, layer, part = max(fitting)
    return layer, part


def fits(module: str, part: str) -> bool:
    """Whether a part covers a module; `generators` itself is only the protocol."""
    return module == part if part == "generators" else is_within(module, part)


def public_all(module: str) -> list[str] | None:
    for node in modules()[module].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            assert isinstance(names, list)
            return names
    return None


def defined(module: str) -> set[str]:
    """Public functions and classes of a module, without those that a decorator hands to the command line."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = [node for node in modules()[module].body if isinstance(node, kinds) and node.name[0] != "_"]
    decorators = {node.name: " ".join(map(ast.unparse, node.decorator_list)) for node in found}
    return {name for name, marks in decorators.items() if ".command(" not in marks and ".callback(" not in marks}


def bound(module: str) -> set[str]:
    """Every name that stands in a module after loading it."""
    found = set()
    for node in modules()[module].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


# ---- layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [name for name in modules() if name])
def test_imports_run_downwards(module: str) -> None:
    layer, part = place(module)
    for name in own(module):
        assert name, f"{module} imports from the package itself; name the module"
        below, other = place(name)
        is_allowed = below < layer or other == part or (part, other) in PAIRS
        assert is_allowed, f"{module} (layer {layer}, {part}) imports {name} (layer {below}, {other})"


def test_no_module_imports_itself_in_a_circle() -> None:
    list(TopologicalSorter({module: own(module) - {module} for module in modules()}).static_order())


def test_mining_training_and_almanac_do_not_know_each_other() -> None:
    parts = ("mining", "training", "almanac")
    for module in modules():
        mine = [part for part in parts if is_within(module, part)]
        assert not [
            name for name in own(module) for part in parts if is_within(name, part) and mine not in ([part], [])
        ]


# ---- torch ----------------------------------------------------------------------------------------------------


def parents(module: str) -> set[str]:
    """The packages that are loaded before a module is."""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def loaded_with(module: str) -> set[str]:
    """Every module of whyrank that is loaded when this one is, itself included."""
    found, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= (own(name, is_top_level=True) | parents(name)) - found
    return found


@pytest.mark.parametrize("module", list(modules()))
def test_torch_is_loaded_only_where_models_run(module: str) -> None:
    if module in BUT_NOT or not any(is_within(module, part) for part in NEEDS_TORCH):
        heavy = {name: imports(name, is_top_level=True) & set(HEAVY) for name in loaded_with(module)}
        assert not {name: found for name, found in heavy.items() if found}


def test_only_generators_hf_and_training_import_torch_and_transformers() -> None:
    importing = {module for module in modules() if imports(module) & {"torch", "transformers"}}
    strangers = {module for module in importing if not is_within(module, "generators.hf")}
    strangers = {module for module in strangers if not is_within(module, "training")}
    assert strangers <= {"generators.opening"}  # asks the hub for a card, inside a function


def asked_for(module: str) -> set[str]:
    """Packages that are imported by their name in a text, as optional ones are."""
    calls = (node for node in ast.walk(modules()[module]) if isinstance(node, ast.Call))
    named = (call for call in calls if ast.unparse(call.func) in ("require", "import_module") and call.args)
    texts = (call.args[0].value for call in named if isinstance(call.args[0], ast.Constant))
    return {str(text).partition(".")[0] for text in texts}


def test_only_the_vllm_backend_imports_vllm() -> None:
    importing = {module for module in modules() if "vllm" in imports(module) | asked_for(module)}
    assert importing == {"generators.vllm"}


def test_only_the_report_and_the_curves_import_matplotlib() -> None:
    importing = {module for module in modules() if "matplotlib" in imports(module)}
    assert importing == {"demo.report", "training.curves"}


@pytest.mark.parametrize(
    "start",
    [
        "import whyrank",
        "import sys\nsys.argv[1:] = ['--help']\nfrom whyrank.cli import main\ntry: main()\nexcept SystemExit: pass",
    ],
)
def test_starting_loads_nothing_heavy(start: str) -> None:
    code = f"{start}\nimport sys; sys.stderr.write(' '.join(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


# ---- public names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", list(modules()))
def test_all_names_what_exists_and_everything_public(module: str) -> None:
    offered = public_all(module)
    if offered is None:
        assert not defined(module)
        return
    assert len(offered) == len(set(offered))
    assert set(offered) <= bound(module)
    assert defined(module) - set(offered) == NOT_OFFERED.get(module, set())


def test_modules_import_from_each_other_only_what_is_offered() -> None:
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("whyrank"):
                origin = str(node.module).partition(".")[2]
                names = {alias.name for alias in node.names if f"{origin}.{alias.name}".lstrip(".") not in modules()}
                constants = {name for name in names if name.isupper()}
                hidden = names - set(public_all(origin) or ()) - constants
                assert not hidden, f"{module} imports {hidden} from {origin}"


# ---- sizes ----------------------------------------------------------------------------------------------------


def test_files_and_functions_are_short() -> None:
    for path in SOURCE.rglob("*.py"):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= MAX_FILE_LINES, f"{path.name}: {num_lines} lines"
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
                num_lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
                assert num_lines <= MAX_BODY_LINES, f"{module}.{node.name}: {num_lines} lines"


def test_nothing_prints() -> None:
    for module, tree in modules().items():
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
        assert "print" not in {ast.unparse(call.func) for call in calls}, module
