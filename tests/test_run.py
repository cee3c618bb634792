"""The main job: one command, one report. And everything servers can answer instead."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import BadStatusLine, RemoteDisconnected
from pathlib import Path

import pytest
import requests
import urllib3
from clocks import PROJECT, REAL_SLEEP, REAL_TIME
from conftest import always, leftovers
from fake_circleci import (
    ORGANIZATIONS,
    PRIMARY,
    TOKEN,
    Answer,
    ApiHandler,
    FakeCircleCI,
    in_json,
    problem,
)

import usage_report

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX system")
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


# --- The main job ---


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_become_one_file_byte_for_byte(fake, run, output, parts):
    fake.part_count = parts
    result = run()
    assert result.code == 0
    assert result.report.read_bytes() == fake.report()
    assert re.fullmatch(r"all_orgs_\d{8}_\d{6}_2026-09-01_2026-09-30\.csv", result.report.name)
    assert result.out == f"{result.report}\n" and result.report.is_absolute()
    assert leftovers(output) == []


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="needs time.tzset")
def test_the_name_of_the_report_has_the_local_time(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        name = run().report.name
    time.tzset()
    assert re.match(r"all_orgs_20261024_2100\d\d_", name)


def test_one_post_requests_every_organization_on_the_plan(fake, run):
    run()
    (post,) = fake.requests("POST")
    assert post.path == f"/api/v2/organizations/{PRIMARY}/usage_export_job"
    assert json.loads(post.body) == {
        "start": "2026-09-01T00:00:00Z",
        "end": "2026-09-30T23:59:59Z",
        "shared_org_ids": list(ORGANIZATIONS),
    }


def test_the_window_and_the_organizations_are_shown_before_the_post(fake, run):
    fake.plan("POST", problem(400, "No."))
    result = run()
    assert result.code == 1 and fake.jobs == {}
    assert "Signed in as Pat Doe (pat)." in result.err
    assert "Usage from 2026-09-01 to 2026-09-30 (UTC), 3 organizations" in result.err
    for organization_id, name in ORGANIZATIONS.items():
        assert re.search(rf"{name} +{organization_id}", result.err)


def test_every_request_names_this_tool(fake, run):
    run()
    agents = {seen.headers["User-Agent"] for seen in fake.seen}
    assert agents == {f"circleci-usage-report/{usage_report.__version__}"}


@pytest.mark.parametrize("quiet", [[], ["--quiet"]], ids=["default", "quiet"])
def test_a_dry_run_shows_the_request_and_stops_before_the_post(fake, run, output, quiet):
    result = run("--dry-run", *quiet)
    assert result.code == 0 and result.out == ""
    assert not fake.requests("POST")
    for shown in [
        *ORGANIZATIONS,
        *ORGANIZATIONS.values(),
        f"POST /api/v2/organizations/{PRIMARY}/usage_export_job",
        '"start": "2026-09-01T00:00:00Z"',
        "Dry run",
    ]:
        assert shown in result.err
    assert leftovers(output) == []


def test_job_id_collects_an_export_without_a_post(fake, run, clock):
    run()
    (job_id,) = fake.jobs
    clock.sleep(7200)
    before = len(fake.seen)
    result = run("--job-id", job_id, START_DATE=None, END_DATE=None)
    assert result.code == 0
    assert result.report.name.endswith(f"_{job_id}.csv")
    assert result.report.read_bytes() == fake.report()
    assert len(fake.requests("POST")) == 1
    assert not [seen for seen in fake.seen[before:] if "shares-for" in seen.path]


def test_an_unknown_job_id_fails_without_a_post(fake, run, output):
    result = run("--job-id", PRIMARY)
    assert result.code == 1
    assert "failed with 404" in result.last_line and "--job-id" in result.last_line
    assert not fake.requests("POST") and leftovers(output) == []


# --- The organizations on the plan ---

OTHER = "8d05d166-e199-43b1-b588-415eadafacc1"


@pytest.mark.parametrize(
    "orgs, expected, message",
    [
        pytest.param([], [PRIMARY], "The plan is not shared", id="an empty list: not shared"),
        pytest.param([{"id": OTHER}], [PRIMARY, OTHER], "", id="the primary is always included"),
        pytest.param(
            [{"id": OTHER.upper(), "name": "x"}] * 2,
            [PRIMARY, OTHER],
            "",
            id="a repeated ID is sent once",
        ),
        pytest.param([{"id": PRIMARY, "name": None}], [PRIMARY], "", id="no name"),
        pytest.param([{"id": PRIMARY, "name": [1]}], [PRIMARY], "", id="a list as the name"),
    ],
)
def test_the_post_lists_the_organizations_on_the_plan(fake, run, orgs, expected, message):
    fake.plan("shares", in_json({"orgs": orgs}))
    result = run()
    assert result.code == 0 and message in result.err
    assert json.loads(fake.requests("POST")[0].body)["shared_org_ids"] == expected


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"orgs": ["a" * 8]}, id="strings"),
        pytest.param({"orgs": {}}, id="an empty object"),
        pytest.param({"orgs": {PRIMARY: "Acme"}}, id="an object"),
        pytest.param({"orgs": ""}, id="an empty string"),
        pytest.param({"orgs": None}, id="null"),
        pytest.param({"orgs": 0}, id="zero"),
        pytest.param({"orgs": [{"id": "", "name": "x"}]}, id="an empty ID"),
        pytest.param({"orgs": [{"id": 7}]}, id="a number as the ID"),
        pytest.param({"orgs": [{"name": "x"}]}, id="no ID"),
        pytest.param({"orgs": [None]}, id="a list of null"),
        pytest.param({"organizations": []}, id="another key"),
        pytest.param([], id="an empty list"),
        pytest.param("orgs", id="a string"),
        pytest.param(7, id="a number"),
    ],
)
def test_an_unclear_list_of_organizations_ends_the_run_before_the_post(fake, run, answer):
    fake.plan("shares", *always(in_json(answer)))
    result = run()
    assert result.code == 1 and not fake.requests("POST")
    assert re.search("unexpected data.* Workaround: set SHARED_ORG_IDS", result.last_line)


def test_shared_org_ids_replaces_the_undocumented_endpoint(fake, run):
    other = list(ORGANIZATIONS)[2]
    assert run(SHARED_ORG_IDS=f" {other.upper()} , {PRIMARY},").code == 0
    assert not fake.requests("GET", contains="shares-for")
    assert json.loads(fake.requests("POST")[0].body)["shared_org_ids"] == [PRIMARY, other]


# --- Answers other than the right one ---

HTML = Answer(b"<html><body>Log in</body></html>", headers={"Content-Type": "text/html"})
DROP = Answer(drop=True)
LIMITED = problem(429, "Rate limit exceeded.", **{"Retry-After": "7"})
REDIRECT = Answer(status=302, headers={"Location": "https://elsewhere.example/"})
ADMIN = "Use the token of an organization admin"
SHAPES = [[], [1], None, "x", 7, True, {}, {"message": {"a": [1]}}, {"login": None}]


def case(id: str, code: int, message: str, kind: str, *answers: Answer):
    return pytest.param(kind, answers, code, message, id=f"{kind} {id}")


@pytest.mark.parametrize(
    "kind, answers, code, message",
    [
        case("401", 1, "401: No. CIRCLE_TOKEN in .* is invalid or exp", "me", problem(401, "No.")),
        case("403", 1, f"failed with 403: No. {ADMIN}", "me", problem(403, "No.")),
        case("redirect", 1, "failed with 302", "me", REDIRECT),
        case("HTML", 1, "unexpected data. Check for a proxy or login", "me", *always(HTML)),
        case("500", 75, "failed with 500: Oops. Run the", "me", *always(problem(500, "Oops."))),
        case("408", 75, "failed with 408: Slow. Run the", "me", *always(problem(408, "Slow."))),
        case("999", 0, "failed with 999: Oops. Retrying", "me", problem(999, "Oops.")),
        case("dropped", 75, "failed: connection lost", "me", *always(DROP)),
        case("429 three times", 0, "Retrying in 7 s", "me", *[LIMITED] * 3),
        case("failures", 0, "408: ", "me", problem(503, "?"), DROP, HTML, problem(408, "?")),
        case("403", 1, f"403: No. {ADMIN}.*SHARED_ORG_IDS", "shares", problem(403, "No.")),
        case("404", 1, "failed with 404: No.*SHARED_ORG_IDS", "shares", problem(404, "No.")),
        case("redirect", 1, "failed with 302.*SHARED_ORG_IDS", "shares", REDIRECT),
        case("HTML", 1, "returned unexpected data.*SHARED_ORG_IDS", "shares", *always(HTML)),
        case("500", 75, "500: Oops.*SHARED_ORG_IDS", "shares", *always(problem(500, "Oops."))),
        case("dropped once", 0, "connection lost", "shares", DROP),
        case("400", 1, "400: No. Use at most 32 days", "POST", problem(400, "No.")),
        case("403", 1, f"failed with 403: No. {ADMIN}", "POST", problem(403, "No.")),
        case("404", 1, "404: No. Check PRIMARY_ORG_ID. The owner", "POST", problem(404, "No.")),
        case("redirect", 1, "failed with 302", "POST", REDIRECT),
        case("429", 0, "Retrying in 16 s", "POST", LIMITED),
        case("401", 1, "401: No. CIRCLE_TOKEN.*The export is kept", "GET", problem(401, "No.")),
        case("redirect", 1, "failed with 302.*The export is kept", "GET", REDIRECT),
        case("failures", 0, "unexpected data.*Retrying", "GET", HTML, in_json({"state": 3}), DROP),
        case("404 of a new job", 0, "failed with 404: No", "GET", *[problem(404, "No.")] * 3),
        case("429", 0, r"429.* 10 min\b", "GET", problem(429, "No.", **{"Retry-After": "600"})),
        case("500", 75, "500: Oops.*The export is kept", "GET", *always(problem(500, "Oops."))),
        case("dropped", 75, "connection lost.*The export is kept", "GET", *always(DROP)),
        case("HTML", 1, "returned unexpected data.*The export is kept", "GET", *always(HTML)),
    ],
)  # fmt: skip
def test_an_error_response_is_retried_or_explained(fake, run, output, kind, answers, code, message):
    """A failed run says why in one line. A failed poll keeps the export, and nothing else does."""
    fake.plan(kind, *answers)
    result = run()
    assert result.code == code, result.err
    assert re.search(message, result.last_line if code else result.err), result.err
    assert "Traceback" not in result.err and (result.out != "") == (code == 0)
    assert len(fake.jobs) == (1 if kind == "GET" or code == 0 else 0)
    if kind == "GET" and code:
        fake.planned.clear()
        assert run().code == 0
    assert len(fake.jobs) <= 1 and leftovers(output) == []


def test_a_404_after_other_failures_does_not_cost_a_second_export(fake, run):
    fake.plan("GET", *[problem(500, "Oops.")] * 5, problem(404, "No."))
    result = run()
    assert result.code == 1 and "The export is kept" in result.last_line
    assert run().code == 0 and len(fake.jobs) == 1


def test_pauses_between_retries_grow(fake, run):
    fake.plan("me", *always(problem(503, "Later.")))
    run()
    times = [seen.at for seen in fake.requests("GET", contains="/me")]
    assert [round(later - at) for at, later in zip(times, times[1:])] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("content", SHAPES, ids=json.dumps)
@pytest.mark.parametrize("kind", ["me", "POST", "GET"])
def test_json_of_the_wrong_shape_fails_without_a_traceback(fake, run, output, kind, content):
    fake.plan(kind, *always(in_json(content)))
    result = run()
    assert result.code == 1 and "Traceback" not in result.err, result.err
    assert "Unexpected" not in result.last_line and len(fake.requests("POST")) <= 2
    assert (leftovers(output) != []) == (kind == "GET")


@pytest.mark.parametrize("shared", ["", PRIMARY], ids=["", "with SHARED_ORG_IDS"])
def test_a_404_names_only_the_settings_that_were_used(fake, run, shared):
    fake.plan("POST", problem(404, "Organization does not exist."))
    last = run(SHARED_ORG_IDS=shared).last_line
    assert "PRIMARY_ORG_ID" in last and "--job-id" not in last
    assert ("SHARED_ORG_IDS" in last) == bool(shared)


# --- A POST whose outcome is unknown ---

UNKNOWN = "CircleCI may have started an export"


def after_effect(status: int) -> Answer:
    """The export starts, but the answer is an error."""
    return Answer(b"upstream error", status, replaced=True)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Answer(drop=True, replaced=True), id="connection lost"),
        *(pytest.param(after_effect(status), id=f"{status}") for status in (500, 502, 503, 504)),
        pytest.param(in_json({}, 201), id="no ID"),
        pytest.param(in_json({"usage_export_job_id": 7}, 201), id="a number as the ID"),
        pytest.param(in_json({"usage_export_job_id": "../x"}, 201), id="a path as the ID"),
        pytest.param(in_json([], 201), id="a list"),
        pytest.param(Answer(b"", 204, replaced=True), id="204"),
        pytest.param(
            Answer(
                b"not gzip", 201, headers={"Content-Encoding": "gzip, getaddrinfo"}, replaced=True
            ),
            id="an encoding that reads like a network error",
        ),
        pytest.param(HTML, id="HTML"),
        pytest.param(Answer(b'{"usage_export_job_id": "', 201), id="JSON that is cut off"),
        pytest.param(Answer(b"{}", 201, cut=1), id="a body that is cut off"),
    ],
)
def test_a_post_with_an_unknown_outcome_is_sent_twice_at_most(fake, run, output, answer):
    fake.plan("POST", *always(answer))
    result = run()
    assert result.code == 1 and len(fake.requests("POST")) == 2, result.err
    assert UNKNOWN in result.last_line
    assert leftovers(output) == []


@pytest.mark.parametrize(
    "answer", [Answer(drop=True, replaced=True), after_effect(502), in_json({}, 201)]
)
def test_a_post_with_an_unknown_outcome_may_work_the_second_time(fake, run, output, answer):
    fake.plan("POST", answer)
    assert run().code == 0 and len(fake.requests("POST")) == 2
    assert leftovers(output) == []


def test_a_refusal_after_an_unknown_outcome_warns_of_a_second_export(fake, run):
    fake.plan("POST", after_effect(502), problem(400, "No."))
    result = run()
    assert result.code == 1 and UNKNOWN in result.last_line


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"getaddrinfo\r\n\r\n", id="as a status line"),
        pytest.param(
            b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\ngetaddrinfo\r\n",
            id="as a chunk size",
        ),
    ],
)
def test_after_a_response_that_reads_like_a_network_error_the_post_counts_as_sent(
    fake, run, monkeypatch, answer
):
    posts = []

    def do_post(handler: ApiHandler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        posts.append(handler.path)
        handler.wfile.write(answer)
        handler.close_connection = True

    monkeypatch.setattr(ApiHandler, "do_POST", do_post)
    result = run()
    assert len(posts) == 2 and result.code == 1 and UNKNOWN in result.last_line


def test_a_post_that_times_out_is_sent_once_more(fake, run, monkeypatch):
    monkeypatch.setattr(usage_report, "TIMEOUTS", (1, 0.1))
    fake.post_seconds = 0.3
    result = run()
    assert result.code == 1 and "the response timed out" in result.last_line
    assert UNKNOWN in result.last_line and len(fake.requests("POST")) == 2


def test_a_rate_limit_after_a_lost_response_does_not_add_an_export(fake, run):
    fake.plan("POST", Answer(drop=True, replaced=True), LIMITED, *always(after_effect(502)))
    result = run()
    assert result.code == 1 and UNKNOWN in result.last_line
    assert len(fake.jobs) == 2, "the 429 starts none"


# --- No connection ---


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """serve(*blocks, pause=0) answers each connection with these bytes, whatever they are, then
    closes it. Returns the server's address."""
    sockets = []

    def serve(*blocks: bytes, pause: float = 0) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        sockets.append(server)

        def answer(connection: socket.socket) -> None:
            with connection:
                connection.recv(1 << 16)
                try:
                    for block in blocks:
                        connection.sendall(block)
                        if pause:
                            REAL_SLEEP(pause)
                except OSError:
                    pass

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield serve
    for server in sockets:
        server.close()


