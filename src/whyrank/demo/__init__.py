"""The whole road on the embedded almanac, in minutes, on a CPU."""
