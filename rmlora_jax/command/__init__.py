"""The command line: ``rmlora`` with its words, and run.py with the same flags."""