@pytest.fixture
def network(fake, serve, monkeypatch, tmp_path) -> Iterator[Callable[[str], str]]:
    """network(problem) returns the address of a CircleCI that cannot be reached because of it."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(usage_report, "TIMEOUTS", (0.05, 0.05))
    sockets: list[socket.socket] = []

    def closed_port() -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return f"http://127.0.0.1:{server.getsockname()[1]}"

    def network(problem: str) -> str:
        if problem == "host not found":
            resolve = socket.getaddrinfo

            def fail(host: str, *arguments: object, **options: object) -> object:
                if host.endswith(".invalid"):
                    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
                return resolve(host, *arguments, **options)

            monkeypatch.setattr(socket, "getaddrinfo", fail)
        elif problem == "port closed":
            return closed_port()
        elif problem == "proxy not running":
            monkeypatch.setenv("HTTPS_PROXY", closed_port())
        elif problem == "proxy refuses":
            refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
            monkeypatch.setenv("HTTPS_PROXY", serve(refusal))
        elif problem == "SOCKS":
            monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:9")
        elif problem == "CA bundle missing":
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
        elif problem == "certificate":
            return serve_tls(tmp_path)
        elif problem == "connecting times out":
            server = socket.create_server(("127.0.0.1", 0), backlog=0)
            waiting = [socket.socket() for _ in range(3)]  # They fill the backlog.
            for client in waiting:
                client.setblocking(False)
                client.connect_ex(server.getsockname())
            sockets.extend([server, *waiting])
            return f"http://127.0.0.1:{server.getsockname()[1]}"
        elif problem == "no answer":
            return serve(b"", b"", pause=0.1)
        elif problem == "connection lost":
            return serve()
        return "https://circleci.invalid"

    yield network
    for each in sockets:
        each.close()


def serve_tls(folder: Path) -> str:
    """Start a server with a self-signed certificate. Returns its URL."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    command += f" -subj /CN=localhost -keyout {key} -out {certificate}"
    try:
        subprocess.run(command.split(), check=True, capture_output=True)
    except OSError:
        pytest.skip("needs openssl")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            connection, _ = server.accept()
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

    threading.Thread(target=accept, daemon=True).start()
    return f"https://127.0.0.1:{server.getsockname()[1]}"


