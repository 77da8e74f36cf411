"""What holds for the whole project: imports, file sizes, forbidden calls, and gates that can fail."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    "MODEL_ZOO.md",
    "configs", "vis", "tools", "datasets", "tests", "setup.py", "README.md", "requirements.txt", "pyproject.toml",
    "constraints.txt", "Makefile", "CONTRIBUTING.md", "LICENSE", ".ci", ".gitignore",
}  # fmt: skip
MAX_LINES = 450


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, "" of anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


# Imports


@pytest.mark.parametrize("module", ["vis", "vis.modeling"])
def test_import_needs_neither_opencv_nor_cuda(module: str) -> None:
    """OpenCV is missing, or without its system libraries, on many servers; a forked worker must not inherit CUDA."""
    done = run_python(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'cv2': raise ModuleNotFoundError('cv2 is blocked')\n"
        "sys.meta_path.insert(0, Blocker())\n"
        f"import {module}\n"
        "assert 'cv2' not in sys.modules\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr


def test_every_module_imports_without_touching_cuda() -> None:
    names = [relative(path)[:-3].replace("/", ".").removesuffix(".__init__") for path in sources("vis")]
    done = run_python(
        f"import importlib, torch\nfor name in {names!r}: importlib.import_module(name)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_opencv_is_imported_inside_functions_only() -> None:
    wrong = []
    for path in sources("vis", "tools"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            if isinstance(node, (ast.Import, ast.ImportFrom)) and "cv2" in names:
                wrong.append(relative(path))
    assert not wrong


def requirement_names(part: int) -> set[str]:
    """Normalised names in requirements.txt: part 0 is needed to run vis, part 1 is for development."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("# Development")[part]
    lines = [line.partition("#")[0].strip() for line in text.splitlines()[part:]]
    return {re.split(r"[<>=!~;\[ ]", line)[0].lower().replace("_", "-") for line in lines if line}


def test_every_import_is_a_runtime_requirement() -> None:
    named_otherwise = {"cv2": "opencv-python-headless", "yaml": "pyyaml", "PIL": "pillow"}
    own = {"vis", "tools", "detectron2", *(path.stem for path in sources("tools", "datasets"))}
    used = {name for path in sources("vis", "tools", "datasets") for name in imports(path)}
    wanted = {named_otherwise.get(name, name) for name in used - own - set(sys.stdlib_module_names)}
    # setuptools: setup.py's, and torch.utils.cpp_extension's; triton: comes with torch, or is not used
    allowed = requirement_names(0) | {"setuptools", "triton", "huggingface_hub"}  # the last two: where they are there
    assert wanted <= allowed


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-").splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    assert requirement_names(0) | requirement_names(1) <= pinned


# The tree


def test_top_level_names_are_fixed() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {name.partition("/")[0] for name in listed.stdout.split("\0") if name} <= TOP_LEVEL


def test_datasets_is_not_a_package() -> None:
    """It would shadow a well-known package of that name."""
    assert not (ROOT / "datasets" / "__init__.py").exists()


def test_configs_hold_yaml_and_small_weights_only() -> None:
    allowed = {".yaml", ".md", ".json", ".pth", ".pt", ".safetensors"}
    files = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert not [relative(path) for path in files if path.suffix not in allowed]
    assert not [relative(path) for path in files if path.stat().st_size > 4 * 2**20]


@pytest.mark.parametrize("folder", ["vis", "tools"])
def test_files_are_of_readable_length(folder: str) -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(folder)}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_annotations_are_postponed_everywhere() -> None:
    head = "from __future__ import annotations"
    texts = {relative(path): path.read_text(encoding="utf-8") for path in sources("vis", "tools", "tests")}
    # a docstring alone has nothing to annotate
    assert not [name for name, text in texts.items() if len(ast.parse(text).body) > 1 and head not in text]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "configs/README.md", "datasets/README.md"])
def test_paths_in_a_readme_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = set(re.findall(r"(?<![\w/.-])(?:configs|datasets|tests|tools|vis)/[\w/.-]*\w", text))
    ignored = ("configs/my", "datasets/my")  # examples that a user writes
    assert not [path for path in paths if not path.startswith(ignored) and not (ROOT / path).exists()]


def config_files() -> list[Path]:
    """Every yaml that runs alone: `_base_` holds fragments, recipes and sweeps are lists of runs."""
    others = {"_base_", "recipes", "sweeps"}
    return sorted(path for path in (ROOT / "configs").rglob("*.yaml") if not others & set(path.parts))


def describes_data(path: Path) -> bool:
    """Whether a yaml, or one that it is based on, registers data sets of its own."""
    text = path.read_text(encoding="utf-8")
    bases = yaml.safe_load(text).get("_BASE_", [])
    return "CUSTOM:" in text or any(
        describes_data(path.parent / base) for base in ([bases] if isinstance(bases, str) else bases)
    )


@pytest.mark.parametrize("path", config_files(), ids=relative)
def test_config_loads(path: Path) -> None:
    from vis.engine import load_cfg

    try:
        cfg = load_cfg(str(path))
    except FileNotFoundError as error:
        if not describes_data(path):
            raise
        pytest.skip(f"it describes data that are not here: {error}")  # the number of classes is in its json
    assert cfg.is_frozen()
    assert cfg.MODEL.META_ARCHITECTURE


# Forbidden calls


