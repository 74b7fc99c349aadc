"""Who is asking, and what they may see and do. Every view, command and stream starts from a :class:`Principal`.

Everybody sees and acts on their own objects. Members of a common Django group are a team: they see each other's
objects, and act on them with the permission ``connections.operate_managedauthconnection``, given to the group (for its members) or to the user.
Running commands, and typing into those that run, needs ``connections.run_commands`` besides. Superusers see and do everything. A key may do
what its owner may. A session token (hosted page) is bound to one connection and one flow, and nothing else exists for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.models import AbstractBaseUser, AnonymousUser

from connections.models import OPERATE, RUN_COMMANDS, ApiKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Principal:
    """``audiences``: keys of the owners whose objects are visible; None: all. ``name`` is what logs and pages show.

    ``key`` names the caller for quotas and idempotency: ``user:1``, ``key:7``, ``page:flow_…``. ``binding`` says which login session or
    key was used: ``session:<hash>``, ``key:7``; empty for pages and the system.
    """

    key: str
    name: str
    user_id: int | None
    audiences: frozenset[int] | None
    operates: frozenset[int] | None
    api_key: ApiKey | None = None
    connection_id: str | None = None
    flow_id: str | None = None
    binding: str = ""
    #: Whether they may run commands, and type into those that run. It is as much as having the account of the workers on their machine.
    runs_commands: bool = False

    # What DRF expects of ``request.user``.
    is_authenticated = True
    is_active = True

    @property
    def pk(self) -> int | None:
        return self.user_id

    @property
    def is_page(self) -> bool:
        """Whether this is the session token of a hosted page."""
        return self.flow_id is not None

    def may_operate(self, owner_id: int) -> bool:
        return self.operates is None or owner_id in self.operates


def _members(groups: Any, user: Any) -> frozenset[int]:
    """The keys of everybody in these groups, and the user's own."""
    return frozenset(get_user_model().objects.filter(groups__in=groups).values_list("pk", flat=True)) | {
        user.pk
    }


def _bound(api_key: ApiKey | None, session_key: str | None) -> str:
    """Which login this is. A session's key opens the session, so its hash stands for it."""
    if api_key is not None:
        return f"key:{api_key.pk}"
    return f"session:{hashlib.sha256(session_key.encode()).hexdigest()[:32]}" if session_key else ""


def of_user(
    user: Any, *, api_key: ApiKey | None = None, actor: str | None = None, session_key: str | None = None
) -> Principal:
    """The principal of a signed-in user, or of a key that belongs to one."""
    key = f"key:{api_key.pk}" if api_key else f"user:{user.pk}"
    name = actor or (f'API key "{api_key.name}"' if api_key else user.get_username())
    bound = _bound(api_key, session_key)
    if user.is_superuser:
        return Principal(
            key=key, name=name, user_id=user.pk, audiences=None, operates=None, api_key=api_key, binding=bound,
            runs_commands=True,
        )  # fmt: skip
    team = _members(user.groups.all(), user)
    # Given to the user, the permission holds for every team; given to a group, for that group's members.
    if OPERATE in user.get_user_permissions():
        operates = team
    else:
        app_label, codename = OPERATE.split(".")
        granting = user.groups.filter(
            permissions__codename=codename, permissions__content_type__app_label=app_label
        )
        operates = _members(granting, user)
    return Principal(
        key=key, name=name, user_id=user.pk, audiences=team, operates=operates, api_key=api_key, binding=bound,
        runs_commands=user.has_perm(RUN_COMMANDS),
    )  # fmt: skip


def of_page(*, owner_id: int, connection_id: str, flow_id: str) -> Principal:
    """The principal of a hosted page: one flow of one connection."""
    owners = frozenset({owner_id})
    return Principal(
        key=f"page:{flow_id}",
        name="hosted page",
        user_id=None,
        audiences=owners,
        operates=owners,
        connection_id=connection_id,
        flow_id=flow_id,
    )


def of_system(name: str) -> Principal:
    """The server itself: commands run by whoever may run them on this machine, sweeps, workers."""
    return Principal(
        key=f"system:{name}", name=name, user_id=None, audiences=None, operates=None, runs_commands=True
    )


def of_request_user(
    user: AbstractBaseUser | AnonymousUser, session_key: str | None = None
) -> Principal | None:
    """The principal of a session, or None when nobody is signed in."""
    return of_user(user, session_key=session_key) if user.is_authenticated else None


def worker_name(principal: Principal, name: str) -> str:
    """The name under which a program of this caller holds a task: nobody else can come with it. ``name`` is what the program calls itself."""
    return f"{principal.key}/{name}"


def is_page_of(principal: Principal, claimed: str | None) -> bool:
    """Whether a page that says whose it is (``X-Page-User``) is the caller's: another tab may have signed somebody else in."""
    return not claimed or claimed == principal.key


class NotFound(Exception):
    """There is no such object for this caller: foreign and unknown ids look alike."""


class Forbidden(Exception):
    """The caller may look at the object and no more."""


def visible(principal: Principal, queryset: Any, pk: str) -> Any:
    """The row, if the caller may see it. A page's token sees its own connection alone.

    :raises NotFound: otherwise.
    """
    # PostgreSQL refuses to be asked for text with a NUL in it.
    if (principal.is_page and principal.connection_id != pk) or "\0" in pk:
        raise NotFound(pk)
    row = queryset.visible_to(principal).filter(pk=pk).first()
    if row is None:
        raise NotFound(pk)
    return row


def operable(principal: Principal, queryset: Any, pk: str) -> Any:
    """As :func:`visible`, for somebody who wants to change it.

    :raises Forbidden: when the caller may only look.
    """
    row = visible(principal, queryset, pk)
    if not principal.may_operate(row.owner_id):
        raise Forbidden(pk)
    return row
