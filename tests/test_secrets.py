"""The token and the signatures of links: in no output, in no file, and at no other host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_circleci import TOKEN, Answer, in_json, problem
from test_run import always

import usage_report

ECHO = problem(400, f"Token {TOKEN} may not do this, see https://store.example/x?signature=abcSIGNED\x1b[31m")
TROUBLES = {
    "none": {},
    "the API repeats the token": {"POST": [ECHO]},
    "no answer": {"GET": always(Answer(drop=True))},
    "error_reason with a signed link": {
        "GET": [in_json({"state": "failed", "download_urls": [], "error_reason": "at https://s3.example/f?X-Sig=abcSIGNED"})]
    },
    "a state with the token": {"GET": [in_json({"state": TOKEN, "download_urls": None})]},
    "a broken link": {"GET": [in_json({"state": "completed", "download_urls": ["https://[x?signature=abcSIGNED"]})]},
    "a link of another kind": {"GET": [in_json({"state": "completed", "download_urls": ["ftp://x/?signature=abcSIGNED"]})]},
    "a link to nowhere": {
        "GET": always(in_json({"state": "completed", "download_urls": ["http://127.0.0.1:9/?signature=abcSIGNED"]}))
    },
}


def clean(text: str) -> bool:
    return TOKEN not in text and "SIGNED" not in text


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("part", [None, Answer(drop=True), problem(403, "?"), problem(404, "?")], ids=str)
def test_no_output_and_no_file_has_a_secret(fake, run, output, monkeypatch, trouble, part):
    """Looked at after every write of the state, and at the end, with --verbose."""
    save, looked = usage_report.Export.save, []

    def save_and_look(export: usage_report.Export) -> None:
        save(export)
        looked.extend(clean(path.read_bytes().decode("latin-1")) for path in export.folder.iterdir())

    monkeypatch.setattr(usage_report.Export, "save", save_and_look)
    fake.parts = part and [[part]]
    for kind, answers in TROUBLES[trouble].items():
        fake.plan(kind, *answers)
    result = run("--verbose")
    assert clean(result.err) and clean(result.out), result.err
    assert "\x1b" not in result.err and "Traceback" not in result.err
    assert looked and all(looked)
    assert all(clean(path.read_bytes().decode("latin-1")) for path in Path(output).rglob("*") if path.is_file())


def test_the_store_gets_no_credentials_and_the_api_gets_no_signature(fake, run):
    assert run().code == 0
    store = [one for one in fake.seen if one.server == "store"]
    assert store and all(clean(f"{one.headers} {one.body!r}") and TOKEN not in one.path for one in store)
    assert all("SIGNED" not in one.path for one in fake.seen if one.server == "api")
    assert all(TOKEN not in one.path for one in fake.seen)


def test_output_has_no_control_characters(fake, run):
    fake.organizations["8d05d166-e199-43b1-b588-415eadafacc1"] = "bell\x07 \x1b[31mred\r\nline \u202e"
    result = run("--verbose")
    assert result.code == 0
    assert re.fullmatch(r"([^\x00-\x1f\x7f-\x9f\u202e]*\n)*", result.err)
