"""`--push-to-hub` against a hub of our own on this machine: the real client, in a process of its own, no network."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.integration.test_hub import Handler, Hub
from tests.launch import cla, cla_anew, prepare
from tests.tiny import save_tiny

USERS = {
    "hf_write": {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}},
    "hf_read": {"name": "me", "orgs": [], "auth": {"accessToken": {"role": "read"}}},
}


class WritableHub(Hub):
    """Takes uploads, too, as the hub does without Xet: small files in the commit, the others as LFS objects."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.RequestHandlerClass = WritableHandler
        self.objects: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.commits = self.broken = 0

    def environment(self, token: str | None = "hf_write", **more: str) -> dict[str, str]:
        own = {"HF_HUB_DISABLE_XET": "1", **({"HF_TOKEN": token} if token else {}), **more}
        return {name: value for name, value in super().environment().items() if name != "HF_TOKEN"} | own


class WritableHandler(Handler):
    server: WritableHub

    def user(self) -> dict | None:
        return USERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def answer(self, body: bool) -> None:
        if self.path == "/api/whoami-v2":
            user = self.user()
            return self.send(user or {"error": "Invalid credentials"}, 200 if user else 401)
        return super().answer(body)

    def listing(self, repo: Path, tree: bool) -> object:
        found, name = super().listing(repo, tree), f"{repo.parent.name}/{repo.name}"
        return found if tree else found | {"id": name, "private": self.server.private.get(name, False)}

    def do_PUT(self) -> None:
        content = self.content()
        if self.server.broken:
            return self.send({"error": "the disk of the hub is full"}, 403)
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        return self.send({})

    def do_POST(self) -> None:
        content, parts = self.content(), self.path.strip("/").split("/")
        if parts[-1] == "create":
            return self.create(json.loads(content))
        if parts[-1] == "validate-yaml":
            front = yaml.safe_load(json.loads(content)["content"].split("---")[1])
            valid = front["library_name"] == "transformers" and "cla-convert" in front["tags"]
            return self.send({"errors": [] if valid else [{"message": "no metadata"}]}, 200 if valid else 400)
        if "preupload" in parts:
            files = json.loads(content)["files"]
            modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in files}
            return self.send(
                {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
            )
        if parts[-1] == "batch":
            upload = f"http://{self.headers['Host']}/objects"
            wanted = json.loads(content)["objects"]
            return self.send({"objects": [o | {"actions": {"upload": {"href": upload, "header": {}}}} for o in wanted]})
        return self.commit(
            self.server.folder / parts[2] / parts[3], [json.loads(line) for line in content.splitlines()]
        )

    def create(self, wanted: dict) -> None:
        user = self.user()
        name = f"{wanted.get('organization') or user['name']}/{wanted['name']}"
        existed = (self.server.folder / name).exists()
        if not existed:
            (self.server.folder / name).mkdir(parents=True)
            self.server.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        return self.send({"url": f"http://{self.headers['Host']}/{name}", "error": "exists"}, 409 if existed else 200)

    def commit(self, repo: Path, lines: list[dict]) -> None:
        self.server.commits += 1
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (repo / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (repo / value["path"]).write_bytes(self.server.objects[value["oid"]])
            elif line["key"] == "deletedFile":
                (repo / value["path"]).unlink()
        url = f"http://{self.headers['Host']}/{repo.parent.name}/{repo.name}/commit/1"
        return self.send({"commitUrl": url, "commitOid": "1" * 40})

    def content(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def send(self, value: object, status: int = 200) -> None:
        self.reply(json.dumps(value).encode(), True, status)


@pytest.fixture
def hub(tmp_path) -> Iterator[WritableHub]:
    server = WritableHub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("upload") / "source")
    (folder / "LICENSE").write_text("Test licence\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def push(hub: WritableHub, source: Path, out: Path, *options, repo: str = "me/model", **environment):
    """`convert --push-to-hub`."""
    line = ["convert", source, out, "--init", "mean", "--push-to-hub", repo, *options]
    return cla_anew(*line, env=hub.environment(**environment))


def same_but_for_its_teacher(uploaded: Path, folder: Path) -> bool:
    """Whether the upload is the folder; where the teacher lies on this machine is not uploaded."""
    here, there = files(folder), files(uploaded)
    manifests = [json.loads(found.pop("cla_manifest.json")) for found in (here, there)]
    places = [manifest["source"].pop("model", None) for manifest in manifests]
    return here == there and manifests[0] == manifests[1] and places[1] is None


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("hello", return_tensors="pt").input_ids
print(type(model).__name__, model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] - ids.shape[1])
"""


def test_an_upload_is_the_folder_and_loads_from_the_hub(hub, source, tmp_path):
    done = push(hub, source, tmp_path / "out", "--private", "--json", repo="model")
    assert done.returncode == 0, done.stderr
    result, uploaded = json.loads(done.stdout), files(hub.folder / "me" / "model")
    assert result["uploaded"].endswith("/me/model") and hub.private == {"me/model": True} and hub.commits == 1
    assert same_but_for_its_teacher(hub.folder / "me" / "model", tmp_path / "out")
    kept = json.loads((tmp_path / "out/cla_manifest.json").read_text())
    assert kept["source"]["model"] == str(source)  # `uptrain` finds the teacher
    card = uploaded["README.md"].decode()
    assert "# me/model\n" in card and 'folder = "me/model"' in card and "library_name: transformers" in card
    for name in ("LICENSE", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert uploaded[name] == (source / name).read_bytes()
    load = [sys.executable, "-P", "-c", LOAD, "me/model"]
    loaded = subprocess.run(load, capture_output=True, text=True, env=hub.environment(), cwd=tmp_path)
    assert loaded.stdout.split() == ["ClaLlamaForCausalLM", "2"], loaded.stderr


def test_a_new_upload_leaves_no_old_weights_behind(hub, source, tmp_path):
    assert push(hub, source, tmp_path / "one").returncode == 0
    assert push(hub, source, tmp_path / "many", "--max-shard-size", "100KB").returncode == 0
    assert files(hub.folder / "me" / "model").keys() == files(tmp_path / "many").keys()
    assert "model.safetensors" not in files(tmp_path / "many")


def test_a_failed_upload_keeps_the_output_and_can_be_repeated(hub, source, tmp_path):
    hub.broken = True
    done = push(hub, source, tmp_path / "out", "--json")
    assert done.returncode == 3 and "403" in done.stderr and "Traceback" not in done.stderr
    assert Path(json.loads(done.stdout)["output"], "model.safetensors").exists() and hub.commits == 0
    command = done.stderr.split("To repeat the upload alone: ")[1].splitlines()[0]
    hub.broken = False
    path = f"{Path(sys.executable).parent}:{hub.environment()['PATH']}"
    again = subprocess.run(command, shell=True, capture_output=True, text=True, env=hub.environment(PATH=path))
    assert again.returncode == 0, again.stderr
    assert files(hub.folder / "me" / "model") == files(tmp_path / "out")


@pytest.mark.parametrize(
    ("repo", "options", "environment", "code", "reason"),
    [
        ("me/model", [], {"HF_HUB_OFFLINE": "1"}, 3, "HF_HUB_OFFLINE is set"),
        ("me/model", [], {"token": None}, 3, "no token"),
        ("me/model", [], {"token": "hf_wrong"}, 3, "does not accept the token"),
        ("me/model", [], {"token": "hf_read"}, 3, "can only read"),
        ("other/model", [], {}, 3, "me, lab"),
        ("me/mo del", [], {}, 2, "not a repository name"),
        ("me/model", [], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 3, "cannot be reached"),
        ("lab/foreign", [], {}, 3, "was not made by cla-convert"),
        ("lab/open", ["--private"], {}, 3, "is public"),
    ],
    ids=lambda value: str(value).replace("/", "-"),
)
def test_what_cannot_be_uploaded_is_refused_before_work_begins(
    hub, source, tmp_path, repo, options, environment, code, reason
):
    for name in ("lab/foreign/model.safetensors", "lab/open/README.md"):
        (hub.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.folder / name).touch()
    done = push(hub, source, tmp_path / "out", *options, repo=repo, **environment)
    assert done.returncode == code and reason in done.stderr and "fix: " in done.stderr, done.stderr
    assert not (tmp_path / "out").exists() and not hub.commits and not hub.private


def test_private_alone_is_refused(source, tmp_path):
    done = cla("convert", source, tmp_path / "out", "--private")
    assert done.returncode == 2 and "--push-to-hub" in done.stderr


def test_uptrain_and_run_upload_what_they_trained(hub, source, tmp_path):
    work = prepare(tmp_path, source)
    recipe = ["--set", "train.tokens=160"]
    line = ["uptrain", work / "converted", tmp_path / "trained", "--recipe", work / "recipe.yaml", *recipe]
    done = cla_anew(*line, "--push-to-hub", "lab/trained", env=hub.environment())
    assert done.returncode == 0, done.stderr
    assert same_but_for_its_teacher(hub.folder / "lab" / "trained", tmp_path / "trained")
    assert "Uptrained on 160 tokens" in (hub.folder / "lab" / "trained" / "README.md").read_text()
    run = ["run", work / "recipe.yaml", "--out", tmp_path / "run", *recipe]
    done = cla_anew(*run, "--push-to-hub", "lab/run", "--until", "plan", env=hub.environment())
    assert done.returncode == 2 and "nothing to upload" in done.stderr
    done = cla_anew(*run, "--push-to-hub", "lab/run", "--until", "convert", env=hub.environment())
    assert done.returncode == 0, done.stderr
    assert same_but_for_its_teacher(hub.folder / "lab" / "run", tmp_path / "run" / "converted")
    done = cla_anew(*run, "--push-to-hub", "lab/run", "--until", "uptrain", env=hub.environment())
    assert done.returncode == 0, done.stderr
    assert same_but_for_its_teacher(hub.folder / "lab" / "run", tmp_path / "run" / "uptrained")
