"""Pages that show what came of a run, and of several side by side.

A page is one file, asks nothing of any network, is light or dark as its reader's screen
is, and needs no script but to be pointed at.
"""
