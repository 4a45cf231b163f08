import os
import subprocess
import sys

import pytest

from faults.runs import Runner, make_place


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder that has networks, images, activations and a pair."""
    return make_place(tmp_path_factory.mktemp("faults") / "place")


@pytest.fixture(scope="session")
def runner(place):
    """Starts commands there."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        pytest.skip("processes are forked here, which is safe on Linux alone")
    with Runner(place, place.parent) as runner:
        runner.ready()
        yield runner


class Disk:
    """A file system in memory, of a size that can be changed."""

    def __init__(self, path):
        self.path = path
        self.mounted = False

    def mount(self, kib):
        self._call("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", self.path)
        self.mounted = True

    def resize(self, kib):
        self._call("mount", "-o", f"remount,size={kib}k", self.path)

    def free(self, kib):
        """Let so much be free."""
        used = sum(file.stat().st_blocks for file in self.path.rglob("*")) // 2
        self.resize(used + kib)

    def read_only(self):
        self._call("mount", "-o", "remount,ro", self.path)

    def unmount(self):
        if self.mounted:
            self._call("umount", "--lazy", self.path)

    @staticmethod
    def _call(*command):
        subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path):
    """A small disk, which is unmounted whatever happens."""
    path = tmp_path / "disk"
    path.mkdir()
    disk = Disk(path)
    try:
        disk.mount(4096)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here, which takes root: {getattr(error, 'stderr', '') or error}")
    try:
        yield disk
    finally:
        disk.unmount()
