"""Moves bytes between the ranks of a group, and keeps the ranks in step. Knows no matmul."""
