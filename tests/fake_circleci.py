"""A CircleCI on loopback that keeps the real one's limits: an API, and a file store for the signed links.

Two ports, threads, standard library only. The API checks the token, the body of the POST and UUIDs,
lets a job's state change over time and grants 10 POSTs and 10 GETs an hour per organization. The store
takes a link only with its signature and before it expires, and refuses a request that carries
credentials. A test plans trouble with `plan` (API) and with the answers of a part (store).
"""

from __future__ import annotations

import gzip
import json
import random
import re
import threading
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable
from urllib.parse import parse_qs, urlsplit

TOKEN = "CCIPAT_FakeTokenOfTheTests_0123456789abcdef"
PRIMARY = "b9291e0d-a11e-41fb-8517-c545388b5953"
ORGANIZATIONS = {
    PRIMARY: "Acme",
    "8d05d166-e199-43b1-b588-415eadafacc1": "Acme Research, Inc.",
    "a7124dea-d941-4c1f-b5cd-f8346ec17f59": "acme-labs",
}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

# The columns of a real export, in its order.
COLUMNS = (
    "ORGANIZATION_ID ORGANIZATION_NAME ORGANIZATION_CREATED_DATE PROJECT_ID PROJECT_NAME "
    "PROJECT_CREATED_DATE LAST_BUILD_FINISHED_AT VCS_NAME VCS_URL VCS_BRANCH PIPELINE_ID "
    "PIPELINE_CREATED_AT PIPELINE_NUMBER IS_UNREGISTERED_USER PIPELINE_TRIGGER_SOURCE "
    "PIPELINE_TRIGGER_USER_ID WORKFLOW_ID WORKFLOW_NAME WORKFLOW_FIRST_JOB_QUEUED_AT "
    "WORKFLOW_FIRST_JOB_STARTED_AT WORKFLOW_STOPPED_AT IS_WORKFLOW_SUCCESSFUL JOB_NAME JOB_RUN_NUMBER "
    "JOB_ID JOB_RUN_DATE JOB_RUN_QUEUED_AT JOB_RUN_STARTED_AT JOB_RUN_STOPPED_AT JOB_BUILD_STATUS "
    "RESOURCE_CLASS OPERATING_SYSTEM EXECUTOR PARALLELISM JOB_RUN_SECONDS MEDIAN_CPU_UTILIZATION_PCT "
    "MAX_CPU_UTILIZATION_PCT MEDIAN_RAM_UTILIZATION_PCT MAX_RAM_UTILIZATION_PCT COMPUTE_CREDITS "
    "DLC_CREDITS USER_CREDITS STORAGE_CREDITS NETWORK_CREDITS LEASE_CREDITS LEASE_OVERAGE_CREDITS "
    "IPRANGES_CREDITS TOTAL_CREDITS"
).split()
HEADER = ",".join(COLUMNS).encode() + b"\n"
NO_VALUE = r"\\N"  # as the real export has it: two backslashes and N


