"""The main job: one command, one report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import requests
from conftest import leftovers
from fake_circleci import ORGANIZATIONS, PRIMARY, Answer, FakeCircleCI, in_json, problem

import usage_report


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_become_one_file_byte_for_byte(fake, run, output, parts):
    fake.part_count = parts
    result = run()
    assert result.code == 0
    assert result.report.read_bytes() == fake.report()
    assert re.fullmatch(r"all_orgs_\d{8}_\d{6}_2026-09-01_2026-09-30\.csv", result.report.name)
    assert result.out == f"{result.report}\n" and result.report.is_absolute()
    assert leftovers(output) == []


def test_one_post_asks_for_every_organization_on_the_plan(fake, run):
    run()
    (post,) = fake.requests("POST")
    assert post.path == f"/api/v2/organizations/{PRIMARY}/usage_export_job"
    assert json.loads(post.body) == {
        "start": "2026-09-01T00:00:00Z",
        "end": "2026-09-30T23:59:59Z",
        "shared_org_ids": list(ORGANIZATIONS),
    }


def test_every_request_names_this_tool(fake, run):
    run()
    assert {one.headers["User-Agent"] for one in fake.seen} == {f"circleci-usage-report/{usage_report.__version__}"}


@pytest.mark.parametrize(
    "orgs, expected, said",
    [
        pytest.param([], [PRIMARY], "The plan is not shared", id="an empty list is a plan that is not shared"),
        pytest.param(["a" * 8], None, "SHARED_ORG_IDS", id="entries of another shape"),
        pytest.param({}, None, "SHARED_ORG_IDS", id="an empty object is no empty list"),
        pytest.param("", None, "SHARED_ORG_IDS", id="an empty text is no empty list"),
        pytest.param([{"id": "", "name": "x"}], None, "SHARED_ORG_IDS", id="an empty ID"),
        pytest.param([{"id": 7}], None, "SHARED_ORG_IDS", id="an ID that is a number"),
        pytest.param([{"id": PRIMARY, "name": [1]}], [PRIMARY], "", id="a name that is no text"),
        pytest.param(
            [{"id": "8D05D166-E199-43B1-B588-415EADAFACC1", "name": "x"}] * 2,
            [PRIMARY, "8d05d166-e199-43b1-b588-415eadafacc1"],
            "",
            id="the primary is always included and each ID once",
        ),
        pytest.param([{"id": PRIMARY, "name": None}], [PRIMARY], "", id="a name may be missing"),
    ],
)
def test_organizations_on_the_plan(fake, run, orgs, expected, said):
    fake.plan("shares", in_json({"orgs": orgs}))
    result = run()
    assert said in result.err
    if expected:
        assert result.code == 0
        assert json.loads(fake.requests("POST")[0].body)["shared_org_ids"] == expected
    else:
        assert result.code == 1 and not fake.requests("POST")


def test_shared_org_ids_replaces_the_undocumented_endpoint(fake, run):
    other = list(ORGANIZATIONS)[2]
    assert run(SHARED_ORG_IDS=f" {other.upper()} , {PRIMARY},").code == 0
    assert not fake.requests("GET", contains="shares-for")
    assert json.loads(fake.requests("POST")[0].body)["shared_org_ids"] == [PRIMARY, other]


HTML = Answer(b"<html><body>Log in</body></html>", headers={"Content-Type": "text/html"})
DROP = Answer(drop=True)
LIMITED = problem(429, "Rate limit exceeded.", **{"Retry-After": "7"})


def always(answer: Answer) -> list[Answer]:
    return [answer] * 30


@pytest.mark.parametrize(
    "kind, answers, code, said",
    [
        pytest.param("me", [problem(401, "Invalid token provided.")], 1, "401: Invalid token provided. Is CIRCLE_TOKEN right.*make a new personal API token", id="me 401 says what to do about the token"),
        pytest.param("me", [problem(403, "No.")], 1, "403: No.", id="me 403"),
        pytest.param("me", [Answer(status=302, headers={"Location": "https://elsewhere.example/"})], 1, "302", id="me redirect"),
        pytest.param("me", always(HTML), 1, "without JSON", id="me HTML with 200"),
        pytest.param("me", [in_json([1])], 1, "names no user", id="me JSON of another shape"),
        pytest.param("me", always(problem(500, "Internal server error.")), 1, "500: Internal server error.", id="me 500 for good"),
        pytest.param("me", [problem(503, "Busy."), DROP, HTML, problem(408, "Slow.")], 0, "Trying again in 8 s", id="me passing trouble"),
        pytest.param("me", always(DROP), 75, "no connection, or it broke off", id="me dropped for good"),
        pytest.param("me", [LIMITED] * 3, 0, "Waiting 0:00:07", id="me 429 is waited out"),
        pytest.param("shares", [problem(403, "Forbidden.")], 1, "403: Forbidden.*SHARED_ORG_IDS", id="shares-for 403"),
        pytest.param("shares", [problem(404, "Not found.")], 1, "404: Not found.*SHARED_ORG_IDS", id="shares-for 404"),
        pytest.param("shares", always(HTML), 1, "without JSON.*SHARED_ORG_IDS", id="shares-for HTML"),
        pytest.param("shares", [in_json({"organizations": []})], 1, "SHARED_ORG_IDS", id="shares-for of another shape"),
        pytest.param("shares", [in_json({"orgs": None})], 1, "SHARED_ORG_IDS", id="shares-for without a list"),
        pytest.param("POST", [problem(400, "Unexpected request body provided.")], 1, "400: Unexpected request body", id="POST 400"),
        pytest.param("POST", [problem(403, "No access.")], 1, "403: No access.*admin", id="POST 403"),
        pytest.param("POST", [problem(404, "Organization does not exist.")], 1, "404: Organization.*PRIMARY_ORG_ID", id="POST 404"),
        pytest.param("POST", [problem(500, "Oops.")] * 4, 0, "500: Oops", id="POST passing 500"),
        pytest.param("POST", [LIMITED], 0, "Waiting 0:00:07", id="POST 429"),
        pytest.param("POST", [Answer(drop=True, late=True)], 0, "Trying again", id="POST carried out, answer lost once"),
        pytest.param("POST", always(DROP), 75, "Whether CircleCI makes the export is not known", id="POST answer lost twice"),
        pytest.param("POST", always(in_json({}, 201)), 75, "not known", id="POST without a job ID"),
        pytest.param("GET", [problem(401, "Invalid token provided.")], 1, "401.*CIRCLE_TOKEN.*same command collects it", id="poll 401 keeps the export"),
        pytest.param("GET", [HTML, in_json({"state": 3}), DROP, problem(502, "Bad.")], 0, "Trying again in 30 s", id="poll passing trouble"),
        pytest.param("GET", always(problem(500, "Oops.")), 1, "500: Oops.*same command collects it", id="poll 500 for good"),
        pytest.param("GET", always(DROP), 75, "broke off.*same command collects it", id="poll dropped for good"),
    ],
)  # fmt: skip
def test_wrong_answers(fake, run, output, kind, answers, code, said):
    fake.plan(kind, *answers)
    result = run()
    assert result.code == code, result.err
    assert re.search(said, result.err, re.DOTALL)
    assert "Traceback" not in result.err
    assert (result.out != "") == (code == 0)
    if kind in ("me", "shares") and code:
        assert not fake.requests("POST")
    if kind == "GET" and code:
        fake.planned.clear()
        assert run().code == 0
    assert len(fake.jobs) == (0 if code and kind != "GET" else 2 if "once" in str(said) or answers[0].late else 1)
    assert leftovers(output) == []


def test_a_lost_answer_to_the_post_costs_one_more_post_and_no_third(fake, run):
    fake.plan("POST", *always(Answer(drop=True, late=True)))
    assert run().code == 75
    assert len(fake.requests("POST")) == 2


def test_a_server_that_is_not_there(run):
    result = run(CIRCLECI_BASE_URL="http://127.0.0.1:9")
    assert result.code == 75
    assert "GET /api/v2/me: no connection" in result.err


def test_a_read_timeout(fake, run, monkeypatch):
    monkeypatch.setattr(usage_report, "TIMEOUTS", (1, 0.05))
    fake.plan("me", *always(Answer(b"x" * 9, bytes_a_write=1, pause=0.1)))
    result = run()
    assert result.code == 75
    assert "GET /api/v2/me: no answer in time" in result.err


@pytest.mark.parametrize("state, answer", [("created", 0), ("processing", 0), ("pondering", 0)])
def test_a_job_that_is_not_ready_is_waited_for(fake, run, state, answer):
    fake.odd_states = [state]
    result = run()
    assert result.code == answer
    assert f"Export job {state}" in result.err
    assert ("is not known here" in result.err) == (state == "pondering")


@pytest.mark.parametrize(
    "empty, code, gets", [(1, 0, 2), (2, 0, 3), (3, 3, 3)], ids=["late links", "links at the third time", "no usage"]
)
def test_completed_without_links(fake, run, output, empty, code, gets):
    fake.job_seconds, fake.empty_answers = 1, empty
    result = run()
    assert result.code == code
    assert len(fake.requests("GET")) == gets
    assert ("there is no usage in this window" in result.err) == (code == 3)
    assert leftovers(output) == []


def test_a_failed_job_tells_its_reason_and_is_forgotten(fake, run, output):
    fake.job_fails = "result set over 100 MB"
    result = run()
    assert result.code == 1
    assert "result set over 100 MB. What helps: a shorter window" in result.err
    assert leftovers(output) == []
    fake.job_fails = ""
    assert run().code == 0 and len(fake.requests("POST")) == 2


def test_an_export_that_takes_over_its_time(fake, run, clock):
    fake.job_seconds = 1e9
    began = clock.now
    result = run()
    assert result.code == 75
    assert 4 * 3600 <= clock.now - began <= 4.5 * 3600
    assert "the same command collects it" in result.last_line


def test_dry_run_stops_before_the_post(fake, run, output):
    result = run("--dry-run")
    assert result.code == 0 and result.out == ""
    assert not fake.requests("POST")
    for shown in [*ORGANIZATIONS, *ORGANIZATIONS.values(), "POST /api/v2/organizations/", '"start": "2026-09-01T00:00:00Z"']:
        assert shown in result.err
    assert leftovers(output) == []


def test_job_id_collects_an_export_without_a_post(fake, run, clock):
    run()
    (job_id,) = fake.jobs
    clock.sleep(7200)
    result = run("--job-id", job_id, START_DATE=None, END_DATE=None)
    assert result.code == 0
    assert result.report.name.endswith(f"_{job_id}.csv")
    assert result.report.read_bytes() == fake.report()
    assert len(fake.requests("POST")) == 1


def test_job_id_that_circleci_does_not_know(fake, run, output):
    result = run("--job-id", PRIMARY)
    assert result.code == 1 and "404" in result.err
    assert not fake.requests("POST") and leftovers(output) == []


def test_the_token_follows_no_redirect(fake, run):
    """requests would send a header like Circle-Token on to another host."""
    other = FakeCircleCI(fake.clock)
    for kind in ("me", "shares", "POST", "GET"):
        fake.plan(kind, Answer(status=307, headers={"Location": f"{other.url}/api/v2/me"}))
        assert run().code == 1
    other.close()
    assert other.seen == []


@pytest.mark.parametrize("url", ["https://circleci.com/api/v2/me", "http://127.0.0.1/api/v2/me"])
def test_netrc_is_not_read(tmp_path, monkeypatch, url):
    """requests would add Authorization from ~/.netrc. Looked at on its way out, where TLS would begin."""
    (tmp_path / ".netrc").write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    sent = []

    def catch(adapter, request, **options):
        sent.append(request.headers)
        raise requests.ConnectionError

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", catch)
    for token in ("", "abc"):
        with pytest.raises(requests.ConnectionError):
            usage_report.send("GET", url, token)
    assert ["Circle-Token" in headers for headers in sent] == [False, True]
    assert not any("Authorization" in headers for headers in sent)


def test_a_base_url_may_end_in_a_slash_and_have_capitals(fake, run):
    assert run("--dry-run", CIRCLECI_BASE_URL=fake.url.upper() + "/").code == 0
    assert usage_report.check_base_url("HTTPS://CircleCI.com/") == "https://circleci.com"


def test_over_http_no_proxy_sees_the_token(fake, run, monkeypatch):
    proxy = FakeCircleCI(fake.clock)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    run("--dry-run")
    proxy.close()
    assert proxy.seen == []


def test_cookies_are_not_kept(fake, run):
    fake.plan("me", in_json({"login": "pat", "name": "Pat"}, 200, **{"Set-Cookie": "session=1; Path=/"}))
    assert run().code == 0
    assert not [one for one in fake.seen if "Cookie" in one.headers]


def test_as_a_child_process(fast, fast_fake, output):
    """The script as people run it: nothing but its path on stdout, so that csv=$(...) works."""
    result = fast.run(fast_fake, "--output-dir", output)
    assert result.code == 0, result.err
    assert result.report.read_bytes() == fast_fake.report()
    assert result.out == f"{result.report}\n"
    assert "Traceback" not in result.err


def test_quiet_is_quiet(fast, fast_fake, output):
    result = fast.run(fast_fake, "--quiet", "--output-dir", output)
    assert (result.code, result.err) == (0, "")
    assert result.report.exists()
    failed = fast.run(fast_fake, "--quiet", "--output-dir", output, CIRCLE_TOKEN="wrong")
    assert failed.code == 1 and "401" in failed.err and failed.err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_path_that_cannot_be_printed_costs_no_second_export(fast, fast_fake, output):
    """The first run cannot say where the report is; the next one finds it."""
    with open("/dev/full", "w") as full:
        assert fast.run(fast_fake, "--output-dir", output, stdout=full).code == 75
    result = fast.run(fast_fake, "--output-dir", output)
    assert result.code == 0 and [*output.iterdir()] == [result.report]
    assert len(fast_fake.jobs) == 1 and result.report.read_bytes() == fast_fake.report()


def test_a_path_that_does_not_fit_the_encoding_of_stdout(fast, fast_fake, tmp_path):
    result = fast.run(fast_fake, "--output-dir", tmp_path / "\u0141ukasz", PYTHONIOENCODING="cp1252")
    assert result.code == 0 and "\\u0141ukasz" in result.out and "Traceback" not in result.err
