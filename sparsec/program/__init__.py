"""A whole token in one native call: the step of a causal model, as a program of the native library (kernels/program.py).

tape.py records what a step does, writer.py turns that into instructions, slabs.py holds the cache that a program reads and
writes, and decoder.py lets a model's forward run the program wherever it gives the same as the model's own code.
"""
