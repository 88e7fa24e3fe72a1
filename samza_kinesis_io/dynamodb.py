"""The way to DynamoDB: the two kinds of table that checkpoints need, as narrow protocols, and both on boto3.

Beside client.py the only file that knows boto3. Items travel in the service's own form, {"S": "text"} and {"N": "12"}:
a sequence number has 56 digits, more than the 38 that boto3's friendlier interface can hold as a number.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import boto3
import botocore.config
import botocore.exceptions

from samza_kinesis_io.errors import CheckpointError

Item = dict[str, dict[str, Any]]

#: BatchWriteItem: "up to 25 item put or delete operations".
_MAX_BATCH_WRITES: Final = 25


class LeaseTable(Protocol):
    """A table whose hash key is the string `leaseKey`. Reads are strongly consistent."""

    def scan(self) -> list[Item]:
        """Return every item; none if there is no table."""
        ...

    def get(self, lease_key: str) -> Item | None: ...

    def put_if_absent(self, item: Item) -> bool:
        """Add an item, and the table if need be. False: there is one of this key already."""
        ...

    def update(
        self, lease_key: str, values: Item, remove: Sequence[str], expected: Mapping[str, dict[str, Any] | None]
    ) -> bool:
        """Set and remove attributes if the item is as `expected` (None: has no such attribute). False: it is not."""
        ...


class StateTable(Protocol):
    """A table with the string `task` as hash key and the binary `key` as range key."""

    def query(self, task: str) -> dict[bytes, bytes]: ...

    def write(self, task: str, changes: Mapping[bytes, bytes | None]) -> None:
        """Put and (None) delete. Not atomic as a whole; doing it again does no harm."""
        ...


@dataclass(frozen=True, slots=True)
class DynamoDBConfig:
    """Where DynamoDB is. What is None comes from AWS's usual chain and environment (AWS_ENDPOINT_URL_DYNAMODB too)."""

    region: str | None = None
    endpoint_url: str | None = None
    profile: str | None = None

    def lease_table(self, table: str) -> Boto3LeaseTable:
        return Boto3LeaseTable(self._client(), table)

    def state_table(self, table: str) -> Boto3StateTable:
        return Boto3StateTable(self._client(), table)

    def _client(self) -> Any:
        session = boto3.session.Session(profile_name=self.profile, region_name=self.region)
        return session.client(
            "dynamodb",
            endpoint_url=self.endpoint_url,
            config=botocore.config.Config(
                retries={"mode": "standard", "max_attempts": 8}, connect_timeout=5, read_timeout=10
            ),
        )


