"""Report pages of a run, and of several runs side by side.

A page is one file. It requests nothing from a network, follows the reader's light or
dark theme, and needs a script only for interaction.
"""
