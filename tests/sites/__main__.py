"""Run the test sites by hand: ``python -m tests.sites --port 9000``. Sign in with what it prints."""

from __future__ import annotations

import argparse
import threading

from tests.sites.app import EMAIL, PASSWORD, SCENARIOS, SMS_CODE, TOTP_SECRET, USERNAME, Site


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--port", type=int, default=9000, help="port on 127.0.0.1 (the identity provider takes the next)"
    )
    parser.add_argument("--slow", type=float, default=1.0, help="seconds that the slow scenario takes")
    arguments = parser.parse_args()
    with (
        Site(port=arguments.port + 1) as provider,
        Site(port=arguments.port, identity_provider=provider, slow_seconds=arguments.slow) as site,
    ):
        print(f"user name {USERNAME}   e-mail {EMAIL}   password {PASSWORD}")
        print(f"text message code {SMS_CODE}   authenticator secret {TOTP_SECRET}")
        print(
            f"approve on the phone: {site.url('/external/approve')}   end all sessions: "
            f"{site.url('/control/expire')}"
        )
        for name, about in SCENARIOS.items():
            print(f"  {site.url(f'/{name}/login'):<44} {about}")
        print("Ctrl-C ends it.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
