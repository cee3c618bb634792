"""A fake CircleCI on loopback that keeps the real limits: an API, and a store for the signed links.

Two ports, threads, standard library only. The API checks the token, the body of the POST, and
UUIDs; changes the state of a job over time; and grants 10 POSTs and 10 GETs an hour per
organization. The store takes a link only with its signature and before it expires, and refuses a
request that carries credentials. A test plans failures with `plan` (API) and with the answers of a
part (store).
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from email.utils import formatdate
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable, Union
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
    "WORKFLOW_FIRST_JOB_STARTED_AT WORKFLOW_STOPPED_AT IS_WORKFLOW_SUCCESSFUL JOB_NAME "
    "JOB_RUN_NUMBER JOB_ID JOB_RUN_DATE JOB_RUN_QUEUED_AT JOB_RUN_STARTED_AT JOB_RUN_STOPPED_AT "
    "JOB_BUILD_STATUS RESOURCE_CLASS OPERATING_SYSTEM EXECUTOR PARALLELISM JOB_RUN_SECONDS "
    "MEDIAN_CPU_UTILIZATION_PCT MAX_CPU_UTILIZATION_PCT MEDIAN_RAM_UTILIZATION_PCT "
    "MAX_RAM_UTILIZATION_PCT COMPUTE_CREDITS DLC_CREDITS USER_CREDITS STORAGE_CREDITS "
    "NETWORK_CREDITS LEASE_CREDITS LEASE_OVERAGE_CREDITS IPRANGES_CREDITS TOTAL_CREDITS"
).split()
DIALECTS = ("bare", "quoted")  # exports through 2025, and today's
Cell = Union[str, int, float, Decimal, None]  # None: a missing value


def write_row(cells: Iterable[Cell], dialect: str = "quoted", line_end: str = "\n") -> bytes:
    """A row as CircleCI writes it in one of the dialects."""

    def write(cell: Cell) -> str:
        if dialect == "quoted":
            text = r"\N" if cell is None else str(cell).replace('"', '""')
            return f'"{text}"'
        return r"\\N" if cell is None else re.sub(r"([\\,\r\n])", r"\\\1", str(cell))

    return (",".join(map(write, cells)) + line_end).encode()


def write_table(rows: Iterable[Iterable[Cell]], dialect: str = "quoted") -> bytes:
    """A part: the header, and rows."""
    return HEADERS[dialect] + b"".join(write_row(row, dialect) for row in rows)


def as_text(rows: Iterable[Iterable[Cell]]) -> list[list[str]]:
    """The cells of a report: a missing value is empty."""
    return [["" if cell is None else str(cell) for cell in row] for row in rows]


HEADERS = {dialect: write_row(COLUMNS, dialect) for dialect in DIALECTS}


def make_runs(count: int, organization_id: str, name: str, since: datetime) -> Iterator[list[Cell]]:
    """Job runs in the four weeks from `since`, in the real file's columns: believable, and the same
    whenever they are made. A fifth of the jobs never ran."""
    dice = random.Random(organization_id)

    def moment(seconds: float) -> str:
        return f"{at + timedelta(seconds=seconds):%Y-%m-%d %H:%M:%S}.000"

    def new_id() -> str:
        return str(uuid.UUID(int=dice.getrandbits(128)))

    projects = {name: new_id() for name in ("api", "web", "worker", "docs")}
    branches = ["main", "fix/login", "gr\u00fcn", "rocket-\U0001f680", "a,b", "bot/eslint-8"]
    for number in range(count):
        if number % 2 == 0:  # Two jobs run in each pipeline.
            at = since + timedelta(seconds=dice.randrange(28 * 86400))
            project = dice.choice(list(projects))
            source = dice.choice(["webhook", "api", "schedule"])
            pipeline: dict[str, Cell] = {
                "ORGANIZATION_ID": organization_id, "ORGANIZATION_NAME": name,
                "ORGANIZATION_CREATED_DATE": "2020-04-03",
                "PROJECT_ID": projects[project], "PROJECT_NAME": project,
                "PROJECT_CREATED_DATE": "2021-02-01",
                "LAST_BUILD_FINISHED_AT": f"{since + timedelta(days=28):%Y-%m-%d %H:%M:%S}.577",
                "VCS_NAME": "github", "VCS_URL": f"https://github.com/acme/{project}",
                "VCS_BRANCH": dice.choice(branches),
                "PIPELINE_ID": new_id(), "PIPELINE_CREATED_AT": f"{at:%Y-%m-%d %H:%M:%S}.761",
                "PIPELINE_NUMBER": 60000 + number,
                "IS_UNREGISTERED_USER": "true" if source == "schedule" else "false",
                "PIPELINE_TRIGGER_SOURCE": source,
                "PIPELINE_TRIGGER_USER_ID": None if source == "schedule" else new_id(),
                "WORKFLOW_NAME": dice.choice(["build-and-test", "test-e2e-longrunning", "lint"]),
                "WORKFLOW_FIRST_JOB_QUEUED_AT": moment(1),
                "WORKFLOW_FIRST_JOB_STARTED_AT": moment(2),
                "WORKFLOW_STOPPED_AT": moment(dice.randrange(10, 3600)),
                "IS_WORKFLOW_SUCCESSFUL": "true",
            }  # fmt: skip
        ids = {"WORKFLOW_ID": new_id(), "JOB_ID": new_id()}
        run = {**pipeline, **ids, "JOB_RUN_DATE": f"{at:%Y-%m-%d}"}
        seconds = int(dice.lognormvariate(5, 1)) + 1
        size, rate = dice.choice([("small", 5), ("medium", 10), ("large", 20), ("xlarge", 40)])
        compute, storage = seconds * rate // 60 + 1, dice.choice([0, 0, 0, 24])
        if number % 5 == 4:
            run["JOB_BUILD_STATUS"], compute, storage = "canceled", 0, 0
        else:
            run.update({
                "JOB_NAME": dice.choice(["lint", "unit-tests", "integration-tests", "deploy"]),
                "JOB_RUN_NUMBER": 3000000 + number,
                "JOB_RUN_QUEUED_AT": moment(dice.randrange(3, 8)),
                "JOB_RUN_STARTED_AT": moment(8),
                "JOB_RUN_STOPPED_AT": moment(8 + seconds),
                "JOB_BUILD_STATUS": dice.choice(["success", "success", "failed"]),
                "RESOURCE_CLASS": size, "OPERATING_SYSTEM": "linux", "EXECUTOR": "docker",
                "PARALLELISM": 1, "JOB_RUN_SECONDS": seconds,
            })  # fmt: skip
            if seconds > 15:
                run.update({name: dice.randrange(100) for name in COLUMNS if name.endswith("_PCT")})
        run.update({"COMPUTE_CREDITS": compute, "STORAGE_CREDITS": storage})
        run["TOTAL_CREDITS"] = compute + storage
        yield [run.get(name, 0 if name.endswith("_CREDITS") else None) for name in COLUMNS]


@lru_cache
def make_usage() -> dict[str, list[list[Cell]]]:
    """20 job runs per organization, for the first two organizations."""
    return {
        organization_id: list(make_runs(20, organization_id, name, datetime(2026, 10, 1)))
        for organization_id, name in list(ORGANIZATIONS.items())[:2]
    }


def split(rows: list[list[Cell]], parts: int) -> list[list[list[Cell]]]:
    """The rows in `parts` slices, in order."""
    edges = [len(rows) * n // parts for n in range(parts + 1)]
    return [rows[start:end] for start, end in zip(edges, edges[1:])]


@dataclass
class Answer:
    """What a server sends once. For a part, the last answer of its list is sent from then on."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # close the connection after this many bytes of the body
    length: bool = True  # send Content-Length
    chunked: bool = False
    write_size: int = 1 << 16
    pause: float = 0.0  # real seconds between two writes
    drop: bool = False  # no answer at all
    replaced: bool = False  # API: carry out the request, then send this answer instead


