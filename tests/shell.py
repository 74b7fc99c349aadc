"""``python -m tests.shell``: runs scripts in an installation as ``manage.py shell -c`` does, one after the other, and starts Django once for all.

One JSON string per line comes in; for each one goes out: ``[what it printed, its traceback or ""]``. See ``Running.shell`` in tests/conftest.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback

import django


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    django.setup()
    from django.db import connections  # noqa: PLC0415 (needs the settings)

    for line in sys.stdin:
        printed, error = io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(printed):
                exec(json.loads(line), {"__name__": "__main__"})
        except Exception:
            error = traceback.format_exc()
        finally:
            # Between scripts it is as if there were none: no connection, no lock.
            for each in connections.all(initialized_only=True):
                each.close()
                if each.vendor == "postgresql":
                    each.close_pool()
        print(json.dumps([printed.getvalue(), error]), flush=True)


if __name__ == "__main__":
    main()