def make_rows(
    count: int, organization: str = PRIMARY, name: str = "Acme", since: datetime = datetime(2026, 10, 1)
) -> list[bytes]:
    """Job runs of the four weeks since a day, in the real file's columns and escapes; believable, and the same
    whenever they are made."""
    dice = random.Random(organization)
    project = str(uuid.UUID(int=dice.getrandbits(128)))
    rows = []
    for number in range(count):
        at = since + timedelta(seconds=dice.randrange(28 * 86400))
        seconds = int(dice.lognormvariate(5, 1)) + 1
        repository = dice.choice(["api", "web", "worker", "docs"])
        size, rate = dice.choice([("small", 5), ("medium", 10), ("large", 20), ("xlarge", 40)])
        compute = seconds * rate // 60 + 1
        storage = dice.choice([0, 0, 0, 24])
        cpu = sorted(dice.randrange(100) for _ in range(2)) if seconds > 15 else [NO_VALUE] * 2
        values = {
            "ORGANIZATION_ID": organization,
            "ORGANIZATION_NAME": name.replace(",", "\\,"),
            "ORGANIZATION_CREATED_DATE": "2020-04-03",
            "PROJECT_ID": project,
            "PROJECT_NAME": repository,
            "PROJECT_CREATED_DATE": "2021-02-01",
            "VCS_NAME": "github",
            "VCS_URL": f"https://github.com/acme/{repository}",
            "VCS_BRANCH": dice.choice(["main", "fix/login", "gr\u00fcn", "rocket-\U0001f680", "a\\,b"]),
            "PIPELINE_ID": str(uuid.UUID(int=dice.getrandbits(128))),
            "PIPELINE_CREATED_AT": f"{at:%Y-%m-%d %H:%M:%S}.761",
            "PIPELINE_NUMBER": 60000 + number,
            "IS_UNREGISTERED_USER": "false",
            "PIPELINE_TRIGGER_SOURCE": dice.choice(["webhook", "scheduled_pipeline", "api"]),
            "WORKFLOW_ID": str(uuid.UUID(int=dice.getrandbits(128))),
            "WORKFLOW_NAME": "build-and-test",
            "IS_WORKFLOW_SUCCESSFUL": "true",
            "JOB_NAME": dice.choice(["lint", "unit", "integration", "deploy"]),
            "JOB_RUN_NUMBER": 3000000 + number,
            "JOB_ID": str(uuid.UUID(int=dice.getrandbits(128))),
            "JOB_RUN_DATE": f"{at:%Y-%m-%d}",
            "JOB_RUN_QUEUED_AT": f"{at:%Y-%m-%d %H:%M:%S}.000",
            "JOB_RUN_STARTED_AT": f"{at + timedelta(seconds=8):%Y-%m-%d %H:%M:%S}.000",
            "JOB_RUN_STOPPED_AT": f"{at + timedelta(seconds=8 + seconds):%Y-%m-%d %H:%M:%S}.000",
            "JOB_BUILD_STATUS": dice.choice(["success", "success", "failed"]),
            "RESOURCE_CLASS": size,
            "OPERATING_SYSTEM": "linux",
            "EXECUTOR": "docker",
            "PARALLELISM": 1,
            "JOB_RUN_SECONDS": seconds,
            "MEDIAN_CPU_UTILIZATION_PCT": cpu[0],
            "MAX_CPU_UTILIZATION_PCT": cpu[1],
            "COMPUTE_CREDITS": compute,
            "STORAGE_CREDITS": storage,
            "TOTAL_CREDITS": compute + storage,
        }
        cells = (values.get(column, 0 if column.endswith("_CREDITS") else NO_VALUE) for column in COLUMNS)
        rows.append(",".join(map(str, cells)).encode() + b"\n")
    return rows


def split(rows: list[bytes], parts: int) -> list[list[bytes]]:
    """The rows in as many runs, in order."""
    edges = [len(rows) * n // parts for n in range(parts + 1)]
    return [rows[a:b] for a, b in zip(edges, edges[1:])]


@dataclass
class Answer:
    """What a server says once. For a part, the last answer of its list is said from then on."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # close the connection after so many bytes of the body
    length: bool = True  # send Content-Length
    chunked: bool = False
    bytes_a_write: int = 1 << 16
    pause: float = 0.0  # real seconds between two writes
    drop: bool = False  # no answer at all
    late: bool = False  # API: carry the request out, then drop the answer


@dataclass
class Job:
    organization: str
    body: dict[str, object]
    created_at: float
    empty_answers: int  # answers "completed" without links before those with links


@dataclass
class Seen:
    """A request as it arrived."""

    at: float
    server: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class FakeCircleCI:
    """Both servers, running from construction to `close()`. Attributes are the knobs a test turns."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or (lambda: time.time())
        self.token = TOKEN
        self.organizations = dict(ORGANIZATIONS)
        self.usage = {one: make_rows(20, one, name) for one, name in list(ORGANIZATIONS.items())[:2]}
        self.parts: list[list[Answer]] | None = None  # None: made from usage
        self.part_count = 3
        self.job_seconds = 20.0
        self.job_fails = ""  # the error_reason
        self.empty_answers = 0
        self.odd_states: list[str] = []  # said by the next GETs
        self.link_seconds = 3600.0
        self.post_seconds = 0.0  # real seconds from taking a POST on to its answer
        self.limits = {"POST": 10, "GET": 10}
        self.throttle_header = "seconds"  # or date, reset, none
        self.planned: dict[str, list[Answer]] = defaultdict(list)
        self.spent: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.jobs: dict[str, Job] = {}
        self.seen: list[Seen] = []
        self.open_requests = {"api": 0, "store": 0}
        self.most_at_once = {"api": 0, "store": 0}
        self.lock = threading.Lock()
        self.servers = [self.serve(ApiHandler), self.serve(StoreHandler)]
        self.url, self.store_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def serve(self, handler: type[Handler]) -> ThreadingHTTPServer:
        server = Server(("127.0.0.1", 0), type(handler.__name__, (handler,), {"fake": self}))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def plan(self, kind: str, *answers: Answer) -> None:
        """The next answers to me, collaborations, shares, POST or GET, ahead of the right ones."""
        self.planned[kind].extend(answers)

    def requests(self, method: str, server: str = "api", contains: str = "usage_export_job") -> list[Seen]:
        return [one for one in self.seen if (one.method, one.server) == (method, server) and contains in one.path]

    def part_answers(self, job: Job) -> list[list[Answer]]:
        if self.parts is None:
            wanted = [job.organization, *job.body.get("shared_org_ids", [])]  # type: ignore[misc]
            rows = [row for one in dict.fromkeys(wanted) for row in self.usage.get(one, [])]
            return [[Answer(gzip.compress(HEADER + b"".join(piece), 1))] for piece in split(rows, self.part_count)]
        return self.parts

    def report(self) -> bytes:
        """What the report of all organizations must be, byte for byte."""
        return HEADER + b"".join(row for rows in self.usage.values() for row in rows)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *args: object) -> None:
        """A client that hangs up is what tests are about, and no news."""


