"""A Hugging Face hub on this machine: the part of its HTTP interface that models are shared by.

Nothing of the client is replaced: `huggingface_hub` is told another address, as `HF_ENDPOINT` does.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http


class FakeHub:
    """Repositories, each with branches that point to commits, each of which is a set of files."""

    def __init__(self):
        self.commits = {}  # (repo, commit) -> {path: bytes}
        self.branches = {}  # repo -> {branch: commit}
        self.requests = []  # (method, path)
        self.tokens = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path))
                hub.tokens.add(self.headers.get("Authorization"))
                status, headers, content = hub.respond(self.command, path, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def attach(self, monkeypatch, cache):
        """Point the client here, at a cache of its own; the network is on."""
        old = constants.ENDPOINT
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(old, self.address)
        monkeypatch.setattr(constants, "ENDPOINT", self.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(  # where it was copied to, before 1.0
            file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        # The client keeps sessions, which (before 1.0) remember that there was no network.
        for name in ("reset_sessions", "close_session"):
            getattr(_http, name, lambda: None)()

    # ------------------------------------------------------------------------ what it holds

    def commit(self, repo, files, branch="main", keep=True):
        """Commit files {path: bytes} to a branch; returns the commit."""
        branches = self.branches.setdefault(repo, {})
        before = self.commits.get((repo, branches.get(branch)), {}) if keep else {}
        after = {**before, **files}
        text = json.dumps({p: hashlib.sha1(c).hexdigest() for p, c in sorted(after.items())})
        oid = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()
        self.commits[repo, oid] = after
        branches[branch] = oid
        return oid

    def upload(self, repo, folder, prefix="", **options):
        """Commit the files of a folder on this machine."""
        files = {p for p in folder.rglob("*") if p.is_file()}
        return self.commit(
            repo, {f"{prefix}{p.relative_to(folder)}": p.read_bytes() for p in files}, **options
        )

    def files(self, repo, branch="main"):
        return self.commits[repo, self.branches[repo][branch]]

    def asked_for(self):
        """Files whose contents were asked for."""
        marker = "/resolve/"
        paths = (p.split(marker)[1] for m, p in self.requests if m == "GET" and marker in p)
        return {path.split("/", 1)[1] for path in paths}

    # --------------------------------------------------------------------------- the interface

    def respond(self, method, path, body):
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return reply({"errors": [], "warnings": []})
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            if repo not in self.branches:
                return failure(401, "RepoNotFound", "Repository not found")
            if method == "POST":
                return self.write(repo, rest, body)
            return self.describe(repo, rest)
        return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def create(self, wanted):
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo in self.branches:
            return failure(409, "RepoExists", "exists", url=f"{self.address}/{repo}")
        self.commit(repo, {".gitattributes": b""})
        self.private = wanted.get("private") or wanted.get("visibility") == "private"
        return reply({"url": f"{self.address}/{repo}", "name": repo})

    def write(self, repo, rest, body):
        if rest[0] == "branch":
            branches = self.branches[repo]
            if rest[1] in branches:
                return failure(409, "BranchExists", "exists")
            branches[rest[1]] = branches["main"]
            return reply({})
        if rest[0] == "preupload":
            files = json.loads(body)["files"]
            modes = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return reply({"files": modes})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        self.message = lines[0]["value"]["summary"]
        oid = self.commit(repo, files, branch=rest[1])
        url = f"{self.address}/{repo}/commit/{oid}"
        return reply({"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def describe(self, repo, rest):
        oid = self.find(repo, rest[1] if len(rest) > 1 else "main")
        if oid is None:
            return failure(404, "RevisionNotFound", "Invalid rev id")
        files = self.commits[repo, oid]
        if rest[:1] == ["tree"]:
            return reply(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in sorted(files.items())
                ]
            )
        info = {"_id": "0", "id": repo, "modelId": repo, "sha": oid, "private": False, "tags": []}
        return reply({**info, "siblings": [{"rfilename": path} for path in sorted(files)]})

    def resolve(self, repo, revision, path):
        oid = self.find(repo, revision)
        if repo not in self.branches or oid is None:
            return failure(404, "RepoNotFound", "Repository not found")
        content = self.commits[repo, oid].get(path)
        if content is None:
            return failure(404, "EntryNotFound", "Entry not found", commit=oid)
        return (
            200,
            {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": oid},
            content,
        )

    def find(self, repo, revision):
        if (repo, revision) in self.commits:
            return revision
        return self.branches.get(repo, {}).get(revision)


def reply(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def failure(status, code, message, commit="", **values):
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    if commit:
        headers["X-Repo-Commit"] = commit
    return status, headers, json.dumps({"error": message, **values}).encode()