NETWORK = [
    ("host not found", False, "host not found. Check the network"),
    ("port closed", False, "the port is closed. Check CIRCLECI_BASE_URL"),
    ("proxy not running", False, "cannot use the proxy. Check HTTPS_PROXY"),
    ("proxy refuses", False, "cannot use the proxy. Check HTTPS_PROXY"),
    ("SOCKS", False, "SOCKS support is missing. Set HTTPS_PROXY to an http:// proxy"),
    ("CA bundle missing", False, "CA bundle not found. Check REQUESTS_CA_BUNDLE"),
    ("certificate", False, "untrusted certificate. Behind a proxy, set REQUESTS_CA_BUNDLE"),
    pytest.param(
        *("connecting times out", False, "connecting timed out. Check the network"), marks=LINUX
    ),
    ("no answer", True, "the response timed out"),
    ("connection lost", True, "connection lost"),
]


@pytest.mark.parametrize("problem, sent, message", NETWORK)
def test_a_connection_failure_names_its_cause(run, network, output, problem, sent, message):
    url = network(problem)
    result = run(CIRCLECI_BASE_URL=url)
    assert result.code == 75
    assert f"GET {url}/api/v2/me failed: {message}" in result.last_line
    assert result.last_line.endswith("Run the same command again.")
    assert result.err.count("Retrying.") == 5 and leftovers(output) == []


