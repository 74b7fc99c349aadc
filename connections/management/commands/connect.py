"""``manage.py connect``"""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser

from connections import payloads, transitions
from connections.management.commands import _shared
from connections.models import Credential


class Command(_shared.SwitchboardCommand):
    help = "Make a connection: a profile that stays logged in to a web site. Log in with `manage.py login`."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("domain", help="the site: example.com, or 127.0.0.1:9000")
        parser.add_argument(
            "--profile", required=True, metavar="NAME", help="the profile; made when it is new"
        )
        parser.add_argument(
            "--login-url", default="", metavar="URL", help="where the login form is, if known"
        )
        parser.add_argument(
            "--allow",
            action="append",
            default=[],
            metavar="DOMAIN",
            help="let the login go to this domain and its subdomains only (repeatable; default: anywhere)",
        )
        parser.add_argument("--credential", metavar="NAME", help="a stored credential to log in with")
        parser.add_argument(
            "--no-save", action="store_true", help="do not keep the values that the login was made with"
        )
        parser.add_argument("--user", metavar="NAME", help="the owner (default: the first superuser)")
        self.add_json(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        user = _shared.owner(options["user"])
        credential = None
        if options["credential"]:
            credential = Credential.objects.filter(owner=user, name=options["credential"]).first()
            if credential is None:
                raise CommandError(f"{user.get_username()} has no credential {options['credential']!r}.")
        config = _shared.checked_config(
            {
                "domain": options["domain"],
                "profile_name": options["profile"],
                "login_url": options["login_url"],
                "allowed_domains": options["allow"],
                "save_credentials": not options["no_save"],
            }
        )
        domain, profile_name = config.pop("domain"), config.pop("profile_name")
        with _shared.said_plainly():
            row = transitions.create_connection(
                owner_id=user.pk,
                domain=domain,
                profile_name=profile_name,
                config={**config, "credential": credential},
                actor=self.actor,
                now=_shared.now(),
            )
        if options["json"]:
            self.print_json(payloads.managed_auth(row, None))
            return
        self.stdout.write(f"{row.id}   {row.domain} as {row.profile.name} (owner {user.get_username()})")
        self.stdout.write(f"Log in now:  manage.py login {row.id}")
