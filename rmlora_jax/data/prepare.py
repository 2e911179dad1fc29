"""``python -m rmlora_jax.data.prepare NAME [--data_dir=DIR]``: prepares a TFDS data set once.

CIFAR-10, CIFAR-100 and the tasks of GLUE need nothing else. Every other data set is prepared by
tensorflow-datasets' own code, which needs TensorFlow (``pip install 'rmlora-jax[prepare]'``);
training never does.
"""

import argparse
import contextlib
import importlib.util
import os
import queue
import signal
import socket
import sys
import threading
import urllib.parse
import urllib.request
from pathlib import Path

from rmlora_jax import extras
from rmlora_jax.data.dataset import Request
from rmlora_jax.data.sources import SOURCES
from rmlora_jax.data.tfds_folder import Name, data_dir_of, import_tfds, not_prepared, prepared
from rmlora_jax.errors import UserError
from rmlora_jax.stopping import ask


def prepare(text: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Prepares ``text`` (``name[/config][:version]``) in ``data_dir``; returns its folder.

    Raises:
      UserError: TensorFlow, the data set or the network is missing.
    """
    request = Request(text, data_dir)
    name, data_dir = Name.parse(text), data_dir_of(request)
    for source in SOURCES:
        if source.prepare and source.handles(request):
            return prepared(request, source.prepare)
    tfds = import_tfds()
    if name.name not in tfds.list_builders(with_community_datasets=False):
        raise not_prepared(text, name, data_dir)
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            f"preparing {text} needs TensorFlow, once: type\n{extras.install('prepare')}"
        )
    builder = tfds.builder(text, data_dir=str(data_dir), file_format="array_record")
    folder = Path(builder.data_dir)
    if not (folder / "features.json").exists():
        _check_network(builder.url_infos or {})
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return folder


def _check_network(urls) -> None:
    """Raises a UserError within seconds for hosts that TFDS would try for minutes."""
    hosts = {urllib.parse.urlsplit(url).netloc for url in urls} - {""}
    if not hosts or urllib.request.getproxies():
        return
    reached = queue.SimpleQueue()

    def knock(host: str):
        address, _, port = host.rpartition("@")[2].partition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((address, int(port or 443)), timeout=3).close()
            reached.put(True)

    for host in hosts:
        threading.Thread(target=knock, args=(host,), daemon=True).start()
    try:
        reached.get(timeout=4)
    except queue.Empty:
        raise UserError(
            f"no network: {', '.join(sorted(hosts))} cannot be reached\n"
            "Prepare it on a machine with internet, copy its folder, and name the folder above it "
            "with --config.data.data_dir"
        ) from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rmlora_jax.data.prepare", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("name", help="such as cifar100, glue/cola, beans")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    given = parser.parse_args(arguments)
    try:
        print(prepare(given.name, given.data_dir))
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda number, _: ask(number))
    sys.exit(main())
