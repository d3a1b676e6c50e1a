"""``passes new``: what it writes works as it stands, in a checkout and as a distribution of its own, or is not written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import vacc_opt
from vacc_opt.cli.main import main
from vacc_opt.ir import UserError
from vacc_opt.passes.infra.author.scaffold import new_pass, new_plugin

ROOT = Path(vacc_opt.__file__).parent
ROOMS = ("ir", "passes", "frontends", "backends", "calibration", "runtime", "cli")
FILES = ("__init__.py", "_version.py", "py.typed", "setup.cfg", "ruff.toml")


def python(*arguments: str | Path, cwd: Path, path: Sequence[Path]) -> str:
    """Run Python with packages found under ``path`` first; its standard output."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PATH": search, "NO_COLOR": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that a pass can be written into it."""
    copy = tmp_path_factory.mktemp("checkout") / "vacc_opt"
    (copy / "docs").mkdir(parents=True)
    (copy / "tests/passes").mkdir(parents=True)
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*FILES, "docs/passes.md", "tests/passes/test_registry.py", "tests/passes/test_examples.py"):
        shutil.copyfile(ROOT / file, copy / file)
    for test in (ROOT / "tests/passes").glob("test_*.py"):  # the registry's tests ask for one a pass
        (copy / "tests/passes" / test.name).touch()
    return copy


@pytest.mark.parametrize(("group", "kind"), [("fuse", "exact"), ("quantize", "lossy"), ("simplify", "reassociating")])
def test_a_new_pass_its_test_and_its_entry_are_right_as_written(checkout: Path, group: str, kind: str) -> None:
    name, path = f"drop-relu-{kind}", [checkout.parent]
    cli = ("-m", "vacc_opt.cli.main", "passes")
    said = python(*cli, "new", name, "--group", group, "--kind", kind, cwd=checkout, path=path)
    file = name.replace("-", "_")
    lit = f"tests/lit/passes/{name}.vacc"
    written = [f"passes/{group}/{file}.py", f"tests/passes/test_{file}.py", lit, "docs/passes.md"]
    assert [line.split()[1] for line in said.splitlines() if line.startswith("  wrote")] == written
    assert f"  python -m pytest -q tests/passes/test_{file}.py" in said.splitlines()
    assert python(*cli, "--markdown", cwd=checkout, path=path) == (checkout / "docs/passes.md").read_text()
    assert f"{name} ({kind})" in python(*cli, name, cwd=checkout, path=path)
    tests = [written[1], "tests/passes/test_registry.py", "tests/passes/test_examples.py"]
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", file + " or " + name, *tests, cwd=checkout, path=path)
    python("-m", "ruff", "check", "--no-cache", *written[:2], cwd=checkout, path=path)
    python("-m", "ruff", "format", "--no-cache", "--check", *written[:2], cwd=checkout, path=path)
    command = (checkout / lit).read_text().splitlines()[0].removeprefix("# RUN: vacc-opt ").replace("%s", lit)
    pipe = f"set -o pipefail; {sys.executable} -m vacc_opt.cli.main {command}"
    script = "import subprocess, sys; sys.exit(subprocess.run(['bash', '-c', sys.argv[1]]).returncode)"
    python("-c", script, pipe, cwd=checkout, path=path)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plugin") / "acme-passes"
    new_plugin("drop-relu", "exact", directory)
    return directory


def test_the_tests_of_a_plugin_pass_as_written(plugin: Path) -> None:
    assert "3 passed" in python("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=plugin, path=[])


def test_a_plugin_is_clean_to_ruff_and_strict_mypy(plugin: Path, tmp_path: Path) -> None:
    rules = ["--isolated", "--no-cache", "--line-length", "120", "--target-version", "py311"]
    python("-m", "ruff", "check", *rules, "--select", "E,F,W,I,UP,B,C4,PT,RUF", ".", cwd=plugin, path=[])
    python("-m", "ruff", "format", *rules, "--check", ".", cwd=plugin, path=[])
    links = tmp_path / "vacc_opt"
    links.mkdir()
    for part in (*ROOMS, *FILES[:3]):  # mypy does not follow the finder of an editable install
        (links / part).symlink_to(ROOT / part)
    environment = {**os.environ, "MYPYPATH": str(tmp_path)}
    files = sorted(map(str, plugin.rglob("*.py")))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "setup.cfg"), "--cache-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert [line for line in done.stdout.splitlines() if "drop_relu" in line] == []
    assert f"{len(files)} source files" in done.stdout


def test_an_installed_plugin_is_found_and_says_where_it_is_from(plugin: Path, tmp_path: Path) -> None:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    source = tmp_path / "source"
    shutil.copytree(plugin, source, ignore=shutil.ignore_patterns("__pycache__"))
    python("-m", "pip", "install", *options, "--target", tmp_path / "site", source, cwd=tmp_path, path=[])
    cli = ("-m", "vacc_opt.cli.main")
    described = python(*cli, "passes", "drop-relu", cwd=tmp_path, path=[tmp_path / "site"])
    assert "From:    acme-passes 0.1.0" in described.splitlines()
    model = tmp_path / "model.vacc"
    model.write_text("g (float[B,8] x) => (float[B,8] y) { a = Relu (x) y = Relu (a) }")
    out = python(*cli, model, "-p", "drop-relu{expect=1}", cwd=tmp_path, path=[tmp_path / "site"])
    assert out.count("Relu (") == 1
    page = python(*cli, "passes", "--markdown", cwd=tmp_path, path=[tmp_path / "site"])
    assert "drop-relu" not in page  # the page is the project's own


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("FuseRMSNorm", "'FuseRMSNorm' is not in lower case with single hyphens", "did you mean `fuse-rms-norm`?"),
        ("fuse_gate", "'fuse_gate' is not in lower case with single hyphens", "did you mean `fuse-gate`?"),
        ("8bit", "'8bit' is not in lower case", "did you mean `bit`?"),
        ("--", "'--' is not in lower case", "as in `fuse-relu`"),
        ("fuse-gqa", "there is a pass 'fuse-gqa' already", "`vacc-opt passes fuse-gqa` shows it"),
        ("vacc-kv8", "there is a preset 'vacc-kv8' already", "`vacc-opt passes vacc-kv8` shows it"),
        ("prefill", "there is a scope 'prefill' already", "`vacc-opt passes prefill` shows it"),
        ("new", "'new' is a word of `vacc-opt passes`", "for example fuse-new"),
        ("lambda", "'lambda' is a word of Python", "for example fuse-lambda"),
    ],
)
def test_a_name_that_will_not_do_is_refused(name: str, message: str, hint: str, tmp_path: Path) -> None:
    for write in (lambda: new_pass(name, root=tmp_path), lambda: new_plugin(name, "exact", tmp_path / "acme")):
        with pytest.raises(UserError) as error:
            write()
        assert error.value.message.startswith(message)
        assert (error.value.hint or "").startswith(hint)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_group_or_kind_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "new", "fuse-x", "--group", "fused"]) == 2
    assert capsys.readouterr().err == "error: unknown group 'fused'\n  did you mean `fuse`?\n"
    assert main(["passes", "new", "fuse-x", "--kind", "exakt"]) == 2
    assert capsys.readouterr().err == "error: unknown kind 'exakt'\n  did you mean `exact`?\n"
    assert main(["passes", "new", "fuse-x", "--group", "fuse", "--plugin", "x"]) == 2
    assert "--plugin writes outside of it" in capsys.readouterr().err


def test_without_sources_a_plugin_is_the_way(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without its sources(.|\n)*`vacc-opt passes new fuse-x --plugin DIR`"):
        new_pass("fuse-x", root=tmp_path)


@pytest.mark.parametrize(("directory", "reason"), [("Acme Passes", "did you mean `acme-passes`"), ("json", "hide")])
def test_a_directory_that_is_no_name_for_a_package_is_refused(directory: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        new_plugin("fuse-x", "exact", tmp_path / directory)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(plugin: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in plugin.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists and is not an empty directory"):
        new_plugin("fuse-x", "exact", plugin)
    assert {path: path.stat().st_mtime_ns for path in plugin.rglob("*") if path.is_file()} == before


def test_all_files_are_written_or_none(tmp_path: Path) -> None:
    for directory in ("passes/fuse", "tests/lit/passes", "tests/passes", "docs"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "docs/passes.md").write_text("old")
    (tmp_path / "tests/passes/test_fuse_x.py").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"test_fuse_x\.py: exists already"):
        new_pass("fuse-x", root=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "docs/passes.md").read_text() == "old"
    assert (tmp_path / "tests/passes/test_fuse_x.py").read_text() == "mine"
