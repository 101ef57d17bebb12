"""A small Hub: enough of huggingface.co's HTTP that the real client can push and load models and datasets.

Modelled on what the client calls and checks: repositories with commits, branches and tags, preupload, NDJSON commits,
git LFS (basic and multipart), `resolve` with ETag and X-Repo-Commit, large files behind a redirect to another host,
Range requests, tokens, and the status codes and X-Error-* headers of the Hub. `Hub.cut` breaks connections on demand.
`Hub.altered` holds what arrives of small files in place of what the Hub announces.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

#: token -> (user, may write)
TOKENS = {"hf_alice": ("alice", True), "hf_alice_read": ("alice", False), "hf_bob": ("bob", True)}
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
#: Objects above this many bytes are uploaded in parts of this size.
PART_SIZE = 5_000_000


@dataclass
class Repo:
    """Commits are dicts of path to file; a file is `{"data": bytes}` or `{"lfs": sha256}`."""

    owner: str
    private: bool
    commits: dict[str, dict] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: dict) -> str:
        parent = self.branches.get(branch, "")
        identity = [parent, len(self.commits), sorted((path, repr(file)) for path, file in files.items())]
        sha = hashlib.sha1(repr(identity).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Cut:
    """Break requests of `method` on paths with `part`: after so many bytes of the body, so many times."""

    method: str
    part: str
    after: int
    times: int
    stall: bool
    drip: bool
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class Hub:
    """Runs while it is a context; `url` is the endpoint. State and log may be read and written by the tests."""

    def __enter__(self) -> Hub:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.seen: list[Seen] = []
        self.unknown: list[str] = []
        self.cuts: list[Cut] = []
        self.altered: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for cut in self.cuts:
            cut.release.set()
        self.server.shutdown()
        self.server.server_close()

    def cut(
        self, method: str, part: str, *, after: int = 0, times: int = 1, stall: bool = False, drip: bool = False
    ) -> Cut:
        """Drop the connection, or hold it until `release` is set: with `stall` in silence, with `drip` byte by byte."""
        self.cuts.append(Cut(method, part, after, times, stall, drip))
        return self.cuts[-1]

    def requests(self, method: str, part: str) -> list[Seen]:
        return [s for s in self.seen if s.method == method and part in s.path]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What is in a repository now."""
        repository = self.repos[repo]
        commit = repository.commits[repository.branches[revision]]
        return {path: self.content(file) for path, file in commit.items()}

    def content(self, file: dict) -> bytes:
        return self.lfs[file["lfs"]] if "lfs" in file else file["data"]

    def oid(self, file: dict) -> str:
        """The git blob id of a file, or the SHA-256 of a large one: what the Hub gives as ETag."""
        if "lfs" in file:
            return file["lfs"]
        return hashlib.sha1(b"blob %d\0" % len(file["data"]) + file["data"]).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/agent-harnesses", "agent_harnesses"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/(?:models|datasets)/([^/]+/[^/]+)", "info"),
        ("GET", r"/api/(?:models|datasets)/([^/]+/[^/]+)/auth-check/write", "may_write"),
        ("GET", r"/api/(?:models|datasets)/([^/]+/[^/]+)/revision/([^/]+)", "info"),
        ("GET", r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/(?:models|datasets)/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(?:models|datasets)/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(?:models|datasets)/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
        ("POST", r"/api/(?:models|datasets)/([^/]+/[^/]+)/tag/([^/]+)", "create_tag"),
        ("POST", r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_put"),
        ("PUT", r"/lfs/([0-9a-f]{64})/(\d+)", "lfs_put_part"),
        ("POST", r"/lfs/([0-9a-f]{64})/complete", "lfs_complete"),
        ("POST", r"/lfs/([0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("GET", r"/cdn/([0-9a-f]{64})", "cdn"),
    )

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.seen.append(Seen(self.command, unquote(path), {k.lower(): v for k, v in self.headers.items()}))
        self.fault = self._fault(unquote(path))
        try:
            self.body = self._read_body()
            for method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command.replace("HEAD", "GET"):
                    return Handler.__dict__[name](self, *map(unquote, match.groups()))
            self.hub.unknown.append(f"{self.command} {self.path}")
            raise Refused(501, f"the small Hub of the tests does not know {self.command} {self.path}")
        except Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)
        except OSError:  # cut, or the client is gone
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    # Who is asking, and for what

    def _user(self) -> tuple[str | None, bool]:
        header = self.headers.get("Authorization")
        if header is None:
            return None, False
        token = header.removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        user, may_write = self._user()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and user != repo.owner):
            if user is None:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and (user != repo.owner or not may_write):
            raise Refused(403, f"Forbidden: you have no write access to {name}")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision) or repo.tags.get(revision) or revision
        if sha not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # The routes

    def whoami(self) -> None:
        user, _ = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": []})

    def agent_harnesses(self) -> None:
        """What newer clients ask for once a day, to name the program they run in."""
        self._json({"standardEnvVars": [], "harnesses": {}})

    def create_repo(self) -> None:
        user, may_write = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        wanted = json.loads(self.body)
        owner = wanted["organization"] or user
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.url}/{'datasets/' if wanted.get('type') == 'dataset' else ''}{name}"
        if owner != user or not may_write:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        with self.hub.lock:
            if name in self.hub.repos:
                answer = {"error": "You already created this model repo", "url": url}
                return self._json(answer, 409)
            private = wanted.get("private", False) or wanted.get("visibility") == "private"
            repo = self.hub.repos[name] = Repo(owner, private)
            repo.add("main", {".gitattributes": {"data": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}})
        self._json({"url": url})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if head is None:
            return self._json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        data = yaml.safe_load(head.group(1))
        bases = data.get("base_model") or []
        bad = [b for b in ([bases] if isinstance(bases, str) else bases) if not re.fullmatch(r"[\w.-]+/[\w.-]+", b)]
        if bad:
            problem = f'"base_model" with value "{bad[0]}" is not valid. Use a model id from https://hf.co/models.'
            return self._json({"errors": [{"message": problem}]}, 400)
        self._json({"errors": [], "warnings": []})

    def info(self, name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        sha = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self._json({"_id": "0", "id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def may_write(self, name: str) -> None:
        self._repo(name, write=True)
        self._json({})

    def tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        entries = []
        for path, file in repo.commits[self._commit(repo, revision)].items():
            size = len(self.hub.content(file))
            entry = {"type": "file", "path": path, "size": size, "oid": self.hub.oid(file)[:40]}
            if "lfs" in file:
                entry["lfs"] = {"oid": file["lfs"], "size": size, "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def create_branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        start = self._commit(repo, json.loads(self.body or b"{}").get("startingPoint", "main"))
        with self.hub.lock:
            if branch in repo.branches:
                raise Refused(409, "Reference already exists")
            repo.branches[branch] = start
        self._json({})

    def create_tag(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        repo.tags[json.loads(self.body)["tag"]] = self._commit(repo, revision)
        self._json({})

    def preupload(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        files = repo.commits[self._commit(repo, revision)]
        answer = []
        for file in json.loads(self.body)["files"]:
            path, existing = file["path"], files.get(file["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            answer[-1]["oid"] = self.hub.oid(existing) if existing else None
        self._json({"files": answer})

    def commit(self, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.hub.lock:
            files = dict(repo.commits[self._commit(repo, branch)])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = {"data": base64.b64decode(value["content"])}
                elif line["key"] == "lfsFile" and len(self.hub.lfs.get(value["oid"], b"")) == value["size"]:
                    files[value["path"]] = {"lfs": value["oid"]}
                else:
                    raise Refused(400, f"cannot commit {line['key']} {value['path']}: not known or not uploaded")
            sha = repo.add(branch, files)
        self._json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "success": True})

    def lfs_batch(self, name: str) -> None:
        self._repo(name, write=True)
        answer = []
        for wanted in json.loads(self.body)["objects"]:
            answer.append(dict(wanted))
            if wanted["oid"] in self.hub.lfs:
                continue
            base, header = f"{self.hub.url}/lfs/{wanted['oid']}", {}
            if wanted["size"] > PART_SIZE:
                header = {str(i + 1): f"{base}/{i + 1}" for i in range(-(-wanted["size"] // PART_SIZE))}
                header["chunk_size"] = str(PART_SIZE)
            upload = {"href": f"{base}/complete" if header else base, "header": header}
            answer[-1]["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
        self._json({"transfer": "multipart", "objects": answer})

    def lfs_put(self, oid: str) -> None:
        self._store(oid, self.body)
        self._send(200, b"")

    def lfs_put_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self._send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        parts = [self.hub.parts[oid, part["partNumber"]] for part in json.loads(self.body)["parts"]]
        self._store(oid, b"".join(parts))
        self._json({"success": True})

    def lfs_verify(self, oid: str) -> None:
        self._user()
        if oid not in self.hub.lfs:
            raise Refused(404, "no such object")
        self._json({})

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, "the content does not match its SHA-256")
        self.hub.lfs[oid] = data

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        sha = self._commit(repo, revision)
        file = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if file is None:
            self._send(404, b"Entry not found", headers | {"X-Error-Code": "EntryNotFound"})
        elif "lfs" in file:
            size = len(self.hub.content(file))
            headers |= {"X-Linked-ETag": f'"{file["lfs"]}"', "X-Linked-Size": str(size)}
            # Another host name: the client must not send its token there.
            self._send(302, b"", headers | {"Location": f"http://localhost:{self.hub.port}/cdn/{file['lfs']}"})
        else:
            data = self.hub.altered.get(path, file["data"])
            self._send(200, data, headers | {"ETag": f'"{self.hub.oid(file)}"', "Accept-Ranges": "bytes"})

    def cdn(self, oid: str) -> None:
        data, asked = self.hub.lfs[oid], self.headers.get("Range")
        if asked is None:
            return self._send(200, data, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
        piece = data[int(first) : int(last) + 1 if last else None]
        content_range = f"bytes {first}-{int(first) + len(piece) - 1}/{len(data)}"
        self._send(206, piece, {"ETag": f'"{oid}"', "Content-Range": content_range})

    # The wire

    def _fault(self, path: str) -> Cut | None:
        with self.hub.lock:
            for cut in self.hub.cuts:
                if cut.times and cut.method == self.command and cut.part in path:
                    cut.times -= 1
                    return cut
        return None

    def _break(self, cut: Cut) -> None:
        cut.reached.set()
        if cut.stall:
            cut.release.wait()
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    def _drip(self, data: bytes) -> None:
        """Send a byte every tenth of a second: the client never waits long for the next one."""
        self.fault.reached.set()
        for i in range(len(data)):
            if self.fault.release.wait(0.1):
                return
            self.wfile.write(data[i : i + 1])

    def _read_body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault and self.command != "GET":
            self.rfile.read(min(self.fault.after, length))
            self._break(self.fault)
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionAbortedError
        return data

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault:
            self.wfile.write(data[: self.fault.after])
            if self.fault.drip:
                self._drip(data[self.fault.after :])
            self._break(self.fault)
        self.wfile.write(data)

    def _json(self, answer: object, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def log_message(self, *args: object) -> None:
        pass
