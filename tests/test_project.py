"""The project itself: its layout, its packages, and the examples that people copy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import dotenv
import pytest
from clocks import PROJECT

import usage_report

SCRIPT = (PROJECT / "usage_report.py").read_text("utf-8")
README = (PROJECT / "README.md").read_text("utf-8")
VISIBLE = {*"usage_report.py requirements.txt .env.example README.md tests usage_reports".split()}


def tracked_files() -> list[str]:
    if not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    return subprocess.check_output(["git", "ls-files"], cwd=PROJECT, text=True).splitlines()


@pytest.fixture
def flags(run) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", run("--help").out))


def test_the_top_level_shows_only_the_expected_files():
    names = {path.split("/")[0] for path in tracked_files()}
    assert {name for name in names if name == ".env.example" or name[0] != "."} == VISIBLE


def test_git_keeps_the_report_folder_and_ignores_its_contents():
    kept = [path for path in tracked_files() if path.startswith("usage_reports/")]
    assert kept == ["usage_reports/.gitkeep"]
    for path in ["usage_reports/all_orgs_x.csv", "usage_reports/.export-1/job.json", ".env"]:
        subprocess.run(["git", "check-ignore", "-q", path], cwd=PROJECT, check=True)


def test_the_script_needs_requests_dotenv_and_python_3_9():
    lines = (PROJECT / "requirements.txt").read_text("utf-8").splitlines()
    assert [re.match(r"[\w-]+", line)[0] for line in lines] == ["requests", "python-dotenv"]
    ast.parse(SCRIPT, feature_version=(3, 9))


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs sys.stdlib_module_names")
def test_the_script_imports_no_other_packages():
    nodes = ast.walk(ast.parse(SCRIPT))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [getattr(node, "module", node.names[0].name) for node in imports]
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert packages == {"requests", "dotenv", "urllib3"}


def test_env_example_has_exactly_the_variables():
    names = re.findall(r"(?m)^#?([A-Z_]+)=", (PROJECT / ".env.example").read_text("utf-8"))
    assert sorted(names) == sorted(usage_report.VARIABLES)
    values = dotenv.dotenv_values(PROJECT / ".env.example")
    assert values.pop("CIRCLE_TOKEN") == usage_report.PLACEHOLDER
    assert not any(values.values()), "only CIRCLE_TOKEN has a value"


def test_the_readme_names_every_variable_flag_and_exit_code(flags):
    for name in [*usage_report.VARIABLES, *flags - {"--help", "--version"}]:
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", README), name
    for code in (0, 1, 2, 3, 75, 130):
        assert re.search(rf"(?m)^\| {code} \|", README), code


def test_the_readme_uses_only_flags_that_exist(flags):
    commands = re.findall(r"usage_report\.py((?: [^\s`|;&>\"')]+)*)", README)
    used = {flag for command in commands for flag in re.findall(r"--[a-z-]+", command)}
    assert used and used <= flags


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_the_shell_snippets_of_the_readme_can_be_parsed():
    for snippet in re.findall(r"(?ms)^ *```sh\n(.*?)^ *```", README):
        subprocess.run(["sh", "-n"], input=snippet, text=True, check=True)
