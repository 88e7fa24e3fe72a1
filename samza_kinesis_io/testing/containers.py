"""Emulators by other people, in containers: for tests against something that we did not write.

    with KinesisLocalContainer() as kinesis:
        client = boto3.client("kinesis", **kinesis.client_kwargs())
        records = p | ReadFromKinesis("flights", client=kinesis.client_config(), ...)

The images are built from the Dockerfiles beside this module when a container is started for the first time. Needs a
Docker daemon and `pip install 'samza-kinesis-io[containers]'`. What the emulators cannot do is in docs/testing.md.
"""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

try:
    from testcontainers.core.container import DockerContainer
    from testcontainers.core.image import DockerImage
except ImportError as error:
    raise ImportError(
        f"samza_kinesis_io.testing.containers needs testcontainers ({error}): "
        "pip install 'samza-kinesis-io[containers]'"
    ) from error

from samza_kinesis_io.client import ClientConfig

#: What the images are built on. Another one needs Node.js 20 or newer on its PATH, a shell, and npm unless it has the
#: emulators in /opt/emulators/node_modules.
BASE_IMAGE: Final = "node:20-slim"
_IMAGES: Final = Path(__file__).with_name("images")
_REGION: Final = "us-east-1"


class _EmulatorContainer(DockerContainer):
    _name_of_image: str
    _port: int

    def __init__(self, *, base_image: str = BASE_IMAGE, start_timeout_seconds: float = 60.0) -> None:
        self._base_image = base_image
        self._start_timeout_seconds = start_timeout_seconds
        self._context = _IMAGES / self._name_of_image
        # Another Dockerfile or another base is another image.
        recipe = (self._context / "Dockerfile").read_bytes() + base_image.encode()
        super().__init__(f"samza-kinesis-io/{self._name_of_image}:{hashlib.sha256(recipe).hexdigest()[:12]}")
        self.with_exposed_ports(self._port)

    def start(self) -> _EmulatorContainer:
        """Build the image, start it and wait until it answers. `with` does it for you.

        Raises:
            TimeoutError: it does not answer within `start_timeout_seconds`.
        """
        DockerImage(self._context, tag=self.image, clean_up=False, buildargs={"BASE_IMAGE": self._base_image}).build()
        super().start()
        deadline = time.monotonic() + self._start_timeout_seconds
        while not self._answers():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{self.image} does not answer at {self.endpoint_url} after {self._start_timeout_seconds:.0f} s; "
                    f"its log: {self.get_logs()}"
                )
            time.sleep(0.05)
        return self

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.endpoint_url, timeout=5).close()
        except urllib.error.HTTPError:
            return True  # any answer will do
        except OSError:
            return False
        return True

    @property
    def endpoint_url(self) -> str:
        return f"http://{self.get_container_host_ip()}:{self.get_exposed_port(self._port)}"

    def client_kwargs(self) -> dict[str, str]:
        """Return what boto3.client(...) needs to come here, whatever AWS settings this machine has."""
        return {
            "endpoint_url": self.endpoint_url,
            "region_name": _REGION,
            "aws_access_key_id": "test",
            "aws_secret_access_key": "test",
        }


class KinesisLocalContainer(_EmulatorContainer):
    """kinesis-local: all of Kinesis but its limits, expiry on demand and enhanced fan-out. Empty at each start.

    Slow beyond some thousand records in a stream.
    """

    _name_of_image = "kinesis-local"
    _port = 4568

    def client_config(self) -> ClientConfig:
        """Return what `client=` of the package's transforms takes; credentials come from AWS's chain, any will do."""
        return ClientConfig(region=_REGION, endpoint_url=self.endpoint_url)


class DynaliteContainer(_EmulatorContainer):
    """dynalite: DynamoDB, enough for checkpoints and KCL lease tables. Empty at each start."""

    _name_of_image = "dynalite"
    _port = 8000
