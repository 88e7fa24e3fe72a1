"""The way to AWS Glue Schema Registry, on boto3."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import boto3
import botocore.config
import botocore.exceptions

from samza_kinesis_io.transforms.avro_schemas import UnknownSchema


@dataclass(frozen=True, slots=True)
class GlueSchemaRegistry:
    """A registry. What is None comes from AWS's usual chain and environment (AWS_ENDPOINT_URL_GLUE too), on the worker.

    Throttled calls are tried again, with back-off, for some ten seconds. Reading needs glue:GetSchemaVersion,
    writing glue:GetSchemaByDefinition.

    Attributes:
        registry_name: Where a writer's `schema_name` is looked up; reading goes by version ids alone.
    """

    registry_name: str = "default-registry"
    region: str | None = None
    endpoint_url: str | None = None
    profile: str | None = None

    def definition(self, version_id: uuid.UUID) -> str:
        try:
            answer = self._client().get_schema_version(SchemaVersionId=str(version_id))
        except botocore.exceptions.ClientError as error:
            if _is_not_found(error):
                raise UnknownSchema(f"no schema version {version_id}") from error
            raise
        if answer.get("DataFormat", "AVRO") != "AVRO":
            raise UnknownSchema(f"schema version {version_id} is {answer['DataFormat']}, not AVRO")
        return str(answer["SchemaDefinition"])

    def version_id(self, schema_name: str, definition: str) -> uuid.UUID:
        try:
            answer = self._client().get_schema_by_definition(
                SchemaId={"RegistryName": self.registry_name, "SchemaName": schema_name}, SchemaDefinition=definition
            )
        except botocore.exceptions.ClientError as error:
            if _is_not_found(error):
                raise UnknownSchema(
                    f"no version of schema {schema_name} in registry {self.registry_name} has this definition; "
                    f"register it first (aws glue register-schema-version), or give its schema_version_id: {definition}"
                ) from error
            raise
        return uuid.UUID(answer["SchemaVersionId"])

    def _client(self) -> Any:
        # Made anew for each of a handful of calls: a client kept would have to survive forks.
        session = boto3.session.Session(profile_name=self.profile, region_name=self.region)
        return session.client(
            "glue",
            endpoint_url=self.endpoint_url,
            config=botocore.config.Config(
                retries={"mode": "standard", "total_max_attempts": 6}, connect_timeout=5, read_timeout=10
            ),
        )


def _is_not_found(error: botocore.exceptions.ClientError) -> bool:
    return error.response.get("Error", {}).get("Code") == "EntityNotFoundException"
