"""The token and the signatures of links: in no output, in no file, and at no other host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import always
from fake_circleci import TOKEN, Answer, in_json, problem

import usage_report

ECHO = f"Token {TOKEN} may not do this, see https://store.example/x?signature=abcSIGNED\x1b[31m"


def status(state: str, *links: str, **more: str) -> Answer:
    return in_json({"state": state, "download_urls": list(links), **more})


FAILURES = {
    "none": {},
    "the API repeats the token": {"POST": [problem(400, ECHO)]},
    "no answer": {"GET": always(Answer(drop=True))},
    "error_reason with a signed link": {
        "GET": [status("failed", error_reason="at https://s3.example/f?X-Sig=abcSIGNED")]
    },
    "a state with the token": {"GET": [status(TOKEN)]},
    **{
        f"a link: {problem}": {"GET": always(status("completed", link))}
        for problem, link in {
            "malformed": "https://[x?signature=abcSIGNED",
            "to a port out of range": "http://127.0.0.1:99999/?signature=abcSIGNED",
            "to an empty label": "https://a..b/?signature=abcSIGNED",
            "to a closed port": "http://127.0.0.1:9/?signature=abcSIGNED",
            "of another scheme": "s3://bucket/part?signature=abcSIGNED",
            "relative": "/part.csv.gz?signature=abcSIGNED",
            "with a line break": "http://127.0.0.1:9/\n?signature=abcSIGNED",
        }.items()
    },
}


def has_secret(text: str) -> bool:
    return TOKEN in text or "SIGNED" in text


def files_with_secrets(folder: Path) -> list[Path]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in paths if has_secret(path.read_bytes().decode("latin-1"))]


@pytest.mark.parametrize(
    "failure, part",
    [
        *((failure, None) for failure in FAILURES),
        *(("none", part) for part in (Answer(drop=True), problem(403, "?"), problem(404, "?"))),
    ],
    ids=[*FAILURES, "part dropped", "part 403", "part 404"],
)
def test_no_output_or_file_contains_a_secret(fake, run, output, monkeypatch, failure, part):
    """With --verbose; files are searched each time the state is saved, and at the end."""
    save, found = usage_report.Export.save, []

    def save_and_search(export: usage_report.Export) -> None:
        save(export)
        found.append(files_with_secrets(export.folder))

    monkeypatch.setattr(usage_report.Export, "save", save_and_search)
    monkeypatch.setattr(usage_report, "RETRY_PAUSES", (1,))
    fake.parts = part and [[part]]
    for kind, answers in FAILURES[failure].items():
        fake.plan(kind, *answers)
    result = run("--verbose")
    assert not has_secret(result.err) and not has_secret(result.out), result.err
    assert "\x1b" not in result.err and "Traceback" not in result.err
    assert found or "POST" in FAILURES[failure]
    assert not any(found) and not files_with_secrets(output)


SIGNED_LINK = "https://s3.example/p.gz?X-Amz-Expires=129599&X-Amz-Signature=abcSIGNED"


@pytest.mark.parametrize(
    "secret",
    [
        SIGNED_LINK,
        "s3://bucket/p.gz?X-Amz-Signature=abcSIGNED",
        "/p.gz?X-Amz-Signature=abcSIGNED&x=y",
        "p.gz?sig=abcSIGNED",
        "https://cdn.example/p.gz?Policy=abcSIGNED&Key-Pair-Id=x",
        "https://s3.example/p.gz?AWSAccessKeyId=abcSIGNED",
        "X-Amz-Signature=abcSIGNED",
        "x-goog-signature=abcSIGNED,",
        "X-Amz-Credential=abcSIGNED/20261024/s3",
        "X-Amz-Security-Token=abcSIGNED==",
        "(https://s3.example/p.gz?AWSAccessKeyId=a&Signature=abcSIGNED)",
        "https://s3.example/a?b/p.gz?X-Amz-Signature=abcSIGNED",
        TOKEN,
        f"token={TOKEN}",
        f"'{TOKEN}'",
    ],
)
def test_a_secret_in_a_message_is_not_shown(fake, run, secret):
    fake.plan("me", problem(400, f"See {secret} for more"))
    result = run("--verbose")
    assert "failed with 400: See " in result.err and " for more" in result.err
    assert not has_secret(result.err), result.err


@pytest.mark.parametrize("secret", [SIGNED_LINK, TOKEN], ids=["link", "token"])
@pytest.mark.parametrize(
    "kind, answer",
    [
        pytest.param("GET", lambda text: status("failed", error_reason=text), id="error_reason"),
        pytest.param("GET", lambda text: status("completed", text), id="link"),
        pytest.param("me", lambda text: in_json({"login": text, "name": text}), id="name"),
        pytest.param("me", lambda text: Answer(text.encode()), id="not JSON"),
        pytest.param("shares", lambda text: in_json({"orgs": [{"id": text}]}), id="ID"),
    ],
)
def test_a_secret_elsewhere_in_an_answer_is_not_shown(
    fake, run, output, monkeypatch, secret, kind, answer
):
    monkeypatch.setattr(usage_report, "RETRY_PAUSES", (1,))
    fake.plan(kind, *always(answer(f"See {secret} for more")))
    result = run("--verbose")
    assert not has_secret(result.err) and not files_with_secrets(output), result.err


@pytest.mark.parametrize("length", range(255, 305, 6))
def test_a_message_cut_inside_the_token_does_not_show_the_tokens_beginning(fake, run, length):
    fake.plan("me", problem(400, "x" * length + TOKEN))
    shown = run().err
    assert TOKEN[:12] not in shown and "failed with 400: xxx" in shown


def test_a_message_cut_inside_a_link_does_not_show_its_signature(fake, run):
    for length in range(240, 300, 6):
        link = "https://s3.example/?X-Amz-Signature=abcSIGNED"
        fake.plan("me", problem(400, "x" * length + link))
        assert "abc" not in run().err


def test_the_store_gets_no_token_and_the_api_no_signature(fake, run):
    assert run().code == 0
    store = [seen for seen in fake.seen if seen.server == "store"]
    assert store and not any(has_secret(f"{seen.headers} {seen.body!r}") for seen in store)
    assert not any(TOKEN in seen.path for seen in fake.seen)
    assert not any("SIGNED" in seen.path for seen in fake.seen if seen.server == "api")


MALICIOUS = "bell\x07 \x1b[31mred\r\nline\u2028\u202e\x9b1m\ud800 \t end"


@pytest.mark.parametrize("flags", [["--verbose"], []], ids=["verbose", ""])
def test_names_with_control_characters_stay_on_one_line(fake, run, flags):
    """Of organizations, in the lists and the summary; of the user; and of the job's state."""
    fake.organizations["8d05d166-e199-43b1-b588-415eadafacc1"] = MALICIOUS
    fake.plan("me", in_json({"login": MALICIOUS, "name": MALICIOUS}))
    fake.odd_states = [MALICIOUS]
    result = run(*flags)
    assert result.code == 0 and result.err.count("red line") >= 5
    assert re.fullmatch(
        r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ [^\x00-\x1f\x7f-\x9f\u2028\u202e]*\n)*", result.err
    )


def test_a_name_of_a_million_characters_is_cut(fake, run):
    fake.organizations["8d05d166-e199-43b1-b588-415eadafacc1"] = "x" * 1_000_000
    fake.plan("me", in_json({"login": "x" * 1_000_000, "name": "x" * 1_000_000}))
    result = run()
    assert result.code == 0 and "xxx\u2026" in result.err
    assert max(map(len, result.err.splitlines())) < 700


def test_choices_with_control_characters_stay_on_one_line(fake, run):
    fake.organizations = {"8d05d166-e199-43b1-b588-415eadafacc1": MALICIOUS}
    result = run(PRIMARY_ORG_ID=None)
    assert result.code == 2 and result.err.count("\n") == 3
    assert result.err.replace("\n", "").isprintable()