@dataclass
class Job:
    organization: str
    body: dict[str, object]
    created_at: float
    empty_answers: int  # how often it is "completed" without links before there are links


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
    """Both servers, running from construction to `close()`. Tests set the attributes."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or (lambda: time.time())
        self.token = TOKEN
        self.organizations = dict(ORGANIZATIONS)
        self.usage = {key: list(rows) for key, rows in make_usage().items()}
        self.dialect = "quoted"
        self.parts: list[list[Answer]] | None = None  # None: made from usage
        self.part_count = 3
        self.job_seconds = 20.0
        self.job_fails = ""  # the error_reason
        self.empty_answers = 0
        self.odd_states: list[str] = []  # sent by the next GETs
        self.link_seconds = 3600.0
        self.post_seconds = 0.0  # real seconds between creating a job and the answer
        self.limits = {"POST": 10, "GET": 10}
        self.throttle_header = "Retry-After"  # or date, X-RateLimit-Reset, RateLimit-Reset, none
        self.planned: dict[str, list[Answer]] = defaultdict(list)
        self.spent: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.jobs: dict[str, Job] = {}
        self.seen: list[Seen] = []
        self.closed = False
        self.lock = threading.Lock()
        self.servers = [self.serve(ApiHandler), self.serve(StoreHandler)]
        self.url, self.store_url = (
            f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers
        )

    def serve(self, handler: type[Handler]) -> ThreadingHTTPServer:
        server = Server(("127.0.0.1", 0), type(handler.__name__, (handler,), {"fake": self}))
        threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
        return server

    def close(self) -> None:
        self.closed = True
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def plan(self, kind: str, *answers: Answer) -> None:
        """Answer requests to /me, collaborations, shares, POST, or GET with these first."""
        self.planned[kind].extend(answers)

    def requests(
        self, method: str, server: str = "api", contains: str = "usage_export_job"
    ) -> list[Seen]:
        return [
            seen
            for seen in self.seen
            if (seen.method, seen.server) == (method, server) and contains in seen.path
        ]

    def part_answers(self, job: Job) -> list[list[Answer]]:
        if self.parts is None:
            wanted = [job.organization, *job.body.get("shared_org_ids", [])]  # type: ignore[misc]
            rows = [row for key in dict.fromkeys(wanted) for row in self.usage.get(key, [])]
            parts = [write_table(piece, self.dialect) for piece in split(rows, self.part_count)]
            return [[Answer(gzip.compress(part, 1))] for part in parts]
        return self.parts

    def table(self) -> list[list[str]]:
        """The cells of the report of all organizations, with the header."""
        return [COLUMNS, *as_text(row for rows in self.usage.values() for row in rows)]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *args: object) -> None:
        """Say nothing: tests let clients hang up on purpose."""


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
            request = (self.command, self.path, dict(self.headers.items()), body)
            seen = Seen(self.fake.clock(), self.server_name, *request)
            self.fake.seen.append(seen)
        try:
            self.send(self.answer(seen))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_POST = do_GET

    def answer(self, seen: Seen) -> Answer:
        raise NotImplementedError

    def send(self, answer: Answer) -> None:
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
        starts = range(0, len(body), answer.write_size)
        for n, start in enumerate(starts):
            if self.fake.closed:
                self.close_connection = True
                return
            if n and answer.pause:
                real_sleep(answer.pause)
            piece = body[start : start + answer.write_size]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if answer.chunked else piece)
        if answer.chunked and whole:
            self.wfile.write(b"0\r\n\r\n")


real_sleep = time.sleep  # before a test simulates time


def in_json(content: object, status: int = 200, **headers: str) -> Answer:
    return Answer(
        json.dumps(content).encode(), status, {"Content-Type": "application/json", **headers}
    )


def problem(status: int, message: str, **headers: str) -> Answer:
    return in_json({"message": message}, status, **headers)


class ApiHandler(Handler):
    server_name = "api"

    def answer(self, seen: Seen) -> Answer:
        path = urlsplit(seen.path).path
        export = re.fullmatch(r"/api/v2/organizations/([^/]+)/usage_export_job(?:/([^/]+))?", path)
        kind = path.rsplit("/", 1)[-1]  # me, collaborations, or shares-for
        if export:
            kind = seen.method
        kind = {"shares-for": "shares"}.get(kind, kind)
        with self.fake.lock:
            planned = self.fake.planned[kind].pop(0) if self.fake.planned[kind] else None
            if planned and not planned.replaced:
                return planned
            if seen.headers.get("Circle-Token") != self.fake.token:
                return problem(401, "Invalid token provided.")
            answer = self.answer_export(seen, *export.groups()) if export else self.read(kind)
        if kind == "POST":
            real_sleep(self.fake.post_seconds)
        return planned or answer

    def read(self, kind: str) -> Answer:
        organizations = self.fake.organizations.items()
        if kind == "me":
            user = {"id": str(uuid.UUID(int=7)), "login": "pat", "name": "Pat Doe"}
            return in_json({**user, "avatar_url": None})
        if kind == "collaborations":
            old = {"id": None, "name": "Old", "slug": "bb/old", "vcs-type": "bitbucket"}
            rows = [{"id": i, "name": n, "slug": f"gh/{n}"} for i, n in organizations]
            return in_json([*rows, old])
        if kind == "shares":
            rows = [{"id": i, "name": n, "vcs_type": "github"} for i, n in organizations]
            return in_json({"orgs": rows})
        return problem(404, "Not found.")

    def answer_export(self, seen: Seen, organization: str, job_id: str | None) -> Answer:
        if organization not in self.fake.organizations:
            return problem(404, "Organization does not exist.")
        throttled = self.throttled(seen.method, organization)
        if throttled:
            return throttled
        if seen.method == "POST":
            return self.create(organization, seen.body)
        return self.status(job_id or "")

    def throttled(self, method: str, organization: str) -> Answer | None:
        now, spent = self.fake.clock(), self.fake.spent[method, organization]
        recent = [at for at in spent if at > now - 3600]
        if len(recent) < self.fake.limits[method]:
            spent.append(now)
            return None
        left = recent[-self.fake.limits[method]] + 3600 - now
        headers = {self.fake.throttle_header: str(int(left) + 1)}
        if self.fake.throttle_header == "date":
            headers = {"Retry-After": formatdate(now + left + 1, usegmt=True)}
        if self.fake.throttle_header == "none":
            headers = {}
        return problem(429, "Rate limit exceeded.", **headers)

    def create(self, organization: str, text: bytes) -> Answer:
        try:
            body = json.loads(text)
            start, end = (
                datetime.strptime(body[key], "%Y-%m-%dT%H:%M:%SZ") for key in ("start", "end")
            )
            valid = set(body) <= {"start", "end", "shared_org_ids"}
            valid = valid and start < end <= start + timedelta(days=32)
            valid = valid and all(MOMENT.fullmatch(body[key]) for key in ("start", "end"))
            valid = valid and all(map(UUID.fullmatch, body.get("shared_org_ids", [])))
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            return problem(400, "Unexpected request body provided.")
        if not set(body.get("shared_org_ids", [])) <= set(self.fake.organizations):
            return problem(404, "Organization does not exist.")
        number = len(self.fake.jobs)  # IDs of neighbors differ in the last digits, as the real ones
        job_id = f"01be7c2d-0516-f103-001b-7a83456{0x3546 + number:05x}"
        self.fake.jobs[job_id] = Job(organization, body, self.fake.clock(), self.fake.empty_answers)
        answer = {"usage_export_job_id": job_id, "state": "created", "download_urls": None}
        return in_json({**answer, "start": body["start"], "end": body["end"]}, 201)

    def status(self, job_id: str) -> Answer:
        fake, job = self.fake, self.fake.jobs.get(job_id)
        if not job:
            return problem(404, "Usage export job does not exist.")
        elapsed = fake.clock() - job.created_at
        state = "completed"
        if elapsed < fake.job_seconds:
            state = "created" if elapsed < fake.job_seconds / 10 else "processing"
        elif fake.job_fails:
            state = "failed"
        state = fake.odd_states.pop(0) if fake.odd_states else state
        links = None
        if state == "completed" and job.empty_answers:
            job.empty_answers -= 1
        elif state == "completed":
            query = f"expires={int(fake.clock() + fake.link_seconds)}&signature={uuid.uuid4().hex}"
            part = f"{fake.store_url}/{job_id}/data_{{}}.csv.gz?{query}SIGNED"
            links = [part.format(number) for number in range(len(fake.part_answers(job)))]
        answer = {"usage_export_job_id": job_id, "state": state, "download_urls": links}
        if state == "failed":
            answer["error_reason"] = fake.job_fails
        return in_json(answer)


class StoreHandler(Handler):
    server_name = "store"

    def answer(self, seen: Seen) -> Answer:
        path, query = urlsplit(seen.path).path, parse_qs(urlsplit(seen.path).query)
        match = re.fullmatch(r"/([^/]+)/data_(\d+)\.csv\.gz", path)
        with self.fake.lock:
            if {"authorization", "circle-token", "cookie"} & {
                name.lower() for name in seen.headers
            }:
                return Answer(b"<Error>Only one auth mechanism allowed</Error>", 400)
            if "signature" not in query or float(query["expires"][0]) < self.fake.clock():
                return Answer(b"<Error>Request has expired</Error>", 403)
            job = self.fake.jobs.get(match[1]) if match else None
            if not match or not job:
                return Answer(b"<Error>NoSuchKey</Error>", 404)
            answers = self.fake.part_answers(job)[int(match[2])]
            return answers.pop(0) if len(answers) > 1 else answers[0]
