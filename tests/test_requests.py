"""Requests to the API: retries, error messages, connection trouble, and secrets."""

from __future__ import annotations

import shutil
import socketserver
import ssl
import subprocess
import threading

import pytest
import requests
from conftest import always
from fake_circleci import ORGANIZATIONS, PRIMARY, TOKEN, Answer, in_json, problem

import usage_report

OTHER = list(ORGANIZATIONS)[1]
LOST = Answer(drop=True)


# --- Retries and errors ---


@pytest.mark.parametrize(
    "answer, code, reason",
    [
        pytest.param(problem(500, "Oops."), 75, "500", id="500"),
        pytest.param(problem(408, "Slow."), 75, "408", id="408"),
        pytest.param(problem(429, "Wait.", **{"Retry-After": "7"}), 75, "429", id="429"),
        pytest.param(LOST, 75, "lost", id="a lost connection"),
        pytest.param(Answer(b"{}", cut=1), 75, "lost", id="a connection lost in the body"),
        pytest.param(Answer(b"<html>Sign in"), 1, "JSON", id="HTML"),
    ],
)
def test_trouble_that_may_pass_is_retried_five_times(fake, run, answer, code, reason):
    """The first and the last line give the reason. Between them is a short one per retry."""
    fake.plan("me", answer)
    assert run("--dry-run").code == 0
    fake.plan("me", *always(answer))
    result = run()
    assert (result.code, result.out) == (code, "")
    assert len(fake.requests("GET", contains="/me")) == 2 + 6
    first, *retries, last = result.err.splitlines()
    assert reason in first and reason in last
    assert len(retries) == 5
    assert all("Retry" in line and len(line) < 60 for line in retries)


def test_the_pauses_between_retries_grow_unless_a_429_names_one(fake, run):
    fake.plan("me", *[LOST] * 3, problem(429, "No.", **{"Retry-After": "100"}), LOST)
    assert run("--dry-run").code == 0
    times = [seen.at for seen in fake.requests("GET", contains="/me")]
    pauses = [round(after - before) for before, after in zip(times, times[1:])]
    assert 0 < pauses[0] < pauses[1] < pauses[2] < pauses[4] < pauses[3] == 100


@pytest.mark.parametrize("kind", ["me", "collaborations", "shares", "POST", "GET"])
@pytest.mark.parametrize("status", [307, 400])
def test_any_other_status_ends_the_run(fake, run, kind, status):
    """Redirects are not followed: the token must not reach another host."""
    fake.plan(kind, *always(problem(status, f"Sorry {status}00", Location=fake.store_url)))
    result = run(PRIMARY_ORG_ID=None if kind == "collaborations" else PRIMARY)
    assert (result.code, result.out) == (1, "")
    assert f" {status}: Sorry {status}00" in result.last_line
    requests = [(seen.server, seen.method, seen.path) for seen in fake.seen]
    assert len(set(requests)) == len(requests), "none is repeated"
    assert {seen.server for seen in fake.seen} == {"api"}


def test_a_401_says_where_the_token_comes_from(run, tmp_path):
    (tmp_path / ".env").write_text("CIRCLE_TOKEN=wrong")
    assert "CIRCLE_TOKEN in the environment" in run(CIRCLE_TOKEN="wrong").last_line
    assert f"CIRCLE_TOKEN in {tmp_path / '.env'}" in run(CIRCLE_TOKEN=None).last_line


def test_a_404_shows_the_ids_that_were_used(fake, run):
    fake.plan("POST", problem(404, "No."))
    advice = run(SHARED_ORG_IDS=OTHER).last_line.partition("404")[2]
    assert PRIMARY in advice and OTHER in advice


def test_after_a_400_for_the_post_circlecis_message_comes_first(fake, run):
    fake.plan("POST", problem(400, "Not this window."))
    last_line = run().last_line
    places = [last_line.index(word) for word in ("Not this window", "31 days", "year", "clock")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"message": "a\\n\\u001b[31m\\u202e\\u0000b\\r"}', id="control characters"),
        pytest.param(b'{"message": "%s"}' % (b"x" * 100_000), id="endless"),
    ],
)
def test_the_message_is_one_short_line(fake, run, body):
    fake.plan("me", Answer(body, 403))
    result = run()
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert " 403" in result.last_line and result.last_line.isprintable()
    assert result.last_line.count("x") <= 300


