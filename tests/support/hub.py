"""A small stand-in for a Hugging Face hub: repositories in memory, behind real HTTP.

It has what huggingface_hub asks for to make, fill and read a repository of a model. Files go by
git-lfs or in the commit, never by xet.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

Files = dict[str, bytes]
# The accounts' tokens. A token may write to its own account.
TOKENS = {"hf_of_me": "me", "hf_of_another": "another"}


@dataclass
class Repository:
    """One repository of a model.

    Attributes:
        private: whether only its account sees it.
        commits: {id: its files}.
        branches: {branch or tag: id of its commit}.
        messages: messages of the commits, in order.
    """

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str = "") -> str:
        """Put files onto a branch. Returns the commit's id."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        number = f"{len(self.commits)} {branch}".encode()
        name = hashlib.sha1(number).hexdigest()
        self.commits[name] = before | files
        self.branches[branch] = name
        self.messages.append(message)
        return name

    def files(self, revision: str = "main") -> Files:
        """The files at a branch, tag or commit."""
        return self.commits[self.branches.get(revision, revision)]


class StandIn:
    """The hub. Inside ``with`` it listens on a port of this machine.

    Attributes:
        repositories: {account/name: repository}.
        url: its address.
        asked: what was asked for, "METHOD path", in order.
        fails: given "METHOD path", the status to answer with instead; 0: close the connection;
            None: answer as usual.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of git-lfs, by their SHA-256
        self.asked: list[str] = []
        self.fails: Callable[[str], int | None] = lambda request: None
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandIn:
        # The seconds between two looks for the end.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, name: str, *folders: tuple[str, Path], private: bool = False) -> Repository:
        """Make a repository with a folder's files on each branch."""
        made = self.repositories[name] = Repository(private)
        made.commit("main", {".gitattributes": b""})
        for branch, folder in folders:
            made.commit(branch, {path.name: path.read_bytes() for path in folder.iterdir()})
        return made

    def environment(self, cache: Path, token: str | None = "hf_of_me") -> dict[str, str]:
        """What a process needs to use this hub, from its start on."""
        given = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return given | ({"HF_TOKEN": token} if token else {})


