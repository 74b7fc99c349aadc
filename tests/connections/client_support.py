"""What the tests of clients share: logins of people, and clients as their streams would make them."""

from __future__ import annotations

import uuid
from typing import Any

from django.contrib.auth.models import User
from django.test import Client as Web

from connections.access import of_user
from events import clients
from events.clients import Arrival, Caller, Welcome
from events.models import Claim, Client


def new_cid() -> str:
    return f"cid-{uuid.uuid4()}"


class Login:
    """Somebody signed in, in one browser: ``web`` sends requests, :meth:`come` opens a stream."""

    def __init__(self, user: User, *, csrf: bool = False) -> None:
        self.user = user
        self.web = Web(enforce_csrf_checks=csrf)
        self.web.force_login(user)
        principal = of_user(user, session_key=self.web.session.session_key)
        self.caller = Caller(owner_id=user.pk, binding=principal.binding, who=principal.name)

    def come(self, cid: str | None = None, *, page: str = "page-0001", **more: Any) -> Welcome:
        found = clients.connect(
            [Arrival(caller=self.caller, cid=cid or new_cid(), page=page, process="here/1/1", **more)]
        )[0]
        assert isinstance(found, Welcome)
        return found

    def post(self, cid: str, what: str, body: Any, **headers: Any) -> Any:
        return self.web.post(f"/api/clients/{cid}/{what}", body, content_type="application/json", **headers)

    def claim(self, cid: str, subject: str, **more: Any) -> Any:
        return self.post(cid, "claims", {"subject": subject, **more})

    def let_go(self, cid: str, subject: str) -> Any:
        return self.web.delete(f"/api/clients/{cid}/claims/{subject}")


def row_of(welcome: Welcome) -> Client:
    return Client.objects.get(pk=welcome.pk)


def holder_of(subject: str) -> str | None:
    """Whose client handles a subject."""
    client = Claim.objects.get(subject=subject).client
    return client.who if client else None