class Handler(BaseHTTPRequestHandler):
    fake: FakeCircleCI
    protocol_version = "HTTP/1.1"
    server_name = ""

    def log_message(self, *args: object) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(self.fake.clock() if timestamp is None else timestamp, usegmt=True)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.fake.lock:
            seen = Seen(self.fake.clock(), self.server_name, self.command, self.path, dict(self.headers.items()), body)
            self.fake.seen.append(seen)
            self.fake.open_requests[self.server_name] += 1
            at_once = max(self.fake.open_requests[self.server_name], self.fake.most_at_once[self.server_name])
            self.fake.most_at_once[self.server_name] = at_once
        try:
            self.say(self.answer(seen))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.fake.lock:
                self.fake.open_requests[self.server_name] -= 1

    do_POST = do_GET

    def answer(self, seen: Seen) -> Answer:
        raise NotImplementedError

    def say(self, answer: Answer) -> None:
        if answer.drop:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif answer.length and "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        whole = answer.cut is None
        if not whole or not (answer.length or answer.chunked):
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        body = answer.body[: answer.cut]
        for start in range(0, len(body), answer.bytes_a_write):
            if start and answer.pause:
                time_passes(answer.pause)
            piece = body[start : start + answer.bytes_a_write]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if answer.chunked else piece)
        if answer.chunked and whole:
            self.wfile.write(b"0\r\n\r\n")


time_passes = time.sleep  # kept from before a test stands in for it


def in_json(content: object, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(content).encode(), status, {"Content-Type": "application/json", **headers})


def problem(status: int, message: str, **headers: str) -> Answer:
    return in_json({"message": message}, status, **headers)


