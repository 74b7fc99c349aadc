"""The servers that Switchboard is measured against, each set up as its own documentation says."""
