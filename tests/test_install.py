"""The set-up: detectron2 packed again, the environment's stamp, and what a wheel of the package holds."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import check_duplicates, install_detectron2, setup_environment

ROOT = Path(__file__).resolve().parents[1]
METADATA = """Metadata-Version: 2.1
Name: sal-detectron2
Version: 0.7.2
Summary: another project's
Requires-Python: >=3.8
Requires-Dist: Pillow>=7.1
Requires-Dist: numpy<2
Requires-Dist: dataclasses; python_version < "3.7"
Requires-Dist: black
Requires-Dist: tabulate
Provides-Extra: all
Requires-Dist: fairscale; extra == "all"

A description: kept.
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A small wheel of the same make as the one on the index."""
    path = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    members = {
        "detectron2/__init__.py": '__version__ = "0.7.2"\n',
        "detectron2/layers/nms.py": "LIMIT = 3\n",
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "a binary",
        "tools/__init__.py": "",
        "tools/train_net.py": "raise SystemExit\n",
        "sal_detectron2-0.7.2.dist-info/METADATA": METADATA,
        "sal_detectron2-0.7.2.dist-info/LICENSE": "a licence",
        "sal_detectron2-0.7.2.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: cp310-cp310-linux_x86_64\n",
        "sal_detectron2-0.7.2.dist-info/top_level.txt": "detectron2\ntools\n",
        "sal_detectron2-0.7.2.dist-info/RECORD": "stale,,\n",
    }
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return path


def read_members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_repack_leaves_out_the_binary_and_the_tools(archive: Path, tmp_path: Path) -> None:
    wheel = install_detectron2.repack(archive, tmp_path)
    assert wheel.name == "detectron2-0.7.2-py3-none-any.whl"
    members = read_members(wheel)
    info = "detectron2-0.7.2.dist-info"
    assert set(members) == {
        "detectron2/__init__.py",
        "detectron2/layers/nms.py",
        *(f"{info}/{name}" for name in ("METADATA", "LICENSE", "WHEEL", "top_level.txt", "RECORD")),
    }
    assert b"Tag: py3-none-any\n" in members[f"{info}/WHEEL"]
    assert members[f"{info}/top_level.txt"] == b"detectron2\n"
    assert members["detectron2/layers/nms.py"] == b"LIMIT = 3\n"


def test_repack_records_every_file(archive: Path, tmp_path: Path) -> None:
    members = read_members(install_detectron2.repack(archive, tmp_path))
    record = "detectron2-0.7.2.dist-info/RECORD"
    rows = dict(line.split(",", 1) for line in members.pop(record).decode().splitlines())
    assert rows.pop(record) == ","
    for name, data in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        assert rows.pop(name) == f"sha256={digest},{len(data)}"
    assert not rows


def test_repack_gives_the_same_bytes_twice(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    first, second = (install_detectron2.repack(archive, folder) for folder in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_metadata_names_what_the_code_needs() -> None:
    lines = install_detectron2.rewrite_metadata(METADATA).splitlines()
    assert "Name: detectron2" in lines
    wanted = {line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist")}
    assert wanted == {"Pillow>=7.1", "tabulate", *install_detectron2.ADDED_REQUIREMENTS}
    assert not [line for line in lines if line.startswith("Provides-Extra")]
    assert lines[-1] == "A description: kept."


def test_pip_installs_the_packed_wheel(archive: Path, tmp_path: Path) -> None:
    wheel = install_detectron2.repack(archive, tmp_path)
    target = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    assert (target / "detectron2/layers/nms.py").is_file()
    assert not (target / "tools").exists()


def test_another_archive_is_refused(archive: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(install_detectron2, "find_detectron2", lambda: None)
    assert install_detectron2.main(["--archive", str(archive)]) == 1
    assert "not the archive that was tested" in capsys.readouterr().err


def test_a_wheel_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other/__init__.py", "")
    with pytest.raises(install_detectron2.InstallError, match="not a wheel of detectron2"):
        install_detectron2.repack(path, tmp_path)


def test_present_detectron2_is_left_alone(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(install_detectron2, "_pip", lambda *_: pytest.fail("pip was called"))
    assert install_detectron2.main([]) == 0
    assert "left alone" in capsys.readouterr().out


def test_a_checkout_in_this_folder_is_not_an_installation(tmp_path: Path, monkeypatch) -> None:
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "a checkout"\n')
    monkeypatch.chdir(tmp_path)
    found = install_detectron2.find_detectron2()
    assert found is None or found[0] != "a checkout"


def test_addresses_of_a_compiled_one(tmp_path: Path) -> None:
    assert install_detectron2.build_address(str(tmp_path)) == str(tmp_path.resolve())
    assert install_detectron2.build_address("https://host/a/b.git") == "git+https://host/a/b.git"
    assert install_detectron2.build_address("git+ssh://host/a@v1") == "git+ssh://host/a@v1"
    assert install_detectron2.build_address("git@host:a/b.git") == "git+ssh://git@host/a/b.git"
    with pytest.raises(install_detectron2.InstallError, match="no such folder"):
        install_detectron2.build_address(str(tmp_path / "absent"))


def test_a_compiled_one_is_built_against_the_installed_torch(tmp_path: Path, monkeypatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(install_detectron2, "_pip", lambda arguments, _: calls.append(list(arguments)))
    monkeypatch.setattr(install_detectron2, "find_detectron2", lambda: ("0.6", "/somewhere"))
    assert "0.6 in /somewhere" in install_detectron2.install(source=str(tmp_path))
    assert calls == [["install", "--no-build-isolation", "--upgrade", str(tmp_path.resolve())]]


# The environment


def copy_inputs(folder: Path) -> Path:
    for name in setup_environment.INPUTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("name", setup_environment.INPUTS)
def test_fingerprint_changes_with_each_input(tmp_path: Path, name: str) -> None:
    copy_inputs(tmp_path)
    before = setup_environment.fingerprint((3, 11, 7), tmp_path)
    assert setup_environment.fingerprint((3, 11, 7), tmp_path) == before
    assert setup_environment.fingerprint((3, 12, 1), tmp_path) != before
    with (tmp_path / name).open("a") as file:
        file.write("# more\n")
    assert setup_environment.fingerprint((3, 11, 7), tmp_path) != before


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 13, 9)])
def test_python_versions_that_are_supported(version: tuple[int, ...]) -> None:
    setup_environment.check_python(version, "python")


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 18), (3, 14, 0)])
def test_other_python_versions_are_refused(version: tuple[int, ...]) -> None:
    with pytest.raises(setup_environment.SetupError, match=r"3\.10 to 3\.13"):
        setup_environment.check_python(version, "python")


def test_environment_version_is_read_from_its_settings(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.12.1\n")
    assert setup_environment.environment_version(tmp_path) == (3, 12, 1)


def test_the_active_environment_is_used(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    assert setup_environment.environment_folder(None) == ROOT / ".venv"
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert setup_environment.environment_folder(None) == tmp_path


def test_an_active_environment_that_is_gone_is_an_error(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "gone"))
    assert setup_environment.main([]) == 1
    assert "deactivate" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists()


def test_a_stale_stamp_is_not_current(tmp_path: Path) -> None:
    assert not setup_environment.is_current(tmp_path, "expected")
    (tmp_path / setup_environment.STAMP).write_text("another\n")
    assert not setup_environment.is_current(tmp_path, "expected")


@pytest.mark.parametrize("name", setup_environment.VARIABLES)
def test_fingerprint_changes_with_what_changes_the_library(tmp_path: Path, name: str, monkeypatch) -> None:
    copy_inputs(tmp_path)
    (tmp_path / "vis/csrc").mkdir(parents=True)
    monkeypatch.delenv(name, raising=False)
    before = setup_environment.fingerprint((3, 11, 7), tmp_path)
    monkeypatch.setenv(name, "1")
    assert setup_environment.fingerprint((3, 11, 7), tmp_path) != before
    monkeypatch.delenv(name)
    assert setup_environment.fingerprint((3, 11, 7), tmp_path) == before
    (tmp_path / "vis/csrc/a.cu").touch()
    assert setup_environment.fingerprint((3, 11, 7), tmp_path) != before


def test_fingerprint_changes_when_a_compiler_appears(tmp_path: Path, monkeypatch) -> None:
    copy_inputs(tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    before = setup_environment.fingerprint((3, 11, 7), tmp_path)
    (tmp_path / "g++").touch(mode=0o755)
    assert setup_environment.fingerprint((3, 11, 7), tmp_path) != before


def test_a_second_set_up_installs_nothing_and_is_quick() -> None:
    environment = Path(sys.prefix)
    if not setup_environment.is_current(
        environment, setup_environment.fingerprint(setup_environment.environment_version(environment))
    ):
        pytest.skip("this environment was not made by `make setup`, or the set-up has changed since")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["make", "--no-print-directory", "setup", f"VENV={environment}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time, which a busy machine does not stretch; .ci/run measures the wall clock
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.stdout == ""


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """What a wheel is made from, without a library that was built before."""
    copy_inputs(tmp_path)
    for name in ("README.md", "LICENSE", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "vis", tmp_path / "vis", ignore=shutil.ignore_patterns("__pycache__", "_C*.so"))
    return tmp_path


def run_in(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder and a known environment; what it prints comes together."""
    cleared = {name: value for name, value in os.environ.items() if name not in setup_environment.VARIABLES}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**cleared, "MAX_JOBS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def make_wheel(package: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    options = ("--verbose", "--no-deps", "--no-build-isolation", "--no-index", "-w", "out", ".")
    return run_in(package, "-m", "pip", "wheel", *options, **variables)


