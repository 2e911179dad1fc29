"""Studies: many runs from one config, one row a run, tables and pictures from the rows."""
