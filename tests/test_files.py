"""Files are whole or absent, and nothing that exists is lost."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch

from lape_fast.errors import FileExistsAlreadyError, FileFormatError
from lape_fast.files import (
    atomic_folder,
    atomic_path,
    read_json,
    read_metadata,
    read_tensors,
    write_bytes,
    write_tensors,
    write_text,
)


def test_an_error_while_writing_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(OSError, match="No space left"), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """A real limit: the process may not write a file of more than 4 KiB."""
    path = tmp_path / "file"
    write_text(path, "old")
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from lape_fast.files import write_bytes\n"
        "try: write_bytes(sys.argv[1], b'x' * 100000)\n"
        "except OSError as error: print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "File too large"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_kill_while_writing_leaves_the_old_file_readable(tmp_path):
    path = tmp_path / "file.safetensors"
    write_tensors(path, "counts", {"x": torch.zeros(3)}, {})
    code = (
        "import sys, torch\nfrom lape_fast.files import write_tensors\n"
        "big = torch.zeros(4_000_000)\nprint('ready', flush=True)\n"
        "while True: write_tensors(sys.argv[1], 'counts', {'x': big}, {})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    for _ in range(5):
        time.sleep(0.05)
        tensors, _metadata = read_tensors(path, "counts")
        assert len(tensors["x"]) in (3, 4_000_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    tensors, _metadata = read_tensors(path, "counts")
    assert len(tensors["x"]) in (3, 4_000_000)


def test_files_get_the_permissions_that_open_would_give(tmp_path):
    write_bytes(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(FileExistsAlreadyError, match="exists already"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_tensors_and_metadata_survive_a_round_trip(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.randn(3, 4).T}
    metadata = {"languages": ["mlt_Latn", "ქართული"], "nested": {"x": 1.5, "none": None}}
    write_tensors(tmp_path / "f", "counts", tensors, metadata)
    read, found = read_tensors(tmp_path / "f", "counts")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert {name: found[name] for name in metadata} == metadata


def test_files_of_another_kind_or_broken_ones_are_named(tmp_path):
    path = tmp_path / "f"
    write_tensors(path, "counts", {"a": torch.zeros(1)}, {})
    with pytest.raises(FileFormatError, match="holds 'counts' where a file of 'neurons'"):
        read_tensors(path, "neurons")
    content = path.read_bytes()
    for broken in (b"", content[:7], content[:-1], b"\xff" * 64, content + b"x"):
        path.write_bytes(broken)
        with pytest.raises(FileFormatError, match="not a complete safetensors file"):
            read_metadata(path)
    with pytest.raises(FileFormatError, match="does not exist"):
        read_metadata(tmp_path / "missing")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FileFormatError, match="not written by lape_fast"):
        read_metadata(path)
    write_tensors(path, "counts", {}, {"schema_version": 99})
    with pytest.raises(FileFormatError, match="schema version 99"):
        read_metadata(path)


def test_json_that_is_none_is_named(tmp_path):
    (tmp_path / "f.json").write_text("{half")
    with pytest.raises(FileFormatError, match="not valid JSON"):
        read_json(tmp_path / "f.json")