@pytest.fixture
def divert_posts(monkeypatch) -> Callable[..., list[str]]:
    """divert_posts(url, times) diverts the first POSTs to `url` and returns the targets of all."""

    def divert_posts(url: str, times: int = 30) -> list[str]:
        send, sent = usage_report.send, []

        def send_elsewhere(target: str, token: str = "", body: object = None) -> object:
            if body:
                sent.append(target)
                if len(sent) <= times:
                    target = url + target[target.index("/api/") :]
            return send(target, token, body)

        monkeypatch.setattr(usage_report, "send", send_elsewhere)
        return sent

    return divert_posts


POOL = urllib3.HTTPSConnectionPool("circleci.com")


def behind_proxy(cause: Exception) -> requests.exceptions.ProxyError:
    """As requests raises it, even if the connection through the proxy was lost after the POST."""
    reason = urllib3.exceptions.ProxyError("Unable to connect to proxy", cause)
    return requests.exceptions.ProxyError(urllib3.exceptions.MaxRetryError(POOL, "/", reason))


@pytest.mark.parametrize(
    "error, sent",
    [
        pytest.param(behind_proxy(RemoteDisconnected("no response")), True, id="lost, proxy"),
        pytest.param(behind_proxy(ConnectionResetError(104, "reset")), True, id="reset, proxy"),
        pytest.param(behind_proxy(OSError("Tunnel connection failed: 403")), False, id="no tunnel"),
        pytest.param(
            requests.ConnectionError(
                urllib3.exceptions.ProtocolError("Connection aborted.", BadStatusLine("refused"))
            ),
            True,
            id="a response that is not HTTP",
        ),
        pytest.param(
            requests.exceptions.SSLError("SOCKSHTTPSConnectionPool(host='certificate.io'): EOF"),
            True,
            id="a TLS connection that ends behind a SOCKS proxy",
        ),
        pytest.param(
            requests.ConnectionError("SOCKSHTTPSConnectionPool(...): Read timed out."),
            True,
            id="a timeout behind a SOCKS proxy",
        ),
        pytest.param(
            requests.ConnectionError(
                urllib3.exceptions.NewConnectionError(POOL, "[Errno 101] Network is unreachable")
            ),
            False,
            id="network unreachable",
        ),
    ],
)
def test_a_request_counts_as_sent_unless_there_was_no_connection(error, sent):
    def fail() -> None:
        raise error

    with pytest.raises(usage_report.RetryableError) as raised:
        usage_report.with_timeout("POST", 60, fail)
    assert raised.value.sent is sent


