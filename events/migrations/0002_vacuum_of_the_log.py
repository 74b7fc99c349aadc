"""PostgreSQL: the log is written at one end and pruned at the other, so its tables are vacuumed by amount, not by share.

The defaults wait until a fifth of the table is dead: of a log of fifty million events, ten million. Counted in rows the space of
what was pruned is used again soon. Such a vacuum is cheap: it visits the pages that changed, and leaves the indexes alone
until two percent of the pages wait for them (PostgreSQL 14 and later). ``vacuum_truncate = off``: giving pages back to the
system takes a lock that readers wait for, and the log will need them again. Other databases need none of this.
"""

from django.db import migrations

SETTINGS = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_insert_scale_factor": "0",
    "autovacuum_vacuum_insert_threshold": "50000",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "50000",
    "vacuum_truncate": "off",
    # Large data lives in a table beside it.
    "toast.autovacuum_vacuum_scale_factor": "0",
    "toast.autovacuum_vacuum_threshold": "5000",
    "toast.vacuum_truncate": "off",
}


def set_all(apps, schema_editor):
    if schema_editor.connection.vendor == "postgresql":
        words = ", ".join(f"{name} = {value}" for name, value in SETTINGS.items())
        schema_editor.execute(f"ALTER TABLE events_event SET ({words})")


def reset_all(apps, schema_editor):
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute(f"ALTER TABLE events_event RESET ({', '.join(SETTINGS)})")


class Migration(migrations.Migration):

    dependencies = [("events", "0001_initial")]

    operations = [migrations.RunPython(set_all, reset_all, elidable=False)]