def serve_tls(folder) -> str:
    """The URL of a server with a certificate that nobody trusts."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    command += " -subj /CN=a -keyout key.pem -out key.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "key.pem")
    server = socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"https://127.0.0.1:{server.server_address[1]}"


DIRECT = {"no_proxy": "*"}
PROXY = {"HTTPS_PROXY": "http://127.0.0.1:9"}
BUNDLE = {"REQUESTS_CA_BUNDLE": "missing.pem"}


@pytest.mark.parametrize(
    "url, variables, code, hint",
    [
        pytest.param("http://127.0.0.1:9", {}, 75, "network", id="a closed port"),
        pytest.param("https://a.invalid", DIRECT, 75, "network", id="a host that is not found"),
        pytest.param("TLS", DIRECT, 75, "certificate", id="an untrusted certificate"),
        pytest.param("https://circleci.com", PROXY, 75, "HTTPS_PROXY", id="an unreachable proxy"),
        pytest.param("https://127.0.0.1:9", BUNDLE, 1, "REQUESTS_CA_BUNDLE", id="no CA bundle"),
        pytest.param("https://.invalid", DIRECT, 1, "CIRCLECI_BASE_URL", id="an invalid host"),
    ],
)
def test_the_cause_is_named(run, tmp_path, monkeypatch, url, variables, code, hint):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run(CIRCLECI_BASE_URL=serve_tls(tmp_path) if url == "TLS" else url)
    assert (result.code, result.out) == (code, "")
    assert hint in result.last_line


def test_reading_an_answer_has_a_timeout(fake, run, monkeypatch):
    monkeypatch.setattr(usage_report, "TIMEOUTS", (10, 0.1))
    fake.post_seconds = 0.5
    result = run()
    assert (result.code, "timed out" in result.last_line) == (1, True)


# --- Secrets ---


def test_requests_name_this_tool_and_carry_no_other_secrets(fake, run, tmp_path, monkeypatch):
    """The store gets no token, and nobody gets a password of ~/.netrc or a cookie."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login pat password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fake.plan("me", in_json({"name": "Pat"}, **{"Set-Cookie": "a=b; Path=/"}))
    assert run().code == 0
    for seen in fake.seen:
        assert "usage-report" in seen.headers["User-Agent"]
        assert {"Authorization", "Cookie"}.isdisjoint(seen.headers)
        assert (TOKEN in str(seen)) == (seen.server == "api")
        assert ("SIGNED" in str(seen)) == (seen.server == "store")


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_on_loopback_no_proxy_sees_the_token(fake, run, monkeypatch, name):
    for exception in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(exception, raising=False)
    monkeypatch.setenv(name, fake.store_url)
    assert run("--dry-run").code == 0
    assert {seen.server for seen in fake.seen} == {"api"}


def check_for_secrets(text: str) -> None:
    assert "SIGNED" not in text, text
    assert TOKEN[:12] not in text, text  # not even its beginning


def test_verbose_shows_every_api_request_and_no_secret(fake, run):
    result = run("--verbose")
    for seen in fake.requests("GET", contains="") + fake.requests("POST"):
        assert f"{seen.method} {fake.url}{seen.path}: 20" in result.err
    check_for_secrets(result.err)


LINK = "https://127.0.0.1:9/part.gz?X-Amz-Expires=9&X-Amz-Signature=abcSIGNED"
SECRETS = f"See {LINK} and {TOKEN} for more"


@pytest.mark.parametrize(
    "kind, answer",
    [
        pytest.param("me", problem(400, SECRETS), id="message"),
        pytest.param("me", problem(400, "x " * 140 + TOKEN), id="message cut inside the token"),
        pytest.param("me", in_json({"name": SECRETS, "login": SECRETS}), id="name"),
        pytest.param("shares", in_json({"orgs": [{"id": SECRETS}]}), id="organization"),
        pytest.param("GET", in_json({"state": "failed", "error_reason": SECRETS}), id="reason"),
        pytest.param("GET", in_json({"state": SECRETS}), id="state"),
        pytest.param("GET", in_json({"state": "completed", "download_urls": [LINK]}), id="link"),
    ],
)
def test_a_secret_in_an_answer_is_not_shown_or_left_in_a_file(fake, run, output, kind, answer):
    fake.plan(kind, answer)
    check_for_secrets(run("--verbose").err)
    for path in output.glob("*/*"):
        check_for_secrets(path.read_text())


def test_quiet_shows_nothing_unless_the_run_fails(fake, run):
    fake.plan("me", problem(503, "Busy."))
    result = run("--quiet", "--start", "2026-10-01", "--end", "2030-01-01")
    assert (result.code, result.err) == (0, "")
    failed = run("--quiet", CIRCLE_TOKEN="wrong")
    assert (failed.code, failed.err.count("\n")) == (1, 1)


@pytest.mark.parametrize("flags", [[], ["--verbose"]], ids=["default", "verbose"])
def test_a_traceback_is_shown_with_verbose_only(run, monkeypatch, flags):
    def fail(response: requests.Response) -> None:
        raise RuntimeError(f"boom\n{TOKEN}")

    monkeypatch.setattr(requests.Response, "json", fail)
    result = run(*flags)
    assert (result.code, result.out) == (1, "")
    assert "RuntimeError" in result.err
    assert ("Traceback" in result.err) == bool(flags)
    check_for_secrets(result.err)
