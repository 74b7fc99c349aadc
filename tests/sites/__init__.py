"""Web sites to log in to: real HTTP on the loopback address, one scenario per path prefix. See app.py."""

from tests.sites.app import (
    CHOSEN_ORGANISATION,
    EMAIL,
    EMAIL_CODE,
    OUTSIDER,
    OUTSIDER_PASSWORD,
    PASSWORD,
    SCENARIOS,
    SMS_CODE,
    TOTP_SECRET,
    USERNAME,
    Logged,
    Site,
)

__all__ = [
    "CHOSEN_ORGANISATION",
    "EMAIL",
    "EMAIL_CODE",
    "OUTSIDER",
    "OUTSIDER_PASSWORD",
    "PASSWORD",
    "SCENARIOS",
    "SMS_CODE",
    "TOTP_SECRET",
    "USERNAME",
    "Logged",
    "Site",
]