@pytest.mark.parametrize("problem, sent, message", NETWORK)
def test_a_failed_post_is_retried_once_and_exits_with_1_if_it_may_have_been_sent(
    run, network, divert_posts, output, problem, sent, message
):
    attempts = divert_posts(network(problem))
    result = run()
    assert message in result.last_line
    assert result.code == (1 if sent else 75) and len(attempts) == 2
    assert (UNKNOWN in result.last_line) == sent and leftovers(output) == []


def test_a_post_that_connects_on_the_second_try_is_sent_once(fake, run, network, divert_posts):
    attempts = divert_posts(network("port closed"), times=1)
    assert run().code == 0
    assert len(attempts) == 2 and len(fake.requests("POST")) == 1


# --- Endless and hostile responses ---


def answer_of(content: bytes, **headers: str) -> Answer:
    return Answer(content, headers=headers)


ENDLESS = Answer(b" " * (1 << 16), length=False, endless=True)
BOMB = Answer(usage_report.gzip.compress(bytes(30_000_000)), headers={"Content-Encoding": "gzip"})
HOSTILE = [
    pytest.param(ENDLESS, 75, "the response is too large", id="endless"),
    pytest.param(BOMB, 75, "the response is too large", id="a gzip bomb"),
    pytest.param(Answer(b" " * 99, pause=0.03, write_size=1), 75, "timed out", id="bytewise"),
    pytest.param(Answer(b"[" * 100_000), 1, "unexpected data", id="100,000 levels, open"),
    pytest.param(Answer(b"[" * 10**5 + b"]" * 10**5), 1, "unexpected data", id="100,000 levels"),
    pytest.param(Answer(b'{"a":' * 10**5 + b"}" * 10**5), 1, "unexpected data", id="100,000 dicts"),
    pytest.param(Answer(b"1" * 100_000), 1, "unexpected data", id="a number of 100,000 digits"),
    pytest.param(Answer(b'{"login": "\xff"}'), 1, "unexpected data", id="not UTF-8"),
    pytest.param(Answer(b""), 1, "unexpected data", id="nothing"),
    pytest.param(answer_of(b"{}", **{"Content-Encoding": "gzip"}), 75, "failed: ", id="not gzip"),
    pytest.param(problem(400, "x" * 1_000_000), 1, "failed with 400: xxx", id="a message of 1 MB"),
    pytest.param(problem(400, "a\nb\x1b[31m\r\x00\u202e"), 1, "400: a b?", id="control characters"),
    pytest.param(in_json({"message": ["a"]}, 400), 1, "400", id="a list as the message"),
    *(
        pytest.param(Answer(b"", 302, {"Location": to}), 1, "with 302", id=f"302 to {to[:20]}")
        for to in ("http://[", "//", "https://a..b:99999/", "http://\u00e9\x7f", "x:" * 9999)
    ),
    *(
        pytest.param(
            problem(429, "Slow.", **{"Retry-After": "9" * digits}), 75, message,
            id=f"Retry-After of {digits} digits",
        )
        for digits, message in ((12, "429"), (60_000, "429"), (99_999, "connection lost"))
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["me", "GET"])
@pytest.mark.parametrize("answer, code, message", HOSTILE)
def test_whatever_the_api_answers_the_run_ends_with_one_line(
    fake, run, monkeypatch, kind, answer, code, message
):
    monkeypatch.setattr(usage_report, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(usage_report, "ANSWER_BYTES", 2_000_000)
    monkeypatch.setattr(usage_report, "RETRY_PAUSES", (1,))
    fake.plan(kind, *always(answer))
    started = REAL_TIME()
    result = run()
    assert REAL_TIME() - started < 5
    assert result.code == code
    shown = result.err if message == "429" else result.last_line
    assert message in shown and "Unexpected" not in result.last_line
    assert max(map(len, result.err.splitlines())) < 900
    assert "Traceback" not in result.err and "\x1b" not in result.err


OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = OK + b"Content-Length: "
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "blocks, pause, message",
    [
        pytest.param([OK] + [b"a: b\r\n"] * 999, 0, "failed: ", id="999 headers"),
        pytest.param([OK + b"a" * 99_999], 0, "failed: ", id="a long header"),
        pytest.param([OK, *[b"a"] * 40], 0.02, "timed out", id="a bytewise header"),
        pytest.param(
            [b"HTTP/1.1 100 \r\n\r\n"] * 40, 0.02, "timed out", id="100 Continue over and over"
        ),
        pytest.param([b"HTTP/1.1 999999 \r\n\r\n"], 0, "failed: ", id="status 999999"),
        pytest.param([b"SSH-2.0-OpenSSH\r\n"], 0, "failed: ", id="SSH"),
        pytest.param([b"\x16\x03\x01\x00\xff" * 99], 0, "failed: ", id="TLS"),
        pytest.param([LENGTH + b"-1\r\n\r\n{}"], 0, "unexpected data", id="length -1"),
        pytest.param([LENGTH + b"9, 8\r\n\r\n{}"], 0, "failed: ", id="two lengths"),
        pytest.param([CHUNKED + b"zz\r\n"], 0, "failed: ", id="a broken chunk"),
        pytest.param([CHUNKED + b"f" * 99_999], 0, "failed: ", id="an endless chunk size"),
    ],
)
def test_a_malformed_http_response_is_an_error_without_a_crash(
    run, serve, monkeypatch, blocks, pause, message
):
    monkeypatch.setattr(usage_report, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(usage_report, "RETRY_PAUSES", (1,))
    result = run(CIRCLECI_BASE_URL=serve(*blocks, pause=pause))
    assert message in result.last_line and "Unexpected" not in result.last_line
    assert result.code == (1 if message == "unexpected data" else 75)


def test_a_read_timeout_in_the_body_exits_with_75(fake, run, monkeypatch):
    monkeypatch.setattr(usage_report, "TIMEOUTS", (1, 0.05))
    monkeypatch.setattr(usage_report, "RETRY_PAUSES", (1,))
    fake.plan("me", *always(Answer(b"x" * 9, write_size=1, pause=0.1)))
    result = run()
    assert result.code == 75
    url = f"{fake.url}/api/v2/me"
    assert f"GET {url} failed: the response timed out" in result.last_line


@pytest.mark.parametrize(
    "header", ["-5", "soon", "1.5", "", "Thu, 99 Foo 2026 99:99:99 GMT", "\u0665"]
)
def test_a_429_without_a_valid_retry_after_waits_6_minutes(fake, run, header):
    fake.plan("me", problem(429, "Slow.", **{"Retry-After": header.encode().decode("latin-1")}))
    result = run("--dry-run")
    assert result.code == 0 and "Retrying in 6 min" in result.err


# --- States of the job ---


@pytest.mark.parametrize("state", ["created", "processing", "pondering"])
def test_the_run_waits_for_a_job_that_is_not_ready(fake, run, state):
    fake.odd_states = [state]
    result = run()
    assert result.code == 0 and f"Export: {state} (15 s)" in result.err
    assert ("unknown state: pondering. Waiting." in result.err) == (state == "pondering")


@pytest.mark.parametrize(
    "empty, code, gets",
    [(1, 0, 2), (2, 0, 3), (3, 3, 3)],
    ids=["late links", "links in the third response", "no usage"],
)
def test_links_may_come_with_the_third_completed_response_at_the_latest(
    fake, run, output, empty, code, gets
):
    fake.job_seconds, fake.empty_answers = 1, empty
    result = run()
    assert result.code == code and len(fake.requests("GET")) == gets
    assert ("The export has no files: no usage in this window." in result.err) == (code == 3)
    assert leftovers(output) == []


def test_a_failed_job_shows_its_reason_and_is_forgotten(fake, run, output):
    fake.job_fails = "result set over 100 MB"
    result = run()
    assert result.code == 1 and leftovers(output) == []
    assert "The export failed: result set over 100 MB. Try a shorter window" in result.last_line
    assert "kept" not in result.last_line
    assert "SHARED_ORG_IDS" in result.last_line
    fake.job_fails = ""
    assert run().code == 0 and len(fake.requests("POST")) == 2


def test_an_export_that_takes_too_long_is_kept(fake, run, clock):
    fake.job_seconds = 1e9
    started = clock.now
    result = run()
    assert result.code == 75
    assert 4 * 3600 <= clock.now - started <= 4.5 * 3600
    assert "is not finished (state: created). The export is kept" in result.last_line
    assert "same command" in result.last_line
    fake.job_seconds = 1
    clock.sleep(3600)
    assert run().code == 0 and len(fake.jobs) == 1


# --- What goes where ---


def test_the_token_follows_no_redirect(fake, run):
    """requests would send a header such as Circle-Token to another host, too."""
    with closing(FakeCircleCI(fake.clock)) as other:
        for kind in ("me", "shares", "POST", "GET"):
            fake.plan(kind, Answer(status=307, headers={"Location": f"{other.url}/api/v2/me"}))
            assert run().code == 1
        assert other.seen == []


@pytest.mark.parametrize("url", ["https://circleci.com/api/v2/me", "http://127.0.0.1/api/v2/me"])
def test_netrc_is_not_read(tmp_path, monkeypatch, url):
    """requests would add Authorization from ~/.netrc. The request is caught before it is sent."""
    (tmp_path / ".netrc").write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    sent = []

    def catch(adapter, request, **options):
        sent.append(request.headers)
        raise requests.ConnectionError

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", catch)
    for token in ("", "abc"):
        with pytest.raises(requests.ConnectionError):
            usage_report.send(url, token)
    assert ["Circle-Token" in headers for headers in sent] == [False, True]
    assert not any("Authorization" in headers for headers in sent)


def test_without_tls_no_proxy_sees_the_token(fake, run, monkeypatch):
    with closing(FakeCircleCI(fake.clock)) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert run("--dry-run").code == 0
        assert proxy.seen == []


def test_cookies_are_not_kept(fake, run):
    cookie = {"Set-Cookie": "session=1; Path=/"}
    fake.plan("me", in_json({"login": "pat", "name": "Pat"}, 200, **cookie))
    assert run().code == 0
    assert not [seen for seen in fake.seen if "Cookie" in seen.headers]


# --- Anything unforeseen ---


@pytest.mark.parametrize(
    "flags", [[], ["--verbose"], ["--quiet"]], ids=["default", "verbose", "quiet"]
)
@pytest.mark.parametrize("moment", ["find_organizations", "merge_parts"])
def test_an_unexpected_exception_shows_a_traceback_only_with_verbose(
    fake, run, output, monkeypatch, flags, moment
):
    def fail(*arguments: object) -> None:
        raise RuntimeError(f"boom\n{TOKEN}\x1b[31m")

    with monkeypatch.context() as patch:
        patch.setattr(usage_report, moment, fail)
        result = run(*flags)
    assert result.code == 1 and result.out == ""
    assert "Unexpected error: RuntimeError('boom" in result.last_line
    assert ("Traceback" in result.err) == ("--verbose" in flags)
    assert TOKEN not in result.err and "\x1b" not in result.err
    if "--quiet" in flags:
        assert result.err.count("\n") == 1
    kept = "The export is kept" in result.last_line
    assert kept == (moment == "merge_parts") == bool(leftovers(output))
    assert run().code == 0 and len(fake.jobs) == 1


# --- As people run it: a process ---


def test_only_the_path_is_on_stdout(fast, fast_fake, output):
    """So that csv=$(...) works."""
    result = fast.run(fast_fake, "--output-dir", output)
    assert result.code == 0, result.err
    assert result.report.read_bytes() == fast_fake.report()
    assert result.out == f"{result.report}\n"
    assert "Traceback" not in result.err


def test_quiet_prints_only_the_path_unless_the_run_fails(fast, fast_fake, output):
    result = fast.run(fast_fake, "--quiet", "--output-dir", output)
    assert (result.code, result.err) == (0, "") and result.report.exists()
    failed = fast.run(fast_fake, "--quiet", "--output-dir", output, CIRCLE_TOKEN="wrong")
    assert failed.code == 1 and "401" in failed.err and failed.err.count("\n") == 1


def shell(redirection: str) -> tuple[str, ...]:
    return ("sh", "-c", f'exec "$@" {redirection}', "sh")


@POSIX
@pytest.mark.parametrize(
    "redirection",
    [
        pytest.param("2>&-", id="stderr closed"),
        pytest.param("2>/dev/full", id="stderr full", marks=LINUX),
        pytest.param("1>&-", id="stdout closed"),
        pytest.param("0<&- 1>&- 2>&-", id="all closed"),
    ],
)
def test_closed_or_full_streams_are_no_reason_to_fail(fast, fast_fake, output, redirection):
    result = fast.run(fast_fake, "--verbose", "--output-dir", output, prefix=shell(redirection))
    (report,) = output.iterdir()
    assert result.code == 0 and report.read_bytes() == fast_fake.report()
    assert result.out == ("" if "1>" in redirection else f"{report}\n")


@LINUX
def test_a_path_that_cannot_be_printed_costs_no_second_export(fast, fast_fake, output):
    """The next run prints the path of the same report."""
    first = fast.run(fast_fake, "--output-dir", output, prefix=shell("1>/dev/full"))
    assert first.code == 75 and "same command" in first.last_line
    result = fast.run(fast_fake, "--output-dir", output)
    assert result.code == 0 and [*output.iterdir()] == [result.report]
    assert len(fast_fake.jobs) == 1 and result.report.read_bytes() == fast_fake.report()


@pytest.mark.parametrize(
    "name, variables",
    [
        pytest.param("\u0141ukasz", {"PYTHONIOENCODING": "cp1252"}, id="not in stdout's encoding"),
        pytest.param(os.fsdecode(b"r\xe9ports"), {}, id="not UTF-8", marks=LINUX),
    ],
)
def test_the_path_is_printed_as_its_bytes(fast, fast_fake, tmp_path, name, variables):
    result = fast.run(fast_fake, "--output-dir", tmp_path / name, **variables)
    (report,) = (tmp_path / name).iterdir()
    assert result.code == 0 and result.out == f"{report}\n" and "Traceback" not in result.err


@POSIX
@pytest.mark.parametrize(
    "module, name, code",
    [
        ("shlex", "SIGINT", 130),
        ("argparse", "SIGINT", 130),
        ("requests", "SIGINT", 130),
        ("dotenv", "SIGTERM", 143),
        ("dotenv", "SIGHUP", 129),
    ],
)
def test_a_signal_during_the_imports_exits_without_a_message(
    fast, fast_fake, tmp_path, module, name, code
):
    """A module of this name sends the signal while being imported."""
    text = f"import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(9)\n"
    (tmp_path / f"{module}.py").write_text(text)
    result = fast.run(fast_fake, PYTHONPATH=str(tmp_path))
    assert (result.code, result.out, result.err) == (code, "", "")


def setup_command(text: str) -> str:
    """The suggested command without what needs the internet."""
    command = text.strip().partition("Run: ")[2]
    assert command.endswith(".venv/bin/pip install -q -r requirements.txt"), text
    return command.partition(" && ")[0]


def test_a_missing_package_is_one_line_with_the_setup_command(tmp_path):
    """Python finds no packages with -S. The folder's name has spaces and a quote."""
    script = tmp_path / "Pat's own folder" / "usage_report.py"
    script.parent.mkdir()
    script.write_bytes((PROJECT / "usage_report.py").read_bytes())
    command = [sys.executable, "-S", "-E", script]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert child.returncode == 1 and child.stdout == "" and child.stderr.count("\n") == 1
    assert child.stderr.startswith("No module named ")
    where = subprocess.run(
        setup_command(child.stderr) + " && pwd", shell=True, capture_output=True, text=True
    )
    assert Path(where.stdout.strip()) == script.parent.resolve()


@pytest.mark.parametrize("version", ["3.6", "3.7", "3.8"])
def test_an_old_python_says_which_one_is_needed(version):
    """Before 3.7, the line of the syntax error itself says so."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    pythons = sorted(root.glob(f"{version}.*/bin/python"))
    if not pythons:
        pytest.skip(f"Python {version} is not installed")
    command = [pythons[0], PROJECT / "usage_report.py", "--help"]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 1 and child.stdout == ""
    assert "usage_report.py needs Python 3.9 or newer." in child.stderr
    assert "Traceback" not in child.stderr
    if version in ("3.7", "3.8"):
        assert child.stderr.count("\n") == 1 and setup_command(child.stderr)
