"""From the records of runs to tables and figures. Reads files only, and loads no torch."""
