"""The rules of the house: which way imports point, how large things may grow, what may lie where."""

from __future__ import annotations

import ast
import configparser
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP_LEVEL = {
    *(".ci", ".github", ".gitignore", ".ruff.toml", "LICENSE", "README.md", "setup.cfg", "setup.py"),
    *("configs", "data_tools", "launch", "pretrain", "tests"),
}
# From the bottom. A room imports from itself and from lower floors.
FLOORS = (
    ("data_tools.redaction",),
    ("data_tools.errors", "data_tools.progress"),
    ("data_tools.arguments", "data_tools.format", "data_tools.parallel"),
    ("data_tools.listing",),
    ("data_tools.remote",),
    ("data_tools.corpus",),
    ("data_tools.media",),
    ("data_tools.build", "data_tools.columns", "data_tools.scenes", "data_tools.verify"),
    ("data_tools.pack",),
    ("data_tools.hashing",),
    ("data_tools.dedup", "data_tools.rewrite"),
    ("data_tools.index", "data_tools.plan_stream", "data_tools.preview", "data_tools.rows"),
    ("data_tools.__main__",),
    ("config",),
    ("process",),
    ("report",),
    ("objectives",),
    ("towers",),
    ("stream",),
    ("engine",),
    ("evaluate", "loop"),
    ("export", "predict"),
    ("tasks",),
    ("job", "train"),
    ("plan",),
    ("cli",),
    ("launch",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MAX_FILE, MAX_FUNCTION, MAX_NESTING = 400, 60, 3
HEAVY = {"torch", "torchvision", "open_clip", "transformers", "deepspeed"}


def _files(*suffixes: str) -> list[Path]:
    """Files that are, or would be, under version control."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_level_imports(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node)


def _room(module: str) -> str | None:
    """The room of this project that an imported module belongs to; None: not of this project."""
    parts = module.split(".")
    if parts[0] == "pretrain":
        return parts[1] if len(parts) > 1 else None
    if parts[0] == "data_tools":
        return ".".join(parts[:2]) if len(parts) > 1 else None
    return parts[0] if parts[0] == "launch" else None


def _sources() -> list[Path]:
    return [path for path in _files(".py") if _name(path).split("/")[0] in ("pretrain", "data_tools", "launch")]


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


# ---- imports --------------------------------------------------------------------------------------------------------


ASKS_ABOVE = {"data_tools/plan_stream.py"}  # a verb about training: it imports pretrain when it runs


def test_imports_point_down():
    faults = []
    for path in _sources():
        if _name(path) in ASKS_ABOVE:
            continue
        own = _room(_name(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        for module in _imports(_tree(path)):
            used = _room(module)
            if own is None or used is None or used == own:
                continue
            if FLOOR_OF[used] >= FLOOR_OF[own]:
                faults.append(f"{_name(path)} imports {module}")
    assert not faults


def test_every_room_has_a_floor():
    rooms = {_room(_name(path).removesuffix(".py").replace("/", ".")) for path in _sources()}
    assert rooms - {"__init__", "data_tools.__init__", None} <= set(FLOOR_OF)


def test_launch_scripts_import_only_command_lines():
    own = {"sys", "pathlib", "pretrain", "launch"}
    for path in (ROOT / "launch").glob("*.py"):
        assert {module.split(".")[0] for module in _imports(_tree(path))} <= own, path


def test_data_tools_needs_no_model():
    for path in _sources():
        if _name(path).startswith("data_tools/"):
            heavy = {module.split(".")[0] for module in _module_level_imports(_tree(path))} & HEAVY
            assert not heavy, f"{_name(path)} imports {heavy} at module level"


# What DeepSpeed does not document, and what follows from the ZeRO stage: other files ask the view in engine/zero.py.
PRIVATES = re.compile(
    r"_hp_mapping|[hl]p_fragment|fp32_partitioned_groups_flat|single_partition_of_fp32_groups|grad_position"
    r"|get_param_id|\bds_(tensor|shape|numel|id|status)\b|GatheredParameters|deepspeed\.zero|deepspeed\.optimizer"
    r"|\.overflow\b|_zero_optimizer|coalesce_grad_reduction|no_sync|get_global_grad_norm|safe_[gs]et_"
)


def test_one_file_knows_the_privates_of_deepspeed():
    found = {_name(path) for path in _sources() if PRIVATES.search(path.read_text())}
    assert found == {"pretrain/engine/zero.py"}


# ---- size and words -------------------------------------------------------------------------------------------------


def test_files_and_functions_stay_small():
    faults = []
    for path in _files(".py"):
        text = path.read_text()
        if text.count("\n") > MAX_FILE:
            faults.append(f"{_name(path)}: {text.count(chr(10))} lines")
        for node in _functions(_tree(path)):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION:
                faults.append(f"{_name(path)}:{node.lineno} {node.name}: {lines} lines")
            if _nesting(node.body) > MAX_NESTING:
                faults.append(f"{_name(path)}:{node.lineno} {node.name}: nested {_nesting(node.body)} deep")
    assert not faults


def _nesting(body: list[ast.stmt]) -> int:
    """Levels of blocks within blocks; `elif` continues its `if`."""
    deepest = 0
    for node in body:
        inner = [child for name in ("body", "orelse", "finalbody") for child in getattr(node, name, [])]
        inner += [child for handler in getattr(node, "handlers", []) for child in handler.body]
        if isinstance(node, ast.FunctionDef | ast.ClassDef) or not inner:
            continue
        orelse = getattr(node, "orelse", [])
        if isinstance(node, ast.If) and len(orelse) == 1 and isinstance(orelse[0], ast.If):
            deepest = max(deepest, 1 + _nesting(node.body), _nesting(orelse))
        else:
            deepest = max(deepest, 1 + _nesting(inner))
    return deepest


def test_public_names_are_documented():
    faults = []
    for path in _sources():
        tree = _tree(path)
        if tree.body and not ast.get_docstring(tree):
            faults.append(f"{_name(path)}: module")
        faults += [f"{_name(path)}:{node.lineno} {node.name}" for node in _public(tree) if not ast.get_docstring(node)]
    assert not faults


def _public(scope: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in scope.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def test_comments_and_docstrings_are_ascii():
    faults = []
    for path in _files(".py"):
        source = path.read_text()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        lines = [token.start[0] for token in tokens if token.type == tokenize.COMMENT and not token.string.isascii()]
        scopes = [
            node for node in ast.walk(_tree(path)) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        ]
        lines += [getattr(node, "lineno", 1) for node in scopes if not (ast.get_docstring(node) or "").isascii()]
        faults += [f"{_name(path)}:{line}" for line in lines]
    assert not faults


def test_no_file_names_a_machine_or_a_registry():
    folders = "|".join(("work", "home", "root", "Users", "tmp", "mnt"))
    hosts = "|".join(("pypi", "pythonhosted", "huggingface", "hf", "download.pytorch", "anaconda", "ghcr", "docker"))
    places = re.compile(rf"(?<![\w.}}/*])/({folders})/\w|\b({hosts})\.(org|co|com|io)\b")
    faults = []
    for path in _files(".py", ".sh", ".yaml", ".json", ".cfg", ".toml", ".md", ""):
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
            if places.search(line):
                faults.append(f"{_name(path)}:{number} {line.strip()[:80]}")
    assert not faults


# ---- layout and packaging -------------------------------------------------------------------------------------------


def test_top_level_holds_only_what_belongs_there():
    found = {_name(path).split("/")[0] for path in _files()}
    assert found <= TOP_LEVEL, found - TOP_LEVEL


def _setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_setup_lists_every_package_and_nothing_else():
    folders = {path.parent for path in _sources() if _name(path).split("/")[0] != "launch"}  # run from a checkout
    assert all((folder / "__init__.py").is_file() for folder in folders)
    listed = _setup()["options"]["packages"].split()
    assert listed == sorted(_name(folder).replace("/", ".") for folder in folders)


def _requirements(text: str) -> set[str]:
    return {re.split(r"[ <>=!\[]", line)[0].lower() for line in text.split("\n") if line.strip()}


# Needed without an import of our own: by open_clip, by torch.utils.tensorboard, by users who open our shards.
INDIRECT = {"torchvision", "tensorboard", "webdataset"}
DISTRIBUTION = {"PIL": "pillow", "open_clip": "open_clip_torch", "yaml": "pyyaml"}


def _third_party(folders: tuple[str, ...]) -> set[str]:
    own = {"pretrain", "data_tools", "launch", "ranks", "open_clip_train"} | {
        path.stem for path in (ROOT / "tests").rglob("*.py")
    }
    found = set()
    for path in _files(".py"):
        if _name(path).split("/")[0] in folders:
            found |= {module.split(".")[0] for module in _imports(_tree(path))}
    return {DISTRIBUTION.get(name, name).lower() for name in found - own - set(sys.stdlib_module_names)}


def test_dependencies_are_those_that_the_code_imports():
    setup = _setup()
    needed = _third_party(("pretrain", "data_tools", "launch"))
    declared = _requirements(setup["options"]["install_requires"])
    extras = {name: _requirements(text) for name, text in setup["options.extras_require"].items()}
    optional = set().union(*(names for extra, names in extras.items() if extra != "test"))
    assert needed <= declared | optional, needed - declared - optional
    assert declared - INDIRECT <= needed, declared - INDIRECT - needed
    assert _third_party(("tests",)) <= declared | optional | extras["test"]


# ---- command lines --------------------------------------------------------------------------------------------------


def _commands() -> list[list[str]]:
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.py"))
    return [[script] for script in scripts] + [["-m", "data_tools"]]


@pytest.mark.parametrize("command", _commands(), ids=lambda command: Path(command[-1]).name)
def test_help_answers_at_once_from_anywhere(command, tmp_path):
    place = tmp_path if command[0] != "-m" else ROOT
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "--help"], cwd=place, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage" in done.stdout.lower()
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    assert not imported & (HEAVY | {"pyarrow", "numpy"})


def test_every_console_script_exists():
    scripts = _setup()["options.entry_points"]["console_scripts"]
    for line in scripts.strip().splitlines():
        module, _, function = line.split("=")[1].strip().partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), line
        assert function in {node.name for node in _functions(_tree(path))}, line
