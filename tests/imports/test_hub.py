"""SAEs of the hub: a stand-in of its HTTP on loopback, asked by huggingface_hub itself in a process of its own."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

REPO, COMMIT = "somebody/saes", "c" * 40


def sae_lens_files(folder, hook, seed=0):
    """A standard SAE in sae-lens' layout."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (6, 12), "b_enc": (12,), "W_dec": (12, 6), "b_dec": (6,)}
    folder.mkdir(parents=True)
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        folder / "sae_weights.safetensors",
    )
    metadata = {"sae_lens_version": "6.54.12", "hook_name": hook}
    config = {"architecture": "standard", "d_in": 6, "d_sae": 12, "dtype": "float32", "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(config))
    (folder / "sparsity.safetensors").write_bytes(b"not needed")


class Hub(ThreadingHTTPServer):
    """Answers what a download of `REPO` asks for, and notes which files were."""

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.sent, self.asked = root, [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        if re.fullmatch(rf"/api/models/{REPO}(/revision/(main|v1|{COMMIT}))?", path):
            names = sorted(
                p.relative_to(self.server.root).as_posix() for p in self.server.root.rglob("*") if p.is_file()
            )
            told = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.send(json.dumps(told).encode(), body, {"Content-Type": "application/json"})
        file = re.fullmatch(rf"/{REPO}/resolve/[^/]+/(.+)", path)
        if file and (self.server.root / file[1]).is_file():
            content = (self.server.root / file[1]).read_bytes()
            if body:
                self.server.sent.append(file[1])
            return self.send(content, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{hash(content) & 0xFFFFFFFF:x}"'})
        self.send(b"{}", body, {"X-Error-Code": "RepoNotFound"}, 404)

    def send(self, content, body, headers, status=200):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path):
    root = tmp_path / "repository"
    for layer in range(3):
        sae_lens_files(root / f"layer_{layer}", f"blocks.{layer}.hook_resid_pre", seed=layer)
    (root / "README.md").write_text("# SAEs")
    server = Hub(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def ask(hub, tmp_path, code, **env):
    """Python code under this hub, with a cache of its own; (stdout, stderr)."""
    told = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **told, **env}
    )
    return done.stdout.strip(), done.stderr.strip()


CODE = """import saeopt
for _ in range(2):
    s = saeopt.load({source!r})
print(sorted(s), float(next(iter(s.values())).W_enc.sum()))"""


@pytest.mark.parametrize("source", [f"hub:{REPO}/layer_1", f"hub:{REPO}@v1:layer_1"])
def test_a_folder_of_a_repository_is_loaded_and_nothing_else_is_downloaded(hub, tmp_path, source):
    found, error = ask(hub, tmp_path, CODE.format(source=source))
    assert found.startswith("['blocks.1.hook_resid_pre']"), error
    assert sorted(hub.sent) == ["layer_1/cfg.json", "layer_1/sae_weights.safetensors"]
    assert len([path for path in hub.asked if path.startswith("/api/models/")]) == 1
    hub.shutdown()
    hub.server_close()
    offline, error = ask(hub, tmp_path, CODE.format(source=source), HF_HUB_OFFLINE="1")
    assert offline == found, error


def test_of_a_whole_repository_the_hook_points_that_are_asked_for(hub, tmp_path):
    code = (
        "from saeopt.imports.find import choose, find\n"
        f"held = find({REPO!r})\n"
        "print(len(held), choose(held, 'blocks.2.hook_resid_pre').weights()[0].d)"
    )
    assert ask(hub, tmp_path, code)[0] == "3 6"
    assert [name for name in hub.sent if name.endswith(".safetensors")] == ["layer_2/sae_weights.safetensors"]


TRY = """import saeopt
for source in {sources!r}:
    try:
        saeopt.load(source)
    except saeopt.UserError as error:
        print(error)"""


def test_what_is_not_there_is_said_in_a_line(hub, tmp_path):
    sources = ["somebody/else", f"{REPO}:layer_9", f"{REPO}@v9:layer_1"]
    found, error = ask(hub, tmp_path, TRY.format(sources=sources))
    first, second, third = found.split("\n") if found.count("\n") == 2 else (found, error, "")
    assert "somebody/else: no such file or folder here, and no such repository, revision or file" in first
    assert "somebody/saes holds no folder 'layer_9'" in second
    assert "@v9:layer_1: no such file or folder here" in third
    hub.shutdown()
    hub.server_close()
    found, error = ask(hub, tmp_path, TRY.format(sources=[REPO]))
    assert "the hub cannot be reached" in found, (found, error)
