"""Whose token it is, which organizations share the plan, and what the run shows of them."""

from __future__ import annotations

import json
import re

import pytest
from conftest import always
from fake_circleci import ORGANIZATIONS, PRIMARY, Answer, in_json, problem

OTHER, THIRD = list(ORGANIZATIONS)[1:]
NASTY = "bell\x07 \x1b[31mred\r\nline\u2028\u202e\x9b1m\ud800 \t end"


def posted(fake, run, **variables: str) -> dict[str, object]:
    """The body of the only POST of a run, which the fake refuses."""
    fake.plan("POST", problem(400, "No."))
    result = run(**variables)
    assert result.code == 1, result.err
    (post,) = fake.requests("POST")
    return json.loads(post.body)


@pytest.mark.parametrize(
    "answer, shown",
    [
        pytest.param({"name": "Pat Doe", "login": "pat"}, "Pat Doe.*pat", id="name and login"),
        pytest.param({"name": None, "login": "pat"}, "pat", id="login alone"),
        pytest.param({"id": "7"}, "", id="neither"),
        pytest.param({"name": NASTY, "login": NASTY}, "red.*line.*red.*line", id="control chars"),
    ],
)
def test_the_owner_of_the_token_is_shown(fake, run, answer, shown):
    fake.plan("me", in_json(answer))
    result = run("--dry-run")
    assert result.code == 0
    assert re.search(shown, result.err)
    assert "None" not in result.err
    assert result.err.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "organizations, expected",
    [
        pytest.param([PRIMARY, OTHER, THIRD], [PRIMARY, OTHER, THIRD], id="all on the plan"),
        pytest.param([OTHER], [PRIMARY, OTHER], id="the primary is missing"),
        pytest.param([PRIMARY, OTHER, PRIMARY], [PRIMARY, OTHER], id="the primary twice"),
        pytest.param([OTHER.upper(), OTHER], [PRIMARY, OTHER], id="upper case"),
    ],
)
def test_the_post_names_every_organization_on_the_plan_once(fake, run, organizations, expected):
    fake.plan("shares", in_json({"orgs": [{"id": each, "name": "x"} for each in organizations]}))
    body = posted(fake, run)
    assert sorted(body.pop("shared_org_ids")) == sorted(expected)
    assert body == {"start": "2026-09-01T00:00:00Z", "end": "2026-09-30T23:59:59Z"}


def test_an_empty_list_is_a_plan_that_is_not_shared(fake, run):
    fake.plan("shares", *[in_json({"orgs": []})] * 2)
    assert posted(fake, run)["shared_org_ids"] == [PRIMARY]
    assert re.search("notice: .*not shared", run("--dry-run").err)


@pytest.mark.parametrize(
    "answer, code",
    [
        pytest.param(problem(403, "Forbidden."), 1, id="403"),
        pytest.param(problem(404, "Not found."), 1, id="404"),
        pytest.param(problem(503, "Busy."), 75, id="503"),
        pytest.param(Answer(b"<html>Sign in</html>"), 1, id="HTML"),
        pytest.param(in_json({"orgs": None}), 1, id="null"),
        pytest.param(in_json({"orgs": {}}), 1, id="an object"),
        pytest.param(in_json({"orgs": ""}), 1, id="a string"),
        pytest.param(in_json({"orgs": [{"name": "Acme"}]}), 1, id="no ID"),
        pytest.param(in_json({"orgs": [{"id": 7, "name": "x"}]}), 1, id="a number as ID"),
        pytest.param(in_json({"orgs": [{"id": "gh/acme"}]}), 1, id="a slug as ID"),
    ],
)
def test_any_other_answer_ends_the_run_before_the_post(fake, run, answer, code):
    fake.plan("shares", *always(answer))
    result = run()
    assert (result.code, result.out, fake.requests("POST")) == (code, "", [])
    assert "SHARED_ORG_IDS" in result.last_line


def test_shared_org_ids_replaces_the_endpoint(fake, run):
    shared = f"{THIRD}, {OTHER.upper()},,{THIRD}"
    body = posted(fake, run, SHARED_ORG_IDS=shared)
    assert body["shared_org_ids"] == [PRIMARY, THIRD, OTHER]
    assert fake.requests("GET", contains="shares-for") == []


def test_the_window_and_the_organizations_are_shown(fake, run):
    """Names on one line, without control characters, and not endless."""
    fake.organizations = {PRIMARY: "\u6771\u4eac", OTHER: NASTY, THIRD: "long " * 100_000}
    fake.plan("POST", problem(400, "No."))
    lines = run().err.splitlines()
    assert any("2026-09-01" in line and "2026-09-30" in line for line in lines)
    for organization_id, name in [(PRIMARY, "\u6771\u4eac"), (OTHER, "red line"), (THIRD, "long")]:
        assert any(organization_id in line and name in line for line in lines), organization_id
    assert "".join(lines).isprintable()
    assert max(map(len, lines)) < 500


def test_with_job_id_the_list_is_not_requested(fake, run):
    assert run().code == 0
    fake.seen.clear()
    result = run("--job-id", next(iter(fake.jobs)), START_DATE=None)
    assert result.code == 0, result.err
    assert fake.requests("GET", contains="shares-for") == []
