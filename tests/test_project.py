"""The project itself: its layout, its packages, and the examples that people copy from."""

from __future__ import annotations

import csv
import re
import subprocess

import dotenv
from clocks import PROJECT
from fake_circleci import HEADER, make_rows

import usage_report

SCRIPT = (PROJECT / "usage_report.py").read_text("utf-8")
README = (PROJECT / "README.md").read_text("utf-8")


def test_the_top_level_shows_what_the_design_card_allows():
    tracked = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    visible = {name.split("/")[0] for name in tracked if not name.startswith(".")} | {".env.example"}
    assert visible == {"usage_report.py", "requirements.txt", ".env.example", "README.md", "tests", "usage_reports"}
    assert [name for name in tracked if name.startswith("usage_reports/")] == ["usage_reports/.gitkeep"]


def test_the_inline_script_block_equals_requirements_txt():
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///\n", SCRIPT)[1]
    inline = re.findall(r"^#   '(.+)',$", block, re.MULTILINE)
    assert inline == (PROJECT / "requirements.txt").read_text().splitlines()
    assert {re.match(r"[\w-]+", line)[0] for line in inline} == {"requests", "python-dotenv"}


def test_the_example_settings_are_the_settings_there_are():
    text = (PROJECT / ".env.example").read_text()
    assert dotenv.dotenv_values(PROJECT / ".env.example")["CIRCLE_TOKEN"] == usage_report.PLACEHOLDER
    names = set(re.findall(r"(?m)^#?([A-Z_]+)=", text))
    assert names == set(re.findall(r'setting\("([A-Z_]+)"\)', SCRIPT))


def test_the_readme_names_every_setting_flag_and_exit_code():
    for name in re.findall(r'setting\("([A-Z_]+)"\)|text\("(--[a-z-]+)"', SCRIPT):
        assert "".join(name) in README
    for code in (0, 1, 2, 3, 75, 130, 143):
        assert re.search(rf"(?m)^\| {code}\b", README)


def test_the_readme_snippet_makes_a_plain_csv_of_a_report(tmp_path, monkeypatch):
    snippet = next(block for block in re.findall(r"(?s)```python\n(.*?)```", README) if "import csv" in block)
    rows = make_rows(50, name="Acme Research, Inc.")
    (tmp_path / "report.csv").write_bytes(HEADER + b"".join(rows))
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    with open("plain.csv", newline="", encoding="utf-8-sig") as plain:
        table = list(csv.DictReader(plain))
    assert len(table) == 50 and {row["ORGANIZATION_NAME"] for row in table} == {"Acme Research, Inc."}
    assert {row["PIPELINE_TRIGGER_USER_ID"] for row in table} == {""} and "a,b" in {row["VCS_BRANCH"] for row in table}
    assert sum(int(row["TOTAL_CREDITS"]) for row in table) == sum(int(row.rsplit(b",", 1)[1]) for row in rows)
