"""Measurements from the command line: single products (`python -m sparsec.bench`) and whole models (`--end-to-end MODEL`)."""
