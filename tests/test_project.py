"""The project itself: its layout, its packages, and the examples that people copy."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys

import dotenv
import pytest
from clocks import PROJECT

import usage_report

SCRIPT = (PROJECT / "usage_report.py").read_text("utf-8")
README = (PROJECT / "README.md").read_text("utf-8")
VISIBLE = ["usage_report.py", "requirements.txt", "README.md", "tests", "usage_reports"]


def tracked_files() -> list[str]:
    command = ["git", "ls-files"]
    try:
        listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return listed.stdout.split("\n")[:-1]


def test_the_top_level_shows_only_the_expected_files():
    names = {path.split("/")[0] for path in tracked_files()}
    assert {name for name in names if not name.startswith(".")} == {*VISIBLE}
    assert ".env.example" in names


def test_git_keeps_the_report_folder_and_ignores_its_contents():
    kept = [path for path in tracked_files() if path.startswith("usage_reports/")]
    assert kept == ["usage_reports/.gitkeep"]
    for path in ["usage_reports/all_orgs_x.csv", "usage_reports/.export-1/state.json", ".env"]:
        ignored = subprocess.run(["git", "check-ignore", "-q", path], cwd=PROJECT)
        assert ignored.returncode == 0, path


def test_requirements_are_requests_and_dotenv():
    lines = (PROJECT / "requirements.txt").read_text().splitlines()
    assert {re.match(r"[\w-]+", line)[0] for line in lines} == {"requests", "python-dotenv"}
    assert "# /// script" not in SCRIPT and "uv run" not in README, "more than one list of packages"


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs sys.stdlib_module_names")
def test_the_script_imports_no_other_packages():
    nodes = [node for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, ast.Import)]
    imported = {alias.name.split(".")[0] for node in nodes for alias in node.names}
    sources = [node for node in ast.walk(ast.parse(SCRIPT)) if isinstance(node, ast.ImportFrom)]
    imported |= {node.module.split(".")[0] for node in sources if node.module}
    assert imported - set(sys.stdlib_module_names) == {"requests", "dotenv", "urllib3"}


def test_env_example_has_exactly_the_settings():
    text = (PROJECT / ".env.example").read_text()
    names = re.findall(r"(?m)^#? ?([A-Z_]+)=", text)
    assert sorted(names) == sorted(usage_report.VARIABLES)
    values = dotenv.dotenv_values(PROJECT / ".env.example")
    assert values.pop("CIRCLE_TOKEN") == usage_report.PLACEHOLDER
    assert not any(values.values()), "only CIRCLE_TOKEN has a value"


def flags() -> set[str]:
    command = [sys.executable, PROJECT / "usage_report.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown))


def test_the_readme_names_every_setting_flag_and_exit_code():
    for name in [*usage_report.VARIABLES, *flags() - {"--help"}]:
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", README), name
    for code in (0, 1, 2, 3, 75, 130, 143, 129):
        assert re.search(rf"(?m)^\| .*\b{code}\b", README), code


def test_the_readme_uses_only_flags_that_exist():
    commands = re.findall(r"usage_report\.py((?: [^\s`|;&>\"')]+)*)", README)
    used = {flag for command in commands for flag in re.findall(r"--[a-z-]+", command)}
    assert used and used <= flags()


def test_the_readme_has_the_scripts_setup_command():
    setup = usage_report.SETUP.partition(" && ")[2]
    assert setup and setup in README
    change = shlex.split(usage_report.SETUP.partition("Run: ")[2].partition(" && ")[0])
    assert change == ["cd", str(PROJECT)]


def test_the_python_snippets_of_the_readme_compile():
    snippets = re.findall(r"(?ms)^```python\n(.*?)^```", README)
    for snippet in snippets:
        compile(snippet, "README.md", "exec")
    assert snippets
