"""The native library: found, built, loaded."""
