"""Login drivers: how one web site is logged in to. See base.py for the interface."""