@contextlib.contextmanager
def used(environment: dict[str, str]) -> Iterator[None]:
    """Inside it, this process uses a stand-in. huggingface_hub read the environment long ago.

    Args:
        environment: as ``StandIn.environment`` gives it.
    """
    url, cache = environment["HF_ENDPOINT"], environment["HF_HOME"]
    with contextlib.ExitStack() as stack:
        token = {"HF_TOKEN": environment["HF_TOKEN"]} if "HF_TOKEN" in environment else {}
        stack.enter_context(patch.dict(os.environ, token))
        if not token:
            os.environ.pop("HF_TOKEN", None)
        for name, value in {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": environment["HF_HUB_OFFLINE"] == "1",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(Path(cache, "hub")),
            "HF_TOKEN_PATH": str(Path(cache, "token")),
        }.items():
            stack.enter_context(patch.object(constants, name, value))
        stack.enter_context(patch.object(hf_api.api, "endpoint", url))
        # transformers keeps one that it made for an earlier stand-in.
        stack.enter_context(patch.object(transformers_hub, "_hf_api", None, create=True))
        yield


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    stand_in: StandIn

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.stand_in.asked.append(request)
        failure = self.stand_in.fails(request)
        if failure == 0:
            self.close_connection = True
            return
        if failure:
            self._json({"error": f"made to fail with {failure}"}, failure)
            return
        for pattern, answer in ROUTES.items():
            if found := re.fullmatch(pattern, request):
                answer(self, body, **found.groupdict())
                return
        self._missing("Entry")

    # What an answer consists of.

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _missing(self, what: str) -> None:
        self._json({"error": f"{what} not found"}, 404, X_Error_Code=f"{what}NotFound")

    def _account(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _seen(self, repo: str) -> Repository | None:
        """A repository that the token sees. Answers, if there is none."""
        found = self.stand_in.repositories.get(repo)
        if found is None or (found.private and self._account() != repo.split("/")[0]):
            self._missing("Repo")
            return None
        return found

    def _at(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """(commit, its files). Answers, if there is no such revision."""
        if (found := self._seen(repo)) is None:
            return None
        commit = found.branches.get(revision, revision)
        if commit not in found.commits:
            self._missing("Revision")
            return None
        return commit, found.commits[commit]

    def _may_write(self, repo: str) -> bool:
        """Answers, if not."""
        if self._account() == repo.split("/")[0]:
            return True
        self._json({"error": f"you have no rights to write to {repo}"}, 403)
        return False

    # Answers. They take the groups of their route.

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        account = self._account()
        if account is None:
            self._json({"error": "Invalid username or password."}, 401)
            return
        name = f"{asked.get('organization') or account}/{asked['name']}"
        found, url = self.stand_in.repositories, {"url": f"{self.stand_in.url}/{name}"}
        if name in found:
            self._json(url | {"error": "You already created this model repo"}, 409)
        elif self._may_write(name):
            # The oldest huggingface_hub that is allowed says it in another way.
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            found[name] = Repository(private)
            found[name].commit("main", {".gitattributes": b""})
            self._json(url)

    def nobodys(self, _: bytes, name: str) -> None:
        self._missing("Repo")

    def check_write(self, _: bytes, repo: str) -> None:
        if self._seen(repo) and self._may_write(repo):
            self._json({})

    def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        if found := self._at(repo, revision or "main"):
            siblings = [{"rfilename": name} for name in found[1]]
            private = self.stand_in.repositories[repo].private
            self._json({"id": repo, "sha": found[0], "private": private, "siblings": siblings})

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        """Of a folder; our repositories have none."""
        if self._at(repo, revision):
            self._missing("Entry")

    def resolve(self, _: bytes, repo: str, revision: str, file: str) -> None:
        if (found := self._at(repo, revision)) is None:
            return
        if file not in found[1]:
            missing = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": found[0]}
            self._json({"error": "Entry not found"}, 404, **missing)
            return
        content = found[1][file]
        self._send(200, content, ETag=f'"{_git_id(content)}"', X_Repo_Commit=found[0])

    def validate_card(self, body: bytes) -> None:
        """The head of a README.md is YAML with keys."""
        head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        errors = [] if isinstance(head, dict) else [{"message": "the head has no keys"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._at(repo, revision)) is None or not self._may_write(repo):
            return
        files = []
        for file in json.loads(body)["files"]:
            name, there = file["path"], found[1].get(file["path"])
            large = name.endswith((".safetensors", ".bin"))
            known = there and (hashlib.sha256(there).hexdigest() if large else _git_id(there))
            mode = "lfs" if large else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._json({"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        if not self._may_write(repo):
            return
        objects = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.stand_in.objects:
                upload = {"href": f"{self.stand_in.url}/objects/{each['oid']}"}
                each["actions"] = {"upload": upload}
        self._json({"transfer": "basic", "objects": objects})

    def put_object(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.stand_in.objects[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if self._at(repo, revision) is None or not self._may_write(repo):
            return
        files, summary = {}, ""
        for line in body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                summary = value["summary"]
            elif part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert part["key"] == "lfsFile"
                files[value["path"]] = self.stand_in.objects[value["oid"]]
        name = self.stand_in.repositories[repo].commit(revision, files, summary)
        url = f"{self.stand_in.url}/{repo}/commit/{name}"
        self._json({"commitUrl": url, "commitOid": name})


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES: dict[str, Callable[..., None]] = {
    r"POST /api/repos/create": _Handler.create,
    r"POST /api/validate-yaml": _Handler.validate_card,
    rf"GET /api/models/{_REPO}/auth-check/write": _Handler.check_write,
    r"GET /api/models/(?P<name>[^/]+)": _Handler.nobodys,
    rf"GET /api/models/{_REPO}(/revision/{_REVISION})?": _Handler.info,
    rf"GET /api/models/{_REPO}/tree/{_REVISION}(/.+)?": _Handler.tree,
    rf"(HEAD|GET) /{_REPO}/resolve/{_REVISION}/(?P<file>.+)": _Handler.resolve,
    rf"POST /api/models/{_REPO}/preupload/{_REVISION}": _Handler.preupload,
    rf"POST /{_REPO}\.git/info/lfs/objects/batch": _Handler.batch,
    r"PUT /objects/(?P<oid>.+)": _Handler.put_object,
    rf"POST /api/models/{_REPO}/commit/{_REVISION}": _Handler.commit,
}
