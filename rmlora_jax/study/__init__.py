"""Studies: many runs from one config, one row a run, tables and pictures from the rows.

A layer on top of ``rmlora_jax.train``; nothing below imports it.
"""