class ApiHandler(Handler):
    server_name = "api"

    def answer(self, seen: Seen) -> Answer:
        fake, path = self.fake, urlsplit(seen.path).path
        export = re.fullmatch(r"/api/v2/organizations/([^/]+)/usage_export_job(?:/([^/]+))?", path)
        shares = re.fullmatch(r"/private/orgs/([^/]+)/plan/shares-for", path)
        kind = seen.method if export else "shares" if shares else path.rsplit("/", 1)[-1]
        with fake.lock:
            planned = fake.planned[kind].pop(0) if fake.planned[kind] else None
            if planned and not planned.late:
                return planned
            if seen.headers.get("Circle-Token") != fake.token:
                return problem(401, "Invalid token provided.")
            if path == "/api/v2/me":
                answer = in_json({"id": str(uuid.UUID(int=7)), "login": "pat", "name": "Pat Doe", "avatar_url": None})
            elif path == "/api/v2/me/collaborations":
                rows = [{"id": i, "name": n, "slug": f"gh/{n}", "vcs-type": "github"} for i, n in fake.organizations.items()]
                answer = in_json([*rows, {"id": None, "name": "Old", "slug": "bb/old", "vcs-type": "bitbucket"}])
            elif shares:
                orgs = [{"id": i, "name": n, "vcs_type": "github"} for i, n in fake.organizations.items()]
                answer = in_json({"orgs": orgs})
            elif export and export[1] not in fake.organizations:
                answer = problem(404, "Organization does not exist.")
            elif export:
                answer = self.throttled(seen.method, export[1]) or (
                    self.create(export[1], seen.body) if seen.method == "POST" else self.status(export[2] or "")
                )
            else:
                answer = problem(404, "Not found.")
        if kind == "POST":
            time_passes(fake.post_seconds)
        return Answer(drop=True) if planned else answer

    def throttled(self, method: str, organization: str) -> Answer | None:
        now, spent = self.fake.clock(), self.fake.spent[method, organization]
        recent = [at for at in spent if at > now - 3600]
        if len(recent) < self.fake.limits[method]:
            spent.append(now)
            return None
        left = recent[-self.fake.limits[method]] + 3600 - now
        headers = {
            "seconds": {"Retry-After": str(int(left) + 1)},
            "date": {"Retry-After": formatdate(now + left + 1, usegmt=True)},
            "reset": {"X-RateLimit-Reset": str(int(left) + 1)},
            "none": {},
        }[self.fake.throttle_header]
        return problem(429, "Rate limit exceeded.", **headers)

    def create(self, organization: str, text: bytes) -> Answer:
        try:
            body = json.loads(text)
            start, end = (datetime.strptime(body[key], "%Y-%m-%dT%H:%M:%SZ") for key in ("start", "end"))
            right = set(body) <= {"start", "end", "shared_org_ids"} and start < end <= start + timedelta(days=32)
            right = right and all(MOMENT.fullmatch(body[key]) for key in ("start", "end"))
            right = right and all(UUID.fullmatch(one) for one in body.get("shared_org_ids", []))
        except (ValueError, KeyError, TypeError):
            right = False
        if not right:
            return problem(400, "Unexpected request body provided.")
        if not set(body.get("shared_org_ids", [])) <= set(self.fake.organizations):
            return problem(404, "Organization does not exist.")
        job_id = str(uuid.uuid4())
        self.fake.jobs[job_id] = Job(organization, body, self.fake.clock(), self.fake.empty_answers)
        answer = {"usage_export_job_id": job_id, "state": "created", "download_urls": None}
        return in_json({**answer, "start": body["start"], "end": body["end"]}, 201)

    def status(self, job_id: str) -> Answer:
        fake, job = self.fake, self.fake.jobs.get(job_id)
        if not job:
            return problem(404, "Usage export job does not exist.")
        elapsed = fake.clock() - job.created_at
        state = "created" if elapsed < fake.job_seconds / 10 else "processing" if elapsed < fake.job_seconds else "completed"
        state = "failed" if fake.job_fails and state == "completed" else state
        state = fake.odd_states.pop(0) if fake.odd_states else state
        answer: dict[str, object] = {"usage_export_job_id": job_id, "state": state, "download_urls": None}
        if state == "failed":
            answer["error_reason"] = fake.job_fails
        if state == "completed" and job.empty_answers:
            job.empty_answers -= 1
        elif state == "completed":
            expires = int(fake.clock() + fake.link_seconds)
            answer["download_urls"] = [
                f"{fake.store_url}/{job_id}/data_{n}.csv.gz?expires={expires}&signature={uuid.uuid4().hex}SIGNED"
                for n in range(len(fake.part_answers(job)))
            ]
        return in_json(answer)


class StoreHandler(Handler):
    server_name = "store"

    def answer(self, seen: Seen) -> Answer:
        path, query = urlsplit(seen.path).path, parse_qs(urlsplit(seen.path).query)
        match = re.fullmatch(r"/([^/]+)/data_(\d+)\.csv\.gz", path)
        with self.fake.lock:
            if {"authorization", "circle-token", "cookie"} & {name.lower() for name in seen.headers}:
                return Answer(b"<Error>Only one auth mechanism allowed</Error>", 400)
            if "signature" not in query or float(query["expires"][0]) < self.fake.clock():
                return Answer(b"<Error>Request has expired</Error>", 403)
            job = self.fake.jobs.get(match[1]) if match else None
            if not match or not job:
                return Answer(b"<Error>NoSuchKey</Error>", 404)
            answers = self.fake.part_answers(job)[int(match[2])]
            return answers.pop(0) if len(answers) > 1 else answers[0]
