"""CIFAR from a local web server, in archives of the official layout with few images."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import multiprocessing
import socket
import tarfile
import threading
import time

import numpy as np
import pytest

from rmlora_jax.data import cifar, load_images
from rmlora_jax.data.cifar import ARCHIVES, prepare_cifar
from rmlora_jax.errors import UserError

IMAGES = 4


def tiny(name, extra=(), omit=(), resize=None):
    """(description, archive bytes, {split: (labels, images)}) with IMAGES images a member."""
    real = ARCHIVES[name]
    archive = dataclasses.replace(
        real,
        train=tuple((file, IMAGES) for file, _ in real.train),
        test=tuple((file, IMAGES) for file, _ in real.test),
    )
    rng = np.random.RandomState(0)
    members, truth = {}, {}
    for split, files in (("train", archive.train), ("test", archive.test)):
        labels, images = [], []
        for file, _ in files:
            label = np.stack([rng.randint(0, n, IMAGES) for _, _, n in archive.labels], 1)
            image = rng.randint(0, 256, (IMAGES, 32, 32, 3))
            planes = np.stack([image[..., c].reshape(IMAGES, 1024) for c in range(3)], 1)
            rows = np.concatenate([label, planes.reshape(IMAGES, 3072)], 1).astype(np.uint8)
            members[file] = rows.tobytes()
            labels.append(label)
            images.append(image.astype(np.uint8))
        truth[split] = np.concatenate(labels), np.concatenate(images)
    for _, file, n in archive.labels:
        members[file] = "".join(f"{file}_{i}\n" for i in range(n)).encode() + b"\n"
    if resize:
        members[resize] = members[resize][:-1]
    official = ((f"{archive.folder}/{file}", content) for file, content in members.items())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in (*extra, *official):
            if member.rpartition("/")[2] in omit:
                continue
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    raw = buffer.getvalue()
    described = dataclasses.replace(
        archive, size=len(raw), sha256=hashlib.sha256(raw).hexdigest()
    )
    return described, raw, truth


@contextlib.contextmanager
def server(content, status=200, length=None, delay=0.0):
    """Base URL of a server that answers every request with ``content``; counts the requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            time.sleep(delay)
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/kriz", requests
    finally:
        running.shutdown()
        running.server_close()


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def leftovers(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_descriptions_are_of_the_published_files():
    # From https://www.cs.toronto.edu/~kriz/cifar.html and TFDS's own record of the archives.
    from tensorflow_datasets.image_classification import cifar as theirs

    for name, their in (("cifar10", theirs.Cifar10), ("cifar100", theirs.Cifar100)):
        (url, known), *_ = their.url_infos.items()
        mine = ARCHIVES[name]
        assert (f"{cifar.URL}/{mine.file}", mine.sha256, mine.size) == (
            url,
            known.checksum,
            known.size,
        )
    for archive in ARCHIVES.values():
        assert sum(n for _, n in archive.train) == 50_000
        assert sum(n for _, n in archive.test) == 10_000


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_fetched_prepared_and_read_by_tfds(name, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    archive, raw, truth = tiny(name, extra=[("../../evil", b"x"), ("other/test.bin", b"y" * 99999)])
    monkeypatch.setitem(ARCHIVES, name, archive)
    with server(raw) as (url, requests):
        monkeypatch.setenv(cifar.URL_VARIABLE, url + "/")
        data = load_images(name, data_dir=tmp_path, validation=2)
        assert requests == [f"/kriz/{archive.file}"]
        load_images(name, data_dir=tmp_path, validation=2)
        assert len(requests) == 1  # the second finds it prepared

    total = len(truth["train"][0])
    assert (len(data.train), len(data.validation), len(data.test)) == (total - 2, 2, IMAGES)
    assert data.image_shape == (32, 32, 3) and data.num_classes == archive.labels[-1][2]
    assert data.class_names[1] == f"{archive.labels[-1][1]}_1"
    for split, (labels, images) in truth.items():
        rows = tfds.data_source(name, split=split, data_dir=str(tmp_path))
        assert len(rows) == len(labels)
        ids = [row["id"].decode() for row in rows]
        assert sorted(ids) == [f"{split}_{i:05d}" for i in range(len(labels))]
        for row, number in zip(rows, (int(i[-5:]) for i in ids), strict=True):
            np.testing.assert_array_equal(row["image"], images[number])
            assert [row[f] for f, _, _ in archive.labels] == labels[number].tolist()
    kept = [p for p in leftovers(tmp_path) if not p.startswith(f"{name}/3.0.2/")]
    assert kept == [name, f"{name}/3.0.2"]
    assert not (tmp_path.parent / "evil").exists()


def test_an_archive_put_into_downloads_needs_no_network(tmp_path):
    archive, raw, _ = tiny("cifar100")
    (tmp_path / "downloads").mkdir()
    given = tmp_path / "downloads" / archive.file
    given.write_bytes(raw)
    folder = prepare_cifar(archive, tmp_path, base_url="http://127.0.0.1:1")
    assert (folder / "features.json").exists() and given.exists()


def test_a_wrong_archive_in_downloads_is_named(tmp_path):
    archive, raw, _ = tiny("cifar100")
    (tmp_path / "downloads").mkdir()
    given = tmp_path / "downloads" / archive.file
    given.write_bytes(raw[:-1] + b"?")
    with pytest.raises(UserError, match="SHA-256") as error:
        prepare_cifar(archive, tmp_path)
    assert str(given) in str(error.value)


def fails(archive, tmp_path, url, match):
    with pytest.raises(UserError, match=match) as error:
        prepare_cifar(archive, tmp_path, base_url=url)
    assert len(str(error.value).splitlines()) <= 2
    assert leftovers(tmp_path) == []
    return str(error.value)


def test_wrong_checksum(tmp_path):
    archive, raw, _ = tiny("cifar100")
    with server(raw[:-9] + b"corrupted") as (url, requests):
        fails(archive, tmp_path, url, "not the expected file")
        assert len(requests) == 1


def test_too_long_a_file_is_not_read_to_its_end(tmp_path):
    archive, raw, _ = tiny("cifar100")
    with server(raw + b"x" * 1000) as (url, _):
        fails(archive, tmp_path, url, "not the expected file")


@pytest.mark.parametrize("announced", [True, False])
def test_truncated(tmp_path, announced):
    archive, raw, _ = tiny("cifar100")
    half = raw[: len(raw) // 2]
    with server(half, length=len(half) if announced else len(raw)) as (url, _):
        fails(archive, tmp_path, url, f"cut short: {len(half)} of {len(raw)} bytes|IncompleteRead")


def test_a_refusal_says_where_to_put_the_file(tmp_path):
    archive, _, _ = tiny("cifar100")
    with server(b"no", status=403) as (url, requests):
        said = fails(archive, tmp_path, url, "the server answers 403 Forbidden")
        assert len(requests) == 1
    assert f"put {archive.file} into {tmp_path / 'downloads'}" in said
    assert "--config.data.data_dir=DIR" in said


def test_no_server(tmp_path):
    archive, _, _ = tiny("cifar100")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = fails(archive, tmp_path, f"http://127.0.0.1:{port}", "refused")
    assert "downloads" in said


def test_a_silent_server_is_left_within_seconds(tmp_path):
    archive, raw, _ = tiny("cifar100")
    with server(raw, delay=8) as (url, _):
        fails(archive, tmp_path, url, "no answer within 4 s")


def test_a_name_that_does_not_resolve_and_an_address_that_is_none(tmp_path):
    archive, _, _ = tiny("cifar100")
    fails(archive, tmp_path, "http://nowhere.invalid", "cannot fetch http://nowhere.invalid/")
    fails(archive, tmp_path, "nowhere", "not a web address")


@pytest.mark.parametrize(
    ("made", "match"),
    [
        ({"omit": ("test.bin",)}, "no member cifar-100-binary/test.bin"),
        ({"omit": ("fine_label_names.txt",)}, "no member cifar-100-binary/fine_label_names"),
        ({"resize": "train.bin"}, "train.bin has 12295 bytes, not 12296"),
        ({"extra": [("cifar-100-binary/train.bin", b"x" * 99999)]}, "not a file of 12296 bytes"),
    ],
)
def test_archives_of_another_layout(tmp_path, made, match):
    archive, raw, _ = tiny("cifar100", **made)
    with server(raw) as (url, _):
        fails(archive, tmp_path, url, match)


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    archive, raw, _ = tiny("cifar100")

    def full(image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cifar.Image, "fromarray", full)
    with server(raw) as (url, _):
        fails(archive, tmp_path, url, "No space left on device")


def test_a_folder_that_cannot_be_made(tmp_path):
    archive, _, _ = tiny("cifar100")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        prepare_cifar(archive, tmp_path / "file" / "data")


def test_half_a_folder_is_not_taken_for_whole(tmp_path):
    archive, raw, _ = tiny("cifar100")
    broken = tmp_path / "cifar100" / "3.0.2"
    broken.mkdir(parents=True)
    (broken / "cifar100-train.array_record-00000-of-00001").write_bytes(b"half")
    with server(raw) as (url, _), pytest.raises(UserError, match="not whole: delete it"):
        prepare_cifar(archive, tmp_path, base_url=url)


def _prepare(archive, folder, url, barrier, results):
    barrier.wait()
    results.put(str(prepare_cifar(archive, folder, base_url=url)))


def test_two_processes_at_once_both_find_a_whole_one(tmp_path):
    archive, raw, truth = tiny("cifar100")
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    with server(raw) as (url, requests):
        both = [
            context.Process(target=_prepare, args=(archive, tmp_path, url, barrier, results))
            for _ in range(2)
        ]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
        assert [p.exitcode for p in both] == [0, 0]
        assert len(requests) == 2
    assert results.get() == results.get() == str(tmp_path / "cifar100" / "3.0.2")
    data = load_images("cifar100", data_dir=tmp_path, validation=1)
    assert len(data.train) == IMAGES - 1
    expected = {i.tobytes() for i in truth["test"][1]}
    assert {data.test[i]["image"].tobytes() for i in range(IMAGES)} == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar100"]
