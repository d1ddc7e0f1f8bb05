"""The meters: what a program costs. Every number says how it was obtained."""
