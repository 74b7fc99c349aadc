"""The domain's rows: fields, constraints, predicates, querysets. Statuses are written by the verbs alone."""

from connections.models.auth import (
    Credential,
    HealthCheck,
    LoginFlow,
    ManagedAuthConnection,
    Profile,
    SiteCircuit,
    Submission,
)
from connections.models.base import (
    OPERATE,
    RUN_COMMANDS,
    Caller,
    Owned,
    OwnedQuerySet,
    check_id,
    connection_id,
    credential_id,
    delivery_id,
    flow_id,
    new_id,
    profile_id,
    task_id,
)
from connections.models.callers import ApiKey, IdempotentAnswer
from connections.models.work import Capacity, HookDelivery, Task, TaskInput, TaskOutput

__all__ = [
    "OPERATE",
    "RUN_COMMANDS",
    "ApiKey",
    "Caller",
    "Capacity",
    "Credential",
    "HealthCheck",
    "HookDelivery",
    "IdempotentAnswer",
    "LoginFlow",
    "ManagedAuthConnection",
    "Owned",
    "OwnedQuerySet",
    "Profile",
    "SiteCircuit",
    "Submission",
    "Task",
    "TaskInput",
    "TaskOutput",
    "check_id",
    "connection_id",
    "credential_id",
    "delivery_id",
    "flow_id",
    "new_id",
    "profile_id",
    "task_id",
]