def _code(error: botocore.exceptions.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


class _Table:
    """What both tables share: their client, their creation, and errors that name them."""

    _keys: tuple[tuple[str, str, str], ...]

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self._name = name

    def _call(self, operation: str, **arguments: Any) -> Any:
        try:
            return getattr(self._client, operation)(TableName=self._name, **arguments)
        except botocore.exceptions.ClientError as error:
            if _code(error) in ("ResourceNotFoundException", "ConditionalCheckFailedException"):
                raise
            raise CheckpointError(f"{operation} on the DynamoDB table {self._name} failed: {error}") from error
        except botocore.exceptions.BotoCoreError as error:
            raise CheckpointError(f"{operation} on the DynamoDB table {self._name} failed: {error}") from error

    def _pages(self, operation: str, **arguments: Any) -> Iterable[Item]:
        while True:
            try:
                page = self._call(operation, ConsistentRead=True, **arguments)
            except botocore.exceptions.ClientError as error:
                if _code(error) != "ResourceNotFoundException":
                    raise
                return
            yield from page.get("Items", ())
            if not page.get("LastEvaluatedKey"):
                return
            arguments["ExclusiveStartKey"] = page["LastEvaluatedKey"]

    def _create(self) -> None:
        """Create the table, or wait for whoever else does."""
        try:
            self._client.create_table(
                TableName=self._name,
                KeySchema=[{"AttributeName": name, "KeyType": role} for name, role, _ in self._keys],
                AttributeDefinitions=[{"AttributeName": name, "AttributeType": kind} for name, _, kind in self._keys],
                BillingMode="PAY_PER_REQUEST",
            )
        except botocore.exceptions.ClientError as error:
            if _code(error) != "ResourceInUseException":
                raise CheckpointError(f"the DynamoDB table {self._name} cannot be created: {error}") from error
        deadline = time.monotonic() + 120
        while self._call("describe_table")["Table"]["TableStatus"] != "ACTIVE":
            if time.monotonic() > deadline:
                raise CheckpointError(f"the DynamoDB table {self._name} is not ACTIVE two minutes after its creation")
            time.sleep(0.2)

    def _write(self, operation: str, **arguments: Any) -> Any:
        try:
            return self._call(operation, **arguments)
        except botocore.exceptions.ClientError as error:
            if _code(error) != "ResourceNotFoundException":
                raise
        self._create()
        return self._call(operation, **arguments)


class Boto3LeaseTable(_Table):
    """`LeaseTable` on DynamoDB."""

    _keys = (("leaseKey", "HASH", "S"),)

    def scan(self) -> list[Item]:
        return list(self._pages("scan"))

    def get(self, lease_key: str) -> Item | None:
        try:
            item: Item | None = self._call("get_item", Key={"leaseKey": {"S": lease_key}}, ConsistentRead=True).get(
                "Item"
            )
        except botocore.exceptions.ClientError:
            return None
        return item

    def put_if_absent(self, item: Item) -> bool:
        try:
            self._write("put_item", Item=item, ConditionExpression="attribute_not_exists(leaseKey)")
        except botocore.exceptions.ClientError:
            return False
        return True

    def update(
        self, lease_key: str, values: Item, remove: Sequence[str], expected: Mapping[str, dict[str, Any] | None]
    ) -> bool:
        names = {f"#{i}": name for i, name in enumerate([*values, *remove, *expected])}
        by_name = {name: alias for alias, name in names.items()}
        bound = {f":v{by_name[n][1:]}": value for n, value in values.items()}
        sets = ", ".join(f"{by_name[n]} = :v{by_name[n][1:]}" for n in values)
        conditions = ["attribute_exists(leaseKey)"]
        for i, (name, value) in enumerate(expected.items()):
            if value is None:
                conditions.append(f"attribute_not_exists({by_name[name]})")
            else:
                conditions.append(f"{by_name[name]} = :e{i}")
                bound[f":e{i}"] = value
        expression = f"SET {sets}" + (f" REMOVE {', '.join(by_name[n] for n in remove)}" if remove else "")
        used = {alias: name for name, alias in by_name.items()}  # an attribute both set and expected has one alias
        try:
            self._call(
                "update_item",
                Key={"leaseKey": {"S": lease_key}},
                UpdateExpression=expression,
                ConditionExpression=" AND ".join(conditions),
                ExpressionAttributeNames=used,
                ExpressionAttributeValues=bound,
            )
        except botocore.exceptions.ClientError:
            return False  # another's write came first, or the row or the table is gone: the caller looks
        return True


class Boto3StateTable(_Table):
    """`StateTable` on DynamoDB."""

    _keys = (("task", "HASH", "S"), ("key", "RANGE", "B"))

    def query(self, task: str) -> dict[bytes, bytes]:
        found = self._pages(
            "query",
            KeyConditionExpression="#t = :t",
            ExpressionAttributeNames={"#t": "task"},
            ExpressionAttributeValues={":t": {"S": task}},
        )
        return {bytes(item["key"]["B"]): bytes(item["value"]["B"]) for item in found}

    def write(self, task: str, changes: Mapping[bytes, bytes | None]) -> None:
        requests: list[dict[str, Any]] = []
        for key, value in changes.items():
            keys: Item = {"task": {"S": task}, "key": {"B": key}}
            requests.append(
                {"DeleteRequest": {"Key": keys}}
                if value is None
                else {"PutRequest": {"Item": {**keys, "value": {"B": value}}}}
            )
        failures = 0
        created = False
        while requests:
            batch, requests = requests[:_MAX_BATCH_WRITES], requests[_MAX_BATCH_WRITES:]
            try:
                answer = self._client.batch_write_item(RequestItems={self._name: batch})
            except botocore.exceptions.ClientError as error:
                if _code(error) != "ResourceNotFoundException" or created:
                    raise CheckpointError(
                        f"batch_write_item on the DynamoDB table {self._name} failed: {error}"
                    ) from error
                self._create()
                created = True
                requests = batch + requests
                continue
            except botocore.exceptions.BotoCoreError as error:
                raise CheckpointError(f"batch_write_item on the DynamoDB table {self._name} failed: {error}") from error
            left = answer.get("UnprocessedItems", {}).get(self._name, [])
            if left:  # throttled: the service took a part only
                failures += 1
                if failures > 10:
                    raise CheckpointError(f"the DynamoDB table {self._name} is throttled: {len(left)} writes left over")
                time.sleep(min(2.0, 0.05 * 2**failures))
                requests = left + requests