def test_a_wheel_without_a_compiler_holds_the_package_alone(copied_package: Path) -> None:
    (copied_package / "bin").mkdir()
    done = make_wheel(copied_package, PATH=str(copied_package / "bin"))
    assert done.returncode == 0, done.stdout
    assert "vis._C is not built: no C++ compiler is found" in done.stdout
    wheel = next((copied_package / "out").glob("vis-*-py3-none-any.whl"))
    members = read_members(wheel)
    assert {name.partition("/")[0].split("-")[0] for name in members} == {"vis"}
    assert {name for name in members if name.startswith("vis/")} >= {
        str(path.relative_to(ROOT)) for path in (ROOT / "vis").rglob("*.py")
    }
    metadata = next(data for name, data in members.items() if name.endswith("METADATA")).decode()
    assert "Requires-Dist: torch>=2.4" in metadata
    assert "pytest" not in metadata.partition("\n\n")[0]
    # it runs, on PyTorch
    shutil.unpack_archive(wheel, copied_package / "site", "zip")
    done = run_in(copied_package / "site", "-m", "vis.layers.ms_deform_attn", PATH=str(copied_package / "bin"))
    assert done.returncode == 0, done.stdout
    assert "compiled  not there: vis._C is not built" in done.stdout
    assert "runs      torch" in done.stdout


