#!/usr/bin/env python3
"""Builds the images of deploy/docker without a container engine and without a registry, and runs the services of
compose.yaml from them.

    scripts/try_images.py FOLDER        # several GB of it are used, and kept for the next time

The images that the Dockerfile begins with are made of Debian's packages and of this machine's Rust toolchain, under
the names that it asks for, and the program is not optimised; so what is tried is our Dockerfile, and not those images.
Each service runs as an OCI container: the image's program under the user, with the read-only root, the lack of
capabilities, the shared memory and the files that compose.yaml gives it, in a network of its own.

Needs root, PyYAML, and: apt-get install mmdebstrap buildah crun
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = ROOT / "deploy/docker/compose.yaml"
DEBIAN = "http://deb.debian.org/debian"
BRIDGE = "baton-compose"
BASES = {
    "docker.io/library/debian:bookworm-slim": ["--variant=minbase"],
    # distroless/cc: no shell, no package manager.
    "gcr.io/distroless/cc-debian12:nonroot": [
        "--variant=extract",
        "--include=base-files,netbase,tzdata,ca-certificates,libc6,libgcc-s1,libstdc++6,libssl3",
    ],
    "docker.io/library/rust:1.95.0-bookworm": [
        "--variant=minbase",
        "--include=gcc,g++,libc6-dev,make,git,python3,pkg-config,ca-certificates",
    ],
}
RUST = "docker.io/library/rust:1.95.0-bookworm"
# The Dockerfile is what is tried, not the program: this builds it in minutes.
UNOPTIMISED = {
    "CARGO_PROFILE_RELEASE_OPT_LEVEL": "0",
    "CARGO_PROFILE_RELEASE_LTO": "off",
    "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "16",
    "CARGO_PROFILE_RELEASE_DEBUG": "none",
}
VLLM = "docker.io/vllm/vllm-openai:v0.32.0"


def run(*command: object, **more: object) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True, **more)
    return done.stdout.strip()


class Images:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.buildah = ["buildah", "--root", folder / "storage", "--runroot", folder / "run"]
        self.buildah += ["--storage-driver", "overlay"]

    def do(self, *command: object) -> str:
        return run(*self.buildah, *command, env={**os.environ, "BUILDAH_ISOLATION": "chroot"})

    def known(self) -> set[str]:
        images = json.loads(self.do("images", "--json"))
        return {name for image in images for name in image.get("names") or []}

    def make_base(self, name: str, options: list[str]) -> None:
        root = self.folder / "base.tar"
        run("mmdebstrap", "--quiet", "--dpkgopt=force-unsafe-io", *options, "bookworm", root, DEBIAN)
        container = self.do("from", "scratch")
        self.do("add", container, root, "/")
        if name == RUST:
            for part in ("bin", "lib", "libexec"):
                self.do("add", container, Path(run("rustc", "--print=sysroot")) / part, f"/usr/local/{part}")
            for variable, value in {"CARGO_HOME": "/usr/local/cargo", **UNOPTIMISED}.items():
                self.do("config", "--env", f"{variable}={value}", container)
        self.do("commit", "--rm", container, name)
        root.unlink()

    def build(self) -> None:
        for name, options in BASES.items():
            if name not in self.known():
                print(f"=== {name}", flush=True)
                self.make_base(name, options)
        # vLLM's image is 10 GB of what we did not write: our stage goes onto Debian here.
        self.do("tag", "docker.io/library/debian:bookworm-slim", VLLM)
        # Where packages come through a proxy with a CA of its own.
        trusted = "/etc/ssl/certs/ca-certificates.crt"
        for target in ("coordinator", "worker", "worker-vllm"):
            print(f"=== {target}", flush=True)
            build = ["bud", "--pull-never", "--layers", "--volume", f"{trusted}:{trusted}:ro", "--target", target]
            build += ["--file", ROOT / "deploy/docker/Dockerfile", "--tag", f"baton-{target}:0.1.0", ROOT]
            self.do(*build)
            self.look_at(f"baton-{target}:0.1.0")

    def look_at(self, image: str) -> None:
        container = self.do("from", "--pull-never", f"localhost/{image}")
        root = Path(self.do("mount", container))
        config = json.loads(self.do("inspect", container))["OCIv1"]["config"]
        assert config["User"] == "10001:10001", config
        assert (root / "usr/share/doc/baton/LICENSE").is_file()
        crates = (root / "usr/share/doc/baton/CRATES.tsv").read_text().count("\n")
        used = run("du", "-sm", root).split()[0]
        print(f"  {self.do('run', container, '--', '/usr/local/bin/baton', '--version')}, {used} MB, "
              f"licences of {crates} crates", flush=True)
        self.do("rm", container)


class Service:
    """One of compose.yaml, in a network namespace on a bridge."""

    def __init__(self, images: Images, folder: Path, name: str, wanted: dict, address: str) -> None:
        self.name, self.images, self.folder = f"baton-try-{name}", images, folder
        self.container = images.do("from", "--pull-never", f"localhost/{wanted['image']}")
        image = json.loads(images.do("inspect", self.container))["OCIv1"]["config"]
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        run("ip", "link", "set", name, "master", BRIDGE, "up")
        run("ip", "-n", self.name, "address", "add", f"{address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            run("ip", "-n", self.name, "link", "set", link, "up")
        user, group = (int(part) for part in wanted["user"].split(":"))
        shm = ["nosuid", "noexec", "nodev", "mode=1777", f"size={wanted.get('shm_size', '64m')}"]
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": shm},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ]
        binds = [f"{folder / 'hosts'}:/etc/hosts:ro", *wanted["volumes"]]
        for source, destination, how in (bind.split(":") for bind in binds):
            source = str((COMPOSE.parent / source).resolve())
            mounts.append({"destination": destination, "type": "bind", "source": source, "options": ["bind", how]})
        assert wanted["cap_drop"] == ["ALL"] and wanted["security_opt"] == ["no-new-privileges:true"], wanted
        namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
        namespaces.append({"type": "network", "path": f"/run/netns/{self.name}"})
        bundle = folder / name
        bundle.mkdir(exist_ok=True)
        (bundle / "config.json").write_text(json.dumps({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": user, "gid": group}, "cwd": "/", "noNewPrivileges": True, "capabilities": {},
                "args": image["Entrypoint"] + wanted["command"], "env": image.get("Env", []),
            },
            "root": {"path": images.do("mount", self.container), "readonly": wanted["read_only"]},
            "hostname": name, "mounts": mounts, "linux": {"namespaces": namespaces},
        }))
        self.log = open(bundle / "log", "w")
        command = ["crun", "--cgroup-manager=disabled", "run", "--bundle", bundle, self.name]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)

    def stop(self) -> int:
        run("crun", "kill", self.name, "TERM")
        return self.process.wait(50)

    def leave(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        subprocess.run(["crun", "delete", "--force", self.name], stderr=subprocess.DEVNULL)
        run("ip", "netns", "delete", self.name)
        self.images.do("rm", self.container)


def ask(url: str, body: dict | None = None) -> tuple[str, dict]:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode(), dict(answer.headers)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def compose(images: Images, folder: Path) -> None:
    print("=== compose.yaml", flush=True)
    wanted = yaml.safe_load(COMPOSE.read_text())["services"]
    addresses = {name: f"10.78.0.{10 + at}" for at, name in enumerate(wanted)}
    hosts = [f"{address} {name}\n" for name, address in addresses.items()]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    services: list[Service] = []
    try:
        run("ip", "address", "add", "10.78.0.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        for name, service in wanted.items():
            services.append(Service(images, folder, name, service, addresses[name]))
        front = f"http://{addresses['coordinator']}:8000"
        assert ask(f"{front}/ready")[0].strip() == "ready"
        prompt = {"model": "baton-sim", "prompt": "The baton passes", "max_tokens": 8}
        text, headers = ask(f"{front}/v1/completions", prompt)
        assert headers["x-baton-path"] == "disaggregated", headers
        print(f"  {headers['x-baton-prefill-worker']} to {headers['x-baton-decode-worker']}: "
              f"{json.loads(text)['choices'][0]['text']!r}")
        codes = {service.name: service.stop() for service in services}
        assert not any(codes.values()), codes
        print(f"  {len(codes)} services ran, and ended well when they were told to")
    finally:
        for service in services:
            with contextlib.suppress(subprocess.CalledProcessError):
                service.leave()
        run("ip", "link", "delete", BRIDGE)


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    images = Images(folder)
    images.build()
    compose(images, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if "BATON_TRIES_IMAGES" not in os.environ:
        # crun wants version 2 of cgroups where it looks, which not every machine has there.
        with_cgroup2 = 'mount -t cgroup2 none /sys/fs/cgroup && BATON_TRIES_IMAGES=1 exec "$@"'
        os.execvp("unshare", ["unshare", "--mount", "sh", "-c", with_cgroup2, "sh", sys.executable, *sys.argv])
    main()
