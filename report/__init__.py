"""From the records of runs to tables and figures: arrays and DataFrames in, numbers and axes out."""