needs_compiler = pytest.mark.skipif(setup_environment.find_compiler() is None, reason="no C++ compiler here")


@needs_compiler
@pytest.mark.slow
def test_a_wheel_made_with_a_compiler_holds_the_library(copied_package: Path) -> None:
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = make_wheel(copied_package, VIS_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started < 60  # `make demo` counts on it
    wheel = next((copied_package / "out").glob("vis-*-linux_*.whl"))
    assert "vis/_C.so" in read_members(wheel)
    shutil.unpack_archive(wheel, copied_package / "site", "zip")
    done = run_in(copied_package / "site", "-m", "vis.layers.ms_deform_attn", VIS_MS_DEFORM_ATTN="compiled")
    assert done.returncode == 0, done.stdout
    assert "cpu   compiled  self-test passed" in done.stdout


@needs_compiler
@pytest.mark.slow
def test_an_error_of_the_compiler_is_one_of_the_installation(copied_package: Path) -> None:
    (copied_package / "vis/csrc/ms_deform_attn.cpp").write_text("#error planted\n")
    done = make_wheel(copied_package, VIS_BUILD_CUDA="0")
    assert done.returncode != 0
    assert "planted" in done.stdout


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"VIS_BUILD_CUDA": "1", "PATH": ""}, "VIS_BUILD_CUDA is 1, but no C[+][+] compiler is found"),
        ({"VIS_BUILD_CUDA": "yes", "CXX": sys.executable}, "VIS_BUILD_CUDA is 'yes', expected auto, 0 or 1"),
        ({"CXX": "/no/such/compiler"}, "CXX is '/no/such/compiler', which is not there"),
    ],
)
def test_settings_of_the_build_that_cannot_be(copied_package: Path, variables: dict[str, str], said: str) -> None:
    done = run_in(copied_package, "setup.py", "build_ext", **variables)
    assert done.returncode != 0
    assert re.search(said, done.stdout), done.stdout


# The duplicate gate's reading


def test_duplicates_are_found_whatever_the_indentation(tmp_path: Path) -> None:
    body = [f"value_{number} = {number}" for number in range(11)]
    (tmp_path / "a.py").write_text("import os\n\n" + "\n".join(body) + "\n")
    spaced = "\n\n    # a comment\n".join(f"    {line}" for line in body)
    (tmp_path / "b.py").write_text("def f():\n" + spaced + "\n")
    paths = [tmp_path / "a.py", tmp_path / "b.py"]
    found = check_duplicates.find_duplicates(paths, 10)
    assert found == [((paths[0], 3, 13), (paths[1], 2, 32))]
    assert not check_duplicates.find_duplicates(paths, 12)


def test_imports_and_repeated_lines_are_no_duplicates(tmp_path: Path) -> None:
    imports = "from a import (\n" + "".join(f"    name_{number},\n" for number in range(12)) + ")\n"
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(imports)
    (tmp_path / "c.py").write_text("step()\n" * 15)  # one run, not two
    assert not check_duplicates.find_duplicates(sorted(tmp_path.glob("*.py")), 10)