def forbidden(path: Path) -> Iterator[str]:
    """What a file does that no file may do, with the line it stands in."""
    detectron2_names = {
        alias.asname or alias.name.partition(".")[0]
        for node in nodes(path)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).startswith("detectron2")
    }
    for node in nodes(path):
        found = ""
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or dotted(node.type) in ("Exception", "BaseException")
            silent = all(isinstance(step, (ast.Pass, ast.Continue)) for step in node.body)
            if node.type is None or (broad and silent):
                found = "hides errors it does not know"
        elif isinstance(node, ast.Call):
            found = forbidden_call(node)
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            owners = [dotted(target.value).partition(".")[0] for target in targets if isinstance(target, ast.Attribute)]
            if detectron2_names & set(owners):
                found = "assigns onto detectron2"
        if found:
            yield f"{path.name}:{node.lineno}: {found}"


def forbidden_call(node: ast.Call) -> str:
    name = dotted(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name == "torch.load":
        safe = keywords.get("weights_only")
        if not (isinstance(safe, ast.Constant) and safe.value is True):
            return "torch.load without weights_only=True"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        return f"{name}: yaml.safe_load"
    if name in ("pickle.load", "pickle.loads"):
        return f"{name} runs what the file says"
    if name == "setattr" and node.args and dotted(node.args[0]).startswith("detectron2"):
        return "assigns onto detectron2"
    return ""


def test_no_forbidden_call() -> None:
    assert not [problem for path in sources("vis", "tools", "datasets") for problem in forbidden(path)]


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    f()\nexcept:\n    log()",
        "try:\n    f()\nexcept Exception:\n    pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "pickle.load(file)",
        "import detectron2.engine.defaults as defaults\ndefaults.hooks = own",
        "from detectron2.data import MetadataCatalog\nMetadataCatalog.get = own",
        "import detectron2\ndetectron2.layers.cat = own",
        "setattr(detectron2.layers, 'cat', own)",
    ],
)
def test_forbidden_call_is_found(tmp_path: Path, code: str) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(code)
    assert list(forbidden(planted))


# The gates: `make check` in a small copy of the project passes, and fails on each planted violation.

BLOCK = "".join(f"    total += value * {number}\n" for number in range(12))
ADDS = (
    "from __future__ import annotations\n\n\ndef add(value: int) -> int:\n    total = 0\n"
    + BLOCK
    + "    return total\n"
)
PLANTED = {
    "unused import": ("lint", {"vis/layers/a.py": "import os\n"}, "F401"),
    "format": ("lint", {"vis/layers/a.py": "x = 'a'\n"}, "would be reformatted"),
    "untyped function": ("types", {"vis/layers/a.py": "def f(x):\n    return x\n"}, "no-untyped-def"),
    "wrong type": ("types", {"vis/layers/a.py": "def f() -> int:\n    return 'a'\n"}, "return-value"),
    "upward import": ("layers", {"vis/structures/a.py": "import vis.engine\n"}, "vis.structures.a -> vis.engine"),
    "siblings": ("layers", {"vis/solver/a.py": "import vis.evaluation\n"}, "vis.solver.a -> vis.evaluation"),
    "unlisted folder": ("layers", {"vis/utils/__init__.py": ""}, "utils"),
    "head imports a method": (
        "layers",
        {"vis/modeling/heads/a.py": "import vis.modeling.meta_arch.one\n"},
        "vis.modeling.heads.a -> vis.modeling.meta_arch.one",
    ),
    "method imports a method": (
        "layers",
        {"vis/modeling/meta_arch/two.py": "import vis.modeling.meta_arch.one\n"},
        "vis.modeling.meta_arch.two -> vis.modeling.meta_arch.one",
    ),
    "package imports a tool": ("layers", {"vis/engine/a.py": "import tools.train_net\n"}, "tools"),
    "duplicate block": ("duplicates", {"vis/layers/a.py": ADDS, "tests/a.py": "import os\n\n" + ADDS}, "stands again"),
    "failing test": ("fast-tests", {"tests/test_a.py": "def test_a() -> None:\n    assert not 1\n"}, "1 failed"),
}  # fmt: skip


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """The project's own settings and gates around a package of empty modules."""
    for name in ("Makefile", "pyproject.toml", "tools/check_duplicates.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    packages = ["", "engine", "evaluation", "solver", "structures", "layers"]
    packages += [f"modeling{part}" for part in ("", "/heads", "/meta_arch")]
    for package in packages:
        (tmp_path / "vis" / package).mkdir()
        (tmp_path / "vis" / package / "__init__.py").touch()
    (tmp_path / "vis/modeling/meta_arch/one.py").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_fine.py").write_text("def test_fine() -> None:\n    assert 1\n")
    return tmp_path


def run_gate(gate: str, project: Path) -> subprocess.CompletedProcess[str]:
    """The command of `make GATE`, in the environment that runs this test."""
    command = ["make", "--old-file=setup", gate, f"VENV={sys.prefix}", "WORKERS=0"]
    # the coordinates of this pytest run would reach the one inside it
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MAKE"))}
    return subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, check=False)


def test_gates_pass_without_a_violation(small_project: Path) -> None:
    done = run_gate("check", small_project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("violation", PLANTED)
def test_gate_fails_on_a_planted_violation(small_project: Path, violation: str) -> None:
    gate, files, said = PLANTED[violation]
    for name, text in files.items():
        (small_project / name).parent.mkdir(exist_ok=True)
        (small_project / name).write_text(text)
    done = run_gate(gate, small_project)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
