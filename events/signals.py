"""The one signal by which a verb tells what it changed: ``status_changed.send(sender, changes=[Change(...)])``."""

from django.dispatch import Signal

#: Sent inside the transaction of the change. Receivers may raise: then the change does not happen either.
status_changed = Signal()
