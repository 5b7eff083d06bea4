"""Matmuls and their collectives, cut into chunks and pipelined: schedules, engines, the planner between them."""
